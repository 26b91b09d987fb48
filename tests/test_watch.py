"""What `ictjax watch` shows of a run, from its files alone."""

import dataclasses
import io
import json
import pathlib
import re

import pytest

from experiments import watch as watching
from experiments.commands import watch
from experiments.console import Terminal
from experiments.presets import preset
from experiments.run_lock import RunLock
from tests.evaluations import evaluation
from tests.test_cli import refused

ITERATIONS = 4


def record(number):
    return {
        "iteration": number,
        "reward": number / 10,
        "reward_replay": number / 10,
        "reward_fresh": None,
        "context_success": 0.25,
        "reward_family": {"door": 0.5, "key": None},
        "dead_groups": 1,
        "candidates": 8,
        "malformed_candidates": 2,
        "reflector_failures": {"truncated": 1},
        "actor_failures": {"no_action": 3, "truncated": 0},
        "turns": 100,
        "kl": 0.002,
        "time": {"contexts_s": 60.0, "rewards_s": 30.0, "update_s": 10.0, "compilations": 3},
    }


def line(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in records)


@pytest.fixture
def run(tmp_path):
    """A run of which one iteration has ended."""
    folder = tmp_path / "a run"
    config = dataclasses.asdict(preset("fake-tiny")) | {"iterations": ITERATIONS}
    line(folder / "config.json", config)
    add(folder, 1)
    return folder


def add(folder, number, said="take the [bold]key[/bold]\x1b[31m"):
    line(folder / "metrics.jsonl", record(number))
    name = f"iteration_{number:05d}.jsonl"
    prompts = [
        {"family": "door", "reward": 0.25, "system_prompt": "worse"},
        {"family": "key", "reward": 0.75, "system_prompt": said},
        {"family": "key", "reward": None, "system_prompt": "no reward"},
        {"family": "key", "reward": 1.0, "system_prompt": None},
    ]
    turns = [{"observation": f"room {n} " + "x" * 6000, "action": f"go {n}"} for n in range(9)]
    game = {"system_prompt": said, "outcome": "step_limit", "turns": turns}
    game["final_observation"] = "Too late.\nIt is dark."
    line(folder / "prompts" / name, *prompts)
    line(folder / "episodes" / name, game | {"system_prompt": "worse"}, game)


def shown(capsys, folder, *more):
    watch.main([str(folder), "--once", *more])
    return capsys.readouterr().out


def test_what_is_shown(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, run)
    assert max(len(row) for row in text.splitlines() if str(run) not in row) <= 80
    assert f"Iteration 1 of {ITERATIONS}, stopped" in text
    for part in (
        "0.100",
        "door 0.500, key -",
        "dead groups 1 of",
        "malformed 25.0 %",
        "truncated 12.5 %",
        "KL 0.002",
        "contexts 60.0, rewards 30.0, update 10.0",
        "about 5 min, until",  # three times 100 seconds
        "Best new prompt: key, reward 0.750",
        "A game under it: step limit, 9 turns",
        "> go 8",
        "It is dark.",
        f"To go on: ictjax train --config '{run}/config.json' --run-dir '{run}'\n",
    ):
        assert part in text, part
    assert "fresh games" not in text and "go 2" not in text and "worse" not in text
    assert re.search(r"│ \.\.\. +│\n│ room 3 ", text)  # six turns of nine
    # what a prompt spells is text
    assert "[bold]key[/bold]" in text and "\x1b" not in text


def test_a_curve(run, capsys):
    add(run, 2)
    add(run, 3)
    assert "0.100 to 0.300, best 0.300 (iteration 3)" in shown(capsys, run)
    assert watching.curve([0.0, 0.0, 0.5, 0.5, 1.0], "01234", 2) == "04"
    assert watching.curve([0.0, None, 0.5, 1.0], "01234") == "0 24"
    assert watching.curve([0.5, 0.5], "01234") == "22"
    assert watching.curve(list(range(400)), "0123456789") == "".join(
        str(round(9 * place / 39)) for place in range(40)
    )


