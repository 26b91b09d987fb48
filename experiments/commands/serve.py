"""`ictjax serve --model DIR`."""

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

import tyro

from experiments.command import Flags, parse, run_main
from experiments.local_path import local_path
from experiments.model_flags import ModelFlags
from experiments.presets import check_model, shipped_folder
from ictjax.extras import install
from ictjax.ranges import Range

KEY_VARIABLE = "ICTJAX_API_KEY"
_DESCRIPTION = (
    "Answers programs that speak OpenAI's API (POST /v1/chat/completions, GET /v1/models, GET"
    " /health), with a model and any number of its adapters, each by a name of its own. All"
    " conversations are computed together; one that is sent again with another turn starts from"
    " what is cached. Clients must send a key if the environment variable ICTJAX_API_KEY holds one."
    " The first Ctrl-C or SIGTERM lets replies end, the second one ends the server at once."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeArgs(Flags):
    """All flags."""

    model: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder in Hugging Face layout, or id on the hub."""
    name: Annotated[
        str, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the folder's name, or id)")
    ] = ""
    """What clients call the model."""
    adapter: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME=DIR ...", help_behavior_hint="")
    ] = ()
    """LoRA adapters of the model in PEFT's format, and what clients call the model with each."""
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    """Where to listen; 0.0.0.0 is every address of this machine."""
    port: Annotated[int, Range(0, 65_535)] = 8000
    """0: any free one."""
    num_conversations: Annotated[int, Range(1, 4096)] = 8
    """That are computed at the same time, of the model and of each adapter; they take memory."""
    max_len: Annotated[
        int | None,
        Range(16, 16_777_216),
        tyro.conf.arg(metavar="N", help_behavior_hint="(default: of the model, 8192 at most)"),
    ] = None
    """Tokens of a conversation, the reply included."""
    page_size: Annotated[
        int | None,
        Range(1, 16_777_216, also=0),
        tyro.conf.arg(metavar="N", help_behavior_hint="(default: 128 tokens; on CPUs 0)"),
    ] = None
    """Of a page of the cache, which conversations take as they grow; 0: all of it at once."""
    max_replies: Annotated[int, Range(1, 1_000_000)] = 256
    """Under way and waiting, of all clients together; others are told to come back (429)."""
    max_request_kib: Annotated[int, Range(1, 1_048_576)] = 4096
    """Longest request."""
    grace_s: Annotated[float, Range(0, 86_400)] = 20.0
    """How long replies may go on when the server is asked to end."""
    thinking: Annotated[
        bool | None,
        tyro.conf.arg(metavar="{True,False}", help_behavior_hint="(default: the template's)"),
    ] = None
    """Thinking switch of the chat template (Qwen3)."""
    warmup: bool = False
    """Compile all programs before the first client is let in; else each when it is first needed."""
    check: bool = False
    """Ask each name one question over HTTP, say what it answered, and end."""
    held: Annotated[ModelFlags, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ModelFlags
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again to serve on.")


def read_adapters(pairs: Sequence[str], name: str) -> Mapping[str, str]:
    """Folder of every adapter by name. Raises ValueError for what is no pair, or a name that is
    taken.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        adapter, equals, folder = pair.partition("=")
        if not (adapter and equals and folder):
            raise ValueError(f"--adapter takes pairs, as tuned=runs/adapter, not {pair!r}.")
        if adapter in found or adapter == name:
            raise ValueError(
                f"--adapter {pair} has the name of another model: give each a name of its own."
            )
        found[adapter] = local_path(folder, "--adapter")
    return found


def _main(argv: list[str]) -> None:
    args = parse(ServeArgs, "serve", _DESCRIPTION, argv)
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"To serve, the package {package} is needed: in the clone, run"
                f" `{install('serve')}`."
            )
    args = dataclasses.replace(args, model=local_path(args.model, "--model"))
    check_model(args.model, "--model")
    if not args.name:
        folder = shipped_folder(args.model)
        args = dataclasses.replace(
            args, name=args.model if folder is None else folder.resolve().name
        )
    adapters = read_adapters(args.adapter, args.name)
    # what answers is JAX; flags are right when it is loaded
    from experiments.serve import serve

    serve(args, adapters)
