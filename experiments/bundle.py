"""What of a run is given to others: everything but weights, and no path of the machine that it was
made on.
"""

import dataclasses
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from envs.files import replacing
from envs.stopping import at_end
from experiments.commands.bundle import main
from experiments.console import counting_bar
from experiments.evaluation_results import read_object, result_files
from experiments.machine_paths import MachinePaths
from experiments.packed_folder import is_packed, pack
from ictjax.json_lines import read_records, to_json_line, to_json_text
from ictjax.metrics import FILE_NAME as METRICS
from ictjax.metrics import read_metrics
from ictjax.run_files import FOLDERS

FILE_NAME = "bundle.json"

_FORMAT = 1  # of bundle.json
_PATTERNS = (
    "config.json",
    "manifest.json",
    METRICS,
    *(f"{folder}/*.jsonl" for folder in FOLDERS),
    *(
        pattern
        for name in ("evaluation", "evaluation-*")
        for pattern in (f"{name}.json", f"{name}/**/*.json", f"{name}/**/*.jsonl")
    ),
)
_SETTINGS = ("config.json", "manifest.json", "settings.json")
_DESCRIBING = ("protocol", "environment", "changes")  # of the results of an evaluation
_RESTORE = "restore it, or remove it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What was written: how many files, their bytes, those on disk, and what of the run is not
    finished, a sentence each.
    """

    num_files: int
    num_bytes: int
    on_disk: int
    unfinished: tuple[str, ...]


def write_bundle(
    run_dir: pathlib.Path, name: str, checkpoints: Sequence[int], out: pathlib.Path
) -> Written:
    """Writes prompts, contexts, episodes, metrics, settings and evaluations of a run, whole or not
    at all; what is there is replaced. The same run gives the same bytes.

    Args:
      run_dir: the run; or a bundle, which gives an equal one.
      name: of the run.
      checkpoints: whose weights are left out, and named instead.
      out: a folder, or a file that ends in .tar.gz.

    Raises:
      ValueError: no run is there, or a file of it is damaged.
    """
    names = _files(run_dir)
    about = _about(run_dir, name, checkpoints)
    sizes = []

    def files() -> Iterator[tuple[str, bytes]]:
        paths = MachinePaths(run_dir)
        with counting_bar("bundling files") as advance:
            for done, file in enumerate(names):
                advance(done, len(names))
                data = about if file == FILE_NAME else _contents(run_dir / file, file, paths)
                sizes.append(len(data))
                yield file, data

    out.parent.mkdir(parents=True, exist_ok=True)
    if is_packed(out):
        pack(out, name, files())
        on_disk = out.stat().st_size
    else:
        _write_folder(out, files())
        on_disk = sum(sizes)
    return Written(
        num_files=len(names),
        num_bytes=sum(sizes),
        on_disk=on_disk,
        unfinished=tuple(_unfinished(run_dir)),
    )


def check_out(out: pathlib.Path, run_dir: pathlib.Path, *, force: bool) -> None:
    """Raises ValueError where something is that must not be replaced: without `force` anything,
    with it whatever is no bundle.
    """
    if not out.exists() or (not is_packed(out) and out.is_dir() and not any(out.iterdir())):
        return
    if out.resolve() == run_dir.resolve():
        raise ValueError(f"--out {out} is the run itself: choose another.")
    if not force:
        raise ValueError(f"{out} exists: choose another --out, or replace it with --force.")
    if not (out.is_file() if is_packed(out) else (out / FILE_NAME).is_file()):
        raise ValueError(f"{out} is no bundle, so --force leaves it alone: choose another --out.")


def _files(run_dir: pathlib.Path) -> list[str]:
    names = {
        path.relative_to(run_dir).as_posix()
        for pattern in _PATTERNS
        for path in run_dir.glob(pattern)
        if path.is_file()
    }
    if not names & {"config.json", METRICS} and not result_files(run_dir):
        raise ValueError(
            f"{run_dir} holds no run (no config.json, {METRICS} or evaluation.json): name another."
        )
    return sorted({*names, FILE_NAME})


def _about(run_dir: pathlib.Path, name: str, checkpoints: Sequence[int]) -> bytes:
    """The contents of bundle.json."""
    if (run_dir / FILE_NAME).is_file():  # of a bundle: it knows what was left out
        return (run_dir / FILE_NAME).read_bytes()
    about = {
        "format": _FORMAT,
        "run": name,
        "checkpoints": sorted(checkpoints),
        "evaluations": [path.stem for path in result_files(run_dir)],
        "unfinished": list(_unfinished(run_dir)),
    }
    return _json(about)


def _unfinished(run_dir: pathlib.Path) -> Iterator[str]:
    config = run_dir / "config.json"
    if config.is_file():
        planned = read_object(config, _RESTORE).get("iterations")
        records = read_metrics(run_dir)
        done = records[-1]["iteration"] if records else 0
        if planned is None or done < planned:
            yield f"The training is at iteration {done} of {planned}."
    if not result_files(run_dir):
        yield "There is no evaluation."
    for settings in sorted(run_dir.glob("evaluation*/*/settings.json")):
        if not (settings.parent / "evaluation.json").is_file():
            place = settings.parent.relative_to(run_dir)
            yield f"The evaluation in {place} was not played to its end."


def _contents(path: pathlib.Path, name: str, paths: MachinePaths) -> bytes:
    """A file as it is, or with marks in the place of paths. Of a last line that a killed process
    left half-written nothing is kept.
    """
    if path.suffix == ".jsonl":
        rows, torn = read_records(path)
        marked = paths.marked(rows)
        if marked == rows and not torn:
            return path.read_bytes()
        return "".join(to_json_line(row) + "\n" for row in marked).encode()
    data = read_object(path, _RESTORE)
    if path.name in _SETTINGS:
        described = paths.described(data)
    else:
        described = paths.marked(data)
        if name.count("/") != 2 or path.name == "evaluation.json":  # no part, no drawn games
            described |= {
                field: paths.described(data[field]) for field in _DESCRIBING if field in data
            }
    return path.read_bytes() if described == data else _json(described)


def _json(data: dict[str, Any]) -> bytes:
    return (to_json_text(data, indent=1) + "\n").encode()


def _write_folder(out: pathlib.Path, files: Iterator[tuple[str, bytes]]) -> None:
    staged = out.with_name(f".{secrets.token_hex(8)}.tmp")
    staged.mkdir()
    forget = at_end(lambda: shutil.rmtree(staged, ignore_errors=True))
    try:
        for name, data in files:
            path = staged / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        if out.exists():
            shutil.rmtree(out)
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        forget()


if __name__ == "__main__":
    main()
