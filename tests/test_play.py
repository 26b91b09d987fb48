"""Playing in the terminal: a person on a pipe and on a pty, the expert, chance, and a model through
the real rollout.
"""

import io
import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from envs import prompts
from envs.api import GameId, Outcome
from envs.fake import FakeEnvironment
from experiments import play
from experiments.commands.play import PlayArgs, settle
from experiments.fake_pair import save_pair
from experiments.presets import PRESETS
from ictjax import players
from ictjax.records import trajectory_from_json
from ictjax.run_config import to_dict
from tests.evaluations import FOLDER, evaluation
from tests.test_cli import refused

DOOR = GameId(env="fake", family="door", key="6")  # two steps away
ROOT = pathlib.Path(__file__).parents[1]


def run(monkeypatch, capsys, argv, typed=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    play.main(argv)
    return capsys.readouterr().out


def flags(path, *more):
    return ["--env", "fake", "--family", "door", "--game", "6", "--record", str(path), *more]


def test_a_person_plays_and_the_episode_is_recorded(monkeypatch, capsys, tmp_path):
    path = tmp_path / "episode.json"
    printed = run(
        monkeypatch, capsys, flags(path), "help\n\nactions\n!help\nwalk\nwalk\nopen\nignored\n"
    )
    assert (
        "put ! before it" in printed and "Actions: walk, look, open, light, ring, jump" in printed
    )
    assert "success after 4 actions" in printed and str(path) in printed
    played = trajectory_from_json(path.read_text())
    assert played.game == DOOR and played.outcome is Outcome.SUCCESS
    assert [turn.action for turn in played.turns] == ["help", "walk", "walk", "open"]
    assert [turn.reward for turn in played.turns] == [0, 0, 0, 1]
    # What was shown and recorded is what the game says.
    game = FakeEnvironment().open("door")
    texts = [
        game.reset(DOOR).text,
        *(game.step(turn.action).observation.text for turn in played.turns),
    ]
    assert [turn.observation for turn in played.turns] == texts[
        :-1
    ] and played.final_observation == texts[-1]
    game.reset(DOOR)
    assert played.state_hash == game.state_hash()
    assert all(text in printed for text in texts)
    assert [name.name for name in tmp_path.iterdir()] == ["episode.json"]


def test_the_actions_are_shown_as_the_actor_sees_them(monkeypatch, capsys, tmp_path):
    printed = run(monkeypatch, capsys, flags(tmp_path / "e.json", "--show-actions"), "quit\n")
    assert "\nAvailable actions: walk, look, open, light, ring, jump\n" in printed


@pytest.mark.parametrize("typed", ["walk\n", "walk\nquit\n"])
def test_who_leaves_early_is_recorded(monkeypatch, capsys, tmp_path, typed):
    path = tmp_path / "episode.json"
    printed = run(monkeypatch, capsys, flags(path), typed)
    assert "stopped after 1 action\n" in printed
    played = trajectory_from_json(path.read_text())
    assert [turn.action for turn in played.turns] == [
        "walk"
    ] and played.outcome is Outcome.STEP_LIMIT
    assert "1 step away" in played.final_observation


def test_the_step_limit_ends_the_episode(monkeypatch, capsys, tmp_path):
    path = tmp_path / "episode.json"
    printed = run(monkeypatch, capsys, flags(path, "--max-steps", "2"), "look\n" * 5)
    assert "step limit after 2 actions" in printed and "step 3" not in printed
    assert len(trajectory_from_json(path.read_text()).turns) == 2


def test_the_expert_and_chance_play(monkeypatch, capsys, tmp_path):
    path = tmp_path / "episode.json"
    argv = [
        "--game",
        "minihack|eat|10000",
        "--policy",
        "expert",
        "--options",
        "text",
        "compact",
        "--record",
        str(path),
    ]
    printed = run(monkeypatch, capsys, argv)
    played = trajectory_from_json(path.read_text())
    assert (
        played.success and played.turns[-1].action == "eat apple" and "Action: eat apple" in printed
    )
    argv = ["--game", "minihack|eat|10000", "--policy", "random", "--max-steps", "3"]
    assert (
        run(monkeypatch, capsys, argv)
        == run(monkeypatch, capsys, argv)
        != run(monkeypatch, capsys, [*argv, "--seed", "1"])
    )
    path.unlink()
    run(monkeypatch, capsys, flags(path, "--policy", "random", "--max-steps", "30"))
    assert {turn.action for turn in trajectory_from_json(path.read_text()).turns} <= {
        "walk",
        "look",
        "open",
        "light",
        "ring",
        "jump",
    }


def test_a_model_is_watched(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(players, "_MAX_LEN", 128)  # fewer and smaller programs to compile
    actor, _ = save_pair(tmp_path)
    path, prompt = tmp_path / "episode.json", tmp_path / "prompt.txt"
    prompt.write_text("play OPEN\n")
    argv = [
        "--game",
        "fake|door|0",
        "--model",
        str(actor),
        "--max-turn-tokens",
        "4",
        "--record",
        str(path),
    ]
    printed = run(monkeypatch, capsys, [*argv, "--prompt", str(prompt)])
    played = trajectory_from_json(path.read_text())
    assert played.system_prompt == "play OPEN" and played.success
    assert [(turn.action, turn.reply) for turn in played.turns] == [("open", "Action: open")]
    assert (
        played.state_hash
        and played.turns[0].observation in printed
        and "Action: open" in printed
        and "success after 1 action" in printed
    )
    printed = run(monkeypatch, capsys, [*argv, "--prompt", "play RING", "--max-steps", "2"])
    assert (
        trajectory_from_json(path.read_text()).turns[1].action == "ring"
        and "step limit after 2 actions" in printed
    )
    printed = run(
        monkeypatch,
        capsys,
        [*argv, "--prompt", "play OPEN", "--max-turn-tokens", "1", "--max-steps", "1"],
    )
    assert "(no usable action: truncated)" in printed
    before = path.read_text()
    refused(
        capsys,
        play.main,
        ["--game", "fake|door|x", "--model", str(actor), "--record", str(path)],
        "fake|door|x",
    )
    assert path.read_text() == before


def test_a_model_is_spoken_to_as_it_expects(monkeypatch, capsys, tmp_path):
    """The shipped actor reads short text and starts with its own prompt; with a lesson it wins."""
    actor, path = "experiments/pocket/checkpoints/actor", tmp_path / "episode.json"
    lesson = "you play nethack . if you see apple , go on it and eat it . think , then act ."
    argv = ["--model", actor, "--family", "eat", "--record", str(path)]
    run(monkeypatch, capsys, [*argv, "--prompt", lesson])
    played = trajectory_from_json(path.read_text())
    assert played.outcome is Outcome.SUCCESS, played.turns
    assert played.turns[0].observation == played.turns[0].observation.lower()
    printed = run(monkeypatch, capsys, [*argv, "--max-steps", "1"])
    played = trajectory_from_json(path.read_text())
    assert played.system_prompt == prompts.MINIHACK["compact"] in printed
    foreign = ["--model", actor, "--env", "alfworld", "--family", "put"]
    refused(capsys, play.main, foreign, "knows minihack only, not alfworld")
    unread = [*argv, "--prompt", "Traverse the labyrinth swiftly"]
    refused(capsys, play.main, unread, "has no words for", "Traverse")


@pytest.mark.parametrize("model", ["base.gguf", "hub/base"])
def test_an_adapter_says_how_it_plays_on_a_base_that_says_nothing(model, tmp_path, monkeypatch):
    adapters = pathlib.Path("experiments/smollm/adapters").resolve()
    monkeypatch.chdir(tmp_path)
    pathlib.Path("base.gguf").touch()

    def settled(adapter, env="minihack"):
        return settle(PlayArgs(model=model, adapter=str(adapters / adapter), env=env))

    actor = settled("actor")
    assert (actor.options["text"], actor.prompt) == ("short", prompts.MINIHACK["short"])
    assert (actor.rollout.max_steps, actor.rollout.max_turn_tokens) == (8, 40)
    with pytest.raises(ValueError, match="actor knows minihack only, not alfworld"):
        settled("actor", "alfworld")
    for env in ("minihack", "alfworld"):  # a reflector is of no benchmark, and no actor
        reflector = settled("reflector", env)
        assert (reflector.options, reflector.prompt) == ({}, None)


def test_a_run_shows_its_actor_under_its_own_prompts(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(players, "_MAX_LEN", 128)
    run_dir, path = tmp_path / "run", tmp_path / "episode.json"
    (run_dir / "prompts").mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(to_dict(PRESETS["fake-tiny"])))
    candidates = [
        {"family": "door", "system_prompt": "play RING", "reward": 0.0},
        {"family": "door", "system_prompt": "play OPEN", "reward": 1.0},
        {"family": "door", "system_prompt": None, "reward": -0.5},
    ]
    lines = "".join(json.dumps(line) + "\n" for line in candidates)
    (run_dir / "prompts" / "iteration_00003.jsonl").write_text(lines)
    argv = ["--run-dir", str(run_dir), "--game", "fake|door|0", "--record", str(path)]
    run(monkeypatch, capsys, argv)
    played = trajectory_from_json(path.read_text())
    assert (played.system_prompt, played.success) == ("play OPEN", True)
    run(monkeypatch, capsys, [*argv, "--arm", "initial"])
    played = trajectory_from_json(path.read_text())
    assert (played.system_prompt, played.success, len(played.turns)) == ("play", False, 2)
    refused(capsys, play.main, [*argv, "--arm", "untrained"], "'untrained'", "evaluate it first")
    scored = {"arm": "trained", "family": "door", "system_prompt": "play LIGHT"}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation({"door": "train"})))
    (run_dir / FOLDER).mkdir(parents=True)
    (run_dir / FOLDER / "prompts.jsonl").write_text(json.dumps(scored) + "\n")
    run(monkeypatch, capsys, argv)
    assert trajectory_from_json(path.read_text()).system_prompt == "play LIGHT"
    refused(capsys, play.main, [*argv, "--model", "somewhere"], "--model and --run-dir exclude")
    other = ["--run-dir", str(run_dir), "--env", "minihack", "--family", "eat"]
    refused(capsys, play.main, other, "plays fake, not minihack")


