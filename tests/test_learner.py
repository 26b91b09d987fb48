import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ictjax import grpo
from ictjax.batch import Batch, pack
from ictjax.checkpoint import Checkpointer
from ictjax.config import PAPER, PAPER_OPTIMIZER, BatchConfig, LearnerConfig, OptimizerConfig
from ictjax.learner import (
    ModelFunctions,
    _rounded,
    init_state,
    learning_rate,
    make_optimizer,
    make_update,
    state_shapes,
    token_logprobs,
    transformer_functions,
)
from ictjax.models.config import ModelConfig
from ictjax.models.transformer import forward, init_params, unembed

MODEL = ModelConfig(
    vocab_size=11,
    num_layers=1,
    d_model=8,
    d_ff=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    tie_embeddings=True,
)
GRPO = dataclasses.replace(PAPER, kl_coefficient=0.1)
MEMORIES = ("device", "host")
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
SHAPES = BatchConfig(num_rows=4, token_buckets=(8, 16), response_buckets=(4, 8))


def _grams(params, tokens_nt, seen):
    del seen
    return params["table"][tokens_nt]


BIGRAM = ModelFunctions(forward=_grams, unembed=lambda params, hidden: hidden * params["scale"])
"""The cheapest model there is to compile: the logits of the next token are a row of a table (times
a scale that every chunk shares).
"""


def _bigram_params(seed=0, vocabulary=11):
    return {
        "table": jax.random.normal(jax.random.key(seed), (vocabulary, vocabulary)),
        "scale": jnp.ones(()),
    }


def _batch(config=SHAPES, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 11, size=n).tolist() for n in (2, 3, 1, 4)]
    replies = [rng.integers(1, 11, size=n).tolist() for n in (4, 1, 3, 2)]
    return pack(config, prompts, replies, advantages=[1.0, -0.5, 0.25, -2.0], pad_id=0)


def _sgd_step(config, batch, *, functions=BIGRAM, params=None, learner_config=None, reference=None):
    """The gradient, as the change that plain gradient descent with rate 1 makes, and the
    metrics.
    """
    params = _bigram_params() if params is None else params
    optimizer = optax.sgd(1.0)
    update = make_update(functions, config, optimizer, learner_config or LearnerConfig())
    reference = _bigram_params(seed=1) if reference is None else reference
    state, metrics = update(init_state(params, optimizer), reference, batch)
    return jax.tree.map(jnp.subtract, params, state.params), metrics


def _bigram_logprobs(params, batch, temperature=1.0):
    """The definition, written out without chunks."""
    logits = params["table"] * params["scale"] / temperature
    previous_br = jnp.take_along_axis(
        jnp.asarray(batch.tokens_nt), jnp.asarray(batch.source_br), axis=1
    )
    return jax.nn.log_softmax(logits, axis=-1)[previous_br, batch.target_br]


@pytest.mark.parametrize("positions_per_chunk", [1, 3, 4, 100])
def test_logprobs_and_entropy_do_not_depend_on_the_chunks(positions_per_chunk):
    batch, params = _batch(), _bigram_params()
    logp_br, entropy_br = token_logprobs(
        BIGRAM, params, batch, temperature=0.7, positions_per_chunk=positions_per_chunk
    )
    expected_br = jnp.where(batch.response_mask_br, _bigram_logprobs(params, batch, 0.7), 0.0)
    np.testing.assert_allclose(logp_br, expected_br, atol=1e-6)
    last = batch.tokens_nt[0, batch.source_br[0, 0]]
    probability = jax.nn.softmax(params["table"][last] / 0.7)
    np.testing.assert_allclose(
        entropy_br[0, 0], -(probability * jnp.log(probability)).sum(), rtol=1e-5
    )
    assert (np.asarray(entropy_br)[~batch.response_mask_br] == 0).all()


