"""The results of an evaluation as its readers find them: evaluation.json, and where the prompts and
episodes behind it are.
"""

import itertools
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from ictjax.json_lines import read_records

FORMAT = 4  # of evaluation.json, which evaluation.schema.json describes
_READ = (3, FORMAT)  # 3 has no analyses
ARMS = ("initial", "untrained", "trained")
VERDICTS = ("better", "worse", "not shown")
# transfer: of another benchmark. The first that there is is the headline
SPLITS = {"heldout": "held-out families", "transfer": "families", "train": "training families"}

_LARGEST = 1e100  # NaN is not below it either
_AGAIN = "evaluate again (`ictjax evaluate`), or remove it"
_COUNTS = ("malformed_replies", "failed_episodes")
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
    """Results as `ictjax evaluate` writes them.

    Raises:
      ValueError: the file is damaged, of another version (earlier ones hold no outcomes of single
        games, on which nothing can be tested), or none of an evaluation; names it.
    """
    results = read_object(path, _AGAIN)
    version = results.get("format", "none")
    if version not in _READ:
        raise ValueError(
            f"{path} is of another version (format {version!s:.20}, known here is {FORMAT}): read"
            " it with the version that wrote it, or evaluate again."
        )
    wrong = _wrong(results)
    if wrong:
        raise ValueError(f"{path} holds no results of an evaluation ({wrong}): {_AGAIN}.")
    return results


def prompts_file(run_dir: pathlib.Path, results: Mapping[str, Any]) -> pathlib.Path:
    """The prompts that were scored, a line each."""
    return run_dir / results["folder"] / "prompts.jsonl"


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
    """What does not fit, in a few words; empty where all does. What readers show is looked at; all
    of it is in evaluation.schema.json.
    """
    # the file may come from anywhere, what it names lies beside it
    if not _FOLDER.fullmatch(str(results.get("folder"))):
        return "folder"
    if not isinstance(results.get("changes"), list):
        return "changes"
    for part in ("families", "overall", "environment", "protocol"):
        if not isinstance(results.get(part), Mapping):
            return part
    if not isinstance(results["protocol"].get("checkpoint"), int):
        return "protocol.checkpoint"
    headline = results.get("headline")
    if headline is not None and not (
        isinstance(headline, Mapping)
        and isinstance(headline.get("text"), str)
        and headline.get("verdict") in VERDICTS
    ):
        return "headline"
    for part in ("families", "overall"):
        if not results[part]:
            return part
        for name, numbers in results[part].items():
            if found := _wrong_numbers(numbers):
                return f"{part}.{name:.40}{found}"
    for split, numbers in results["overall"].items():
        families = numbers.get("families")
        if split not in SPLITS or not (
            isinstance(families, list) and set(map(str, families)) <= results["families"].keys()
        ):
            return f"overall.{split:.40}"
    return _wrong_analyses(results.get("analyses", {}))


def _wrong_numbers(numbers: object) -> str:
    """The same of one family, or of one split."""
    if not isinstance(numbers, Mapping):
        return " "
    if str(numbers.get("split")) not in SPLITS:
        return ".split"
    for name in ("games", "runs"):
        if not _is_count(numbers.get(name)):
            return f".{name}"
    for name in ("arms", "tests"):
        if not isinstance(numbers.get(name), Mapping):
            return f".{name}"
    for name in _COUNTS:
        if not isinstance(numbers.get(name, {}), Mapping):
            return f".{name}"
    for name, arm in numbers["arms"].items():
        if not _is_arm(arm):
            return f".arms.{name:.40}"
    for name, test in numbers["tests"].items():
        if not (_is_test(test) and set(name.split("_vs_")) <= numbers["arms"].keys()):
            return f".tests.{name:.40}"
    for name in _COUNTS:
        if not all(_is_count(count) for count in numbers.get(name, {}).values()):
            return f".{name}"
    for name in ("budget", "actor_failures"):
        if not _each(_each(_is_count))(numbers.get(name, {})):
            return f".{name}"
    return ""


def _wrong_analyses(analyses: object) -> str:
    """The same of what stands beside the results, as far as it is there."""
    if not isinstance(analyses, Mapping):
        return "analyses"
    for name, fits in _ANALYSES.items():
        if name in analyses and not fits(analyses[name]):
            return f"analyses.{name}"
    return ""


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether all values of a mapping fit."""
    return lambda values: isinstance(values, Mapping) and all(map(fits, values.values()))


def _fields(**fields: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a record has these fields, and each fits."""
    return lambda record: (
        isinstance(record, Mapping)
        and all(name in record and fits(record[name]) for name, fits in fields.items())
    )


