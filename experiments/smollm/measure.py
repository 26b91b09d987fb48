"""How far SmolLM2's adapters are what they should be: an actor that acts on its prompt, a reflector
that has the form and no more: python -m experiments.smollm.measure --model FILE --actor DIR.

Plays SELECT games, which share no initial state with those that taught, nor with TEST games.
"""

import dataclasses
import json
import pathlib
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.command import Flags, parse, run_main
from ictjax.ranges import Range

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.pocket.lessons import Lesson
    from ictjax.records import Trajectory

_DESCRIPTION = (
    "Plays MiniHack with an actor under prompts that are right, worded anew, wrong or misleading,"
    " and asks a reflector about episodes without a lesson. Writes a JSON file."
)
_REPLIES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureArgs(Flags):
    """What is measured, on how many games."""

    model: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder in Hugging Face layout, GGUF file, or id on the hub."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE")]
    """The JSON file to write."""
    actor: Annotated[str, tyro.conf.arg(metavar="DIR")] = "experiments/smollm/adapters/actor"
    """Folder of the actor's adapter."""
    reflector: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = ""
    """Folder of the reflector's adapter; it is left out where none is given."""
    games: Annotated[int, Range(1, 60)] = 4
    """Of every family, under every kind of prompt."""


Rows = dict[str, dict[str, float]]  # by family and column, in [0, 1]


def measure(args: MeasureArgs) -> None:
    """Plays, asks, prints a table and writes the file."""
    from rich.table import Table

    from experiments.console import Terminal
    from experiments.presets import model_folder
    from experiments.smollm import lessons
    from ictjax.run_files import write_lines

    console = Terminal()
    model = model_folder(args.model, "--model")
    rows: Rows = {family: {} for family in lessons.LESSONS}
    novices = _measure_actor(args, model, rows, console)
    if args.reflector:
        _measure_reflector(args, model, rows, novices, console)
    groups_of = {"trained": lessons.TRAIN_LESSONS, "held out": lessons.HELDOUT_LESSONS}
    columns = list(next(iter(rows.values())))
    for name, group in groups_of.items():
        rows[f"mean, {name}"] = {
            column: sum(rows[family][column] for family in group) / len(group) for column in columns
        }
    table = Table(title="SmolLM2 on SELECT games of MiniHack (%)")
    table.add_column("family")
    for column in columns:
        table.add_column(column, justify="right")
    for family, row in rows.items():
        table.add_row(family, *(f"{100 * row[column]:.0f}" for column in columns))
    console.print(table)
    write_lines(args.out, [json.dumps({"games": args.games, "rows": rows}, indent=1)])


def _prompts() -> Mapping[str, Callable[[str, random.Random], str]]:
    """The system prompt of each column, for a family."""
    from experiments.smollm import lessons

    def prompt(
        family: str, lesson: "Lesson | None", rng: random.Random, *, held_out: bool = False
    ) -> str:
        names = [name for name in lessons.LESSONS if name != family]
        others = [lessons.LESSONS[name] for name in rng.sample(names, 2 + (lesson is None))]
        sentences = [lessons.word_lesson(other, rng) for other in others]
        if lesson is not None:
            sentences.append(lessons.word_lesson(lesson, rng, held_out=held_out))
        return lessons.build_prompt(sentences, rng)

    return {
        "right": lambda family, rng: prompt(family, lessons.LESSONS[family], rng),
        "worded anew": lambda family, rng: prompt(
            family, lessons.LESSONS[family], rng, held_out=True
        ),
        "as reflected": lambda family, rng: (
            f"{lessons.HEADERS[1]} {lessons.plain_wording(lessons.LESSONS[family])}"
        ),
        "misleading": lambda family, rng: prompt(
            family, lessons.misleading_lesson(lessons.LESSONS[family], rng), rng
        ),
        "others only": lambda family, rng: prompt(family, None, rng),
        "none": lambda family, rng: lessons.HEADERS[0],
    }


