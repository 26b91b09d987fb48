"""`ictjax export --run-dir DIR --out DIR`."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from experiments.command import Flags, parse, run_main
from experiments.console import Terminal
from experiments.remote_run import readable
from ictjax.ranges import Range

_DESCRIPTION = (
    "Writes the reflector of a run's newest checkpoint, or of --step, as a folder that"
    " transformers.AutoModelForCausalLM.from_pretrained loads: weights, config, generation config"
    " and tokenizer. An adapter is merged into its base, or written alone in PEFT's format with"
    " --adapter."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArgs(Flags):
    """All flags."""

    run_dir: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")]
    """A run of `ictjax train`."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write; new or empty."""
    step: Annotated[
        int | None,
        Range(0, 1_000_000_000),
        tyro.conf.arg(metavar="N", help_behavior_hint="(default: the newest)"),
    ] = None
    """The iteration whose checkpoint is written."""
    adapter: bool = False
    """Write the LoRA adapter alone, in PEFT's format."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        tyro.conf.arg(help_behavior_hint="(default: as in the checkpoint that was trained)"),
    ] = None
    """Of the weights written; of an adapter float32, the default, or bfloat16."""
    max_shard_gb: Annotated[float, Range(0.001, 1e6)] = 5.0
    """Largest safetensors file, in 10^9 bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter and self.dtype == "float16":
            raise ValueError(
                "--dtype float16 has too small a range for an adapter: give float32 or bfloat16."
            )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again with an empty --out.")


def _main(argv: list[str]) -> None:
    args = parse(ExportArgs, "export", _DESCRIPTION, argv)
    # what reads checkpoints is JAX; flags are right when it is loaded
    from experiments.export import export

    newest_or_step = "newest" if args.step is None else args.step
    with readable(args.run_dir, checkpoint=newest_or_step) as run_dir:
        step = export(dataclasses.replace(args, run_dir=run_dir))
    what = "adapter" if args.adapter else "reflector"
    Terminal().print(
        f"Wrote the {what} of iteration {step} to {args.out}.", highlight=False, soft_wrap=True
    )
