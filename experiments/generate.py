"""What a model answers, in the terminal; without a prompt, a conversation.

The text comes as it is sampled. With --json the last line is {"ids": [...], "logprobs": [...]} of
the sampled tokens.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence

from experiments.commands.generate import GenerateArgs, main
from experiments.held_model import held_model, read_weights, with_flags
from experiments.memory import check_fits, sampler_uses
from experiments.presets import adapter_folder, model_folder
from ictjax import keys
from ictjax.chat import (
    ChatTokenizer,
    Tokenizer,
    generation_stop_ids,
    load_tokenizer,
    unused_ids,
)
from ictjax.config import SamplerConfig
from ictjax.models.config import ModelConfig
from ictjax.models.lora import with_adapter
from ictjax.models.peft import load_adapter
from ictjax.records import Message
from ictjax.reply_text import ReplyText
from ictjax.sampler import Generation, Request, Sampler

_MAX_CHAT_TOKENS = 32_768  # of a conversation, where the model has as many positions
_MIN_TOKENS = 256
_MAX_TOP_K = 64
_PAD_ID = 0  # any id does: attention never sees it


class Typist:
    """A model in a sampler with one slot, whose replies are shown as they grow.

    Args:
      decode: ids -> text.
      show: is given every new piece of text.
      stop: texts that end a reply.
      with_json: show ids and log-probabilities of a reply behind it.
    """

    def __init__(
        self,
        sampler: Sampler,
        decode: Callable[[Sequence[int]], str],
        show: Callable[[str], None],
        *,
        stop: Sequence[str],
        with_json: bool,
    ):
        self._sampler, self._decode, self._show, self._with_json = sampler, decode, show, with_json
        self._stop = stop

    def reply(self, conversation: int, request: Request) -> Generation:
        """Samples one reply of an open conversation."""
        text, shown, finished = ReplyText(self._decode, self._stop), 0, []
        self._sampler.generate(conversation, dataclasses.replace(request, ends=text.read))
        while not finished:
            finished = self._sampler.step()
            ready = text.text if finished else text.shown
            self._show(ready[shown:])
            shown = len(ready)
        self._show("\n")
        if self._with_json:
            self._show(
                json.dumps({"ids": finished[0].ids, "logprobs": finished[0].logprobs}) + "\n"
            )
        return finished[0]


def generate(
    args: GenerateArgs, write: Callable[[str], None], ask: Callable[[], str | None]
) -> None:
    """Does what the flags say.

    Args:
      write: is given the text, piece by piece.
      ask: the next prompt of a conversation, None at its end; called without --prompt and --tokens
        only.
    Raises:
      ValueError: a model, a tokenizer, a prompt or a setting that cannot be used.
    """
    folder = pathlib.Path(model_folder(args.model, "--model"))
    model = held_model(folder, args.held)
    talks = args.prompt is None and args.tokens is None
    if args.tokens is None and not args.raw:
        chat = ChatTokenizer(folder, thinking=args.thinking)
        ids = () if args.prompt is None else chat.encode_start(_first(args, args.prompt))
        stop_ids, decode = chat.stop_ids, chat.decode
        unused = chat.unused(model.vocab_size)
    else:
        chat, (ids, stop_ids, decode, unused) = None, _plain(args, folder, model)
    if len(ids) >= model.max_positions:
        raise ValueError(
            f"The prompt has {len(ids)} tokens, the model {model.max_positions} positions:"
            " shorten it."
        )
    # A power of two, so that JAX's cache on disk, where it is switched on, mostly has the compiled
    # programs.
    whole = (
        _MAX_CHAT_TOKENS
        if talks
        else 1 << (max(len(ids) + args.max_new_tokens, _MIN_TOKENS) - 1).bit_length()
    )
    sizes = with_flags(_sizes(min(whole, model.max_positions), len(stop_ids)), args.held)
    check_fits(
        "Weights and cache",
        sampler_uses("model", model, sizes),
        "Give fewer --max-new-tokens, --dtype bfloat16, or free memory.",
    )
    params = read_weights(folder, model)
    if args.adapter is not None:
        lora, adapter = load_adapter(adapter_folder(str(args.adapter), "--adapter"), model)
        params = with_adapter(lora, params, adapter)
    with Sampler(
        model,
        params,
        sizes,
        _PAD_ID,
        unused=unused,
    ) as sampler:
        typist = Typist(sampler, decode, write, stop=args.stop, with_json=args.json)
        if chat is not None and talks:
            _talk(args, chat, sampler, typist, ask)
        else:
            typist.reply(sampler.open(ids), _request(args, stop_ids))


def _request(args: GenerateArgs, stop_ids: Sequence[int], turn: int = 0) -> Request:
    """How the reply of a turn is sampled."""
    return Request(
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=0,
        top_p=args.top_p,
        min_p=args.min_p,
        stop_ids=() if args.ignore_stop else tuple(stop_ids),
        key=keys.as_array(keys.fold(keys.root_key(args.seed), turn)),
    )


def _talk(
    args: GenerateArgs,
    chat: ChatTokenizer,
    sampler: Sampler,
    typist: Typist,
    ask: Callable[[], str | None],
) -> None:
    """A conversation; every token of it is computed once."""
    conversation, stopped, turn = None, False, 0
    while (text := ask()) is not None:
        if not text.strip():
            continue
        if conversation is None:
            conversation = sampler.open(chat.encode_start(_first(args, text)))
        else:
            sampler.extend(
                conversation, chat.encode_turn(Message(role="user", content=text), stopped=stopped)
            )
        said = typist.reply(conversation, _request(args, chat.stop_ids, turn))
        if said.finish == "context":
            print("The context is full.", file=sys.stderr)
            return
        stopped, turn = bool(said.ids) and said.ids[-1] in chat.stop_ids, turn + 1


def _first(args: GenerateArgs, prompt: str) -> list[Message]:
    if not prompt.strip():
        raise ValueError("--prompt is empty: say something, or give --tokens.")
    system = [Message(role="system", content=args.system)] if args.system else []
    return [*system, Message(role="user", content=prompt)]


def _plain(
    args: GenerateArgs, folder: pathlib.Path, model: ModelConfig
) -> tuple[list[int], list[int], Callable[[Sequence[int]], str], tuple[range, ...]]:
    """Ids, stop ids, decoder and unused ids without a chat template: of --tokens (shown as numbers
    where there is no tokenizer) or of --prompt --raw.
    """
    for name, given in (("--system", bool(args.system)), ("--thinking", args.thinking is not None)):
        if given:
            raise ValueError(
                f"{name} is for the chat template, which --raw and --tokens do without: drop one of"
                " them."
            )
    stop_ids = generation_stop_ids(folder)
    if args.tokens is not None:
        if args.prompt is not None:
            raise ValueError("Both --prompt and --tokens are given: drop one of them.")
        try:
            ids = [int(token) for token in args.tokens.split(",")]
        except ValueError:
            raise ValueError(f"--tokens is {args.tokens!r}: give ids as 1,2,3.") from None
        if outside := [token for token in ids if not 0 <= token < model.vocab_size]:
            raise ValueError(
                f"--tokens holds {outside[0]}, which is not in the model's vocabulary, 0 to"
                f" {model.vocab_size - 1}."
            )
        if not (folder / "tokenizer_config.json").is_file():
            return ids, stop_ids, lambda sampled: "".join(f"{token} " for token in sampled), ()
        tokenizer = load_tokenizer(folder)
    else:
        if not args.prompt:
            raise ValueError("--raw continues a prompt, and there is none: give --prompt TEXT.")
        tokenizer = load_tokenizer(folder)
        ids = list(tokenizer(args.prompt)["input_ids"])
    unused = unused_ids(tokenizer.get_vocab().values(), model.vocab_size)
    return ids, stop_ids, _decoder(tokenizer), unused


def _decoder(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    return lambda sampled: tokenizer.decode(
        sampled, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _sizes(max_len: int, num_stop_ids: int) -> SamplerConfig:
    return SamplerConfig(
        num_slots=1,
        max_len=max_len,
        extend_buckets=tuple(sorted({min(64, max_len), min(512, max_len)})),
        row_buckets=(1,),
        decode_steps=8,
        max_top_k=_MAX_TOP_K,
        max_stop_ids=max(num_stop_ids, 4),
    )


if __name__ == "__main__":
    main()
