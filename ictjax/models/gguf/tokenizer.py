"""The tokenizer of a GGUF file, as the files of a Hugging Face one."""

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ictjax.models.gguf.file import GGUF
from ictjax.ranges import shown

_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # token_type
_SPACE = "▁"  # of SentencePiece
# Ends of a turn besides the file's own eos, where it has them as control tokens.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def _words(digits: str) -> str:
    """How Llama 3 and Qwen 2 split text; they differ in how many digits make a word."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


# How text is split before byte-level BPE, by the file's tokenizer.ggml.pre.
_PRE: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = MappingProxyType(
    {
        "default": _gpt2,
        "gpt-2": _gpt2,
        "smollm": _smollm,
        "qwen2": lambda: _split(_words(r"\p{N}")),
        "llama-bpe": lambda: _split(_words(r"\p{N}{1,3}")),
    }
)


def hf_tokenizer(file: GGUF) -> dict[str, str]:
    """The text of tokenizer.json, tokenizer_config.json and generation_config.json, by name.

    Raises:
      ValueError: another kind of tokenizer, or ids that are none.
    """
    kind = file.need("tokenizer.ggml.model")
    tokens = [str(token) for token in file.need_list("tokenizer.ggml.tokens")]
    if len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{file.path} has tokens twice: take another file of the model, or its own checkpoint"
        )
    types = file.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    special = {
        name: tokens[number]
        for name, key in _SPECIAL.items()
        if (number := _id(file, key, len(tokens))) is not None
    }
    if kind == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif kind == "llama":
        tokenizer = _sentence_piece(file, tokens, types)
    else:
        raise ValueError(
            f"{file.path} has a tokenizer of the kind {shown(kind)}: read are gpt2 and llama"
        )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (_UNKNOWN, _CONTROL)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == _USER
        ]
    )
    bos = special.get("bos_token")
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    template = file.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template
    ends = {_id(file, key, len(tokens)) for key in _END_KEYS}
    ends |= {
        number
        for number, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ == _CONTROL and token in _ENDS
    }
    generation = {"eos_token_id": sorted(number for number in ends if number is not None)}
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }


def _id(file: GGUF, key: str, count: int) -> int | None:
    number = file.get(f"tokenizer.ggml.{key}")
    if number is not None and not (isinstance(number, int) and 0 <= number < count):
        raise ValueError(
            f"{file.path} sets tokenizer.ggml.{key} to {shown(number)}, no id of its {count}"
            " tokens: take another file of the model"
        )
    return number


def _byte_level(file: GGUF, tokens: list[str]) -> Tokenizer:
    """Of GPT-2's kind: byte-level BPE by the file's merges."""
    pre = file.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE:
        raise ValueError(
            f"{file.path} splits text in the way {shown(pre)} (tokenizer.ggml.pre): known are"
            f" {', '.join(_PRE)}"
        )
    parts = (str(merge).partition(" ") for merge in file.need_list("tokenizer.ggml.merges"))
    merges = [(left, right) for left, _, right in parts]
    try:
        model = models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre == "llama-bpe",
        )
    except Exception as error:  # the library raises bare Exceptions
        detail = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file.path} has merges that do not fit its tokens ({detail}): take another file of"
            " the model"
        ) from error
    tokenizer = Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(file: GGUF, tokens: list[str], types: list[int]) -> Tokenizer:
    """Of SentencePiece's kind: BPE whose merges are told by the scores of what they make."""
    scores = file.need_list("tokenizer.ggml.scores")
    unknown = next((t for t, type_ in zip(tokens, types, strict=True) if type_ == _UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=_merges(tokens, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    after: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_SPACE))
        after.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(after)
    return tokenizer


def _merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Best scores first; of one token, pairs in the order of their parts' ids."""
    ids = {token: number for number, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]
