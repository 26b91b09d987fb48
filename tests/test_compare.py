"""The table of several runs."""

import io
import json

import pytest
from rich.console import Console

from experiments.compare import compare, main


def _run(folder, seed: int, trained: float) -> None:
    folder.mkdir()
    arms = {
        name: {"mean": mean, "ci95": [mean, mean]}
        for name, mean in (("initial", 0.0), ("untrained", 0.31), ("trained", trained))
    }
    test = {"difference": trained - 0.31, "ci95": [0.1, 0.6], "p": 0.003}
    overall = {
        split: {"arms": arms, "tests": {"trained_vs_untrained": test}}
        for split in ("train", "heldout")
    }
    (folder / "evaluation.json").write_text(json.dumps({"overall": overall}), encoding="utf-8")
    (folder / "config.json").write_text(
        json.dumps({"seed": seed, "task": {"environment": {"name": "minihack"}}}), encoding="utf-8"
    )


def test_a_row_per_run_and_split(tmp_path):
    _run(tmp_path / "a", 0, 0.81)
    _run(tmp_path / "b", 1, 0.62)
    table = compare((tmp_path / "a", tmp_path / "b")).table
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["a", "a", "b", "b"]
    assert columns[1] == ["0", "0", "1", "1"]
    assert columns[2] == ["minihack"] * 4
    assert columns[3] == ["train", "heldout"] * 2
    assert columns[6] == ["81", "81", "62", "62"]
    assert columns[7][0].startswith("+50 ") and columns[8][0] == "0.003"


def test_the_table_fits_a_terminal(tmp_path):
    _run(tmp_path / "seed0", 0, 0.81)
    page = io.StringIO()
    Console(file=page, width=80).print(compare((tmp_path / "seed0",)).table)
    rows = [line for line in page.getvalue().splitlines() if "seed0" in line]
    assert len(rows) == 2 and all("+50 [+10, +60]" in row and "minihack" in row for row in rows)


def test_other_benchmarks_are_rows_too(tmp_path):
    _run(tmp_path / "a", 0, 0.81)
    data = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    (tmp_path / "a" / "evaluation-alfworld.json").write_text(
        json.dumps({"overall": {"transfer": data["overall"]["train"]}})
    )
    table = compare((tmp_path / "a",)).table
    assert list(table.columns[2].cells) == ["minihack", "minihack", "alfworld"]
    assert list(table.columns[3].cells) == ["train", "heldout", "transfer"]


def test_a_run_without_evaluation_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no run directory"):
        compare((tmp_path / "nowhere",))
    _run(tmp_path / "a", 0, 0.81)
    (tmp_path / "a" / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="a has no evaluation.json: run `ictjax evaluate"):
        compare((tmp_path / "a",))


def test_without_arguments_it_says_what_to_give(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "ictjax compare runs/seed0 runs/seed1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "[]", "bad/config.json"),
        ("config.json", "{}", "bad/config.json is not the configuration"),
        ("config.json", '{"seed": 1, "task": [1]}', "bad/config.json is not the configuration"),
        ("evaluation.json", "{}", "bad/evaluation.json holds no results"),
        ("evaluation.json", "{", "bad/evaluation.json is not JSON"),
        ("evaluation.json", '{"overall": {"train": {}}}', "bad/evaluation.json holds not all arms"),
        ("evaluation.json", '{"overall": {"train": [1]}}', "bad/evaluation.json holds no results"),
        ("evaluation.json", '{"format": 9}', "bad/evaluation.json is of another version"),
        ("evaluation.json", None, "bad has no evaluation.json"),
    ],
)
def test_what_cannot_be_read_is_left_out_and_said(tmp_path, capsys, name, text, words):
    _run(tmp_path / "a", 0, 0.81)
    _run(tmp_path / "bad", 1, 0.62)
    (tmp_path / "bad" / name).unlink()
    if text is not None:
        (tmp_path / "bad" / name).write_text(text)
    comparison = compare((tmp_path / "bad", tmp_path / "a"))
    assert list(comparison.table.columns[0].cells) == ["a", "a"]
    (reason,) = comparison.left_out
    assert words in reason
    main([str(tmp_path / "a"), str(tmp_path / "bad")])
    shown = capsys.readouterr().out
    assert f"Left out: {reason}" in shown and "+50 [+10, +60]" in shown
    with pytest.raises(ValueError, match="bad"):
        compare((tmp_path / "bad",))


def test_a_row_says_when_it_is_not_of_the_last_iteration(tmp_path):
    _run(tmp_path / "a", 0, 0.81)
    for name, more in (
        ("config", {"iterations": 8}),
        ("evaluation", {"protocol": {"checkpoint": 3}}),
    ):
        path = tmp_path / "a" / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    (row, _) = compare((tmp_path / "a",)).table.columns[2].cells
    assert row == "minihack, iteration 3"
