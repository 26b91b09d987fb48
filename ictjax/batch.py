"""Ragged prompts and replies -> one training batch of numpy arrays, whose shape comes from a closed
set of buckets.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ictjax import grpo
from ictjax.config import BatchConfig, GRPOConfig
from ictjax.records import Candidate

A = TypeVar("A", np.ndarray, Array)


class Batch(NamedTuple, Generic[A]):
    """One batch of an update: rows of prompt + reply, padded on the right (R: response positions of
    a row).

    Logits are needed at response positions only, so these are listed: the r-th sampled token of row
    b is `target_br`, and the hidden state that predicts it is the one of token `source_br`. Masked
    entries are zeros. Rows that only pad the batch hold one valid pad token (so that no attention
    is over nothing), no response and weight 0. A is the type of the arrays: NumPy as `pack` makes
    them, JAX in an update.
    """

    tokens_bt: Int[A, "B T"]
    positions_bt: Int[A, "B T"]
    valid_bt: Bool[A, "B T"]
    source_br: Int[A, "B R"]
    target_br: Int[A, "B R"]
    response_mask_br: Bool[A, "B R"]
    advantage_b: Float[A, "B"]
    weight_b: Float[A, "B"]  # of the row in the loss and in the metrics
    # as the sampler reported them: a diagnostic, never part of the loss
    sampler_logp_br: Float[A, "B R"]


def pack(
    config: BatchConfig,
    prompt_ids: Sequence[Sequence[int]],
    reply_ids: Sequence[Sequence[int]],
    *,
    advantages: Sequence[float],
    pad_id: int,
    weights: Sequence[float] | None = None,
    sampler_logprobs: Sequence[Sequence[float]] | None = None,
) -> Batch[np.ndarray]:
    """Packs samples, in their order, into the smallest bucket that holds all of them; rows up to
    `config.num_rows` are padding.

    Args:
      config: the shapes to choose from.
      prompt_ids: what each reply was sampled after; at least one token each.
      reply_ids: the sampled tokens, the stop token included. An empty reply makes a row without
        loss.
      advantages: one per sample.
      pad_id: the token at padding.
      weights: of each row in the loss; 1 unless given.
      sampler_logprobs: one per token of each reply; zeros unless given.

    Raises:
      ValueError: too many samples, lists of different lengths, an empty prompt, or a sample longer
        than the largest bucket.
    """
    weights = [1.0] * len(prompt_ids) if weights is None else weights
    sampler_logprobs = (
        [[0.0] * len(reply) for reply in reply_ids]
        if sampler_logprobs is None
        else sampler_logprobs
    )
    for name, values in (
        ("reply_ids", reply_ids),
        ("advantages", advantages),
        ("weights", weights),
        ("sampler_logprobs", sampler_logprobs),
    ):
        if len(values) != len(prompt_ids):
            raise ValueError(
                f"Every sample needs one entry of each list: got {len(prompt_ids)} prompts and"
                f" {len(values)} {name}."
            )
    if len(prompt_ids) > config.num_rows:
        raise ValueError(
            f"{len(prompt_ids)} samples do not fit {config.num_rows} rows: raise"
            " batch.num_rows or pack fewer."
        )
    for row, (prompt, reply, logprobs) in enumerate(
        zip(prompt_ids, reply_ids, sampler_logprobs, strict=True)
    ):
        if not prompt:
            raise ValueError(
                f"Sample {row} has an empty prompt: the first token of its reply has nothing to be"
                " predicted from."
            )
        if len(logprobs) != len(reply):
            raise ValueError(
                f"Sample {row} has {len(reply)} reply tokens and {len(logprobs)} sampler"
                " log-probabilities: give one each."
            )

    num_tokens = bucket(
        config.token_buckets,
        [len(p) + len(r) for p, r in zip(prompt_ids, reply_ids, strict=True)],
        "token_buckets",
    )
    num_responses = bucket(
        config.response_buckets, [len(reply) for reply in reply_ids], "response_buckets"
    )
    rows = config.num_rows
    batch = Batch(
        tokens_bt=np.full((rows, num_tokens), pad_id, np.int32),
        positions_bt=np.broadcast_to(
            np.arange(num_tokens, dtype=np.int32), (rows, num_tokens)
        ).copy(),
        valid_bt=np.zeros((rows, num_tokens), bool),
        source_br=np.zeros((rows, num_responses), np.int32),
        target_br=np.zeros((rows, num_responses), np.int32),
        response_mask_br=np.zeros((rows, num_responses), bool),
        advantage_b=np.zeros(rows, np.float32),
        weight_b=np.zeros(rows, np.float32),
        sampler_logp_br=np.zeros((rows, num_responses), np.float32),
    )
    batch.valid_bt[:, 0] = True
    for row, (prompt, reply) in enumerate(zip(prompt_ids, reply_ids, strict=True)):
        total = len(prompt) + len(reply)
        batch.tokens_bt[row, :total] = [*prompt, *reply]
        batch.valid_bt[row, :total] = True
        batch.source_br[row, : len(reply)] = np.arange(len(prompt) - 1, total - 1)
        batch.target_br[row, : len(reply)] = reply
        batch.response_mask_br[row, : len(reply)] = True
        batch.sampler_logp_br[row, : len(reply)] = sampler_logprobs[row]
    batch.advantage_b[: len(advantages)] = advantages
    batch.weight_b[: len(weights)] = weights
    return batch


def bucket(buckets: Sequence[int], lengths: Sequence[int], name: str) -> int:
    """The smallest bucket that holds the longest of `lengths` (the first if there are none);
    ValueError if none does.
    """
    longest = max(lengths, default=0)
    for size in buckets:
        if longest <= size:
            return size
    raise ValueError(
        f"Sample {list(lengths).index(longest)} needs {longest} tokens, more than the largest of"
        f" batch.{name} {tuple(buckets)}: add a larger bucket, or shorten the prompt or the"
        " reply."
    )


def pack_groups(
    config: BatchConfig,
    estimator: GRPOConfig,
    groups: Sequence[Sequence[Candidate]],
    pad_id: int,
) -> tuple[Batch, int]:
    """The update's batch of all candidates with their group-relative advantages, and how many
    groups hold no signal.
    """
    reward_qg = np.array(
        [[0.0 if c.reward is None else c.reward for c in group] for group in groups], np.float32
    )
    valid_qg = np.array([[c.reward is not None for c in group] for group in groups])
    result = jax.device_get(grpo.advantages(estimator, reward_qg, valid_qg))
    candidates = [candidate for group in groups for candidate in group]
    batch = pack(
        config,
        [candidate.prompt_ids for candidate in candidates],
        [candidate.reply_ids for candidate in candidates],
        advantages=result.advantage_qg.ravel().tolist(),
        weights=result.weight_qg.ravel().tolist(),
        sampler_logprobs=[candidate.logprobs for candidate in candidates],
        pad_id=pad_id,
    )
    return batch, int(result.dead_q.sum())
