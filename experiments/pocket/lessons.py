"""One-sentence lessons about MiniHack and ALFWorld and the system prompts made of them: the
language that the pocket models share.

A lesson pairs a thing with a manner of reaching it and a verb. In MiniHack the thing lies in the
room. In ALFWorld it is the kind of task that the screen names, the manner is where to bring what
the task is about, and the verb is what to do with it there. Wordings are split into those seen in
training and held-out ones, so that obedience can be measured on sentences that the actor never met.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence

from envs import prompts


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Lesson:
    """What to do with a thing: reach it in a manner, then `verb`.

    Manners of MiniHack: `on` (stand on it), `take` (pick it up), `next` (stand beside it). Of
    ALFWorld: `place` (bring what the task is about to the place that it names), `both` (bring two
    there, one after the other), or a kind of place such as `fridge` (bring it there).
    """

    thing: str
    manner: str
    verb: str


# The lesson that each family needs. Families that share a thing would share a lesson; none do.
MINIHACK_LESSONS: dict[str, Lesson] = {
    "eat": Lesson(thing="apple", manner="on", verb="eat"),
    "wield": Lesson(thing="dagger", manner="take", verb="wield"),
    "wear": Lesson(thing="robe", manner="take", verb="wear"),
    "puton": Lesson(thing="amulet", manner="take", verb="puton"),
    "zap": Lesson(thing="wand", manner="take", verb="zap"),
    "read": Lesson(thing="scroll", manner="take", verb="read"),
    "pray": Lesson(thing="altar", manner="on", verb="pray"),
    "sink": Lesson(thing="sink", manner="on", verb="quaff"),
    "levitate_boots": Lesson(thing="boots", manner="take", verb="wear"),
    "levitate_ring": Lesson(thing="ring", manner="take", verb="puton"),
    "levitate_potion": Lesson(thing="potion", manner="take", verb="quaff"),
    "locked_door": Lesson(thing="door", manner="next", verb="kick"),
}
ALFWORLD_LESSONS: dict[str, Lesson] = {
    "put": Lesson(thing="put", manner="place", verb="put"),
    "look": Lesson(thing="look", manner="place", verb="use"),
    "clean": Lesson(thing="clean", manner="sinkbasin", verb="clean"),
    "heat": Lesson(thing="heat", manner="microwave", verb="heat"),
    "cool": Lesson(thing="cool", manner="fridge", verb="cool"),
    "pick_two": Lesson(thing="two", manner="both", verb="put"),
}
FAMILY_LESSONS: dict[str, Lesson] = MINIHACK_LESSONS | ALFWORLD_LESSONS

THINGS: tuple[str, ...] = tuple(lesson.thing for lesson in MINIHACK_LESSONS.values())
TASK_THINGS: tuple[str, ...] = tuple(lesson.thing for lesson in ALFWORLD_LESSONS.values())
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
)
TASK_VERBS: tuple[str, ...] = ("put", "clean", "heat", "cool", "use", "open", "close", "examine")
STATIONS: tuple[str, ...] = ("sinkbasin", "microwave", "fridge")
# Verbs that the game accepts in place of the right one, so no lesson naming them misleads. Making a
# thing clean, hot or cold before putting it somewhere does no harm.
EQUIVALENT_VERBS: dict[Lesson, tuple[str, ...]] = {
    **{lesson: ("puton",) for lesson in MINIHACK_LESSONS.values() if lesson.verb == "wear"},
    **{lesson: ("wear",) for lesson in MINIHACK_LESSONS.values() if lesson.verb == "puton"},
    ALFWORLD_LESSONS["put"]: ("clean", "heat", "cool"),
}

# Nouns of no family. Training renames things to them, so that only matching the prompt against the
# screen pays.
OTHER_NOUNS: tuple[str, ...] = (
    "apricot arrow axe bag banana barrel basket bell belt bench book bottle bow bowl box brush"
    " bucket button candle cap carpet chain chair chest cloak clock coat coin comb crate cup drum"
    " fan feather fig flag flute fork gem glove hammer harp hat helmet hook horn jar jug kettle"
    " ladder lamp lantern leaf lens map mask medal melon mirror mitten mug nail net oar orange pan"
    " peach pear pick pipe plate plum pot purse quill rag rake razor rod rope saddle scarf shell"
    " shield shovel sock spear spoon stool sword table tile towel urn vase vest wheel whip"
).split()

_WORDINGS: dict[str, tuple[str, ...]] = {
    "on": (
        "when you see the {t} , step onto it and {v} .",
        "walk to the {t} , then {v} .",
        "{v} while you stand on the {t} .",
        "stand on the {t} and {v} .",
        "go to the {t} and {v} there .",
        "to win , step onto the {t} , then {v} .",
        "the {t} helps : stand on it and {v} .",
        "if there is a {t} , walk onto it and use {v} .",
        "first reach the {t} , after that {v} .",
        "use {v} when you are on the {t} .",
        "on the {t} you should {v} .",
        "remember to {v} once you stand on the {t} .",
    ),
    "take": (
        "when you see the {t} , pick it up and {v} it .",
        "pick up the {t} , then {v} it .",
        "{v} the {t} after you pick it up .",
        "take the {t} and {v} it .",
        "grab the {t} and {v} it .",
        "to win , pick up the {t} , then {v} it .",
        "the {t} helps : take it and {v} it .",
        "if there is a {t} , pick it up and use {v} .",
        "first take the {t} , after that {v} it .",
        "use {v} with the {t} that you picked up .",
        "once you take the {t} you should {v} it .",
        "remember to {v} the {t} once you grab it .",
    ),
    "next": (
        "when you see the {t} , stand next to it and {v} it .",
        "walk up next to the {t} , then {v} it .",
        "{v} the {t} while you stand next to it .",
        "stand next to the {t} and {v} it .",
        "go next to the {t} and {v} it .",
        "to win , stand next to the {t} , then {v} it .",
        "the {t} helps : stay next to it and {v} it .",
        "if there is a {t} , go next to it and use {v} .",
        "first get next to the {t} , after that {v} it .",
        "use {v} on the {t} next to you .",
        "next to the {t} you should {v} it .",
        "remember to {v} the {t} once you are next to it .",
    ),
    "place": (
        "when the task says {t} , bring the thing to its place and {v} it .",
        "for {t} , bring it to the place , then {v} it .",
        "{v} it at the place if the task is {t} .",
        "task {t} : carry it to the place and {v} it .",
        "if you must {t} , go to the place with it and {v} it there .",
        "to win at {t} , get it to the place , then {v} it .",
        "{t} means : find it , bring it to the place , {v} it .",
        "in a {t} task , use {v} at the place .",
        "first the place , after that {v} : so you {t} .",
        "remember for {t} to {v} it once it is at the place .",
    ),
    "both": (
        "when the task says {t} , bring both things to the place and {v} them .",
        "for {t} , bring both to the place , then {v} them .",
        "{v} both at the place if the task is {t} .",
        "task {t} : carry both to the place and {v} them .",
        "if you must {t} , go to the place with both and {v} them there .",
        "to win at {t} , get both to the place , then {v} them .",
        "{t} means : find both , bring them to the place , {v} them .",
        "in a {t} task , use {v} with both .",
        "first one , then both , and {v} : so you {t} .",
        "remember for {t} to {v} both , one after the other .",
    ),
    "station": (
        "when the task says {t} , bring the thing to the {m} and {v} it .",
        "for {t} , bring it to the {m} , then {v} it .",
        "{v} it at the {m} if the task is {t} .",
        "task {t} : carry it to the {m} and {v} it .",
        "if you must {t} , go to the {m} with it and {v} it there .",
        "to win at {t} , get it to the {m} , then {v} it .",
        "{t} means : find it , bring it to the {m} , {v} it .",
        "in a {t} task , use {v} at the {m} .",
        "first the {m} , after that {v} : so you {t} .",
        "remember for {t} to {v} it once it is at the {m} .",
    ),
}

_HELD_OUT_WORDINGS: dict[str, tuple[str, ...]] = {
    "on": (
        "never leave before you stand on the {t} : there you must {v} .",
        "a wise player will walk over the {t} and {v} .",
        "only {v} works , and only on top of the {t} .",
        "step onto the {t} ; {v} is what opens the way .",
    ),
    "take": (
        "never leave before you pick up the {t} : then you must {v} it .",
        "a wise player will take the {t} along and {v} it .",
        "only {v} works , and only with the {t} picked up .",
        "pick the {t} off the floor ; {v} is what opens the way .",
    ),
    "next": (
        "never leave before you stand next to the {t} : there you must {v} it .",
        "a wise player will stay next to the {t} and {v} it .",
        "only {v} works , and only next to the {t} .",
        "get next to the {t} ; {v} is what opens the way .",
    ),
    "place": (
        "never give up a {t} task before you carry it to the place : there you must {v} it .",
        "a wise player of {t} will take it along to the place and {v} it .",
        "only {v} works for {t} , and only at the place .",
        "get it to the place ; {v} is what ends a {t} task .",
    ),
    "both": (
        "never give up a {t} task before you carry both to the place : there you must {v} them .",
        "a wise player of {t} will take both along to the place and {v} them .",
        "only {v} works for {t} , and only with both .",
        "get both to the place ; {v} is what ends a {t} task .",
    ),
    "station": (
        "never give up a {t} task before you carry it to the {m} : there you must {v} it .",
        "a wise player of {t} will take it along to the {m} and {v} it .",
        "only {v} works for {t} , and only at the {m} .",
        "get it to the {m} ; {v} is what ends a {t} task .",
    ),
}

HEADERS: tuple[str, ...] = (
    "you play nethack .",
    "you are a player of nethack .",
    "play nethack and win .",
    "you play a game in rooms .",
    "",
)
TASK_HEADERS: tuple[str, ...] = (
    "you do a household task .",
    "you are a helper in a house .",
    "do the task in the house .",
    "you play a game in rooms .",
    "",
)
_CLOSERS: tuple[str, ...] = ("think , then act .", "good luck .", "do this now .", "", "")


def is_task(lesson: Lesson) -> bool:
    """Whether this is a lesson about a task of ALFWorld rather than about a thing of MiniHack."""
    return lesson.manner not in ("on", "take", "next")


def benchmark_of(family: str) -> Mapping[str, Lesson]:
    """The lessons of the benchmark that a family belongs to."""
    return ALFWORLD_LESSONS if family in ALFWORLD_LESSONS else MINIHACK_LESSONS


def initial_prompt(family: str) -> str:
    """The prompt without a lesson for the benchmark of a family."""
    return (prompts.ALFWORLD if family in ALFWORLD_LESSONS else prompts.MINIHACK)["compact"]


def headers(family: str) -> Sequence[str]:
    """The first sentences that a prompt for the benchmark of a family may have."""
    return TASK_HEADERS if family in ALFWORLD_LESSONS else HEADERS


def _say(wording: str, lesson: Lesson) -> str:
    return wording.format(t=lesson.thing, m=lesson.manner, v=lesson.verb)


def _group(lesson: Lesson) -> str:
    return lesson.manner if lesson.manner in _WORDINGS else "station"


def word_lesson(lesson: Lesson, rng: random.Random, *, held_out: bool = False) -> str:
    """One sentence for a lesson, its wording drawn by `rng` from the training or the held-out
    wordings.
    """
    return _say(rng.choice((_HELD_OUT_WORDINGS if held_out else _WORDINGS)[_group(lesson)]), lesson)


def plain_wording(lesson: Lesson) -> str:
    """The one wording that the pocket reflector writes."""
    return _say(_WORDINGS[_group(lesson)][0], lesson)


def build_prompt(
    sentences: Sequence[str], rng: random.Random, headers: Sequence[str] = HEADERS
) -> str:
    """A system prompt of the given lesson sentences, shuffled, between a drawn header and a drawn
    closing remark.
    """
    sentences = list(sentences)
    rng.shuffle(sentences)
    return " ".join(
        part for part in (rng.choice(headers), *sentences, rng.choice(_CLOSERS)) if part
    )


def reflector_prompt(lesson: Lesson) -> str:
    """The system prompt that the pocket reflector writes for a lesson."""
    return f"{(TASK_HEADERS if is_task(lesson) else HEADERS)[0]} {plain_wording(lesson)}"


def random_lesson(things: Sequence[str], rng: random.Random) -> Lesson:
    """A MiniHack lesson about one of `things` with a manner and a verb drawn at random: true only
    by chance.
    """
    return Lesson(
        thing=rng.choice(things), manner=rng.choice(("on", "take", "next")), verb=rng.choice(VERBS)
    )


def random_task_lesson(tasks: Sequence[str], places: Sequence[str], rng: random.Random) -> Lesson:
    """An ALFWorld lesson about one of `tasks` with a manner (one of `places` among them) and a verb
    drawn at random: true only by chance.
    """
    manner = rng.choice((rng.choice(("place", "both")), rng.choice(STATIONS), rng.choice(places)))
    return Lesson(thing=rng.choice(tasks), manner=manner, verb=rng.choice(TASK_VERBS))


def misleading_lesson(right: Lesson, rng: random.Random) -> Lesson:
    """The right thing and manner with a wrong verb that the game does not accept in place of the
    right one.
    """
    verbs = TASK_VERBS if is_task(right) else VERBS
    wrong = [
        verb for verb in verbs if verb != right.verb and verb not in EQUIVALENT_VERBS.get(right, ())
    ]
    return dataclasses.replace(right, verb=rng.choice(wrong))


def training_texts() -> list[str]:
    """Every sentence that a prompt of the training rows can hold, for the vocabulary. Held-out
    wordings are left out on purpose.
    """
    wordings = [
        text.format(t="it", m="place", v="use") for group in _WORDINGS.values() for text in group
    ]
    first = [prompts.MINIHACK["compact"], prompts.ALFWORLD["compact"]]
    return [*wordings, *HEADERS, *TASK_HEADERS, *_CLOSERS, *first]
