"""The table of several runs."""

import json

import pytest

from experiments.compare import compare


def _run(folder, seed: int, trained: float) -> None:
    folder.mkdir()
    arms = {
        name: {"mean": mean}
        for name, mean in (("initial", 0.0), ("untrained", 0.31), ("trained", trained))
    }
    test = {"difference": trained - 0.31, "ci95": [0.1, 0.6], "p": 0.003}
    overall = {
        split: {"arms": arms, "tests": {"trained_vs_untrained": test}}
        for split in ("train", "heldout")
    }
    (folder / "evaluation.json").write_text(json.dumps({"overall": overall}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"seed": seed}), encoding="utf-8")


def test_a_row_per_run_and_split(tmp_path):
    _run(tmp_path / "a", 0, 0.81)
    _run(tmp_path / "b", 1, 0.62)
    table = compare((tmp_path / "a", tmp_path / "b"))
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["a", "a", "b", "b"]
    assert columns[1] == ["0", "0", "1", "1"]
    assert columns[2] == ["train", "heldout"] * 2
    assert columns[5] == ["81", "81", "62", "62"]
    assert columns[6][0].startswith("+50 ") and columns[7][0] == "0.003"


def test_other_benchmarks_are_rows_too(tmp_path):
    _run(tmp_path / "a", 0, 0.81)
    data = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    (tmp_path / "a" / "evaluation-alfworld.json").write_text(
        json.dumps({"overall": {"transfer": data["overall"]["train"]}})
    )
    assert list(compare((tmp_path / "a",)).columns[2].cells) == [
        "train",
        "heldout",
        "transfer alfworld",
    ]


def test_a_run_without_evaluation_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere has no evaluation.json"):
        compare((tmp_path / "nowhere",))
