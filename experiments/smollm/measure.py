"""How far SmolLM2's adapters are what they should be: an actor that acts on its prompt, a reflector
that has the form and no more: python -m experiments.smollm.measure --model FILE --actor DIR.

Plays SELECT games, which share no initial state with those that taught, nor with TEST games: of all
families under the verbs' own names, and of training families under other names as well.
"""

import dataclasses
import json
import pathlib
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from experiments.command import Flags, parse, run_main
from experiments.local_path import check_place
from ictjax.ranges import Range

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.pocket.lessons import Lesson
    from ictjax.records import Trajectory
    from ictjax.run_config import TrainConfig

_DESCRIPTION = (
    "Plays MiniHack or ALFWorld with an actor under prompts that are right, worded anew, wrong or"
    " about other things, and asks a reflector about episodes without a lesson. Writes a JSON file."
)
_REPLIES = 8
_ACTOR = (
    "Games won under the right lesson among others, the same worded anew, the right one alone as"
    " the reflector words it, a wrong verb among others, other lessons, and none."
)
_REFLECTOR = "Replies that name the thing or task, its verb as well, and malformed ones."


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureArgs(Flags):
    """What is measured, on how many games."""

    model: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder in Hugging Face layout, GGUF file, or id on the hub."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE")]
    """The JSON file to write."""
    benchmark: Literal["minihack", "alfworld"] = "minihack"
    """What is played."""
    actor: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: ships)")] = ""
    """Folder of the actor's adapter."""
    reflector: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = ""
    """Folder of the reflector's adapter; it is left out where none is given."""
    games: Annotated[int, Range(1, 60)] = 4
    """Of every family, under every kind of prompt."""


Rows = dict[str, dict[str, float]]  # by family and column, in [0, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Benchmark:
    """What is played, and what can be said about it."""

    config: "TrainConfig"
    lessons: Mapping[str, "Lesson"]  # by family, in its own words
    misleading: Callable[[str, random.Random], "Lesson"]  # for a family
    others: Sequence["Lesson"]  # under the verbs' own names
    headers: Sequence[str]

    def groups(self) -> Mapping[str, Sequence[str]]:
        """Families whose mean is told."""
        from envs.renamings import MARK

        heldout = [
            family
            for family in self.config.task.environment.heldout_families
            if family in self.lessons
        ]
        renamed = [family for family in self.lessons if MARK in family]
        known = [family for family in self.lessons if family not in (*renamed, *heldout)]
        return {"own verbs": known, "renamed": renamed, "held out": heldout}


def _minihack() -> _Benchmark:
    from envs.minihack.renamed import renaming
    from experiments.presets import SMOLLM2_MINIHACK
    from experiments.smollm import lessons

    def rename(lesson: "Lesson", family: str) -> "Lesson":
        verb = renaming(family).get(lesson.verb, lesson.verb)  # "search" is offered nowhere
        return dataclasses.replace(lesson, verb=verb)

    return _benchmark(
        SMOLLM2_MINIHACK,
        lessons.LESSONS,
        rename,
        lessons.misleading_lesson,
        lessons.HEADERS,
    )


def _alfworld() -> _Benchmark:
    from envs.alfworld.short import renaming
    from experiments.presets import SMOLLM2_ALFWORLD
    from experiments.smollm import house, lessons

    return _benchmark(
        SMOLLM2_ALFWORLD,
        lessons.HOUSE_LESSONS,
        lambda lesson, family: house.renamed(lesson, renaming(family)),
        house.misleading_lesson,
        house.HEADERS,
    )


def _benchmark(
    config: "TrainConfig",
    lessons: Mapping[str, "Lesson"],
    rename: Callable[["Lesson", str], "Lesson"],
    misleading: Callable[["Lesson", random.Random], "Lesson"],
    headers: Sequence[str],
) -> _Benchmark:
    """All families by their own names, and training families by their first other names."""
    from envs.renamings import MARK

    def named(family: str, lesson: "Lesson") -> "Lesson":
        return rename(lesson, family) if MARK in family else lesson

    def right(family: str) -> "Lesson":
        return lessons[family.partition(MARK)[0]]

    settings = config.task.environment
    renamed = [family for family in settings.train_families if family.endswith(f"{MARK}0")]
    return _Benchmark(
        config=config,
        lessons={family: named(family, right(family)) for family in (*lessons, *renamed)},
        misleading=lambda family, rng: named(family, misleading(right(family), rng)),
        others=list(lessons.values()),
        headers=headers,
    )


_BENCHMARKS: Mapping[str, Callable[[], _Benchmark]] = {
    "minihack": _minihack,
    "alfworld": _alfworld,
}


