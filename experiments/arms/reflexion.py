"""Findings that add up, after Reflexion (https://arxiv.org/abs/2303.11366)."""

import dataclasses
from collections.abc import Sequence

from experiments import wishes
from experiments.arms.arm import Asks, History, Place, Reads
from experiments.wishes import Steps
from ictjax.records import Candidate, Context, ParseFailure

_KEPT = 3  # findings, as in the paper's memory


@dataclasses.dataclass(frozen=True)
class Reflexion:
    """The reflector's findings on the last three batches, below the first prompt. It is told the
    true outcome of every episode, as in its question in training; what it writes as improved prompt
    is not used. No longer than a reflector's prompt may be: the oldest findings go first.

    Deviates from Reflexion, which tries the same game again: here the next games are others.
    """

    asks: Asks = "untrained"
    reads: Reads = "own"
    settings: tuple[str, ...] = ()

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        (candidate,) = yield from wishes.reflect(context, [place.key])
        if candidate.system_prompt is None or not candidate.analysis:
            return candidate
        past = [turn.written.analysis for turn in history if turn.written.analysis]
        findings = [*past, candidate.analysis][-_KEPT:]
        while place.num_tokens(prompt := _prompt(findings, place)) > (
            place.reflection.max_prompt_tokens
        ):
            if len(findings) == 1:
                failure = ParseFailure.PROMPT_TOO_LONG
                return dataclasses.replace(candidate, system_prompt=None, failure=failure)
            findings = findings[1:]
        return dataclasses.replace(candidate, system_prompt=prompt)


def _prompt(findings: Sequence[str], place: Place) -> str:
    first = place.task.initial_prompt
    if place.reflection.style == "compact":
        return " ".join([first, *findings])
    memory = ["What you found out in earlier games:", *(f"- {text}" for text in findings)]
    return "\n\n".join([first, "\n".join(memory)])
