"""How long a run takes, from counted work, public peaks and stated efficiencies.

Every number here is arithmetic on shapes; nothing is measured.
"""

from collections.abc import Iterator
from typing import NamedTuple

from experiments.assumptions import Assumptions
from experiments.machines import Chip
from experiments.memory import uses
from experiments.shapes import model_shape
from ictjax.config import SamplerConfig
from ictjax.models.config import ModelConfig
from ictjax.run_config import TrainConfig


class Work(NamedTuple):
    """What a phase of one iteration does, summed over all devices unless said otherwise."""

    phase: str
    tokens: int
    flops: float
    device_bytes: float  # that one device reads and writes in its memory
    runs: float  # of its program


class Times(NamedTuple):
    """Seconds that parts of a device need for a phase of one iteration."""

    products: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """Of the phase: products and memory work side by side, and what is sent is waited for."""
        return max(self.products, self.memory) + self.interconnect

    @property
    def limit(self) -> str:
        """The part that needs longest."""
        return max(self._fields, key=lambda part: getattr(self, part))


class Episode(NamedTuple):
    """Lengths of what is played, in tokens."""

    turns: int
    sampled: int
    whole: int


def episode(config: TrainConfig, assumed: Assumptions) -> Episode:
    """One game of the actor, cut to its context."""
    rollout = config.task.rollout
    turns = assumed.turns or rollout.max_steps
    reply = min(assumed.reply_tokens, rollout.max_turn_tokens)
    whole = assumed.prompt_tokens + turns * (assumed.observation_tokens + reply)
    limit = config.actor_sampler.max_len
    share = min(1.0, limit / whole)
    return Episode(
        turns=max(int(turns * share), 1),
        sampled=max(int(turns * reply * share), 1),
        whole=min(whole, limit),
    )


def context_tokens(config: TrainConfig, assumed: Assumptions) -> int:
    """What the reflector reads: the episodes of a context, cut to its budget."""
    games = config.meta.games_per_context * episode(config, assumed).whole
    return min(games, config.reflection.max_context_tokens)


