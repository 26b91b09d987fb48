import dataclasses

import numpy as np
import pytest

from ictjax.batch import pack
from ictjax.config import BatchConfig

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
    np.testing.assert_array_equal(batch.positions_bt, [[0, 1, 2, 3, 4, 5]] * 3)
    np.testing.assert_array_equal(
        batch.valid_bt, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch.source_br, [[2, 3, 0], [0, 1, 2], [0, 0, 0]])
    np.testing.assert_array_equal(batch.target_br, [[5, 6, 0], [7, 8, 9], [0, 0, 0]])
    np.testing.assert_array_equal(batch.response_mask_br, [[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(batch.advantage_b, np.float32([0.5, -1.0, 0.0]))
    np.testing.assert_array_equal(batch.weight_b, [1.0, 1.0, 0.0])
    np.testing.assert_array_equal(batch.sampler_logp_br, [[-1, -2, 0], [-3, -4, -5], [0, 0, 0]])


def test_the_source_of_a_target_is_the_token_before_it():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, size=n).tolist() for n in (1, 4, 7)]
    replies = [rng.integers(0, 50, size=n).tolist() for n in (5, 1, 3)]
    batch = pack(CONFIG, prompts, replies, advantages=[0.0, 0.0, 0.0], pad_id=99)
    for row in range(3):
        mask = batch.response_mask_br[row]
        following = batch.tokens_nt[row, batch.source_br[row, mask] + 1]
        np.testing.assert_array_equal(following, batch.target_br[row, mask])
        np.testing.assert_array_equal(following, replies[row])


@pytest.mark.parametrize(
    ("prompt", "reply", "shape"), [(3, 3, (6, 3)), (4, 3, (12, 3)), (2, 4, (6, 5)), (7, 5, (12, 5))]
)
def test_shapes_come_from_the_buckets(prompt, reply, shape):
    batch = pack(CONFIG, [[1] * prompt], [[2] * reply], advantages=[1.0], pad_id=0)
    assert (batch.tokens_nt.shape[1], batch.target_br.shape[1]) == shape
    assert batch.tokens_nt.shape[0] == CONFIG.num_rows


def test_nothing_to_pack_and_an_empty_reply_have_no_response():
    assert not pack(CONFIG, [], [], advantages=[], pad_id=0).response_mask_br.any()
    batch = pack(CONFIG, [[1, 2]], [[]], advantages=[1.0], pad_id=0)
    assert not batch.response_mask_br.any() and batch.valid_bt[0].sum() == 2


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
            "4 samples do not fit 3 rows.*num_rows",
        ),
        (
            dict(prompt_ids=[[1], [1] * 10], reply_ids=[[1], [1] * 3], advantages=[0.0] * 2),
            "Sample 1 needs 13 tokens.*token_buckets",
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
        ("token_buckets", ()),
        ("token_buckets", (4, 2)),
        ("response_buckets", (0, 2)),
    ],
)
def test_bad_configs_are_named(field, value):
    with pytest.raises(ValueError, match=f"batch.{field}"):
        dataclasses.replace(CONFIG, **{field: value})
