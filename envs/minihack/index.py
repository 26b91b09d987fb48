"""Which seeds make up the splits of a family, disjoint by initial state.

Two seeds often give the same first screen, so disjoint seeds alone would leak test games into
training. Every seed is hashed twice: its `state` (glyphs, position, pack) and its `layout` (glyphs
and position: what decides how the game is played). Seeds whose state was seen before are skipped,
and the split is chosen by the layout's own hash, so no first screen stands in two splits. A family
with fewer than 20 layouts in its first 300 seeds (the `_fixed` tasks) is split by the state
instead.

Scanning takes seconds, so it runs once in a subprocess (`python -m envs.minihack.index FAMILY`) and
its result is cached as JSON under `$XDG_CACHE_HOME/ictjax` (default `~/.cache/ictjax`), keyed by
the family and the versions of minihack and nle.

More games of a split than that (`load_more`) are made by going on with the seeds: the split of an
initial state does not depend on how many seeds are looked at, so these are as disjoint.

`python -m envs.minihack.index --report [FAMILY ...]` starts every game of the splits again and
counts what they share; without families, those of the two family splits, "sound" and "paper".
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from envs.api import GameId
from envs.cache_files import cache_file, write_json
from envs.minihack.families import FAMILY_SPLITS, check_family, versions

SPLITS = ("train", "select", "test")
WANTED = {"train": 400, "select": 60, "test": 120}
_MAX_SEEDS = 3000
# For more games: a split that so many seeds in a row have added nothing to has no more; counts are
# rounded up, so that what is kept serves many.
_FRUITLESS, _ROUND = 2000, 200
_FORMAT = 2  # 1 may hold the games of NetHack's own dungeon, see `console.build`
_PROBE, _FEW_LAYOUTS = 300, 20


def cache_path(family: str, more: str = "") -> pathlib.Path:
    """Where the index of a family is cached; `more`: that of more games, "test-400" for example."""
    name = f"{family}-{more}" if more else family
    return cache_file(f"minihack-{name}-{versions()}-{_FORMAT}.json")


def split_of(digest: str) -> str:
    """The split that a hex digest falls into: 60, 20 and 20 percent."""
    share = int(digest[:8], 16) % 100
    return "train" if share < 60 else "select" if share < 80 else "test"


def assign(
    hashes: Sequence[tuple[str, str]], wanted: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """Seeds per split, from the (state, layout) hashes of seeds 0, 1, 2, ...; at most as many as
    are wanted, by default `WANTED`.
    """
    wanted = WANTED if wanted is None else wanted
    few = len({layout for _, layout in hashes[:_PROBE]}) < _FEW_LAYOUTS
    splits: dict[str, list[int]] = {name: [] for name in SPLITS}
    seen = set()
    for seed, (state, layout) in enumerate(hashes):
        if state in seen:
            continue
        seen.add(state)
        split = splits[split_of(state if few else layout)]
        split.append(seed)
    return {name: seeds[: wanted[name]] for name, seeds in splits.items()}


def scan_more(family: str, split: str, count: int) -> dict[str, list[int]]:
    """Resets seeds until one split has so many games, or finds no more."""
    wanted = {**dict.fromkeys(SPLITS, 0), split: count}
    hashes: list[tuple[str, str]] = []
    found: list[int] = []
    for pair in _start(
        family, (GameId(env="minihack", family=family, key=str(seed)) for seed in itertools.count())
    ):
        hashes.append(pair)
        if len(hashes) % 500 == 0:
            found = assign(hashes, wanted)[split]
            last = found[-1] if found else 0
            if len(found) == count or len(hashes) - last > max(_FRUITLESS, _MAX_SEEDS - last):
                break
    return {name: found if name == split else [] for name in SPLITS}


def scan(family: str) -> dict[str, list[int]]:
    """Resets seeds 0, 1, 2, ... until every split is full or 3,000 seeds were seen."""
    hashes: list[tuple[str, str]] = []
    for pair in _start(
        family, (GameId(env="minihack", family=family, key=str(seed)) for seed in range(_MAX_SEEDS))
    ):
        hashes.append(pair)
        count = len(hashes)
        if (
            count % 100 == 0
            and count > _PROBE
            and all(len(s) == WANTED[name] for name, s in assign(hashes).items())
        ):
            break
    return assign(hashes)


def _start(family: str, games: Iterable[GameId]) -> Iterator[tuple[str, str]]:
    """The (state, layout) hashes of games of one family, in order."""
    from envs.minihack.game import MiniHackGame

    game = MiniHackGame(family, style="compact")
    try:
        for game_id in games:
            game.reset(game_id)
            yield game.state_hash(), game.layout_hash()
    finally:
        game.close()


def _read(path: pathlib.Path, limit: int = _MAX_SEEDS) -> dict[str, list[int]] | None:
    """The cached index, or None when there is none or it cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if _is_index(data, limit) else None


def _is_index(data: Any, limit: int = _MAX_SEEDS) -> bool:
    """Whether parsed JSON is what `assign` gives, of seeds below a limit."""
    if not isinstance(data, dict) or sorted(data) != sorted(SPLITS):
        return False
    if not all(isinstance(seeds, list) for seeds in data.values()):
        return False
    seeds = [seed for name in SPLITS for seed in data[name]]
    return all(type(seed) is int and 0 <= seed < limit for seed in seeds) and len(
        set(seeds)
    ) == len(seeds)


@functools.cache
def _splits(family: str) -> dict[str, tuple[GameId, ...]]:
    data = _read(cache_path(family)) or _scanned(family, [family], _MAX_SEEDS)
    return {name: _games(family, data[name]) for name in SPLITS}


