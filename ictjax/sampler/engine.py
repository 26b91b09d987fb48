"""The host side of the sampler: conversations, slots and the queue. It decides which rows the next
dispatch works on, and launches it while the devices still work on the one before.
"""

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np
from jax.sharding import Mesh

from ictjax.config import SamplerConfig
from ictjax.models.attention_choice import platform_of
from ictjax.models.config import ModelConfig
from ictjax.models.transformer import Params
from ictjax.sampler.page_store import PageStore
from ictjax.sampler.programs import Pending, Programs
from ictjax.sampler.row_store import RowStore
from ictjax.sampler.state import (
    GOES_ON,
    pack_request,
    pack_row,
    unpack_guesses,
    unpack_likeliest,
    unpack_samples,
)

_MAX_BIAS = 1000  # divided by the smallest temperature still far from the largest float32
_PATIENCE_S = 0.001  # of one `step`, with a dispatch that somebody may still join the next of
_PAUSE_S = 0.0002  # between two looks at it
_CACHED_PARAMS = 4_000_000  # of a model that stays in the caches of a CPU
_MIN_FILL = 0.5  # share of a dispatch's rows, from which on it is launched before the last is read
_MIN_GOING_ON = 0.5  # share of replies that went on lately, from which on one goes on unread
# Dispatches of others, after which numbers count no more while a prompt is read in pieces: who
# waits is next.
_LATE = 4
_FORGOTTEN = 0.1  # of that share, with every reply


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """How to generate one reply. Token n of the reply draws its noise from fold_in(key, n)."""

    max_new_tokens: int
    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    stop_ids: tuple[int, ...]
    key: np.ndarray  # uint32[2], the words of a threefry key: `keys.as_array`
    min_p: float = 0.0  # share of the likeliest id's probability that an id has; 0: off
    # added to the logits of ids, before the temperature; -inf bans an id
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    logprobs_of: Literal["sampling", "model"] = "sampling"  # temperature: this one, or 1
    top_logprobs: int = 0  # likeliest ids to report beside every sampled one
    # Shown all ids sampled so far after every dispatch; where it returns a number, the reply ends
    # with so many of them, and what was sampled behind them is dropped. For ends that are found in
    # text: `ictjax.reply_text`. Must not raise.
    ends: Callable[[Sequence[int]], int | None] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: ask for at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}: give 0 (greedy) or a positive number"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: give 0 (off) or a positive number")
        if self.top_logprobs < 0:
            raise ValueError(
                f"top_logprobs is {self.top_logprobs}: give 0 (none) or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give a mass in (0, 1]; 1 is off")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: give a share in [0, 1]; 0 is off")
        for number, bias in self.bias.items():
            if not -_MAX_BIAS <= bias <= _MAX_BIAS and bias != -math.inf:
                raise ValueError(
                    f"bias of id {number} is {bias}: give -{_MAX_BIAS} to {_MAX_BIAS}, or -inf to"
                    " ban the id"
                )
        if self.key.shape != (2,) or self.key.dtype != np.uint32:
            raise ValueError(
                f"key has words of shape {self.key.shape} and type {self.key.dtype}: give the"
                " uint32[2] of keys.as_array"
            )


Tops = tuple[tuple[int, float], ...]
"""The likeliest ids in the place of a sampled one, the likeliest first, and their
log-probabilities."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished reply."""

    conversation: int
    ids: tuple[int, ...]  # as sampled, the stop id included
    # of ids under softmax(logits / temperature) (of the plain logits if greedy, or if the request
    # says so), before bias and truncation
    logprobs: tuple[float, ...]
    # "stop" (an id of stop_ids, which is then the last one, or `ends`), "length" (the request's
    # limit) or "context" (the conversation is full)
    finish: str
    # as logprobs; empty unless the request asks. Ids that are never sampled are left out
    top_logprobs: tuple[Tops, ...] = ()
    weights_step: int | None = None  # of the weights it was sampled with, see `Sampler.set_params`


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerStats:
    """Counts since the sampler was made, but for what is held now."""

    prefilled_tokens: int  # appended by open and extend, and computed
    reused_tokens: int  # appended by open and fork, and found in the cache
    decoded_tokens: int  # sampled
    proposed_tokens: int  # guessed (`SamplerConfig.guessed_tokens`)
    accepted_tokens: int  # of these, that were sampled
    padded_tokens: int  # computed positions that held no token of a conversation
    dispatches: int
    row_copies: int  # of slots, or of pages
    compile_count: int
    evictions: int  # pages that nobody used, and that were given to others
    suspensions: int  # conversations that had to give up their pages for a while
    held_tokens: int  # that open conversations have in the cache; over pages, shared ones once
    held_bytes: int  # of the slots or pages that these are in
    peak_bytes: int  # the most that was ever held