def test_a_prompt_is_a_text_or_a_file(tmp_path):
    (tmp_path / "prompt.txt").write_text("You walk.\n")
    assert play.read_prompt(str(tmp_path / "prompt.txt"), "own") == "You walk."
    assert play.read_prompt("", "own") == "own"
    assert play.read_prompt("x" * 5000, "own") == "x" * 5000


def test_bad_input(capsys, tmp_path):
    refused(capsys, play.main, ["--env", "chess"], "'chess'")
    refused(capsys, play.main, ["--env", "fake"], "--family is missing", "bell, door, lamp")
    refused(
        capsys, play.main, ["--env", "fake", "--family", "castle"], "'castle'", "bell, door, lamp"
    )
    refused(capsys, play.main, ["--env", "fake", "--family", "door", "--split", "dev"], "'dev'")
    refused(
        capsys,
        play.main,
        ["--env", "fake", "--family", "door", "--split", "test", "--seed", "200"],
        "200",
    )
    refused(
        capsys, play.main, ["--env", "fake", "--family", "door", "--seed", "-1"], "--seed", "-1"
    )
    refused(
        capsys,
        play.main,
        ["--env", "fake", "--game", "minihack|eat|1"],
        "minihack|eat|1",
        "--env fake",
    )
    refused(capsys, play.main, ["--max-turn-tokens", "0"], "--max-turn-tokens", "0")
    refused(capsys, play.main, ["--temperature", "-1"], "--temperature", "-1")
    refused(capsys, play.main, ["--game", "fake|door|x"], "fake|door|x")
    refused(capsys, play.main, ["--game", "fake|door"], "env|family|key")
    refused(
        capsys,
        play.main,
        ["--env", "fake", "--family", "door", "--policy", "expert"],
        "no scripted expert for 'fake'",
        "minihack",
    )
    refused(
        capsys,
        play.main,
        ["--env", "fake", "--family", "door", "--model", str(tmp_path)],
        "config.json",
    )
    refused(
        capsys,
        play.main,
        ["--env", "fake", "--family", "door", "--model", "m", "--policy", "expert"],
        "--model",
    )
    refused(
        capsys,
        play.main,
        ["--env", "fake", "--family", "door", "--record", str(tmp_path / "no" / "r.json")],
        "--record",
    )
    refused(
        capsys,
        play.main,
        ["--env", "fake", "--family", "door", "--options", "speed", "fast"],
        "speed",
    )
    assert not list(tmp_path.iterdir())