def test_logprobs_of_the_transformer_are_those_of_full_logits():
    params, batch = init_params(MODEL, jax.random.key(0)), _batch()
    logp_br, _ = token_logprobs(
        transformer_functions(MODEL, remat="full"),
        params,
        batch,
        temperature=1.0,
        positions_per_chunk=3,
    )
    logits_btv = unembed(MODEL, params, forward(MODEL, params, batch.tokens_nt))
    for row in range(3):
        mask = batch.response_mask_br[row]
        expected = jax.nn.log_softmax(logits_btv[row])[
            batch.source_br[row, mask], batch.target_br[row, mask]
        ]
        np.testing.assert_allclose(logp_br[row, mask], expected, atol=1e-5)


def test_no_array_of_the_update_has_the_size_of_all_logits():
    wide = dataclasses.replace(MODEL, vocab_size=499)  # a prime: no other axis can have this size
    batch, params = _batch(), init_params(wide, jax.random.key(0))

    def loss(params):
        return token_logprobs(
            transformer_functions(wide, remat="none"),
            params,
            batch,
            temperature=1.0,
            positions_per_chunk=2,
        )[0].sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert "f32[4,2,499]" in jaxpr
    assert (
        "f32[4,4,499]" not in jaxpr
        and "f32[4,8,499]" not in jaxpr
        and "f32[2,4,2,499]" not in jaxpr
    )


@pytest.mark.parametrize("loss_normalisation", ["token_mean", "sequence_mean", "constant"])
def test_on_policy_gradient_is_reinforce_plus_the_kl(loss_normalisation):
    config = dataclasses.replace(
        GRPO, loss_normalisation=loss_normalisation, constant_length=5, temperature=0.8
    )
    batch, params, reference = _batch(), _bigram_params(), _bigram_params(seed=1)
    coefficient_br = grpo.token_coefficients(
        config, jnp.asarray(batch.response_mask_br), jnp.asarray(batch.weight_b)
    )

    def reinforce(params):
        logp_br, ref_br = (
            _bigram_logprobs(params, batch, 0.8),
            _bigram_logprobs(reference, batch, 0.8),
        )
        k3_br = jnp.exp(ref_br - logp_br) - (ref_br - logp_br) - 1
        return (coefficient_br * (-logp_br * batch.advantage_b[:, None] + 0.1 * k3_br)).sum()

    grads, _ = _sgd_step(config, batch, reference=reference)
    chex.assert_trees_all_close(grads, jax.grad(reinforce)(params), atol=1e-6)


@pytest.mark.parametrize(
    ("loss_normalisation", "importance"),
    [("token_mean", "token"), ("sequence_mean", "sequence"), ("constant", "none")],
)
def test_microbatches_padding_or_order_do_not_change_the_gradient(loss_normalisation, importance):
    config = dataclasses.replace(GRPO, loss_normalisation=loss_normalisation, importance=importance)
    expected, expected_metrics = _sgd_step(config, _batch())
    padded = jax.tree.map(
        lambda x: x[::-1],
        _batch(BatchConfig(num_rows=6, token_buckets=(16,), response_buckets=(8,))),
    )
    for batch, parts in ((_batch(), 4), (padded, 3)):
        grads, metrics = _sgd_step(
            config,
            batch,
            learner_config=LearnerConfig(num_microbatches=parts, positions_per_chunk=3),
        )
        chex.assert_trees_all_close(grads, expected, atol=1e-6)
        chex.assert_trees_all_close(metrics, expected_metrics, atol=1e-5)


@pytest.mark.parametrize("epochs", [1, 2])
def test_parts_of_dropped_groups_are_not_computed(epochs):
    computed = []

    def watched(params, tokens_nt, seen):
        jax.debug.callback(lambda tokens: computed.append(tokens.tolist()), tokens_nt)
        return _grams(params, tokens_nt, seen)

    batch = _batch(BatchConfig(num_rows=6, token_buckets=(16,), response_buckets=(8,)))
    batch.advantage_b[1:3] = 0
    batch.weight_b[1:3] = 0  # two dead groups, and two rows of padding
    arguments = dict(functions=BIGRAM._replace(forward=watched))
    results = []
    for dead_groups in ("keep", "drop"):
        computed.clear()
        results.append(
            _sgd_step(
                dataclasses.replace(GRPO, dead_groups=dead_groups),
                batch,
                learner_config=LearnerConfig(num_microbatches=6, epochs=epochs),
                **arguments,
            )
        )
        jax.effects_barrier()
        parts = 6 if dead_groups == "keep" else 2
        # the reference's, those before the first of several epochs, and each epoch's
        assert len(computed) == parts * (2 if epochs == 1 else 2 + epochs)
    chex.assert_trees_all_close(*results, rtol=1e-6)


