"""The host side of the sampler: conversations, slots and the queue. It decides which rows the next
dispatch works on.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ictjax.config import SamplerConfig
from ictjax.mesh import cache_sharding, kv_copies
from ictjax.models.cache import copy_row, copy_row_across, make_cache
from ictjax.models.config import ModelConfig
from ictjax.models.transformer import Params
from ictjax.sampler.state import blank_rows, pack_request, pack_row, unpack_samples
from ictjax.sampler.step import turn
from ictjax.sampler.weights import check_tree, sampling_weights

# A shorter common prefix is cheaper to compute again than to copy from another slot.
_MIN_COPIED_TOKENS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """How to generate one reply. Token n of the reply draws its noise from fold_in(key, n)."""

    max_new_tokens: int
    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    stop_ids: tuple[int, ...]
    # a JAX PRNG key (threefry), or its two words as NumPy uint32[2], which is cheapest (see
    # `raw_key`)
    key: Any

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: ask for at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}: give 0 (greedy) or a positive number"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: give 0 (off) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give a mass in (0, 1]; 1 is off")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished reply."""

    conversation: int
    ids: tuple[int, ...]  # as sampled, the stop id included
    # of ids under softmax(logits / temperature) (of the plain logits if greedy), before truncation
    logprobs: tuple[float, ...]
    finish: str  # "stop", "length" (the request's limit) or "context" (the conversation is full)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerStats:
    """Counts since the sampler was made."""

    prefilled_tokens: int  # appended by open and extend, and computed
    reused_tokens: int  # appended by open and fork, and found in a cache row
    decoded_tokens: int  # sampled
    padded_tokens: int  # computed positions that held no token of a conversation
    dispatches: int
    row_copies: int
    compile_count: int


def raw_key(*words: int) -> np.ndarray:
    """The words of a PRNG key from any non-negative integers (seed, iteration, game, turn, ...), on
    the host, in microseconds.
    """
    return np.random.SeedSequence(words).generate_state(2)


@dataclasses.dataclass(eq=False, slots=True)
class _Conversation:
    id: int
    tokens: np.ndarray  # int32, capacity max_len
    length: int
    slot: int | None = None
    parent: "_Conversation | None" = None  # of a fork, until it gets its slot
    shared: int = 0  # tokens shared with the parent
    closed: bool = False
    # was given more than max_len tokens: those were refused, and it only ever answers "context"
    full: bool = False
    request: Request | None = None
    columns: np.ndarray | None = None  # the request, packed
    reply: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    ready_since: int = 0  # dispatch count when it last got something to do


