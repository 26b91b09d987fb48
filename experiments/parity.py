"""How far our decoder is from Hugging Face's PyTorch models, on
tiny random checkpoints of every family.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.table import Table

from experiments.commands.parity import main
from experiments.console import Terminal
from ictjax.models.attention import plain_rows
from ictjax.models.cache import make_cache
from ictjax.models.config import ModelConfig
from ictjax.models.hf import load_checkpoint
from ictjax.models.transformer import Params, extend, forward, unembed

VOCABULARY, CONTINUATION = 67, 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint: a family with one option, and what its config.json says beside the tiny
    sizes.
    """

    family: str
    option: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CASES = (
    Case(family="qwen2", option="plain (biases, untied, GQA 2)"),
    Case(
        family="qwen2",
        option="tied, GQA 7",
        changes={"tie_word_embeddings": True, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    Case(family="qwen2", option="yarn", changes={"rope_parameters": {"rope_theta": 1e4, **_YARN}}),
    Case(
        family="qwen2",
        option="sliding window",
        changes={"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    Case(family="qwen3", option="plain (qk-norm, head_dim 12)", changes={"head_dim": 12}),
    Case(
        family="qwen3",
        option="tied, GQA 1, biases",
        changes={"tie_word_embeddings": True, "num_key_value_heads": 4, "attention_bias": True},
    ),
    Case(
        family="llama",
        option="plain",
        changes={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    Case(
        family="llama",
        option="llama3 rope, tied",
        changes={"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e4, **_LLAMA3}},
    ),
    Case(
        family="llama",
        option="linear rope, biases",
        changes={
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    Case(
        family="gemma3_text",
        option="sliding window, two thetas, tied, head_dim 16",
        changes={
            **_SLIDING,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        family="gemma3_text",
        option="linear rope, GQA 1",
        changes={
            **_SLIDING,
            "num_key_value_heads": 4,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """Largest differences to PyTorch in float32, over the positions that hold tokens."""

    logits: float  # relative to the largest logit
    logprobs: float  # of the tokens of the rows, in nats
    # leading tokens of the greedy continuation through the cache that are identical, of
    # CONTINUATION
    same_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfParity:
    """Differences to PyTorch with both models in bfloat16."""

    logits: float  # the largest, relative to the largest logit
    kl: float  # mean divergence of the next-token distributions, in nats


def random_checkpoint(folder: pathlib.Path, case: Case) -> Any:
    """Writes a random model of the case with Hugging Face transformers; returns it, in float32."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.family, **{**_SIZES, **case.changes})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        # biases start at zero and norms at one: move them; and make attention sharp
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn_like(parameter) * 0.2
                + float("norm" in name and case.family != "gemma3_text")
            )
    model.save_pretrained(folder)
    return model


def ragged_batch(*, padded_left: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, validity and positions of rows of 21, 13 and 6 tokens, padded on one side; every row
    starts at position 0.
    """
    lengths = np.array([21, 13, 6])
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, 21))
    steps = np.arange(21)[None]
    valid = steps >= 21 - lengths[:, None] if padded_left else steps < lengths[:, None]
    return np.where(valid, tokens, 0), valid, np.maximum(np.cumsum(valid, axis=1) - 1, 0)


def measure(config: ModelConfig, params: Params, theirs: Any) -> Parity:
    """Compares a model that our importer read with the PyTorch model that wrote it."""
    logits, logprobs = [], []
    for padded_left in (True, False):
        batch = ragged_batch(padded_left=padded_left)
        mine, torchs = our_logits(config, params, *batch), torch_logits(theirs, *batch)
        logits.append(_relative(mine, torchs))
        logprobs.append(float(np.abs(_chosen(mine, batch) - _chosen(torchs, batch)).max()))
    same = np.cumprod(
        our_greedy(config, params, batch[0][0]) == torch_greedy(theirs, batch[0][0])
    ).sum()
    return Parity(logits=max(logits), logprobs=max(logprobs), same_tokens=int(same))


def measure_bfloat16(config: ModelConfig, params: Params, theirs: Any) -> HalfParity:
    """The same with the weights and activations of both in bfloat16; converts `theirs`."""
    half = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    batch = ragged_batch(padded_left=False)
    mine = our_logits(
        half, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params), *batch
    )
    torchs = torch_logits(theirs.to(torch.bfloat16), *batch)
    return HalfParity(logits=_relative(mine, torchs), kl=_kl(torchs, mine))


@jax.jit(static_argnums=0)
def _logits(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    valid_bt: jax.Array,
    positions_bt: jax.Array,
) -> jax.Array:
    return unembed(
        config,
        params,
        forward(config, params, tokens_bt, seen=plain_rows(valid_bt, positions_bt)),
    )


def our_logits(
    config: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    valid: np.ndarray,
    positions: np.ndarray,
) -> np.ndarray:
    """Logits at the valid positions, one row each."""
    return np.asarray(_logits(config, params, tokens, valid, positions))[valid]


def torch_logits(
    model: Any, tokens: np.ndarray, valid: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """The same of the PyTorch model."""
    with torch.no_grad():
        output = model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(valid).long(),
            position_ids=torch.tensor(positions),
        )
    return output.logits.float().numpy()[valid]


@jax.jit(static_argnums=0)
def _greedy(config: ModelConfig, params: Params, prompt_1t: jax.Array) -> jax.Array:
    length = prompt_1t.shape[1]
    zero, one = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32)
    hidden, cache = extend(
        config, params, make_cache(config, 1, length + CONTINUATION), prompt_1t, zero, one * length
    )

    def step(carry: tuple, index: jax.Array) -> tuple:
        hidden_1d, cache = carry
        token_1 = jnp.argmax(unembed(config, params, hidden_1d), axis=-1).astype(jnp.int32)
        hidden, cache = extend(config, params, cache, token_1[:, None], one * (length + index), one)
        return (hidden[:, 0], cache), token_1[0]

    return jax.lax.scan(step, (hidden[:, -1], cache), jnp.arange(CONTINUATION))[1]


def our_greedy(config: ModelConfig, params: Params, prompt: np.ndarray) -> np.ndarray:
    """The greedy continuation through our key/value cache."""
    return np.asarray(_greedy(config, params, jnp.asarray(prompt, jnp.int32)[None]))


def torch_greedy(model: Any, prompt: np.ndarray) -> np.ndarray:
    """The greedy continuation of the PyTorch model with its own cache."""
    output = model.generate(
        torch.tensor(prompt)[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=CONTINUATION,
    )
    return output[0, len(prompt) :].numpy()


def _relative(mine: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _chosen(logits: np.ndarray, batch: Sequence[np.ndarray]) -> np.ndarray:
    """Log-probabilities of the ids of the batch, each at its own position: any ids do."""
    return np.take_along_axis(_log_softmax(logits), batch[0][batch[1]][:, None], axis=1)


def _kl(first: np.ndarray, second: np.ndarray) -> float:
    p, q = _log_softmax(first.astype(np.float64)), _log_softmax(second.astype(np.float64))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def compare_all() -> None:
    """Compares every case and prints the table."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # tensors are tiny: threads only wait for each other
    table = Table(title="Largest difference to PyTorch", title_justify="left")
    for name in (
        "family",
        "option",
        "logits",
        "log-probs",
        f"greedy, of {CONTINUATION}",
        "bf16 logits",
        "bf16 KL",
    ):
        table.add_column(name, no_wrap=True)
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            theirs = random_checkpoint(pathlib.Path(folder), case)
            ours = load_checkpoint(folder)
        exact, half = measure(*ours, theirs), measure_bfloat16(*ours, theirs)
        numbers = (
            f"{exact.logits:.0e}",
            f"{exact.logprobs:.0e}",
            str(exact.same_tokens),
            f"{half.logits:.0e}",
            f"{half.kl:.0e}",
        )
        table.add_row(case.family, case.option, *numbers)
    Terminal(width=130).print(table)


if __name__ == "__main__":
    main()