def reply_tokens(config: TrainConfig, assumed: Assumptions) -> int:
    """What the reflector writes, a reply."""
    most = config.reflection.max_reply_tokens
    return min(assumed.reflection_tokens or max(most // 2, 1), most)


def episodes_per_iteration(config: TrainConfig) -> int:
    """Games played in one iteration: new contexts, where they are collected online, and rewards."""
    meta, candidates = config.meta, config.meta.contexts_per_iteration * config.grpo.group_size
    rewarded = (meta.games_per_context if meta.replay_weight > 0 else 0) + (
        meta.fresh_games if meta.replay_weight < 1 else 0
    )
    online = meta.contexts_per_iteration * meta.games_per_context
    return candidates * rewarded + (online if meta.collection == "online" else 0)


def work(config: TrainConfig, assumed: Assumptions) -> Iterator[Work]:
    """The phases of one iteration, in their order."""
    meta, played = config.meta, episode(config, assumed)
    held = {part: use.device_bytes for use in uses(config) for part in use.parts}
    games = episodes_per_iteration(config)
    if not config.actor.endpoint.url:
        yield from _sampling(
            "actor",
            model_shape(config.actor),
            config.actor_sampler,
            copies=config.actor.mesh.data,
            own=(min(assumed.prompt_tokens, played.whole) + played.whole) // 2,
            shared=0,
            sharing=1,
            appended=games * (played.whole - played.sampled),
            sampled=games * played.sampled,
            length=played.whole,
            weight_bytes=held["actor weights"],
            cache_bytes=held["actor cache"],
        )
    prompt, reply = context_tokens(config, assumed), reply_tokens(config, assumed)
    reflector = model_shape(config.reflector)
    replies = meta.contexts_per_iteration * config.grpo.group_size
    yield from _sampling(
        "reflector",
        reflector,
        config.reflector_sampler,
        copies=config.reflector.mesh.data,
        own=reply,
        shared=prompt,
        sharing=config.grpo.group_size,
        appended=meta.contexts_per_iteration * prompt,  # forked, not repeated
        sampled=replies * reply,
        length=prompt + reply,
        weight_bytes=held["reflector weights"],
        cache_bytes=held["reflector cache"],
    )
    yield _update(config, reflector, held, prompt, reply)


def update_passes(config: TrainConfig) -> float:
    """FLOPs of an update, in units of weights x tokens: 2 for each pass that multiplies tokens with
    weights. Forward, and again where layers are recomputed; the gradient of activations; that of
    weights, unless only an adapter is trained; the reference.
    """
    epochs = config.learner.epochs
    once = 2 + (2 if config.remat != "none" else 0) + 2 + (0 if config.reflector.lora.rank else 2)
    old = 2 if epochs > 1 else 0
    return once * epochs + old + (2 if config.grpo.kl != "none" else 0)


def times(one: Work, chip: Chip, devices: int, sent: int, assumed: Assumptions) -> Times:
    """What each part of a device has to do.

    Args:
      devices: that the phase runs on.
      sent: bytes that one of them sends in one run of the phase's program.
    """
    return Times(
        products=one.flops / devices / (chip.flops * assumed.compute_efficiency),
        memory=one.device_bytes / (chip.bandwidth * assumed.bandwidth_efficiency),
        interconnect=sent * one.runs / (chip.interconnect * assumed.bandwidth_efficiency),
    )


def matrix_weights(model: ModelConfig) -> int:
    """Weights that every token is multiplied with: all but a table that is only looked up in."""
    table = 0 if model.tie_embeddings else model.vocab_size * model.d_model
    return model.num_params - table


def _attention(model: ModelConfig, tokens: float, seen: float) -> float:
    """FLOPs of one forward pass: two products of 2 x heads x head size for every pair."""
    return 4.0 * model.num_layers * model.num_heads * model.head_dim * tokens * seen


def _sampling(
    name: str,
    model: ModelConfig,
    sizes: SamplerConfig,
    *,
    copies: int,
    own: int,
    shared: int,
    sharing: int,
    appended: int,
    sampled: int,
    length: int,
    weight_bytes: int,
    cache_bytes: int,
) -> Iterator[Work]:
    """Prefill and decode of one role. A decode step reads the weights and the positions that are
    attended to, of every conversation in flight: over pages those that it holds, and as many are in
    flight as the pages hold, of `own` tokens each and `shared` ones for every `sharing` of them.
    """
    size = matrix_weights(model)
    rows, positions = sizes.cache_rows(copies)
    if sizes.page_size:
        attended = -(-length // positions) * positions
        in_flight = max(
            number
            for number in range(1, sizes.num_slots + 1)
            if number * own + -(-number // sharing) * shared <= rows * positions or number == 1
        )
    else:
        attended = next((bound for bound in sizes.attended if bound >= length), sizes.max_len)
        in_flight = sizes.num_slots
    dispatch = sizes.row_buckets[-1] * sizes.extend_buckets[-1]
    prefills, steps = appended / dispatch, sampled / in_flight
    read = weight_bytes + cache_bytes * in_flight * attended / (rows * positions)
    yield Work(
        phase=f"{name} prefill",
        tokens=appended,
        flops=2.0 * size * appended + _attention(model, appended, attended),
        device_bytes=prefills * read,
        runs=prefills,
    )
    yield Work(
        phase=f"{name} decode",
        tokens=sampled,
        flops=2.0 * size * sampled + _attention(model, sampled, attended),
        device_bytes=steps * read,
        runs=steps / sizes.decode_steps,
    )


def _update(
    config: TrainConfig, model: ModelConfig, held: dict[str, int], prompt: int, reply: int
) -> Work:
    """Rows are as long as their bucket; half of the pairs of a row are seen."""
    rows, per_row = config.batch.num_rows, config.batch.replies_per_row
    longest = max(per_row // config.grpo.group_size, 1) * prompt + per_row * reply
    tokens = next(size for size in config.batch.token_buckets if size >= longest)
    passes = update_passes(config)
    backward = config.learner.epochs  # of attention: twice the forward pass and a half, recomputed
    attention = _attention(model, rows * tokens, tokens / 2) * (passes / 2 + backward)
    reads = held.get("base", 0) + held["trained"]
    state = 2 * (held["trained"] + 2 * held["optimizer"])
    return Work(
        phase="update",
        tokens=rows * tokens,
        flops=passes * matrix_weights(model) * rows * tokens + attention,
        device_bytes=config.learner.num_microbatches * reads * passes / 2 + state,
        runs=1,
    )