def _or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _with_newer(
    record_fits: Callable[[Any], bool], **fields: Callable[[Any], bool]
) -> Callable[[Any], bool]:
    """The same, and fields that records of before lack fit where they are there."""
    return lambda record: (
        record_fits(record)
        and all(name not in record or fits(record[name]) for name, fits in fields.items())
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_interval(ends: object) -> bool:
    return isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends))


def _are_sentences(rows: object) -> bool:
    fits = _fields(
        text=_is_text, prompts=_is_count, whole=is_number, drop=is_number, ci95=_is_interval
    )
    return isinstance(rows, list) and all(map(fits, rows))


def _is_histogram(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    edges, counts = value.get("edges"), value.get("counts")
    return (
        isinstance(edges, list)
        and isinstance(counts, list)
        and len(edges) == len(counts) + 1 > 1
        and all(map(is_number, edges))
        and all(low < high for low, high in itertools.pairwise(edges))
        and all(map(_is_count, counts))
    )


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(map(_or_null(is_number), values))


def _is_arm(arm: object) -> bool:
    return (
        isinstance(arm, Mapping)
        and _is_estimate(arm, "mean")
        and _is_estimate(arm.get("chosen"), "mean")
        and is_number(arm.get("area"))
        and all(arm.get(name) is None or is_number(arm[name]) for name in ("sd_runs", "sd_seeds"))
        and isinstance(arm.get("curve"), list)
        and all(value is None or is_number(value) for value in arm["curve"])
        and (arm.get("rise") is None or _is_rise(arm["rise"]))
    )


def _is_rise(rise: object) -> bool:
    return (
        _is_estimate(rise, "difference") and isinstance(rise, Mapping) and is_number(rise.get("p"))
    )


def _is_test(test: object) -> bool:
    return (
        isinstance(test, Mapping)
        and _is_estimate(test, "difference")
        and all(
            is_number(test.get(name)) and 0 <= test[name] <= 1
            for name in ("p", "p_corrected", "improvement")
        )
        and all(isinstance(test.get(name), int) for name in ("num_tests", "num_units"))
        and all(isinstance(test.get(name), str) for name in ("units", "reason"))
        and test.get("verdict") in VERDICTS
        and ("chosen" not in test or _is_estimate(test["chosen"], "difference"))
        and isinstance(test.get("over_families", {}), Mapping)
    )


def _is_estimate(numbers: object, name: str) -> bool:
    """A number under this name, and the ends of its interval."""
    if not (isinstance(numbers, Mapping) and is_number(numbers.get(name))):
        return False
    return _is_interval(numbers.get("ci95"))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


_NUMBER = _or_null(is_number)
_CORRELATION = {
    "value": _NUMBER,
    "ci95": _or_null(_is_interval),
    "groups": _is_count,
    "pairs": _is_count,
    "note": _is_text,
}
_ANALYSES: Mapping[str, Callable[[Any], bool]] = {
    "arms": _each(
        _fields(
            words_by_turn=_are_sizes,
            changed_by_turn=_are_sizes,
            **dict.fromkeys(
                (
                    *("sequences", "draws", "different_of_draws", "verb_bits", "repeated_turns"),
                    *("turns_without_action", "unavailable_actions", "stream", "select", "words"),
                    *("words_changed", "names"),
                ),
                _NUMBER,
            ),
        )
    ),
    "success": _each(
        _fields(
            training=_or_null(
                _fields(
                    first_iteration=_is_count,
                    last_iteration=_is_count,
                    replay=_NUMBER,
                    fresh=_NUMBER,
                )
            ),
            arms=_each(_fields(select=_NUMBER, test=_NUMBER)),
        )
    ),
    "reward_signal": _or_null(
        _with_newer(
            _fields(
                first_iteration=_is_count,
                last_iteration=_is_count,
                groups=_is_count,
                candidates=_is_count,
                reliability=_fields(
                    **_CORRELATION, games=_is_count, games_needed=_or_null(_is_count)
                ),
                replay_and_fresh=_fields(**_CORRELATION),
                reward_and_next=_fields(**_CORRELATION),
                reward_and_words=_fields(**_CORRELATION),
            ),
            dead_groups=_is_count,
            histogram=_is_histogram,
        )
    ),
    "deletions": _each(_fields(prompts=_is_count, games=_is_count, sentences=_are_sentences)),
}
"""What readers show of each analysis."""


def next_command(run_dir: pathlib.Path, iterations: int) -> str:
    """What to do with a run that is trained: "report" where its last iteration is evaluated, else
    "evaluate".
    """
    try:
        results = read_results(run_dir / "evaluation.json")
    except (OSError, ValueError):  # none, or none that can be read
        return "evaluate"
    return "report" if results["protocol"]["checkpoint"] == iterations else "evaluate"
