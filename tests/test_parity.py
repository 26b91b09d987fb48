"""Every family and option against the PyTorch model of Hugging Face transformers, and checkpoints
there and back.
"""

import json

import numpy as np
import pytest
from safetensors import safe_open

torch = pytest.importorskip(
    "torch",
    reason=(
        "torch is not installed; it is needed only to compare with the PyTorch models (extra:"
        " parity)"
    ),
)
transformers = pytest.importorskip("transformers")

from experiments import parity  # noqa: E402 (needs torch)
from ictjax.models.hf import load_checkpoint, save_checkpoint  # noqa: E402

torch.set_num_threads(1)  # tensors are tiny: threads only wait for each other


def case_id(case):
    return f"{case.family}, {case.option}"


@pytest.mark.parametrize("case", parity.CASES, ids=case_id)
def test_logits_and_greedy_continuation(tmp_path, case):
    theirs = parity.random_checkpoint(tmp_path, case)
    found = parity.measure(*load_checkpoint(tmp_path), theirs)
    print(found)  # pytest -rP collects the table
    assert found.logits < 2e-5
    assert found.logprobs < 1e-4
    assert found.same_tokens == parity.CONTINUATION


@pytest.mark.parametrize(
    ("case", "option"),
    [
        (case, option)
        for case in parity.CASES
        for option in ("rope_parameters", "use_sliding_window", "query_pre_attn_scalar")
        if option in case.changes
    ],
    ids=lambda value: value if isinstance(value, str) else case_id(value),
)
def test_the_options_matter_at_these_sizes(tmp_path, case, option):
    """PyTorch with the same weights and without the option gives visibly other logits: parity would
    fail if we ignored it.
    """
    without = parity.Case(
        family=case.family,
        option="",
        changes={name: value for name, value in case.changes.items() if name != option},
    )
    batch = parity.ragged_batch(padded_left=False)
    first, second = (
        parity.torch_logits(parity.random_checkpoint(tmp_path, variant), *batch)
        for variant in (case, without)
    )
    assert np.abs(first - second).max() > 1e-3 * np.abs(first).max()


def tensors_of(folder):
    """Name -> type, shape and bytes, over all files of a checkpoint."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                value = file.get_tensor(name)
                found[name] = (value.dtype.name, value.shape, value.tobytes())
    return found


ROUND_TRIPS = ((0, "float16"), (1, "bfloat16"), (5, "bfloat16"), (8, "float32"), (9, "bfloat16"))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(parity.CASES[index], dtype) for index, dtype in ROUND_TRIPS],
    ids=lambda value: getattr(value, "option", value),
)
def test_round_trip_is_bit_exact(tmp_path, case, dtype):
    theirs = parity.random_checkpoint(tmp_path / "theirs", case).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_checkpoint(tmp_path / "theirs")
    assert config.param_dtype == dtype
    save_checkpoint(
        tmp_path / "ours", config, params, source=tmp_path / "theirs", max_shard_bytes=10_000
    )
    assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "theirs")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    configs = [
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("theirs", "ours")
    ]
    assert configs[0] == configs[1]
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert not any(
        info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    for (name, mine), (_, expected) in zip(
        again.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected), name
