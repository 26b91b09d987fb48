"""Scripted play of MiniHack for the pocket models: a player who follows one lesson to the letter, and a novice who has none."""

import random
from collections.abc import Iterator, Sequence

from envs.api import GameId, Outcome
from envs.experts import beside, carried, find, here, make_expert, walk_beside, walk_towards
from envs.minihack import MiniHack
from envs.minihack.text import notable
from envs.minihack.view import View
from experiments.pocket.data import PlayedGame, PlayedTurn
from experiments.pocket.lessons import FAMILY_LESSONS, Lesson, misleading_lesson, random_lesson

NO_LESSON = "no lesson"
_GO_ON = "go on"
_WAYS_THROUGH = ("open door", "broken door", "doorway")


def follow(view: View, lesson: Lesson) -> str:
    """The action of a player who does what the lesson says, right or wrong, and searches where it no longer applies."""
    noun = lesson.thing
    target = (find(view, "closed door") or find(view, "locked door")) if noun == "door" else find(view, noun)
    if lesson.manner == "next":
        if target is None:
            return "search"
        direction = beside(view, target.position)
        return f"{lesson.verb} {direction}" if direction else walk_beside(view, target.position) or "search"
    if lesson.manner == "take" and carried(view, noun):
        return f"{lesson.verb} {lesson.thing}"
    if here(view, noun):
        return "pickup" if lesson.manner == "take" else lesson.verb
    return (walk_towards(view, target.position) if target else None) or "search"


def wander(view: View) -> str:
    """The action of a novice: walk up to the nearest thing of interest, then search there for ever."""
    if any(thing.noun != "upstairs" for thing in view.here):
        return "search"
    for thing in notable(view):
        if thing.kind in ("object", "feature", "closed") and thing.noun not in ("upstairs", "stairs"):
            if thing.kind == "closed":
                return walk_beside(view, thing.position) or "search"
            return walk_towards(view, thing.position) or "search"
    return "search"


def play(game, game_id: GameId, lesson: Lesson | None, *, max_steps: int) -> PlayedGame:
    """Plays one live game under a lesson (None: as a novice) and returns the episode."""
    text = game.reset(game_id).text
    finish = make_expert("locked_door", random.Random(0)) if game_id.family == "locked_door" else None
    turns = []
    outcome = None
    for _ in range(max_steps):
        view = game.raw()
        # Behind the door no lesson is needed: everybody walks to the stairs.
        if finish and any(find(view, noun) or here(view, noun) for noun in _WAYS_THROUGH):
            thought, action = _GO_ON, finish(view)
        elif lesson is None:
            thought, action = NO_LESSON, wander(view)
        else:
            thought, action = f"{lesson.thing} {lesson.manner} {lesson.verb}", follow(view, lesson)
        turns.append(PlayedTurn(observation=text, thought=thought, action=action))
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


def play_all(families: Sequence[str], *, games_per_family: int, max_steps: int, seed: int) -> Iterator[PlayedGame]:
    """For each training game of each family: an episode under the right lesson, two under other ones, and a novice's.

    Of the other lessons, one has the right manner and a wrong verb, and one has everything but the thing at random.
    """
    environment = MiniHack(text="compact")
    for family in families:
        game = environment.open(family)
        right = FAMILY_LESSONS[family][0]
        try:
            for game_id in environment.games(family, "train")[:games_per_family]:
                rng = random.Random(f"{seed} {game_id}")
                for lesson in (right, misleading_lesson(right, rng), random_lesson([right.thing], rng), None):
                    yield play(game, game_id, lesson, max_steps=max_steps)
        finally:
            game.close()
