"""Shapes of models to measure with, and the benchmark of the update against its peers."""

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench_run import (
    Design,
    Note,
    Result,
    interleave,
    ratio,
)
from experiments.bench_trl import Episodes, check_installed, trl_design
from experiments.commands.bench import UpdateBench
from experiments.memory import Use, check_fits, weights_use
from experiments.roofline import (
    PRODUCT_SIZE,
    jax_product,
    product_flops,
    product_matrix,
    time_products,
)
from experiments.shapes import PUBLISHED
from ictjax import grpo
from ictjax.batch import Batch, pack
from ictjax.config import (
    PAPER,
    BatchConfig,
    GRPOConfig,
    LearnerConfig,
    OptimizerConfig,
)
from ictjax.learner import (
    LearnerState,
    ModelFunctions,
    init_state,
    make_optimizer,
    make_update,
    transformer_functions,
)
from ictjax.models.attention import Seen
from ictjax.models.config import ModelConfig
from ictjax.models.hf import save_checkpoint
from ictjax.models.transformer import PROJECTION_AXES, init_params


def _published(name: str) -> ModelConfig:
    """The shape of a published model, its head untied as those of the others."""
    return dataclasses.replace(PUBLISHED[name].with_dtype("float32"), tie_embeddings=False)


# Random weights of these shapes. Heads are untied: a random tied model repeats its last token, and
# equal greedy replies would say little.
_POCKET = ModelConfig(
    vocab_size=512,
    num_layers=4,
    d_model=128,
    d_ff=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope_theta=10_000.0,
    max_positions=16_384,
)
SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "pocket": _POCKET,
        "4x256": dataclasses.replace(
            _POCKET,
            vocab_size=4096,
            d_model=256,
            d_ff=768,
            head_dim=64,
        ),
        "8x512": dataclasses.replace(
            _POCKET,
            vocab_size=4096,
            num_layers=8,
            d_model=512,
            d_ff=1536,
            num_heads=8,
            head_dim=64,
        ),
        "medium": dataclasses.replace(
            _POCKET,
            vocab_size=32_768,
            num_layers=8,
            d_model=512,
            d_ff=1536,
            num_heads=8,
            num_kv_heads=2,
            head_dim=64,
        ),
        "qwen2.5-0.5b": dataclasses.replace(
            _POCKET,
            vocab_size=151_936,
            num_layers=24,
            d_model=896,
            d_ff=4864,
            num_heads=14,
            num_kv_heads=2,
            head_dim=64,
            rope_theta=1_000_000.0,
        ),
        "qwen2.5-1.5b": _published("Qwen/Qwen2.5-1.5B-Instruct"),
        "qwen2.5-7b": _published("Qwen/Qwen2.5-7B-Instruct"),
    }
)


def tokens_use(count: int) -> Use:
    """Of what `check_fits` counts: tokens as Python holds them."""
    return _use(f"{count:,} random tokens", 40 * count)  # a number of Python and its place


def _use(what: str, num_bytes: int) -> Use:
    return Use(what, "weights", frozenset(), None, num_bytes, num_bytes, 1)


def full_logits_update(
    functions: ModelFunctions, config: GRPOConfig, optimizer: optax.GradientTransformation
) -> Callable[[LearnerState, Any, Batch], tuple[LearnerState, dict[str, jax.Array]]]:
    """The peer: log_softmax over the logits of every position, [N, T, V] in float32, and then a
    gather of the sampled tokens. Rows hold one reply each.
    """

    def logprobs(params: Any, batch: Batch) -> jax.Array:
        seen = Seen(batch.positions_nt, batch.context_nt, batch.branch_nt)
        logp_ntv = jax.nn.log_softmax(
            functions.unembed(params, functions.forward(params, batch.tokens_nt, seen))
            / config.temperature,
            axis=-1,
        )
        logp_nrv = jnp.take_along_axis(logp_ntv, batch.source_br[:, :, None], axis=1)
        logp_nr = jnp.take_along_axis(logp_nrv, batch.target_br[:, :, None], axis=-1)[:, :, 0]
        return jnp.where(batch.response_mask_br, logp_nr, 0.0)

    def update(
        state: LearnerState, ref_params: Any, batch: Batch
    ) -> tuple[LearnerState, dict[str, jax.Array]]:
        ref_logp_br = logprobs(ref_params, batch)
        coefficient_br = grpo.token_coefficients(config, batch.response_mask_br, batch.weight_b)

        def loss_of(params: Any) -> jax.Array:
            logp_br = logprobs(params, batch)
            old_logp_br = jax.lax.stop_gradient(logp_br)
            terms = grpo.token_loss(
                config, logp_br, old_logp_br, ref_logp_br, batch.advantage_b, batch.response_mask_br
            )
            return (coefficient_br * terms.loss_br).sum()

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return (
            LearnerState(
                params=params, opt_state=opt_state, step=state.step + 1, skipped=state.skipped
            ),
            metrics,
        )

    return update


