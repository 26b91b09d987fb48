"""Test doubles that several tests share: a tiny tokenizer and checkpoint on disk, and a sampler
that says what a script tells it.
"""

import collections
import contextlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import tokenizers
from jax.experimental.compilation_cache import compilation_cache
from transformers import PreTrainedTokenizerFast

from ictjax.models import transformer
from ictjax.models.config import ModelConfig
from ictjax.models.hf import save_checkpoint
from ictjax.sampler import Generation, Request

# The shape of Qwen2.5's template: a default system message, and every message between
# <|im_start|>role and <|im_end|>.
QWEN_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@contextlib.contextmanager
def programs_kept_in(folder: pathlib.Path) -> Iterator[None]:
    """What one sampler or learner has compiled, the next one reads from the folder."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def byte_tokenizer(template: str = QWEN_TEMPLATE) -> PreTrainedTokenizerFast:
    """Every byte is a token, and so are the special tokens: any text round-trips."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return _finish(backend, template)


def word_tokenizer(words: Sequence[str], template: str = QWEN_TEMPLATE) -> PreTrainedTokenizerFast:
    """Whole words split at white space; unknown ones become "unk"."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(("unk", *words)))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="unk"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return _finish(backend, template)


def _finish(backend: tokenizers.Tokenizer, template: str) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


# A pair of hand-made models that play the fake games. The actor answers "Action: WORD" with the
# word that its system prompt shouts (OPEN -> open; "walk" without one). The reflector is a table of
# next words: it answers in the two sections with a shout drawn evenly, or breaks off.
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
    **{w: {"<|im_end|>": 1.0} for w in _ACTIONS},
}


def save_pair(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The hand-made actor and reflector, in HF layout under `folder`."""
    for name, table in (("actor", _ACTOR_TABLE), ("reflector", _REFLECTOR_TABLE)):
        _save_model(folder / name, table, listens=name == "actor")
    return folder / "actor", folder / "reflector"


def _save_model(folder: pathlib.Path, table: dict[str, dict[str, float]], *, listens: bool) -> None:
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
    if listens:
        layers["q_bias"][0, 0, 7] = 10  # the last dimension hardly turns with the position
        for index, shout in enumerate(SHOUTS):
            layers["k"][0, ids[shout], 0, 7] = 10 / scale
            layers["v"][0, ids[shout], 0, index] = 1 / scale
            layers["o"][0, 0, index, heard + index] = 1
            params["head"][heard + index, ids[shout.lower()]] = 10 / scale
    save_checkpoint(folder, config, params)
    tokenizer.save_pretrained(folder)


def save_tiny_model(folder: pathlib.Path) -> None:
    """A random one-layer model with a word tokenizer, in HF layout."""
    tokenizer = word_tokenizer("walk look open".split())
    config = ModelConfig(
        vocab_size=len(tokenizer),
        num_layers=1,
        d_model=8,
        d_ff=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
    )
    save_checkpoint(folder, config, transformer.init_params(config, jax.random.key(0)))
    tokenizer.save_pretrained(folder)


class ScriptedSampler:
    """Answers `generate` with `script(ids so far, request)`; replies come in an order that depends
    on `order`, as if slots were scarce.
    """

    def __init__(
        self,
        script: Callable[[tuple[int, ...], Request], Sequence[int]],
        *,
        num_slots: int = 4,
        order: int = 0,
    ):
        self._script, self._num_slots, self._rng = script, num_slots, np.random.default_rng(order)
        self._numbers = itertools.count()
        self.ids: dict[int, list[int]] = {}
        self._asked: collections.deque[tuple[int, Request]] = collections.deque()
        self.requests: list[tuple[tuple[int, ...], Request]] = []
        self.max_len = 10**9

    def open(self, ids):
        number = next(self._numbers)
        self.ids[number] = list(ids)
        return number

    def fork(self, conversation):
        return self.open(self.ids[conversation])

    def extend(self, conversation, ids):
        self.ids[conversation] += ids

    def generate(self, conversation, request):
        self._asked.append((conversation, request))

    def close(self, conversation):
        del self.ids[conversation]

    @property
    def idle(self):
        return not self._asked

    def step(self):
        finished = []
        for _ in range(min(self._num_slots, len(self._asked))):
            self._asked.rotate(int(self._rng.integers(len(self._asked))))
            conversation, request = self._asked.popleft()
            before = tuple(self.ids[conversation])
            self.requests.append((before, request))
            if len(before) >= self.max_len:
                finished.append(
                    Generation(conversation=conversation, ids=(), logprobs=(), finish="context")
                )
                continue
            reply = tuple(self._script(before, request))[: request.max_new_tokens]
            self.ids[conversation] += reply
            stopped = bool(reply) and reply[-1] in request.stop_ids
            finished.append(
                Generation(
                    conversation=conversation,
                    ids=reply,
                    logprobs=(-0.5,) * len(reply),
                    finish="stop" if stopped else "length",
                )
            )
        return finished
