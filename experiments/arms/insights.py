"""A list of insights that is voted on, after ExpeL (https://arxiv.org/abs/2308.10144)."""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

from experiments import wishes
from experiments.arms.arm import Asks, History, Place, Reads
from experiments.wishes import Steps
from ictjax.actions import after_thinking
from ictjax.config import ReflectorConfig
from ictjax.records import Candidate, Context, Message, ParseFailure
from ictjax.reflector import REQUEST, CountTokens, compact_text, reflector_messages

_FIRST_VOTES = 2  # of a new insight, as in the paper
_MOST = 50  # operations of a reply that are used: some models do not stop

_SYSTEM_PROMPT = """\
You coach an agent that plays text games. You never play yourself: you study episodes that the \
agent played and keep a list of insights, which the agent reads before it plays.

Compare episodes: which action or missing action decided each one? An insight is one sentence that \
helps in FUTURE games of the same kind. Those games are new to the agent: other places, other \
objects, other orders. State what carries over, not the solution of an episode you saw.

Change the list by operations, one on each line, and write nothing else:

ADD: <a new insight>
EDIT <number>: <the insight in better words>
UPVOTE <number>
DOWNVOTE <number>

Upvote what the episodes confirm, downvote what they contradict: an insight that loses all its \
votes is removed. Edit one rather than adding another that says nearly the same."""

_REQUEST = "Study these episodes and write the operations, at least one."

# As in `ictjax.reflector`, marks of lists and markdown may stand before an operation.
_LEAD = r"^[\s#>*_`•+\-]*+(?:\(?\d++[.)]\s*+)?[*_`]*+"
_ADD = re.compile(
    # "Add" without a colon begins a sentence
    rf"{_LEAD}(?:(?i:add)[*_`]*+(?:\s*+[\[(#]?\d++[\])]?)?\s*+[:：]|ADD\b)[*_`]*+(?P<text>.*)"
)
_CHANGE = re.compile(
    rf"{_LEAD}(?P<name>edit|upvote|downvote)\b\W*+(?:(?:insight|number)\b\W*+)?"
    r"(?P<number>\d*+)(?P<text>.*)",
    re.IGNORECASE,
)
_BROKEN_OFF = (ParseFailure.TRUNCATED, ParseFailure.UNFINISHED_THOUGHT, ParseFailure.NO_REPLY)
_DONE = {"add": "added", "edit": "edited", "upvote": "upvoted", "downvote": "downvoted"}
_MARKDOWN = " \t*_`"
_BETWEEN = f"{_MARKDOWN}:：.)]-"  # a number and the text


class Insight(NamedTuple):
    """One of the list."""

    text: str
    votes: int


class Operation(NamedTuple):
    """A line of a reply, whether it can be used or not."""

    name: str  # "add", "edit", "upvote", "downvote"
    number: int  # in the list as it was shown, from 1; 0 for a new insight, or none
    text: str


class Changed(NamedTuple):
    """What operations made of a list."""

    insights: list[Insight]  # most votes first, of equals the older ones
    used: list[Operation]
    num_unusable: int


@dataclasses.dataclass(frozen=True)
class Insights:
    """The reflector adds insights to a list, edits them, and votes them up and down after every
    batch; the list stands below the first prompt, the one with most votes first. A new insight has
    two votes, an edit is one more, without votes it is removed. No longer than a reflector's prompt
    may be: what comes last goes. Needs a language model, pocket ones write no operations.

    Deviates from ExpeL, which compares tries of the same game, and retrieves won episodes beside
    the insights.
    """

    asks: Asks = "untrained"
    reads: Reads = "own"
    settings: tuple[str, ...] = ()

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        insights: list[Insight] = []
        for turn in history:
            if turn.written.failure is None:
                insights = _kept(changed(insights, turn.written.reply).insights, place)

        def question(config: ReflectorConfig, count_tokens: CountTokens) -> list[Message]:
            return insights_question(context, insights, config, count_tokens)

        (candidate,) = yield from wishes.reflect(question, [place.key])
        if candidate.failure in _BROKEN_OFF:
            return candidate
        found = changed(insights, candidate.reply)
        if not found.used:
            return dataclasses.replace(
                candidate, analysis="", system_prompt=None, failure=ParseFailure.NO_OPERATION
            )
        return dataclasses.replace(
            candidate,
            analysis=_summary(found),
            system_prompt=_prompt(_kept(found.insights, place), place),
            failure=None,
        )


