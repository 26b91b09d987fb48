"""How far the pocket models are what they should be: an actor that acts on its prompt, a reflector that is right some of the time.

Both run in the real system (worker pool, sampler, rollout) on test games, which share no initial state with the training games.
"""

import pathlib
import random
from collections.abc import Callable, Sequence

from rich.progress import Progress

from envs.registry import load_environment
from experiments.pocket import lessons
from experiments.presets import POCKET_MINIHACK
from experiments.run_dir import open_pool
from ictjax import keys
from ictjax.chat import ChatTokenizer
from ictjax.meta_env import reflector_prompt_ids, sample_candidates
from ictjax.models.hf import load_checkpoint
from ictjax.records import Context
from ictjax.rollout import Episode, rollout, success_rate
from ictjax.sampler import Sampler

_DISTRACTORS = 2
_REPLIES = 8


def _others(family: str, rng: random.Random, count: int) -> list[lessons.Lesson]:
    return [lessons.FAMILY_LESSONS[name][0] for name in rng.sample([name for name in lessons.FAMILY_LESSONS if name != family], count)]


def _prompt(family: str, lesson: lessons.Lesson | None, rng: random.Random, *, others: int, held_out: bool = False) -> str:
    sentences = [lessons.word_lesson(other, rng) for other in _others(family, rng, others)]
    if lesson is not None:
        sentences.append(lessons.word_lesson(lesson, rng, held_out=held_out))
    return lessons.build_prompt(sentences, rng)


# The prompts under which the actor is measured, by name: each takes the family and a random generator.
ARMS: dict[str, Callable[[str, random.Random], str]] = {
    "right": lambda family, rng: _prompt(family, lessons.FAMILY_LESSONS[family][0], rng, others=_DISTRACTORS),
    "right_held_out_wording": lambda family, rng: _prompt(
        family, lessons.FAMILY_LESSONS[family][0], rng, others=_DISTRACTORS, held_out=True
    ),
    "as_reflected": lambda family, rng: lessons.reflector_prompt(lessons.FAMILY_LESSONS[family][0]),
    "wrong_only": lambda family, rng: _prompt(family, None, rng, others=_DISTRACTORS + 1),
    "misleading": lambda family, rng: _prompt(
        family, lessons.misleading_lesson(lessons.FAMILY_LESSONS[family][0], rng), rng, others=_DISTRACTORS
    ),
    "none": lambda family, rng: lessons.INITIAL_PROMPT,
}


def measure(folder: pathlib.Path, families: Sequence[str], *, test_games: int, progress: Progress) -> dict:
    """Success rates of the actor per family and arm, and the reflector's right-lesson rate, all as fractions.

    Args:
      folder: holds `actor` and `reflector`.
      families: which to measure.
      test_games: per family and arm, and for the contexts that the reflector reads.
      progress: gets a bar per model.
    """
    preset = POCKET_MINIHACK
    environment = load_environment(preset.environment.name, preset.environment.options)
    games = {family: environment.games(family, "test")[:test_games] for family in families}
    rows: dict[str, dict[str, float]] = {family: {} for family in families}
    chat = ChatTokenizer(folder / "actor")
    model, params = load_checkpoint(folder / "actor")
    with (
        open_pool(preset.environment) as pool,
        Sampler(model, params, preset.actor_sampler, chat.pad_id) as sampler,
    ):
        task = progress.add_task("measure actor", total=len(ARMS) * len(families), note="")
        novice: dict[str, list] = {}
        for arm, make_prompt in ARMS.items():
            for family in families:
                episodes = [Episode(game=game, system_prompt=make_prompt(family, random.Random(f"{arm} {game}"))) for game in games[family]]
                played = rollout(sampler, chat, pool, episodes, preset.rollout)
                rows[family][arm] = success_rate(played) or 0.0
                if arm == "none":
                    novice[family] = played
                progress.update(task, advance=1, note=f"{arm} {family}")
    chat = ChatTokenizer(folder / "reflector")
    model, params = load_checkpoint(folder / "reflector")
    with Sampler(model, params, preset.reflector_sampler, chat.pad_id) as sampler:
        task = progress.add_task("measure reflector", total=len(families), note="")
        size = preset.meta.games_per_context
        for family in families:
            contexts = [
                Context(
                    loop=0,
                    meta_turn=0,
                    family=family,
                    system_prompt=lessons.INITIAL_PROMPT,
                    trajectories=tuple(novice[family][(start + i) % test_games] for i in range(size)),
                )
                for start in range(test_games)
            ]
            prompts = [reflector_prompt_ids(chat, preset.reflection, context) for context in contexts]
            group_keys = [[keys.fold((0, 0), "measure", family, q, g) for g in range(_REPLIES)] for q in range(len(contexts))]
            groups = sample_candidates(sampler, chat, preset.reflection, prompts, group_keys, 1.0)
            right = lessons.FAMILY_LESSONS[family][0]
            replies = [candidate for group in groups for candidate in group]
            hits = [candidate.system_prompt == lessons.reflector_prompt(right) for candidate in replies]
            named = [right.thing in candidate.analysis.split() for candidate in replies]
            rows[family]["reflector right"] = sum(hits) / len(hits)
            rows[family]["right given named"] = sum(h and n for h, n in zip(hits, named, strict=True)) / max(sum(named), 1)
            rows[family]["malformed"] = sum(candidate.system_prompt is None for candidate in replies) / len(replies)
            progress.update(task, advance=1, note=family)
    names = list(rows[families[0]])
    return {"families": rows, "mean": {name: sum(row[name] for row in rows.values()) / len(rows) for name in names}}
