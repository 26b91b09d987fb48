"""The parts that a run is configured by, one frozen record for every consumer: mesh, adapter,
sampler, rollout, reflector, meta-environment, loss, optimizer, learner and batch.

Standard library only, so that commands can show every setting without loading JAX. Each record
checks its own values when it is built; messages name fields as the command line does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Literal

from ictjax.ranges import Range, Ranged, shown

# 0 is greedy; closer to it logits, divided by the temperature, leave float32
TEMPERATURE = Range(0.001, 100, also=0)
TOP_P = Range(1e-6, 1)
MIN_P = Range(0, 1)

_MAX_STOPS, _MAX_STOP_CHARS = 16, 256

AXES = ("data", "fsdp", "tensor")


def check_stop(name: str, stop: Sequence[str]) -> None:
    """Raises ValueError, by that name, unless these texts can end a reply."""
    if len(stop) > _MAX_STOPS:
        raise ValueError(f"{name} holds {len(stop)} texts: give {_MAX_STOPS} at most.")
    for text in stop:
        if not 1 <= len(text) <= _MAX_STOP_CHARS:
            raise ValueError(
                f"{name} holds a text of {len(text)} characters: give 1 to {_MAX_STOP_CHARS}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Ranged):
    """The sizes of a mesh; their product is the number of devices. All 1: the default device,
    without a mesh.
    """

    place = "mesh."

    # copies of the frozen weights, each with rows of its own
    data: Annotated[int, Range(1, 65_536)] = 1
    fsdp: Annotated[int, Range(1, 65_536)] = 1  # parts that the width of the weights is split into
    # parts that heads, feed-forward and vocabulary are split into
    tensor: Annotated[int, Range(1, 65_536)] = 1

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.data * self.fsdp * self.tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig(Ranged):
    """Which hosts run one command together; the same on each, but for `index`."""

    place = "hosts."

    detect: bool = False  # as TPU pods, Slurm and Open MPI say by themselves
    coordinator: str = ""  # HOST:PORT of the first host, as all others reach it
    count: Annotated[int, Range(1, 65_536)] = 1  # of hosts
    index: Annotated[int, Range(0, 65_535)] = 0  # of this one; the first, 0, writes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detect and (self.coordinator or self.count > 1 or self.index):
            raise ValueError(
                "hosts.detect finds out what hosts.coordinator, count and index say: give either."
            )
        if (self.count > 1) != bool(self.coordinator):
            raise ValueError(
                f"hosts.count = {self.count} and hosts.coordinator = {self.coordinator!r} do not"
                " fit together: several hosts have a coordinator, HOST:PORT."
            )
        if self.index >= self.count:
            raise ValueError(
                f"hosts.index = {self.index} is not one of {self.count} hosts: they count from 0 to"
                f" {self.count - 1}."
            )

    @property
    def alone(self) -> bool:
        """Whether there is one host only, without asking."""
        return not self.detect and self.count == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleMeshes:
    """One mesh per role. With one shared base both must be the same; the update runs on the
    reflector's.
    """

    actor: MeshConfig
    reflector: MeshConfig


def _both(**sizes: int) -> RoleMeshes:
    return RoleMeshes(actor=MeshConfig(**sizes), reflector=MeshConfig(**sizes))


# Made for 7B models with 4 kv heads: tensor beyond 4 would keep every kv head twice, so the other
# devices are copies (data), each with slots and rows of its own. Small slices also suit models with
# 2 kv heads.
MESHES: Mapping[str, RoleMeshes] = MappingProxyType(
    {
        "v5e-1": _both(),
        "v5e-4": _both(data=2, tensor=2),
        "v5e-8": _both(data=2, tensor=4),
        "v5e-16": _both(data=4, tensor=4),
        "v5e-64": _both(data=16, tensor=4),  # 16 hosts of four chips, each with a copy of its own
        "v6e-1": _both(),
        "v6e-4": _both(tensor=4),
        "v6e-8": _both(data=2, tensor=4),
        "v5p-8": _both(tensor=4),  # the name counts cores: four chips, which are JAX's devices
        "l4": _both(),
        "a100": _both(),
        "a100-8": _both(data=2, tensor=4),
        "h100": _both(),
        "h100-8": _both(data=2, tensor=4),
        "h200": _both(),
        "h200-8": _both(data=2, tensor=4),
    }
)


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections of a decoder layer, which an adapter may be put on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Ranged):
    """What of a model is trained: an adapter of this rank, or with rank 0 all weights."""

    place = "lora."

    rank: Annotated[int, Range(0, 16_384)] = 0  # 0 trains all weights
    alpha: Annotated[float, Range(1e-6, 1e6)] = 32.0  # the addition is scaled by alpha / rank
    targets: tuple[str, ...] = PROJECTIONS  # projections of every layer

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora.targets are {', '.join(self.targets) or 'none'}: name some of"
                f" {', '.join(PROJECTIONS)}, each once"
            )

    @property
    def scale(self) -> float:
        """What the product of both factors is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig(Ranged):
    """An OpenAI-compatible chat endpoint, and how it is called."""

    place = "endpoint."

    url: str = ""  # base URL, for example http://localhost:8000/v1; empty: there is no endpoint
    # the environment variable that holds the key; the key itself is written nowhere
    key_variable: str = "OPENAI_API_KEY"
    concurrency: Annotated[int, Range(1, 4096)] = 16  # calls under way at the same time
    timeout_s: Annotated[float, Range(0.001, 86_400)] = 120.0  # of one try
    # after 408, 409, 429, 5xx and cut connections
    max_retries: Annotated[int, Range(0, 100)] = 5
    # before a try is repeated; doubled each time
    first_wait_s: Annotated[float, Range(0, 3600)] = 0.5
    seeded: bool = True  # send a seed, so that servers that know seeds repeat themselves
    # the field that limits a reply, by the name that the server knows
    tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    # of a million tokens that are sent, in any currency
    input_price: Annotated[float, Range(0, 1e9)] = 0.0
    # of a million tokens that come back
    output_price: Annotated[float, Range(0, 1e9)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint.url is {self.url!r}: give http://... or https://...")
        address, _, path = self.url.partition("://")[2].partition("/")
        if "@" in address:  # the URL is written into config.json, and shown: not here
            raise ValueError(
                "endpoint.url holds a user name or a password, which would be written into the run:"
                " leave it out, and put the key into the environment variable that"
                " endpoint.key_variable names."
            )
        if {"?", "#"} & {*address, *path}:
            raise ValueError(
                "endpoint.url holds a query (? or #), and paths are put behind the URL: leave it"
                " out."
            )


PagedAttentionName = Literal["auto", "pages", "pallas_tpu", "pallas_gpu"]
"""How a sampler attends over the pages of its cache: as suits the platform; a few
pages of all rows at a time, on any platform; by a kernel for TPU, or for NVIDIA GPUs of compute
capability 8.0 and newer.
"""

# How a model is computed. "mixed": bfloat16 frozen weights, float32 activations and caches, and
# products with weights of operands rounded to bfloat16: faster than either of the others on CPUs
# with instructions for such products.
Dtype = Literal["bfloat16", "float32", "mixed"]

CacheKind = Literal["float", "int8"]
"""What keys and values are held in."""

# A game of 25 turns holds about as many tokens of an actor, on average over its life.
_POSITIONS_OF_A_SLOT = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig(Ranged):
    """Sizes of the sampler. Every combination of buckets is one compiled program, so keep them
    few.

    Slots, rows and pages are those of all hosts and all copies of the weights together: each gets
    the same share (`of_host`), so that a device holds the same however many hosts there are.
    """

    # conversations in flight at once, which hold a row or pages of the KV cache
    num_slots: Annotated[int, Range(1, 65_536)]
    max_len: Annotated[int, Range(2, 16_777_216)]  # tokens of one conversation, prompt and replies
    # tokens appended per row in one dispatch; longer input goes in pieces
    extend_buckets: Annotated[tuple[int, ...], Range(2, 16_777_216)]
    row_buckets: Annotated[tuple[int, ...], Range(1, 65_536)]  # rows of one dispatch
    # tokens sampled per row in one dispatch that continues generations
    decode_steps: Annotated[int, Range(1, 65_536)]
    # the largest top-k of a request; a top-p that takes more ids is slower
    max_top_k: Annotated[int, Range(1, 1_048_576)]
    # tokens sampled per row in one dispatch that first appends tokens
    extend_steps: Annotated[int, Range(1, 65_536)] = 1
    # dispatches launched before the tokens of the first are read; 1, as always with guessed_tokens:
    # each is read before the next
    max_in_flight: Annotated[int, Range(1, 2)] = 2
    # cache positions attended to; max_len is always one; doubling from 128 unless given
    attended_buckets: Annotated[tuple[int, ...], Range(1, 16_777_216)] = ()
    max_stop_ids: Annotated[int, Range(1, 1024)] = 4  # per request
    max_bias_ids: Annotated[int, Range(0, 4096)] = 0  # per request, banned ids included
    # likeliest ids that can be reported beside each sampled one; 0: none
    max_top_logprobs: Annotated[int, Range(0, 1024)] = 0
    # positions of a page of the cache, of which conversations take more as they grow; 0: every slot
    # holds max_len positions, used or not
    page_size: Annotated[int, Range(1, 16_777_216, also=0)] = 0
    # of all copies of the weights, on all hosts; 0: a quarter of what full slots would need, and at
    # least 4,096 positions a slot
    num_pages: Annotated[int, Range(1, 2**31 - 1, also=0)] = 0
    # over pages; "auto" chooses by platform, and manifest.json says which it was
    attention: PagedAttentionName = "auto"
    # tokens of greedy replies that a step guesses, from what followed the same tokens before; 0:
    # none. The replies are the same
    guessed_tokens: Annotated[int, Range(0, 64)] = 0
    # "int8": keys and values in 8 bits, a scale for every position and head; "float": in the role's
    # dtype
    cache: CacheKind = "float"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page_size > self.max_len:
            raise ValueError(
                f"page_size must be at most max_len = {self.max_len}, got {self.page_size}."
            )
        if self.attention != "auto" and not self.page_size:
            raise ValueError(
                f"attention must be auto without page_size, got {self.attention!r}: give page_size"
                " too."
            )
        if self.num_pages and not self.page_size:
            raise ValueError(
                f"num_pages must be 0 without page_size, got {self.num_pages}: give page_size too."
            )
        if self.num_pages and self.num_pages < self.pages_per_row:
            raise ValueError(
                f"num_pages must be at least {self.pages_per_row}, one conversation of max_len ="
                f" {self.max_len} tokens in pages of {self.page_size}, got {self.num_pages}."
            )
        for name, low, high in (
            ("extend_buckets", 2, self.max_len),
            ("row_buckets", 1, self.num_slots),
            ("attended_buckets", 1, self.max_len),
        ):
            sizes = getattr(self, name)
            if (
                list(sizes) != sorted(set(sizes))
                or (not sizes and name != "attended_buckets")
                or any(not low <= size <= high for size in sizes)
            ):
                raise ValueError(
                    f"{name} must be ascending sizes from {low} to {high}, got {shown(sizes)}."
                )

    @property
    def attended(self) -> tuple[int, ...]:
        """The attended lengths, ascending, `max_len` last; over pages, work follows the rows."""
        if self.page_size:
            return (self.max_len,)
        sizes = self.attended_buckets or tuple(
            128 << power for power in range(self.max_len.bit_length())
        )
        return (*(size for size in sizes if size < self.max_len), self.max_len)

    def most_sampled(self, length: int, *, greedy: bool = True) -> int:
        """Tokens that a dispatch of `length` appended ones can sample for a row."""
        guessed = self.guessed_tokens if greedy else 0
        if length == 1:
            return self.decode_steps * (1 + guessed)
        return 1 + (self.extend_steps - 1) * (1 + guessed)

    def guesses(self, length: int) -> bool:
        """Whether a dispatch of `length` appended tokens can guess."""
        return self.guessed_tokens > 0 and (length == 1 or self.extend_steps > 1)

    @property
    def pages_per_row(self) -> int:
        """Pages of the longest conversation."""
        return -(-self.max_len // self.page_size) if self.page_size else 1

    def cache_rows(self, num_shards: int = 1) -> tuple[int, int]:
        """Rows of the cache on all copies of the weights, and positions of a row: of slots, or of
        pages. ValueError where a copy cannot hold one conversation.
        """
        if not self.page_size:
            return self.num_slots, self.max_len
        share = min(self.max_len, max(self.max_len // 4, _POSITIONS_OF_A_SLOT))
        wanted = self.num_pages or self.num_slots * -(-share // self.page_size)
        share = wanted // num_shards if self.num_pages else -(-wanted // num_shards)
        if self.num_pages and (wanted % num_shards or share < self.pages_per_row):
            raise ValueError(
                f"num_pages = {self.num_pages} on {num_shards} copies of the weights: give a"
                f" multiple of {num_shards}, at least {self.pages_per_row * num_shards}, so that"
                f" each holds a conversation of max_len = {self.max_len} tokens."
            )
        return num_shards * max(share, self.pages_per_row), self.page_size

    def of_host(self, hosts: int) -> "SamplerConfig":
        """What one of so many hosts has of it: its share of the slots, of the rows of a dispatch,
        and of the pages. Raises ValueError for sizes that do not divide.
        """
        for name in ("num_slots", "row_buckets", "num_pages"):
            value = getattr(self, name)
            sizes = value if isinstance(value, tuple) else (value,)
            if any(size % hosts for size in sizes):
                raise ValueError(
                    f"{name} = {shown(value)} does not divide by the {hosts} hosts, each of which"
                    f" has the same share: give multiples of {hosts}."
                )
        return dataclasses.replace(
            self,
            num_slots=self.num_slots // hosts,
            row_buckets=tuple(size // hosts for size in self.row_buckets),
            num_pages=self.num_pages // hosts,
        )

    def with_slots(self, num_slots: int) -> "SamplerConfig":
        """The same with other slots; rows of a dispatch are at most as many."""
        rows = tuple(sorted({min(size, num_slots) for size in self.row_buckets}))
        return dataclasses.replace(self, num_slots=num_slots, row_buckets=rows)

    def with_max_len(self, max_len: int) -> "SamplerConfig":
        """The same with longer or shorter conversations; no bucket is longer than they are."""
        extend = tuple(sorted({min(size, max_len) for size in self.extend_buckets}))
        attended = tuple(size for size in self.attended_buckets if size < max_len)
        return dataclasses.replace(
            self,
            max_len=max_len,
            extend_buckets=extend,
            attended_buckets=(*attended, max_len) if self.attended_buckets else (),
            page_size=min(self.page_size, max_len),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(Ranged):
    """How the actor plays. Limits: per episode (`max_steps`), per turn (`max_turn_tokens`), and the
    sampler's context for both together.
    """

    place = "task.rollout."

    max_steps: Annotated[int, Range(1, 1_000_000)]  # actions until an episode ends
    max_turn_tokens: Annotated[int, Range(1, 16_777_216)]  # of one reply of the actor
    temperature: Annotated[float, TEMPERATURE] = 0.0  # of the actor; 0 is greedy
    # sample from so many likeliest tokens; 0 is off
    top_k: Annotated[int, Range(0, 1_048_576)] = 0
    # sample from the likeliest tokens of this mass; 1 is off
    top_p: Annotated[float, TOP_P] = 1.0
    # of the likeliest token's probability, that a token needs to be sampled; 0 is off
    min_p: Annotated[float, MIN_P] = 0.0
    # texts that end a reply of the actor, and are not part of it: "Observation:" for example
    stop: tuple[str, ...] = ()
    show_actions: bool = False  # list the available actions below each observation
    # starts this long wait for the first episode of their system prompt, whose prefix they then
    # share; read by a model's speaker
    share_min_tokens: Annotated[int, Range(0, 16_777_216)] = 256
    # how long to wait for more environment answers before decoding without them
    gather_s: Annotated[float, Range(0, 60)] = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stop(f"{self.place}stop", self.stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReflectorConfig(Ranged):
    """How episodes are shown to the reflector, and the limits of what it writes. Lengths are in the
    reflector's tokens.
    """

    place = "reflection."

    # "short" asks small language models in few words; "compact" is for word-level pocket models
    style: Literal["full", "short", "compact"]
    # budget of the conversation before the reply; middle turns are dropped to meet it
    max_context_tokens: Annotated[int, Range(1, 16_777_216)]
    # of analysis and prompt together; a longer reply is cut and counts as TRUNCATED
    max_reply_tokens: Annotated[int, Range(1, 16_777_216)]
    # a longer improved prompt counts as PROMPT_TOO_LONG
    max_prompt_tokens: Annotated[int, Range(1, 16_777_216)]
    # turns shown from the start of an episode; None shows all
    head_turns: Annotated[int | None, Range(0, 1_000_000)] = None
    # turns shown from its end; None shows all
    tail_turns: Annotated[int | None, Range(0, 1_000_000)] = None
    show_thoughts: bool = False  # of the actor, in the episodes that the reflector reads

    def __post_init__(self):
        super().__post_init__()
        if (self.head_turns is None) != (self.tail_turns is None):
            raise ValueError(
                "reflection.head_turns and reflection.tail_turns are set together: give both, or"
                " neither to show all turns."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaConfig(Ranged):
    """What a context is and how a candidate is rewarded."""

    place = "meta."

    contexts_per_iteration: Annotated[int, Range(1, 65_536)]  # what one update learns from
    # k: games the reflector reads, and those of the replay reward
    games_per_context: Annotated[int, Range(1, 10_000)]
    # other games of the family, the same for all candidates of a context; may outnumber k
    fresh_games: Annotated[int, Range(0, 10_000)]
    # reward = replay_weight * replay + (1 - replay_weight) * fresh; 1 is the paper's reward
    replay_weight: Annotated[float, Range(0, 1)]
    # after as many prompts a loop restarts with the initial prompt
    meta_turns: Annotated[int, Range(1, 1_000_000)]
    # contexts of the current reflector, or of the base reflector before training (the paper)
    collection: Literal["online", "precollected"]
    # read by "precollected" only
    precollected_loops: Annotated[int, Range(0, 1_000_000)]
    # "improvement": less the rate of the previous prompt on the same games
    reward: Literal["success", "improvement"]
    # of a reply without a usable prompt; a won game is 1, a lost one 0
    malformed_reward: Annotated[float, Range(-1000, 1)]

    def __post_init__(self):
        super().__post_init__()
        if self.replay_weight < 1 and self.fresh_games < 1:
            raise ValueError(
                "meta.fresh_games must be at least 1 when meta.replay_weight is below 1, got"
                f" {self.fresh_games}."
            )
        if self.collection == "precollected" and self.precollected_loops < 1:
            raise ValueError(
                "meta.precollected_loops must be at least 1 for precollected contexts, got"
                f" {self.precollected_loops}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig(Ranged):
    """What the estimator is. No field has a default: each one changes the gradient. Raises
    ValueError for values out of range.
    """

    place = "grpo."

    # candidates per context; a group of one has no relative advantage
    group_size: Annotated[int, Range(2, 65_536)]
    # what rewards are centred and scaled with, within their group
    advantage: Literal["mean", "mean_std", "leave_one_out"]
    # added to the standard deviation; read by "mean_std" only
    std_eps: Annotated[float, Range(0, 1)]
    # groups without signal: "keep" them in the normalisers and the KL term, or give them no weight
    dead_groups: Literal["keep", "drop"]
    # so often contexts and candidates are drawn again for groups without signal; 0: never
    refill_rounds: Annotated[int, Range(0, 1000)]
    # what the reward of a reply of the greatest length loses; 0: none does
    overlong_penalty: Annotated[float, Range(0, 1000)]
    # the loss begins where this share of reflection.max_reply_tokens is left
    overlong_buffer: Annotated[float, Range(0.001, 1)]
    # what counts the same: every token of the batch, every reply, or every token of all batches
    loss_normalisation: Literal["token_mean", "sequence_mean", "constant"]
    # tokens every sequence is divided by; read by "constant" only
    constant_length: Annotated[int, Range(1, 16_777_216)]
    importance: Literal["none", "token", "sequence"]  # of what the ratio of policies is taken
    # the ratio is clipped to [1 - clip_low, 1 + clip_high]; a ratio is never negative
    clip_low: Annotated[float, Range(0, 1)]
    clip_high: Annotated[float, Range(0, 1e6)]  # see clip_low
    # the weight of what the sampler drew and the learner computes otherwise: 1; at most a cap C; or
    # none outside [1 / C, C]
    correction: Literal["none", "truncated", "masked"]
    correction_level: Literal["token", "sequence"]  # what has a weight of its own
    correction_cap: Annotated[float, Range(1, 1e6)]  # C
    kl: Literal["none", "k1_in_reward", "k3_in_loss"]  # estimator, and what it is added to
    kl_coefficient: Annotated[float, Range(0, 1e6)]  # weight of the divergence from the reference
    # of the sampling policy; log-probabilities are of logits / temperature, and greedy replies have
    # no policy gradient
    temperature: Annotated[float, Range(TEMPERATURE.low, TEMPERATURE.high)]


PAPER = GRPOConfig(
    group_size=8,
    advantage="mean_std",
    std_eps=1e-6,
    dead_groups="keep",
    refill_rounds=0,
    overlong_penalty=0.0,
    overlong_buffer=0.2,
    loss_normalisation="token_mean",
    constant_length=2048,
    importance="token",
    clip_low=0.2,
    clip_high=0.2,
    correction="none",
    correction_level="token",
    correction_cap=2.0,
    kl="k3_in_loss",
    kl_coefficient=0.001,
    temperature=1.0,
)
"""The settings of arXiv 2605.20477 as far as facts are known (group size, KL coefficient); the rest
follows GRPO and common libraries.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Ranged):
    """AdamW with a global-norm clip, a linear warm-up and a constant or cosine learning rate."""

    place = "optimizer."

    learning_rate: Annotated[float, Range(0, 1000)]  # after the warm-up
    # updates until the learning rate is reached
    warmup_steps: Annotated[int, Range(0, 1_000_000_000)] = 0
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate, after the warm-up
    # where "cosine" reaches 0, the warm-up included; 0: at the end of the run; unread by "constant"
    total_steps: Annotated[int, Range(0, 1_000_000_000)] = 0
    b1: Annotated[float, Range(0, 1 - 1e-9)] = 0.9  # decay of the first moments
    b2: Annotated[float, Range(0, 1 - 1e-9)] = 0.999  # decay of the second moments
    eps: Annotated[float, Range(0, 1)] = 1e-8  # added to the root of the second moments
    # of every parameter, norms and biases included
    weight_decay: Annotated[float, Range(0, 1000)] = 0.0
    # of all gradients together; longer ones are scaled down
    max_grad_norm: Annotated[float, Range(1e-9, 1e9)] = 1.0
    # of both moments; "bfloat16" takes half the memory and is rounded at random, so that the small
    # steps of slow averages are not lost
    moments: Literal["float32", "bfloat16"] = "float32"
    # where the moments are between updates; on "host" they pass through the device once an update
    memory: Literal["device", "host"] = "device"

    def __post_init__(self):
        super().__post_init__()
        if self.schedule == "cosine" and self.total_steps and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"optimizer.total_steps must exceed warmup_steps={self.warmup_steps} for a"
                f" cosine, got {self.total_steps}."
            )


PAPER_OPTIMIZER = OptimizerConfig(learning_rate=3e-6)
"""The learning rate of arXiv 2605.20477 for a 7B reflector; the rest is not known and set to common
values.
"""


AttentionName = Literal["auto", "blocks", "plain", "pallas_tpu", "pallas_gpu"]
"""How the update computes attention: as suits the platform; in blocks, on any
platform; with all pairs of tokens in memory, for short rows; by kernels for TPU, or for GPU.
"""


Remat = Literal["none", "projections", "attention", "full"]
"""What the backward pass computes again, beside the input of every layer: nothing; all but queries,
keys, values and the result of attention; all but the result of attention; everything. From left to
right it takes less memory and more time: "full" about a third more than "none".
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerConfig(Ranged):
    """How an update is computed; only `epochs` changes what it computes."""

    place = "learner."

    # gradients are accumulated over so many parts of the batch
    num_microbatches: Annotated[int, Range(1, 65_536)] = 1
    epochs: Annotated[int, Range(1, 1000)] = 1  # optimizer steps on the same batch
    # response positions of each row of tokens whose logits exist at the same time
    positions_per_chunk: Annotated[int, Range(1, 16_777_216)] = 256
    # "auto" chooses by platform; manifest.json says which it was
    attention: AttentionName = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig(Ranged):
    """The closed set of batch shapes: every pair of a token bucket and a response bucket is one
    compiled update.
    """

    place = "batch."

    num_rows: Annotated[int, Range(1, 1_048_576)]  # N
    # T, prompts and replies of a row together; ascending
    token_buckets: Annotated[tuple[int, ...], Range(1, 16_777_216)]
    response_buckets: Annotated[tuple[int, ...], Range(1, 16_777_216)]  # R; ascending
    # candidates in a row; those of one context share one copy of their prompt
    replies_per_row: Annotated[int, Range(1, 65_536)] = 1

    def __post_init__(self):
        super().__post_init__()
        for field in ("token_buckets", "response_buckets"):
            buckets = getattr(self, field)
            if not buckets or list(buckets) != sorted(set(buckets)):
                raise ValueError(
                    f"batch.{field} must be one or more ascending lengths, got {shown(buckets)}."
                )

    @property
    def num_replies(self) -> int:
        """B: the replies that the rows have places for."""
        return self.num_rows * self.replies_per_row
