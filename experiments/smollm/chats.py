"""Chats that the adapters are taught with (`ictjax sft`), made of scripted play.

The actor's teach obedience: the same kind of screen comes under a lesson that is right, one that
pairs the thing with a wrong verb (and a player who follows it to the letter), and lessons about
other things only (and a novice who tries the verbs in the order that the game lists them). In
half of the chats the things are renamed throughout, and in half the verbs, so that remembering
which verb suits which thing never pays.

The reflector's teach form: episodes of training families, won and lost, with verbs and often the
thing renamed, and a reply whose analysis says how each episode ended and which thing was there. The
prompt that follows pairs the thing with a verb that came last in any of the episodes, won or lost,
or was only listed; or it asks to go on trying, more often where none was won. The instructions in
force, which it reads, may be the lesson of a training family. Nothing of a held-out family occurs
in them.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envs import prompts
from envs.api import GameId, Outcome
from envs.minihack.renamed import VERBS, rename_verbs
from envs.minihack.text import OFFERED
from envs.renamings import LABELS, draw_names
from experiments.pocket.data import PlayedGame, PlayedTurn
from experiments.pocket.lessons import Lesson
from experiments.smollm.lessons import (
    EXPLORE,
    GO_ON,
    HEADERS,
    HELDOUT_THINGS,
    HELDOUT_VERBS,
    LESSONS,
    NOUNS,
    TRAIN_LESSONS,
    build_prompt,
    plain_wording,
    random_lesson,
    word_lesson,
)
from ictjax.config import ReflectorConfig
from ictjax.records import Context, Message, Trajectory, Turn
from ictjax.reflector import reflector_messages

Chat = dict[str, Any]  # {"messages": [{"role": ..., "content": ...}, ...]}
_THINGS = tuple(lesson.thing for lesson in LESSONS.values())


def rename(text: str, renaming: Mapping[str, str]) -> str:
    """A text with things renamed, and their articles with them."""
    for old, new in renaming.items():
        text = re.sub(
            rf"\b(an?|An?) {re.escape(old)}\b",
            lambda found, new=new: f"{found[1][0]}{'n' if new[0] in 'aeiou' else ''} {new}",
            text,
        )
        text = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return text


def reply(turn: PlayedTurn) -> str:
    """What the actor answers."""
    return f"Thought: {turn.thought}\nAction: {turn.action}"


def _things_in(turns: Sequence[PlayedTurn]) -> list[str]:
    text = " ".join(turn.observation for turn in turns)
    return [thing for thing in _THINGS if re.search(rf"\b{re.escape(thing)}\b", text)]


class ActorChats:
    """Draws chats for the actor. The same games, seed and calls give the same chats."""

    def __init__(self, games: Sequence[PlayedGame], *, seed: int):
        self._by_family: dict[str, list[PlayedGame]] = {}
        for game in games:
            self._by_family.setdefault(game.family, []).append(game)
        self._rng = random.Random(seed)

    def draw(self) -> Chat:
        """One chat: the first turns of an episode, or a drill of one to four single turns of other
        games, whose replies must each search the prompt anew.
        """
        rng = self._rng
        families = sorted(self._by_family)
        if rng.random() < 0.5:
            novice = rng.random() < 0.7  # what comes next in a list is seen in whole episodes only
            games = [
                game
                for game in self._by_family[rng.choice(families)]
                if (game.lesson is None) == novice
            ]
            return self._chat([(game := rng.choice(games), game.turns[: rng.choice((5, 7))])])
        parts = []
        for family in rng.sample(families, rng.randint(1, 4)):
            game = rng.choice([g for g in self._by_family[family] if g.lesson is not None])
            kinds: dict[bool, list[PlayedTurn]] = {}
            for turn in game.turns:
                kinds.setdefault(_walks(turn.action), []).append(turn)
            parts.append((game, [rng.choice(kinds[rng.choice(sorted(kinds))])]))
        return self._chat(parts)

    def _chat(self, parts: Sequence[tuple[PlayedGame, Sequence[PlayedTurn]]]) -> Chat:
        rng = self._rng
        present = _things_in([turn for _, turns in parts for turn in turns])
        renaming: dict[str, str] = {}
        if rng.random() < 0.5:
            renaming = dict(zip(present, rng.sample(NOUNS, len(present)), strict=True))
        verbs: dict[str, str] = {}
        if rng.random() < 0.5:
            verbs = draw_names(VERBS, LABELS, rng)
        known = [
            dataclasses.replace(lesson, thing=renaming.get(lesson.thing, lesson.thing))
            for game, _ in parts
            if (lesson := game.lesson) is not None
        ]
        taken = {*present, *renaming.values()}
        others = [self._other(taken) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
        sentences = [
            word_lesson(dataclasses.replace(lesson, verb=verbs.get(lesson.verb, lesson.verb)), rng)
            for lesson in (*known, *others)
        ]
        if not known and rng.random() < 0.4:
            sentences.append(EXPLORE)
        if sentences:
            prompt = build_prompt(sentences, rng)
        else:
            prompt = rng.choice((prompts.MINIHACK["short"], *HEADERS[:-1]))
        messages = [{"role": "system", "content": prompt}]
        for _, turns in parts:
            for turn in turns:
                for role, text in (("user", turn.observation), ("assistant", reply(turn))):
                    text = rename_verbs(rename(text, renaming), verbs)
                    messages.append({"role": role, "content": text})
        return {"messages": messages}

    def _other(self, taken: set[str]) -> Lesson:
        """A lesson about something that is not there: a right one or, as often, one of random
        parts.
        """
        rng = self._rng
        absent = [lesson for lesson in LESSONS.values() if lesson.thing not in taken]
        if absent and rng.random() < 0.5:
            return rng.choice(absent)
        return random_lesson([noun for noun in NOUNS if noun not in taken], rng)


def _walks(action: str) -> bool:
    return " " not in action and action.endswith(("north", "south", "east", "west"))


_ENDED = "Episode {n} was {how} with {v}."
_FINDING = "What matters is the {t}."
_WON = "What won: {v}."
_GUESSES = 0.05  # how often a reply names a verb that was only listed


class ReflectorChats:
    """Draws contexts of scripted play of training families, with replies in the reflector's form.
    The same games, seed and calls give the same chats.

    Args:
      concludes: end analyses with the verbs that won.
      explores: how often a reply asks to go on trying, where an episode was won and where none was.

    Raises ValueError for a game of another family.
    """

    def __init__(
        self,
        games: Sequence[PlayedGame],
        config: ReflectorConfig,
        *,
        seed: int,
        concludes: bool = False,
        explores: tuple[float, float] = GO_ON,
    ):
        self._games: dict[str, dict[str, list[PlayedGame]]] = {}
        for game in games:
            if game.family not in TRAIN_LESSONS:
                raise ValueError(
                    f"{game.family} is no training family: the reflector is taught with games of"
                    f" {', '.join(TRAIN_LESSONS)} only."
                )
            kinds = self._games.setdefault(game.family, {"novice": [], "wrong": []})
            if game.lesson is None:
                kinds["novice"].append(game)
            elif not game.success and game.lesson.verb in OFFERED:
                kinds["wrong"].append(game)
        self._config = config
        self._concludes = concludes
        self._explores = explores
        self._rng = random.Random(seed)

    def draw(self, num_games: int) -> Chat:
        """One chat: a question about episodes of a family, and a reply to it."""
        while mentions_held_out(chat := self._draw(num_games)):
            pass
        return chat

    def _draw(self, num_games: int) -> Chat:
        rng = self._rng
        family = rng.choice(sorted(self._games))
        kinds = self._games[family]
        if kinds["wrong"] and rng.random() < 0.25:
            first = rng.choice(kinds["wrong"])
            games = [game for game in kinds["wrong"] if game.lesson == first.lesson]
            prompt = f"{HEADERS[1]} {plain_wording(first.lesson)}" if first.lesson else ""
        else:
            games = kinds["novice"]
            elsewhere = [lesson for name, lesson in TRAIN_LESSONS.items() if name != family]
            told = (plain_wording(rng.choice(elsewhere)), EXPLORE)
            prompt = prompts.MINIHACK["short"]
            if rng.random() < 0.4:
                prompt = f"{HEADERS[1]} {rng.choice(told)}"
        games = sample_by_outcome(games, num_games, rng)
        right = TRAIN_LESSONS[family]
        thing = right.thing
        if right.manner == "take" and rng.random() < 0.7:
            thing = rng.choice(NOUNS)
        known = [verb for verb in VERBS if verb not in HELDOUT_VERBS]
        verbs = draw_names(VERBS, (*known, *LABELS), rng)

        def renamed(text: str) -> str:
            return rename_verbs(rename(text, {right.thing: thing}), verbs)

        context = Context(
            loop=0,
            meta_turn=0,
            family=family,
            system_prompt=renamed(prompt),
            trajectories=tuple(
                trajectory(game, renamed(prompt), "minihack", renamed) for game in games
            ),
        )
        return reflection_chat(
            context,
            Lesson(thing=thing, manner=right.manner, verb=""),
            tuple(verbs.values()),
            finding=_FINDING,
            header=HEADERS[1],
            config=self._config,
            rng=rng,
            concludes=self._concludes,
            explores=self._explores,
        )


def reflection_chat(
    context: Context,
    lesson: Lesson,
    verbs: Sequence[str],
    *,
    finding: str,
    header: str,
    config: ReflectorConfig,
    rng: random.Random,
    concludes: bool = False,
    explores: tuple[float, float] = GO_ON,
) -> Chat:
    """The question about a context, and a reply to it whose prompt is a lesson with one of `verbs`
    put in, or asks to go on trying: how often, where an episode was won and where none was, is
    `explores`. `concludes` ends its analysis with the verbs that won.
    """
    messages = reflector_messages(context, config, _rough_count)
    last = [t.turns[-1].action.split()[0] for t in context.trajectories]
    ended = [
        _ENDED.format(n=number, how="won" if t.success else "lost", v=verb)
        for number, (t, verb) in enumerate(zip(context.trajectories, last, strict=True), 1)
    ]
    won = dict.fromkeys(
        verb for t, verb in zip(context.trajectories, last, strict=True) if t.success
    )
    used = [verb for verb in last if verb in verbs]
    goes_on = explores[0] if won else explores[1]
    chance = rng.random()
    if chance < goes_on:
        told = EXPLORE
    else:
        guesses = not used or chance < goes_on + _GUESSES
        verb = rng.choice(list(verbs) if guesses else used)
        told = plain_wording(dataclasses.replace(lesson, verb=verb))
    analysis = [*ended, finding.format(t=lesson.thing)]
    if concludes:
        analysis.append(_WON.format(v=" and ".join(won) or "nothing"))
    reply = f"ANALYSIS: {' '.join(analysis)}\nIMPROVED PROMPT: {header} {told}"
    return {
        "messages": [
            *({"role": message.role, "content": message.content} for message in messages),
            {"role": "assistant", "content": reply},
        ]
    }


def sample_by_outcome(
    games: Sequence[PlayedGame], count: int, rng: random.Random
) -> list[PlayedGame]:
    """Different games, won and lost ones as often where there are enough of both."""
    left = {won: [game for game in games if game.success == won] for won in (False, True)}
    drawn = []
    for _ in range(min(count, len(games))):
        of = left[rng.random() < 0.5] or left[False] or left[True]
        drawn.append(of.pop(rng.randrange(len(of))))
    return drawn


def _rough_count(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages) // 4


def trajectory(
    game: PlayedGame, prompt: str, env: str, renamed: Callable[[str], str] = str
) -> Trajectory:
    """An episode as the reflector gets it, its texts renamed."""
    return Trajectory(
        game=GameId(env=env, family=game.family, key=game.key),
        system_prompt=prompt,
        turns=tuple(
            Turn(
                observation=renamed(turn.observation),
                actions=(),
                reply=renamed(reply(turn)),
                thought=renamed(turn.thought),
                action=renamed(turn.action),
                reward=0.0,
            )
            for turn in game.turns
        ),
        outcome=Outcome.SUCCESS if game.success else Outcome.STEP_LIMIT,
        final_observation=renamed(game.final_observation),
        state_hash="",
    )


def mentions_held_out(chat: Chat) -> list[str]:
    """Words of held-out lessons that a chat holds: things and verbs."""
    text = " ".join(message["content"].lower() for message in chat["messages"])
    words = [*HELDOUT_THINGS, *HELDOUT_VERBS, "put on"]
    return [word for word in words if re.search(rf"\b{word}\b", text)]
