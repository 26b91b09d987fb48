"""A pair of hand-made models that play the fake games: `python -m experiments.fake_pair` writes
them to pocket/checkpoints/fake, where the preset fake-tiny finds them.

The actor answers "Action: WORD" with the word that its system prompt shouts (OPEN -> open; "walk"
without one). The reflector is a table of next words: it answers in the two sections with a shout
drawn evenly, or breaks off.
"""

import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from experiments.console import Terminal
from experiments.pretraining import write_record
from ictjax.models import transformer
from ictjax.models.config import ModelConfig
from ictjax.models.hf import save_checkpoint

FOLDER = pathlib.Path(__file__).parent / "pocket" / "checkpoints" / "fake"

# The shape of Qwen2.5's template: a default system message, and every message between
# <|im_start|>role and <|im_end|>.
TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) \
or message.role == 'assistant' %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

SHOUTS = ("OPEN", "LIGHT", "RING")
_ACTIONS = ("open", "light", "ring", "walk")
_WORDS = (
    "system",
    "user",
    "assistant",
    "Action:",
    "ANALYSIS:",
    "seen",
    "IMPROVED",
    "PROMPT:",
    "play",
    *SHOUTS,
    *_ACTIONS,
)
_REFLECTOR_TABLE = {
    "assistant": {"ANALYSIS:": 0.9, "<|im_end|>": 0.1},
    "ANALYSIS:": {"seen": 1.0},
    "seen": {"IMPROVED": 1.0},
    "IMPROVED": {"PROMPT:": 1.0},
    "PROMPT:": {"OPEN": 0.25, "LIGHT": 0.25, "RING": 0.25, "play": 0.25},
    **{word: {"<|im_end|>": 1.0} for word in (*SHOUTS, "play")},
}
_ACTOR_TABLE = {
    "assistant": {"Action:": 1.0},
    "Action:": {"walk": 0.9, **dict.fromkeys(_ACTIONS[:3], 0.03)},
    **{word: {"<|im_end|>": 1.0} for word in _ACTIONS},
}


def word_tokenizer(words: Sequence[str], template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Whole words split at white space; unknown ones become "unk"."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(("unk", *words)))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="unk"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return chat_tokenizer(backend, template)


def chat_tokenizer(backend: tokenizers.Tokenizer, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of `template`."""
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def save_pair(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The hand-made actor and reflector, in HF layout under `folder`."""
    _save_model(folder / "actor", _ACTOR_TABLE, shouts=SHOUTS)
    _save_model(folder / "reflector", _REFLECTOR_TABLE, shouts=())
    write_record(folder, {})  # made by hand: no game has taught them anything
    return folder / "actor", folder / "reflector"


def _save_model(
    folder: pathlib.Path, table: Mapping[str, Mapping[str, float]], *, shouts: Sequence[str]
) -> None:
    """A table of next words, overruled by the `shouts` that the model hears."""
    tokenizer = word_tokenizer(_WORDS)
    # the first of three residual dimensions that say which shout was heard
    ids, heard = tokenizer.get_vocab(), len(tokenizer)
    config = ModelConfig(
        vocab_size=heard,
        num_layers=1,
        d_model=heard + len(SHOUTS),
        d_ff=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
    )
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), transformer.abstract_params(config)
    )
    scale = config.d_model**0.5  # what the norm makes of a one-hot embedding
    params["embed"][:] = np.eye(heard, config.d_model)
    params["norm"][:] = 1
    layers = params["layers"]
    layers["attn_norm"][:], layers["mlp_norm"][:] = 1, 1
    for word, following in table.items():
        params["head"][ids[word]] = -20 / scale
        for after, probability in following.items():
            params["head"][ids[word], ids[after]] = np.log(probability) / scale
    if shouts:
        layers["q_bias"][0, 0, 7] = 10  # the last dimension hardly turns with the position
    for index, shout in enumerate(shouts):
        layers["k"][0, ids[shout], 0, 7] = 10 / scale
        layers["v"][0, ids[shout], 0, index] = 1 / scale
        layers["o"][0, 0, index, heard + index] = 1
        params["head"][heard + index, ids[shout.lower()]] = 10 / scale
    save_checkpoint(folder, config, params)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    save_pair(FOLDER)
    Terminal().print(f"The pair is in {FOLDER}.", soft_wrap=True)
