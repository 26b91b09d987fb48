"""The results of a run's evaluations as files of other programs."""

from envs.files import replacing
from experiments.commands.results import ResultsArgs, main
from experiments.local_path import as_written, command_line, typed
from experiments.report_data import RunData
from experiments.result_formats import TEXTS
from ictjax.extras import install


def check_out(args: ResultsArgs) -> None:
    """Raises ValueError where something is that would be replaced: a file unless --force is given,
    a folder that holds anything always.
    """
    out = args.out
    if args.format == "inspect":
        if out is None:
            raise ValueError("--out is missing: name a new folder for the logs.")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and is not an empty folder: choose a new --out.")
    elif out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file.")
    elif out is not None and out.exists() and not args.force:
        raise ValueError(f"{out} exists: choose another --out, or replace it with --force.")


def write_results(run: RunData, args: ResultsArgs) -> str:
    """Does what the flags say; returns what is to be printed: the text itself where no file is
    named, else a sentence.

    Raises:
      ValueError: the run is not evaluated, or the package inspect-ai is not installed.
    """
    if not run.evaluations:
        raise ValueError(
            f"{as_written(args.run_dir)} has no evaluation.json: run"
            f" `{command_line(f'evaluate --run-dir {typed(args.run_dir)}')}` first."
        )
    if args.format == "inspect":
        try:
            from experiments.inspect_logs import write_logs  # an optional package
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("inspect_ai"):
                raise
            raise ValueError(
                "Logs for Inspect are written by the package inspect-ai: in the clone, run"
                f" `{install('inspect')}`."
            ) from None
        assert args.out is not None, "checked"
        paths = write_logs(run, args.out)
        return f"Wrote {len(paths)} logs. To read them: inspect view --log-dir {args.out}\n"
    text = TEXTS[args.format](run.evaluations)
    if args.out is None:
        return text
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return f"Wrote {args.out}.\n"


if __name__ == "__main__":
    main()
