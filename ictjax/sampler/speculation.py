"""Prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding): what followed the last
tokens of a conversation where they stood before is proposed, and one step over all of it says how
much greedy sampling would have sampled.

A guess costs a wider step and changes no reply: what is sampled at a position comes from the logits
of the tokens before it, all of which were sampled by then.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Of the last tokens, that are looked for. A single one is enough: actions are short, and where it
# was chance, a wide step costs more and loses nothing.
_LONGEST, _SHORTEST = 4, 1


class Guesses(NamedTuple):
    """What the steps of a dispatch know besides, and count."""

    history_bs: Int[Array, "B S"]  # all tokens of the conversations; behind the last one anything
    proposed_b: Int[Array, " B"]  # tokens
    accepted_b: Int[Array, " B"]  # of them, that were sampled
    computed: Int[Array, ""]  # positions of every row
    next_bt: Int[Array, "B T"]  # proposals for the next step
    counts_b: Int[Array, " B"]  # how many of them are any


class Verdict(NamedTuple):
    """What a step over a row's last token and its proposals sampled: a token and, as far as the
    proposals were right, those behind it.
    """

    count_b: Int[Array, " B"]  # tokens; 0 for rows that are not active
    stopped_b: Bool[Array, " B"]  # the last of them ends the generation


def propose(
    history_bs: Int[Array, "B S"], known_b: Int[Array, " B"], number: int
) -> tuple[Int[Array, "B T"], Bool[Array, " B"]]:
    """The tokens behind the longest stretch that a row ends with and that stood in it before, the
    last one of that length; where they reach the row's end, they are repeated from their beginning.

    Args:
      history_bs: tokens.
      known_b: how many of them there are, at least 1.
      number: of tokens to propose (static).

    Returns: The proposals, and which rows have any.
    """
    places_1s = jnp.arange(history_bs.shape[1], dtype=jnp.int32)[None]
    same_bs = places_1s < known_b[:, None] - 1
    length_bs = jnp.zeros_like(history_bs)
    for back in range(_LONGEST):
        last_b1 = jnp.take_along_axis(
            history_bs, jnp.maximum(known_b - 1 - back, 0)[:, None], axis=1
        )
        # what wraps around is left of the first token
        before_bs = jnp.roll(history_bs, back, axis=1)
        same_bs &= (before_bs == last_b1) & (places_1s >= back)
        length_bs += same_bs
    rank_bs = length_bs * history_bs.shape[1] + places_1s
    found_b = jnp.argmax(rank_bs, axis=1).astype(jnp.int32)
    length_b = jnp.take_along_axis(length_bs, found_b[:, None], axis=1)[:, 0]
    steps_1t = jnp.arange(number, dtype=jnp.int32)[None]
    period_b1 = jnp.maximum(known_b - 1 - found_b, 1)[:, None]
    proposed_bt = jnp.take_along_axis(
        history_bs, found_b[:, None] + 1 + steps_1t % period_b1, axis=1, mode="clip"
    )
    return proposed_bt, length_b >= _SHORTEST


def verify(
    sampled_bx: Int[Array, "B X"],
    proposed_bt: Int[Array, "B T"],
    counts_b: Int[Array, " B"],
    active_b: Bool[Array, " B"],
    stop_by: Int[Array, "B Y"],
) -> Verdict:
    """How many of the tokens that a step sampled are the conversation's next ones: one, and another
    for every proposal that equals the token sampled before it, up to a stop id.

    Args:
      sampled_bx: after the row's last token, and after each of its T = X - 1 proposals.
      proposed_bt: what was proposed.
      counts_b: how many of these are proposals.
      active_b: rows that sample.
      stop_by: ids that end the generation; -1 for none.
    """
    steps_1t = jnp.arange(proposed_bt.shape[1], dtype=jnp.int32)[None]
    right_bt = (sampled_bx[:, :-1] == proposed_bt) & (steps_1t < counts_b[:, None])
    stops_bx = jnp.any(sampled_bx[:, :, None] == stop_by[:, None], axis=-1)
    goes_on_bt = right_bt & ~stops_bx[:, :-1]
    count_b = 1 + jnp.sum(jnp.cumprod(goes_on_bt.astype(jnp.int32), axis=1), axis=1)
    last_b = jnp.take_along_axis(stops_bx, count_b[:, None] - 1, axis=1)[:, 0]
    return Verdict(jnp.where(active_b, count_b, 0), last_b)
