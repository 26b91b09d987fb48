"""Scripted play of both benchmarks for the pocket models: a player who follows one lesson to the
letter, and a novice who has none.
"""

import random
from collections.abc import Iterator, Sequence

from envs.alfworld import ALFWorld
from envs.alfworld.compact import CompactText, Notes, kind_of
from envs.api import Game, GameId, Outcome
from envs.minihack import MiniHack
from envs.minihack.expert import beside, carried, find, here, make_expert, walk_beside, walk_towards
from envs.minihack.text import notable
from envs.minihack.view import View
from experiments.pocket.data import PlayedGame, PlayedTurn
from experiments.pocket.lessons import (
    ALFWORLD_LESSONS,
    MINIHACK_LESSONS,
    Lesson,
    is_task,
    misleading_lesson,
    random_lesson,
    random_task_lesson,
)

NO_LESSON = "no lesson"
_GO_ON = "go on"
_WAYS_THROUGH = ("open door", "broken door", "doorway")


def follow(view: View, lesson: Lesson) -> str:
    """The action of a player who does what the lesson says, right or wrong, and searches where it
    no longer applies.
    """
    noun = lesson.thing
    target = (
        (find(view, "closed door") or find(view, "locked door"))
        if noun == "door"
        else find(view, noun)
    )
    if lesson.manner == "next":
        if target is None:
            return "search"
        direction = beside(view, target.position)
        return (
            f"{lesson.verb} {direction}"
            if direction
            else walk_beside(view, target.position) or "search"
        )
    if lesson.manner == "take" and carried(view, noun):
        return f"{lesson.verb} {lesson.thing}"
    if here(view, noun):
        return "pickup" if lesson.manner == "take" else lesson.verb
    return (walk_towards(view, target.position) if target else None) or "search"


def wander(view: View) -> str:
    """The action of a novice: walk up to the nearest thing of interest, then search there for
    ever.
    """
    if any(thing.noun != "upstairs" for thing in view.here):
        return "search"
    for thing in notable(view):
        if thing.kind in ("object", "feature", "closed") and thing.noun not in (
            "upstairs",
            "stairs",
        ):
            if thing.kind == "closed":
                return walk_beside(view, thing.position) or "search"
            return walk_towards(view, thing.position) or "search"
    return "search"


def _played(
    game_id: GameId,
    lesson: Lesson | None,
    turns: Sequence[PlayedTurn],
    text: str,
    outcome: Outcome | None,
) -> PlayedGame:
    return PlayedGame(
        family=game_id.family,
        key=game_id.key,
        lesson=lesson,
        turns=tuple(turns),
        final_observation=text,
        success=outcome is Outcome.SUCCESS,
    )


def play(game, game_id: GameId, lesson: Lesson | None, *, max_steps: int) -> PlayedGame:
    """Plays one live game under a lesson (None: as a novice) and returns the episode."""
    text = game.reset(game_id).text
    finish = (
        make_expert("locked_door", random.Random(0)) if game_id.family == "locked_door" else None
    )
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
    return _played(game_id, lesson, turns, text, outcome)


def follow_task(notes: Notes, lesson: Lesson) -> str:
    """The compact action of a player who finds what the task is about and does with it what the
    lesson says, right or wrong, for ever.

    Only making it clean, hot or cold leads on, to putting it where the task says.
    """
    task = notes.task
    if not notes.held:
        if notes.placed and lesson.manner != "both":
            return "look"
        return f"take {task.thing}" if _sees(notes, task.thing) else _search(notes, task.thing)
    verb = lesson.verb
    place = task.place if lesson.manner in ("place", "both") else lesson.manner
    if verb in ("clean", "heat", "cool") and notes.held in notes.marks:
        verb, place = "put", task.place
    lamp = notes.lamp
    if lamp and place == lamp:
        if not _sees(notes, lamp):
            return _search(notes, lamp)
    elif kind_of(notes.here) != place:
        return f"go {place}"
    elif verb == "put" and notes.here in notes.closed:
        return f"open {place}"
    if verb in ("open", "close"):
        return f"{verb} {kind_of(notes.here)}"
    return f"{verb} {lamp if verb == 'use' and lamp else task.thing}"


