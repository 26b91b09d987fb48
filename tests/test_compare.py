"""The table of several runs."""

import io
import json

import pytest
from rich.console import Console

from experiments.compare import compare, main
from experiments.wording import interval, p_value, points
from tests.evaluations import evaluation

SPLITS = {"eat": "train", "zap": "heldout"}


def _run(folder, seed: int, trained: float, step: int = 3) -> None:
    folder.mkdir()
    results = evaluation(SPLITS, {"initial": 0.0, "untrained": 0.31, "trained": trained})
    (folder / "evaluation.json").write_text(json.dumps(results), encoding="utf-8")
    config = {"seed": seed, "task": {"environment": {"name": "minihack"}}, "iterations": step}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _joint(folder, seeds: int = 4, step: int = 3):
    """Where the results of several runs are: without what belongs to one."""
    folder.mkdir()
    rates = {"initial": 0.0, "untrained": 0.31, "trained": 0.81}
    results = evaluation(SPLITS, rates, seeds=seeds)
    results["environment"] = {"name": "minihack"}
    results["protocol"] |= {"iterations": step, "run_dirs": [f"runs/seed{n}" for n in range(seeds)]}
    (folder / "evaluation.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def _cells(folder, split: str) -> list[str]:
    """What a row says after its benchmark."""
    overall = json.loads((folder / "evaluation.json").read_text())["overall"][split]
    test = overall["tests"]["trained_vs_untrained"]
    return [
        split,
        *(f"{100 * overall['arms'][arm]['mean']:.0f}" for arm in ("untrained", "trained")),
        f"{points(test['difference'])} {interval(test['ci95'], signed=True)}",
        p_value(test["p_corrected"]),
        test["verdict"],
    ]


def test_a_row_per_run_and_split(tmp_path):
    _run(tmp_path / "a", 0, 0.81)
    _run(tmp_path / "b", 1, 0.62)
    table = compare((tmp_path / "a", tmp_path / "b")).table
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["a", "a", "b", "b"]
    assert columns[1] == ["0", "0", "1", "1"]
    assert columns[2] == ["minihack"] * 4
    rows = [list(row) for row in zip(*columns[3:], strict=True)]
    assert rows == [_cells(tmp_path / run, split) for run in "ab" for split in ("heldout", "train")]
    assert rows[0][-1] == "better"


def test_the_table_fits_a_terminal(tmp_path):
    _run(tmp_path / "seed0", 0, 0.81)
    page = io.StringIO()
    Console(file=page, width=80).print(compare((tmp_path / "seed0",)).table)
    rows = [line for line in page.getvalue().splitlines() if "seed0" in line]
    for row, split in zip(rows, ("heldout", "train"), strict=True):
        assert " ".join(_cells(tmp_path / "seed0", split)) in " ".join(row.split())
        assert "minihack" in row


def test_results_of_several_runs_are_rows_beside_those_of_one(tmp_path):
    _run(tmp_path / "seed0", 0, 0.81)
    folder = _joint(tmp_path / "seed0+seed1+seed2+seed3")
    page = io.StringIO()
    comparison = compare((folder, tmp_path / "seed0"))
    Console(file=page, width=80).print(comparison.table)
    assert comparison.left_out == ()
    columns = [list(column.cells) for column in comparison.table.columns]
    assert columns[0] == [folder.name] * 2 + ["seed0"] * 2
    assert columns[1] == ["of 4", "of 4", "0", "0"]
    assert columns[2] == ["minihack"] * 4  # of their last iteration
    rows = [list(row) for row in zip(*columns[3:], strict=True)]
    assert rows[:2] == [_cells(folder, split) for split in ("heldout", "train")]
    # in 80 columns names are folded, and nothing is cut off
    lines = page.getvalue().splitlines()
    assert all(len(line) <= 80 and "…" not in line for line in lines)
    heads = [column.header for column in comparison.table.columns]
    for cell in (*heads, *rows[0][:-1], "of 4", "seed0", "not", "shown"):
        assert cell in page.getvalue()


def test_results_of_several_runs_say_when_they_are_not_of_the_last_iteration(tmp_path):
    folder = _joint(tmp_path / "a+b", seeds=2, step=8)
    rows = list(compare((folder,)).table.columns[2].cells)
    assert rows == ["minihack, iteration 3"] * 2


def test_results_of_several_runs_may_be_of_another_benchmark_alone(tmp_path):
    folder = _joint(tmp_path / "a+b", seeds=2)
    (folder / "evaluation.json").rename(folder / "evaluation-alfworld.json")
    assert list(compare((folder,)).table.columns[2].cells) == ["alfworld"] * 2


def test_other_benchmarks_are_rows_too(tmp_path):
    _run(tmp_path / "a", 0, 0.81)
    data = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    (tmp_path / "a" / "evaluation-alfworld.json").write_text(
        json.dumps({**data, "overall": {"transfer": data["overall"]["train"]}})
    )
    table = compare((tmp_path / "a",)).table
    assert list(table.columns[2].cells) == ["minihack", "minihack", "alfworld"]
    assert list(table.columns[3].cells) == ["heldout", "train", "transfer"]


def test_a_run_without_evaluation_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no run directory"):
        compare((tmp_path / "nowhere",))
    run = tmp_path / "a run"
    _run(run, 0, 0.81)
    (run / "evaluation.json").unlink()
    command = f"ictjax evaluate --run-dir '{run}'"
    with pytest.raises(ValueError, match=f"run has no evaluation.json: run `{command}` first"):
        compare((run,))


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
        ("evaluation.json", "{}", "bad/evaluation.json is of another version (format none"),
        ("evaluation.json", '{"format": 2, "overall": {}}', "of another version (format 2"),
        ("evaluation.json", '{"format": 3}', "bad/evaluation.json holds no results"),
        ("evaluation.json", "{", "bad/evaluation.json is not JSON"),
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
    assert f"Left out: {reason}" in shown and _cells(tmp_path / "a", "train")[3] in shown
    with pytest.raises(ValueError, match="bad"):
        compare((tmp_path / "bad",))


def test_a_run_without_the_arms_compared_is_named(tmp_path):
    _run(tmp_path / "a", 0, 0.81)
    path = tmp_path / "a" / "evaluation.json"
    path.write_text(json.dumps(evaluation(SPLITS, {"initial": 0.1, "trained": 0.5}, runs=2)))
    with pytest.raises(ValueError, match="holds not both arms that are compared"):
        compare((tmp_path / "a",))


def test_a_row_says_when_it_is_not_of_the_last_iteration(tmp_path):
    _run(tmp_path / "a", 0, 0.81, step=8)
    rows = list(compare((tmp_path / "a",)).table.columns[2].cells)
    assert rows == ["minihack, iteration 3"] * 2


def _with_settings(folder, families=None, **protocol) -> None:
    path = folder / "evaluation.json"
    data = json.loads(path.read_text())
    data["protocol"] |= protocol
    for split, names in (families or {}).items():
        (numbers,) = [data["families"][name] for name in data["overall"][split]["families"]]
        data["families"] |= dict.fromkeys(names, numbers)
        data["overall"][split]["families"] = names
    path.write_text(json.dumps(data))


def test_other_settings_have_a_star_and_are_said(tmp_path, capsys):
    for number, name in enumerate("abc"):
        _run(tmp_path / name, number, 0.81)
        families = {"heldout": ["zap"] if name == "b" else ["zap", "read"]}
        _with_settings(tmp_path / name, families, meta_turns=1, runs=12)
    _with_settings(tmp_path / "b", meta_turns=3, runs=6)
    main([str(tmp_path / name) for name in "abc"])
    words = " ".join(capsys.readouterr().out.split())
    said = (
        "* Other settings: b: 1 of 2 heldout families, 3 meta-turns (others 1), 6 loops (others"
        " 12)."
    )
    assert said in words
    table = compare(tuple(tmp_path / name for name in "abc")).table
    split = "heldout train heldout* train* heldout train".split()
    assert list(table.columns[3].cells) == split


def test_equal_settings_and_other_benchmarks_have_no_star(tmp_path):
    for name in "ab":
        _run(tmp_path / name, 0, 0.81)
    assert compare((tmp_path / "a", tmp_path / "b")).other_settings == ()
    (tmp_path / "b" / "evaluation.json").rename(tmp_path / "b" / "evaluation-alfworld.json")
    path = tmp_path / "b" / "evaluation-alfworld.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "protocol": {**data["protocol"], "meta_turns": 9}}))
    assert compare((tmp_path / "a", tmp_path / "b")).other_settings == ()


def test_of_two_the_first_is_what_the_other_differs_from(tmp_path):
    for number, name in enumerate("ab"):
        _run(tmp_path / name, number, 0.81)
        _with_settings(
            tmp_path / name, {"train": ["eat", "dig"][number:]}, meta_turns=3 - 2 * number
        )
    _with_settings(tmp_path / "b", {"heldout": ["sit"]})
    comparison = compare((tmp_path / "a", tmp_path / "b"))
    assert comparison.other_settings == (
        "b: 1 other heldout families, 1 meta-turn (others 3), 1 of 2 train families",
    )
