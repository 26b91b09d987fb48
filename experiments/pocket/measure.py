"""How far the pocket models are what they should be: an actor that acts on its prompt, a reflector
that is right some of the time.

Both run in the real system (worker pool, sampler, rollout) on test games of both benchmarks, which
share no initial state with the training games.
"""

import pathlib
import random
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

from envs.registry import load_environment
from experiments.console import counting_bar
from experiments.pocket import lessons
from experiments.presets import POCKET_ALFWORLD, POCKET_MINIHACK
from experiments.run_dir import open_pool
from ictjax import keys
from ictjax.players import open_model
from ictjax.records import Context, Trajectory
from ictjax.reflector import Reflector
from ictjax.rollout import Episode, rollout, success_rate
from ictjax.run_config import TrainConfig

_DISTRACTORS = 2
_REPLIES = 8
_BENCHMARKS: Mapping[str, tuple[TrainConfig, Mapping[str, lessons.Lesson]]] = {
    "minihack": (POCKET_MINIHACK, lessons.MINIHACK_LESSONS),
    "alfworld": (POCKET_ALFWORLD, lessons.ALFWORLD_LESSONS),
}


def _prompt(
    family: str,
    lesson: lessons.Lesson | None,
    rng: random.Random,
    *,
    others: int,
    held_out: bool = False,
) -> str:
    group = lessons.benchmark_of(family)
    sentences = [
        lessons.word_lesson(group[name], rng)
        for name in rng.sample([name for name in group if name != family], others)
    ]
    if lesson is not None:
        sentences.append(lessons.word_lesson(lesson, rng, held_out=held_out))
    return lessons.build_prompt(sentences, rng, lessons.headers(family))


# The prompts under which the actor is measured, by name: each takes the family and a random
# generator.
ACTOR_PROMPTS: dict[str, Callable[[str, random.Random], str]] = {
    "right": lambda family, rng: _prompt(
        family, lessons.FAMILY_LESSONS[family], rng, others=_DISTRACTORS
    ),
    "right_held_out_wording": lambda family, rng: _prompt(
        family, lessons.FAMILY_LESSONS[family], rng, others=_DISTRACTORS, held_out=True
    ),
    "as_reflected": lambda family, rng: lessons.reflector_prompt(lessons.FAMILY_LESSONS[family]),
    "wrong_only": lambda family, rng: _prompt(family, None, rng, others=_DISTRACTORS + 1),
    "misleading": lambda family, rng: _prompt(
        family,
        lessons.misleading_lesson(lessons.FAMILY_LESSONS[family], rng),
        rng,
        others=_DISTRACTORS,
    ),
    "none": lambda family, rng: lessons.initial_prompt(family),
}


def measure(
    folder: pathlib.Path, *, test_games: int, console: Console, actor_only: bool = False
) -> dict:
    """Success rates of the actor per family and arm, and the reflector's right-lesson rate, all as
    fractions, by benchmark.

    Args:
      folder: holds `actor` and `reflector`.
      test_games: per family and arm, and for the contexts that the reflector reads.
      console: gets a bar per model and benchmark.
      actor_only: leave the reflector out.
    """
    report = {}
    for name, (preset, group) in _BENCHMARKS.items():
        rows: dict[str, dict[str, float]] = {family: {} for family in group}
        novices = _measure_actor(folder / "actor", preset, rows, test_games, console, name)
        if not actor_only:
            _measure_reflector(folder / "reflector", preset, rows, novices, console, name)
        columns = next(iter(rows.values()))
        report[name] = {
            "families": rows,
            "mean": {
                column: sum(row[column] for row in rows.values()) / len(rows) for column in columns
            },
        }
    return report


def _measure_actor(
    folder: pathlib.Path,
    preset: TrainConfig,
    rows: dict[str, dict[str, float]],
    test_games: int,
    console: Console,
    name: str,
) -> dict[str, Sequence[Trajectory]]:
    """Adds the success under every arm to `rows`; returns the episodes without a lesson."""
    environment = load_environment(preset.task.environment.name, preset.task.environment.options)
    games = {family: environment.games(family, "test")[:test_games] for family in rows}
    novices: dict[str, Sequence[Trajectory]] = {}
    with (
        open_pool(preset.task.environment) as pool,
        open_model(folder, num_conversations=1, sizes=preset.actor_sampler) as speaker,
        counting_bar(f"actor, {name}", console) as advance,
    ):
        done = 0
        for arm, make_prompt in ACTOR_PROMPTS.items():
            for family in rows:
                episodes = [
                    Episode(
                        game=game, system_prompt=make_prompt(family, random.Random(f"{arm} {game}"))
                    )
                    for game in games[family]
                ]
                played = rollout(speaker, pool, episodes, preset.task.rollout)
                rows[family][arm] = success_rate(played) or 0.0
                if arm == "none":
                    novices[family] = played
                done += 1
                advance(done, len(ACTOR_PROMPTS) * len(rows))
    return novices


def _measure_reflector(
    folder: pathlib.Path,
    preset: TrainConfig,
    rows: dict[str, dict[str, float]],
    novices: Mapping[str, Sequence[Trajectory]],
    console: Console,
    name: str,
) -> None:
    """Adds to `rows` how often the reflector, after failed episodes, writes the right lesson, does
    so where it names the thing, and is malformed.
    """
    size = preset.meta.games_per_context
    with (
        open_model(folder, num_conversations=1, sizes=preset.reflector_sampler) as speaker,
        counting_bar(f"reflector, {name}", console) as advance,
    ):
        reflector = Reflector(speaker, preset.reflection, temperature=1.0)
        for done, (family, episodes) in enumerate(novices.items()):
            contexts = [
                Context(
                    loop=0,
                    meta_turn=0,
                    family=family,
                    system_prompt=lessons.initial_prompt(family),
                    trajectories=tuple(episodes[(start + i) % len(episodes)] for i in range(size)),
                )
                for start in range(len(episodes))
            ]
            group_keys = [
                [keys.fold((0, 0), "measure", family, q, g) for g in range(_REPLIES)]
                for q in range(len(contexts))
            ]
            groups = reflector.candidates(contexts, group_keys)
            right = lessons.FAMILY_LESSONS[family]
            replies = [candidate for group in groups for candidate in group]
            hits = [
                candidate.system_prompt == lessons.reflector_prompt(right) for candidate in replies
            ]
            named = [right.thing in candidate.analysis.split() for candidate in replies]
            rows[family]["reflector right"] = sum(hits) / len(hits)
            rows[family]["right given named"] = sum(
                h and n for h, n in zip(hits, named, strict=True)
            ) / max(sum(named), 1)
            rows[family]["malformed"] = sum(
                candidate.system_prompt is None for candidate in replies
            ) / len(replies)
            advance(done + 1, len(rows))