@dataclasses.dataclass(eq=False, slots=True)
class _Reply:
    """A reply under way."""

    request: Request
    columns: np.ndarray  # the request, packed
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    tops: list[Tops] = dataclasses.field(default_factory=list)
    dispatches: int = 0  # launched for it
    ahead: int = 0  # tokens that those of them that were not read yet may add, at most


@dataclasses.dataclass(eq=False, slots=True)
class _Conversation:
    id: int
    tokens: np.ndarray  # int32, capacity max_len
    length: int = 0
    # was given more than max_len tokens: those were refused, and it only ever answers "context"
    full: bool = False
    reply: _Reply | None = None
    ready_since: int = 0  # dispatch count when it last got something to do
    in_pieces: bool = False  # the last dispatch had no room for all of its tokens


class _Waiting(NamedTuple):
    """A conversation that waits for a slot."""

    conversation: _Conversation
    parent: int | None = None  # of a fork: the conversation that it was forked from
    shared: int = 0  # tokens shared with the parent


class _Seated(NamedTuple):
    """A conversation in its slot."""

    conversation: _Conversation
    slot: int


class _Row(NamedTuple):
    """What a conversation does in the next dispatch."""

    seat: _Seated
    start: int  # tokens in the cache; GOES_ON: known on the devices only, as is the one to append
    count: int  # tokens to append
    reply: _Reply | None  # to sample for
    allowed: int  # tokens it may sample
    steps: int  # tokens that it samples now, at most
    part: int  # how many dispatches the reply had before
    end: int  # positions that are filled afterwards, at most


class _Flight(NamedTuple):
    """A dispatch that was launched and not read yet."""

    samples: Pending
    rows: list[_Row]
    places: list[int]  # of the rows in the matrix
    length: int  # tokens appended