class UpdateSizes(NamedTuple):
    """What is learned from in one step: `groups` prompts with `group_size` replies each."""

    groups: int
    group_size: int
    prompt: int  # tokens of each
    reply: int  # tokens of each

    @property
    def samples(self) -> int:
        return self.groups * self.group_size

    @property
    def tokens(self) -> int:
        """Of all sequences: a shared prompt counts once for every reply."""
        return self.samples * (self.prompt + self.reply)


def update_flops(config: ModelConfig, sizes: UpdateSizes, *, copies: int) -> float:
    """What an optimizer step needs: 2 for each weight and token it is multiplied with and 4 x heads
    x head size for each pair of tokens of which one sees the other, four times: forward, twice as
    much backward, and the reference. The head is needed where replies are predicted. Not counted
    is what is computed a second time to save memory, and pairs that are masked.

    Args:
      copies: of each prompt, 1 or one for every reply.
    """
    # a reply's last token is only predicted
    computed = sizes.reply - 1
    replies = sizes.samples * computed
    prompts = sizes.groups * copies
    pairs = (
        prompts * sizes.prompt * (sizes.prompt + 1) / 2
        + replies * sizes.prompt
        + replies * (computed + 1) / 2
    )
    head = config.vocab_size * config.d_model
    axes = config.weight_axes[1]
    layers = sum(
        math.prod(config.axis_sizes[axis] for axis in axes[name]) for name in PROJECTION_AXES
    )
    forward = (
        2.0 * layers * (prompts * sizes.prompt + replies)
        + 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs
        + 2.0 * head * sizes.samples * sizes.reply
    )
    return 4 * forward


