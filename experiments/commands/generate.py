"""`ictjax generate --model DIR --prompt TEXT`."""

import contextlib
import dataclasses
import pathlib
import readline  # noqa: F401 (input() edits its lines with it)
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from envs.stopping import waiting_for_key
from experiments.command import Flags, parse, run_main
from experiments.local_path import local_path
from experiments.model_flags import ModelFlags
from experiments.presets import check_model
from experiments.visible import visible
from ictjax.config import MIN_P, TEMPERATURE, TOP_P, check_stop
from ictjax.ranges import Range

_DESCRIPTION = (
    "Generates text with a model: the answer to --prompt by its chat template, the continuation of"
    " --prompt --raw or of --tokens, or, with neither, a conversation where you type the prompts."
    ' The text comes as it is sampled; with --json the last line is {"ids": [...], "logprobs":'
    " [...]} of the sampled tokens."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateArgs(Flags):
    """All flags."""

    model: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder in Hugging Face layout, or id on the hub."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """What you say; without it (and without --tokens), a conversation on the terminal."""
    tokens: Annotated[str | None, tyro.conf.arg(metavar="IDS", help_behavior_hint="")] = None
    """Ids to continue, as 1,2,3; the folder needs no tokenizer then."""
    system: Annotated[
        str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: the chat template's)")
    ] = ""
    """System prompt."""
    raw: bool = False
    """Continue the prompt as it stands, without a chat template."""
    thinking: Annotated[
        bool | None,
        tyro.conf.arg(metavar="{True,False}", help_behavior_hint="(default: the template's)"),
    ] = None
    """Thinking switch of the chat template (Qwen3)."""
    adapter: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = (
        None
    )
    """Folder with a LoRA adapter in PEFT's format, put on the model."""
    max_new_tokens: Annotated[int, Range(1, 16_777_216)] = 256
    """Most tokens to sample, per reply."""
    greedy: bool = False
    """Take the likeliest token always, instead of sampling."""
    temperature: Annotated[float, TEMPERATURE] = 1.0
    """Of sampling."""
    top_p: Annotated[float, TOP_P] = 1.0
    """Sample from the likeliest tokens of this mass; 1: off."""
    min_p: Annotated[float, MIN_P] = 0.0
    """Sample from tokens that have this share of the likeliest one's probability; 0: off."""
    stop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...", help_behavior_hint="")] = ()
    """Texts that end a reply, and are not part of it."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Of sampling: the same seed gives the same text."""
    ignore_stop: bool = False
    """Go on behind stop tokens, up to --max-new-tokens."""
    json: bool = False
    """Print ids and log-probabilities of the sampled tokens as the last line."""
    held: Annotated[ModelFlags, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ModelFlags
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stop("--stop", self.stop)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again.")


def _main(argv: list[str]) -> None:
    args = parse(GenerateArgs, "generate", _DESCRIPTION, argv)
    if args.prompt is None and args.tokens is None and not sys.stdin.isatty():
        raise ValueError("--prompt is missing (or --tokens; a conversation needs a terminal).")
    args = dataclasses.replace(args, model=local_path(args.model, "--model"))
    check_model(args.model, "--model")
    # what answers is JAX; flags are right when it is loaded
    from experiments.generate import generate

    generate(args, _write, _ask)


def _write(text: str) -> None:
    # a file or another program gets the text itself
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _ask() -> str | None:
    with contextlib.suppress(EOFError), waiting_for_key():
        return input("> ")
    return None