def insights_question(
    context: Context,
    insights: Sequence[Insight],
    config: ReflectorConfig,
    count_tokens: CountTokens,
) -> list[Message]:
    """Asks for operations: the episodes as in the reflector's usual question, then the list.

    Args:
      context: the episodes, of which turns are left out where not all fit.
      insights: as numbered in the reply.
      config: style and limits.
      count_tokens: tokens of the rendered conversation.
    Raises:
      ValueError: not even the question without any episode fits.
    """

    def ours(messages: Sequence[Message]) -> list[Message]:
        return _ours(messages[-1].content, insights, config.style)

    return ours(reflector_messages(context, config, lambda messages: count_tokens(ours(messages))))


def operations(reply: str) -> list[Operation]:
    """The lines of a reply that begin with the name of an operation; others say nothing."""
    found = []
    for line in (after_thinking(reply) or "").splitlines():
        if match := _ADD.match(line):
            found.append(Operation("add", 0, _sentence(match["text"])))
        elif match := _CHANGE.match(line):
            # more digits than any list has numbers are a number as well
            number = int(match["number"][:9] or 0)
            found.append(Operation(match["name"].lower(), number, _sentence(match["text"])))
    return found


def changed(insights: Sequence[Insight], reply: str) -> Changed:
    """What the first 50 operations of a reply make of a list. All numbers are of the list as it was
    shown, and an insight counts once a reply: further operations on it cannot be used, as those on
    numbers that there are not, and those without a text where one is needed. To add what is there
    already is to vote for it.
    """
    now = list(insights)
    used: list[Operation] = []
    touched: set[int] = set()
    found = operations(reply)
    for operation in found[:_MOST]:
        at = _position(operation, now, len(insights))
        if at is None or at in touched:
            continue
        touched.add(at)
        used.append(operation)
        if at == len(now):
            now.append(Insight(operation.text, _FIRST_VOTES))
            continue
        text = operation.text if operation.name == "edit" else now[at].text
        now[at] = Insight(text, now[at].votes + (-1 if operation.name == "downvote" else 1))
    left = sorted((one for one in now if one.votes > 0), key=lambda one: -one.votes)
    return Changed(left, used, len(found) - len(used))


def _position(operation: Operation, now: Sequence[Insight], num_shown: int) -> int | None:
    """Where in the list an operation belongs, its end for what is new; None: nowhere."""
    if operation.name in ("add", "edit") and not operation.text:
        return None
    if operation.name == "add":
        texts = [insight.text.lower() for insight in now]
        return (*texts, operation.text.lower()).index(operation.text.lower())
    return operation.number - 1 if 1 <= operation.number <= num_shown else None


def _sentence(text: str) -> str:
    return " ".join(text.lstrip(_BETWEEN).rstrip(_MARKDOWN).split())


def _kept(insights: Sequence[Insight], place: Place) -> list[Insight]:
    """Those that fit below the first prompt, the ones with most votes first."""
    kept: list[Insight] = []
    for insight in insights:
        more = [*kept, insight]
        if place.num_tokens(_prompt(more, place)) <= place.reflection.max_prompt_tokens:
            kept = more
    return kept


def _prompt(insights: Sequence[Insight], place: Place) -> str:
    first, texts = place.task.initial_prompt, [insight.text for insight in insights]
    if place.reflection.style == "compact":
        return compact_text(" ".join([first, *texts]))
    if not texts:
        return first
    learned = ["What you learned from earlier games:", *(f"- {text}" for text in texts)]
    return "\n\n".join([first, "\n".join(learned)])


def _summary(found: Changed) -> str:
    counts = collections.Counter(operation.name for operation in found.used)
    parts = [f"{counts[name]} {word}" for name, word in _DONE.items() if counts[name]]
    if found.num_unusable:
        parts.append(f"{found.num_unusable} that could not be used")
    return f"Insights: {', '.join(parts)}."


def _ours(episodes: str, insights: Sequence[Insight], style: str) -> list[Message]:
    """The question, of the text that shows the episodes in the reflector's usual one."""
    if style == "compact":
        texts = [f"insight : {one.text}" for one in insights]
        return [
            Message(role="system", content="reflect"),
            Message(role="user", content=compact_text(" ".join([episodes, *texts]))),
        ]
    numbered = [f"{n}. {one.text} ({one.votes} votes)" for n, one in enumerate(insights, 1)]
    known = "\n".join(["The list of insights:", *(numbered or ["(empty)"])])
    shown = episodes.removesuffix(REQUEST).rstrip()
    return [
        Message(role="system", content=_SYSTEM_PROMPT),
        Message(role="user", content="\n\n".join([shown, known, _REQUEST])),
    ]
