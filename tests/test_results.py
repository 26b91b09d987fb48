"""The results of a run for other programs."""

import csv
import io
import json
import re
import shutil
import sys

import pytest

from experiments import report_data, results
from experiments.commands.results import ResultsArgs
from experiments.result_formats import csv_text, latex_text, markdown_text
from experiments.wording import points
from tests.evaluations import FOLDER, RATES, evaluation
from tests.test_report import make_run

SPLITS = {"wear": "heldout", "eat": "train"}
HOSTILE = '=[a](b) | \\x{}_%&$#~^<i>"--\n\x1b\u202e`*'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("results") / "run", iterations=1)


def evaluated(folder, splits=SPLITS, rates=RATES):
    (folder / FOLDER).mkdir(parents=True)
    found = evaluation(splits, rates)
    (folder / "evaluation.json").write_text(json.dumps(found))
    return found, report_data.load_run(folder).evaluations


def leaves(record, *path):
    """Everything in a record, by where it is."""
    if isinstance(record, dict | list):
        for name, value in record.items() if isinstance(record, dict) else enumerate(record):
            yield from leaves(value, *path, name)
    else:
        yield path, record


def column(path):
    """Where evaluation.json's number stands in CSV."""
    path = ["value" if name in ("mean", "difference") else name for name in path]
    path = ["turn" if name == "curve" else name for name in path]
    if path[0] == "chosen":
        path = ["chosen", *path[1:]] if path[1] == "ci95" else ["chosen"]
    if path[:2] == ["rise", "value"]:
        path = ["rise"]
    if "ci95" in path:
        path[-1] = ("low", "high")[path[-1]]
    return "_".join(map(str, path))


def test_csv_holds_every_number_of_the_results(tmp_path):
    """Whatever evaluation.json says of an arm, or of two, in a family or a split."""
    found, _ = evaluated(tmp_path, rates={**RATES, "best-of-n": 0.5})
    for family in found["families"].values():
        arms = family["arms"]
        family["budget"] = {arm: {"actor_episodes": 3, "training_x": 4} for arm in arms}
        family["actor_failures"] = {arm: {"no_action": n} for n, arm in enumerate(arms)}
        family["malformed_replies"] = dict(zip(arms, range(7, 99), strict=False))
        family["failed_episodes"] = dict.fromkeys(arms, 2)
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    evaluations = report_data.load_run(tmp_path).evaluations
    rows = list(csv.DictReader(io.StringIO(csv_text(evaluations))))
    parts = {("heldout", ""): found["overall"]["heldout"], ("train", ""): found["overall"]["train"]}
    parts |= {(split, family): found["families"][family] for family, split in SPLITS.items()}
    by_place = {(row["split"], row["family"], row["arm"], row["minus"]): row for row in rows}
    assert len(by_place) == len(rows)
    assert len(rows) == sum(len(part["arms"]) + len(part["tests"]) for part in parts.values())
    for (split, family), part in parts.items():
        # what is there for every arm stands in its row, under whatever name
        of_arms = [name for name, value in part.items() if isinstance(value, dict)]
        of_arms = [name for name in of_arms if name not in ("arms", "tests")]
        assert len(of_arms) == (4 if family else 0)
        for arm, numbers in part["arms"].items():
            row = by_place[split, family, arm, ""]
            expected = {column(path): value for path, value in leaves(numbers)}
            for name in of_arms:
                expected |= {column(path): v for path, v in leaves(part[name][arm], name)}
            if family:
                success = found["analyses"]["success"][family]
                expected["select"] = success["arms"][arm]["select"]
                for games in ("replay", "fresh") if success["training"] else ():
                    expected[f"training_{games}"] = success["training"][games]
            assert {name: row[name] for name in expected} == as_cells(expected)
            assert row["verdict"] == row["p"] == row["reason"] == ""
            assert [row[name] for name in ("games", "runs")] == [str(part["games"]), "8"]
        for pair, test in part["tests"].items():
            arm, minus = pair.split("_vs_")
            row = by_place[split, family, arm, minus]
            expected = {column(path): value for path, value in leaves(test)}
            assert len(expected) == len(list(leaves(test))) >= 16
            assert {name: row[name] for name in expected} == as_cells(expected)
    assert {row["iteration"] for row in rows} == {"3"} and {row["seeds"] for row in rows} == {"1"}