def _measure_actor(
    args: MeasureArgs, model: pathlib.Path, rows: Rows, console: "Console"
) -> Mapping[str, Sequence["Trajectory"]]:
    """Fills in how often the actor wins under each kind of prompt; returns its games without a
    lesson, by family.
    """
    from envs.registry import load_environment
    from experiments.console import counting_bar
    from experiments.presets import SMOLLM2_MINIHACK, adapter_folder
    from experiments.run_dir import open_pool
    from ictjax.players import open_model
    from ictjax.rollout import Episode, rollout, success_rate

    task = SMOLLM2_MINIHACK.task
    environment = load_environment("minihack", task.environment.options)
    prompts = _prompts()
    by_family: dict[str, list[Trajectory]] = {}
    with (
        open_pool(task.environment) as pool,
        open_model(
            model,
            adapter=adapter_folder(args.actor, "--actor"),
            num_conversations=1,
            sizes=SMOLLM2_MINIHACK.actor_sampler,
        ) as speaker,
        counting_bar("actor", console) as advance,
    ):
        for number, (kind, make) in enumerate(prompts.items()):
            episodes = [
                Episode(game=game, system_prompt=make(game.family, random.Random(f"{kind} {game}")))
                for family in rows
                for game in environment.games(family, "select")[: args.games]
            ]
            by_family = {family: [] for family in rows}
            for played in rollout(speaker, pool, episodes, task.rollout):
                by_family[played.game.family].append(played)
            for family, games in by_family.items():
                rows[family][kind] = success_rate(games) or 0.0
            advance(number + 1, len(prompts))
    return by_family


def _measure_reflector(
    args: MeasureArgs,
    model: pathlib.Path,
    rows: Rows,
    novices: Mapping[str, Sequence["Trajectory"]],
    console: "Console",
) -> None:
    """Fills in what the reflector says about episodes without a lesson."""
    from experiments.console import counting_bar
    from experiments.presets import SMOLLM2_MINIHACK, adapter_folder
    from experiments.smollm import lessons
    from ictjax import keys
    from ictjax.players import open_model
    from ictjax.records import Context
    from ictjax.reflector import Reflector

    with (
        open_model(
            model,
            adapter=adapter_folder(args.reflector, "--reflector"),
            num_conversations=1,
            sizes=SMOLLM2_MINIHACK.reflector_sampler,
        ) as speaker,
        counting_bar("reflector", console) as advance,
    ):
        reflector = Reflector(speaker, SMOLLM2_MINIHACK.reflection, temperature=1.0)
        size = SMOLLM2_MINIHACK.meta.games_per_context
        for number, (family, games) in enumerate(novices.items()):
            contexts = [
                Context(
                    loop=0,
                    meta_turn=0,
                    family=family,
                    system_prompt=lessons.HEADERS[0],
                    trajectories=tuple(games[(at + i) % len(games)] for i in range(size)),
                )
                for at in range(len(games))
            ]
            groups = reflector.candidates(
                contexts,
                [
                    [keys.fold((0, 0), "measure", family, at, g) for g in range(_REPLIES)]
                    for at in range(len(contexts))
                ],
            )
            replies = [candidate for group in groups for candidate in group]
            texts = [(candidate.system_prompt or "").lower() for candidate in replies]
            right = lessons.LESSONS[family]
            verb = "put it on" if right.verb == "puton" else right.verb
            named = [right.thing in text for text in texts]
            hits = [
                name and f" {verb}" in f" {text}" for name, text in zip(named, texts, strict=True)
            ]
            rows[family] |= {
                "names it": sum(named) / len(named),
                "right verb": sum(hits) / len(hits),
                "malformed": texts.count("") / len(texts),
            }
            advance(number + 1, len(novices))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(
        lambda: measure(parse(MeasureArgs, "measure", _DESCRIPTION, words)),
        "start it again to measure.",
    )


if __name__ == "__main__":
    main()