class Sampler:
    """Samples many conversations together; a context manager.

    A conversation takes a slot when one is free, first come, first served (a fork, whose
    prefix is being computed, holds up nobody but those it would leave no slot), and keeps it until
    closed, so only new tokens are ever computed. A slot is a row of the KV cache, or, with a
    `page_size`, a place among those that share its pages (`page_store.PageStore`). A new
    conversation starts from the longest prefix that the cache, live or left behind, already holds.

    Nothing blocks: calls only note what is wanted, `step` launches one dispatch of it, reads the
    one before, and returns the replies that finished there. Replies that have tokens left go on in
    the next dispatch before the host has seen the last: the devices know the last token of each,
    and leave out those that have ended. What is computed for one that only the host knows the end
    of (`Request.ends`, `close`) is thrown away. Tokens depend on weights, tokens and keys, not on
    slots or arrival order (up to rounding of float32 sums at other batch shapes).

    On a mesh every copy of the weights (axis data) works on slots of its own: their cache rows
    never leave its devices, its decode loop ends when its own rows are done, and only a forked row
    may travel. Within a copy the weights and kv heads stay split (tensor, fsdp).

    Args:
      config: the model.
      params: its weights, see `weights.sampling_weights`: in that function's form they are used
        where they are, else converted once.
      sampler_config: sizes.
      pad_id: an id to fill unused positions with; never seen by the model's attention.
      mesh: the devices to work on; None for the one that the weights are on.
      unused: ids that are never sampled, see `ChatTokenizer.unused`.
      weights_step: of the learner, which made the weights; see `set_params`.
      watch: told of every dispatch: when its launch began (of `time.perf_counter`), the
        conversations in it, and its result, which may still be computed and is only to be waited
        for.

    Raises:
      ValueError: sizes that do not fit the model or the mesh, or weights of another model.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        sampler_config: SamplerConfig,
        pad_id: int,
        *,
        mesh: Mesh | None = None,
        unused: Sequence[range] = (),
        weights_step: int | None = None,
        watch: Callable[[float, int, Pending], None] | None = None,
    ) -> None:
        if not 0 <= pad_id < config.vocab_size:
            raise ValueError(
                f"pad_id is {pad_id}: give an id of the vocabulary, 0 to {config.vocab_size - 1}"
            )
        if sum(len(part) for part in unused) >= config.vocab_size:
            raise ValueError(
                f"unused holds all {config.vocab_size} ids of the vocabulary: leave some to sample"
            )
        if sampler_config.max_top_logprobs > config.vocab_size:
            raise ValueError(
                f"max_top_logprobs is {sampler_config.max_top_logprobs}: give at most the"
                f" vocabulary's {config.vocab_size} ids"
            )
        if sampler_config.max_len > config.max_positions:
            raise ValueError(
                f"max_len {sampler_config.max_len} exceeds the model's max_positions"
                f" {config.max_positions}: lower it"
            )
        self._config = config
        self._sampler_config = sampler_config
        self._unused = unused
        self._programs = Programs(config, params, sampler_config, pad_id, mesh, unused)
        self._shards = self._programs.num_shards
        self._fixed_rows = _fixed_rows(config, platform_of(mesh))
        self._slots_per_shard = self._programs.slots_per_shard
        self._ids = itertools.count()
        self._conversations: dict[int, _Conversation] = {}
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._seats: list[_Seated | None] = [None] * sampler_config.num_slots  # by slot
        self._slots: dict[int, int] = {}  # of the conversations that have one
        # Longest free first; to begin with, the copies of the weights take turns.
        self._free = sorted(
            range(sampler_config.num_slots), key=lambda slot: slot % self._slots_per_shard
        )
        self._store: RowStore | PageStore = (
            PageStore(self._programs, sampler_config.page_size)
            if sampler_config.page_size
            else RowStore(self._programs, sampler_config.num_slots, sampler_config.max_len)
        )
        self._finished: list[Generation] = []
        self._flights: collections.deque[_Flight] = collections.deque()  # the oldest first
        # share of the last replies that were not over after so many dispatches, though they might
        # have had more tokens
        self._going_on = collections.defaultdict[int, float](lambda: 1.0)
        self._counts = collections.Counter[str]()
        self._peak_bytes = 0
        self._closed = False
        self._weights_step = weights_step
        self._watch = watch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Frees the cache and drops all conversations."""
        self._closed = True
        self._conversations.clear()
        self._queue.clear()
        self._finished.clear()
        self._flights.clear()
        self._seats = [None] * self._sampler_config.num_slots
        self._slots.clear()
        self._programs.close()

    def set_params(self, params: Params, step: int | None = None) -> None:
        """Replaces the weights, and with them everything cached.

        Args:
          params: the weights.
          step: of the learner, which made them. Every reply carries it, so that one of older
            weights is noticed.

        Raises:
          ValueError: conversations are open, or the tree is not that of the config.
        """
        if self._conversations:
            raise ValueError(
                f"{len(self._conversations)} conversations are open: close them before changing the"
                " weights under their caches"
            )
        while self._flights:  # of nobody: their weights make room for the new ones
            self._read()
        self._programs.load(params)
        self._weights_step = step  # last: a failure leaves the step of the weights that stay
        self._store.forget()

    def programs(self) -> list[Callable[[], object]]:
        """One call for every program that any sequence of calls can need, which compiles it."""
        return self._programs.programs()

    def warmup(self) -> None:
        """Compiles them all."""
        for compile_one in self.programs():
            compile_one()

    @property
    def stats(self) -> SamplerStats:
        """What was done so far."""
        counts = self._counts + self._store.counts
        held_tokens, held_bytes = (0, 0) if self._closed else self._store.held
        return SamplerStats(
            prefilled_tokens=counts["prefilled_tokens"],
            reused_tokens=counts["reused_tokens"],
            decoded_tokens=counts["decoded_tokens"],
            proposed_tokens=counts["proposed_tokens"],
            accepted_tokens=counts["accepted_tokens"],
            padded_tokens=counts["padded_tokens"],
            dispatches=counts["dispatches"],
            row_copies=counts["row_copies"],
            compile_count=self._programs.compile_count,
            evictions=counts["evictions"],
            suspensions=counts["suspensions"],
            held_tokens=held_tokens,
            held_bytes=held_bytes,
            peak_bytes=self._peak_bytes,
        )

    @property
    def idle(self) -> bool:
        """True when `step` has nothing to do until the caller asks for something (or closes a
        conversation that others wait for).
        """
        waiting = bool(self._free) and any(self._is_open(queued) for queued in self._queue)
        return (
            not self._finished
            and not waiting
            and not any(seat is not None and self._unfed(seat) > 0 for seat in self._seats)
            and not any(self._is_open(row.seat) for flight in self._flights for row in flight.rows)
        )

    def open(self, ids: Sequence[int]) -> int:
        """Starts a conversation with these tokens; returns its number. Raises ValueError for no ids
        or ids outside the vocabulary.
        """
        conversation = self._new()
        self._append(conversation, ids)
        if not conversation.full and not conversation.length:
            del self._conversations[conversation.id]
            raise ValueError(
                "open was given no ids: a conversation needs at least one token to sample from"
            )
        return self._enqueue(_Waiting(conversation))

    def extend(self, conversation: int, ids: Sequence[int]) -> None:
        """Appends tokens. Beyond max_len they are refused, and every later `generate` finishes at
        once with "context".
        """
        self._append(self._settled(conversation, "extend"), ids)

    def generate(self, conversation: int, request: Request) -> None:
        """Asks for a reply; `step` returns it when it is finished, and it is then part of the
        conversation.
        """
        found = self._settled(conversation, "generate")
        sizes = self._sampler_config
        if request.top_k > sizes.max_top_k:
            raise ValueError(
                f"top_k {request.top_k} exceeds the sampler's max_top_k {sizes.max_top_k}: raise"
                " max_top_k"
            )
        if request.top_logprobs > sizes.max_top_logprobs:
            raise ValueError(
                f"top_logprobs {request.top_logprobs} exceeds the sampler's max_top_logprobs"
                f" {sizes.max_top_logprobs}: raise max_top_logprobs"
            )
        if len(request.stop_ids) > sizes.max_stop_ids:
            raise ValueError(
                f"{len(request.stop_ids)} stop ids exceed the sampler's max_stop_ids"
                f" {sizes.max_stop_ids}: raise max_stop_ids"
            )
        self._check_bias(request.bias)
        if found.full or found.length >= sizes.max_len:
            self._finished.append(
                Generation(
                    conversation=conversation,
                    ids=(),
                    logprobs=(),
                    finish="context",
                    weights_step=self._weights_step,
                )
            )
            return
        columns = pack_request(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            unit=request.logprobs_of == "model",
            stop_ids=request.stop_ids,
            bias=request.bias,
            key=request.key,
            num_stop_ids=sizes.max_stop_ids,
            num_bias=sizes.max_bias_ids,
            reported=request.top_logprobs,
        )
        found.reply = _Reply(request=request, columns=columns)
        found.ready_since = self._counts["dispatches"]

    def sampled(self, conversation: int) -> tuple[int, ...]:
        """The ids of a reply under way, as far as they are sampled, for whoever shows it as it
        grows; empty where none is under way.
        """
        reply = self._find(conversation).reply
        return () if reply is None else tuple(reply.ids)

    def sampled_logprobs(self, conversation: int) -> tuple[float, ...]:
        """The log-probabilities of `sampled`."""
        reply = self._find(conversation).reply
        return () if reply is None else tuple(reply.logprobs)

    def sampled_top_logprobs(self, conversation: int) -> tuple[Tops, ...]:
        """What is reported beside `sampled`; empty unless the request asks for it."""
        reply = self._find(conversation).reply
        return () if reply is None else tuple(reply.tops)

    @property
    def num_open(self) -> int:
        """Conversations that are open."""
        return len(self._conversations)

    def fork(self, conversation: int) -> int:
        """Starts a conversation with the same tokens so far, which copies their cache row once it
        gets a slot; returns its number.
        """
        parent = self._settled(conversation, "fork")
        child = self._new()
        child.tokens[: parent.length] = parent.tokens[: parent.length]
        child.length, child.full = parent.length, parent.full
        return self._enqueue(_Waiting(child, parent=parent.id, shared=parent.length))

    def close(self, conversation: int) -> None:
        """Ends a conversation (a reply under way is dropped) and gives its slot to the next in the
        queue.
        """
        self._find(conversation)
        del self._conversations[conversation]
        if conversation in self._slots:
            slot = self._slots.pop(conversation)
            self._store.release(slot)
            self._seats[slot] = None
            self._free.append(slot)
        self._finished = [
            generation for generation in self._finished if generation.conversation != conversation
        ]

    def step(self) -> list[Generation]:
        """Gives free slots to the queue, launches the next dispatch, reads the one before it, and
        returns the replies that finished there, if any.

        A dispatch that has room for more rows is not launched while another one runs and there are
        conversations that nothing was asked of: they may be next. `step` then returns in
        milliseconds, so that whoever calls can find out. One that is mostly empty is not launched
        before that other one is read, for the same reason.
        """
        self._check_open()
        self._assign_slots()
        working = {
            seat.slot: seat.conversation.length + _ahead(seat)
            for seat in self._seats
            if seat is not None and (self._unfed(seat) > 0 or _ahead(seat))
        }
        groups = self._together(self._groups(self._store.admit(working)))
        if self._flights and self._may_grow(groups):
            if not _is_over(self._flights[0]):
                return self._take_finished()
            if groups and self._filled(groups[0][0]) < _MIN_FILL:
                groups = []
        launched = False
        for group, length in groups:
            riders = self._riders(group, groups, length) if length > 1 else []
            rows = self._with_room([self._row(seat, length) for seat in (*group, *riders)], working)
            if any(row.seat in group for row in rows):
                self._launch(rows, length)
                launched = True
                break
        # guesses come from tokens that the host has read
        guesses = self._sampler_config.guessed_tokens > 0
        ahead = 1 if guesses else self._sampler_config.max_in_flight
        if self._flights and not (launched and len(self._flights) < ahead):
            self._read()
        return self._take_finished()

    def run(self) -> list[Generation]:
        """Steps until idle; all replies in the order in which they finished."""
        finished = []
        while not self.idle:
            finished += self.step()
        return finished

    def _take_finished(self) -> list[Generation]:
        finished, self._finished = self._finished, []
        return finished

    def _may_grow(self, groups: Sequence[tuple[list[_Seated], int]]) -> bool:
        """Whether the next dispatch has room, and somebody may still want to join it."""
        full = bool(groups) and self._filled(groups[0][0]) == 1
        return not full and any(
            seat is not None and not self._unfed(seat) and not _ahead(seat) for seat in self._seats
        )

    def _filled(self, group: Sequence[_Seated]) -> float:
        """The share of a dispatch's rows that it would have."""
        return len(group) / self._num_rows(group)

    def _num_rows(self, group: Iterable[_Seated]) -> int:
        """Rows of the dispatch that gets through a group soonest. A large one that would be mostly
        empty may cost more than small ones for parts of the group.
        """
        counts = collections.Counter(seat.slot // self._slots_per_shard for seat in group)
        wanted = self._shards * max(counts.values())
        return max(
            self._sampler_config.row_buckets,
            key=lambda rows: (min(rows, wanted) / (rows + self._fixed_rows), -rows),
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the sampler is closed: make another")

    def _find(self, conversation: int) -> _Conversation:
        self._check_open()
        if conversation not in self._conversations:
            raise ValueError(
                f"conversation {conversation} is not open: it was closed, or never opened"
            )
        return self._conversations[conversation]

    def _check_bias(self, bias: Mapping[int, float]) -> None:
        most, num_ids = self._sampler_config.max_bias_ids, self._config.vocab_size
        if len(bias) > most:
            raise ValueError(
                f"{len(bias)} biased ids exceed the sampler's max_bias_ids {most}: raise"
                " max_bias_ids"
            )
        if outside := [number for number in bias if not 0 <= number < num_ids]:
            raise ValueError(
                f"bias names the id {outside[0]}, the vocabulary reaches from 0 to {num_ids - 1}"
            )
        banned = {number for number, value in bias.items() if value == -math.inf}
        banned |= {number for part in self._unused for number in part} if banned else set()
        if len(banned) >= num_ids:
            raise ValueError(
                f"bias bans all ids of the vocabulary that have a text: leave some of the {num_ids}"
                " to sample"
            )

    def _is_open(self, waiting: _Waiting | _Seated) -> bool:
        return waiting.conversation.id in self._conversations

    def _settled(self, conversation: int, call: str) -> _Conversation:
        found = self._find(conversation)
        if found.reply is not None:
            raise ValueError(
                f"conversation {conversation} is still generating: step until its reply is there,"
                f" then {call}"
            )
        return found

    def _new(self) -> _Conversation:
        self._check_open()
        conversation = _Conversation(
            id=next(self._ids), tokens=np.empty(self._sampler_config.max_len, np.int32)
        )
        self._conversations[conversation.id] = conversation
        return conversation

    def _enqueue(self, waiting: _Waiting) -> int:
        if not waiting.conversation.full:  # a full one never needs a slot
            self._queue.append(waiting)
        return waiting.conversation.id

    def _append(self, conversation: _Conversation, ids: Sequence[int]) -> None:
        tokens = np.asarray(ids, np.int32)
        if tokens.ndim != 1:
            raise ValueError(f"ids have shape {tokens.shape}: give one flat sequence")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self._config.vocab_size):
            raise ValueError(
                f"ids reach from {tokens.min()} to {tokens.max()}, the vocabulary from 0 to"
                f" {self._config.vocab_size - 1}"
            )
        end = conversation.length + tokens.size
        if conversation.full or end > self._sampler_config.max_len:
            conversation.full = True
            return
        conversation.tokens[conversation.length : end] = tokens
        conversation.length = end
        conversation.ready_since = self._counts["dispatches"]

    def _unfed(self, seat: _Seated) -> int:
        """Tokens that the next dispatches should compute. Without a request the last one waits: a
        reply starts from its hidden state.
        """
        conversation = seat.conversation
        return conversation.length - self._store.cached(seat.slot) - (conversation.reply is None)

    def _assign_slots(self) -> None:
        forks = 0  # in front of the queue, whose prefix is being computed: slots are left for them
        while forks < min(len(self._queue), len(self._free)):
            waiting = self._queue[forks]
            if not self._is_open(waiting):
                del self._queue[forks]
                continue
            if waiting.parent in self._conversations:
                slot = self._slots.get(waiting.parent)
                if slot is None or self._store.cached(slot) < waiting.shared - 1:
                    forks += 1
                    continue
            self._take_slot(waiting.conversation)
            del self._queue[forks]  # last: where the copy of its prefix fails, it waits on

    def _take_slot(self, conversation: _Conversation) -> None:
        slot = self._store.place(self._free, conversation.tokens, conversation.length)
        self._free.remove(slot)
        self._seats[slot] = _Seated(conversation, slot)
        self._slots[conversation.id] = slot
        conversation.ready_since = self._counts["dispatches"]

    def _groups(self, slots: Iterable[int]) -> list[tuple[list[_Seated], int]]:
        """What the next dispatch can be: rows, and their token bucket (1: only continue
        generations); first the group with most rows and longest waits. While a prompt is read in
        pieces, one in which somebody waits for too long is before that: so the pieces of one and
        the replies of many take turns. Turns of games, which fit in a dispatch, come in full ones:
        a late game or two would cost as much as all.
        """
        now = self._counts["dispatches"]
        buckets = self._sampler_config.extend_buckets
        groups: dict[int, list[_Seated]] = collections.defaultdict(list)
        in_pieces = False
        for slot in slots:
            seat = self._seats[slot]
            assert seat is not None
            unfed = self._unfed(seat)
            in_pieces |= seat.conversation.in_pieces or unfed > buckets[-1]
            if _ahead(seat):
                if self._goes_on(seat.conversation):
                    groups[1].append(seat)
            else:
                continues = unfed == 1 and seat.conversation.reply is not None
                groups[1 if continues else _bucket(buckets, unfed)].append(seat)

        def precedence(item: tuple[int, list[_Seated]]) -> tuple[int, int, int]:
            length, group = item
            waits = [now - seat.conversation.ready_since for seat in group]
            late = max(waits) if in_pieces and max(waits) >= _LATE else 0
            return -late, -sum(waits) - len(waits), -length  # others may ride with a longer one

        return [
            (self._chosen(group), length)
            for length, group in sorted(groups.items(), key=precedence)
        ]

    def _riders(
        self, group: list[_Seated], groups: Sequence[tuple[list[_Seated], int]], length: int
    ) -> list[_Seated]:
        """Who needs fewer tokens than are appended, in rows which a dispatch would leave empty:
        they are computed anyway.
        """
        counts = collections.Counter(seat.slot // self._slots_per_shard for seat in group)
        places = self._num_rows(group)
        room = collections.Counter(
            {shard: places // self._shards - counts[shard] for shard in range(self._shards)}
        )
        longest = max(seat.conversation.length + _ahead(seat) for seat in group)
        shorter = [seat for seats, bucket in groups if bucket < length for seat in seats]
        return [
            seat
            for seat in self._fitting(shorter, room)
            # a longer one would make the others attend to more
            if seat.conversation.length + _ahead(seat) <= longest
        ]

    def _together(self, groups: list[tuple[list[_Seated], int]]) -> list[tuple[list[_Seated], int]]:
        """The same in another order: if all of the first group append tokens and fit in empty rows
        of a longer one, that one is first.
        """
        for at, (group, length) in enumerate(groups):
            first, shorter = groups[0]
            if 1 < shorter < length and set(first) <= set(self._riders(group, groups, length)):
                return [groups[at], *groups[:at], *groups[at + 1 :]]
        return groups

    def _chosen(self, group: list[_Seated]) -> list[_Seated]:
        """Those of a group that a dispatch has rows for."""
        group.sort(key=lambda seat: seat.conversation.ready_since)
        most = self._num_rows(group) // self._shards
        return self._fitting(group, collections.Counter(dict.fromkeys(range(self._shards), most)))

    def _fitting(self, group: list[_Seated], room: collections.Counter[int]) -> list[_Seated]:
        """The first ones that fit in the rows of their copies of the weights."""
        chosen = []
        for seat in group:
            shard = seat.slot // self._slots_per_shard
            if room[shard]:
                room[shard] -= 1
                chosen.append(seat)
        return chosen

    def _left(self, conversation: _Conversation) -> int:
        """Tokens that its reply may have beyond those that are sampled or being sampled."""
        reply = conversation.reply
        if reply is None:
            return 0
        return (
            min(
                reply.request.max_new_tokens - len(reply.ids),
                self._sampler_config.max_len - conversation.length,
            )
            - reply.ahead
        )

    def _goes_on(self, conversation: _Conversation) -> bool:
        """Whether a reply that is being sampled will want more tokens, as far as one can know."""
        reply = conversation.reply
        return (
            reply is not None
            and self._left(conversation) > 0
            and self._going_on[reply.dispatches] >= _MIN_GOING_ON
        )

    def _row(self, seat: _Seated, length: int) -> _Row:
        sizes, conversation = self._sampler_config, seat.conversation
        if ahead := _ahead(seat):
            start, count, filled = GOES_ON, 1, conversation.length + ahead
        else:
            start = self._store.cached(seat.slot)
            count = min(self._unfed(seat), length)
            filled = start + count
        # a reply starts only once all tokens before it are computed
        reply = conversation.reply if filled >= conversation.length else None
        allowed = steps = part = 0
        if reply is not None:
            allowed, part = self._left(conversation), reply.dispatches
            most = sizes.most_sampled(length, greedy=reply.request.temperature == 0)
            steps = min(allowed, most)
        return _Row(seat, start, count, reply, allowed, steps, part, filled + max(steps - 1, 0))

    def _with_room(self, rows: list[_Row], working: dict[int, int]) -> list[_Row]:
        """Those of the rows that the cache has room for."""
        busy = {slot for slot in working if (seat := self._seats[slot]) and _ahead(seat)}
        ready = set(self._store.reserve({row.seat.slot: row.end for row in rows}, working, busy))
        return [row for row in rows if row.seat.slot in ready]

    def _launch(self, group: list[_Row], length: int) -> None:
        sizes, per_shard = self._sampler_config, self._slots_per_shard
        counts = collections.Counter(row.seat.slot // per_shard for row in group)
        num_rows = _bucket(sizes.row_buckets, self._shards * max(counts.values()))
        shard_rows = num_rows // self._shards
        next_row = [itertools.count(shard * shard_rows) for shard in range(self._shards)]
        attended = _bucket(sizes.attended, max(length, *(row.end for row in group)))
        packed = self._programs.blank(num_rows, length, attended)
        num_history = attended if sizes.guesses(length) else 0
        places = []
        for row in group:
            conversation, slot = row.seat
            place = slot if num_rows == sizes.num_slots else next(next_row[slot // per_shard])
            first = max(row.start, 0)  # of one that goes on, the devices know the token
            pack_row(
                packed[place],
                slot=slot % per_shard,
                start=row.start,
                tokens=conversation.tokens[first : first + row.count],
                allowed=row.allowed,
                count=0 if row.reply is None else len(row.reply.ids),
                request=None if row.reply is None else row.reply.columns,
                num_stop_ids=sizes.max_stop_ids,
                num_bias=sizes.max_bias_ids,
                num_tokens=length,
                pages=self._store.pages(slot),
                history=conversation.tokens[: min(row.start + row.count, num_history)],
                num_history=num_history,
            )
            places.append(place)
        start = time.perf_counter()
        samples = self._programs.turn(packed, length, attended)
        if self._watch is not None:
            self._watch(start, len(group), samples)
        self._flights.append(_Flight(samples, group, places, length))
        self._counts["dispatches"] += 1
        for row in group:
            row.seat.conversation.ready_since = self._counts["dispatches"]
            row.seat.conversation.in_pieces = row.count < self._unfed(row.seat)
            if row.reply is not None:
                row.reply.dispatches += 1
                row.reply.ahead += row.steps
            if row.start != GOES_ON:  # whatever follows on the devices finds them there
                self._store.write(row.seat.slot, row.start + row.count)
        self._peak_bytes = max(self._peak_bytes, self._store.held[1])

    def _read(self) -> None:
        """Waits for the oldest dispatch, and books what it sampled."""
        flight = self._flights[0]
        samples, guessed = np.asarray(flight.samples), None
        self._flights.popleft()
        length, extended = flight.length, flight.length > 1
        if self._sampler_config.guesses(length):
            guessed, samples = unpack_guesses(samples)
        likeliest = None
        if number := self._sampler_config.max_top_logprobs:
            *likeliest, samples = unpack_likeliest(samples, number)
        ids, logprobs, sampled = unpack_samples(samples)
        shard_rows = len(sampled) // self._shards
        steps_per_shard = sampled.reshape(self._shards, shard_rows).max(axis=1)
        if extended:
            steps_per_shard = length + np.maximum(steps_per_shard - 1, 0)
        if guessed is not None:
            steps_per_shard = guessed.computed[::shard_rows]
            self._counts["proposed_tokens"] += int(guessed.proposed.sum())
            self._counts["accepted_tokens"] += int(guessed.accepted.sum())
        self._counts["padded_tokens"] += shard_rows * int(steps_per_shard.sum())
        for row, place in zip(flight.rows, flight.places, strict=True):
            count = int(sampled[place])
            # what goes on after its end appends nothing
            appended = row.count if row.start != GOES_ON or count else 0
            self._counts["padded_tokens"] -= appended + max(count - 1, 0)
            rides = row.reply is not None and row.count == 1
            self._counts["prefilled_tokens"] += appended if extended and not rides else 0
            self._counts["decoded_tokens"] += count
            if row.reply is None:
                continue
            row.reply.ahead -= row.steps
            conversation = row.seat.conversation
            if conversation.reply is row.reply and self._is_open(row.seat):
                if likeliest and (most := row.reply.request.top_logprobs):
                    row.reply.tops += _tops(*(x[place, :count, :most] for x in likeliest))
                self._advance(row, ids[place, :count].tolist(), logprobs[place, :count].tolist())
                if row.allowed > row.steps:
                    share = self._going_on[row.part + 1]
                    share += _FORGOTTEN * ((conversation.reply is not None) - share)
                    self._going_on[row.part + 1] = share

    def _advance(self, row: _Row, ids: list[int], logprobs: list[float]) -> None:
        """Books what was sampled for a reply: all of it but the last id is now in the cache."""
        conversation, slot = row.seat
        reply = conversation.reply
        assert reply is not None and ids
        conversation.ready_since = self._counts["dispatches"]
        start, conversation.length = conversation.length, conversation.length + len(ids)
        conversation.tokens[start : conversation.length] = ids
        reply.ids += ids
        reply.logprobs += logprobs
        kept = None if reply.request.ends is None else reply.request.ends(reply.ids)
        if kept is not None:
            conversation.length -= len(reply.ids) - kept
            del reply.ids[kept:], reply.logprobs[kept:], reply.tops[kept:]
        # the last token of a conversation waits: the next reply starts from its hidden state
        cached = conversation.length - 1
        if cached < self._store.cached(slot):
            self._store.shorten(slot, cached)
        else:
            self._store.write(slot, cached)
        if kept is not None or ids[-1] in reply.request.stop_ids:
            finish = "stop"
        elif len(reply.ids) == reply.request.max_new_tokens:
            finish = "length"
        elif conversation.length == self._sampler_config.max_len:
            finish = "context"
        else:
            return
        self._finished.append(
            Generation(
                conversation=conversation.id,
                ids=tuple(reply.ids),
                logprobs=tuple(reply.logprobs),
                finish=finish,
                top_logprobs=tuple(reply.tops),
                weights_step=self._weights_step,
            )
        )
        conversation.reply = None


def _tops(ids: np.ndarray, logprobs: np.ndarray) -> list[Tops]:
    """Of the tokens of a row, [N, X] each."""
    return [
        tuple((number, logprob) for number, logprob in pairs if logprob > -math.inf)
        for pairs in (
            zip(*one, strict=True) for one in zip(ids.tolist(), logprobs.tolist(), strict=True)
        )
    ]


def _fixed_rows(config: ModelConfig, platform: str) -> int:
    """What a dispatch costs besides its rows, in rows.

    On two CPU cores 32 rows of the pocket model take 3.3 to 4.5 times as long as 8, those of 8
    layers x 512, whose weights come from memory, 2.2 times. An accelerator reads its weights for
    any number of rows.
    """
    if platform != "cpu":
        return 1 << 20
    return 2 if config.num_params <= _CACHED_PARAMS else 12


def _is_over(flight: _Flight) -> bool:
    """Whether its samples can be read; waits for that for a moment."""
    until = time.monotonic() + _PATIENCE_S
    while not flight.samples.is_ready():
        if time.monotonic() >= until:
            return False
        time.sleep(_PAUSE_S)
    return True


def _ahead(seat: _Seated) -> int:
    """See `_Reply.ahead`."""
    reply = seat.conversation.reply
    return 0 if reply is None else reply.ahead


def _bucket(sizes: Iterable[int], wanted: int) -> int:
    """The smallest size that holds `wanted`, or the largest."""
    largest = 0
    for largest in sizes:
        if largest >= wanted:
            break
    return largest