class Sampler:
    """Samples many conversations together; a context manager.

    A conversation takes a slot (a row of the KV cache) when one is free, first come, first served,
    and keeps it until closed, so only new tokens are ever computed. A new conversation starts from
    the longest prefix that any row, live or left behind, already holds.

    Nothing blocks: calls only note what is wanted, `step` does one dispatch of it and returns the
    replies that it finished. Tokens depend on weights, tokens and keys, not on slots or arrival
    order (up to rounding of float32 sums at other batch shapes).

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
    ) -> None:
        if not 0 <= pad_id < config.vocab_size:
            raise ValueError(
                f"pad_id is {pad_id}: give an id of the vocabulary, 0 to {config.vocab_size - 1}"
            )
        if sampler_config.max_len > config.max_positions:
            raise ValueError(
                f"max_len {sampler_config.max_len} exceeds the model's max_positions"
                f" {config.max_positions}: lower it"
            )
        self._shards = 1 if mesh is None else mesh.shape["data"]
        for name, sizes in (
            ("num_slots", (sampler_config.num_slots,)),
            ("row_buckets", sampler_config.row_buckets),
        ):
            if any(size % self._shards for size in sizes):
                raise ValueError(
                    f"{name} {sizes} are not multiples of the mesh's data axis {self._shards}:"
                    " every copy gets the same share"
                )
        self._config = config
        self._sampler_config = sampler_config
        self._pad_id = pad_id
        self._mesh = mesh
        copies = kv_copies(config.num_heads, config.num_kv_heads, mesh)
        self._cache_sharding = (
            None if mesh is None else cache_sharding(config.num_kv_heads * copies, mesh)
        )
        self._cache = jax.jit(
            lambda: make_cache(
                config, sampler_config.num_slots, sampler_config.max_len, copies=copies
            ),
            out_shardings=self._cache_sharding,
        )()
        self._programs: dict[tuple[int, int, int], Any] = {}
        self._copy_program: Any = None
        self._ids = itertools.count()
        self._conversations: dict[int, _Conversation] = {}
        self._queue: collections.deque[_Conversation] = collections.deque()
        self._in_slot: list[_Conversation | None] = [None] * sampler_config.num_slots
        # Longest free first; to begin with, the copies of the weights take turns.
        self._free = sorted(
            range(sampler_config.num_slots), key=lambda slot: slot % self._slots_per_shard
        )
        # What each cache row holds, also after its conversation closed.
        self._row_tokens = np.zeros((sampler_config.num_slots, sampler_config.max_len), np.int32)
        self._row_lengths = np.zeros(sampler_config.num_slots, np.int32)
        self._finished: list[Generation] = []
        self._counts = collections.Counter[str]()
        self._closed = False
        self.set_params(params)

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
        self._in_slot = [None] * self._sampler_config.num_slots
        self._cache = self._params = None
        self._programs.clear()

    def set_params(self, params: Params) -> None:
        """Replaces the weights, and with them everything cached.

        Raises:
          ValueError: conversations are open, or the tree is not that of the config.
        """
        if self._conversations:
            raise ValueError(
                f"{len(self._conversations)} conversations are open: close them before changing the"
                " weights under their caches"
            )
        check_tree(self._config, params)
        self._params = None  # frees converted weights before others are made
        self._params = sampling_weights(self._config, params, self._mesh)
        self._row_lengths[:] = 0

    def warmup(self) -> None:
        """Compiles every program that any sequence of calls can need."""
        sizes = self._sampler_config
        for rows in sizes.row_buckets:
            for length in (1, *sizes.extend_buckets):
                for attended in sizes.attended:
                    if length <= attended:
                        self._program(rows, length, attended)
        self._copier()

    @property
    def stats(self) -> SamplerStats:
        counts = self._counts
        return SamplerStats(
            **{field.name: counts[field.name] for field in dataclasses.fields(SamplerStats)}
        )

    @property
    def idle(self) -> bool:
        """True when `step` has nothing to do until the caller asks for something (or closes a
        conversation that others wait for).
        """
        waiting = bool(self._free) and any(not conversation.closed for conversation in self._queue)
        return (
            not self._finished
            and not waiting
            and not any(c is not None and self._unfed(c) > 0 for c in self._in_slot)
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
        return self._enqueue(conversation)

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
        if len(request.stop_ids) > sizes.max_stop_ids:
            raise ValueError(
                f"{len(request.stop_ids)} stop ids exceed the sampler's max_stop_ids"
                f" {sizes.max_stop_ids}: raise max_stop_ids"
            )
        if found.full or found.length >= sizes.max_len:
            self._finished.append(
                Generation(conversation=conversation, ids=(), logprobs=(), finish="context")
            )
            return
        found.columns = pack_request(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            stop_ids=request.stop_ids,
            key=_key_words(request.key),
            num_stop_ids=sizes.max_stop_ids,
        )
        found.request = request
        found.ready_since = self._counts["dispatches"]

    def sampled(self, conversation: int) -> tuple[int, ...]:
        """The ids of a reply under way, as far as they are sampled, for whoever shows it as it
        grows; empty where none is under way.
        """
        return tuple(self._find(conversation).reply)

    def fork(self, conversation: int) -> int:
        """Starts a conversation with the same tokens so far, which copies their cache row once it
        gets a slot; returns its number.
        """
        parent = self._settled(conversation, "fork")
        child = self._new()
        child.tokens[: parent.length] = parent.tokens[: parent.length]
        child.length, child.full = parent.length, parent.full
        child.parent, child.shared = parent, parent.length
        return self._enqueue(child)

    def close(self, conversation: int) -> None:
        """Ends a conversation (a reply under way is dropped) and gives its slot to the next in the
        queue.
        """
        found = self._find(conversation)
        del self._conversations[conversation]
        found.closed = True
        found.request = None
        if found.slot is not None:
            self._in_slot[found.slot] = None
            self._free.append(found.slot)
        self._finished = [
            generation for generation in self._finished if generation.conversation != conversation
        ]

    def step(self) -> list[Generation]:
        """Gives free slots to the queue, does one dispatch, and returns the replies that finished,
        if any.
        """
        self._check_open()
        self._assign_slots()
        group, length = self._choose()
        if group:
            self._dispatch(group, length)
        finished, self._finished = self._finished, []
        return finished

    def run(self) -> list[Generation]:
        """Steps until idle; all replies in the order in which they finished."""
        finished = []
        while not self.idle:
            finished += self.step()
        return finished

    @property
    def _slots_per_shard(self) -> int:
        return self._sampler_config.num_slots // self._shards

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

    def _settled(self, conversation: int, call: str) -> _Conversation:
        found = self._find(conversation)
        if found.request is not None:
            raise ValueError(
                f"conversation {conversation} is still generating: step until its reply is there,"
                f" then {call}"
            )
        return found

    def _new(self) -> _Conversation:
        self._check_open()
        conversation = _Conversation(
            id=next(self._ids), tokens=np.empty(self._sampler_config.max_len, np.int32), length=0
        )
        self._conversations[conversation.id] = conversation
        return conversation

    def _enqueue(self, conversation: _Conversation) -> int:
        if not conversation.full:  # a full one never needs a slot
            self._queue.append(conversation)
        return conversation.id

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

    def _unfed(self, conversation: _Conversation) -> int:
        """Tokens that the next dispatches should compute. Without a request the last one waits: a
        reply starts from its hidden state.
        """
        return (
            conversation.length
            - int(self._row_lengths[conversation.slot])
            - (conversation.request is None)
        )

    def _assign_slots(self) -> None:
        while self._queue and self._free:
            conversation = self._queue[0]
            if conversation.closed:
                self._queue.popleft()
                continue
            parent = conversation.parent
            if (
                parent is not None
                and parent.slot is not None
                and not parent.closed
                and self._row_lengths[parent.slot] < conversation.shared - 1
            ):
                return  # its prefix is being computed
            self._queue.popleft()
            self._take_slot(conversation)

    def _take_slot(self, conversation: _Conversation) -> None:
        """Gives it a free slot, with the longest prefix of its tokens that any row holds; best is a
        free row that holds it already.
        """
        wanted = conversation.length - 1
        same = self._row_tokens[:, :wanted] == conversation.tokens[None, :wanted]
        same &= np.arange(wanted)[None] < self._row_lengths[:, None]
        prefixes = (
            np.where(same.all(axis=1), wanted, same.argmin(axis=1))
            if wanted
            else np.zeros(len(same), int)
        )
        source = int(prefixes.argmax())
        # Else one of the copy of the weights with most free slots: a dispatch takes as long as its
        # fullest copy.
        idle = collections.Counter(free // self._slots_per_shard for free in self._free)
        slot = max(
            self._free,
            key=lambda free: (
                prefixes[free] == prefixes[source],
                idle[free // self._slots_per_shard],
            ),
        )
        reused = int(prefixes[slot])
        if slot != source and prefixes[source] >= max(_MIN_COPIED_TOKENS, reused + 1):
            self._cache = self._copier()(self._cache, np.int32(source), np.int32(slot))
            self._counts["row_copies"] += 1
            reused = int(prefixes[source])
        self._free.remove(slot)
        self._row_tokens[slot, :reused] = conversation.tokens[:reused]
        self._row_lengths[slot] = reused
        self._in_slot[slot] = conversation
        self._counts["reused_tokens"] += reused
        conversation.slot, conversation.parent = slot, None
        conversation.ready_since = self._counts["dispatches"]

    def _choose(self) -> tuple[list[_Conversation], int]:
        """The rows of the next dispatch and its token bucket (1: only continue generations): the
        group with most rows and longest waits.
        """
        now = self._counts["dispatches"]
        buckets = self._sampler_config.extend_buckets
        groups: dict[int, list[_Conversation]] = collections.defaultdict(list)
        for conversation in self._in_slot:
            if conversation is None or (unfed := self._unfed(conversation)) <= 0:
                continue
            continues = unfed == 1 and conversation.request is not None
            groups[1 if continues else _bucket(buckets, unfed)].append(conversation)
        if not groups:
            return [], 1
        length, group = max(
            groups.items(), key=lambda item: sum(1 + now - c.ready_since for c in item[1])
        )
        group.sort(key=lambda c: c.ready_since)
        room = collections.Counter(
            dict.fromkeys(range(self._shards), self._sampler_config.row_buckets[-1] // self._shards)
        )
        chosen = []
        for conversation in group:
            shard = conversation.slot // self._slots_per_shard
            if room[shard]:
                room[shard] -= 1
                chosen.append(conversation)
        return chosen, length

    def _dispatch(self, group: list[_Conversation], length: int) -> None:
        sizes, per_shard = self._sampler_config, self._slots_per_shard
        counts = collections.Counter(conversation.slot // per_shard for conversation in group)
        num_rows = _bucket(sizes.row_buckets, self._shards * max(counts.values()))
        shard_rows = num_rows // self._shards
        next_row = [itertools.count(shard * shard_rows) for shard in range(self._shards)]
        steps = sizes.decode_steps if length == 1 else sizes.extend_steps
        packed = self._blank(num_rows, length)
        rows, fed, end = [], [], length
        for conversation in group:
            slot = conversation.slot
            row = slot if num_rows == sizes.num_slots else next(next_row[slot // per_shard])
            start = int(self._row_lengths[slot])
            count = min(self._unfed(conversation), length)
            allowed = 0
            if conversation.request is not None and start + count == conversation.length:
                allowed = min(
                    conversation.request.max_new_tokens - len(conversation.reply),
                    sizes.max_len - conversation.length,
                )
            pack_row(
                packed[row],
                slot=slot % per_shard,
                start=start,
                tokens=conversation.tokens[start : start + count],
                allowed=allowed,
                count=len(conversation.reply),
                request=conversation.columns if allowed else None,
                num_stop_ids=sizes.max_stop_ids,
            )
            rows.append(row)
            fed.append(count)
            end = max(end, start + count + max(min(allowed, steps) - 1, 0))
        program = self._program(num_rows, length, _bucket(sizes.attended, end))
        samples, self._cache = program(self._params, self._cache, packed)
        ids, logprobs, sampled = unpack_samples(np.asarray(samples))
        self._counts["dispatches"] += 1
        steps_per_shard = sampled.reshape(self._shards, shard_rows).max(axis=1)
        if length > 1:
            steps_per_shard = length + np.maximum(steps_per_shard - 1, 0)
        self._counts["padded_tokens"] += shard_rows * int(steps_per_shard.sum())
        for conversation, row, count in zip(group, rows, fed, strict=True):
            self._advance(
                conversation,
                count,
                ids[row, : sampled[row]].tolist(),
                logprobs[row, : sampled[row]].tolist(),
                extended=length > 1,
            )

    def _advance(
        self,
        conversation: _Conversation,
        fed: int,
        ids: list[int],
        logprobs: list[float],
        *,
        extended: bool,
    ) -> None:
        """Books the result of a dispatch: `fed` tokens and all sampled ids but the last are now in
        the cache row.
        """
        slot, old = conversation.slot, int(self._row_lengths[conversation.slot])
        length = conversation.length
        conversation.tokens[length : length + len(ids)] = ids
        conversation.length = length + len(ids)
        cached = old + fed + max(len(ids) - 1, 0)
        self._row_tokens[slot, old:cached] = conversation.tokens[old:cached]
        self._row_lengths[slot] = cached
        self._counts["padded_tokens"] -= cached - old
        self._counts["prefilled_tokens"] += fed if extended else 0
        self._counts["decoded_tokens"] += len(ids)
        conversation.ready_since = self._counts["dispatches"]
        request = conversation.request
        if not ids or request is None:
            return
        conversation.reply += ids
        conversation.logprobs += logprobs
        if ids[-1] in request.stop_ids:
            finish = "stop"
        elif len(conversation.reply) == request.max_new_tokens:
            finish = "length"
        elif conversation.length == self._sampler_config.max_len:
            finish = "context"
        else:
            return
        self._finished.append(
            Generation(
                conversation=conversation.id,
                ids=tuple(conversation.reply),
                logprobs=tuple(conversation.logprobs),
                finish=finish,
            )
        )
        conversation.request, conversation.reply, conversation.logprobs = None, [], []

    def _program(self, num_rows: int, length: int, attended: int) -> Any:
        """The compiled `turn` of these sizes. Compiled ahead, not on call, so that nothing else can
        ever cause a recompilation.
        """
        shape = (num_rows, length, attended)
        if shape not in self._programs:
            sizes = self._sampler_config
            static = functools.partial(
                turn,
                self._config,
                attended=attended,
                max_steps=sizes.decode_steps if length == 1 else sizes.extend_steps,
                num_stop_ids=sizes.max_stop_ids,
                max_top_k=sizes.max_top_k,
                pad_id=self._pad_id,
            )
            arguments = (self._params, self._cache, self._blank(num_rows, length))
            self._programs[shape] = self._compile(
                static, arguments, cache=1, split=(False, True, True), split_result=(True, True)
            )
        return self._programs[shape]

    def _copier(self) -> Any:
        if self._copy_program is None:
            copy = (
                copy_row if self._shards == 1 else functools.partial(copy_row_across, axis="data")
            )
            arguments = (self._cache, np.int32(0), np.int32(0))
            self._copy_program = self._compile(
                copy, arguments, cache=0, split=(True, False, False), split_result=True
            )
        return self._copy_program

    def _compile(
        self,
        function: Any,
        arguments: tuple,
        *,
        cache: int,
        split: tuple[bool, ...],
        split_result: Any,
    ) -> Any:
        """Compiles a function of these arguments, one of them the donated cache. On a mesh it runs
        once per copy of the weights, each time on its share of what `split` names, by rows; inside
        a copy the compiler splits the work as the weights and the cache are split."""
        self._counts["compile_count"] += 1
        if self._mesh is None:
            return jax.jit(function, donate_argnums=cache).lower(*arguments).compile()
        rows, whole = PartitionSpec("data"), PartitionSpec()
        inputs, outputs = jax.tree.map(
            lambda by_rows: rows if by_rows else whole, (split, split_result)
        )
        if self._shards > 1:
            function = jax.shard_map(
                function,
                mesh=self._mesh,
                in_specs=inputs,
                out_specs=outputs,
                axis_names={"data"},
                check_vma=False,
            )
        places = tuple(
            (
                jax.tree.map(lambda leaf: leaf.sharding, argument)
                if isinstance(jax.tree.leaves(argument)[0], jax.Array)
                else NamedSharding(self._mesh, spec)
            )
            for argument, spec in zip(arguments, inputs, strict=True)
        )
        results = (
            (NamedSharding(self._mesh, rows), self._cache_sharding)
            if isinstance(split_result, tuple)
            else self._cache_sharding
        )
        return (
            jax.jit(function, donate_argnums=cache, in_shardings=places, out_shardings=results)
            .lower(*arguments)
            .compile()
        )

    def _blank(self, num_rows: int, length: int) -> np.ndarray:
        stop_ids = self._sampler_config.max_stop_ids
        return blank_rows(
            num_rows,
            length,
            num_stop_ids=stop_ids,
            num_slots=self._slots_per_shard,
            pad_id=self._pad_id,
        )


def _bucket(sizes: Iterable[int], wanted: int) -> int:
    """The smallest size that holds `wanted`, or the largest."""
    largest = 0
    for largest in sizes:
        if largest >= wanted:
            break
    return largest


def _key_words(key: Any) -> np.ndarray:
    words = key if isinstance(key, np.ndarray) else np.asarray(jax.random.key_data(key))
    if words.shape != (2,) or words.dtype != np.uint32:
        raise ValueError(
            f"key has words of shape {words.shape} and type {words.dtype}: give one threefry key,"
            " or its uint32[2]"
        )
    return words