def test_padding_does_not_change_the_gradient_of_the_transformer():
    params = init_params(MODEL, jax.random.key(0))
    arguments = dict(
        functions=transformer_functions(MODEL, remat="none"),
        params=params,
        reference=init_params(MODEL, jax.random.key(1)),
    )
    expected, _ = _sgd_step(GRPO, _batch(), **arguments)
    padded = _batch(BatchConfig(num_rows=5, token_buckets=(16,), response_buckets=(8,)))
    grads, _ = _sgd_step(GRPO, padded, **arguments)
    chex.assert_trees_all_close(grads, expected, atol=1e-6)


def _groups():
    """Three contexts with four replies each, one of them empty."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 11, size).tolist() for size in (150, 40, 90)]
    replies = [rng.integers(1, 11, size).tolist() for size in rng.integers(1, 40, 12)]
    replies[5] = []
    arguments = dict(
        prompt_ids=[prompt for prompt in prompts for _ in range(4)],
        reply_ids=replies,
        advantages=rng.normal(size=12).tolist(),
        weights=[1.0] * 11 + [0.0],
        sampler_logprobs=[rng.normal(size=len(reply)).tolist() for reply in replies],
        pad_id=0,
    )
    layouts = {"separate": (12, 1), "shared": (3, 4), "two contexts in a row": (2, 8)}
    return {
        name: pack(
            BatchConfig(
                num_rows=rows,
                replies_per_row=per_row,
                token_buckets=(500,),
                response_buckets=(40,),
            ),
            **arguments,
        )
        for name, (rows, per_row) in layouts.items()
    }


@pytest.mark.parametrize("sliding", [False, True])
def test_a_shared_prompt_changes_neither_loss_nor_gradient(sliding):
    """In float64: the loss, all that its metrics are made of, and the gradients of all weights; with
    old weights and a sampler that are not the ones trained, so that ratios are clipped and
    corrected.
    """
    config = dataclasses.replace(GRPO, correction="truncated", correction_cap=1.2)
    noise_2br = np.random.default_rng(1).normal(scale=0.3, size=(2, 12, 40))
    with jax.enable_x64(True):
        model = dataclasses.replace(
            MODEL,
            num_layers=2,
            dtype="float64",
            sliding_window=30 if sliding else None,
            sliding_layers=(True, False) if sliding else (),
        )
        params, reference = (
            jax.tree.map(
                lambda leaf: leaf.astype(jnp.float64) * 5, init_params(model, jax.random.key(seed))
            )
            for seed in (0, 1)
        )
        functions = transformer_functions(model, remat="full")

        def terms_of(params, batch):
            logp_br, entropy_br = token_logprobs(
                functions, params, batch, temperature=0.8, positions_per_chunk=16
            )
            ref_br, _ = token_logprobs(
                functions, reference, batch, temperature=0.8, positions_per_chunk=16
            )
            mask_br = batch.response_mask_br
            rows = ((0, 0), (0, len(mask_br) - 12), (0, 0))  # of padding
            old_br, sampler_br = jax.lax.stop_gradient(logp_br)[None] + jnp.pad(noise_2br, rows)
            weight = grpo.correction(config, old_br, sampler_br, mask_br)
            terms = grpo.token_loss(
                config, logp_br, old_br, ref_br, batch.advantage_b, mask_br, weight.weight_br
            )
            coefficient_br = grpo.token_coefficients(config, mask_br, batch.weight_b)
            metric_br = grpo.token_mean(mask_br, batch.weight_b)
            counted_br = metric_br > 0
            ratio_br = grpo.ratio_token(old_br, sampler_br, mask_br)
            metrics = {
                "policy_loss": (coefficient_br * terms.policy_br).sum(),
                "clip_fraction": (metric_br * terms.clipped_br).sum(),
                "ratio_mean": (metric_br * terms.ratio_br).sum(),
                "ratio_max": terms.ratio_br.max(),
                "ratio_min": terms.ratio_br.min(),
                "sampler_corrected": (metric_br * weight.changed_br).sum(),
                "sampler_gap_mean": (metric_br * jnp.abs(sampler_br - old_br)).sum(),
                "sampler_gap_max": jnp.where(counted_br, jnp.abs(sampler_br - old_br), 0).max(),
                "sampler_kl": (metric_br * grpo.kl_k3(sampler_br, old_br, mask_br)).sum(),
                "sampler_ratio_mean": (metric_br * ratio_br).sum(),
                "sampler_ratio_max": ratio_br.max(),
                "tokens": counted_br.sum(dtype=jnp.float64),
            }
            by_token = (logp_br[:12], entropy_br[:12], terms.kl_br[:12], terms.ratio_br[:12])
            return (coefficient_br * terms.loss_br).sum(), (metrics, by_token)

        results = {
            name: jax.jit(jax.value_and_grad(terms_of, has_aux=True))(
                params, jax.tree.map(jnp.asarray, batch)
            )
            for name, batch in _groups().items()
        }
        expected = results.pop("separate")
        assert float(optax.tree.norm(expected[1])) > 1
        metrics = expected[0][1][0]
        assert metrics["tokens"] > 100 and metrics["sampler_gap_max"] > 0.3
        assert metrics["ratio_min"] < 0.8 < 1.2 < metrics["ratio_max"]
        for name in ("clip_fraction", "sampler_corrected"):
            assert 0.05 < metrics[name] < 0.95, name
        for found in results.values():
            chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_shared_prompt_is_the_same_update():
    model = dataclasses.replace(MODEL, num_layers=2)
    arguments = dict(
        functions=transformer_functions(model, remat="none"),
        params=init_params(model, jax.random.key(0)),
        reference=init_params(model, jax.random.key(1)),
    )
    groups = _groups()
    expected = _sgd_step(GRPO, groups["separate"], **arguments)
    found = _sgd_step(
        GRPO, groups["shared"], learner_config=LearnerConfig(num_microbatches=3), **arguments
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_without_tokens_changes_nothing_and_is_finite():
    grads, metrics = _sgd_step(GRPO, pack(SHAPES, [], [], advantages=[], pad_id=0))
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["tokens"] == 0 and metrics["skipped"] == 0


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    optimizer = make_optimizer(OPTIMIZER)
    update = make_update(BIGRAM, GRPO, optimizer, LearnerConfig())
    params = _bigram_params()
    batch = _batch()
    state, metrics = update(
        init_state(params, optimizer),
        params,
        batch._replace(advantage_b=np.float32([np.nan, 0, 0, 0])),
    )
    assert (
        metrics["skipped"] == 1
        and metrics["update_norm"] == 0
        and not np.isfinite(metrics["grad_norm"])
    )
    chex.assert_trees_all_equal(state.params, params)
    chex.assert_trees_all_equal(state.opt_state, optimizer.init(params))
    state, metrics = update(state, params, batch)
    assert metrics["skipped"] == 0 and (state.step, state.skipped) == (2, 1)
    chex.assert_trees_all_equal(
        state.params, update(init_state(params, optimizer), params, batch)[0].params
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_value_that_no_loss_depends_on_is_counted(bad):
    batch, params = _batch(), _bigram_params()
    unused = next(i for i in range(11) if i not in batch.tokens_nt)
    params["table"] = params["table"].at[unused, 3].set(bad)
    optimizer = make_optimizer(OPTIMIZER)
    update = make_update(BIGRAM, GRPO, optimizer, LearnerConfig())
    _, metrics = update(init_state(params, optimizer), _bigram_params(), batch)
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0
    assert metrics["bad_leaves"] == 1


def test_metrics_by_hand():
    params, reference, batch = _bigram_params(), _bigram_params(seed=1), _batch()
    logp_br, ref_br = _bigram_logprobs(params, batch), _bigram_logprobs(reference, batch)
    mask = batch.response_mask_br
    sampler_br = np.where(mask, np.asarray(logp_br), 0.0).astype(np.float32)
    sampler_br[0, 1] += 0.5
    grads, metrics = _sgd_step(
        GRPO, batch._replace(sampler_logp_br=sampler_br), params=params, reference=reference
    )
    kl = np.asarray(grpo.kl_k3(logp_br, ref_br, jnp.asarray(mask)))[mask].mean()
    policy_loss = -np.broadcast_to(batch.advantage_b[:, None], mask.shape)[mask].mean()
    expected = {
        "kl": kl,
        "policy_loss": policy_loss,
        "loss": policy_loss + 0.1 * kl,
        "tokens": 10,
        "clip_fraction": 0,
        "ratio_mean": 1,
        "ratio_max": 1,
        "ratio_min": 1,
        "sampler_gap_max": 0.5,
        "sampler_gap_mean": 0.05,
        # of the ten tokens one has exp(-0.5) times the sampler's probability
        "sampler_ratio_max": 1,
        "sampler_ratio_mean": (9 + np.exp(-0.5)) / 10,
        "sampler_kl": (np.exp(-0.5) + 0.5 - 1) / 10,
        "sampler_corrected": 0,
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(grads),
        "skipped": 0,
        "bad_leaves": 0,
    }
    assert metrics.keys() == {*expected, "entropy"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        assert metrics[name].shape == () and metrics[name].dtype == jnp.float32


def test_a_correction_weighs_what_the_sampler_computed_otherwise():
    config = dataclasses.replace(GRPO, kl="none", correction="truncated", correction_cap=1.5)
    batch = _batch()
    logp_br = np.asarray(_bigram_logprobs(_bigram_params(), batch))
    plain, _ = _sgd_step(dataclasses.replace(config, correction="none"), batch)
    # the sampler found every token half as likely as the learner does: weights of 2, cut at 1.5
    sampler_br = np.where(batch.response_mask_br, logp_br - np.log(2), 0.0).astype(np.float32)
    grads, metrics = _sgd_step(config, batch._replace(sampler_logp_br=sampler_br))
    chex.assert_trees_all_close(grads, jax.tree.map(lambda g: 1.5 * g, plain), atol=1e-6)
    assert metrics["sampler_corrected"] == pytest.approx(1)
    np.testing.assert_allclose(metrics["sampler_ratio_mean"], 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["sampler_kl"], 2 - np.log(2) - 1, rtol=1e-4)


def test_a_second_epoch_sees_the_ratio_to_the_weights_of_the_first():
    config = dataclasses.replace(GRPO, kl="none")
    params, batch = _bigram_params(), _batch()
    optimizer = optax.sgd(0.5)
    update = make_update(BIGRAM, config, optimizer, LearnerConfig(epochs=2, num_microbatches=2))
    state, metrics = update(init_state(params, optimizer), None, batch)

    one = make_update(BIGRAM, config, optimizer, LearnerConfig())(
        init_state(params, optimizer), None, batch
    )[0]
    mask_br = jnp.asarray(batch.response_mask_br)
    ratio_br = grpo.ratio_token(
        _bigram_logprobs(one.params, batch), _bigram_logprobs(params, batch), mask_br
    )
    np.testing.assert_allclose(metrics["ratio_max"], ratio_br[mask_br].max(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_min"], ratio_br[mask_br].min(), rtol=1e-5)
    assert metrics["clip_fraction"] > 0 and state.step == 2


def test_the_learner_solves_a_bandit():
    """Two prompts, four arms each, the best arm differs: sample groups, reward the best arm,
    update.
    """
    best = {1: 3, 2: 5}
    config = dataclasses.replace(GRPO, group_size=8, kl_coefficient=0.0)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1))
    update = make_update(BIGRAM, config, optimizer, LearnerConfig(num_microbatches=2))
    params = jax.tree.map(lambda x: 0.1 * x, _bigram_params())
    state = init_state(params, optimizer)
    shapes = BatchConfig(num_rows=16, token_buckets=(2,), response_buckets=(1,))
    rng = np.random.default_rng(0)
    for _ in range(40):
        logits = np.asarray(state.params["table"] * state.params["scale"])
        prompts = [prompt for prompt in best for _ in range(8)]
        replies = [int(np.argmax(logits[prompt] + rng.gumbel(size=11))) for prompt in prompts]
        reward_qg = jnp.asarray(
            [float(best[p] == r) for p, r in zip(prompts, replies, strict=True)]
        ).reshape(2, 8)
        result = grpo.advantages(config, reward_qg, jnp.ones((2, 8), bool))
        batch = pack(
            shapes,
            [[p] for p in prompts],
            [[r] for r in replies],
            advantages=np.ravel(result.advantage_qg).tolist(),
            pad_id=0,
        )
        state, _ = update(state, params, batch)
    final = jax.nn.softmax(state.params["table"] * state.params["scale"], axis=-1)
    assert final[1, 3] > 0.9 and final[2, 5] > 0.9


def test_update_compiles_once_a_shape_and_donates_its_state():
    optimizer = make_optimizer(OPTIMIZER)
    update = make_update(BIGRAM, GRPO, optimizer, LearnerConfig())
    params = _bigram_params()
    first = init_state(params, optimizer)
    state, _ = update(first, params, _batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not params["table"].is_deleted()  # init_state copied it
    for seed in range(2):
        state, _ = update(state, params, _batch(seed=seed))
    assert update._cache_size() == 1
    update(
        state, params, _batch(BatchConfig(num_rows=4, token_buckets=(16,), response_buckets=(4,)))
    )
    assert update._cache_size() == 2


def test_a_resumed_run_is_bit_identical(tmp_path):
    optimizer = make_optimizer(
        dataclasses.replace(OPTIMIZER, warmup_steps=3, schedule="cosine", total_steps=9)
    )
    update = make_update(
        transformer_functions(MODEL, remat="none"),
        GRPO,
        optimizer,
        LearnerConfig(num_microbatches=2),
    )
    params = init_params(MODEL, jax.random.key(0))
    straight, metrics = init_state(params, optimizer), {}
    for step in range(5):
        if step == 2:
            with Checkpointer(tmp_path) as checkpointer:
                checkpointer.save(step, straight, {})
        straight, metrics = update(straight, params, _batch(seed=step))

    template = jax.eval_shape(lambda: init_state(params, optimizer))
    with Checkpointer(tmp_path) as checkpointer:
        resumed, _ = checkpointer.restore(None, template)
    assert resumed.step == 2
    compiled = update._cache_size()
    for step in range(2, 5):
        resumed, resumed_metrics = update(resumed, params, _batch(seed=step))
    chex.assert_trees_all_equal(resumed, straight)
    chex.assert_trees_all_equal(resumed_metrics, metrics)
    # restored arrays are committed to their device: one program more, then no other
    assert update._cache_size() <= compiled + 1


def test_learning_rate_schedules_by_hand():
    def rates(**fields):
        schedule = learning_rate(OptimizerConfig(learning_rate=1.0, **fields))
        return [float(schedule(step)) for step in range(6)]

    np.testing.assert_allclose(rates(), [1] * 6)
    np.testing.assert_allclose(rates(warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(rates(warmup_steps=1), [1] * 6)
    np.testing.assert_allclose(
        rates(schedule="cosine", total_steps=4), [1, 0.853553, 0.5, 0.146447, 0, 0], atol=1e-6
    )
    np.testing.assert_allclose(
        rates(schedule="cosine", warmup_steps=2, total_steps=4), [0.5, 1, 1, 0.5, 0, 0], atol=1e-6
    )
    assert PAPER_OPTIMIZER.learning_rate == 3e-6
    with pytest.raises(ValueError, match="total_steps is 0"):
        rates(schedule="cosine")


def test_optimizer_clips_before_it_adapts():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, max_grad_norm=1.0, eps=1.0))
    params = {"w": jnp.zeros(2)}
    updates, _ = optimizer.update({"w": jnp.asarray([30.0, 40.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1 * 0.6 / 1.6, -0.1 * 0.8 / 1.8], rtol=1e-5)


def test_moments_in_bfloat16_take_half_the_memory_and_follow_those_in_float32():
    params, grads = {"w": jnp.zeros(1000)}, {"w": jnp.full(1000, 0.01)}
    state, steps = {}, {}
    for moments in ("float32", "bfloat16"):
        optimizer = make_optimizer(dataclasses.replace(OPTIMIZER, moments=moments))
        update = jax.jit(optimizer.update)
        state[moments] = optimizer.init(params)
        for _ in range(400):
            steps[moments], state[moments] = update(grads, state[moments], params)
    narrow, wide = (
        {name: optax.tree.get(state[dtype], name)["w"] for name in ("mu", "nu")}
        for dtype in ("bfloat16", "float32")
    )
    for name in ("mu", "nu"):
        assert narrow[name].nbytes * 2 == wide[name].nbytes
        # rounded to nearest, the second moments would stop at a fifth of this
        np.testing.assert_allclose(
            narrow[name].astype(jnp.float32).mean(), wide[name].mean(), rtol=0.01
        )
    np.testing.assert_allclose(steps["bfloat16"]["w"], steps["float32"]["w"], rtol=0.1)


@pytest.mark.parametrize("value", [1.0 + 2**-10, -3e-8, 0.0, np.inf, -np.inf, np.nan])
def test_random_rounding_is_right_in_the_mean_and_leaves_what_is_exact(value):
    rounded = _rounded(jnp.full(4096, value, jnp.float32), jax.random.key(0)).astype(jnp.float32)
    np.testing.assert_allclose(rounded.mean(), value, rtol=2**-12)
    if not value or not np.isfinite(value):
        assert np.array_equal(rounded, np.full(4096, value, np.float32), equal_nan=True)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_moments_on_the_host_change_nothing_and_stay_there(tmp_path, moments):
    config = dataclasses.replace(OPTIMIZER, moments=moments)
    optimizer, batch, reference = make_optimizer(config), _batch(), _bigram_params(seed=1)
    update = make_update(BIGRAM, GRPO, optimizer, LearnerConfig(epochs=2))
    here, there = (init_state(_bigram_params(), optimizer, memory) for memory in MEMORIES)
    template = state_shapes(
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            here.params,
        ),
        optimizer,
        "host",
    )
    for step in range(3):
        here, _ = update(here, reference, batch)
        there, _ = update(there, reference, batch)
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(step, there, {})
            checkpointer.wait()
            there, _ = checkpointer.restore(step, template)
    chex.assert_trees_all_equal(jax.device_get(here), jax.device_get(there))
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(there.opt_state) if leaf.ndim}
    assert kinds == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(there.params)} == {"device"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimizerConfig(learning_rate=-1.0), "learning_rate.*-1.0"),
        (lambda: OptimizerConfig(learning_rate=1.0, schedule="step"), "schedule.*'step'"),
        (
            lambda: OptimizerConfig(
                learning_rate=1.0, schedule="cosine", warmup_steps=5, total_steps=5
            ),
            "total_steps.*got 5",
        ),
        (lambda: OptimizerConfig(learning_rate=1.0, b2=1.0), "b2.*1.0"),
        (lambda: OptimizerConfig(learning_rate=1.0, max_grad_norm=0.0), "max_grad_norm.*0.0"),
        (lambda: LearnerConfig(epochs=0), "epochs.*0"),
        (
            lambda: _sgd_step(GRPO, _batch(), learner_config=LearnerConfig(num_microbatches=3)),
            "4 rows do not divide into 3",
        ),
        (
            lambda: make_update(BIGRAM, GRPO, optax.sgd(1.0), LearnerConfig())(
                init_state(_bigram_params(), optax.sgd(1.0)), None, _batch()
            ),
            "reference",
        ),
        (
            lambda: init_state({"w": jnp.zeros(2, jnp.bfloat16)}, optax.sgd(1.0)),
            r"\['w'\] is bfloat16",
        ),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
