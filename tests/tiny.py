"""Test doubles that several tests share: a tiny tokenizer and checkpoint on disk, and a sampler
that says what a script tells it.
"""

import collections
import itertools
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from experiments.fake_pair import TEMPLATE, chat_tokenizer, word_tokenizer
from ictjax.models import transformer
from ictjax.models.config import ModelConfig
from ictjax.models.hf import save_checkpoint
from ictjax.sampler import Generation, Request


def byte_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Every byte is a token, and so are the special tokens: any text round-trips."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return chat_tokenizer(backend, template)


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
            kept = None if request.ends is None else request.ends(reply)
            reply = reply[:kept]
            self.ids[conversation] += reply
            stopped = kept is not None or (bool(reply) and reply[-1] in request.stop_ids)
            finished.append(
                Generation(
                    conversation=conversation,
                    ids=reply,
                    logprobs=(-0.5,) * len(reply),
                    finish="stop" if stopped else "length",
                )
            )
        return finished