def bench_update(bench: UpdateBench, note: Note) -> Result:
    """Sequences and tokens per second, compile time and memory of one optimizer step."""
    if bench.against == "trl":
        check_installed()
    default = _AGAINST_TRL if bench.against == "trl" else _ALONE
    shape = bench.shape or default.shape
    config = dataclasses.replace(
        SHAPES[shape], vocab_size=bench.vocab_size or SHAPES[shape].vocab_size
    )
    sizes = UpdateSizes(
        bench.groups,
        bench.group_size,
        bench.prompt or default.prompt,
        bench.reply or default.reply,
    )
    length, samples = sizes.prompt + sizes.reply, sizes.samples
    if length > config.max_positions:
        raise ValueError(
            f"A sequence has {length} tokens, the model {config.max_positions} positions: lower"
            " --prompt or --reply."
        )
    if bench.groups % bench.microbatches:
        raise ValueError(
            f"--groups {bench.groups} do not divide into --microbatches {bench.microbatches}:"
            " choose a divisor."
        )
    peer = bench.against != "nothing"
    check_fits(
        "Weights, states, tokens and logits",
        [
            *[weights_use("weights", config)] * 2,
            # of the learner, one for every design: weights and two moments
            *[weights_use("weights and moments of a design", config)] * 3 * (2 + peer),
            tokens_use(samples * length),
            _use("logits of all positions", peer * 4 * samples * length * config.vocab_size),
        ],
        "Give fewer --groups, a smaller --group-size, --shape or --vocab-size, or --against"
        " nothing.",
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (bench.groups, sizes.prompt)).tolist()
    episodes = Episodes(
        prompts=[prompt for prompt in prompts for _ in range(bench.group_size)],
        replies=rng.integers(0, config.vocab_size, (samples, sizes.reply)).tolist(),
        advantages=rng.normal(size=samples).tolist(),
    )

    def packed(replies_per_row: int) -> Batch:
        tokens = sizes.prompt + replies_per_row * (sizes.reply - 1)
        shapes = BatchConfig(
            num_rows=samples // replies_per_row,
            replies_per_row=replies_per_row,
            token_buckets=(tokens,),
            response_buckets=(sizes.reply,),
        )
        return jax.device_put(
            pack(
                shapes,
                episodes.prompts,
                episodes.replies,
                advantages=episodes.advantages,
                pad_id=0,
            )
        )

    optimizer_config = OptimizerConfig(learning_rate=1e-5)
    functions, optimizer = (
        transformer_functions(config, remat="none"),
        make_optimizer(optimizer_config),
    )
    params = init_params(config, jax.random.key(0))
    reference = init_params(config, jax.random.key(1))
    update = make_update(
        functions, PAPER, optimizer, LearnerConfig(num_microbatches=bench.microbatches)
    )
    shared, separate = packed(bench.group_size), packed(1)
    updates = {"shared prompt": (update, shared), "separate rows": (update, separate)}
    if bench.against == "all-positions":
        updates["all positions"] = full_logits_update(functions, PAPER, optimizer), separate
    designs: dict[str, Design] = {}
    compile_s, peak_bytes = {}, {}
    for name, (update, batch) in updates.items():
        note(f"{name}: compiling")
        state = init_state(params, optimizer)
        start = time.perf_counter()
        program = jax.jit(update, donate_argnums=0).lower(state, reference, batch).compile()
        compile_s[name] = time.perf_counter() - start
        peak_bytes[name] = _peak_bytes(program)
        designs[name] = _Steps(program, state, reference, batch).run
    notes = []
    products: dict[str, Design] = {}
    if bench.against == "trl":
        with tempfile.TemporaryDirectory() as folder:
            policy, frozen = (f"{folder}/{name}" for name in ("policy", "reference"))
            save_checkpoint(policy, config, params)
            save_checkpoint(frozen, config, reference)
            note("TRL: threads")
            designs["TRL"], threads = trl_design(
                policy,
                frozen,
                episodes,
                config=PAPER,
                optimizer=optimizer_config,
                microbatches=bench.microbatches,
            )
        notes.append(threads)
        products = _products()
    baseline = list(designs)[-1]
    seconds, metrics = interleave(designs | products, bench.repetitions, note)
    rates = {name: product_flops() / min(seconds[name]) for name in products}
    rows = []
    for name in designs:
        median_s, peak = statistics.median(seconds[name]), peak_bytes.get(name)
        copies = 1 if name == "shared prompt" else bench.group_size
        rate = update_flops(config, sizes, copies=copies) / min(seconds[name])
        rows.append(
            {
                "design": name,
                "seconds": median_s,
                "sequences_per_s": samples / median_s,
                "tokens_per_s": sizes.tokens / median_s,
                "gflop_per_s": rate / 1e9,
                "of_products": rate / max(rates.values()) if rates else None,
                "compile_s": compile_s.get(name),
                "memory_mib": None if peak is None else peak / 2**20,
                "loss": metrics[name]["loss"],
                "grad_norm": metrics[name]["grad_norm"],
                "speedup": ratio(seconds, name, baseline),
            }
        )
    title = (
        f"GRPO update, {shape}: {bench.groups} x {bench.group_size} sequences of"
        f" {sizes.prompt} + {sizes.reply} tokens, vocabulary {config.vocab_size}"
    )
    notes += [
        "Tokens are those of the sequences: a shared prompt counts once for every reply.",
        "Loss and gradient norm are of the first step, from equal weights. Memory: arguments,"
        " results and temporaries by the compiler.",
        "gflop/s: of the fastest step. 4 x (2 x weights of layers x tokens computed + 4 x layers x"
        " heads x head size x pairs seen + 2 x weights of the head x tokens of replies).",
    ]
    if rates:
        notes.append(
            f"of products: share of the faster product of two float32 [{PRODUCT_SIZE},"
            f" {PRODUCT_SIZE}], fastest of each: "
            + ", ".join(f"{name} {rate / 1e9:.0f} gflop/s" for name, rate in rates.items())
            + "."
        )
    return Result(title, baseline, rows, notes)


class _Sizes(NamedTuple):
    shape: str
    prompt: int
    reply: int


# Where the command line does not say. Against TRL: 8 layers x 512, and 1,024 tokens a sequence.
_ALONE = _Sizes("pocket", 320, 64)
_AGAINST_TRL = _Sizes("medium", 896, 128)


def _products() -> dict[str, Design]:
    """Matrix products, by JAX and by PyTorch: what this machine can do."""
    import torch  # an optional package, needed here only

    with_torch = torch.from_numpy(product_matrix())
    calls = {"JAX": jax_product(), "PyTorch": lambda: with_torch @ with_torch}
    return {
        name: lambda product=product: (time_products(product), None)
        for name, product in calls.items()
    }


class _Steps:
    """Runs one optimizer step after the other; the state is donated from step to step."""

    def __init__(self, program: Any, state: LearnerState, reference: Any, batch: Batch):
        self._program, self._state, self._reference, self._batch = program, state, reference, batch

    def run(self) -> tuple[float, dict[str, float]]:
        start = time.perf_counter()
        self._state, metrics = self._program(self._state, self._reference, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - start, {
            name: float(metrics[name]) for name in ("loss", "grad_norm")
        }


def _peak_bytes(program: Any) -> int | None:
    """Bytes of arguments, results and temporaries, donated buffers once; None where the compiler
    does not say.
    """
    found = program.memory_analysis()
    names = (
        "argument_size_in_bytes",
        "output_size_in_bytes",
        "temp_size_in_bytes",
        "alias_size_in_bytes",
    )
    if any(not hasattr(found, name) for name in names):
        return None
    arguments, results, temporaries, aliased = (getattr(found, name) for name in names)
    return arguments + results + temporaries - aliased
