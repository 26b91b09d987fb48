"""The parts that a run is configured by, one frozen record for every consumer: mesh, adapter,
sampler, rollout, reflector, meta-environment, loss, optimizer, learner and batch.

Standard library only, so that commands can show every setting without loading JAX. Each record
checks its own values when it is built; messages name fields as the command line does.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The sizes of a mesh; their product is the number of devices. All 1: the default device,
    without a mesh.
    """

    data: int = 1  # copies of the frozen weights, each with rows of its own
    fsdp: int = 1  # parts that the width of the weights is split into
    tensor: int = 1  # parts that heads, feed-forward and vocabulary are split into

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) < 1:
                raise ValueError(f"mesh {name} is {getattr(self, name)}: give at least 1")

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.data * self.fsdp * self.tensor


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
# devices are copies (data).
MESHES: Mapping[str, RoleMeshes] = MappingProxyType(
    {
        "h200": _both(),
        "v5e-8": _both(data=2, tensor=4),
        "v5e-16": _both(data=4, tensor=4),
        "v6e-8": _both(data=2, tensor=4),
        "v5p-8": _both(tensor=4),  # the name counts cores: four chips, which are JAX's devices
    }
)


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections of a decoder layer, which an adapter may be put on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What of a model is trained: an adapter of this rank, or with rank 0 all weights."""

    rank: int = 0  # 0 trains all weights
    alpha: float = 32.0  # the addition is scaled by alpha / rank
    targets: tuple[str, ...] = PROJECTIONS  # projections of every layer

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(
                f"lora.rank is {self.rank}: give 0 (train all weights) or a positive rank"
            )
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha is {self.alpha}: give a positive number")
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
class EndpointConfig:
    """An OpenAI-compatible chat endpoint, and how it is called."""

    url: str = ""  # base URL, for example http://localhost:8000/v1; empty: there is no endpoint
    # the environment variable that holds the key; the key itself is written nowhere
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 16  # calls under way at the same time
    timeout_s: float = 120.0  # of one try
    max_retries: int = 5  # after 408, 409, 429, 5xx and cut connections
    first_wait_s: float = 0.5  # before a try is repeated; doubled each time
    seeded: bool = True  # send a seed, so that servers that know seeds repeat themselves
    tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    input_price: float = 0.0  # of a million tokens, in any currency
    output_price: float = 0.0

    def __post_init__(self) -> None:
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint.url is {self.url!r}: give http://... or https://...")
        if self.concurrency < 1:
            raise ValueError(f"endpoint.concurrency is {self.concurrency}: give at least 1")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"endpoint.timeout_s is {self.timeout_s}: give a number of seconds")
        for name in ("max_retries", "first_wait_s", "input_price", "output_price"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"endpoint.{name} is {getattr(self, name)}: give 0 or more")
        if self.tokens_parameter not in ("max_tokens", "max_completion_tokens"):
            raise ValueError(
                f"endpoint.tokens_parameter is {self.tokens_parameter!r}: give max_tokens or"
                " max_completion_tokens"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Sizes of the sampler. Every combination of buckets is one compiled program, so keep them
    few.
    """

    num_slots: int  # conversations that hold a row of the KV cache at once
    max_len: int  # tokens of one conversation, prompt and replies
    # tokens appended per row in one dispatch; longer input goes in pieces
    extend_buckets: tuple[int, ...]
    row_buckets: tuple[int, ...]  # rows of one dispatch
    decode_steps: int  # tokens sampled per row in one dispatch that continues generations
    max_top_k: int  # likeliest ids that top-k and top-p can see
    extend_steps: int = 1  # tokens sampled per row in one dispatch that first appends tokens
    # cache positions attended to; max_len is always one; doubling from 128 unless given
    attended_buckets: tuple[int, ...] = ()
    max_stop_ids: int = 4  # per request

    def __post_init__(self) -> None:
        for name in ("num_slots", "decode_steps", "extend_steps", "max_top_k", "max_stop_ids"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.max_len < 2:
            raise ValueError(f"max_len is {self.max_len}: a conversation needs at least 2 tokens")
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
                raise ValueError(f"{name} is {sizes}: give ascending sizes from {low} to {high}")

    @property
    def attended(self) -> tuple[int, ...]:
        """The attended lengths, ascending, `max_len` last."""
        sizes = self.attended_buckets or tuple(
            128 << power for power in range(self.max_len.bit_length())
        )
        return (*(size for size in sizes if size < self.max_len), self.max_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the actor plays. Limits: per episode (`max_steps`), per turn (`max_turn_tokens`), and the
    sampler's context for both together.
    """

    max_steps: int  # actions until an episode ends
    max_turn_tokens: int  # of one reply of the actor
    temperature: float = 0.0  # of the actor; 0 is greedy
    top_k: int = 0  # sample from so many likeliest tokens; 0 is off
    top_p: float = 1.0  # sample from the likeliest tokens of this mass; 1 is off
    show_actions: bool = False  # list the available actions below each observation
    # starts this long wait for the first episode of their system prompt, whose prefix they then
    # share; read by a model's speaker
    share_min_tokens: int = 256
    # how long to wait for more environment answers before decoding without them
    gather_s: float = 0.002

    def __post_init__(self):
        for name in ("max_steps", "max_turn_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"task.rollout.{name} must be at least 1, got {getattr(self, name)}."
                )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"task.rollout.temperature must be 0 (greedy) or above, got {self.temperature}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReflectorConfig:
    """How episodes are shown to the reflector, and the limits of what it writes. Lengths are in the
    reflector's tokens.
    """

    style: Literal["full", "compact"]  # "compact" is for word-level pocket models
    # budget of the conversation before the reply; middle turns are dropped to meet it
    max_context_tokens: int
    max_reply_tokens: int
    max_prompt_tokens: int  # a longer improved prompt counts as PROMPT_TOO_LONG
    head_turns: int | None = None  # turns shown from the start of an episode; None shows all
    tail_turns: int | None = None  # turns shown from its end; None shows all
    show_thoughts: bool = False  # of the actor, in the episodes that the reflector reads

    def __post_init__(self):
        if self.style not in ("full", "compact"):
            raise ValueError(f"reflection.style must be 'full' or 'compact', got {self.style!r}.")
        for name in ("max_context_tokens", "max_reply_tokens", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"reflection.{name} must be at least 1, got {getattr(self, name)}."
                )
        if (self.head_turns is None) != (self.tail_turns is None):
            raise ValueError(
                "reflection.head_turns and reflection.tail_turns are set together: give both, or"
                " neither to show all turns."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """What a context is and how a candidate is rewarded."""

    contexts_per_iteration: int  # what one update learns from
    games_per_context: int  # k: games the reflector reads, and those of the replay reward
    # other games of the family, the same for all candidates of a context; may outnumber k
    fresh_games: int
    # reward = replay_weight * replay + (1 - replay_weight) * fresh; 1 is the paper's reward
    replay_weight: float
    meta_turns: int  # after as many prompts a loop restarts with the initial prompt
    # contexts of the current reflector, or of the base reflector before training (the paper)
    collection: Literal["online", "precollected"]
    precollected_loops: int  # read by "precollected" only
    malformed_reward: float  # of a reply without a usable prompt; a won game is 1, a lost one 0

    def __post_init__(self):
        for name in ("contexts_per_iteration", "games_per_context", "meta_turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"meta.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.replay_weight <= 1:
            raise ValueError(
                f"meta.replay_weight must lie between 0 and 1, got {self.replay_weight}."
            )
        if self.replay_weight < 1 and self.fresh_games < 1:
            raise ValueError(
                "meta.fresh_games must be at least 1 when meta.replay_weight is below 1, got"
                f" {self.fresh_games}."
            )
        if self.collection not in ("online", "precollected"):
            raise ValueError(
                f"meta.collection must be 'online' or 'precollected', got {self.collection!r}."
            )
        if self.collection == "precollected" and self.precollected_loops < 1:
            raise ValueError(
                "meta.precollected_loops must be at least 1 for precollected contexts, got"
                f" {self.precollected_loops}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """What the estimator is. No field has a default: each one changes the gradient. Raises
    ValueError for values out of range.
    """

    group_size: int  # candidates per context
    # what rewards are centred and scaled with, within their group
    advantage: Literal["mean", "mean_std"]
    std_eps: float  # added to the standard deviation; not read by "mean"
    # groups without signal: "keep" them in the normalisers and the KL term, or give them no weight
    dead_groups: Literal["keep", "drop"]
    loss_normalisation: Literal["token_mean", "sequence_mean", "constant"]
    constant_length: int  # tokens every sequence is divided by; read by "constant" only
    importance: Literal["none", "token", "sequence"]  # of what the ratio of policies is taken
    clip_low: float  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float  # see clip_low
    kl: Literal["none", "k1_in_reward", "k3_in_loss"]  # estimator, and what it is added to
    kl_coefficient: float  # weight of the divergence from the reference
    temperature: float  # of the sampling policy; log-probabilities are of logits / temperature

    def __post_init__(self):
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"grpo.{field} must be one of {', '.join(allowed)}, got"
                    f" {getattr(self, field)!r}."
                )
        _require(
            self.group_size >= 2,
            "group_size",
            self.group_size,
            "at least 2: a group of one has no relative advantage",
        )
        _require(self.std_eps >= 0, "std_eps", self.std_eps, "0 or more")
        _require(
            self.constant_length >= 1, "constant_length", self.constant_length, "at least 1 token"
        )
        _require(
            0 <= self.clip_low <= 1,
            "clip_low",
            self.clip_low,
            "in [0, 1]: a ratio is never negative",
        )
        _require(self.clip_high >= 0, "clip_high", self.clip_high, "0 or more")
        _require(self.kl_coefficient >= 0, "kl_coefficient", self.kl_coefficient, "0 or more")
        _require(
            self.temperature > 0,
            "temperature",
            self.temperature,
            "above 0: greedy replies have no policy gradient",
        )


_CHOICES = {
    "advantage": ("mean", "mean_std"),
    "dead_groups": ("keep", "drop"),
    "loss_normalisation": ("token_mean", "sequence_mean", "constant"),
    "importance": ("none", "token", "sequence"),
    "kl": ("none", "k1_in_reward", "k3_in_loss"),
}


def _require(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:  # written so that NaN, for which every comparison is false, is refused too
        raise ValueError(f"grpo.{field} must be {expected}, got {value}.")


PAPER = GRPOConfig(
    group_size=8,
    advantage="mean_std",
    std_eps=1e-6,
    dead_groups="keep",
    loss_normalisation="token_mean",
    constant_length=2048,
    importance="token",
    clip_low=0.2,
    clip_high=0.2,
    kl="k3_in_loss",
    kl_coefficient=0.001,
    temperature=1.0,
)
"""The settings of arXiv 2605.20477 as far as facts are known (group size, KL coefficient); the rest
follows GRPO and common libraries.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a global-norm clip, a linear warm-up and a constant or cosine learning rate."""

    learning_rate: float  # after the warm-up
    warmup_steps: int = 0  # updates until the learning rate is reached
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up
    # where "cosine" reaches 0, the warm-up included; 0: at the end of the run; unread by "constant"
    total_steps: int = 0
    b1: float = 0.9  # decay of the first moments
    b2: float = 0.999  # decay of the second moments
    eps: float = 1e-8  # added to the root of the second moments
    weight_decay: float = 0.0  # of every parameter, norms and biases included
    max_grad_norm: float = 1.0  # of all gradients together; longer ones are scaled down

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(
                f"optimizer.schedule must be constant or cosine, got {self.schedule!r}."
            )
        for field in ("learning_rate", "warmup_steps", "total_steps", "eps", "weight_decay"):
            if not getattr(self, field) >= 0:
                raise ValueError(
                    f"optimizer.{field} must be 0 or more, got {getattr(self, field)}."
                )
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(
                    f"optimizer.{field} must be in [0, 1), got {getattr(self, field)}."
                )
        if not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm must be above 0, got {self.max_grad_norm}.")
        if self.schedule == "cosine" and self.total_steps and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"optimizer.total_steps must exceed warmup_steps={self.warmup_steps} for a"
                f" cosine, got {self.total_steps}."
            )


PAPER_OPTIMIZER = OptimizerConfig(learning_rate=3e-6)
"""The learning rate of arXiv 2605.20477 for a 7B reflector; the rest is not known and set to common
values.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How an update is computed; only `epochs` changes what it computes."""

    num_microbatches: int = 1  # gradients are accumulated over so many parts of the batch
    epochs: int = 1  # optimizer steps on the same batch
    # response positions of each row whose logits exist at the same time
    positions_per_chunk: int = 256

    def __post_init__(self):
        for field in ("num_microbatches", "epochs", "positions_per_chunk"):
            if getattr(self, field) < 1:
                raise ValueError(f"learner.{field} must be at least 1, got {getattr(self, field)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The closed set of batch shapes: every pair of a token bucket and a response bucket is one
    compiled update.
    """

    num_rows: int  # candidates of one update
    token_buckets: tuple[int, ...]  # T, prompt and reply together; ascending
    response_buckets: tuple[int, ...]  # R; ascending

    def __post_init__(self):
        if self.num_rows < 1:
            raise ValueError(f"batch.num_rows must be at least 1, got {self.num_rows}.")
        for field in ("token_buckets", "response_buckets"):
            buckets = getattr(self, field)
            if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
                raise ValueError(
                    f"batch.{field} must be one or more ascending lengths of at least 1, got"
                    f" {buckets}."
                )
