"""The reflector that a run trained, as a Hugging Face folder or a PEFT adapter."""

import contextlib
import pathlib
from collections.abc import Iterator

from experiments.commands.export import ExportArgs, main
from experiments.presets import model_folder
from experiments.run_dir import read_run
from ictjax.config import MeshConfig, RoleMeshes
from ictjax.models.hf import load_checkpoint, save_checkpoint
from ictjax.models.hf.reader import read_config
from ictjax.models.lora import merge
from ictjax.models.peft import save_adapter
from ictjax.players import restore_trained


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
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists and is not an empty folder: choose a new --out.")
    base = model_folder(config.reflector.model)
    model = read_config(pathlib.Path(base))
    one_device = RoleMeshes(actor=MeshConfig(), reflector=MeshConfig())
    step, trained = restore_trained(
        args.run_dir, config.with_models(config.actor.model, base).on_mesh(one_device), args.step
    )
    with _filled(args.out):
        if args.adapter:
            dtype = "bfloat16" if args.dtype == "bfloat16" else "float32"
            save_adapter(args.out, model, lora, trained, base=config.reflector.model, dtype=dtype)
            return step
        if lora.rank:
            trained = merge(lora, load_checkpoint(base)[1], trained)
        if args.dtype is not None:
            model = model.with_param_dtype(args.dtype)
        save_checkpoint(
            args.out, model, trained, source=base, max_shard_bytes=int(args.max_shard_gb * 10**9)
        )
    return step


@contextlib.contextmanager
def _filled(folder: pathlib.Path) -> Iterator[None]:
    """Leaves a folder that was empty or missing as it was when the body raises: half an export is
    none, and its files would be in the way of the next one.
    """
    missing = not folder.exists()
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                path.unlink()
            if missing:
                folder.rmdir()
        raise


if __name__ == "__main__":
    main()