def wander_task(notes: Notes) -> str:
    """The compact action of a novice: search until the thing is in sight, then look at it for
    ever.
    """
    thing = notes.task.thing
    return "look" if notes.held or _sees(notes, thing) else _search(notes, thing)


def _sees(notes: Notes, kind: str) -> bool:
    return any(kind_of(name) == kind for name in notes.visible())


def _search(notes: Notes, kind: str) -> str:
    """A step towards a thing: to where it was seen, else into what is closed here, else to the
    first place not looked into.
    """
    known = notes.find(kind)
    if known and known[0][1] != notes.here:
        return f"go {kind_of(known[0][1])}"
    if notes.here in notes.closed:
        return f"open {kind_of(notes.here)}"
    left = [place for place in notes.unseen() if place != notes.here]
    return f"go {kind_of(left[0])}" if left else "look"


def play_task(game: Game, game_id: GameId, lesson: Lesson | None, *, max_steps: int) -> PlayedGame:
    """Plays one live ALFWorld game (official text) under a lesson (None: as a novice) and returns
    the episode in the compact style.
    """
    start = game.reset(game_id)
    compact = CompactText(start.text, start.actions)
    text, outcome, turns = compact.text, None, []
    for _ in range(max_steps):
        if lesson is None:
            thought, action = NO_LESSON, wander_task(compact.notes)
        else:
            thought, action = (
                f"{lesson.thing} {lesson.manner} {lesson.verb}",
                follow_task(compact.notes, lesson),
            )
        turns.append(PlayedTurn(observation=text, thought=thought, action=action))
        command = compact.command(action)
        step = game.step(command)
        text, outcome = (
            compact.update(command, step.observation.text, step.observation.actions),
            step.outcome,
        )
        if outcome is not None:
            break
    return _played(game_id, lesson, turns, text, outcome)


def other_lessons(
    right: Lesson, places: Sequence[str], rng: random.Random
) -> tuple[Lesson, Lesson]:
    """Two lessons about the same thing: one with the right manner and a wrong verb, one with
    everything but the thing at random.
    """
    at_random = (
        random_task_lesson([right.thing], places, rng)
        if is_task(right)
        else random_lesson([right.thing], rng)
    )
    return misleading_lesson(right, rng), at_random


def play_minihack(*, games_per_family: int, max_steps: int, seed: int) -> Iterator[PlayedGame]:
    """For each training game of each MiniHack family: an episode under the right lesson, two under
    other ones, and a novice's.
    """
    environment = MiniHack(text="compact")
    for family, right in MINIHACK_LESSONS.items():
        game = environment.open(family)
        try:
            for game_id in environment.games(family, "train")[:games_per_family]:
                rng = random.Random(f"{seed} {game_id}")
                for lesson in (right, *other_lessons(right, (), rng), None):
                    yield play(game, game_id, lesson, max_steps=max_steps)
        finally:
            game.close()


def play_alfworld(*, games_per_family: int, max_steps: int, seed: int) -> Iterator[PlayedGame]:
    """The same four episodes for each training game of each ALFWorld family, in small generated
    rooms.
    """
    environment = ALFWorld(data="generated", rooms="small", text="full")
    for family, right in ALFWORLD_LESSONS.items():
        game = environment.open(family)
        try:
            for game_id in environment.games(family, "train")[:games_per_family]:
                rng = random.Random(f"{seed} {game_id}")
                start = game.reset(game_id)
                places = sorted(set(map(kind_of, Notes(start.text, start.actions).places)))
                for lesson in (right, *other_lessons(right, places, rng), None):
                    yield play_task(game, game_id, lesson, max_steps=max_steps)
        finally:
            game.close()