@functools.cache
def _more(family: str, split: str, count: int) -> tuple[GameId, ...]:
    limit = sys.maxsize
    data = _read(cache_path(family, f"{split}-{count}"), limit) or _scanned(
        family, [family, "--more", split, str(count)], limit
    )
    return _games(family, data[split])


def _games(family: str, seeds: Iterable[int]) -> tuple[GameId, ...]:
    return tuple(GameId(env="minihack", family=family, key=str(seed)) for seed in seeds)


def _scanned(family: str, arguments: Sequence[str], limit: int) -> dict[str, list[int]]:
    """What this module prints for these arguments, in a process of its own."""
    root = pathlib.Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(
        # -P: no module of the working folder stands in for one of ours
        [sys.executable, "-P", "-m", "envs.minihack.index", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stderr.strip().splitlines()
    data = _parsed(done.stdout)
    if done.returncode != 0 or not _is_index(data, limit):
        raise ValueError(
            f"The games of MiniHack's {family} could not be started to divide them into splits"
            f" ({said[-1][-300:] if said else f'exit code {done.returncode}'}): see what"
            f" `python -m envs.minihack.index {family}` says."
        )
    return data


def _parsed(output: str) -> Any:
    """The last line, as JSON; None when it is none."""
    try:
        return json.loads((output.strip().splitlines() or [""])[-1])
    except ValueError:
        return None


def load_index(family: str, split: str) -> tuple[GameId, ...]:
    """The games of a split, in the order of their seeds. Raises ValueError for an unknown family or
    split, and when its games cannot be started.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; the splits are: {', '.join(SPLITS)}.")
    return _splits(check_family(family))[split]


def load_more(family: str, split: str, count: int) -> tuple[GameId, ...]:
    """So many games of a split, those of `load_index` first, or as many as there are. Raises
    ValueError as that does.
    """
    games = load_index(family, split)
    if count > len(games):
        games = _more(family, split, -(-count // _ROUND) * _ROUND)
    return games[:count]


class SplitCheck(NamedTuple):
    """What the splits of one family, or of several, were found to hold. Shared: in training and in
    SELECT or TEST as well.
    """

    num_games: Mapping[str, int]  # by split
    num_states: int  # different initial states (screen, position, pack)
    num_layouts: int  # different first screens
    shared_states: int
    shared_layouts: int


def check_splits(train: Sequence[str], heldout: Sequence[str] = ()) -> SplitCheck:
    """Starts every game and compares the TRAIN games of `train` with the SELECT and TEST games of
    all families, by initial state.

    `check_splits([family])` checks one family. Takes about 2 ms a game. Raises ValueError for an
    unknown family.
    """
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in SPLITS}
    for family in (*train, *heldout):
        for name in SPLITS if family in train else SPLITS[1:]:
            found[name] += _start(family, load_index(family, name))
    trained, others = set(found["train"]), {pair for name in SPLITS[1:] for pair in found[name]}
    states, layouts = ({pair[i] for pair in trained} & {pair[i] for pair in others} for i in (0, 1))
    return SplitCheck(
        num_games={name: len(pairs) for name, pairs in found.items()},
        num_states=len({state for state, _ in trained | others}),
        num_layouts=len({layout for _, layout in trained | others}),
        shared_states=len(states),
        shared_layouts=len(layouts),
    )


def report(families: Sequence[str]) -> Iterator[str]:
    """The lines of a Markdown table of `check_splits`, family by family; without families also of
    the family splits as a whole.
    """
    rows = {family: ([family], ()) for family in map(check_family, families)}
    if not rows:
        known = {
            family: None
            for split in FAMILY_SPLITS.values()
            for family in (*split.train, *split.heldout)
        }
        rows = {family: ([family], ()) for family in known} | {
            f"**{name}**": split for name, split in FAMILY_SPLITS.items()
        }
    yield (
        "| family | train | select | test | initial states | first screens | states shared |"
        " screens shared |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, (train, heldout) in rows.items():
        check = check_splits(train, heldout)
        yield f"| {' | '.join(map(str, (name, *check.num_games.values(), *check[1:])))} |"


def main(arguments: list[str]) -> int:
    """Scans one family, stores its index and writes it to standard output as one line of JSON; or
    writes the report.
    """
    parser = argparse.ArgumentParser(
        prog="python -m envs.minihack.index",
        description="Divides the games of a family into train, select and test, disjoint by"
        " initial state, and keeps the result; it is also written as a line of JSON.",
        epilog="`ictjax games list` lists the families.",
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="one, or any with --report")
    parser.add_argument(
        "--report",
        action="store_true",
        help="start all games of the splits again and write a table of what these share; without"
        " families, of those of the two family splits",
    )
    parser.add_argument(
        "--more",
        nargs=2,
        metavar=("SPLIT", "COUNT"),
        help="so many games of one split instead, or as many as its seeds give",
    )
    args = parser.parse_args(arguments)
    if args.more and (args.more[0] not in SPLITS or not args.more[1].isdecimal()):
        sys.stderr.write(f"--more takes one of {', '.join(SPLITS)} and a number of games.\n")
        return 2
    if not args.report and len(args.families) != 1:
        sys.stderr.write(f"Name one family, or --report; got {len(args.families)} families.\n")
        return 2
    try:
        if args.report:
            for line in report(args.families):
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
            return 0
        family = check_family(args.families[0])
        if args.more:
            split, count = args.more[0], int(args.more[1])
            path, data = cache_path(family, f"{split}-{count}"), scan_more(family, split, count)
        else:
            path, data = cache_path(family), scan(family)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    try:
        write_json(path, data)
    except OSError as error:  # a read-only home is no reason to fail
        sys.stderr.write(f"The index could not be cached: {error}\n")
    sys.stdout.write(json.dumps(data) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
