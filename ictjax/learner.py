"""The policy-gradient update: token log-probabilities in chunks, microbatched gradients, one jitted
and donated step. Pure.

Nothing here builds [B, T, V] logits: hidden states are gathered at the response positions, and the
vocabulary is visited one chunk of positions at a time, and in the backward pass again.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from jaxtyping import Array, Float, Int

from ictjax import grpo
from ictjax.batch import Batch
from ictjax.config import GRPOConfig, LearnerConfig, LoraConfig, OptimizerConfig, Remat
from ictjax.mesh import hidden_sharding, place
from ictjax.models import transformer
from ictjax.models.attention import BLOCKS, Attention, Seen
from ictjax.models.config import ModelConfig
from ictjax.models.lora import with_adapter

Params = Any  # a pytree of arrays
Metrics = dict[str, Float[Array, ""]]


_HOST_MEMORY = "pinned_host"  # what `jax.memory.Space.Host` is as the memory of a sharding


def _trained_alone(trained: Params, base: Params | None) -> Params:
    del base
    return trained


class ModelFunctions(NamedTuple):
    """What the learner needs of a model, as pure functions."""

    forward: Callable[[Params, Array, Seen], Array]  # (params, tokens_nt, seen) -> hidden_ntd
    unembed: Callable[..., Array]  # (params, hidden_bcd) -> float32 logits_bcv
    # (trained, base) -> the params of the policy being trained
    combine: Callable[[Params, Params | None], Params] = _trained_alone


def transformer_functions(
    config: ModelConfig,
    *,
    remat: Remat,
    lora: LoraConfig | None = None,
    mesh: Mesh | None = None,
    attention: Attention = BLOCKS,
) -> ModelFunctions:
    """The shipped decoder.

    Args:
      remat: what the backward pass computes again.
      lora: what is trained is an adapter of the base, if its rank is above 0; None trains all
        weights.
      mesh: hidden states are split on it, see `ictjax.mesh.hidden_sharding`.
      attention: how it is computed, on that mesh.
    """

    def forward(params: Params, tokens_nt: Array, seen: Seen) -> Array:
        return transformer.forward(
            config,
            params,
            tokens_nt,
            seen=seen,
            remat=remat,
            activations=None if mesh is None else hidden_sharding(mesh, tokens_nt.shape[1]),
            attention=attention,
        )

    def combine(adapter: Params, base: Params | None) -> Params:
        if lora is None or base is None:
            raise ValueError(
                "An adapter is trained without its base: pass the frozen weights to the update."
            )
        return with_adapter(lora, base, adapter)

    adapted = lora is not None and lora.rank > 0
    return ModelFunctions(
        forward=forward,
        unembed=functools.partial(transformer.unembed, config),
        combine=combine if adapted else _trained_alone,
    )


class LearnerState(NamedTuple):
    """Everything an update changes; checkpoint it whole."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]  # optimizer steps tried
    skipped: Int[Array, ""]  # of these, left out because a gradient was not finite


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The schedule as a function of the optimizer steps taken. The first step of a warm-up over n
    steps has rate 1/n, not 0. Raises ValueError for a cosine of no length.
    """
    warm_up = optax.linear_schedule(
        config.learning_rate / max(config.warmup_steps, 1),
        config.learning_rate,
        max(config.warmup_steps - 1, 1),
    )
    if config.schedule == "cosine":
        if not config.total_steps:
            raise ValueError(
                "optimizer.total_steps is 0: give the length of the cosine, or take"
                " TrainConfig.whole_optimizer."
            )
        after = optax.cosine_decay_schedule(
            config.learning_rate, config.total_steps - config.warmup_steps
        )
    else:
        after = optax.constant_schedule(config.learning_rate)
    return (
        optax.join_schedules([warm_up, after], [config.warmup_steps])
        if config.warmup_steps
        else after
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; its moments in the dtype of `config.moments`."""
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    adamw = optax.chain(
        adam if config.moments == "float32" else _in_bfloat16(adam),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam with moments that are kept in bfloat16 and computed in float32.

    A second moment moves by a thousandth a step, and bfloat16 resolves a 256th: rounded to nearest
    it would never move again. So it is rounded up or down at random, right in the mean
    (stochastic rounding, https://arxiv.org/abs/1502.02551), with bits that depend on the step only.
    """

    def cast(state: optax.OptState, dtype: Any) -> optax.OptState:
        return jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            state,
        )

    def init(params: Params) -> optax.OptState:
        return cast(adam.init(params), jnp.bfloat16)

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, optax.OptState]:
        updates, state = adam.update(updates, cast(state, jnp.float32), params)
        key = jax.random.fold_in(jax.random.key(0), optax.tree.get(state, "count"))
        leaves, structure = jax.tree.flatten(state)
        rounded = [
            _rounded(leaf, jax.random.fold_in(key, index)) if leaf.dtype == jnp.float32 else leaf
            for index, leaf in enumerate(leaves)
        ]
        return updates, jax.tree.unflatten(structure, rounded)

    return optax.GradientTransformation(init, update)


def _rounded(x: Array, key: Array) -> Array:
    """float32 as bfloat16, whose bits are the upper half: up with the probability of the rest."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rest = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = ((bits + rest) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    memory: Literal["device", "host"] = "device",
) -> LearnerState:
    """A fresh state of what is trained: all weights, or an adapter.

    Copies `params`: updates donate their state, and the caller's weights often serve as the
    reference. On a mesh the moments lie like their weights, and everything else of the state is on
    every device.

    Args:
      params: float32.
      optimizer: whose moments are kept.
      memory: where they are kept between updates: with the weights, or in the host's memory.

    Raises:
      ValueError: weights that are not float32. At learning rates of 1e-6 every update of a bfloat16
        weight would be rounded away; activations may be bfloat16 (`ModelConfig.dtype`), and so may
        the reference.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            raise ValueError(
                f"Trained weights must be float32, {jax.tree_util.keystr(path)} is {leaf.dtype}:"
                ' set param_dtype="float32".'
            )
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    zero = jnp.zeros((), jnp.int32)
    state = LearnerState(
        params=params, opt_state=optimizer.init(params), step=zero, skipped=jnp.zeros((), jnp.int32)
    )
    mesh = _mesh_of(params)
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        state = jax.tree.map(
            lambda leaf: (
                leaf if isinstance(leaf.sharding, NamedSharding) else place(leaf, everywhere)
            ),
            state,
        )
    if memory == "host":
        moments = optax.tree_map_params(
            optimizer.init,
            lambda leaf: jax.device_put(leaf, jax.memory.Space.Host),
            state.opt_state,
        )
        state = state._replace(opt_state=moments)
    return state


def _mesh_of(params: Params) -> Mesh | None:
    """The mesh that arrays lie on; None where they do not, or are only traced."""
    for leaf in jax.tree.leaves(params):
        sharding = None if isinstance(leaf, jax.core.Tracer) else leaf.sharding
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def token_logprobs(
    functions: ModelFunctions,
    params: Params,
    batch: Batch,
    *,
    temperature: float,
    positions_per_chunk: int,
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Log-probabilities of the sampled tokens, and the entropy of the distribution each was drawn
    from (nats; no gradient).

    Both are of softmax(logits / temperature) in float32, before any top-k or top-p: what the
    sampler reports. Zeros at masked positions.

    The logits of `positions_per_chunk` response positions of every row of tokens exist at a time,
    and none of positions that no reply has; `jax.checkpoint` makes the backward pass compute them
    again instead of keeping them all. The gradient of the vocabulary matrix is accumulated over the
    chunks in the dtype of that matrix (float32, see `init_state`).
    """
    seen = Seen(batch.positions_nt, batch.context_nt, batch.branch_nt)
    hidden_ntd = functions.forward(params, batch.tokens_nt, seen)
    rows = hidden_ntd.shape[0]

    # The response positions of all replies of a row, P in all. Chunks run over positions, not rows:
    # a batch sharded over its rows stays where it is.
    def in_chunks(x_np: Array) -> Array:
        size = min(positions_per_chunk, x_np.shape[1])
        x_np = jnp.pad(x_np, ((0, 0), (0, -x_np.shape[1] % size), *[(0, 0)] * (x_np.ndim - 2)))
        return x_np.reshape(rows, -1, size, *x_np.shape[2:]).swapaxes(0, 1)

    source_np, target_np, mask_np = (
        x_br.reshape(rows, -1)
        for x_br in (batch.source_br, batch.target_br, batch.response_mask_br)
    )
    hidden_npd = jnp.take_along_axis(hidden_ntd, source_np[:, :, None], axis=1)

    def logits_of(hidden_ncd: Array, target_nc: Array) -> tuple[Array, Array]:
        logits_ncv = functions.unembed(params, hidden_ncd) / temperature
        norm_nc = jax.nn.logsumexp(logits_ncv, axis=-1)
        chosen_nc = jnp.take_along_axis(logits_ncv, target_nc[:, :, None], axis=-1)[:, :, 0]
        frozen_ncv = jax.lax.stop_gradient(logits_ncv - norm_nc[:, :, None])
        return chosen_nc - norm_nc, -(jnp.exp(frozen_ncv) * frozen_ncv).sum(axis=-1)

    def chunk(inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden_ncd, target_nc, mask_nc = inputs
        wide = jax.eval_shape(logits_of, hidden_ncd, target_nc)[0].dtype
        nothing_nc = jnp.zeros(target_nc.shape, wide)
        return jax.lax.cond(
            mask_nc.any(),
            logits_of,
            lambda *_: (nothing_nc, nothing_nc),
            hidden_ncd,
            target_nc,
        )

    logp_pnc, entropy_pnc = jax.lax.map(
        jax.checkpoint(chunk), (in_chunks(hidden_npd), in_chunks(target_np), in_chunks(mask_np))
    )

    def by_reply(x_pnc: Array) -> Array:
        x_np = x_pnc.swapaxes(0, 1).reshape(rows, -1)[:, : target_np.shape[1]]
        return jnp.where(batch.response_mask_br, x_np.reshape(batch.target_br.shape), 0.0)

    return by_reply(logp_pnc), by_reply(entropy_pnc)


def make_update(
    functions: ModelFunctions,
    config: GRPOConfig,
    optimizer: optax.GradientTransformation,
    learner_config: LearnerConfig,
    *,
    shardings: LearnerState | None = None,
) -> Wrapped:
    """Builds `update(state, base, batch) -> (state, metrics)`: jitted, one compilation per batch
    shape, `state` donated.

    `base` is what is never trained: the reference policy of the KL term, and the trunk of an
    adapter. It may be shared with samplers (it is not donated), must not share buffers with the
    state, and may be None when neither use is there. Gradients are of `state.params` alone. With
    `dead_groups` "drop", microbatches without any reply that has weight are not computed.

    The old log-probabilities are recomputed here from the weights the update starts with, so the
    result depends on (state, base, batch) and not on how the sampler batched: unless `correction`
    is on, whose weights are relative to what the sampler reported. On a mesh give
    `shardings`, those of the state (`state_shardings`): the new state then lies as the old.

    A step whose loss or gradient is not finite changes neither the weights nor the optimizer state,
    and is counted; so are the weights that are not finite afterwards.

    Metrics, float32 scalars of the last epoch over the whole batch: `loss`, `policy_loss` and `kl`
    (k3, without its coefficient) under the configured normalisation; `entropy` (nats),
    `clip_fraction`, `ratio_mean` and `sampler_gap_mean` (absolute difference to the sampler's
    log-probabilities) as means over tokens; `ratio_max`, `ratio_min`, `sampler_gap_max`; likewise
    `sampler_ratio_mean` and `_max` (learner's to sampler's probability), `sampler_kl` (k3, of the
    sampler from the learner) and `sampler_corrected` (share of tokens whose weight was bounded);
    `grad_norm` before the clip; `update_norm`; `tokens` in the loss; `skipped`, summed over the
    epochs of this update; `bad_leaves`, how many leaves of the new weights are not finite.

    Raises, when it is first called with a shape:
      ValueError: the rows do not divide into the microbatches, or the reference is missing.
    """
    parts = learner_config.num_microbatches
    # Nothing of a part whose replies all have no weight is in any sum: dead groups, and padding.
    skips = config.dead_groups == "drop"
    logprobs = functools.partial(
        token_logprobs,
        functions,
        temperature=config.temperature,
        positions_per_chunk=learner_config.positions_per_chunk,
    )

    def split(rows: int, x: Array) -> Array:
        # Row i, with its replies, goes to part i mod parts: with rows sharded in blocks, every
        # device keeps its own rows in every part.
        per_row = x.shape[0] // rows
        x = x.reshape(rows // parts, parts, per_row, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(parts, -1, *x.shape[3:])

    def loss_of(
        trained: Params, base: Params | None, part: _Part
    ) -> tuple[Array, tuple[Metrics, Metrics]]:
        logp_br, entropy_br = logprobs(functions.combine(trained, base), part.batch)
        old_logp_br = (
            jax.lax.stop_gradient(logp_br) if part.old_logp_br is None else part.old_logp_br
        )
        mask_br = part.batch.response_mask_br
        sampler_logp_br = part.batch.sampler_logp_br
        correction = grpo.correction(config, old_logp_br, sampler_logp_br, mask_br)
        terms = grpo.token_loss(
            config,
            logp_br,
            old_logp_br,
            part.ref_logp_br,
            part.batch.advantage_b,
            mask_br,
            None if config.correction == "none" else correction.weight_br,
        )
        loss = (part.loss_coefficient_br * terms.loss_br).sum()
        gap_br = jnp.abs(sampler_logp_br - old_logp_br)
        sampler_ratio_br = grpo.ratio_token(old_logp_br, sampler_logp_br, mask_br)
        sampler_kl_br = grpo.kl_k3(sampler_logp_br, old_logp_br, mask_br)
        counted_br = part.metric_coefficient_br > 0
        sums = {
            "loss": loss,
            "policy_loss": (part.loss_coefficient_br * terms.policy_br).sum(),
            "kl": (part.loss_coefficient_br * terms.kl_br).sum(),
            "entropy": (part.metric_coefficient_br * entropy_br).sum(),
            "clip_fraction": (part.metric_coefficient_br * terms.clipped_br).sum(),
            "ratio_mean": (part.metric_coefficient_br * terms.ratio_br).sum(),
            "sampler_gap_mean": (part.metric_coefficient_br * gap_br).sum(),
            "sampler_ratio_mean": (part.metric_coefficient_br * sampler_ratio_br).sum(),
            "sampler_kl": (part.metric_coefficient_br * sampler_kl_br).sum(),
            "sampler_corrected": (part.metric_coefficient_br * correction.changed_br).sum(),
            "tokens": counted_br.sum(dtype=jnp.float32),
        }
        maxima = {
            "ratio_max": jnp.where(counted_br, terms.ratio_br, -jnp.inf).max(),
            # negated back below
            "ratio_min": jnp.where(counted_br, -terms.ratio_br, -jnp.inf).max(),
            "sampler_gap_max": jnp.where(counted_br, gap_br, 0.0).max(),
            "sampler_ratio_max": jnp.where(counted_br, sampler_ratio_br, -jnp.inf).max(),
        }
        return loss, (sums, maxima)

    def as_weights(grads: Params) -> Params:
        """Accumulated where the state is: every device adds up its own part only."""
        if shardings is None:
            return grads
        return jax.lax.with_sharding_constraint(grads, shardings.params)

    def step(
        state: LearnerState, base: Params | None, parts_of_batch: _Part
    ) -> tuple[LearnerState, Metrics]:
        def accumulate(carry: Any, part: _Part) -> tuple[Any, None]:
            def added(carry: Any) -> Any:
                grads, sums, maxima = carry
                (_, (part_sums, part_maxima)), part_grads = jax.value_and_grad(
                    loss_of, has_aux=True
                )(state.params, base, part)
                grads = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, part_grads)
                return (
                    as_weights(grads),
                    jax.tree.map(jnp.add, sums, part_sums),
                    jax.tree.map(jnp.maximum, maxima, part_maxima),
                )

            if not skips:
                return added(carry), None
            return jax.lax.cond(_counts(part.batch), added, lambda carry: carry, carry), None

        zero_grads = as_weights(
            jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
        )
        zero_sums = {name: jnp.zeros((), jnp.float32) for name in _SUMS}
        lowest = {name: jnp.full((), -jnp.inf, jnp.float32) for name in _MAXIMA}
        lowest["sampler_gap_max"] = jnp.zeros((), jnp.float32)
        (grads, sums, maxima), _ = jax.lax.scan(
            accumulate, (zero_grads, zero_sums, lowest), parts_of_batch
        )

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss"])
        old_opt_state = _on_device(state.opt_state)
        updates, opt_state = optimizer.update(grads, old_opt_state, state.params)
        update_norm = jnp.where(finite, optax.tree.norm(updates), 0.0)
        params = optax.apply_updates(state.params, updates)

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(finite, new, old)

        skipped = 1 - finite.astype(jnp.int32)
        params = jax.tree.map(keep, params, state.params)
        bad_leaves = sum(~jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        new_state = LearnerState(
            params=params,
            opt_state=_like(state.opt_state, jax.tree.map(keep, opt_state, old_opt_state)),
            step=state.step + 1,
            skipped=state.skipped + skipped,
        )
        empty = sums["tokens"] == 0
        metrics = {
            **sums,
            "ratio_max": jnp.where(empty, 1.0, maxima["ratio_max"]),
            "ratio_min": jnp.where(empty, 1.0, -maxima["ratio_min"]),
            "sampler_gap_max": maxima["sampler_gap_max"],
            "sampler_ratio_max": jnp.where(empty, 1.0, maxima["sampler_ratio_max"]),
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "skipped": skipped.astype(jnp.float32),
            "bad_leaves": jnp.asarray(bad_leaves, jnp.float32),
        }
        return new_state, metrics

    def update(
        state: LearnerState, base: Params | None, batch: Batch
    ) -> tuple[LearnerState, Metrics]:
        rows = batch.tokens_nt.shape[0]
        if rows % parts:
            raise ValueError(
                f"{rows} rows do not divide into {parts} microbatches: choose a divisor."
            )
        if base is None and config.kl != "none":
            raise ValueError(
                f"kl={config.kl!r} needs the parameters of the reference policy; pass them or set"
                ' kl="none".'
            )
        in_parts = functools.partial(split, rows)
        split_batch = jax.tree.map(in_parts, batch)

        def frozen_logprobs(params: Params) -> Array:
            def of_part(part: Batch[Array]) -> Array:
                return logprobs(params, part)[0]

            def skipping(part: Batch[Array]) -> Array:
                nothing = jnp.zeros(part.target_br.shape, jnp.float32)
                return jax.lax.cond(_counts(part), of_part, lambda _: nothing, part)

            return jax.lax.map(skipping if skips else of_part, split_batch)

        parts_of_batch = _Part(
            batch=split_batch,
            loss_coefficient_br=in_parts(
                grpo.token_coefficients(config, batch.response_mask_br, batch.weight_b)
            ),
            metric_coefficient_br=in_parts(grpo.token_mean(batch.response_mask_br, batch.weight_b)),
            # In a single epoch the weights being trained are the old ones: their log-probabilities
            # come with the loss.
            old_logp_br=(
                frozen_logprobs(functions.combine(state.params, base))
                if learner_config.epochs > 1
                else None
            ),
            ref_logp_br=None if config.kl == "none" else frozen_logprobs(base),
        )
        state, metrics = jax.lax.scan(
            lambda s, _: step(s, base, parts_of_batch), state, length=learner_config.epochs
        )
        last = {name: values[-1] for name, values in metrics.items()}
        return state, last | {"skipped": metrics["skipped"].sum()}

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def _counts(part: Batch[Array]) -> Array:
    """Whether any reply has weight."""
    return (part.weight_b > 0).any()


def state_shapes(
    params: Params,
    optimizer: optax.GradientTransformation,
    memory: Literal["device", "host"] = "device",
) -> LearnerState:
    """`init_state` on shapes alone: moments lie like their weights, everything else is on every
    device.

    Args:
      params: ShapeDtypeStructs with shardings.
      optimizer: whose state it is.
      memory: of the moments.
    """
    first = jax.tree.leaves(params)[0].sharding
    mesh = getattr(first, "mesh", None)
    rest = first if mesh is None else NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    moments = optax.tree_map_params(
        optimizer.init,
        lambda leaf, weight: placed(
            leaf,
            weight.sharding
            if memory == "device"
            else weight.sharding.with_memory_kind(_HOST_MEMORY),
        ),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: placed(leaf, rest),
    )
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=rest)
    return LearnerState(params=params, opt_state=moments, step=count, skipped=count)


def state_shardings(state: LearnerState) -> LearnerState | None:
    """Where every leaf of a state on a mesh lies, of arrays or shapes; None on one device."""
    if not any(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(state)):
        return None
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _on_device(tree: Any) -> Any:
    """With what is in the host's memory brought to where it is computed with."""
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.memory.Space.Device) if _on_host(leaf) else leaf, tree
    )


def _like(places: Any, tree: Any) -> Any:
    """With those leaves in the host's memory that are there in `places`."""
    return jax.tree.map(
        lambda place, leaf: (
            jax.device_put(leaf, jax.memory.Space.Host) if _on_host(place) else leaf
        ),
        places,
        tree,
    )


def _on_host(leaf: Array) -> bool:
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


_SUMS = (
    "loss",
    "policy_loss",
    "kl",
    "entropy",
    "clip_fraction",
    "ratio_mean",
    "sampler_gap_mean",
    "sampler_ratio_mean",
    "sampler_kl",
    "sampler_corrected",
    "tokens",
)
_MAXIMA = ("ratio_max", "ratio_min", "sampler_gap_max", "sampler_ratio_max")


class _Part(NamedTuple):
    """One microbatch, or all of them stacked along a leading axis, with what was computed over the
    whole batch.
    """

    batch: Batch
    loss_coefficient_br: Float[Array, "B R"]
    metric_coefficient_br: Float[Array, "B R"]
    old_logp_br: Float[Array, "B R"] | None
    ref_logp_br: Float[Array, "B R"] | None
