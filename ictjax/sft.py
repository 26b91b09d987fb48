"""Supervised training on chats: the loss is that of the replies alone. Several chats share a row,
and no token sees another chat.

A step is the policy-gradient update with every advantage 1, no KL and one epoch: there the ratio is
1, and its gradient that of the log-likelihood.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ictjax.batch import Batch, blank
from ictjax.chat import ChatTokenizer
from ictjax.config import PAPER, BatchConfig
from ictjax.records import Message

# What `learner.make_update` is told for a step of maximum likelihood, all tokens counting the same.
LIKELIHOOD = dataclasses.replace(
    PAPER,
    loss_normalisation="token_mean",
    importance="token",
    correction="none",
    kl="none",
    kl_coefficient=0.0,
    temperature=1.0,
)
# The update's name for the mean of |sampler's - learner's| log-probabilities: chats were not
# sampled, and with zeros in the sampler's place it is the negative log-likelihood per token.
LOSS = "sampler_gap_mean"


class Chat(NamedTuple):
    """A conversation as tokens."""

    ids: tuple[int, ...]
    replies: tuple[tuple[int, int], ...]  # where each reply begins and ends, stop token included

    @property
    def num_targets(self) -> int:
        return sum(end - start for start, end in self.replies)


def encode_chat(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> Chat:
    """A conversation as a model would have lived it: replies as they are sampled, everything else
    by the chat template.

    Raises:
      ValueError: messages that are not an optional system prompt and then questions and replies in
        turn, a reply last.
    """
    _check_roles([message.role for message in messages])
    first = next(i for i, message in enumerate(messages) if message.role == "assistant")
    ids = list(tokenizer.encode_start(messages[:first]))
    replies = []
    for message in messages[first:]:
        if message.role == "assistant":
            start = len(ids)
            ids += tokenizer.encode_reply(message.content)
            replies.append((start, len(ids)))
        else:
            ids += tokenizer.encode_turn(message, stopped=True)
    return Chat(tuple(ids), tuple(replies))


def _check_roles(roles: Sequence[str]) -> None:
    talk = list(roles[1:] if roles and roles[0] == "system" else roles)
    expected = ["user", "assistant"] * (len(talk) // 2)
    if not talk or talk != expected:
        raise ValueError(
            f"its messages are of {', '.join(roles) or 'nobody'}: a chat is an optional system"
            " message, then user and assistant in turn, the assistant last"
        )


def cut(chat: Chat, num_tokens: int) -> Chat:
    """The first tokens of a chat, with what is left of its replies."""
    replies = tuple(
        (start, min(end, num_tokens)) for start, end in chat.replies if start < num_tokens
    )
    return Chat(chat.ids[:num_tokens], replies)


def in_rows(
    lengths: Sequence[int], order: Sequence[int], num_rows: int, row_tokens: int
) -> Iterator[list[list[int]]]:
    """Batches of `num_rows` rows of at most `row_tokens` tokens: each chat, in that order, goes to
    the first row with room; when none has, the next batch begins. Every chat is in one of them.

    Args:
      lengths: of all chats, none above `row_tokens`.
      order: numbers of chats.
    """
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    room = [row_tokens] * num_rows
    for number in order:
        fits = next((row for row in range(num_rows) if lengths[number] <= room[row]), None)
        if fits is None:
            yield rows
            rows, room, fits = [[] for _ in range(num_rows)], [row_tokens] * num_rows, 0
        rows[fits].append(number)
        room[fits] -= lengths[number]
    if any(rows):
        yield rows


def pack_chats(
    sizes: BatchConfig, rows: Sequence[Sequence[Chat]], pad_id: int
) -> Batch[np.ndarray]:
    """A batch of these rows, each of one or more chats.

    Every chat is a context of its own, so that positions begin at 0 and nothing of another is seen.
    The rows' replies are one list of targets each: [N, R], R being all positions of a row.
    """
    (num_tokens,) = sizes.token_buckets
    (num_targets,) = sizes.response_buckets
    batch = blank(sizes, num_tokens, num_targets, pad_id)
    for row, chats in enumerate(rows):
        start = targets = 0
        for context, chat in enumerate(chats):
            end = start + len(chat.ids)
            batch.tokens_nt[row, start:end] = chat.ids
            batch.positions_nt[row, start:end] = np.arange(len(chat.ids))
            batch.context_nt[row, start:end] = context
            for first, last in chat.replies:
                count = last - first
                batch.source_br[row, targets : targets + count] = np.arange(
                    start + first - 1, start + last - 1
                )
                batch.target_br[row, targets : targets + count] = chat.ids[first:last]
                batch.response_mask_br[row, targets : targets + count] = True
                targets += count
            start = end
        if targets:
            batch.advantage_b[row] = batch.weight_b[row] = 1.0
    return batch