def measure(args: MeasureArgs) -> None:
    """Plays, asks, prints a table and writes the file. Raises ValueError for a model, an adapter or
    a place to write to that is none, before the first game.
    """
    from rich.table import Table

    from experiments.console import Terminal
    from experiments.presets import adapter_folder, model_folder
    from ictjax.run_files import write_lines

    console = Terminal()
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: name a file.")
    check_place(args.out.parent, "--out")
    played = _BENCHMARKS[args.benchmark]()
    model = model_folder(args.model, "--model")
    actor = adapter_folder(args.actor or played.config.actor.adapter, "--actor")
    reflector = adapter_folder(args.reflector, "--reflector")
    rows: Rows = {family: {} for family in played.lessons}
    novices = _measure_actor(args, played, model, actor, rows, console)
    if reflector:
        _measure_reflector(played, model, reflector, rows, novices, console)
    columns = list(next(iter(rows.values())))
    for name, group in played.groups().items():
        rows[f"mean, {name}"] = {
            column: sum(rows[family][column] for family in group) / len(group) for column in columns
        }
    for caption, shown in (
        (_ACTOR, [column for column in columns if column in _prompts(played)]),
        (_REFLECTOR, [column for column in columns if column not in _prompts(played)]),
    ):
        if not shown:
            continue
        table = Table(title=f"SmolLM2 on SELECT games of {args.benchmark} (%)", caption=caption)
        table.add_column("family", no_wrap=True)
        for column in shown:
            table.add_column(column, justify="right")
        for family, row in rows.items():
            table.add_row(family, *(f"{100 * row[column]:.0f}" for column in shown))
        console.print(table)
    write_lines(args.out, [json.dumps({"games": args.games, "rows": rows}, indent=1)])


def _prompts(played: _Benchmark) -> Mapping[str, Callable[[str, random.Random], str]]:
    """The system prompt of each column, for a family."""
    from experiments.smollm import lessons

    def prompt(
        family: str, lesson: "Lesson | None", rng: random.Random, *, held_out: bool = False
    ) -> str:
        about = played.lessons[family].thing
        strangers = [other for other in played.others if other.thing != about]
        others = rng.sample(strangers, 2 + (lesson is None))
        sentences = [lessons.word_lesson(other, rng) for other in others]
        if lesson is not None:
            sentences.append(lessons.word_lesson(lesson, rng, held_out=held_out))
        return lessons.build_prompt(sentences, rng, played.headers)

    return {
        "right": lambda family, rng: prompt(family, played.lessons[family], rng),
        "anew": lambda family, rng: prompt(family, played.lessons[family], rng, held_out=True),
        "reflected": lambda family, rng: (
            f"{played.headers[1]} {lessons.plain_wording(played.lessons[family])}"
        ),
        "wrong": lambda family, rng: prompt(family, played.misleading(family, rng), rng),
        "others": lambda family, rng: prompt(family, None, rng),
        "none": lambda family, rng: played.headers[0],
    }


def _measure_actor(
    args: MeasureArgs,
    played: _Benchmark,
    model: str,
    adapter: str,
    rows: Rows,
    console: "Console",
) -> Mapping[str, Sequence["Trajectory"]]:
    """Fills in how often the actor wins under each kind of prompt; returns its games without a
    lesson, by family.
    """
    from envs.registry import load_environment
    from experiments.console import counting_bar
    from experiments.run_dir import open_pool
    from ictjax.players import open_model
    from ictjax.rollout import Episode, rollout, success_rate

    config = played.config
    settings = config.task.environment
    environment = load_environment(settings.name, settings.options)
    prompts = _prompts(played)
    by_family: dict[str, list[Trajectory]] = {}
    with (
        open_pool(settings) as pool,
        open_model(
            model,
            adapter=adapter,
            num_conversations=1,
            sizes=config.actor_sampler,
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
            for trajectory in rollout(speaker, pool, episodes, config.task.rollout):
                by_family[trajectory.game.family].append(trajectory)
            for family, games in by_family.items():
                rows[family][kind] = success_rate(games) or 0.0
            advance(number + 1, len(prompts))
    return by_family


def _measure_reflector(
    played: _Benchmark,
    model: str,
    adapter: str,
    rows: Rows,
    novices: Mapping[str, Sequence["Trajectory"]],
    console: "Console",
) -> None:
    """Fills in what the reflector says about episodes without a lesson."""
    from experiments.console import counting_bar
    from ictjax import keys
    from ictjax.players import open_model
    from ictjax.records import Context
    from ictjax.reflector import Reflector

    with (
        open_model(
            model,
            adapter=adapter,
            num_conversations=1,
            sizes=played.config.reflector_sampler,
        ) as speaker,
        counting_bar("reflector", console) as advance,
    ):
        reflector = Reflector(speaker, played.config.reflection, temperature=1.0)
        size = played.config.meta.games_per_context
        for number, (family, games) in enumerate(novices.items()):
            contexts = [
                Context(
                    loop=0,
                    meta_turn=0,
                    family=family,
                    system_prompt=played.headers[0],
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
            right = played.lessons[family]
            verb = "put it on" if right.verb == "puton" else right.verb
            named = [right.thing in text for text in texts]
            hits = [
                name and f" {verb}" in f" {text}" for name, text in zip(named, texts, strict=True)
            ]
            rows[family] |= {
                "thing": sum(named) / len(named),
                "verb": sum(hits) / len(hits),
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
