"""Supervised training of a pocket model: next-token cross-entropy on weighted targets, rows
bucketed by length.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.pocket.data import Row, pad_rows
from ictjax.models.attention import plain_rows
from ictjax.models.config import ModelConfig
from ictjax.models.transformer import Params, forward, unembed


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how fast to train. A step sees about `tokens_per_step` tokens, all rows of one
    length bucket.
    """

    steps: int
    tokens_per_step: int
    learning_rate: float
    warmup_steps: int = 50
    weight_decay: float = 0.05
    buckets: tuple[int, ...] = (64, 128, 192, 256, 384, 512)
    keep_every: int = 0  # steps between calls of `keep`; 0: never


def batches(
    draw_row: Callable[[int], Row], config: FitConfig, pad_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields `config.steps` batches. `draw_row(step)` makes one row; rows wait in their bucket
    until it fills a batch.
    """
    waiting: dict[int, list[Row]] = {bucket: [] for bucket in config.buckets}
    for step in range(config.steps):
        while True:
            row = draw_row(step)
            bucket = next((b for b in config.buckets if b >= len(row.ids)), None)
            if bucket is None:
                raise ValueError(
                    f"A row has {len(row.ids)} tokens; the largest bucket holds"
                    f" {config.buckets[-1]}."
                )
            waiting[bucket].append(row)
            if len(waiting[bucket]) * bucket >= config.tokens_per_step:
                yield pad_rows(waiting[bucket], bucket, pad_id)
                waiting[bucket] = []
                break


def fit(
    model: ModelConfig,
    params,
    draw_row: Callable[[int], Row],
    config: FitConfig,
    *,
    pad_id: int,
    report: Callable[[int, float, float], None],
    keep: Callable[[Params], None] | None = None,
):
    """Trains `params` (consumed) and returns the new ones.

    `report(step, loss, accuracy)` is called every step; accuracy is the share of weighted targets
    that greedy decoding hits. `keep(params)` gets the weights every `config.keep_every` steps; it
    must not hold on to them.
    """
    steps = max(config.steps, 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup_steps, steps - 1),  # of a few steps all but the last
        steps,
        end_value=config.learning_rate * 0.05,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay),
    )
    opt_state = optimizer.init(params)

    def loss_fn(params, ids_bt, weights_bt, valid_bt):
        hidden_btd = forward(model, params, ids_bt, seen=plain_rows(valid_bt))
        logits_btv = unembed(model, params, hidden_btd[:, :-1])
        targets_bt, weights_bt = ids_bt[:, 1:], weights_bt[:, 1:]
        losses_bt = optax.softmax_cross_entropy_with_integer_labels(logits_btv, targets_bt)
        total = weights_bt.sum()
        accuracy = (weights_bt * (logits_btv.argmax(-1) == targets_bt)).sum() / total
        return (weights_bt * losses_bt).sum() / total, accuracy

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, ids_bt, weights_bt, valid_bt):
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, ids_bt, weights_bt, valid_bt
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, jnp.stack([loss, accuracy])

    pending = None  # the previous step's figures: reading them one step late keeps the device busy
    for step, batch in enumerate(batches(draw_row, config, pad_id)):
        params, opt_state, figures = update(params, opt_state, *batch)
        if pending is not None:
            report(step - 1, *map(float, pending))
        pending = figures
        if keep is not None and config.keep_every and (step + 1) % config.keep_every == 0:
            keep(params)
    if pending is not None:
        report(config.steps - 1, *map(float, pending))
    return params
