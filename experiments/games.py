"""Which games there are, and how to have others."""

import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from envs.alfworld import generate, index
from envs.alfworld.pack import write_pack
from envs.alfworld.sources import open_source
from envs.alfworld.tables import FAMILIES, load_tables
from envs.api import Environment, GameId
from envs.registry import describe
from experiments.command import unknown
from experiments.commands.games import (
    CheckGames,
    EnvironmentArgs,
    GenerateGames,
    ListGames,
    PackGames,
    main,
)
from experiments.console import counting_bar
from experiments.run_dir import check_families, open_environment
from experiments.tasks import parse_options

_SPLITS = ("train", "select", "test")
_OFFICIAL_SPLIT = MappingProxyType(
    {"train": "train", "select": "valid_seen", "test": "valid_unseen"}
)
_SHOWN_FAULTS = 10
_PLAIN: Mapping[str, bool] = MappingProxyType(
    {"highlight": False, "markup": False, "soft_wrap": True}
)


def list_games(args: ListGames, console: Console) -> None:
    """Prints a table of counts and what the environment says about its games."""
    environment, families = _environment(args)
    about = describe(environment)
    official = index.OFFICIAL_SPLITS[1:] if args.env == "alfworld" else ()
    counts = {}
    with counting_bar("counting") as advance:
        advance(0, len(families))
        for done, family in enumerate(families, 1):
            counts[family] = [_count(environment, family, split) for split in (*_SPLITS, *official)]
            advance(done, len(families))
    table = _table(args.env, "family", *_SPLITS, *official)
    for family, row in counts.items():
        table.add_row(family, *(f"{count:,}" if count else "-" for count in row))
    table.add_section()
    table.add_row("all", *(f"{sum(column):,}" for column in zip(*counts.values(), strict=True)))
    console.print(table)
    for name, value in about.items():
        if name != "counts" and value:
            console.print(f"{name}: {value}", **_PLAIN)


def pack_games(args: PackGames, console: Console) -> None:
    """Writes the packed file and says what is in it."""
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: name a file.")
    source = open_source(args.data)
    if source is None:
        raise ValueError(
            f"--data {args.data} names no download: give its folder, or alfworld-download one"
            " first."
        )
    with counting_bar("packing") as advance:
        number = write_pack(source, args.out, advance)
    found = source.index()
    console.print(
        f"{number:,} games in {args.out}, {args.out.stat().st_size / 2**20:.1f} MiB, sha256 of the"
        f" games {found.manifest}.",
        **_PLAIN,
    )
    if missing := index.what_is_missing(found, source.path):
        console.print(missing, **_PLAIN)
    console.print(
        f"Use it with data={args.out.absolute()} or ALFWORLD_DATA={args.out.absolute()}", **_PLAIN
    )


def generate_games(args: GenerateGames, console: Console) -> None:
    """Writes the tree."""
    for family in args.families:
        if family not in FAMILIES:
            raise unknown(f"Unknown family {family!r} of alfworld", family, list(FAMILIES))
    root = args.out / "json_2.1.1"
    if root.exists():
        raise ValueError(
            f"{root} exists: choose a new --out, so that games of different origin do not mix."
        )
    rooms = generate.rooms_named(args.rooms)
    tasks = [
        (split, seed)
        for split in _SPLITS
        for family in args.families or FAMILIES
        for seed in generate.seeds(family, split)[: args.games]
    ]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        # in a folder of its own until it is whole, so that the same command can be given again
        with tempfile.TemporaryDirectory(prefix="generating-", dir=args.out) as folder:
            unfinished = pathlib.Path(folder) / root.name
            with counting_bar("generating") as advance:
                for done, (split, seed) in enumerate(tasks, 1):
                    _write_game(unfinished / _OFFICIAL_SPLIT[split], seed, rooms)
                    advance(done, len(tasks))
            logic = args.out / "logic"
            logic.mkdir(exist_ok=True)
            (logic / "alfred.pddl").write_text(load_tables().domain, encoding="utf-8")
            (logic / "alfred.twl2").write_text(load_tables().grammar, encoding="utf-8")
            unfinished.rename(root)
    except OSError as error:
        raise ValueError(
            f"Cannot write below {args.out} ({error.strerror}): choose another --out."
        ) from error
    console.print(
        f"{len(tasks):,} games below {root}. Use them with data={args.out.absolute()}", **_PLAIN
    )
    console.print(f"For the stock environment: ALFWORLD_DATA={args.out.absolute()}", **_PLAIN)