def test_a_run_that_is_trained_or_finished(run, capsys):
    with RunLock(run):
        text = shown(capsys, run)
        assert f"Iteration 1 of {ITERATIONS}, training" in text
        assert "Ctrl-C ends watching" in text
    for number in range(2, ITERATIONS + 1):
        add(run, number)
    text = shown(capsys, run)
    assert "finished" in text and "left" not in text
    assert text.endswith(f"Next: ictjax evaluate --run-dir '{run}'\n")
    results = evaluation({"door": "heldout"})
    for step, word in ((ITERATIONS - 1, "evaluate"), (ITERATIONS, "report")):
        results["protocol"]["checkpoint"] = step
        (run / "evaluation.json").write_text(json.dumps(results))
        assert shown(capsys, run).endswith(f"Next: ictjax {word} --run-dir '{run}'\n")


def test_a_run_that_has_just_begun(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert "No iteration has ended yet" in shown(capsys, run)


def test_on_a_terminal_it_goes_on_until_nobody_trains(run, monkeypatch):
    console = Terminal(file=io.StringIO(), force_terminal=True, width=80)
    lock = RunLock(run)
    lock.__enter__()
    looks = []

    def later(folder, before=None, last=None):
        if before is not None:
            if len(looks) == 1:
                add(folder, 2, said="a better prompt")
            if len(looks) == 2:
                lock.release()
        looks.append(real(folder, before, last))
        return looks[-1]

    real = watching.look
    monkeypatch.setattr(watching, "look", later)
    watching.watch(run, console, every=0.01, once=False, named=run)
    assert [seen.done for seen in looks] == [1, 2, 2]
    assert looks[2].prompt is looks[1].prompt  # read once
    assert "a better prompt" in console.file.getvalue()
    assert "Iteration 2 of 4, stopped" in console.file.getvalue()
    assert console.file.getvalue().endswith(f"--run-dir '{run}'\n")


def test_a_long_page_is_shown_in_the_rows_of_the_terminal(run):
    console = Terminal(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with RunLock(run):
        seen = watching.look(run)
    rows = console.render_lines(watching._fitted(seen, console, pathlib.Path("runs/a")), pad=False)
    text = ["".join(segment.text for segment in row).rstrip() for row in rows]
    assert len(text) < 24
    assert text[0] == "Iteration 1 of 4, training: runs/a"
    assert text[-3:] == ["  > go 8", "Too late.", "Ctrl-C ends watching, not the training."]
    over = console.render_lines(
        watching._fitted(watching.look(run), console, pathlib.Path("runs/a")), pad=False
    )
    text = ["".join(segment.text for segment in row).rstrip() for row in over]
    assert text[0] == "Iteration 1 of 4, stopped: runs/a" and text[-1] == "Too late."
    console.size = (80, 60)
    rows = console.render_lines(watching._fitted(seen, console, run), pad=False)
    assert 24 < len(rows) < 60 and "╭" in "".join(segment.text for row in rows for segment in row)


def test_a_copy_is_named_by_its_address(run):
    """It is what can be typed elsewhere; the config.json of the copy is not."""
    console = Terminal(file=io.StringIO(), width=80)
    address = pathlib.Path("gs://bucket/a run")
    watching.watch(run, console, every=1, once=True, named=address)
    text = console.file.getvalue()
    assert "ictjax train --run-dir 'gs://bucket/a run', with its other flags" in text
    assert str(run) not in text


# On the trainer's own terminal.


def own(run, *, width=80, rows=18, number=None, error="", screen=None):
    """The rows that a training shows above its bars."""
    console = Terminal(file=io.StringIO(), force_terminal=True, width=width, height=50)
    done = watching.look(run).done if number is None else number
    draw = (screen or watching.OwnScreen(run))(done, {"error": error})
    drawn = console.render_lines(draw(console, rows), pad=False)
    return ["".join(segment.text for segment in row).rstrip() for row in drawn]


PROMPT = "Look before you act.\nOpen what is closed with its key. " + "Think twice. " * 60


@pytest.mark.parametrize("width", [80, 60])
def test_a_training_shows_the_page_in_few_rows(run, width):
    for number in range(2, 31):
        add(run, number, said=PROMPT)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"iterations": 40}))
    rows = own(run, width=width)
    assert len(rows) <= 18 and max(map(len, rows)) <= width
    text = " ".join(" ".join(rows).split())
    for part in (
        "0.100 to 3.000",
        "by family door 0.500, key -",
        "dead groups 1 of 2",
        "malformed 25.0 %, truncated 12.5 %",
        "contexts 60.0, rewards 30.0, update 10.0",
        "left about 17 min, until",  # ten times 100 seconds
        "Best new prompt: key, reward 0.750 Look before you act.",
        "A game under it: step limit, 9 turns ... ",
    ):
        assert part in text, part
    assert rows[-2:] == ["  > go 8", "Too late."]
    (curve,) = (row.split()[1] for row in rows if row.startswith("reward "))
    assert (curve[0], curve[-1]) == ("▁", "█") and len(curve) >= 12
    assert any(row.endswith(" ...") for row in rows)  # of the prompt there is more


