"""Variants of a preset, trained, evaluated and compared."""

import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from rich.console import Console

from experiments.commands.sweep import main
from experiments.evaluation_folder import read_part
from experiments.sweep import run_sweep
from experiments.sweep_file import read_sweep, run_dir_of
from experiments.sweep_page import render
from experiments.sweep_results import compared, note, on_other_games, table, to_json
from tests.evaluations import FOLDER, evaluation, part

FILE = """
preset = "fake-tiny"
seeds = [3, 4]
train = "--iterations 2"
evaluate = "--evaluation.families lamp"

[variants]
tiny = ""
fast = "--optimizer.learning-rate 0.06"
"""


def sweep_file(folder: pathlib.Path, text: str = FILE) -> pathlib.Path:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_a_file_asks_for(tmp_path):
    sweep = read_sweep(sweep_file(tmp_path))
    assert (sweep.preset, sweep.seeds) == ("fake-tiny", (3, 4))
    assert [variant.name for variant in sweep.variants] == ["tiny", "fast"]
    tiny, fast = (variant.settings(4) for variant in sweep.variants)
    assert (tiny.seed, tiny.iterations) == (4, 2)
    faster = dataclasses.replace(tiny.optimizer, learning_rate=0.06)
    assert fast == dataclasses.replace(tiny, optimizer=faster)


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("[variants]", "[variants", "is not TOML"),
        ('preset = "fake-tiny"', "", "names no preset"),
        ("fake-tiny", "fake-tony", "Unknown preset 'fake-tony'"),
        ("seeds = [3, 4]", "seeds = [3, 3]", r"different whole numbers, got \[3, 3\]"),
        ("seeds = [3, 4]", "seeds = []", r"different whole numbers, got \[\]"),
        ("seeds = [3, 4]", "sheds = [3, 4]", "'sheds', which is none of preset, seeds"),
        ('fast = "--optimizer.learning-rate 0.06"', "", "fewer than two variants"),
        ("fast", '"../fast"', "'../fast' cannot be the name of a folder"),
        ("fast", '"sweep.json"', "'sweep.json' cannot be the name of a folder"),
        ("fast", "a" * 101, "'a+' cannot be the name of a folder"),
        ("fast", "Tiny", "'tiny' and 'Tiny' differ in capitals alone"),
        ("[variants]", "tiny = [", r"is not TOML .*: see docs/use\.md"),
        ("0.06", "much", "variant 'fast': --optimizer.learning-rate takes a number, not 'much'"),
        ("learning-rate 0.06", "lerning-rate 1", "variant 'fast': Unknown flag"),
        ("--optimizer.learning-rate 0.06", "--iterations 2", "'tiny' and 'fast' are the same"),
        ("--optimizer.learning-rate 0.06", "--seed 5", "'fast' has --seed, which the sweep says"),
        ("--optimizer.learning-rate 0.06", "--help", "'fast' has --help"),
        ("--optimizer.learning-rate 0.06", "'", "flags of 'fast' cannot be read"),
        ('tiny = ""', "tiny = 3", "'tiny' must be flags in quotes, got 3"),
        ("--iterations 2", "--run-dir=x", "'train' has --run-dir"),
        ("--iterations 2", "--run_dir=x", "'train' has --run-dir"),
        ('fast = "', 'evaluate = "--seed 5 ', "'evaluate' has --seed"),
        ("families lamp", "families lump", "evaluate of 'tiny': The task has no family"),
        ("families lamp", "arms initial", "--evaluation.arms must have trained"),
        ("--evaluation.families lamp", "--out x", "'evaluate' has --out"),
        ("--evaluation.families lamp", "--eval_env alfworld", "'evaluate' has --eval-env"),
        ("--evaluation.families lamp", "--mesh none", "evaluate of 'tiny': Unknown mesh 'none'"),
        (
            "--evaluation.families lamp",
            "--actor-sampler.attention pages",
            "evaluate of 'tiny': --actor-sampler.attention pages is of a cache of pages",
        ),
        ("families lamp", "arms trained expert", "fake has no expert prompt"),
        (
            "families lamp",
            "families bell --evaluation.arms trained other-family",
            "reads about another family, and only 'bell' is played",
        ),
        (
            "--optimizer.learning-rate 0.06",
            "--task.environment.train-families bell door --task.environment.heldout-families lamp",
            r"'tiny' is evaluated on lamp \(trained on\)",
        ),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_before_anything_is(
    before, after, complaint, tmp_path
):
    assert before in FILE
    path = sweep_file(tmp_path, FILE.replace(before, after))
    with pytest.raises(ValueError, match=complaint) as error:
        read_sweep(path)
    assert str(path) in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file '.*none\.toml'"):
        read_sweep(tmp_path / "none.toml")


