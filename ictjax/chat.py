"""Chat templates turn by turn: token ids that only ever grow, with every sampled id kept as it was sampled."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ictjax.records import Message

_REMEDY = "Use a chat template that writes every message after the ones before it and closes a reply with a special token."


class ChatTokenizer:
    """A Hugging Face tokenizer and its chat template, read as start + reply + turn + reply + turn ...

    For a conversation, `encode_start(first messages)` then, for every later message, the sampled reply ids followed by
    `encode_turn(message, stopped=...)` equal the template applied to the whole conversation, up to the sampled ids, which are never
    re-tokenised. The sampled stop token belongs to the reply; what the template writes behind it (a newline in ChatML) opens the next turn.
    A template that rewrites old replies (dropping thoughts, say) is followed with the replies as sampled.

    Args:
      source: a folder with tokenizer files (nothing is downloaded), or a loaded tokenizer with a chat template.
    Raises:
      ValueError: the folder holds no tokenizer, there is no chat template, or the template cannot be extended turn by turn.
    """

    def __init__(self, source: str | pathlib.Path | PreTrainedTokenizerBase):
        stop_ids: list[int] = []
        if isinstance(source, str | pathlib.Path):
            folder = pathlib.Path(source)
            if not (folder / "tokenizer_config.json").is_file():
                raise ValueError(
                    f"No tokenizer in {folder} (tokenizer_config.json is missing): name a folder with a checkpoint in HF layout."
                )
            stop_ids += _generation_stop_ids(folder / "generation_config.json")
            # With a config.json of another family beside it, AutoTokenizer silently replaces the rules of tokenizer.json by that family's own.
            loader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
            source = loader.from_pretrained(folder, local_files_only=True)
        self._tokenizer: Any = source
        if not self._tokenizer.chat_template:
            raise ValueError(f"The tokenizer {self._tokenizer.name_or_path!r} has no chat template. {_REMEDY}")
        self._check_extensible()
        closing = self._ids(self._turn_text("b"))[0]
        if self._tokenizer.eos_token_id is not None:
            stop_ids.append(self._tokenizer.eos_token_id)
        if closing in self._special_ids:
            stop_ids.append(closing)
        if closing not in stop_ids:
            text = self._tokenizer.decode([closing])
            raise ValueError(f"The chat template ends a reply with {text!r}, which is no stop token. {_REMEDY}")
        self.stop_ids: tuple[int, ...] = tuple(sorted(set(stop_ids)))
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = closing if pad is None else pad
        self.vocab_size: int = len(self._tokenizer)

    def encode_start(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of a conversation's first messages, up to where the assistant's reply begins."""
        return self._ids(self._render(messages))

    def encode_turn(self, message: Message, *, stopped: bool) -> tuple[int, ...]:
        """The ids between a sampled reply and the next one.

        Args:
          message: the user message that follows the reply.
          stopped: whether the reply's last id is a stop token; otherwise (it was cut off) the template's own closing token comes first.
        """
        return self._ids(self._turn_text(message.content, message.role))[1 if stopped else 0 :]

    def count(self, text: str) -> int:
        """How many tokens a text has on its own."""
        return len(self._ids(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a reply, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(added | set(self._tokenizer.all_special_ids))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Sequence[Message], generate: bool = True) -> str:
        plain = [{"role": m.role, "content": m.content} for m in messages]
        return self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generate)

    def _turn_text(self, content: str, role: str = "user") -> str:
        """What the template writes between a reply and the next one, found on a conversation of one-letter messages."""
        return self._render([*_PROBE, Message(role="assistant", content="a"), Message(role=role, content=content)])[self._probe_length :]

    @functools.cached_property
    def _probe_length(self) -> int:
        return len(self._render(_PROBE)) + 1

    def _check_extensible(self) -> None:
        try:
            start = self._render(_PROBE)
            turns = [self._turn_text("second question"), self._turn_text("third question")]
            replies = ["first reply", "second reply"]
            whole = self._render(
                [
                    *_PROBE,
                    Message(role="assistant", content=replies[0]),
                    Message(role="user", content="second question"),
                    Message(role="assistant", content=replies[1]),
                    Message(role="user", content="third question"),
                ]
            )
        except Exception as error:  # jinja raises what the template asks for
            message = f"The chat template refuses a conversation of system, user and assistant messages ({error}). {_REMEDY}"
            raise ValueError(message) from error
        grown = start + replies[0] + turns[0] + replies[1] + turns[1]
        if grown != whole:
            at = max(0, len(_common_start(grown, whole)) - 20)
            raise ValueError(
                f"The chat template cannot be extended turn by turn: a grown conversation reads {grown[at : at + 60]!r} where the template "
                f"writes {whole[at : at + 60]!r}. {_REMEDY}"
            )
        if not turns[0].strip():
            raise ValueError(f"The chat template writes nothing between a reply and the next question. {_REMEDY}")


_PROBE = (Message(role="system", content="s"), Message(role="user", content="u"))


def _common_start(one: str, two: str) -> str:
    differ = (i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y)
    return one[: next(differ, min(len(one), len(two)))]


def _generation_stop_ids(path: pathlib.Path) -> list[int]:
    if not path.is_file():
        return []
    ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
    return [ids] if isinstance(ids, int) else list(ids)
