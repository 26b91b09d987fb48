"""Lessons about MiniHack and ALFWorld in English, and the system prompts made of them.

The families were split before any training. No thing and no verb of a lesson of a held-out family
of MiniHack occurs in a lesson of a training family. In ALFWorld two things are put as one is: there
only other names, which training families always have, keep the verb of `pick_two` apart.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from envs import prompts
from experiments.pocket.lessons import EQUIVALENT_VERBS, OTHER_NOUNS, Lesson

TRAIN_LESSONS: Mapping[str, Lesson] = MappingProxyType(
    {
        "eat": Lesson(thing="apple", manner="take", verb="eat"),
        "eat_carrot": Lesson(thing="carrot", manner="take", verb="eat"),
        "eat_melon": Lesson(thing="melon", manner="take", verb="eat"),
        "eat_orange": Lesson(thing="orange", manner="take", verb="eat"),
        "wield": Lesson(thing="dagger", manner="take", verb="wield"),
        "wield_axe": Lesson(thing="axe", manner="take", verb="wield"),
        "wield_mace": Lesson(thing="mace", manner="take", verb="wield"),
        "wield_spear": Lesson(thing="spear", manner="take", verb="wield"),
        "zap": Lesson(thing="wand", manner="take", verb="zap"),
        "freeze_horn": Lesson(thing="horn", manner="take", verb="apply"),
        "pray": Lesson(thing="altar", manner="on", verb="pray"),
        "locked_door": Lesson(thing="door", manner="next", verb="kick"),
    }
)
HELDOUT_LESSONS: Mapping[str, Lesson] = MappingProxyType(
    {
        "wear": Lesson(thing="robe", manner="take", verb="wear"),
        "puton": Lesson(thing="amulet", manner="take", verb="puton"),
        "read": Lesson(thing="scroll", manner="take", verb="read"),
        "levitate_potion": Lesson(thing="potion", manner="take", verb="quaff"),
    }
)
LESSONS: Mapping[str, Lesson] = MappingProxyType({**TRAIN_LESSONS, **HELDOUT_LESSONS})


# Of ALFWorld's tasks: the thing of a lesson is the word that names the task.
HOUSE_TRAIN_LESSONS: Mapping[str, Lesson] = MappingProxyType(
    {
        "put": Lesson(thing="put", manner="task", verb="put"),
        "look": Lesson(thing="look", manner="task", verb="use"),
        "clean": Lesson(thing="clean", manner="task", verb="clean"),
        "heat": Lesson(thing="heat", manner="task", verb="heat"),
    }
)
HOUSE_HELDOUT_LESSONS: Mapping[str, Lesson] = MappingProxyType(
    {
        "cool": Lesson(thing="cool", manner="task", verb="cool"),
        "pick_two": Lesson(thing="two", manner="task", verb="put"),
    }
)
HOUSE_LESSONS: Mapping[str, Lesson] = MappingProxyType(
    {**HOUSE_TRAIN_LESSONS, **HOUSE_HELDOUT_LESSONS}
)

VERBS: tuple[str, ...] = (
    "eat",
    "wield",
    "wear",
    "puton",
    "zap",
    "read",
    "pray",
    "quaff",
    "kick",
    "apply",
    "drop",
    "search",
    "down",
)
HELDOUT_VERBS: tuple[str, ...] = tuple(lesson.verb for lesson in HELDOUT_LESSONS.values())
HELDOUT_THINGS: tuple[str, ...] = tuple(lesson.thing for lesson in HELDOUT_LESSONS.values())
NOUNS: tuple[str, ...] = tuple(
    noun for noun in OTHER_NOUNS if noun not in {lesson.thing for lesson in LESSONS.values()}
)

# {t} is the thing, {v} the verb, {i} the verb and "it"
_WORDINGS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "on": (
            "When you see the {t}, step onto it and {v}.",
            "Walk to the {t}, then {v}.",
            "{v} while you stand on the {t}.",
            "Stand on the {t} and {v}.",
            "Go to the {t} and {v} there.",
            "To win, step onto the {t}, then {v}.",
            "The {t} is what matters: stand on it and use the action {v}.",
            "If there is a {t}, walk onto it and use {v}.",
            "First reach the {t}. After that, {v}.",
            "Use {v} when you are on the {t}.",
            "On the {t} you should {v}.",
            "Remember to {v} once you stand on the {t}.",
            "Do not search; go onto the {t} and {v}.",
            "The goal is to {v} on the {t}.",
        ),
        "take": (
            "When you see the {t}, pick it up and {i}.",
            "Pick up the {t}, then {i}.",
            "{v} the {t} after you pick it up.",
            "Take the {t} and {i}.",
            "Grab the {t} and {i}.",
            "To win, pick up the {t}, then {i}.",
            "The {t} is what matters: take it and use the action {v}.",
            "If there is a {t}, pick it up and use {v}.",
            "First take the {t}. After that, {i}.",
            "Use {v} with the {t} that you picked up.",
            "Once you have the {t} you should {i}.",
            "Remember to {v} the {t} once you carry it.",
            "Do not search; take the {t} and {i}.",
            "The goal is to {v} the {t} that you find.",
        ),
        "next": (
            "When you see the {t}, stand next to it and {i}.",
            "Walk up next to the {t}, then {i}.",
            "{v} the {t} while you stand next to it.",
            "Stand next to the {t} and {i}.",
            "Go next to the {t} and {i}.",
            "To win, stand next to the {t}, then {i}.",
            "The {t} is what matters: stay next to it and use the action {v}.",
            "If there is a {t}, go next to it and use {v}.",
            "First get next to the {t}. After that, {i}.",
            "Use {v} on the {t} next to you.",
            "Next to the {t} you should {i}.",
            "Remember to {v} the {t} once you are next to it.",
            "Do not search; walk up beside the {t} and {i}.",
            "The goal is to {v} the {t} from the square next to it.",
        ),
        "task": (
            "When the task is {t}, pick it up and {i}.",
            "For {t}, pick it up, then {i}.",
            "{v} it after you pick it up if the task is {t}.",
            "Task {t}: take it and {i}.",
            "If you must {t}, grab it and {i}.",
            "To win at {t}, pick it up, then {i}.",
            "The task {t} is what matters: take it and use the action {v}.",
            "If the task is {t}, pick it up and use {v}.",
            "First take it. After that, {i}: so you {t}.",
            "In a {t} task use {v} with what you picked up.",
            "Once you have it, a {t} task needs you to {i}.",
            "Remember for {t} to {v} it once you carry it.",
            "Do not wait; for {t} take it and {i}.",
            "The goal of {t} is to {v} what you find.",
        ),
    }
)
_HELD_OUT_WORDINGS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "on": (
            "Never leave before you stand on the {t}: there you must {v}.",
            "A wise player walks over to the {t} and will {v} right there.",
            "Only {v} works, and only on top of the {t}.",
            "Head for the {t}; {v} is what ends the game.",
        ),
        "take": (
            "Never leave before you hold the {t}: then you must {i}.",
            "A wise player collects the {t} and will {i} at once.",
            "Only {v} works, and only with the {t} in your pack.",
            "Get hold of the {t}; {v} is what ends the game.",
        ),
        "next": (
            "Never leave before you reach the side of the {t}: there you must {i}.",
            "A wise player stops beside the {t} and will {i} at once.",
            "Only {v} works, and only from beside the {t}.",
            "Move up to the {t}; {v} is what opens the way.",
        ),
        "task": (
            "Never give up a {t} task before you hold it: then you must {i}.",
            "A wise player of {t} collects it and will {i} at once.",
            "Only {v} works for {t}, and only once you carry it.",
            "Get hold of it; {v} is what ends a {t} task.",
        ),
    }
)
HEADERS: Sequence[str] = (
    prompts.MINIHACK["short"],
    "You play short NetHack games.",
    "You are a player of NetHack.",
    "Play NetHack and win.",
    "You explore a small room in a text game.",
    "",
)
EXPLORE = "Try the verbs in turn."  # what a player without a lesson does anyhow
# How often the taught replies say so, where an episode was won and where none was.
GO_ON = (0.1, 0.5)
_CLOSERS: Sequence[str] = ("Think, then act.", "Good luck.", "Act now.", "", "", "")
_THOUGHTS: Mapping[str, str] = MappingProxyType(
    {
        "on": "The {t}: stand on it, then {v}.",
        "take": "The {t}: pick it up, then {v}.",
        "next": "The {t}: stand next to it, then {v}.",
        "task": "Task {t}: pick it up, then {v}.",
    }
)


def thought(lesson: Lesson) -> str:
    """What a player thinks who follows a lesson."""
    return _THOUGHTS[lesson.manner].format(t=lesson.thing, v=lesson.verb)


def word_lesson(lesson: Lesson, rng: random.Random, *, held_out: bool = False) -> str:
    """One sentence for a lesson, its wording drawn from those of training or the held-out ones."""
    return _say(rng.choice((_HELD_OUT_WORDINGS if held_out else _WORDINGS)[lesson.manner]), lesson)


def plain_wording(lesson: Lesson) -> str:
    """The one wording that the reflector is taught."""
    return _say(_WORDINGS[lesson.manner][0], lesson)


def _say(wording: str, lesson: Lesson) -> str:
    verb = "put on" if lesson.verb == "puton" else lesson.verb
    with_it = "put it on" if lesson.verb == "puton" else f"{lesson.verb} it"
    text = wording.format(t=lesson.thing, v=verb, i=with_it)
    return text[0].upper() + text[1:]


def build_prompt(
    sentences: Sequence[str], rng: random.Random, headers: Sequence[str] = HEADERS
) -> str:
    """A system prompt of lesson sentences, shuffled, in one paragraph or as a list, between a drawn
    header and a drawn closing remark.
    """
    sentences = rng.sample(list(sentences), len(sentences))
    header, closer = rng.choice(headers), rng.choice(_CLOSERS)
    if len(sentences) > 1 and rng.random() < 0.3:
        return "\n".join(filter(None, (header, *(f"- {text}" for text in sentences), closer)))
    return " ".join(filter(None, (header, *sentences, closer)))


def random_lesson(things: Sequence[str], rng: random.Random) -> Lesson:
    """A lesson about one of `things` with a manner and a verb drawn at random: true only by
    chance.
    """
    return Lesson(
        thing=rng.choice(things), manner=rng.choice(("on", "take", "next")), verb=rng.choice(VERBS)
    )


def misleading_lesson(right: Lesson, rng: random.Random) -> Lesson:
    """The right thing and manner with a wrong verb that the game does not accept in place of the
    right one.
    """
    fine = {right.verb, *EQUIVALENT_VERBS.get(right, ())}
    return dataclasses.replace(right, verb=rng.choice([v for v in VERBS if v not in fine]))
