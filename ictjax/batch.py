"""Ragged prompts and replies -> one training batch of numpy arrays, whose shape comes from a closed
set of buckets.
"""

import dataclasses
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
    """One batch of an update: N rows of tokens, padded on the right, that hold B = N x
    `BatchConfig.replies_per_row` replies (R: response positions of a reply). Reply b lies in row
    b // replies_per_row.

    A row holds each prompt once, before all its replies to that prompt: `context_nt` numbers the
    prompts of a row (-1 at padding), `branch_nt` the replies to one (0: the prompt itself), and the
    positions of every reply go on from its prompt's (see `ictjax.models.attention.Seen`).

    Logits are needed at response positions only, so these are listed: the r-th sampled token of
    reply b is `target_br`, and the hidden state that predicts it is the one of token `source_br` of
    the row. Masked entries are zeros. Replies that only pad the batch have no response and weight
    0. A is the type of the arrays: NumPy as `pack` makes them, JAX in an update.
    """

    tokens_nt: Int[A, "N T"]
    positions_nt: Int[A, "N T"]
    context_nt: Int[A, "N T"]
    branch_nt: Int[A, "N T"]
    source_br: Int[A, "B R"]
    target_br: Int[A, "B R"]
    response_mask_br: Bool[A, "B R"]
    advantage_b: Float[A, "B"]
    weight_b: Float[A, "B"]  # of the reply in the loss and in the metrics
    # as the sampler reported them: a diagnostic, part of the loss by `GRPOConfig.correction` only
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
    """Packs samples, in their order and `config.replies_per_row` to a row, into the smallest bucket
    that holds all of them. Neighbours in a row with equal prompts share one copy of it. What is
    left of `config.num_rows` is padding.

    A reply's last token predicts nothing, so it is no token of the row.

    Args:
      config: the shapes to choose from.
      prompt_ids: what each reply was sampled after; at least one token each.
      reply_ids: the sampled tokens, the stop token included. An empty reply makes one without loss.
      advantages: one per sample.
      pad_id: the token at padding.
      weights: of each reply in the loss; 1 unless given.
      sampler_logprobs: one per token of each reply; zeros unless given.

    Raises:
      ValueError: too many samples, lists of different lengths, an empty prompt, or a row longer
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
    if len(prompt_ids) > config.num_replies:
        raise ValueError(
            f"{len(prompt_ids)} samples do not fit {config.num_rows} rows of"
            f" {config.replies_per_row}: raise batch.num_rows or pack fewer."
        )
    for sample, (prompt, reply, logprobs) in enumerate(
        zip(prompt_ids, reply_ids, sampler_logprobs, strict=True)
    ):
        if not prompt:
            raise ValueError(
                f"Sample {sample} has an empty prompt: the first token of its reply has nothing to"
                " be predicted from."
            )
        if len(logprobs) != len(reply):
            raise ValueError(
                f"Sample {sample} has {len(reply)} reply tokens and {len(logprobs)} sampler"
                " log-probabilities: give one each."
            )

    per_row = config.replies_per_row
    rows = [
        _lay_out(prompt_ids[first : first + per_row], reply_ids[first : first + per_row])
        for first in range(0, len(prompt_ids), per_row)
    ]
    num_tokens = bucket(
        config.token_buckets, [len(row.tokens) for row in rows], "token_buckets", "Row"
    )
    num_responses = bucket(
        config.response_buckets, [len(reply) for reply in reply_ids], "response_buckets", "Sample"
    )
    batch = blank(config, num_tokens, num_responses, pad_id)
    for number, row in enumerate(rows):
        length = len(row.tokens)
        batch.tokens_nt[number, :length] = row.tokens
        batch.positions_nt[number, :length] = row.positions
        batch.context_nt[number, :length] = row.contexts
        batch.branch_nt[number, :length] = row.branches
        for sample, sources in enumerate(row.sources, start=number * per_row):
            size = len(sources)
            batch.source_br[sample, :size] = sources
            batch.target_br[sample, :size] = reply_ids[sample]
            batch.response_mask_br[sample, :size] = True
            batch.sampler_logp_br[sample, :size] = sampler_logprobs[sample]
    batch.advantage_b[: len(advantages)] = advantages
    batch.weight_b[: len(weights)] = weights
    return batch


def blank(
    config: BatchConfig, num_tokens: int, num_responses: int, pad_id: int
) -> Batch[np.ndarray]:
    """A batch of these buckets that is all padding."""
    row_shape, reply_shape = (
        (config.num_rows, num_tokens),
        (config.num_replies, num_responses),
    )
    return Batch(
        tokens_nt=np.full(row_shape, pad_id, np.int32),
        positions_nt=np.zeros(row_shape, np.int32),
        context_nt=np.full(row_shape, -1, np.int32),
        branch_nt=np.zeros(row_shape, np.int32),
        source_br=np.zeros(reply_shape, np.int32),
        target_br=np.zeros(reply_shape, np.int32),
        response_mask_br=np.zeros(reply_shape, bool),
        advantage_b=np.zeros(config.num_replies, np.float32),
        weight_b=np.zeros(config.num_replies, np.float32),
        sampler_logp_br=np.zeros(reply_shape, np.float32),
    )


class _Row(NamedTuple):
    """The tokens of a row, and for each of its replies which of them predict it."""

    tokens: list[int]
    positions: list[int]
    contexts: list[int]
    branches: list[int]
    sources: list[list[int]]


def _lay_out(prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]) -> _Row:
    row = _Row([], [], [], [], [])
    trunk_end, context, branch = 0, -1, 0

    def add(tokens: Sequence[int], first_position: int) -> None:
        row.tokens.extend(tokens)
        row.positions.extend(range(first_position, first_position + len(tokens)))
        row.contexts.extend([context] * len(tokens))
        row.branches.extend([branch] * len(tokens))

    for index, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        if index == 0 or list(prompt) != list(prompts[index - 1]):
            context, branch = context + 1, 0
            add(prompt, 0)
            trunk_end = len(row.tokens) - 1
        branch += 1
        first = len(row.tokens)
        add(reply[:-1], len(prompt))
        row.sources.append([trunk_end, *range(first, len(row.tokens))] if reply else [])
    return row


def bucket(buckets: Sequence[int], lengths: Sequence[int], name: str, what: str) -> int:
    """The smallest bucket that holds the longest of `lengths` (the first if there are none);
    ValueError if none does.
    """
    longest = max(lengths, default=0)
    for size in buckets:
        if longest <= size:
            return size
    raise ValueError(
        f"{what} {list(lengths).index(longest)} needs {longest} tokens, more than the largest of"
        f" batch.{name} {tuple(buckets)}: add a larger bucket, or shorten the prompt or the"
        " reply."
    )


def shaped(
    groups: Sequence[Sequence[Candidate]], estimator: GRPOConfig, max_reply_tokens: int
) -> list[list[Candidate]]:
    """The candidates with rewards that are lower for replies near the greatest length
    (`ictjax.grpo.overlong_penalties`). Shaping comes after refilling: DAPO refills by success.
    """
    lengths = [[len(candidate.reply_ids) for candidate in group] for group in groups]
    penalties = grpo.overlong_penalties(
        np.array(lengths),
        max_length=max_reply_tokens,
        penalty=estimator.overlong_penalty,
        buffer=estimator.overlong_buffer,
    ).tolist()
    return [
        [
            candidate
            if candidate.reward is None
            else dataclasses.replace(candidate, reward=candidate.reward - penalty)
            for candidate, penalty in zip(group, row, strict=True)
        ]
        for group, row in zip(groups, penalties, strict=True)
    ]


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
    # Groups that share a row are a long and a short one, so that rows are of similar lengths.
    order = _balanced(
        [_length(group) for group in groups], config.replies_per_row // estimator.group_size
    )
    candidates = [candidate for number in order for candidate in groups[number]]
    batch = pack(
        config,
        [candidate.prompt_ids for candidate in candidates],
        [candidate.reply_ids for candidate in candidates],
        advantages=result.advantage_qg[order].ravel().tolist(),
        weights=result.weight_qg[order].ravel().tolist(),
        sampler_logprobs=[candidate.logprobs for candidate in candidates],
        pad_id=pad_id,
    )
    return batch, int(result.dead_q.sum())


def compile_advantages(estimator: GRPOConfig, num_groups: int) -> None:
    """What `pack_groups` computes for so many groups, once, so that it is compiled."""
    shape = (num_groups, estimator.group_size)
    grpo.advantages(estimator, np.zeros(shape, np.float32), np.ones(shape, bool))


def _length(group: Sequence[Candidate]) -> int:
    return len(group[0].prompt_ids) + sum(len(candidate.reply_ids) for candidate in group)


def _balanced(lengths: Sequence[int], per_row: int) -> np.ndarray:
    """The order in which groups fill rows of `per_row`: dealt by length, to and fro, so that long
    ones meet short ones; as they are where they do not fill all rows.
    """
    order = np.arange(len(lengths))
    if per_row < 2 or len(lengths) % per_row:
        return order
    dealt = np.argsort(np.negative(lengths), kind="stable").reshape(per_row, -1)
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt.T.ravel()
