"""A model in a sampler as a speaker: messages become tokens turn by turn, prefixes are shared."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from ictjax import keys
from ictjax.chat import ChatTokenizer
from ictjax.models.transformer import Params
from ictjax.records import Message
from ictjax.reply_text import ReplyText
from ictjax.sampler import Generation, Request, SamplerStats
from ictjax.speaker import Finish, Limits, Reply


class TokenSampler(Protocol):
    """What is used of `ictjax.sampler.Sampler`."""

    def open(self, ids: Sequence[int]) -> int: ...
    def extend(self, conversation: int, ids: Sequence[int]) -> None: ...
    def generate(self, conversation: int, request: Request) -> None: ...
    def fork(self, conversation: int) -> int: ...
    def close(self, conversation: int) -> None: ...
    def step(self) -> list[Generation]: ...
    def sampled(self, conversation: int) -> tuple[int, ...]: ...
    def set_params(self, params: Params, step: int | None = None) -> None: ...
    def programs(self) -> list[Callable[[], object]]: ...
    @property
    def idle(self) -> bool: ...
    @property
    def stats(self) -> SamplerStats: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@dataclasses.dataclass(eq=False, slots=True)
class _Conversation:
    messages: list[Message]  # heard, and not in the sampler yet
    number: int | None = None  # of the sampler's conversation, once it has one
    ids: tuple[int, ...] = ()  # of all that is in the sampler
    stopped: bool = False  # the last reply ended with a stop token
    opening: str | None = None  # the system prompt, until the conversation is closed
    request: Request | None = None  # asked for, and not in the sampler yet
    text: ReplyText | None = None  # of the reply under way, where a text may end it
    answered: bool = False  # nothing was heard since the last reply, or at all


@dataclasses.dataclass(eq=False, slots=True)
class _Opening:
    """Conversations that begin with the same system prompt."""

    members: int = 0
    led: bool = False  # one of them was started by itself
    leader: int | None = None  # it has no reply yet
    followers: list[int] = dataclasses.field(default_factory=list)


class ModelSpeaker:
    """Implements `ictjax.speaker.Speaker`; owns the sampler, which it closes.

    Every message is encoded once, when the reply to it is asked for, and every sampled token stays
    as it was sampled, thoughts included; of a reply that ends with one of `Limits.stop`, what
    `ictjax.reply_text` keeps. The text of a reply begins with the `<think>` that the
    chat template wrote before it, where it does. A new conversation starts from the longest prefix
    that the sampler holds, and with `share_min_tokens` those that begin with the same system prompt
    are made to find one: the first is started alone, and the others wait for its first reply.

    Args:
      sampler: of the model's weights.
      chat: the model's tokenizer and template.
      share_min_tokens: from this length on (of the messages before the first reply) conversations
        wait for the first one with their system prompt; None: none waits. It pays where replies are
        short and many conversations share a long prompt.
      folder: where the model, or the adapter on it, says how it is spoken to (`ictjax.manners`);
        empty where nothing does.
    """

    def __init__(
        self,
        sampler: TokenSampler,
        chat: ChatTokenizer,
        *,
        share_min_tokens: int | None = None,
        folder: str = "",
    ):
        self._sampler, self.chat, self._share_min_tokens = sampler, chat, share_min_tokens
        self.folder = folder
        self._next = 0
        self._conversations: dict[int, _Conversation] = {}
        self._by_number: dict[int, int] = {}  # the sampler's number -> ours
        self._openings: dict[str, _Opening] = {}

    def __enter__(self) -> Self:
        self._sampler.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Frees the sampler and drops all conversations."""
        self._conversations.clear()
        self._by_number.clear()
        self._openings.clear()
        self._sampler.__exit__(kind, error, trace)

    def set_params(self, params: Params, step: int | None = None) -> None:
        """Replaces the weights, of a step of the learner (`ictjax.sampler.Sampler.set_params`).

        Raises:
          ValueError: conversations are open, or the tree is not that of the model.
        """
        self._sampler.set_params(params, step)

    def programs(self) -> list[Callable[[], object]]:
        """One call for every program that conversations can need, which compiles it."""
        return self._sampler.programs()

    def open(self, messages: Sequence[Message]) -> int:
        number, self._next = self._next, self._next + 1
        prompt = messages[0].content if messages and messages[0].role == "system" else None
        self._conversations[number] = _Conversation(
            messages=list(messages), opening=prompt, answered=not messages
        )
        if prompt is not None:
            self._openings.setdefault(prompt, _Opening()).members += 1
        return number

    def hear(self, conversation: int, message: Message, actions: Sequence[str] = ()) -> None:
        """Adds a message; the model knows of actions what the message says.

        Raises:
          ValueError: a reply is under way; or a second message follows a reply, or one follows a
            question that was forked: templates are extended by one message after each reply.
        """
        found = self._settled(conversation)
        if found.number is not None and not found.answered:
            raise ValueError(
                f"Conversation {conversation} hears one message after each reply: ask before it"
                " hears another."
            )
        found.messages.append(message)
        found.answered = False

    def ask(self, conversation: int, limits: Limits, key: keys.Key) -> None:
        """Asks for a reply.

        Raises:
          ValueError: a reply is under way, or nothing was heard since the last one.
        """
        found = self._settled(conversation)
        if found.answered:
            raise ValueError(
                f"Conversation {conversation} has nothing to answer: let it hear a message first."
            )
        found.text = ReplyText(self.chat.decode, limits.stop) if limits.stop else None
        found.request = Request(
            max_new_tokens=limits.max_tokens,
            temperature=limits.temperature,
            top_k=limits.top_k,
            top_p=limits.top_p,
            stop_ids=self.chat.stop_ids,
            key=keys.as_array(key),
            min_p=limits.min_p,
            ends=None if found.text is None else found.text.read,
        )
        if found.number is None and not self._may_start(conversation, found):
            return
        self._start(conversation, found)

    def step(self) -> list[Reply]:
        """One dispatch of the sampler."""
        return [self._reply(generation) for generation in self._sampler.step()]

    def fork(self, conversation: int) -> int:
        """Starts a conversation with the same messages so far; they are computed once."""
        parent = self._settled(conversation)
        self._flush(conversation, parent)
        number = self.open(())
        child = self._conversations[number]
        assert parent.number is not None  # flushed
        child.number, child.ids = self._sampler.fork(parent.number), parent.ids
        child.stopped, child.answered = parent.stopped, parent.answered
        self._by_number[child.number] = number
        return number

    def close(self, conversation: int) -> None:
        found = self._open_one(conversation)
        del self._conversations[conversation]
        if found.number is not None:
            del self._by_number[found.number]
            self._sampler.close(found.number)
        if found.opening is not None:
            self._leave(conversation, found.opening)

    def sampled(self, conversation: int) -> str:
        """The text of a reply under way, as far as it is sampled and certain."""
        found = self._open_one(conversation)
        if found.number is None:
            return ""
        if found.text is not None and found.request is not None:
            return found.text.shown
        return self.chat.decode(self._sampler.sampled(found.number))

    @property
    def idle(self) -> bool:
        return self._sampler.idle

    def repeats(self, limits: Limits) -> bool:
        """Greedy replies repeat themselves."""
        return limits.temperature == 0

    def num_tokens(self, said: Sequence[Message] | str) -> int:
        """Exact: by the tokenizer, and for messages by the chat template too."""
        return self.chat.count(said) if isinstance(said, str) else len(self.chat.encode_start(said))

    @property
    def stats(self) -> Mapping[str, int | float]:
        """Those of the sampler (`ictjax.sampler.SamplerStats`); of guesses where some were made."""
        counts = dataclasses.asdict(self._sampler.stats)
        unused = () if counts["proposed_tokens"] else ("proposed_tokens", "accepted_tokens")
        return {name: count for name, count in counts.items() if name not in unused}

    def _open_one(self, conversation: int) -> _Conversation:
        if conversation not in self._conversations:
            raise ValueError(
                f"Conversation {conversation} is not open: it was closed, or never opened."
            )
        return self._conversations[conversation]

    def _settled(self, conversation: int) -> _Conversation:
        found = self._open_one(conversation)
        if found.request is not None:
            raise ValueError(
                f"Conversation {conversation} waits for a reply: step until it is there."
            )
        return found

    def _may_start(self, conversation: int, found: _Conversation) -> bool:
        """Whether a conversation starts now; else it waits for the first reply under its prompt."""
        if found.opening is None or self._share_min_tokens is None:
            return True
        opening = self._openings[found.opening]
        if opening.leader is not None:
            opening.followers.append(conversation)
            return False
        if not opening.led and opening.members > 1:
            found.ids = self.chat.encode_start(found.messages)
            if len(found.ids) >= self._share_min_tokens:
                opening.led, opening.leader = True, conversation
        return True

    def _start(self, conversation: int, found: _Conversation) -> None:
        self._flush(conversation, found)
        assert found.number is not None and found.request is not None
        self._sampler.generate(found.number, found.request)

    def _flush(self, conversation: int, found: _Conversation) -> None:
        """Gives the sampler what was heard."""
        if found.number is None:
            found.ids = found.ids or self.chat.encode_start(found.messages)
            found.number = self._sampler.open(found.ids)
            self._by_number[found.number] = conversation
        elif found.messages:
            (message,) = found.messages
            ids = self.chat.encode_turn(message, stopped=found.stopped)
            self._sampler.extend(found.number, ids)
            found.ids += ids
        found.messages.clear()

    def _reply(self, generation: Generation) -> Reply:
        conversation = self._by_number[generation.conversation]
        found = self._conversations[conversation]
        prompt_ids, found.ids = found.ids, found.ids + generation.ids
        found.stopped = bool(generation.ids) and generation.ids[-1] in self.chat.stop_ids
        found.request, found.answered = None, True
        text = self.chat.decode(generation.ids)
        cut = found.text is not None and found.text.stopped
        if found.text is not None and cut:
            text = found.text.text
        if found.opening is not None:
            self._release(self._openings[found.opening], conversation)
        return Reply(
            conversation=conversation,
            text=self.chat.opened * (bool(generation.ids) or cut) + text,
            finish=Finish(generation.finish),
            prompt_ids=prompt_ids,
            ids=generation.ids,
            logprobs=generation.logprobs,
            weights_step=generation.weights_step,
        )

    def _release(self, opening: _Opening, conversation: int) -> None:
        """Starts those who waited for this conversation."""
        if opening.leader != conversation:
            return
        opening.leader = None
        followers, opening.followers = opening.followers, []
        for follower in followers:
            if follower in self._conversations:
                self._start(follower, self._conversations[follower])

    def _leave(self, conversation: int, prompt: str) -> None:
        opening = self._openings[prompt]
        opening.members -= 1
        self._release(opening, conversation)
        if not opening.members:
            del self._openings[prompt]