def as_cells(record):
    return {name: "" if value is None else str(value) for name, value in record.items()}


def test_what_curves_and_counts_there_are_decides_the_columns(tmp_path):
    _, short = evaluated(tmp_path / "short")
    found, _ = evaluated(tmp_path / "long")
    found["families"]["eat"]["arms"]["trained"]["curve"] = [0.0, None, 0.2, 0.3, 0.4]
    found["families"]["eat"]["budget"] = {"trained": {"=sum": 1}}
    (tmp_path / "long" / "evaluation.json").write_text(json.dumps(found))
    long = report_data.load_run(tmp_path / "long").evaluations
    both = csv_text((*short, *long))
    assert {len(row) for row in csv.reader(io.StringIO(both))} == {
        len(next(csv.reader(io.StringIO(csv_text(long)))))
    }
    rows = [row for row in csv.DictReader(io.StringIO(both)) if row["turn_4"]]
    (row,) = rows
    assert [row[f"turn_{n}"] for n in range(5)] == ["0.0", "", "0.2", "0.3", "0.4"]
    assert row["budget_=sum"] == "1"


def cells_of_latex(line):
    return re.split(r"(?<!\\)&", line.removesuffix("\\\\"))


def test_tables_say_what_the_terminal_says_and_arms_with_intervals(tmp_path):
    found, evaluations = evaluated(tmp_path, rates={**RATES, "best-of-n": 0.5})
    numbers = found["families"]["wear"]
    arm, test = numbers["arms"]["trained"], numbers["tests"]["trained_vs_untrained"]
    low, high = (f"{100 * end:.0f}" for end in arm["ci95"])
    won = f"{100 * arm['mean']:.0f} [{low}, {high}]"
    markdown = markdown_text(evaluations)
    row = next(line for line in markdown.splitlines() if line.startswith("| wear |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3] == won and cells[-1] == test["verdict"]
    assert "**held-out families**" in markdown
    # what both arms of a comparison won stands beside their difference
    won_by = {
        name: f"{100 * a['mean']:.0f}" for name, a in found["overall"]["heldout"]["arms"].items()
    }
    pair = f"| trained - best-of-n | {won_by['trained']} - {won_by['best-of-n']} | "
    assert pair in markdown and "| arms | won | difference |" in markdown
    # other arms have a table of their own
    assert re.search(r"^\| family \| best-of-n \|$", markdown, re.MULTILINE)
    latex = latex_text(evaluations)
    assert latex.count("\\begin{table}") == latex.count("\\bottomrule") == 4
    # and what meta-turns behind the first added
    rise = points(found["overall"]["heldout"]["arms"]["trained"]["rise"]["difference"])
    assert re.search(rf"^\| trained \| \d+ - \d+ \| {re.escape(rise)} \[", markdown, re.MULTILINE)
    assert won in latex and "\\textbf{held-out families}" in latex
    difference = f"{100 * test['difference']:+.0f}"
    assert f"${difference[0]}${difference[1:]} [" in latex


def test_names_of_others_change_no_table(tmp_path):
    _, plain = evaluated(tmp_path / "plain")
    _, hostile = evaluated(tmp_path / "hostile", {HOSTILE: "heldout", "eat": "train"})
    shapes = []
    for evaluations in (plain, hostile):
        markdown = markdown_text(evaluations)
        latex = latex_text(evaluations)
        rows = [line for line in latex.splitlines() if line.endswith("\\\\")]
        assert len({len(cells_of_latex(row)) for row in rows[:5]}) == 1
        shapes.append(
            (
                [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines()],
                [len(cells_of_latex(row)) for row in rows],
                latex.count("\n"),
                len(list(csv.reader(io.StringIO(csv_text(evaluations))))),
            )
        )
        for text in (markdown, latex, csv_text(evaluations)):
            assert not re.search("[\x1b\u202e]", text)
        assert "<i>" not in latex and not re.search(r"(?<!\\)<i", markdown)
    assert shapes[0] == shapes[1]
    family = {row[4] for row in csv.reader(io.StringIO(csv_text(hostile)))} - {"eat", "", "family"}
    assert family.pop().startswith("'=")
    special = re.search(r"^.*textbackslash.*$", latex_text(hostile), re.MULTILINE)[0]
    assert "\\{\\}\\_\\%\\&\\$\\#\\textasciitilde{}\\textasciicircum{}$<$i$>$''-{}-" in special


def test_what_is_printed_what_is_written_and_what_is_refused(run, tmp_path, capsys):
    def said(*argv, code=0):
        if code:
            with pytest.raises(SystemExit) as stopped:
                results.main([str(word) for word in argv])
            assert stopped.value.code == code
            return capsys.readouterr().err
        results.main([str(word) for word in argv])
        return capsys.readouterr().out

    table = said(run)
    assert table == markdown_text(report_data.load_run(run).evaluations)
    path = tmp_path / "new" / "table.tex"
    assert said(run, "--format", "latex", "--out", path) == f"Wrote {path}.\n"
    before = path.read_text()
    assert "--force" in said(run, "--format", "csv", "--out", path, code=2)
    assert path.read_text() == before
    said(run, "--format", "csv", "--out", path, "--force")
    assert path.read_text().startswith("evaluation,iteration")
    assert "is a folder" in said(run, "--out", tmp_path, code=2)
    assert "--out is missing" in said(run, "--format", "inspect", code=2)
    assert "not an empty folder" in said(run, "--format", "inspect", "--out", run, code=2)
    shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("evaluation*"))
    assert "ictjax evaluate" in said(tmp_path / "bare", code=2)


def test_the_package_that_is_needed_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    monkeypatch.delitem(sys.modules, "experiments.inspect_logs", raising=False)
    args = ResultsArgs(run_dir=run, format="inspect", out=tmp_path / "logs")
    with pytest.raises(ValueError, match=r"package inspect-ai: .*'\.\[inspect\]'"):
        results.write_results(report_data.load_run(run), args)
    assert not (tmp_path / "logs").exists()


def test_logs_of_inspect_hold_every_episode_and_the_means_of_the_results(run, tmp_path):
    log = pytest.importorskip("inspect_ai.log", reason="the extra inspect is not installed")
    copy = shutil.copytree(run, tmp_path / "run")
    episodes = copy / FOLDER / "episodes" / "trained_eat.jsonl"
    first, *others = map(json.loads, episodes.read_text().splitlines())
    failed = {**first, "outcome": "failed", "error": "the worker died"}
    episodes.write_text("".join(json.dumps(row) + "\n" for row in (failed, *others, others[0])))
    args = ResultsArgs(run_dir=copy, format="inspect", out=tmp_path / "logs")
    read = report_data.load_run(copy)
    assert "3 logs" in results.write_results(read, args)
    (evaluation,) = read.evaluations
    for arm in RATES:
        found = log.read_eval_log(str(tmp_path / "logs" / f"evaluation_{arm}.eval"))
        played = {family: rows for (of, family), rows in evaluation.episodes.items() if of == arm}
        assert len(found.samples) == found.results.total_samples == sum(map(len, played.values()))
        for family, rows in played.items():
            samples = [s for s in found.samples if s.metadata["family"] == family]
            scores = {(s.id, s.epoch): s.scores and s.scores["success"].value for s in samples}
            assert len(scores) == len(rows)
            wins = sum(row["outcome"] == "success" for row in rows)
            assert list(scores.values()).count("C") == wins
            assert sum(s.error is not None for s in samples) == sum(
                row["outcome"] == "failed" for row in rows
            )
        metrics = found.results.scores[0].metrics
        for split, overall in evaluation.results["overall"].items():
            assert metrics[split].value == overall["arms"][arm]["mean"]
        assert metrics["wear"].value == evaluation.families["wear"]["arms"][arm]["mean"]
    sample = next(s for s in found.samples if s.error is None)
    assert [message.role for message in sample.messages[:3]] == ["system", "user", "assistant"]
    assert str(tmp_path) not in found.model_dump_json(exclude={"location"})
