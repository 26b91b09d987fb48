"""One-sentence lessons about MiniHack and the system prompts made of them: the language that the pocket models share.

A lesson pairs a thing with a manner of reaching it and a verb. Wordings are split into those seen in training and
held-out ones, so that obedience can be measured on sentences that the actor never met.
"""

import dataclasses
import random
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Lesson:
    """What to do with a thing: reach it in a manner (`on`: stand on it, `take`: pick it up, `next`: stand beside it), then `verb`."""

    thing: str
    manner: str
    verb: str


# The lesson that each family needs. Families that share a thing would share a lesson; none do.
FAMILY_LESSONS: dict[str, tuple[Lesson, ...]] = {
    "eat": (Lesson(thing="apple", manner="on", verb="eat"),),
    "wield": (Lesson(thing="dagger", manner="take", verb="wield"),),
    "wear": (Lesson(thing="robe", manner="take", verb="wear"),),
    "puton": (Lesson(thing="amulet", manner="take", verb="puton"),),
    "zap": (Lesson(thing="wand", manner="take", verb="zap"),),
    "read": (Lesson(thing="scroll", manner="take", verb="read"),),
    "pray": (Lesson(thing="altar", manner="on", verb="pray"),),
    "sink": (Lesson(thing="sink", manner="on", verb="quaff"),),
    "levitate_boots": (Lesson(thing="boots", manner="take", verb="wear"),),
    "levitate_ring": (Lesson(thing="ring", manner="take", verb="puton"),),
    "levitate_potion": (Lesson(thing="potion", manner="take", verb="quaff"),),
    "locked_door": (Lesson(thing="door", manner="next", verb="kick"),),
}

THINGS: tuple[str, ...] = tuple(lesson.thing for lessons in FAMILY_LESSONS.values() for lesson in lessons)
VERBS: tuple[str, ...] = ("eat", "wield", "wear", "puton", "zap", "read", "pray", "quaff", "kick", "apply", "drop", "search")
# Verbs that the game accepts in place of the right one, so no lesson naming them misleads.
EQUIVALENT_VERBS: dict[str, tuple[str, ...]] = {"wear": ("puton",), "puton": ("wear",)}

# Nouns of no family. Training renames things to them, so that only matching the prompt against the screen pays.
OTHER_NOUNS: tuple[str, ...] = (
    "apricot arrow axe bag banana barrel basket bell belt bench book bottle bow bowl box brush bucket button candle cap carpet chain chair "
    "chest cloak clock coat coin comb crate cup drum fan feather fig flag flute fork gem glove hammer harp hat helmet hook horn jar jug kettle "
    "ladder lamp lantern leaf lens map mask medal melon mirror mitten mug nail net oar orange pan peach pear pick pipe plate plum pot purse "
    "quill rag rake razor rod rope saddle scarf shell shield shovel sock spear spoon stool sword table tile towel urn vase vest wheel whip"
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
}

HEADERS: tuple[str, ...] = (
    "you play nethack .",
    "you are a player of nethack .",
    "play nethack and win .",
    "you play a game in rooms .",
    "",
)
INITIAL_PROMPT = "you play nethack . think , then act ."
_CLOSERS: tuple[str, ...] = ("think , then act .", "good luck .", "do this now .", "", "")


def word_lesson(lesson: Lesson, rng: random.Random, *, held_out: bool = False) -> str:
    """One sentence for a lesson, its wording drawn by `rng` from the training or the held-out wordings."""
    wordings = (_HELD_OUT_WORDINGS if held_out else _WORDINGS)[lesson.manner]
    return rng.choice(wordings).format(t=lesson.thing, v=lesson.verb)


def plain_wording(lesson: Lesson) -> str:
    """The one wording that the pocket reflector writes."""
    return _WORDINGS[lesson.manner][0].format(t=lesson.thing, v=lesson.verb)


def build_prompt(sentences: Sequence[str], rng: random.Random) -> str:
    """A system prompt of the given lesson sentences, shuffled, between a drawn header and a drawn closing remark."""
    sentences = list(sentences)
    rng.shuffle(sentences)
    return " ".join(part for part in (rng.choice(HEADERS), *sentences, rng.choice(_CLOSERS)) if part)


def reflector_prompt(lesson: Lesson) -> str:
    """The system prompt that the pocket reflector writes for a lesson."""
    return f"{HEADERS[0]} {plain_wording(lesson)}"


def random_lesson(things: Sequence[str], rng: random.Random) -> Lesson:
    """A lesson about one of `things` with a manner and a verb drawn at random: true only by chance."""
    return Lesson(thing=rng.choice(things), manner=rng.choice(("on", "take", "next")), verb=rng.choice(VERBS))


def misleading_lesson(right: Lesson, rng: random.Random) -> Lesson:
    """The right thing and manner with a wrong verb that the game does not accept in place of the right one."""
    wrong = [verb for verb in VERBS if verb != right.verb and verb not in EQUIVALENT_VERBS.get(right.verb, ())]
    return dataclasses.replace(right, verb=rng.choice(wrong))


def training_texts() -> list[str]:
    """Every sentence that a prompt of the training rows can hold, for the vocabulary. Held-out wordings are left out on purpose."""
    wordings = [text.format(t="it", v="use") for group in _WORDINGS.values() for text in group]
    return [*wordings, *HEADERS, *_CLOSERS, INITIAL_PROMPT]
