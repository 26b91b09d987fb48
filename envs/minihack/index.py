"""Which seeds make up the splits of a family, disjoint by initial state.

Two seeds often give the same first screen, so disjoint seeds alone would leak test games into training. Every seed is hashed twice: its `state`
(glyphs, position, pack) and its `layout` (glyphs and position: what decides how the game is played). Seeds whose state was seen before are skipped,
and the split is chosen by the layout's own hash, so no first screen stands in two splits. A family with fewer than 20 layouts in its first 300 seeds
(the `_fixed` tasks) is split by the state instead.

Scanning takes seconds, so it runs once in a subprocess (`python -m envs.minihack.index FAMILY`) and its result is cached as JSON under
`$XDG_CACHE_HOME/ictjax` (default `~/.cache/ictjax`), keyed by the family and the versions of minihack and nle.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from envs.api import GameId
from envs.minihack.families import check_family, versions

SPLITS = ("train", "select", "test")
WANTED = {"train": 400, "select": 60, "test": 120}
_MAX_SEEDS = 3000
_FORMAT = 1
_PROBE, _FEW_LAYOUTS = 300, 20


def cache_path(family: str) -> pathlib.Path:
    """Where the index of a family is cached."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "ictjax" / f"minihack-{family}-{versions()}-{_FORMAT}.json"


def split_of(digest: str) -> str:
    """The split that a hex digest falls into: 60, 20 and 20 percent."""
    share = int(digest[:8], 16) % 100
    return "train" if share < 60 else "select" if share < 80 else "test"


def assign(hashes: list[tuple[str, str]]) -> dict[str, list[int]]:
    """Seeds per split, from the (state, layout) hashes of seeds 0, 1, 2, ...; stops when every split is full."""
    few = len({layout for _, layout in hashes[:_PROBE]}) < _FEW_LAYOUTS
    splits: dict[str, list[int]] = {name: [] for name in SPLITS}
    seen = set()
    for seed, (state, layout) in enumerate(hashes):
        if state in seen:
            continue
        seen.add(state)
        split = splits[split_of(state if few else layout)]
        split.append(seed)
    return {name: seeds[: WANTED[name]] for name, seeds in splits.items()}


def scan(family: str) -> dict[str, list[int]]:
    """Resets seeds 0, 1, 2, ... until every split is full or 3,000 seeds were seen."""
    from envs.minihack.game import MiniHackGame

    game = MiniHackGame(family, style="compact")
    hashes: list[tuple[str, str]] = []
    try:
        for seed in range(_MAX_SEEDS):
            game.reset(GameId(env="minihack", family=family, key=str(seed)))
            hashes.append((game.state_hash(), game.layout_hash()))
            if seed % 100 == 99 and seed >= _PROBE and all(len(s) == WANTED[name] for name, s in assign(hashes).items()):
                break
    finally:
        game.close()
    return assign(hashes)


def _read(path: pathlib.Path) -> dict[str, list[int]] | None:
    """The cached index, or None when there is none or it cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if sorted(data) == sorted(SPLITS) and all(isinstance(seed, int) for seeds in data.values() for seed in seeds):
            return data
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    return None


def _write(path: pathlib.Path, data: dict[str, list[int]]):
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@functools.cache
def _splits(family: str) -> dict[str, tuple[GameId, ...]]:
    path = cache_path(family)
    data = _read(path)
    if data is None:
        root = pathlib.Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}
        done = subprocess.run(
            [sys.executable, "-m", "envs.minihack.index", family],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"Scanning the games of {family!r} failed: {done.stderr.strip()[-500:]}")
        data = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: tuple(GameId(env="minihack", family=family, key=str(seed)) for seed in data[name]) for name in SPLITS}


def load_index(family: str, split: str) -> tuple[GameId, ...]:
    """The games of a split, in the order of their seeds. Raises ValueError for an unknown family or split."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; the splits are: {', '.join(SPLITS)}.")
    return _splits(check_family(family))[split]


def main(arguments: list[str]) -> int:
    """Scans one family, stores its index and writes it to standard output as one line of JSON."""
    if len(arguments) != 1:
        sys.stderr.write("Usage: python -m envs.minihack.index FAMILY\n")
        return 2
    try:
        family = check_family(arguments[0])
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    data = scan(family)
    try:
        _write(cache_path(family), data)
    except OSError as error:  # a read-only home is no reason to fail: the parent reads standard output
        sys.stderr.write(f"The index could not be cached: {error}\n")
    sys.stdout.write(json.dumps(data) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
