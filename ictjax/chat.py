"""Chat templates turn by turn: token ids that only ever grow, with every sampled id kept as it was
sampled.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, overload

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from ictjax.actions import THINK, THOUGHT
from ictjax.models.hf.hub import local_folder
from ictjax.models.hf.json_file import read_json
from ictjax.records import Message, writable
from ictjax.template import ChatTemplate

_REMEDY = (
    "Use a chat template that writes every message after the ones before it and closes a reply with"
    " a special token."
)
# Where two tokenizers differ: spaces, line breaks, contractions, digits, letters that normalise,
# code, other scripts.
_SAMPLE = (
    "The agent's 12,345th try:\n\n  don't  GO north\t(ok?) «naïve» ﬁne e\u0301 \u00e9 def f(x):"
    " return x**2\r\n東京 🙂 "
)
_MAX_STOP_IDS = 16  # published checkpoints have up to 5
_SAMPLED_WORDS = 200  # of the vocabulary
_PROBE = (Message(role="system", content="s"), Message(role="user", content="u"))
_REPLY = "probe reply"
_BREAK = "\ufdd0"  # stands in no text: Unicode keeps it for uses like this one
# What tokenizers call a token that is a byte, where it is none of the byte-level kind.
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_Write = Callable[[Sequence[Message]], str]
_LONG = (
    Message(role="assistant", content=100 * _SAMPLE),
    Message(role="user", content=100 * _SAMPLE),
)


class Tokenizer(Protocol):
    """What is used of the tokenizers of transformers, for the options that it is used with: their
    own annotations are unions over all options.
    """

    name_or_path: str
    chat_template: str | Mapping[str, str] | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    all_special_ids: Sequence[int]
    added_tokens_decoder: Mapping[int, tokenizers.AddedToken]

    def __len__(self) -> int: ...

    @overload
    def __call__(
        self, text: str, *, add_special_tokens: bool = True
    ) -> Mapping[Literal["input_ids"], Sequence[int]]: ...

    @overload
    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: Literal[True],
    ) -> Mapping[Literal["input_ids", "offset_mapping"], Sequence[Any]]: ...

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str: ...

    @property
    def special_tokens_map(self) -> Mapping[str, str]: ...

    def get_vocab(self) -> Mapping[str, int]: ...

    def get_chat_template(self) -> str: ...


class ChatTokenizer:
    """A Hugging Face tokenizer and its chat template, read as start + reply + turn + reply + turn
    ...

    For a conversation, `encode_start(first messages)` then, for every later message, the sampled
    reply ids followed by `encode_turn(message, stopped=...)` equal the template applied to the
    whole conversation, up to the replies, which stay as they were sampled and as the model saw
    them: they are not tokenised again, and a template that drops the thoughts of old replies
    (Qwen3) or trims them drops nothing here. That includes what a generation prompt writes on the
    model's behalf, such as Qwen3's empty thinking block. The sampled stop token belongs to the
    reply; what the template writes behind it (a newline in ChatML) opens the next turn. Templates
    that write today's date write the same day always.

    What a message says stays text: a special token that it spells, or another token that the
    template marks messages with, is encoded in pieces that are none.

    Args:
      source: a folder with tokenizer files, an id on the Hugging Face hub, or a loaded tokenizer
        with a chat template.
      thinking: the template's switch `enable_thinking`; None leaves it to the template.
    Raises:
      ValueError: there is no tokenizer or no chat template, the template cannot be extended turn by
        turn, or it has no thinking switch.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Tokenizer,
        *,
        thinking: bool | None = None,
    ):
        stop_ids: list[int] = []
        if isinstance(source, str | os.PathLike):
            folder = local_folder(source, weights=False)
            stop_ids += generation_stop_ids(folder)
            source = load_tokenizer(folder)
        self._tokenizer = source
        self._name = os.fspath(source.name_or_path) or "the tokenizer"
        self._known = frozenset(source.get_vocab().values())
        if unknown := [number for number in stop_ids if number not in self._known]:
            raise ValueError(
                f"The model in {self._name} ends replies with the id {unknown[0]} (eos_token_id),"
                " which its tokenizer does not have: take both from the same checkpoint."
            )
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer of {self._name} has no chat template, as those of base models: take"
                " the instruction-tuned checkpoint, or put a chat_template.jinja beside it."
            )
        # by what writes messages, their roles, and which are blank: the control tokens between them
        self._frames: dict[tuple[_Write, tuple[tuple[str, bool], ...]], tuple[int, ...]] = {}
        self._template = ChatTemplate(
            self._tokenizer.get_chat_template(), self._tokenizer.special_tokens_map, self._name
        )
        self._switches = {} if thinking is None else {"enable_thinking": thinking}
        self._check_extensible()
        if thinking is not None and self._render(_PROBE) == self._render(
            _PROBE, enable_thinking=not thinking
        ):
            raise ValueError(
                f"The chat template of {self._name} has no thinking switch (enable_thinking): leave"
                " the thinking option at None."
            )
        closing = self._ids(self._turn_text("b"))[0]
        if self._tokenizer.eos_token_id is not None:
            stop_ids.append(self._tokenizer.eos_token_id)
        if closing in self._special_ids:
            stop_ids.append(closing)
        if closing not in stop_ids:
            text = self._tokenizer.decode([closing])
            raise ValueError(
                f"The chat template of {self._name} ends a reply with {text!r}, which is no stop"
                f" token. {_REMEDY}"
            )
        self.stop_ids: tuple[int, ...] = tuple(sorted(set(stop_ids)))
        self._closing = closing
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = closing if pad is None else pad
        self.vocab_size: int = len(self._tokenizer)

    def encode_start(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of a conversation's first messages, up to where the assistant's reply begins."""
        return self._encode(self._render, messages)

    def encode_turn(self, message: Message, *, stopped: bool) -> tuple[int, ...]:
        """The ids between a sampled reply and the next one.

        Args:
          message: the user message that follows the reply.
          stopped: whether the reply's last id is a stop token; otherwise (it was cut off) the
            template's own closing token comes first.
        """
        return self._encode(self._next_text, [message])[1 if stopped else 0 :]

    def encode_reply(self, text: str) -> tuple[int, ...]:
        """The ids of a reply as it would be sampled, the stop token that the template closes it
        with included.
        """
        return (*self._text_ids(text), self._closing)

    def count(self, text: str) -> int:
        """How many tokens a text has on its own."""
        return len(self._text_ids(text))

    def unknown(self, text: str) -> float:
        """The share of a text's tokens that the tokenizer has no word for; 0 for those that spell
        unknown words out.
        """
        ids = self._text_ids(text)
        unknown = self._tokenizer.unk_token_id
        return sum(number == unknown for number in ids) / max(len(ids), 1)

    def unused(self, num_ids: int) -> tuple[range, ...]:
        """The ids that no text has, of the `num_ids` that a model has embeddings of; a sampler is
        told to leave them out.
        """
        return unused_ids(self._known, num_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a reply, without special tokens but those around thoughts."""
        if self._thought_ids:
            ids = [i for i in ids if i not in self._special_ids or i in self._thought_ids]
        return self._tokenizer.decode(
            list(ids),
            skip_special_tokens=not self._thought_ids,
            clean_up_tokenization_spaces=False,
        )

    def spelled(self, number: int) -> str:
        """One token on its own, a special one by its name."""
        return self._tokenizer.decode([number], clean_up_tokenization_spaces=False)

    def part_bytes(self, number: int) -> bytes | None:
        """The bytes of a token that ends or begins within a character, and so has no text; None
        where the tokenizer's name of it does not tell them.
        """
        name = self._names[number]
        if byte := _BYTE.fullmatch(name):
            return bytes.fromhex(byte[1])
        alphabet = _byte_alphabet()
        known = all(character in alphabet for character in name)
        return bytes(alphabet[character] for character in name) if known else None

    @functools.cached_property
    def opened(self) -> str:
        """The beginning of a thought that the template writes before every reply, `<think>` and the
        blanks behind it; empty where it writes none, or a whole thought.
        """
        before = self._render(_PROBE)
        begun = before[before.rfind(THINK) :] if THINK in before else ""
        return "" if begun.removeprefix(THINK).strip() else begun

    @functools.cached_property
    def _names(self) -> Mapping[int, str]:
        return {number: name for name, number in self._tokenizer.get_vocab().items()}

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(added | set(self._tokenizer.all_special_ids))

    @functools.cached_property
    def _thought_ids(self) -> frozenset[int]:
        """Of the marks around thoughts, where they are special tokens."""
        added = self._tokenizer.added_tokens_decoder.items()
        marks = {i for i, token in added if token.content in (THINK, THOUGHT)}
        return self._special_ids & marks

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        """What no text may become: special tokens, and what the template marks messages with where
        that is no special token. Other added tokens are words, such as runs of spaces.
        """
        added = self._tokenizer.added_tokens_decoder
        talk = [*_PROBE, Message(role="assistant", content=_REPLY), _PROBE[1]]
        marks = {
            i for i in self._ids(self._render(talk)) if i in added and added[i].content.strip()
        }
        return (self._special_ids | marks) - {self._tokenizer.unk_token_id}

    def _encode(self, write: _Write, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of what the template writes for messages, of which none is read as control."""
        messages = [_said(message, writable(message.content)) for message in messages]
        ids = self._ids(write(messages))
        shape = write, tuple((message.role, not message.content.strip()) for message in messages)
        if shape not in self._frames:
            plain = [_said(m, "x" if m.content.strip() else m.content) for m in messages]
            self._frames[shape] = self._controls(self._ids(write(plain)))
        if self._controls(ids) == self._frames[shape]:
            return ids
        pieces = write([_said(m, self._in_pieces(m.content)) for m in messages]).split(_BREAK)
        return tuple(number for piece in pieces for number in self._ids(piece))

    def _controls(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(number for number in ids if number in self._control_ids)

    def _in_pieces(self, text: str) -> str:
        """A text with a break inside of everything that would be read as a control token."""
        pieces, finished = [text.replace(_BREAK, "")], False
        while not finished:
            parts = [self._cut(piece) for piece in pieces]
            finished = len(pieces) == sum(map(len, parts))
            pieces = [piece for part in parts for piece in part]
        return _BREAK.join(pieces)

    def _cut(self, text: str) -> list[str]:
        """The pieces of a text that is cut behind the first character of each control token; one of
        a single character becomes a space.
        """
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pieces, last = [], 0
        for number, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            if number in self._control_ids and end > start >= last:
                whole = end - start > 1
                pieces.append(text[last:start] + (text[start] if whole else " "))
                last = start + 1
        return [*pieces, text[last:]]

    def _text_ids(self, text: str) -> tuple[int, ...]:
        return self._encode(_alone, [Message(role="user", content=text)])

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Sequence[Message], **switches: bool) -> str:
        return self._template.render(_plain(messages), {**self._switches, **switches})

    @functools.cached_property
    def _before_reply(self) -> str:
        """What the template writes before a reply that is no longer the last one; a generation
        prompt may go on from there.
        """
        messages = [
            *_PROBE,
            Message(role="assistant", content=_REPLY),
            Message(role="user", content="b"),
        ]
        return self._render(messages).partition(_REPLY)[0]

    def _next_text(self, messages: Sequence[Message]) -> str:
        (message,) = messages
        return self._turn_text(message.content, message.role)

    def _turn_text(self, content: str, role: str = "user") -> str:
        """What the template writes between a reply and the next one, found on a conversation of
        one-letter messages.
        """
        messages = [
            *_PROBE,
            Message(role="assistant", content="a"),
            Message(role=role, content=content),
        ]
        return self._render(messages)[len(self._before_reply) + 1 :]

    def _check_extensible(self) -> None:
        replies, answers = [f"{_REPLY} {n}" for n in range(4)], [f"answer {n}" for n in range(4)]
        messages = [*_PROBE]
        for reply, answer in zip(replies, answers, strict=True):
            messages += [
                Message(role="assistant", content=reply),
                Message(role="user", content=answer),
            ]
        self._template.check(
            [_plain(talk) for talk in (_PROBE, messages, [*messages, *messages[2:], *_LONG])],
            self._switches,
        )
        grown, whole = self._render(_PROBE), self._render(messages)
        turns = [self._turn_text(answer) for answer in answers]
        if grown.startswith(self._before_reply):
            # by the generation prompt, for the model; old replies are shown without it
            opened = grown.removeprefix(self._before_reply)
            inside = "".join(
                reply + turn.removesuffix(opened)
                for reply, turn in zip(replies, turns, strict=True)
            )
            grown = self._before_reply + inside + opened
        if grown != whole:
            at = max(0, _num_common(grown, whole) - 20)
            raise ValueError(
                f"The chat template of {self._name} cannot be extended turn by turn: a grown"
                f" conversation reads {grown[at : at + 60]!r} where the template writes"
                f" {whole[at : at + 60]!r}. {_REMEDY}"
            )
        if not turns[0].strip():
            raise ValueError(
                f"The chat template of {self._name} writes nothing between a reply and the next"
                f" question. {_REMEDY}"
            )


def _said(message: Message, content: str) -> Message:
    return Message(role=message.role, content=content)


def _alone(messages: Sequence[Message]) -> str:
    return "".join(message.content for message in messages)


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a folder or of an id on the Hugging Face hub, as transformers' AutoTokenizer
    reads it.

    Where that splits text in another way than the folder's own tokenizer.json says, the file is
    obeyed: with a config.json of another family beside it, AutoTokenizer silently replaces its
    rules by that family's.

    Raises:
      ValueError: there is no tokenizer, or its files cannot be read.
    """
    folder = local_folder(source, weights=False)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(
                f"No tokenizer in {folder} ({name} is missing): name a folder with a checkpoint in"
                " HF layout, or write the file with transformers' save_pretrained."
            )
    _refuse_code(folder)
    try:
        rules = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if not rules.get_vocab(with_added_tokens=False):
            raise ValueError("tokenizer.json holds no words")
        # it fails where the file does not have what its family's tokenizers have
        with contextlib.suppress(Exception):
            tokenizer = _read(AutoTokenizer, folder)
            if _agree(tokenizer, rules):
                return tokenizer
        tokenizer = _read(PreTrainedTokenizerFast, folder)
        tokenizer(_SAMPLE)  # settings of a wrong type are first met here
        return tokenizer
    except Exception as error:  # the libraries raise all kinds
        detail = " ".join(str(error).split())[:300]
        raise ValueError(
            f"The tokenizer in {folder} cannot be read ({detail}): take the files that the"
            " checkpoint was published with."
        ) from error


def unused_ids(known: Iterable[int], num_ids: int) -> tuple[range, ...]:
    """The ids below `num_ids` that are not in `known`."""
    bounds = [-1, *sorted(number for number in set(known) if number < num_ids), num_ids]
    gaps = (range(before + 1, after) for before, after in itertools.pairwise(bounds))
    return tuple(gap for gap in gaps if gap)


@functools.cache
def _byte_alphabet() -> Mapping[str, int]:
    """The bytes by what byte-level tokenizers (GPT-2's and its heirs) write for them: themselves
    where they are visible in Latin-1, the others in order from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def generation_stop_ids(folder: pathlib.Path) -> list[int]:
    """The ids that end a generation by generation_config.json, or where there is none by
    config.json, as in transformers. Raises ValueError where the file says anything else than ids.
    """
    path = next(
        (
            path
            for name in ("generation_config.json", "config.json")
            if (path := folder / name).is_file()
        ),
        None,
    )
    if path is None:
        return []
    named = read_json(path).get("eos_token_id")
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if len(ids) > _MAX_STOP_IDS or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(
            f"{path} sets eos_token_id to {str(named)[:60]!r}: give an id, or a list of at most"
            f" {_MAX_STOP_IDS}."
        )
    return ids


def _refuse_code(folder: pathlib.Path) -> None:
    """Raises ValueError for a tokenizer that is a program of its own: none is ever run."""
    settings = read_json(folder / "tokenizer_config.json")
    code, kind = settings.get("auto_map"), settings.get("tokenizer_class")
    if isinstance(code, dict):
        code = code.get("AutoTokenizer")
    if code and not (isinstance(kind, str) and tokenizer_class_from_name(kind)):
        raise ValueError(
            f"The tokenizer in {folder} is a program ({json.dumps(code)[:200]}, by auto_map in"
            " tokenizer_config.json), which is never run: take a checkpoint whose tokenizer"
            " transformers has itself, or remove auto_map to read tokenizer.json alone."
        )


def _read(reader: Any, folder: pathlib.Path) -> Tokenizer:
    """Where transformers' own annotations end: AutoTokenizer's say None, which it never returns."""
    return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _num_common(one: str, two: str) -> int:
    differ = (i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y)
    return next(differ, min(len(one), len(two)))


def _agree(tokenizer: Tokenizer, rules: tokenizers.Tokenizer) -> bool:
    vocabulary = sorted(rules.get_vocab(with_added_tokens=True))
    text = _SAMPLE + " ".join(vocabulary[:: len(vocabulary) // _SAMPLED_WORDS + 1])
    return (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        == rules.encode(text, add_special_tokens=False).ids
    )