def test_the_ablations_that_ship_can_be_run():
    sweep = read_sweep(pathlib.Path("experiments/pocket/ablations.toml"))
    assert sweep.variants[0].flags == ()


def test_check_says_what_would_be_trained_and_trains_nothing(tmp_path, capsys):
    main([str(sweep_file(tmp_path)), "--out", str(tmp_path / "out"), "--check"])
    out = capsys.readouterr().out
    assert "2 variants x 2 seeds = 4 runs" in out
    assert "fast: --optimizer.learning-rate 0.06" in out
    assert not (tmp_path / "out").exists()


RATES = {"tiny": (0.3, 0.4), "fast": (0.7, 0.8)}  # games won, by seed


def kept(out: pathlib.Path, sweep, splits=types.MappingProxyType({"lamp": "heldout"})) -> dict:
    """Writes what trainings and evaluations of a sweep leave; returns the parts by variant."""
    parts = {}
    for variant in sweep.variants:
        parts[variant.name] = []
        for seed, rate in zip(sweep.seeds, RATES[variant.name], strict=True):
            generator = np.random.default_rng(seed)
            record = part(np.full(8, rate), generator, turns=1)
            record["games"]["select"] = [[f"s{run}-{n}" for n in range(4)] for run in range(8)]
            # of a part that `is_part` knows
            record |= {"drawn": "x", "prompts": [json.dumps({"arm": "trained"})] * 16}
            record |= {"malformed": 0, "failed_episodes": 0, "actor_failures": {}, "budget": {}}
            run_dir = run_dir_of(out, variant, seed)
            (run_dir / FOLDER).mkdir(parents=True)
            (run_dir / FOLDER / "trained_lamp.json").write_text(json.dumps(record))
            lines = [{"iteration": n, "reward": rate * n / 2} for n in (1, 2)]
            (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            parts[variant.name].append(record)
        results = evaluation(splits, seeds=2)
        results["protocol"] |= {"runs": 8, "test_games": 5}
        (out / variant.name / "evaluation.json").write_text(json.dumps(results))
    return parts


def test_variants_are_compared_with_the_first_on_the_same_games(tmp_path):
    sweep = read_sweep(sweep_file(tmp_path))
    parts = kept(tmp_path / "out", sweep)
    found = compared(sweep, sweep.variants, tmp_path / "out")
    tiny, fast = found.results
    assert (found.split, list(found.families), found.runs, found.test_games) == (
        *("heldout", ["lamp"], 8, 5),
    )
    last = {name: [np.array(r["test"])[:, -1] for r in of] for name, of in parts.items()}
    by_seed = {name: [float(won.mean()) for won in of] for name, of in last.items()}
    assert tiny.by_seed == pytest.approx(by_seed["tiny"])
    assert fast.by_seed == pytest.approx(by_seed["fast"])
    assert tiny.difference is None
    difference = np.mean(by_seed["fast"]) - np.mean(by_seed["tiny"])
    assert fast.difference.value == pytest.approx(difference) and difference > 0.2
    low, high = fast.difference.ci95
    assert low < difference < high
    # two seeds: the smallest p that flips of their signs can give
    assert fast.difference.smallest_p == 0.5 <= fast.difference.p
    assert fast.difference.verdict == "not shown"
    assert [reward.mean for reward in fast.rewards] == pytest.approx([0.375, 0.75])
    assert (fast.rewards[1].low, fast.rewards[1].high) == (0.7, 0.8)
    assert fast.reward == pytest.approx(0.5625)
    assert fast.games is None  # these lines do not say how many


def test_table_json_and_page_say_the_same(tmp_path):
    sweep = read_sweep(sweep_file(tmp_path))
    kept(tmp_path / "out", sweep)
    found = compared(sweep, sweep.variants, tmp_path / "out")
    _, fast = found.results
    console = Console(width=80, file=io.StringIO())
    console.print(table(sweep, found))
    shown = console.file.getvalue()
    difference = f"{100 * fast.difference.value:+.0f}"
    assert difference in shown and "2 seeds can give no p below 0.500" in " ".join(shown.split())
    written = json.loads(json.dumps(to_json(sweep, found)))
    assert written["compared_with"] == "tiny"
    assert written["variants"]["fast"]["difference"]["value"] == fast.difference.value
    assert written["variants"]["fast"]["flags"] == "--optimizer.learning-rate 0.06"
    page = render(sweep, found, "out<")
    assert "out&lt;" in page and difference in page and "--optimizer.learning-rate 0.06" in page
    assert page.count('<figure class="chart">') == 2


def test_other_games_are_not_compared(tmp_path):
    sweep = read_sweep(sweep_file(tmp_path))
    kept(tmp_path / "out", sweep)
    path = tmp_path / "out" / "fast" / "seed4" / FOLDER / "trained_lamp.json"
    record = json.loads(path.read_text())
    record["games"]["test"][0][0] = "another"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="different games of family 'lamp'"):
        compared(sweep, sweep.variants, tmp_path / "out")


