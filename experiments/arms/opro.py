"""Prompts written from the scores of earlier ones, after OPRO (https://arxiv.org/abs/2309.03409)."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from envs.api import Outcome
from experiments import wishes
from experiments.arms.arm import Asks, History, Place, Reads
from experiments.wishes import Steps
from ictjax.config import ReflectorConfig
from ictjax.records import Candidate, Context, Message
from ictjax.reflector import CountTokens, compact_text

_SHOWN = 20  # prompts, as in the paper

_SYSTEM_PROMPT = """\
You write the instructions that an agent plays text games by. You never play yourself, and you do \
not see its games: you see the instructions that it has played by so far, and how many games it \
won under each, from the worst to the best. The games differ from one to the next, so a small \
difference may be chance.

Write new instructions, unlike all of these, under which it wins more of the games to come. Keep \
the required reply format of the agent unchanged.

Answer in exactly two sections, with these headings and nothing after them:

ANALYSIS:
<what the better instructions have that the worse ones lack>

IMPROVED PROMPT:
<the complete new instructions, ready to be used as they are>"""

_REQUEST = "Write the two sections, ANALYSIS: and IMPROVED PROMPT:."


class Tried(NamedTuple):
    """A prompt of a loop, and its games on STREAM that the environment did not fail."""

    system_prompt: str
    won: tuple[bool, ...]

    @property
    def rate(self) -> float:
        return sum(self.won) / len(self.won) if self.won else 0.0


@dataclasses.dataclass(frozen=True)
class Opro:
    """The reflector reads no episode: it is shown the prompts of the loop with the STREAM games won
    under each, from the worst to the best, and writes the next one.

    Deviates from OPRO, which scores many prompts a step on the same examples: here a meta-turn has
    one prompt more, and every prompt has the games of its own meta-turns.
    """

    asks: Asks = "untrained"
    reads: Reads = "own"
    settings: tuple[str, ...] = ()

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        tried = tried_prompts([*(turn.context for turn in history), context])

        def question(config: ReflectorConfig, count_tokens: CountTokens) -> list[Message]:
            return opro_question(tried, config, count_tokens)

        (candidate,) = yield from wishes.reflect(question, [place.key])
        return candidate


def tried_prompts(contexts: Sequence[Context]) -> list[Tried]:
    """The prompts of a loop from the worst to the best, of equals the latest last."""
    won: dict[str, tuple[bool, ...]] = {}
    for context in contexts:
        known = [t.success for t in context.trajectories if t.outcome is not Outcome.FAILED]
        won[context.system_prompt] = (*won.pop(context.system_prompt, ()), *known)
    return sorted((Tried(*one) for one in won.items()), key=lambda tried: tried.rate)


def opro_question(
    tried: Sequence[Tried], config: ReflectorConfig, count_tokens: CountTokens
) -> list[Message]:
    """Asks for a prompt, showing as many of the best ones as fit, 20 at most.

    Args:
      tried: from the worst to the best.
      config: style and limits.
      count_tokens: tokens of the rendered conversation.
    Raises:
      ValueError: not even the question without any prompt fits.
    """
    build = _full if config.style != "compact" else _compact
    for left_out in range(max(0, len(tried) - _SHOWN), len(tried) + 1):
        messages = build(tried[left_out:])
        if (size := count_tokens(messages)) <= config.max_context_tokens:
            return messages
    raise ValueError(
        f"The question of the arm opro needs {size} tokens without any prompt,"
        f" reflection.max_context_tokens is {config.max_context_tokens}: raise it."
    )


def _full(tried: Sequence[Tried]) -> list[Message]:
    blocks = [
        f"Instructions:\n<<<\n{one.system_prompt}\n>>>\nGames won: {sum(one.won)} of {len(one.won)}"
        for one in tried
    ]
    return [
        Message(role="system", content=_SYSTEM_PROMPT),
        Message(role="user", content="\n\n".join([*blocks, _REQUEST])),
    ]


def _compact(tried: Sequence[Tried]) -> list[Message]:
    # in words that word-level models know: episodes without a turn
    parts = [
        " ".join(
            ["prompt :", one.system_prompt]
            + [f"episode : success {'yes' if won else 'no'} ." for won in one.won]
        )
        for one in tried
    ]
    return [
        Message(role="system", content="reflect"),
        Message(role="user", content=compact_text(" ".join(parts))),
    ]
