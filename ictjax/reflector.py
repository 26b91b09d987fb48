"""The reflector: a context becomes chat messages, whoever speaks answers them, and the answer
becomes a new system prompt.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from envs.api import Outcome
from envs.stopping import check, unwinding
from ictjax.actions import after_thinking
from ictjax.config import ReflectorConfig
from ictjax.keys import Key
from ictjax.records import Candidate, Context, Message, ParseFailure, Trajectory, Turn
from ictjax.speaker import Finish, Limits, Reply, Speaker, is_speaker

SYSTEM_PROMPT = """\
You coach an agent that plays text games. You never play yourself: you study episodes that the \
agent played and rewrite the instructions it plays by.

Do three things:
1. Find out what the agent did well and where it lost: compare episodes, and say which action or \
missing action decided each one.
2. Judge the instructions: which parts helped, which misled the agent, and what it needed to know \
but was not told.
3. Write better instructions for FUTURE games of the same kind. Those games are new to the agent: \
other places, other objects, other orders. State rules that carry over, not the solution of an \
episode you saw. Keep the required reply format of the agent unchanged.

Answer in exactly two sections, with these headings and nothing after them:

ANALYSIS:
<your findings on points 1 and 2>

IMPROVED PROMPT:
<the complete new instructions, ready to be used as they are>"""

REQUEST = (
    "Study these episodes and write the two sections, ANALYSIS: and IMPROVED PROMPT:. "
    "The new instructions must help in future, unseen games."
)

_SHORT_SYSTEM_PROMPT = """\
You coach a player of text games. Study the episodes, then write instructions that help the player \
win future games of the same kind.
Answer in two sections:
ANALYSIS: what mattered, and what the player did not do
IMPROVED PROMPT: the new instructions"""

# Markdown and list marks may stand before a heading and around its colon. As in `ictjax.actions`,
# no repetition gives back what it took.
_LEAD = r"^[ \t\r\x0b\x0c\xa0\u3000#>*_`•+\-\ufeff\u200b]*+(?:\(?\d++[.)]\s*+)?[*_`]*+"
_COLON = r"\s*+[*_`]*+\s*+[:：][*_`]*+"
_FLAGS = re.IGNORECASE | re.MULTILINE
_MARKS = "#>*_` \t\r\n"
_FENCE_LANGUAGE = re.compile(r"[\w+-]*+[^\S\n]*+\n")


class _Heading(NamedTuple):
    """How a section may begin, the strictest way first."""

    at_line: re.Pattern[str]
    alone: re.Pattern[str]  # on its line, without a colon
    inline: re.Pattern[str]


def _heading(name: str) -> _Heading:
    return _Heading(
        re.compile(f"{_LEAD}{name}{_COLON}", _FLAGS),
        re.compile(rf"{_LEAD}{name}[^\S\n]*+[*_`#]*+[^\S\n]*+$", _FLAGS),
        re.compile(rf"\b{name}{_COLON}", _FLAGS),
    )


_ANALYSIS, _PROMPT = _heading("analysis"), _heading(r"improved[\s_-]++prompt")


class Reflection(NamedTuple):
    """A parsed reply of the reflector."""

    analysis: str
    system_prompt: str


CountTokens = Callable[[Sequence[Message]], int]
"""How many tokens a rendered conversation has."""

Question = Callable[[ReflectorConfig, CountTokens], list[Message]]
"""Asks the reflector something of its own, within `max_context_tokens`."""

FULL = ReflectorConfig(
    style="full", max_context_tokens=30_720, max_reply_tokens=2048, max_prompt_tokens=1024
)
"""For language models, unless a run says otherwise."""


@dataclasses.dataclass(frozen=True)
class Reflector:
    """Whoever speaks, as a reflector: a context in, a new system prompt or a typed failure out.

    Args:
      speaker: who answers; it stays the caller's to close.
      config: how episodes are shown, and limits.
      temperature: of the replies; 0 is greedy.
    """

    speaker: Speaker
    config: ReflectorConfig = FULL
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not is_speaker(self.speaker):
            raise ValueError(
                f"A reflector needs a speaker, got {self.speaker!r}: open one with"
                " ictjax.open_speaker."
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}.")
        check_budget(self.config, self.speaker.num_tokens)

    def __call__(self, context: Context, key: Key = (0, 0)) -> Reflection | ParseFailure:
        """One reflection on a context; another key draws another one."""
        ((candidate,),) = self.candidates([context], [[key]])
        if candidate.failure is not None or candidate.system_prompt is None:
            return candidate.failure or ParseFailure.NO_PROMPT
        return Reflection(analysis=candidate.analysis, system_prompt=candidate.system_prompt)

    def messages(self, asked: Context | Question) -> list[Message]:
        """The question about a context, within the configured budget (`reflector_messages`); or
        another one.
        """
        if isinstance(asked, Context):
            return reflector_messages(asked, self.config, self.speaker.num_tokens)
        return asked(self.config, self.speaker.num_tokens)

    def cuts(self, context: Context) -> bool:
        """Whether more than turns is left out of the question about a context."""
        return is_cut(context, self.config, self.speaker.num_tokens)

    def candidates(
        self,
        asked: Sequence[Context | Question],
        keys: Sequence[Sequence[Key]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Candidate]]:
        """Parsed replies, without rewards: one for every key of every context, in order. A question
        is read once for all its replies.

        Args:
          asked: contexts to reflect on, or questions of another kind.
          keys: of the replies to each.
          progress: called with (finished, total) after every reply.
        """
        limits = Limits(max_tokens=self.config.max_reply_tokens, temperature=self.temperature)
        questions = [self.messages(one) for one in asked]
        replies = ask_groups(self.speaker, questions, limits, keys, progress)
        return [[self._candidate(reply) for reply in group] for group in replies]

    def _candidate(self, reply: Reply) -> Candidate:
        parsed = self._parsed(reply)
        failed = isinstance(parsed, ParseFailure)
        return Candidate(
            prompt_ids=reply.prompt_ids,
            reply_ids=reply.ids,
            logprobs=reply.logprobs,
            weights_step=reply.weights_step,
            reply=reply.text if reply.finish is not Finish.FAILED else reply.error,
            analysis="" if failed else parsed.analysis,
            system_prompt=None if failed else parsed.system_prompt,
            failure=parsed if failed else None,
        )

    def _parsed(self, reply: Reply) -> Reflection | ParseFailure:
        if reply.finish is Finish.FAILED:
            return ParseFailure.NO_REPLY
        parsed = parse_reply(reply.text, truncated=reply.truncated)
        if isinstance(parsed, ParseFailure):
            return parsed
        if self.speaker.num_tokens(parsed.system_prompt) > self.config.max_prompt_tokens:
            return ParseFailure.PROMPT_TOO_LONG
        return parsed


def ask_groups(
    speaker: Speaker,
    questions: Sequence[Sequence[Message]],
    limits: Limits,
    keys: Sequence[Sequence[Key]],
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Reply]]:
    """The replies to each question, one for every key, in order; a question is read once and forked
    for its group.
    """
    places: dict[int, tuple[int, int]] = {}
    results: dict[tuple[int, int], Reply] = {}
    total = sum(map(len, keys))
    try:
        for q, (question, group) in enumerate(zip(questions, keys, strict=True)):
            first = speaker.open(question)
            places[first] = q, 0
            for g in range(1, len(group)):
                places[speaker.fork(first)] = q, g
            conversations = [number for number, place in places.items() if place[0] == q]
            for conversation, key in zip(conversations, group, strict=True):
                speaker.ask(conversation, limits, key)
        with unwinding():
            while places:
                check()
                for reply in speaker.step():
                    results[places.pop(reply.conversation)] = reply
                    speaker.close(reply.conversation)
                    if progress is not None:
                        progress(len(results), total)
    finally:
        for conversation in places:
            speaker.close(conversation)
    return [[results[q, g] for g in range(len(group))] for q, group in enumerate(keys)]


def reflector_messages(
    context: Context, config: ReflectorConfig, count_tokens: CountTokens
) -> list[Message]:
    """The conversation that asks for a new prompt, within `config.max_context_tokens`.

    When the whole does not fit, the middle turns of every episode longer than some length are left
    out, evenly and as few as possible. When it does not fit without any turn, the middle of every
    final observation longer than some length is, then that of the prompt; at last whole episodes
    are, from the end. A mark stands for what was left out.

    Args:
      context: the prompt in force and the episodes played under it.
      config: style and limits.
      count_tokens: tokens of the rendered conversation.
    Raises:
      ValueError: not even the question without anything to study fits (`check_budget`).
    """
    context = _whole(context)
    build = _BUILD[config.style]
    longest = max((len(t.turns) for t in context.trajectories), default=0)
    if config.head_turns is not None and config.tail_turns is not None:
        head, tail = config.head_turns, config.tail_turns
    else:
        head, tail = (longest + 1) // 2, longest // 2

    def messages(turns: int) -> list[Message]:
        shown_tail = min(tail, turns // 2)
        return build(context, config, min(head, turns - shown_tail), shown_tail)

    low, high = 0, min(longest, head + tail)
    if count_tokens(messages(high)) <= config.max_context_tokens:
        return messages(high)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (
            (middle, high)
            if count_tokens(messages(middle)) <= config.max_context_tokens
            else (low, middle)
        )
    best = messages(low)
    if count_tokens(best) > config.max_context_tokens:
        return _cut(context, config, count_tokens)
    return best


def is_cut(context: Context, config: ReflectorConfig, count_tokens: CountTokens) -> bool:
    """Whether more than turns has to be left out of the question about a context."""
    bare = _BUILD[config.style](_whole(context), config, 0, 0)
    return count_tokens(bare) > config.max_context_tokens


def check_budget(config: ReflectorConfig, count_tokens: CountTokens) -> None:
    """Raises ValueError where no context at all fits."""
    size = count_tokens(_BUILD[config.style](_NOTHING, config, 0, 0))
    if size > config.max_context_tokens:
        raise ValueError(
            f"The reflector's question needs {size} tokens without any episode,"
            f" reflection.max_context_tokens is {config.max_context_tokens}: raise it."
        )


def _whole(context: Context) -> Context:
    """The context without what says nothing about the prompt: episodes that the environment broke
    off.
    """
    kept = tuple(t for t in context.trajectories if t.outcome is not Outcome.FAILED)
    return dataclasses.replace(context, trajectories=kept)


def _cut(context: Context, config: ReflectorConfig, count_tokens: CountTokens) -> list[Message]:
    """The question without any turn, with so much left out of its texts that it fits."""

    build = _BUILD[config.style]

    def messages(num_episodes: int, chars: int, prompt_chars: int) -> list[Message]:
        shown = [
            dataclasses.replace(
                t, final_observation=_middle_out(t.final_observation, chars, config.style)
            )
            for t in context.trajectories[:num_episodes]
        ]
        left_out = len(context.trajectories) - num_episodes
        return build(
            dataclasses.replace(
                context,
                system_prompt=_middle_out(context.system_prompt, prompt_chars, config.style),
                trajectories=tuple(shown),
            ),
            config,
            0,
            0,
            f"[{left_out} episodes left out]" if left_out else "",
        )

    def most(limit: int, ask: Callable[[int], list[Message]]) -> list[Message] | None:
        """The question of the largest number up to `limit` that fits; None where not even 0's
        does.
        """
        low, high = -1, limit
        while low < high:
            middle = (low + high + 1) // 2
            fits = count_tokens(ask(middle)) <= config.max_context_tokens
            low, high = (middle, high) if fits else (low, middle - 1)
        return None if low < 0 else ask(low)

    total, prompt = len(context.trajectories), len(context.system_prompt)
    longest = max((len(t.final_observation) for t in context.trajectories), default=0)
    fitting = (
        most(longest, lambda chars: messages(total, chars, prompt))
        or most(prompt, lambda chars: messages(total, 0, chars))
        or most(total, lambda number: messages(number, 0, 0))
    )
    if fitting is None:
        check_budget(config, count_tokens)
    return fitting or build(_NOTHING, config, 0, 0)


def _middle_out(text: str, chars: int, style: str) -> str:
    """A text that is longer than so many characters without its middle, and a mark there.
    Word-level models, which read the compact style, get whole words.
    """
    if len(text) <= chars:
        return text
    mark = f" [{len(text)} characters, the middle left out] " if style != "compact" else " ... "
    kept = max(chars - len(mark), 0)
    head, tail = text[: (kept + 1) // 2], text[len(text) - kept // 2 :]
    if style == "compact":
        head, tail = head.rpartition(" ")[0], tail.partition(" ")[2]
    return f"{head}{mark}{tail}"


def parse_reply(text: str, *, truncated: bool = False) -> Reflection | ParseFailure:
    """Reads `ANALYSIS:` and the `IMPROVED PROMPT:` after it.

    Headings count at the start of a line, or alone on it without a colon; where a reply has none
    there, inside a line (word-level models write one line). Case, markdown, numbering and list
    marks are forgiven, and a code fence or quotes around the whole prompt are removed; a thinking
    block is not looked at. A second `IMPROVED PROMPT:` must say the same, or nothing.

    Returns:
      The two sections, or TRUNCATED, UNFINISHED_THOUGHT, NO_ANALYSIS, NO_PROMPT, EMPTY_PROMPT,
      SEVERAL_PROMPTS.
    """
    answer = after_thinking(text)
    if answer is None:
        return ParseFailure.UNFINISHED_THOUGHT
    if truncated:
        return ParseFailure.TRUNCATED
    begun = [found for where in _ANALYSIS if (found := where.search(answer))]
    if not begun:
        return ParseFailure.NO_ANALYSIS
    for analysis in begun:
        if prompts := _prompts(answer, analysis.end()):
            break
    else:
        return ParseFailure.NO_PROMPT
    ends = [prompt.start() for prompt in prompts[1:]] + [len(answer)]
    sections = (
        _unwrap(answer[prompt.end() : end]) for prompt, end in zip(prompts, ends, strict=True)
    )
    different = set(filter(None, sections))
    if not different:
        return ParseFailure.EMPTY_PROMPT
    if len(different) > 1:
        return ParseFailure.SEVERAL_PROMPTS
    return Reflection(
        analysis=_before(answer, analysis.end(), prompts[0].start()), system_prompt=different.pop()
    )


def compact_text(text: str) -> str:
    """Lower case, single spaces: the only form that word-level models read."""
    return " ".join(text.lower().split())


def _prompts(text: str, start: int) -> list[re.Match[str]]:
    """The headings of prompts behind a place, the strictest that there are. Inside a line the first
    one counts: the prompt of a word-level model may say the words again.
    """
    for where in (_PROMPT.at_line, _PROMPT.alone):
        if found := list(where.finditer(text, start)):
            return found
    inline = _PROMPT.inline.search(text, start)
    return [inline] if inline else []


def _before(text: str, start: int, end: int) -> str:
    """The text between two places, without the lines of nothing but marks at its end, which belong
    to the heading that follows.
    """
    while end > start:
        line = text.rfind("\n", start, end - 1) + 1
        if not line or text[line:end].strip(_MARKS):
            break
        end = line
    return text[start:end].strip()


def _unwrap(text: str) -> str:
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        language = _FENCE_LANGUAGE.match(text, 3)
        if language and language.end() <= len(text) - 3:
            text = text[language.end() : -3].strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def _shown(
    trajectory: Trajectory, head: int, tail: int
) -> tuple[Sequence[Turn], int, Sequence[Turn]]:
    """The first turns, how many are left out, the last turns."""
    turns = trajectory.turns
    if head + tail >= len(turns):
        return turns, 0, ()
    return turns[:head], len(turns) - head - tail, turns[len(turns) - tail :]


def _full(
    context: Context, config: ReflectorConfig, head: int, tail: int, note: str = ""
) -> list[Message]:
    blocks = [f"The instructions the agent played by:\n<<<\n{context.system_prompt}\n>>>"]
    for number, trajectory in enumerate(context.trajectories, 1):
        first, left_out, last = _shown(trajectory, head, tail)
        lines = [f"=== Episode {number} ===", f"Success: {'Yes' if trajectory.success else 'No'}"]
        lines += [_full_turn(turn, i, config) for i, turn in enumerate(first, 1)]
        if left_out:
            lines.append(f"[{left_out} steps left out]")
        lines += [
            _full_turn(turn, len(first) + left_out + i, config) for i, turn in enumerate(last, 1)
        ]
        if trajectory.turns:
            lines.append(f"Final observation: {trajectory.final_observation}")
        lines.append(f"Total reward: {sum(turn.reward for turn in trajectory.turns):g}")
        blocks.append("\n".join(lines))
    return [
        Message(role="system", content=SYSTEM_PROMPT),
        Message(role="user", content="\n\n".join([*blocks, *filter(None, [note]), REQUEST])),
    ]


def _full_turn(turn: Turn, number: int, config: ReflectorConfig) -> str:
    action = turn.action or f"(none: the reply could not be used, {turn.failure})"
    thought = f"\nThought: {turn.thought}" if config.show_thoughts and turn.thought else ""
    return f"Step {number}\nObservation: {turn.observation}{thought}\nAction: {action}"


def _short(
    context: Context, config: ReflectorConfig, head: int, tail: int, note: str = ""
) -> list[Message]:
    blocks = [f"Instructions: {context.system_prompt}"]
    for number, trajectory in enumerate(context.trajectories, 1):
        first, left_out, last = _shown(trajectory, head, tail)
        lines = [f"Episode {number}: {'won' if trajectory.success else 'lost'}."]
        lines += [_short_turn(turn, config) for turn in first]
        if left_out:
            lines.append(f"[{left_out} steps left out]")
        lines += [_short_turn(turn, config) for turn in last]
        if trajectory.turns:
            lines.append(f"End: {trajectory.final_observation}")
        blocks.append("\n".join(lines))
    return [
        Message(role="system", content=_SHORT_SYSTEM_PROMPT),
        Message(role="user", content="\n".join([*blocks, *filter(None, [note])])),
    ]


def _short_turn(turn: Turn, config: ReflectorConfig) -> str:
    thought = f"Thought: {turn.thought}\n" if config.show_thoughts and turn.thought else ""
    action = turn.action or f"none ({turn.failure})"
    return f"{turn.observation}\n{thought}Action: {action}"


def _compact(
    context: Context, config: ReflectorConfig, head: int, tail: int, note: str = ""
) -> list[Message]:
    parts = ["prompt :", context.system_prompt]
    for trajectory in context.trajectories:
        first, left_out, last = _shown(trajectory, head, tail)
        parts.append(f"episode : success {'yes' if trajectory.success else 'no'} .")
        parts += [_compact_turn(turn, config) for turn in first]
        if left_out:
            parts.append("...")
        parts += [_compact_turn(turn, config) for turn in last]
        parts.append(trajectory.final_observation)
    if note:
        parts.append("...")
    return [
        Message(role="system", content="reflect"),
        Message(role="user", content=compact_text(" ".join(parts))),
    ]


def _compact_turn(turn: Turn, config: ReflectorConfig) -> str:
    thought = f"thought : {turn.thought} " if config.show_thoughts and turn.thought else ""
    return f"{turn.observation} {thought}action : {turn.action or 'none'} ."


_BUILD = {"full": _full, "short": _short, "compact": _compact}
_NOTHING = Context(loop=0, meta_turn=0, family="", system_prompt="", trajectories=())