def test_loops_of_which_games_failed_count_as_others_do(tmp_path):
    sweep = read_sweep(sweep_file(tmp_path))
    kept(tmp_path / "out", sweep)
    path = tmp_path / "out" / "fast" / "seed4" / FOLDER / "trained_lamp.json"
    record = json.loads(path.read_text())
    for run, last in enumerate([[1, None, None, None, None], *[[0] * 5] * 7]):
        record["test"][run][-1] = last
    path.write_text(json.dumps(record))
    _, fast = compared(sweep, sweep.variants, tmp_path / "out").results
    assert fast.by_seed[1] == pytest.approx(1 / 8)


def test_a_variant_that_played_other_games_is_left_out_by_name(tmp_path):
    sweep = read_sweep(sweep_file(tmp_path))
    kept(tmp_path / "out", sweep)
    assert on_other_games(sweep, sweep.variants, tmp_path / "out") == {}
    path = tmp_path / "out" / "fast" / "seed4" / FOLDER / "trained_lamp.json"
    record = json.loads(path.read_text())
    record["games"]["test"][0][0] = "another"
    path.write_text(json.dumps(record))
    found = on_other_games(sweep, sweep.variants, tmp_path / "out")
    assert list(found) == ["fast"]
    assert "other TEST games of family 'lamp' than tiny" in found["fast"]


def test_families_that_are_evaluated_and_not_compared_are_named(tmp_path):
    sweep = read_sweep(sweep_file(tmp_path))
    kept(tmp_path / "out", sweep, {"lamp": "heldout", "bell": "train", "door": "train"})
    found = compared(sweep, sweep.variants, tmp_path / "out")
    assert (list(found.families), found.left_out) == (["lamp"], ("bell", "door"))
    assert "Evaluated too, not compared here: bell, door" in note(sweep, found)
    assert "Evaluated too, not compared here: bell, door" in render(sweep, found, "out")


def test_a_part_that_is_not_there_or_damaged_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"trained_lamp\.json is missing: remove"):
        read_part(tmp_path, "evaluation/step1-0", "trained", "lamp")
    path = tmp_path / "evaluation" / "step1-0" / "trained_lamp.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"test": [[[1]]]}')
    with pytest.raises(ValueError, match=r"trained_lamp\.json does not hold the record of a part"):
        read_part(tmp_path, "evaluation/step1-0", "trained", "lamp")


def test_a_variant_that_fails_costs_no_other_and_a_sweep_goes_on(tmp_path):
    sweep = read_sweep(sweep_file(tmp_path, FILE.replace("[3, 4]", "[3]")))
    out, console = tmp_path / "out", Console(file=io.StringIO(), width=80)
    obstacle = out / "fast" / "seed3" / "notes.txt"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("not a run")
    with pytest.raises(RuntimeError, match="1 variant of the sweep failed: fast, seed 3: .*no run"):
        run_sweep(sweep, out, console)
    assert set(json.loads((out / "sweep.json").read_text())["variants"]) == {"tiny"}
    obstacle.unlink()
    before = (out / "tiny" / "seed3" / "metrics.jsonl").stat().st_mtime_ns
    run_sweep(sweep, out, console)
    assert (out / "tiny" / "seed3" / "metrics.jsonl").stat().st_mtime_ns == before
    assert set(json.loads((out / "sweep.json").read_text())["variants"]) == {"tiny", "fast"}
    assert re.search(r"fast +0\.\d\d +\d+ ", console.file.getvalue())
    # flags that were changed later
    faster = read_sweep(sweep_file(tmp_path, FILE.replace("[3, 4]", "[3]").replace("0.06", "0.07")))
    with pytest.raises(
        RuntimeError, match=r"0\.06, is 0\.07.*, here: give .* another name"
    ) as error:
        run_sweep(faster, out, console)
    assert f"or remove {out / 'fast'}" in str(error.value)


def test_a_stopped_sweep_leaves_no_process_and_goes_on(tmp_path):
    path, out = sweep_file(tmp_path, FILE.replace("--iterations 2", "--iterations 1000")), tmp_path
    metrics = out / "tiny" / "seed3" / "metrics.jsonl"
    command = [sys.executable, "-m", "experiments", "sweep", str(path), f"--out={out}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        (child,) = children(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "start it again to go on with what is missing" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    # the training was told to end, and saved what it had
    assert "start it again with the same flags" in (out / "tiny" / "seed3.log").read_text()


def children(pid: int) -> list[int]:
    return [
        int(word) for word in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]
