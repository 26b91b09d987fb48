"""ALFWorld for SmolLM2: lessons about tasks in English, scripted play in the short style, and chats
that the adapters are taught with.

The chats are made as those of MiniHack (`experiments.smollm.chats`): the actor's teach obedience on
all families, under their own names for verbs and tasks and under others (`play_families`); the
reflector's teach form on training families, whose verbs and tasks always have other names.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from envs import prompts
from envs.alfworld import ALFWorld
from envs.alfworld.compact import Notes, kind_of
from envs.alfworld.game import AlfworldGame
from envs.alfworld.short import TASKS, VERBS, ShortText, renaming, task_word
from envs.api import GameId
from envs.renamings import LABELS, MARK
from experiments.pocket.data import PlayedGame, PlayedTurn
from experiments.pocket.lessons import Lesson
from experiments.smollm import chats
from experiments.smollm.lessons import (
    EXPLORE,
    GO_ON,
    HOUSE_LESSONS,
    HOUSE_TRAIN_LESSONS,
    LESSONS,
    build_prompt,
    plain_wording,
    thought,
    word_lesson,
)
from experiments.smollm.play import NO_LESSON, TRY, VERB_LIST
from ictjax.config import ReflectorConfig
from ictjax.records import Context

HEADERS: Sequence[str] = (
    prompts.ALFWORLD["short"],
    "You do household tasks.",
    "You are a helper in a house.",
    "Do the task in the house.",
    "You play a text game in a house.",
    "",
)
# Bringing a thing to its place is what these verbs end with as well.
_PUTS = ("put", "clean", "heat", "cool")
# Renamings with which chats are made: not those of the environment, 0 to 999.
_FIRST_RENAMING = 1000
_FINDING = "What matters is the task {t}."


def renamed(lesson: Lesson, names: Mapping[str, str]) -> Lesson:
    """A lesson in the words of a renamed family."""
    return dataclasses.replace(
        lesson,
        thing=names.get(task_word(lesson.thing), lesson.thing),
        verb=names.get(lesson.verb, lesson.verb),
    )


def misleading_lesson(right: Lesson, rng: random.Random) -> Lesson:
    """The right task with a verb that does not win it."""
    fine = _PUTS if right.thing == "put" else (right.verb,)
    return dataclasses.replace(right, verb=rng.choice([v for v in VERBS if v not in fine]))


def _get(notes: Notes) -> str | None:
    """A step towards taking what the task is about; None where nothing is left to be found."""
    thing = notes.task.thing
    known = notes.find(thing)
    if known and known[0][1] == notes.here and notes.here not in notes.closed:
        return f"pickup {thing}"
    if known:
        return f"go {kind_of(known[0][1])}"
    unseen = notes.unseen()
    return f"go {kind_of(unseen[0])}" if unseen else None


class _Player:
    """Says and does what a player does who follows a lesson, or has none (None). `names` is what
    verbs and tasks are called; the lesson is in the game's own words.
    """

    def __init__(self, short: ShortText, lesson: Lesson | None, names: Mapping[str, str]):
        self._notes, self._lesson = short.notes, lesson
        self._thought = NO_LESSON if lesson is None else thought(renamed(lesson, names))
        self._names = names
        listed = VERB_LIST.search(short.text)
        self._untried = [] if listed is None else listed[1].split(", ")

    def turn(self) -> tuple[str, str]:
        """Thought and action."""
        notes = self._notes
        thing = notes.task.thing
        step = None if notes.held else _get(notes)
        two = notes.task.kind == "two"
        lesson = self._lesson
        # of two things the second is fetched once the first is where it belongs
        if step and (not notes.placed or (two and lesson is not None and lesson.verb == "put")):
            return self._thought, step
        if lesson is not None:
            return self._thought, f"{self._names.get(lesson.verb, lesson.verb)} {thing}"
        put = self._names.get("put", "put")
        if two and put not in self._untried and len(notes.placed) == 1:
            # what was put there wants another one
            return (NO_LESSON, step) if step else self._try(put, thing)
        if not self._untried:
            return NO_LESSON, f"go {kind_of(notes.places[0])}"
        return self._try(self._untried.pop(0), thing)

    def _try(self, verb: str, thing: str) -> tuple[str, str]:
        return f"{NO_LESSON} {TRY.format(v=verb)}", f"{verb} {thing}"


def play(
    game: AlfworldGame,
    game_id: GameId,
    lesson: Lesson | None,
    *,
    max_steps: int,
    names: Mapping[str, str] = MappingProxyType({}),
) -> PlayedGame:
    """Plays one game (official text) in the short style under a lesson (None: as a novice), with
    `names` for verbs and tasks. The lesson of the episode is in those words.
    """
    game.reset(game_id)

    def run(command: str):
        game.step(command)
        return game.official()

    short = ShortText(game.official(), run, names)
    player = _Player(short, lesson, names)
    turns, won = [], False
    for _ in range(max_steps):
        text = short.text
        said, action = player.turn()
        turns.append(PlayedTurn(observation=text, thought=said, action=action))
        won = short.play(action).won
        if won:
            break
    return PlayedGame(
        family=game_id.family,
        key=game_id.key,
        lesson=None if lesson is None else renamed(lesson, names),
        turns=tuple(turns),
        final_observation=short.text,
        success=won,
    )


def play_families(
    families: Sequence[str], *, renamings: int, games_each: int, max_steps: int, seed: int
) -> Iterator[tuple[int, PlayedGame]]:
    """Training games of each family, in small generated rooms: so many games under their own names
    (numbered -1) and under each of so many renamings. Each game is played four times: under the
    right lesson, the right task with a wrong verb, one with any verb, and by a novice.
    """
    environment = ALFWorld(data="generated", rooms="small", text="full")
    for family in families:
        right = HOUSE_LESSONS[family]
        game = environment.open(family)
        assert isinstance(game, AlfworldGame)
        try:
            games = iter(environment.games(family, "train"))
            for number in range(-1, renamings):
                names = renaming(f"{family}{MARK}{_FIRST_RENAMING + number}") if number >= 0 else {}
                for game_id in itertools.islice(games, games_each):
                    rng = random.Random(f"{seed} {game_id}")
                    anything = dataclasses.replace(right, verb=rng.choice(VERBS))
                    for lesson in (right, misleading_lesson(right, rng), anything, None):
                        episode = play(game, game_id, lesson, max_steps=max_steps, names=names)
                        yield number, episode
        finally:
            game.close()


class ActorChats:
    """Draws chats for the actor: whole episodes under a prompt that holds the lesson that is
    followed, lessons about other tasks, both or none. The same games, seed and calls give the same
    chats.
    """

    def __init__(self, games: Sequence[tuple[int, PlayedGame]], *, seed: int):
        self._by_family: dict[str, list[PlayedGame]] = {}
        for _, game in games:
            self._by_family.setdefault(game.family, []).append(game)
        self._rng = random.Random(seed)

    def draw(self) -> chats.Chat:
        """One chat."""
        rng = self._rng
        family = rng.choice(sorted(self._by_family))
        novice = rng.random() < 0.4
        of_kind = [g for g in self._by_family[family] if (g.lesson is None) == novice]
        game = rng.choice(of_kind)
        said = re.match(r"Task (\w+): \w+ (\w+)", game.turns[0].observation)
        assert said is not None
        task, thing = said.groups()
        sentences = [
            word_lesson(self._other({task, thing}), rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))
        ]
        thinks = {}
        if lesson := game.lesson:
            if family != "pick_two" and rng.random() < 0.2:  # a prompt may name the thing as well
                by_thing = dataclasses.replace(lesson, thing=thing, manner="take")
                thinks = {thought(lesson): thought(by_thing)}
                lesson = by_thing
            sentences.append(word_lesson(lesson, rng))
        elif rng.random() < 0.4:
            sentences.append(EXPLORE)
        if sentences:
            prompt = build_prompt(sentences, rng, HEADERS)
        else:
            prompt = rng.choice((prompts.ALFWORLD["short"], *HEADERS[:-1]))
        messages = [{"role": "system", "content": prompt}]
        for turn in _until_nothing_new(game.turns):
            said = dataclasses.replace(turn, thought=thinks.get(turn.thought, turn.thought))
            messages.append({"role": "user", "content": turn.observation})
            messages.append({"role": "assistant", "content": chats.reply(said)})
        return {"messages": messages}

    def _other(self, taken: set[str]) -> Lesson:
        """A lesson about a task that is not there."""
        rng = self._rng
        chance = rng.random()
        if chance < 0.4:
            return rng.choice([les for les in HOUSE_LESSONS.values() if les.thing not in taken])
        if chance < 0.8:
            task = rng.choice([label for label in (*TASKS, *LABELS) if label not in taken])
            return Lesson(thing=task, manner="task", verb=rng.choice((*VERBS, *LABELS)))
        return rng.choice([les for les in LESSONS.values() if les.thing not in taken])


def _until_nothing_new(turns: Sequence[PlayedTurn]) -> Sequence[PlayedTurn]:
    """Without the turns of a player who does the same for ever, but for two."""
    last = len(turns)
    while last > 2 and turns[last - 1].action == turns[last - 2].action == turns[last - 3].action:
        last -= 1
    return turns[:last]


class ReflectorChats:
    """Draws contexts of scripted play of training families, all with other names, and replies in
    the reflector's form. The same games, seed and calls give the same chats.

    Args:
      concludes: end analyses with the verbs that won.
      explores: how often a reply asks to go on trying, where an episode was won and where none was.

    Raises ValueError for a game of another family.
    """

    def __init__(
        self,
        games: Sequence[tuple[int, PlayedGame]],
        config: ReflectorConfig,
        *,
        seed: int,
        concludes: bool = False,
        explores: tuple[float, float] = GO_ON,
    ):
        self._games: dict[str, dict[int, list[PlayedGame]]] = {}
        for number, game in games:
            if game.family not in HOUSE_TRAIN_LESSONS:
                raise ValueError(
                    f"{game.family} is no training family: the reflector is taught with games of"
                    f" {', '.join(HOUSE_TRAIN_LESSONS)} only."
                )
            if number >= 0:
                self._games.setdefault(game.family, {}).setdefault(number, []).append(game)
        self._config = config
        self._concludes = concludes
        self._explores = explores
        self._rng = random.Random(seed)

    def draw(self, num_games: int) -> chats.Chat:
        """One chat: a question about episodes of a family, and a reply to it."""
        rng = self._rng
        family = rng.choice(sorted(self._games))
        number = rng.choice(sorted(self._games[family]))
        names = renaming(f"{family}{MARK}{_FIRST_RENAMING + number}")
        games = self._games[family][number]
        right = renamed(HOUSE_TRAIN_LESSONS[family], names)
        wrong = [game for game in games if game.lesson and not game.success]
        if wrong and rng.random() < 0.25:
            lesson = rng.choice(wrong).lesson
            assert lesson is not None
            games = [game for game in wrong if game.lesson == lesson]
            prompt = f"{HEADERS[1]} {plain_wording(lesson)}"
        else:
            games = [game for game in games if game.lesson is None]
            prompt = HEADERS[0]
            if rng.random() < 0.4:
                elsewhere = Lesson(
                    thing=rng.choice(LABELS), manner="task", verb=rng.choice(list(names.values()))
                )
                prompt = f"{HEADERS[1]} {rng.choice((plain_wording(elsewhere), EXPLORE))}"
        games = chats.sample_by_outcome(games, num_games, rng)
        context = Context(
            loop=0,
            meta_turn=0,
            family=family,
            system_prompt=prompt,
            trajectories=tuple(chats.trajectory(game, prompt, "alfworld") for game in games),
        )
        return chats.reflection_chat(
            context,
            right,
            [names[verb] for verb in VERBS],
            finding=_FINDING,
            header=HEADERS[1],
            config=self._config,
            rng=rng,
            concludes=self._concludes,
            explores=self._explores,
        )
