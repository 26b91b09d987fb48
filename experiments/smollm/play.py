"""Scripted play of MiniHack in the short style: a player who follows one lesson to the letter, and
a novice who has none and tries the verbs that are listed, one after the other.
"""

import dataclasses
import random
import re
from collections.abc import Iterator, Sequence

from envs.api import GameId, Outcome
from envs.minihack import MiniHack
from envs.minihack.expert import (
    beside,
    carried,
    find,
    here,
    make_expert,
    walk_beside,
    walk_towards,
    walkable,
)
from envs.minihack.renamed import VERBS
from envs.minihack.view import DIRECTIONS, Position, View
from experiments.pocket.data import PlayedGame, PlayedTurn
from experiments.pocket.lessons import Lesson
from experiments.smollm.lessons import LESSONS, misleading_lesson, random_lesson, thought

NO_LESSON = "No instruction fits here."
TRY = "Try {v}."
WAY_OPEN = "The way is open."
VERB_LIST = re.compile(r"Verbs: ([^.]*)\.")
_WAYS_THROUGH = ("open door", "broken door", "doorway")
_NOUNS = {"staircase down": "stairs"}  # where the game's own word is another
_AIMED = ("apply", "throw")  # these ask for a direction


def step_towards(view: View, position: Position) -> str | None:
    """The direction that the offset's words name, where the way is free; else the first one of a
    way around.
    """
    dx, dy = (
        (there > here) - (there < here) for there, here in zip(position, view.position, strict=True)
    )
    target = view.position[0] + dx, view.position[1] + dy
    squares = walkable(view, floating=view.floating)
    through_door = squares[view.position] or squares.get(target, False)
    if (
        (dx or dy)
        and (target in squares or target == position)
        and not (dx and dy and through_door)
    ):
        return next(word for word, delta in DIRECTIONS.items() if delta == (dx, dy))
    return walk_towards(view, position)


def follow(view: View, lesson: Lesson) -> str:
    """The action of a player who does what the lesson says, right or wrong, and searches where it
    no longer applies.
    """
    noun = _NOUNS.get(lesson.thing, lesson.thing)
    target = (
        (find(view, "closed door") or find(view, "locked door"))
        if noun == "door"
        else find(view, noun)
    )
    aim = " east" if lesson.verb in _AIMED else ""
    if lesson.manner == "next":
        if target is None:
            return "search"
        direction = beside(view, target.position)
        if direction and lesson.verb in ("kick", "open"):
            return f"{lesson.verb} {direction}"
        if direction:
            return f"{lesson.verb}{' ' + direction if aim else ''}"
        return walk_beside(view, target.position) or "search"
    if lesson.manner == "take" and carried(view, noun):
        return f"{lesson.verb} {noun}{aim}"
    if here(view, noun):
        if lesson.manner == "take":
            return f"pickup {noun}"
        return f"{lesson.verb}{aim}"
    return (step_towards(view, target.position) if target else None) or "search"


def play(game, game_id: GameId, lesson: Lesson | None, *, max_steps: int) -> PlayedGame:
    """Plays one live game under a lesson (None: as a novice) and returns the episode."""
    text = game.reset(game_id).text
    listed = VERB_LIST.search(text)
    untried = [] if listed is None else [v for v in listed[1].split(", ") if v in VERBS]
    finish = (
        make_expert("locked_door", random.Random(0)) if game_id.family == "locked_door" else None
    )
    turns: list[PlayedTurn] = []
    outcome = None
    for _ in range(max_steps):
        view = game.raw()
        # Behind the door no lesson is needed: everybody walks to the stairs.
        if finish and any(find(view, noun) or here(view, noun) for noun in _WAYS_THROUGH):
            said, action = WAY_OPEN, finish(view).removeprefix("go ")
        elif lesson is None:
            said, action = NO_LESSON, "search"
            if untried:
                attempt = dataclasses.replace(LESSONS[game_id.family], verb=untried[0])
                action = follow(view, attempt)
                if action.split()[0] == untried[0]:
                    said = f"{NO_LESSON} {TRY.format(v=untried.pop(0))}"
        else:
            said, action = thought(lesson), follow(view, lesson)
        turns.append(PlayedTurn(observation=text, thought=said, action=action))
        step = game.step(action)
        text, outcome = step.observation.text, step.outcome
        if outcome is not None:
            break
    return PlayedGame(
        family=game_id.family,
        key=game_id.key,
        lesson=lesson,
        turns=tuple(turns),
        final_observation=text,
        success=outcome is Outcome.SUCCESS,
    )


def play_families(
    families: Sequence[str], *, games_per_family: int, max_steps: int, seed: int
) -> Iterator[PlayedGame]:
    """For each of the first training games of each family: an episode under the right lesson, one
    under the right thing with a wrong verb, one under a lesson of random parts, and a novice's.
    """
    environment = MiniHack(text="short")
    for family in families:
        right = LESSONS[family]
        game = environment.open(family)
        try:
            for game_id in environment.games(family, "train")[:games_per_family]:
                rng = random.Random(f"{seed} {game_id}")
                wrong = misleading_lesson(right, rng), random_lesson([right.thing], rng)
                for lesson in (right, *wrong, None):
                    yield play(game, game_id, lesson, max_steps=max_steps)
        finally:
            game.close()
