"""What the reflector's prompts name, by what their contexts hold:
python -m experiments.smollm.named --run-dir DIR.

A reward says whether a prompt helps, this says why: whether it names a verb that a game was won
with, one that a game was lost with, asks to go on trying, or none of these.
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from experiments.command import Flags, parse, run_main
from experiments.smollm.lessons import EXPLORE
from ictjax.ranges import Range
from ictjax.records import Context

if TYPE_CHECKING:
    from rich.table import Table

_DESCRIPTION = (
    "Says of the prompts of a SmolLM2 run, by iteration and by arm of its evaluation, whether they"
    " name a verb that a game of their context was won with, one that a game was lost with, or ask"
    " to go on trying; and how many analyses tell rightly how each game ended."
)
KINDS = ("won", "lost", "go on", "other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedArgs(Flags):
    """Whose prompts."""

    run_dir: Annotated[tuple[pathlib.Path, ...], tyro.conf.arg(metavar="DIR ...")]
    """The run, or several whose prompts are counted together."""
    block: Annotated[int, Range(1, 1_000_000)] = 4
    """Iterations that a line of the table counts together."""
    by_turn: bool = False
    """Count contexts of the first meta-turn, under the initial prompt, and of later ones, under a
    prompt of the reflector's own, apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reflection:
    """One reply to a context, and what its prompt won."""

    context: Context
    analysis: str
    system_prompt: str  # empty where the reply was malformed
    reward: float  # share of games won under it, in [0, 1]; 0 where none was played


def named(context: Context, system_prompt: str) -> str:
    """What a prompt names: one of `KINDS`. A verb that won one game and lost another counts as
    one that won. The name of a task ("When the task is cool, ...") is none of a verb.
    """
    text = re.sub(r"\btask (?:is )?\w+", "task", system_prompt.lower())
    if EXPLORE.lower().rstrip(".") in text:
        return "go on"
    words = set(re.findall("[a-z]+", re.sub(r"\bput (it )?on\b", "puton", text)))
    verbs: dict[bool, set[str]] = {True: set(), False: set()}
    for verb, won in _endings(context):
        verbs[won].add(verb)
    if verbs[True] & words:
        return "won"
    return "lost" if verbs[False] & words else "other"


def tells_how_it_ended(context: Context, analysis: str) -> bool:
    """Whether an analysis says of every game of its context, in the taught form, which verb came
    last and whether that won.
    """
    return analysis.startswith(
        " ".join(
            f"Episode {number} was {'won' if won else 'lost'} with {verb}."
            for number, (verb, won) in enumerate(_endings(context), start=1)
        )
    )


def _endings(context: Context) -> list[tuple[str, bool]]:
    """The last verb of every game, and whether the game was won."""
    return [
        ((episode.turns[-1].action.split() or [""])[0] if episode.turns else "", episode.success)
        for episode in context.trajectories
    ]


def of_training(run_dir: pathlib.Path) -> Iterator[tuple[int, Reflection]]:
    """Iteration and reply, of all candidates of a run. Raises ValueError for a damaged file, and
    where the contexts of an iteration are missing.
    """
    from ictjax.json_lines import read_records
    from ictjax.records import context_from_dict

    for path in sorted((run_dir / "prompts").glob("iteration_*.jsonl")):
        read = run_dir / "contexts" / path.name
        contexts = dict(enumerate(context_from_dict(row) for row in read_records(read).values))
        for row in read_records(path).values:
            if (context := contexts.get(row.get("context"))) is None:
                raise ValueError(
                    f"{read} does not hold a context of {path}: restore it, or leave out {run_dir}."
                )
            yield row["iteration"], _reflection(context, row, row["reward"])


def of_evaluation(run_dir: pathlib.Path) -> Iterator[tuple[str, Reflection]]:
    """Arm and reply, of all meta-turns that a run's evaluation scored. Raises ValueError for a
    damaged file.
    """
    from experiments.report_data import load_run
    from experiments.report_loops import loops
    from ictjax.records import context_from_dict

    for evaluation in load_run(run_dir).evaluations[:1]:
        for loop in loops(evaluation):
            for row in loop.prompts:
                context = loop.contexts.get(row["turn"] - 1)
                if loop.arm != "initial" and context is not None:
                    read = context_from_dict(context)
                    yield loop.arm, _reflection(read, row, row["success"])


def _reflection(context: Context, row: Mapping[str, Any], reward: float | None) -> Reflection:
    return Reflection(
        context=context,
        analysis=row["analysis"] or "",
        system_prompt=row["system_prompt"] or "",
        reward=reward or 0.0,
    )


def table_of(groups: Mapping[str, Sequence[Reflection]], *, won: bool) -> "Table":
    """A line for each group, of its contexts with a game won, or of those without."""
    from rich.table import Table

    kinds = [kind for kind in KINDS if won or kind != "won"]
    table = Table(
        title=f"What prompts name where {'a game' if won else 'none'} was won, %",
        caption="In brackets: games won under these prompts, %. read: analyses that are right.",
    )
    for column in ("iterations or arm", "n", "read", *kinds):
        table.add_column(column, justify="right" if table.columns else "left")
    for group, replies in groups.items():
        of_kind: dict[str, list[float]] = {kind: [] for kind in kinds}
        read = 0
        for one in replies:
            if any(episode.success for episode in one.context.trajectories) == won:
                of_kind[named(one.context, one.system_prompt)].append(one.reward)
                read += tells_how_it_ended(one.context, one.analysis)
        total = sum(map(len, of_kind.values()))
        if total:
            cells = [_cell(rewards, total) for rewards in of_kind.values()]
            table.add_row(group, str(total), f"{100 * read / total:.0f}", *cells)
    return table


def _cell(rewards: Sequence[float], total: int) -> str:
    if not rewards:
        return "0"
    return f"{100 * len(rewards) / total:.0f} ({100 * sum(rewards) / len(rewards):.0f})"


def report(args: NamedArgs) -> None:
    """Prints the tables. Raises ValueError where a run holds no reflections."""
    from experiments.console import Terminal

    groups: dict[str, list[Reflection]] = {}

    def add(group: str, reply: Reflection) -> None:
        if args.by_turn:
            group += ", later turns" if reply.context.meta_turn else ", first turn"
        groups.setdefault(group, []).append(reply)

    for run_dir in args.run_dir:
        for iteration, reply in of_training(run_dir):
            first = (iteration - 1) // args.block * args.block + 1
            add(f"{first}-{first + args.block - 1}", reply)
    for run_dir in args.run_dir:
        for arm, reply in of_evaluation(run_dir):
            add(arm, reply)
    if not groups:
        raise ValueError(
            f"{', '.join(map(str, args.run_dir))} holds no reflections: train or evaluate first."
        )
    console = Terminal()
    for won in (True, False):
        console.print(table_of(groups, won=won), "")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(
        lambda: report(parse(NamedArgs, "named", _DESCRIPTION, words)),
        "start it again to count.",
    )


if __name__ == "__main__":
    main()
