"""Supervised rows for the pocket models, made of scripted play: token ids and the weight of each as
a target.

The actor's rows teach obedience. The same kind of screen comes under a lesson that is right, a
lesson that pairs the thing with a random verb (and a player who follows it to the letter), and
lessons about other things only (and a novice who fails). In half of the rows the thing is renamed
throughout, so that remembering which verb suits which thing never pays.
"""

import dataclasses
import itertools
import random
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from envs.api import GameId, Outcome
from experiments.pocket.lessons import (
    ALFWORLD_LESSONS,
    FAMILY_LESSONS,
    MINIHACK_LESSONS,
    OTHER_NOUNS,
    STATIONS,
    TASK_THINGS,
    TASK_VERBS,
    THINGS,
    VERBS,
    Lesson,
    benchmark_of,
    build_prompt,
    headers,
    initial_prompt,
    is_task,
    random_lesson,
    random_task_lesson,
    reflector_prompt,
    word_lesson,
)
from experiments.pocket.tokenizer import END, UNKNOWN
from ictjax.config import ReflectorConfig
from ictjax.records import Context, Trajectory, Turn
from ictjax.reflector import reflector_messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlayedTurn:
    """One turn of scripted play: the compact observation, the thought, and the action taken."""

    observation: str
    thought: str
    action: str

    @property
    def reply(self) -> str:
        return f"Thought: {self.thought} Action: {self.action}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlayedGame:
    """One scripted episode. `lesson` is what the player followed; None for the novice, who knows
    none that applies.
    """

    family: str
    key: str
    lesson: Lesson | None
    turns: tuple[PlayedTurn, ...]
    final_observation: str
    success: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Token ids and, for each, its weight as a prediction target (0: context only)."""

    ids: np.ndarray
    weights: np.ndarray


class WordTable:
    """Ids of single-space separated words: what the pocket tokenizer gives for such text, without
    its overhead.
    """

    def __init__(self, tokenizer):
        self._ids = tokenizer.get_vocab()
        self.unknown = self._ids[UNKNOWN]

    def __call__(self, text: str) -> list[int]:
        """The ids of `text`; the two-word heading counts as one word, an ellipsis as three."""
        words = text.replace("IMPROVED PROMPT:", "IMPROVED_PROMPT:").replace("...", ". . .").split()
        return [self._ids.get(word.replace("_PROMPT:", " PROMPT:"), self.unknown) for word in words]


def things_in(turns: Iterable[PlayedTurn]) -> set[str]:
    """What lessons are about in these turns: the things on the screen, and the tasks that it names
    (as `task clean`).
    """
    words = [word for turn in turns for word in turn.observation.split()]
    tasks = {f"task {word}" for before, word in itertools.pairwise(words) if before == "task"}
    return (set(words) & set(THINGS)) | tasks


def rename_words(text: str, renaming: Mapping[str, str]) -> str:
    """`text` with things and tasks renamed. The name of a task is also a verb, so it is renamed
    only after `task` and at the head of a thought.
    """
    words = text.split()
    keys = (
        f"task {word}" if before in ("task", "Thought:") else ""
        for before, word in zip(("", *words), words, strict=False)
    )
    return " ".join(
        renaming.get(key) or renaming.get(word, word) for key, word in zip(keys, words, strict=True)
    )


def _distractor(
    lessons: Mapping[str, Lesson], taken: Collection[str], rng: random.Random
) -> Lesson:
    """A lesson of one benchmark about something else: a right one or, as often, one of random parts
    about a thing that may not exist.
    """
    absent = [lesson for lesson in lessons.values() if lesson.thing not in taken]
    if absent and rng.random() < 0.5:
        return rng.choice(absent)
    names = [lesson.thing for lesson in absent] + rng.sample(
        [noun for noun in OTHER_NOUNS if noun not in taken], 8
    )
    return (
        random_task_lesson(names, STATIONS, rng)
        if lessons is ALFWORLD_LESSONS
        else random_lesson(names, rng)
    )


def actor_row(
    parts: Sequence[tuple[PlayedGame, Sequence[PlayedTurn]]],
    words: WordTable,
    rng: random.Random,
    *,
    max_distractors: int,
    max_tokens: int,
) -> Row:
    """A conversation under a drawn prompt that holds the lessons which the players of `parts`
    followed, among lessons about absent things.

    One part with all its turns is an episode. Several parts with one turn each are a drill: every
    reply must search the prompt anew, which teaches obedience several times faster than episodes
    do, where later replies repeat the first thought. The first reply of a part weighs three times
    as much as the later ones.
    """
    present = sorted(things_in(turn for _, turns in parts for turn in turns))
    on_screen = {word for _, turns in parts for turn in turns for word in turn.observation.split()}
    renaming: dict[str, str] = {}
    if rng.random() < 0.5:
        fresh = rng.sample(
            [noun for noun in (*OTHER_NOUNS, *THINGS) if noun not in on_screen], len(present)
        )
        renaming = dict(zip(present, fresh, strict=True))

    def rename_lesson(lesson: Lesson) -> Lesson:
        key = f"task {lesson.thing}" if is_task(lesson) else lesson.thing
        return dataclasses.replace(lesson, thing=renaming.get(key, lesson.thing))

    known = [rename_lesson(game.lesson) for game, _ in parts if game.lesson is not None]
    sentences = [word_lesson(lesson, rng) for lesson in known]
    families = [game.family for game, _ in parts]
    taken = {*on_screen, *renaming.values(), *(thing.removeprefix("task ") for thing in present)}
    for _ in range(rng.randint(0, max_distractors)):
        sentences.append(
            word_lesson(_distractor(benchmark_of(rng.choice(families)), taken, rng), rng)
        )
    if not sentences and rng.random() < 0.7:
        prompt = initial_prompt(families[0])
    else:
        prompt = build_prompt(sentences, rng, headers(rng.choice(families)))
    kept = {word for lesson in known for word in (lesson.thing, lesson.manner, lesson.verb)}
    prompt = " ".join(
        UNKNOWN if word not in kept and rng.random() < 0.03 else word for word in prompt.split()
    )

    ids = words(f"<system> {prompt} {END}")
    weights = [0.0] * len(ids)
    for _, turns in parts:
        for index, turn in enumerate(turns):
            asked = words(f"<user> {rename_words(turn.observation, renaming)} {END} <assistant>")
            reply = words(f"{rename_words(turn.reply, renaming)} {END}")
            if len(ids) + len(asked) + len(reply) > max_tokens:
                break
            ids += asked + reply
            weights += [0.0] * len(asked) + [3.0 if index == 0 else 1.0] * len(reply)
    return Row(ids=np.array(ids, np.int32), weights=np.array(weights, np.float32))


def doubled_row(words: WordTable, rng: random.Random) -> Row:
    """Random words, twice over: predicting the second half takes the look-up that obeying a prompt
    is built on, and teaches it sooner.
    """
    drawn = words(
        " ".join(
            rng.choices(
                [*THINGS, *OTHER_NOUNS, *VERBS, *TASK_VERBS, *STATIONS], k=rng.randint(10, 30)
            )
        )
    )
    count = len(drawn)
    return Row(
        ids=np.array(drawn * 2, np.int32),
        weights=np.array([0.0] * (count + 1) + [1.0] * (count - 1), np.float32),
    )


class ActorRows:
    """Draws rows for the actor. The same games, seed and calls give the same rows."""

    def __init__(
        self, games: Sequence[PlayedGame], words: WordTable, *, max_tokens: int, seed: int
    ):
        self._by_family: dict[str, list[PlayedGame]] = {}
        for game in games:
            self._by_family.setdefault(game.family, []).append(game)
        families = sorted(self._by_family)
        benchmarks = [
            [name for name in families if name in lessons]
            for lessons in (MINIHACK_LESSONS, ALFWORLD_LESSONS)
        ]
        self._pools = [pool for pool in benchmarks if pool]
        self._families = families
        self._words = words
        self._max_tokens = max_tokens
        self._rng = random.Random(seed)

    def draw(self, *, level: int, copy_share: float, episode_share: float) -> Row:
        """One row: random words to copy, a whole episode, or a drill of up to `level` + 1 turns; up
        to `level` - 1 lessons are beside the point.

        Both benchmarks get equal shares; one drill in ten mixes them.
        """
        rng = self._rng
        kind = rng.random()
        if kind < copy_share:
            return doubled_row(self._words, rng)
        if kind < copy_share + episode_share:
            game = rng.choice(self._by_family[rng.choice(rng.choice(self._pools))])
            # A player who gets nowhere repeats himself: late turns teach little.
            parts = [(game, game.turns[: rng.choice((6, 8, 99))])]
        else:
            pool = self._families if rng.random() < 0.1 else rng.choice(self._pools)
            chosen = rng.sample(pool, min(rng.randint(1, level + 1), len(pool)))
            parts = [
                (game, (rng.choice(game.turns),))
                for game in (rng.choice(self._by_family[family]) for family in chosen)
            ]
        return actor_row(
            parts, self._words, rng, max_distractors=level - 1, max_tokens=self._max_tokens
        )


_SAW = (
    "the player saw the {t} and did not use it well .",
    "the {t} was there but nothing good came of it .",
    "what counts here is the {t} .",
)
_ASKED = (
    "the task was {t} and the player did not do it well .",
    "the player was asked to {t} but nothing good came of it .",
    "what counts here is the task {t} .",
)
_VAGUE = (
    "the player walked around without a plan .",
    "it is not clear what went wrong .",
    "the player should try something new .",
)


def reflector_target(
    family: str, rng: random.Random, *, right_share: float, vague_share: float
) -> str:
    """A reply in the reflector's two sections: the right thing is named, and its lesson given, in
    `right_share` of cases.

    Of the rest, `vague_share` name nothing and give a lesson of the same benchmark at random; the
    others name another thing and give that thing's lesson. What is named always determines the
    lesson.
    """
    right = FAMILY_LESSONS[family]
    wrong = rng.choice(
        [lesson for lesson in benchmark_of(family).values() if lesson.thing != right.thing]
    )
    naming = _ASKED if is_task(right) else _SAW
    if rng.random() < right_share:
        analysis, lesson = rng.choice(naming).format(t=right.thing), right
    elif rng.random() < vague_share:
        analysis, lesson = rng.choice(_VAGUE), wrong
    else:
        analysis, lesson = rng.choice(naming).format(t=wrong.thing), wrong
    return f"ANALYSIS: {analysis} IMPROVED PROMPT: {reflector_prompt(lesson)}"


def target_texts() -> list[str]:
    """Every sentence that a target can hold, for the vocabulary."""
    return [*(text.format(t="it") for text in (*_SAW, *_ASKED)), *_VAGUE]


def to_trajectory(game: PlayedGame, system_prompt: str) -> Trajectory:
    """The episode as the real system would have recorded it."""
    return Trajectory(
        game=GameId(
            env="alfworld" if game.family in ALFWORLD_LESSONS else "minihack",
            family=game.family,
            key=game.key,
        ),
        system_prompt=system_prompt,
        turns=tuple(
            Turn(
                observation=turn.observation,
                actions=(),
                reply=turn.reply,
                thought=turn.thought,
                action=turn.action,
                reward=0.0,
            )
            for turn in game.turns
        ),
        outcome=Outcome.SUCCESS if game.success else Outcome.STEP_LIMIT,
        final_observation=game.final_observation,
        state_hash="",
    )


class ReflectorRows:
    """Draws contexts of scripted play with replies of a mediocre coach. The same games, seed and
    calls give the same rows.

    Contexts are those that In-context Training will show: novices under the initial prompt, novices
    under another family's lesson, players who win by the right lesson, and some who follow a
    misleading one.
    """

    def __init__(
        self,
        games: Sequence[PlayedGame],
        words: WordTable,
        config: ReflectorConfig,
        *,
        right_share: float,
        vague_share: float,
        seed: int,
    ):
        self._games: dict[str, dict[str, list[PlayedGame]]] = {}
        for game in games:
            kinds = self._games.setdefault(game.family, {"novice": [], "right": [], "wrong": []})
            right = game.lesson == FAMILY_LESSONS[game.family]
            kinds["novice" if game.lesson is None else "right" if right else "wrong"].append(game)
        families = sorted(self._games)
        self._pools = [
            [name for name in families if name in lessons]
            for lessons in (MINIHACK_LESSONS, ALFWORLD_LESSONS)
        ]
        self._words = words
        self._config = config
        self._choices = set(
            words(" ".join((*THINGS, *VERBS, *TASK_THINGS, *TASK_VERBS, *STATIONS)))
        )
        self._shares = {"right_share": right_share, "vague_share": vague_share}
        self._rng = random.Random(seed)

    def context(self, family: str, num_games: int) -> Context:
        """A context of scripted episodes of one family."""
        rng = self._rng
        kinds = self._games[family]
        right = FAMILY_LESSONS[family]
        others = [lesson for lesson in benchmark_of(family).values() if lesson.thing != right.thing]
        kind = rng.choices(("novice", "elsewhere", "right", "wrong"), (0.5, 0.22, 0.22, 0.06))[0]
        if kind == "wrong":
            first = rng.choice(kinds["wrong"])
            chosen, prompt = (
                [game for game in kinds["wrong"] if game.lesson == first.lesson],
                reflector_prompt(first.lesson),
            )
        elif kind == "right":
            chosen, prompt = kinds["right"], reflector_prompt(right)
        else:
            chosen, prompt = (
                kinds["novice"],
                (
                    initial_prompt(family)
                    if kind == "novice"
                    else reflector_prompt(rng.choice(others))
                ),
            )
        chosen = rng.sample(chosen, min(num_games, len(chosen)))
        return Context(
            loop=0,
            meta_turn=0,
            family=family,
            system_prompt=prompt,
            trajectories=tuple(to_trajectory(game, prompt) for game in chosen),
        )

    def draw(self, num_games: int) -> Row:
        """One row: a context, of either benchmark as often, and a reply to it."""
        family = self._rng.choice(self._rng.choice([pool for pool in self._pools if pool]))
        count = lambda messages: sum(len(message.content.split()) + 2 for message in messages) + 1  # noqa: E731
        messages = reflector_messages(self.context(family, num_games), self._config, count)
        asked = self._words(
            " ".join(f"<{message.role}> {message.content} {END}" for message in messages)
            + " <assistant>"
        )
        reply = self._words(f"{reflector_target(family, self._rng, **self._shares)} {END}")
        # The words that carry the choice weigh more than those of the frame around them.
        weights = [4.0 if token in self._choices else 1.0 for token in reply]
        return Row(
            ids=np.array(asked + reply, np.int32),
            weights=np.array([0.0] * len(asked) + weights, np.float32),
        )


def pad_rows(
    rows: Sequence[Row], num_tokens: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows as arrays ids [B, T], target weights [B, T] and valid [B, T], padded on the right to
    `num_tokens`.
    """
    ids = np.full((len(rows), num_tokens), pad_id, np.int32)
    weights = np.zeros((len(rows), num_tokens), np.float32)
    valid = np.zeros((len(rows), num_tokens), bool)
    for index, row in enumerate(rows):
        count = len(row.ids)
        ids[index, :count], weights[index, :count], valid[index, :count] = (
            row.ids,
            row.weights,
            True,
        )
    return ids, weights, valid
