"""The results of an evaluation as its readers find them: evaluation.json, and where the prompts and
episodes behind it are.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from ictjax.json_lines import read_records

FORMAT = 2  # of evaluation.json; files without one are of the versions before
ARMS = ("initial", "untrained", "trained")
# transfer: of another benchmark
SPLITS = {"heldout": "held-out families", "transfer": "families", "train": "training families"}

_LARGEST = 1e100  # NaN is not below it either
_AGAIN = "evaluate again (`ictjax evaluate`), or remove it"
_FOLDER = re.compile(r"evaluation[\w.=,-]*/step\d+-[0-9a-f]+")


def result_files(run_dir: pathlib.Path) -> list[pathlib.Path]:
    """The results of a run: evaluation.json, then those on other tasks by name."""
    # the name without a hyphen sorts first
    return [
        run_dir / f"{name}.json"
        for name in sorted(
            path.stem
            for pattern in ("evaluation.json", "evaluation-*.json")
            for path in run_dir.glob(pattern)
        )
    ]


def read_results(path: pathlib.Path) -> dict[str, Any]:
    """Results as `ictjax evaluate` writes them; arms, tests and counts may be missing, as in files
    of earlier versions.

    Raises:
      ValueError: the file is damaged, of another version, or none of an evaluation; names it.
    """
    results = read_object(path, _AGAIN)
    version = results.get("format", 1)
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"{path} is of another version (format {version!r:.20}, known here is {FORMAT}): read"
            " it with the version that wrote it, or evaluate again."
        )
    wrong = _wrong(results)
    if wrong:
        raise ValueError(f"{path} holds no results of an evaluation ({wrong}): {_AGAIN}.")
    return results


def prompts_file(run_dir: pathlib.Path, name: str, results: Mapping[str, Any]) -> pathlib.Path:
    """The prompts that were scored, a line each."""
    if "folder" in results:
        return run_dir / results["folder"] / "prompts.jsonl"
    return run_dir / "prompts" / f"{name}.jsonl"


def episode_files(
    run_dir: pathlib.Path, name: str, results: Mapping[str, Any], arm: str
) -> list[pathlib.Path]:
    """The episodes of an arm on the test games, a file per family."""
    if "folder" in results:
        return sorted((run_dir / results["folder"] / "episodes").glob(f"{arm}_*.jsonl"))
    return sorted((run_dir / "episodes").glob(f"{name}_{arm}_*.jsonl"))


def read_object(path: pathlib.Path, remedy: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError with the file and the remedy for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is not JSON ({error}): {remedy}.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object: {remedy}.")
    return data


def read_rows(
    path: pathlib.Path, is_row: Callable[[Mapping[str, Any]], bool], remedy: str
) -> list[dict[str, Any]]:
    """The JSON objects of a line file; none where it is missing. Raises ValueError, naming the
    file, for one that is empty, damaged, or of something else.
    """
    rows = read_records(path).values
    if not rows and path.exists():
        raise ValueError(f"{path} is empty: {remedy}.")
    for number, row in enumerate(rows, start=1):
        if not is_row(row):
            raise ValueError(f"Line {number} of {path} is not what is written there: {remedy}.")
    return rows


def is_number(value: object) -> bool:
    """Whether this is a number of JSON that figures and texts can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _wrong(results: Mapping[str, Any]) -> str:
    """What does not fit, in a few words; empty where all does."""
    # the file may come from anywhere, what it names lies beside it
    if "folder" in results and not _FOLDER.fullmatch(str(results["folder"])):
        return "folder"
    if not isinstance(results.get("changes", []), list):
        return "changes"
    for part in ("families", "overall", "environment", "protocol"):
        if not isinstance(results.get(part, {}), Mapping):
            return part
    if not isinstance(results.get("protocol", {}).get("checkpoint", 0), int):
        return "protocol.checkpoint"
    for part in ("families", "overall"):
        for name, numbers in results.get(part, {}).items():
            if found := _wrong_numbers(numbers):
                return f"{part}.{name:.40}{found}"
    for name, family in results.get("families", {}).items():
        if str(family.get("split")) not in SPLITS:
            return f"families.{name:.40}.split"
    return ""


def _wrong_numbers(numbers: object) -> str:
    """The same of one family, or of one split."""
    if not isinstance(numbers, Mapping):
        return " "
    for name in ("games", "runs"):
        if not isinstance(numbers.get(name, 0), int):
            return f".{name}"
    for name in ("arms", "tests", "malformed_replies", "failed_episodes"):
        if not isinstance(numbers.get(name, {}), Mapping):
            return f".{name}"
    for name, arm in numbers.get("arms", {}).items():
        if not (isinstance(arm, Mapping) and is_number(arm.get("mean")) and _is_interval(arm)):
            return f".arms.{name:.40}"
    for name, test in numbers.get("tests", {}).items():
        if not (
            isinstance(test, Mapping)
            and is_number(test.get("difference"))
            and is_number(test.get("p"))
            and 0 <= test["p"] <= 1
            and _is_interval(test)
        ):
            return f".tests.{name:.40}"
    for name in ("malformed_replies", "failed_episodes"):
        if not all(isinstance(count, int) for count in numbers.get(name, {}).values()):
            return f".{name}"
    return ""


def _is_interval(numbers: Mapping[str, Any]) -> bool:
    ends = numbers.get("ci95")
    return isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends))
