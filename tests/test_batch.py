import dataclasses

import numpy as np
import pytest

from ictjax.batch import pack, pack_groups
from ictjax.config import PAPER, BatchConfig
from ictjax.records import Candidate

CONFIG = BatchConfig(num_rows=3, token_buckets=(6, 12), response_buckets=(3, 5))


def test_pack_as_literal_arrays():
    batch = pack(
        CONFIG,
        [[1, 2, 3], [4]],
        [[5, 6], [7, 8, 9]],
        advantages=[0.5, -1.0],
        pad_id=99,
        sampler_logprobs=[[-1.0, -2.0], [-3.0, -4.0, -5.0]],
    )
    np.testing.assert_array_equal(
        batch.tokens_nt, [[1, 2, 3, 5, 99, 99], [4, 7, 8, 99, 99, 99], [99] * 6]
    )
    np.testing.assert_array_equal(
        batch.positions_nt, [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0], [0] * 6]
    )
    np.testing.assert_array_equal(
        batch.context_nt, [[0, 0, 0, 0, -1, -1], [0, 0, 0, -1, -1, -1], [-1] * 6]
    )
    np.testing.assert_array_equal(
        batch.branch_nt, [[0, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0], [0] * 6]
    )
    np.testing.assert_array_equal(batch.source_br, [[2, 3, 0], [0, 1, 2], [0, 0, 0]])
    np.testing.assert_array_equal(batch.target_br, [[5, 6, 0], [7, 8, 9], [0, 0, 0]])
    np.testing.assert_array_equal(batch.response_mask_br, [[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(batch.advantage_b, np.float32([0.5, -1.0, 0.0]))
    np.testing.assert_array_equal(batch.weight_b, [1.0, 1.0, 0.0])
    np.testing.assert_array_equal(batch.sampler_logp_br, [[-1, -2, 0], [-3, -4, -5], [0, 0, 0]])


def test_neighbours_with_one_prompt_share_it_as_literal_arrays():
    config = BatchConfig(num_rows=2, replies_per_row=3, token_buckets=(9,), response_buckets=(3,))
    batch = pack(
        config,
        [[1, 2], [1, 2], [3], [3]],
        [[4, 5, 6], [], [7, 8], [9, 9, 9]],
        advantages=[1.0, 2.0, 3.0, 4.0],
        pad_id=0,
    )
    np.testing.assert_array_equal(
        batch.tokens_nt, [[1, 2, 4, 5, 3, 7, 0, 0, 0], [3, 9, 9, 0, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.positions_nt, [[0, 1, 2, 3, 0, 1, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.context_nt, [[0, 0, 0, 0, 1, 1, -1, -1, -1], [0, 0, 0, -1, -1, -1, -1, -1, -1]]
    )
    np.testing.assert_array_equal(
        batch.branch_nt, [[0, 0, 1, 1, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.source_br, [[1, 2, 3], [0, 0, 0], [4, 5, 0], [0, 1, 2], [0, 0, 0], [0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.target_br, [[4, 5, 6], [0, 0, 0], [7, 8, 0], [9, 9, 9], [0, 0, 0], [0, 0, 0]]
    )
    np.testing.assert_array_equal(batch.response_mask_br.sum(axis=1), [3, 0, 2, 3, 0, 0])
    np.testing.assert_array_equal(batch.advantage_b, [1, 2, 3, 4, 0, 0])


@pytest.mark.parametrize("replies_per_row", [1, 2, 3])
def test_a_target_is_predicted_by_the_token_before_it_in_its_own_branch(replies_per_row):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, size=n).tolist() for n in (1, 4, 7)]
    replies = [rng.integers(0, 50, size=n).tolist() for n in (5, 1, 3)]
    config = BatchConfig(
        num_rows=3, replies_per_row=replies_per_row, token_buckets=(30,), response_buckets=(5,)
    )
    batch = pack(config, prompts, replies, advantages=[0.0, 0.0, 0.0], pad_id=99)
    for sample in range(3):
        row, mask = sample // replies_per_row, batch.response_mask_br[sample]
        read = batch.tokens_nt[row, batch.source_br[sample, mask]]
        np.testing.assert_array_equal(read, [prompts[sample][-1], *replies[sample][:-1]])
        np.testing.assert_array_equal(batch.target_br[sample, mask], replies[sample])
        positions = batch.positions_nt[row, batch.source_br[sample, mask]]
        np.testing.assert_array_equal(
            positions, len(prompts[sample]) - 1 + np.arange(len(replies[sample]))
        )


def _candidate(prompt, reply, reward):
    return Candidate(
        prompt_ids=tuple(prompt),
        reply_ids=tuple(reply),
        logprobs=(0.0,) * len(reply),
        reply="",
        analysis="",
        system_prompt="",
        reward=reward,
    )


def test_groups_that_share_a_row_are_a_long_and_a_short_one():
    groups = [
        [_candidate([number] * size, [number] * 2, reward) for reward in (0.0, 1.0)]
        for number, size in enumerate((3, 9, 5, 1), start=1)
    ]
    config = BatchConfig(
        num_rows=2, replies_per_row=4, token_buckets=(14, 99), response_buckets=(2,)
    )
    batch, dead = pack_groups(config, dataclasses.replace(PAPER, group_size=2), groups, pad_id=0)
    assert dead == 0 and batch.tokens_nt.shape == (2, 14)
    assert [set(row.tolist()) - {0} for row in batch.tokens_nt] == [{2, 4}, {3, 1}]
    first = batch.target_br[:, 0].tolist()
    assert first == [2, 2, 4, 4, 3, 3, 1, 1]
    assert (batch.advantage_b[1::2] == -batch.advantage_b[::2]).all()
    assert (batch.advantage_b[1::2] > 0).all()


@pytest.mark.parametrize(
    ("prompt", "reply", "shape"), [(4, 3, (6, 3)), (5, 3, (12, 3)), (3, 4, (6, 5)), (8, 5, (12, 5))]
)
def test_shapes_come_from_the_buckets(prompt, reply, shape):
    batch = pack(CONFIG, [[1] * prompt], [[2] * reply], advantages=[1.0], pad_id=0)
    assert (batch.tokens_nt.shape[1], batch.target_br.shape[1]) == shape
    assert batch.tokens_nt.shape[0] == CONFIG.num_rows


def test_nothing_to_pack_and_an_empty_reply_have_no_response():
    assert not pack(CONFIG, [], [], advantages=[], pad_id=0).response_mask_br.any()
    batch = pack(CONFIG, [[1, 2]], [[]], advantages=[1.0], pad_id=0)
    assert not batch.response_mask_br.any() and (batch.context_nt[0] == 0).sum() == 2


def test_weights_reach_their_rows():
    batch = pack(
        CONFIG, [[1], [1]], [[2], [2]], advantages=[1.0, 1.0], weights=[0.0, 1.0], pad_id=0
    )
    np.testing.assert_array_equal(batch.weight_b, [0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(prompt_ids=[[1]] * 4, reply_ids=[[1]] * 4, advantages=[0.0] * 4),
            "4 samples do not fit 3 rows of 1.*num_rows",
        ),
        (
            dict(prompt_ids=[[1], [1] * 11], reply_ids=[[1], [1] * 3], advantages=[0.0] * 2),
            "Row 1 needs 13 tokens.*token_buckets",
        ),
        (
            dict(prompt_ids=[[1]], reply_ids=[[1] * 6], advantages=[0.0]),
            "Sample 0 needs 6 tokens.*response_buckets",
        ),
        (dict(prompt_ids=[[]], reply_ids=[[1]], advantages=[0.0]), "Sample 0 has an empty prompt"),
        (dict(prompt_ids=[[1]], reply_ids=[[1]], advantages=[]), "1 prompts and 0 advantages"),
        (
            dict(prompt_ids=[[1]], reply_ids=[[1]], advantages=[0.0], sampler_logprobs=[[]]),
            "1 reply tokens and 0 sampler",
        ),
    ],
)
def test_bad_samples_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(CONFIG, pad_id=0, **arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_rows", 0),
        ("replies_per_row", 0),
        ("token_buckets", ()),
        ("token_buckets", (4, 2)),
        ("response_buckets", (0, 2)),
    ],
)
def test_bad_configs_are_named(field, value):
    with pytest.raises(ValueError, match=f"batch.{field}"):
        dataclasses.replace(CONFIG, **{field: value})