def _write_game(folder: pathlib.Path, seed: int, rooms: generate.Rooms) -> None:
    draft = generate.draw(seed, rooms)
    task = f"{FAMILIES[draft.family]}-{draft.sought}-None-{draft.goal}-{draft.plan}"
    trial = folder / task / f"{index.GENERATED_TRIAL}{rooms.name}_{seed}"
    trial.mkdir(parents=True)
    (trial / "traj_data.json").write_text(json.dumps(generate.trajectory(draft)), encoding="utf-8")
    (trial / "game.tw-pddl").write_text(
        json.dumps(generate.content(draft, f"{rooms.name}_{seed}")), encoding="utf-8"
    )


def check_games(args: CheckGames, console: Console) -> None:
    """Prints, per family and split, how many games and initial states there are, and what splits
    share.
    """
    environment, families = _environment(args)
    chosen = {
        (family, split): tuple(environment.games(family, split))[: args.games or None]
        for family in families
        for split in _SPLITS
    }
    total, done = sum(map(len, chosen.values())), 0
    table = _table(args.env, "family", "split", "games", "states", "shared", "won")
    first_split: dict[str, str] = {}  # of every initial state
    faults = []
    with counting_bar("starting") as advance:
        for (family, split), games in chosen.items():
            states, shared, wins = set(), 0, 0
            for game, state, won in _started(environment, family, games, args.solve):
                done += 1
                advance(done, total)
                states.add(state)
                wins += won
                if args.solve and not won:
                    faults.append(f"{game} is not won by its walkthrough.")
                if first_split.setdefault(state, split) != split:
                    shared += 1
                    faults.append(f"{game} of {split} starts in a state of {first_split[state]}.")
            counts = [f"{count:,}" for count in (len(games), len(states), shared)]
            table.add_row(family, split, *counts, f"{wins:,}" if args.solve else "-")
    console.print(table)
    for fault in faults[:_SHOWN_FAULTS]:
        console.print(fault, **_PLAIN)
    won = " Every game is won by its walkthrough." if args.solve else ""
    console.print(
        f"{len(faults):,} faults." if faults else f"No initial state is in two splits.{won}",
        **_PLAIN,
    )
    if faults:
        sys.exit(1)


def _started(
    environment: Any, family: str, games: Sequence[GameId], solve: bool
) -> Iterator[tuple[GameId, str, bool]]:
    """Every game, the hash of its initial state, and whether its walkthrough wins it, every command
    being admissible in its turn.
    """
    live = environment.open(family)
    try:
        for game in games:
            observation = live.reset(game)
            state, won = live.state_hash(), False
            for command in environment.walkthrough(game) if solve else ():
                if command not in observation.actions:
                    break
                step = live.step(command)
                observation, won = step.observation, step.outcome is not None
            yield game, state, won
    finally:
        live.close()


def _environment(args: EnvironmentArgs) -> tuple[Environment, tuple[str, ...]]:
    environment = open_environment(args.env, parse_options(args.options))
    check_families(environment, args.families)
    return environment, args.families or environment.families


def _count(environment: Environment, family: str, split: str) -> int:
    try:
        return len(environment.games(family, split))
    except ValueError:  # a split that is not there, or not downloaded
        return 0


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("family", "split") else "right")
    return table


if __name__ == "__main__":
    main()