class Terminal:
    """The other side of a terminal."""

    def __init__(self, fd):
        self.fd, self.shown = fd, b""

    def until(self, wanted, timeout_s=120.0):
        """What is shown up to and including `wanted`; what follows is kept for the next call."""
        until = time.monotonic() + timeout_s
        while wanted not in self.shown:
            assert time.monotonic() < until, self.shown.decode(errors="replace")
            if select.select([self.fd], [], [], 0.5)[0]:
                self.shown += os.read(self.fd, 4096)
        before, _, self.shown = self.shown.partition(wanted)
        return before + wanted


def test_a_terminal_has_history_completion_and_a_polite_ctrl_c(tmp_path):
    path = tmp_path / "episode.json"
    parent, child = pty.openpty()
    argv = [sys.executable, "-m", "experiments.play", *flags(path)]
    environ = {**os.environ, "TERM": "dumb", "INPUTRC": os.devnull}
    process = subprocess.Popen(
        argv, stdin=child, stdout=child, stderr=child, cwd=ROOT, env=environ, start_new_session=True
    )
    os.close(child)
    terminal = Terminal(parent)
    try:
        terminal.until(b"\n> ")
        os.write(parent, b"wa\t\r")  # Tab completes
        terminal.until(b"step 2")
        terminal.until(b"\n> ")
        os.write(parent, b"\x1b[A\r")  # arrow up: the last action again
        assert b"right here" in terminal.until(b"\n> ")
        # readline shows its prompt just before it waits; a signal in between would wait with it for
        # the next key
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        shown = terminal.until(b"SIGINT")
        assert b"Recorded in" in shown and b"Traceback" not in shown
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    played = json.loads(path.read_text())
    assert [turn["action"] for turn in played["turns"]] == ["walk", "walk"] and played[
        "outcome"
    ] == "step_limit"
