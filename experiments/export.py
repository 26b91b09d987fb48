"""`python -m experiments.export --run-dir R --out DIR`: the reflector that a run trained, as a
Hugging Face folder or a PEFT adapter.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Literal

from rich.console import Console

from experiments.presets import model_folder
from experiments.run_dir import parse, run_main
from ictjax.config import MeshConfig, RoleMeshes
from ictjax.models.hf import load_checkpoint, save_checkpoint
from ictjax.models.hf.reader import read_config
from ictjax.models.lora import merge
from ictjax.models.peft import save_adapter
from ictjax.players import restore_trained
from ictjax.run_config import TrainConfig, from_dict

_DESCRIPTION = (
    "Writes the reflector of a run's newest checkpoint as a folder that"
    " transformers.AutoModelForCausalLM.from_pretrained loads: weights, config, generation config"
    " and tokenizer. An adapter is merged into its base, or written alone in PEFT's format with"
    " --adapter."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Command line of experiments.export."""

    run_dir: pathlib.Path
    """A run of experiments.train."""
    out: pathlib.Path
    """Folder to write; new or empty."""
    adapter: bool = False
    """Write the LoRA adapter alone, in PEFT's format."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights written [default: as in the checkpoint that training started from]. Adapters
    are float32.
    """
    max_shard_gb: float = 5.0
    """Largest safetensors file, in 10^9 bytes."""


def export(args: ExportArgs) -> int:
    """Does what the flags say; returns the iteration that was exported.

    Raises:
      ValueError: no run or no checkpoint there, an output folder in use, or an adapter asked of a
        run that trained all weights.
    """
    config = read_run(args.run_dir)
    lora = config.reflector.lora
    if args.adapter and not lora.rank:
        raise ValueError(
            f"{args.run_dir} trained all weights (reflector.lora.rank is 0): export it without"
            " --adapter."
        )
    if args.max_shard_gb <= 0:
        raise ValueError(f"--max-shard-gb is {args.max_shard_gb}: give a positive size.")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists and is not an empty folder: choose a new --out.")
    base = model_folder(config.reflector.model)
    model = read_config(pathlib.Path(base))
    one_device = RoleMeshes(actor=MeshConfig(), reflector=MeshConfig())
    step, trained = restore_trained(
        args.run_dir, config.with_models(config.actor.model, base).on_mesh(one_device)
    )
    if args.adapter:
        save_adapter(args.out, model, lora, trained, base=config.reflector.model)
        return step
    if lora.rank:
        trained = merge(lora, load_checkpoint(base)[1], trained)
    if args.dtype is not None:
        model = model.with_param_dtype(args.dtype)
    save_checkpoint(
        args.out, model, trained, source=base, max_shard_bytes=int(args.max_shard_gb * 10**9)
    )
    return step


def read_run(run_dir: pathlib.Path) -> TrainConfig:
    """The configuration of a run directory."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is no run directory (it has no config.json): give the --run-dir of"
            " experiments.train."
        )
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not readable ({error}).") from error


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(argv), "start it again with an empty --out.")


def _main(argv: list[str]) -> None:
    args = parse(ExportArgs, _DESCRIPTION, argv)
    step = export(args)
    what = "adapter" if args.adapter else "reflector"
    Console().print(
        f"Wrote the {what} of iteration {step} to {args.out}.", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
