"""`ictjax sft`."""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from experiments.command import Flags, parse, run_main
from experiments.local_path import check_place, command_line
from ictjax.config import PROJECTIONS, Dtype, Remat
from ictjax.ranges import Range

_DESCRIPTION = (
    "Trains a model on chats, the loss being that of its replies: a start for models that cannot"
    " play or reflect yet. Writes a LoRA adapter in PEFT's format, which train, play, generate and"
    " serve take, or with --rank 0 the whole model. Started again with the same flags,"
    " on the same devices or others, it goes on where it was stopped."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftArgs(Flags):
    """What to train, on what, and how long."""

    model: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder in Hugging Face layout, GGUF file, or id on the hub."""
    data: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE")]
    """Chats, one JSON object a line: {"messages": [{"role": "user", "content": "..."}, {"role":
    "assistant", "content": "..."}, ...]}, a system message first where there is one."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")]
    """The folder to write to."""
    held_out: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: a share of --data)"),
    ] = None
    """Chats that are not trained on, for the held-out loss."""
    held_out_share: Annotated[float, Range(0, 0.9)] = 0.05
    """The share of the chats of --data that are held out, where --held-out is not given."""
    epochs: Annotated[int, Range(1, 100_000)] = 1
    """How often every chat is seen."""
    rows: Annotated[int, Range(1, 65_536)] = 4
    """Rows of a step; where microbatches and devices do not divide them, padding is added."""
    row_tokens: Annotated[int, Range(2, 1_048_576)] = 1024
    """Tokens of a row, into which chats are packed."""
    microbatches: Annotated[int, Range(1, 65_536)] = 1
    """Parts of the rows whose gradients are accumulated."""
    overlong: Literal["refuse", "drop", "cut"] = "refuse"
    """What happens to chats that are longer than a row."""
    learning_rate: Annotated[float, Range(1e-9, 10)] = 2e-4
    """After the warm-up, falling to 0 along a cosine."""
    warmup_steps: Annotated[int, Range(0, 1_000_000)] = 10
    """Steps until it is reached."""
    weight_decay: Annotated[float, Range(0, 1000)] = 0.0
    """Of everything that is trained."""
    adapter: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = ""
    """Adapter in PEFT's format to start from, of the same rank, alpha and targets."""
    rank: Annotated[int, Range(0, 16_384)] = 16
    """Of the adapter; 0 trains all weights."""
    alpha: Annotated[float, Range(1e-6, 1e6)] = 32.0
    """The adapter is scaled by alpha / rank."""
    targets: tuple[str, ...] = PROJECTIONS
    """Projections that get an adapter."""
    dtype: Dtype = "bfloat16"
    """Of frozen weights and activations. On CPUs take float32, on newer ones mixed, of both."""
    save_dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        tyro.conf.arg(help_behavior_hint="(default: float32 of an adapter, of a model as frozen)"),
    ] = None
    """Of what is written at the end; training is not affected."""
    remat: Remat = "none"
    """What the backward pass computes again."""
    data_parallel: Annotated[int, Range(1, 65_536)] = 1
    """Devices that rows are split over, each with a copy of what is frozen."""
    fsdp: Annotated[int, Range(1, 65_536)] = 1
    """Devices that rows and weights are split over."""
    tensor: Annotated[int, Range(1, 65_536)] = 1
    """Devices that heads and feed-forward networks are split over."""
    every: Annotated[int, Range(1, 1_000_000)] = 50
    """Steps between checkpoints and measurements of the held-out loss."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Of the adapter's start, of what is held out, and of the order of chats."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter and not self.rank:
            raise ValueError(
                f"--adapter {self.adapter} is where an adapter starts, and --rank 0 trains all"
                " weights: leave one out."
            )

    @property
    def padded_rows(self) -> int:
        """Rows of a step with those of padding: as many in every microbatch on every device."""
        shares = self.microbatches * self.data_parallel * self.fsdp
        return -(-self.rows // shares) * shares


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(
        lambda: _main(words),
        "start it again with the same flags to go on from its last checkpoint.",
    )


def _main(argv: list[str]) -> None:
    args = parse(SftArgs, "sft", _DESCRIPTION, argv)
    check_place(args.out, "--out")
    for path, flag in ((args.data, "--data"), (args.held_out, "--held-out")):
        if path is not None and not path.is_file():
            raise ValueError(f"{flag} {path} is no file: name one with a chat a line.")
    # flags are right when JAX is loaded
    from experiments.console import Terminal
    from experiments.sft import train_on_chats

    console = Terminal()
    train_on_chats(args, console)
    what = "The adapter" if args.rank else "The model"
    folder = shlex.quote(str(args.out))
    flags = (
        f"--model {shlex.quote(str(args.model))} --adapter {folder}"
        if args.rank
        else f"--model {folder}"
    )
    console.print(
        f"{what} is in {args.out}: try `{command_line(f'generate {flags}')}`.", soft_wrap=True
    )