@pytest.mark.parametrize("rows", range(6, 19))
def test_what_matters_less_goes_first_where_there_are_few_rows(run, rows):
    shown = own(run, rows=rows, error="the worker died")
    assert len(shown) <= rows
    text = "\n".join(shown)
    for part in ("reward  ", "dead groups 1 of 2", "the worker died"):
        assert part in text
    assert ("before reflection" in text) == (rows >= 9)
    assert ("Best new prompt" in text) == (rows >= 11)
    assert ("A game under it" in text) == (rows >= 13)


def test_a_training_that_goes_on_shows_no_iteration_that_is_played_again(run):
    add(run, 2, said="of an iteration without checkpoint")
    text = "\n".join(own(run, number=1))
    assert "0.200" not in text and "without checkpoint" not in text and "0.100" in text
    assert own(run, number=0) == [
        "No iteration has ended yet: programs are compiled and the first games played."
    ]


def test_looks_take_a_hundredth_of_a_trainings_time(run, monkeypatch):
    """Half a second at once, else the page waits; the last one does not."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    looks, real = [], watching.look

    def slow(*args, **settings):
        nonlocal now
        now += 2.0
        looks.append(settings["last"])
        return real(*args, **settings)

    monkeypatch.setattr(watching, "look", slow)
    screen = watching.OwnScreen(run)
    for number in range(1, 31):
        now = 10.0 * number
        screen(number % ITERATIONS, {})
    assert looks == [1, 15 % ITERATIONS]  # 2 s of 150
    screen(ITERATIONS, {})
    assert looks[2:] == [ITERATIONS]


@pytest.mark.parametrize(
    "said", ["x" * 2**20, "word " * 2**18, "line\n" * 2**18, "\x1b[2J" * 2**18]
)
def test_a_megabyte_of_prompt_is_cut(run, capsys, monkeypatch, said):
    monkeypatch.setenv("COLUMNS", "80")
    add(run, 2, said=said)
    text = shown(capsys, run)
    assert len(text) < 20_000 and "\x1b" not in text
    assert "Best new prompt: key, reward 0.750" in text and "A game under it" in text
    rows = own(run)
    assert len(rows) <= 18 and max(map(len, rows)) <= 80
    assert "\x1b" not in "".join(rows)


def test_what_is_no_run(tmp_path, capsys):
    refused(capsys, watch.main, [str(tmp_path / "none"), "--once"], "none")
    refused(capsys, watch.main, ["--once"], "DIR")
    assert not pathlib.Path(tmp_path / "none").exists()
