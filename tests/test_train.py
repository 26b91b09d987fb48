"""The whole loop on fake games with hand-made models: what it learns, writes and resumes."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from envs.api import CannotGoOn
from envs.fake import FakeEnvironment
from envs.local import LocalPool
from envs.pool import WorkerPool
from experiments import export, report
from experiments.evaluate import evaluate
from experiments.evaluate import main as evaluate_main
from experiments.fake_pair import save_pair
from experiments.presets import PRESETS, preset
from experiments.train import main as train_main
from ictjax.algorithms import with_algorithm
from ictjax.checkpoint import Checkpointer
from ictjax.config import LoraConfig
from ictjax.learner import init_state, make_optimizer
from ictjax.metrics import read_metrics
from ictjax.models.lora import adapter_axes
from ictjax.players import initial_weights, saved_steps
from ictjax.records import context_from_json, trajectory_from_json
from ictjax.run_config import differences, from_dict, to_dict
from ictjax.sampler import Sampler
from ictjax.train import train
from tests.one_device import one_device

ITERATIONS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def flags(models):
    actor, reflector = map(str, models)
    return [
        "--preset",
        "fake-tiny",
        "--actor.model",
        actor,
        "--reflector.model",
        reflector,
        "--iterations",
        str(ITERATIONS),
    ]


@pytest.fixture(scope="module")
def start(flags):
    """Starts the program; compiled code is kept from start to start. Whatever still runs at the end
    is killed.
    """
    environ = one_device()
    started = []

    def begin(run_dir, *more):
        command = [
            sys.executable,
            "-m",
            "experiments.train",
            *flags,
            "--run-dir",
            str(run_dir),
            *more,
        ]
        started.append(subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(run_dir))
    return run_dir


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def timeless(run_dir):
    return [
        {name: value for name, value in record.items() if name != "time"}
        for record in read_metrics(run_dir)
    ]


def assert_same_run(run_dir, other):
    """Metrics, episodes, contexts and prompts."""
    assert timeless(run_dir) == timeless(other)
    for folder in ("episodes", "contexts", "prompts"):
        for path in sorted((other / folder).iterdir()):
            assert (run_dir / folder / path.name).read_text() == path.read_text()


def kill_after(process, run_dir, iteration):
    while len(read_metrics(run_dir)) < iteration:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()


def test_a_run_killed_twice_and_resumed_equals_an_uninterrupted_one(start, uninterrupted, tmp_path):
    run_dir = tmp_path / "killed"
    kill_after(start(run_dir), run_dir, 2)
    # What a kill between two writes leaves behind.
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "rew')
    (run_dir / "episodes" / "iteration_00007.jsonl").write_text("from a life that is gone\n")
    kill_after(start(run_dir), run_dir, 5)
    finish(start(run_dir))
    assert len(timeless(run_dir)) == ITERATIONS
    assert_same_run(run_dir, uninterrupted)


def test_a_run_that_refills_goes_on_as_if_it_had_not_been_killed(start, tmp_path):
    """Without the penalty of malformed replies most groups win nothing at all."""
    words = ["--algorithm=dapo", "--meta.malformed-reward=0", "--meta.replay-weight=1"]
    words += ["--iterations=4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, *words))
    assert any(record["refill_rounds"] for record in timeless(whole)[2:])
    kill_after(start(killed, *words), killed, 2)
    assert len(read_metrics(killed)) < 4
    finish(start(killed, *words))
    assert_same_run(killed, whole)


def worker_of(process) -> int:
    """The process id of an environment worker of a running program."""
    while process.poll() is None:
        for child in (
            pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ):
            with contextlib.suppress(FileNotFoundError):
                if b"envs.worker" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize(
    ("number", "counter"),
    [(signal.SIGKILL, "worker_crashes"), (signal.SIGSTOP, "worker_timeouts")],
    ids=["killed", "stopped"],
)
def test_a_worker_that_dies_or_hangs_changes_no_number(
    start, uninterrupted, tmp_path, number, counter
):
    run_dir = tmp_path / "hit"
    process = start(run_dir, "--task.environment.deadline-s", "2")
    while not read_metrics(run_dir):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(worker_of(process), number)
    finish(process)
    assert timeless(run_dir) == timeless(uninterrupted)
    assert read_metrics(run_dir)[-1]["time"][counter] == 1


def test_the_run_directory_holds_what_the_design_says(uninterrupted):
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["iterations"] == ITERATIONS
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert {"git_revision", "packages", "devices", "seeds", "games_sha256", "argv"} <= set(manifest)
    assert manifest["attention"] == "blocks"
    ways = {"actor": "slots, kernels for this CPU", "reflector": "slots, kernels for this CPU"}
    assert manifest["sampling_attention"] == ways
    records = read_metrics(uninterrupted)
    assert [record["iteration"] for record in records] == list(range(1, ITERATIONS + 1))
    for record in records:
        assert {
            "reward",
            "reward_replay",
            "reward_fresh",
            "kl",
            "entropy",
            "grad_norm",
            "dead_groups",
            "reward_family",
        } <= set(record)
        assert {
            "contexts_s",
            "candidates_s",
            "rewards_s",
            "update_s",
            "worker_replays",
            "sampler_gap_max",
        } <= set(record["time"])
        assert record["time"]["sampler_gap_max"] < 1e-4
        assert record["time"]["compilations"] == 0  # since the run began
        assert record["skipped"] == 0
    first = uninterrupted / "contexts" / "iteration_00001.jsonl"
    contexts = [context_from_json(line) for line in first.read_text().splitlines()]
    assert sorted(context.family for context in contexts) == ["door", "lamp"]
    lines = (uninterrupted / "episodes" / "iteration_00001.jsonl").read_text().splitlines()
    assert all(trajectory_from_json(line).game.env == "fake" for line in lines)
    prompts = [
        json.loads(line)
        for line in (uninterrupted / "prompts" / "iteration_00001.jsonl").read_text().splitlines()
    ]
    assert [(p["context"], p["candidate"]) for p in prompts] == [
        (q, g) for q in range(2) for g in range(4)
    ]


@pytest.mark.parametrize("rank", [0, 2])
def test_nothing_is_compiled_after_the_start_on_a_mesh_and_the_run_goes_on(flags, tmp_path, rank):
    """Of 8 devices, which hold weights in parts and in copies."""
    mesh = [
        f"--{role}.mesh.{axis}" for role in ("actor", "reflector") for axis in ("data=4", "fsdp=2")
    ]
    words = [*flags, *mesh, f"--reflector.lora.rank={rank}", f"--run-dir={tmp_path}"]
    for iterations in (3, 4):
        train_main([*words, f"--iterations={iterations}"])
    times = [record["time"] for record in read_metrics(tmp_path)]
    assert [time["compilations"] for time in times] == [0] * 4
    assert [time["process_began"] for time in times] == [1, 1, 1, 4]


def test_the_reflector_learns_the_word_that_wins_and_the_evaluation_shows_it(models, tmp_path):
    """The reflector starts with every word equally likely; only "OPEN" makes the actor win at
    doors, and only where the door is near.
    """
    actor, reflector = map(str, models)
    base = PRESETS["fake-tiny"]
    config = dataclasses.replace(
        base.with_models(actor, reflector),
        iterations=15,
        task=dataclasses.replace(
            base.task,
            environment=dataclasses.replace(
                base.task.environment, train_families=("door",), heldout_families=("lamp",)
            ),
        ),
        evaluation=dataclasses.replace(base.evaluation, runs=12, test_games=2),
    )
    with WorkerPool("fake", num_workers=1) as pool:
        assert train(config, tmp_path, environment=FakeEnvironment(), pool=pool) == 0
        # nothing is left to do
        assert (
            train(config, tmp_path, environment=FakeEnvironment(), pool=pool) == config.iterations
        )
    last = [
        json.loads(line)
        for line in (tmp_path / "prompts" / "iteration_00015.jsonl").read_text().splitlines()
    ]
    assert [prompt["system_prompt"] for prompt in last].count("OPEN") >= 7
    report = evaluate(tmp_path, config, Console(quiet=True))
    door, lamp = report["families"]["door"], report["families"]["lamp"]
    assert (door["split"], lamp["split"]) == ("train", "heldout")
    assert (door["runs"], door["games"]) == (12, 24)
    assert door["arms"]["initial"]["mean"] == 0
    assert door["arms"]["trained"]["mean"] > door["arms"]["untrained"]["mean"]
    assert door["tests"]["trained_vs_untrained"]["difference"] == pytest.approx(
        door["arms"]["trained"]["mean"] - door["arms"]["untrained"]["mean"]
    )
    assert lamp["arms"]["trained"]["mean"] == 0  # it was taught the other word
    assert set(report["overall"]) == {"train", "heldout"}
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    folder = tmp_path / report["folder"]
    check_games(tmp_path, folder)
    parts = {path: path.stat().st_mtime_ns for path in folder.glob("*_*.json")}
    assert len(parts) == 6
    next(iter(parts)).unlink()
    # only the missing part is played again
    assert evaluate(tmp_path, config, Console(quiet=True)) == report
    changed = [path for path, before in parts.items() if path.stat().st_mtime_ns != before]
    assert changed == [next(iter(parts))]


def check_games(run_dir, folder):
    """All arms played the same TEST games in the same order, none of which begins like a game of
    training.
    """
    trained_on = set()
    for path in (run_dir / "episodes").glob("iteration_*.jsonl"):
        trained_on |= {
            trajectory_from_json(line).state_hash for line in path.read_text().splitlines()
        }
    for family in ("door", "lamp"):
        played = {}
        for arm in ("initial", "untrained", "trained"):
            lines = (folder / "episodes" / f"{arm}_{family}.jsonl").read_text().splitlines()
            trajectories = [trajectory_from_json(line) for line in lines]
            played[arm] = [t.game for t in trajectories]
            assert not {t.state_hash for t in trajectories} & trained_on
        assert played["initial"] == played["untrained"] == played["trained"]
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 2 * 12
    assert {row["arm"] for row in rows} == {"initial", "untrained", "trained"}


def test_precollected_contexts_train_too(models, tmp_path):
    actor, reflector = map(str, models)
    base = PRESETS["fake-tiny"]
    meta = dataclasses.replace(
        base.meta, collection="precollected", precollected_loops=2, replay_weight=1.0
    )
    config = dataclasses.replace(base.with_models(actor, reflector), iterations=2, meta=meta)
    with WorkerPool("fake", num_workers=1) as pool:
        train(config, tmp_path, environment=FakeEnvironment(), pool=pool)
    assert len((tmp_path / "contexts" / "precollected.jsonl").read_text().splitlines()) == 4
    assert [record["reward_fresh"] for record in read_metrics(tmp_path)] == [None, None]


def test_a_run_by_dapo_refills_and_its_record_is_of_what_it_learned_from(models, tmp_path):
    """Without the penalty of malformed replies most groups win nothing at all."""
    base = PRESETS["fake-tiny"].with_models(*map(str, models))
    meta = dataclasses.replace(base.meta, malformed_reward=0.0, replay_weight=1.0)
    config = with_algorithm(dataclasses.replace(base, meta=meta, iterations=1), "dapo")
    with LocalPool(FakeEnvironment()) as pool:
        train(config, tmp_path, environment=FakeEnvironment(), pool=pool)
    (record,) = read_metrics(tmp_path)
    assert 0 < record["refill_rounds"] <= config.grpo.refill_rounds
    assert record["refill_thrown_away"] > 0 and record["refill_episodes"] > 0
    assert record["dead_groups"] == 0
    times = record["time"]
    assert times["sampler_kl"] < 1e-6 and abs(times["sampler_ratio_mean"] - 1) < 1e-4
    assert {"sampler_ratio_max", "sampler_corrected", "refill_s"} <= set(times)
    lines = (tmp_path / "prompts" / "iteration_00001.jsonl").read_text().splitlines()
    assert len(lines) == record["candidates"] == 8
    rewards = [json.loads(line)["reward"] for line in lines]
    assert all(len(set(rewards[i : i + 4])) > 1 for i in (0, 4))
    assert "weights_step" not in json.loads(lines[0])


def test_candidates_of_stale_weights_end_the_run(models, tmp_path, monkeypatch):
    """The second set of weights never reaches the sampler, and nobody is told."""
    loaded = []
    load = Sampler.set_params

    def forgetful(sampler, params, step=None):
        loaded.append(step)
        if step != 2:
            load(sampler, jax.tree.map(jnp.copy, params), step)  # the learner donates its own

    monkeypatch.setattr(Sampler, "set_params", forgetful)
    config = PRESETS["fake-tiny"].with_models(*map(str, models))
    with (
        LocalPool(FakeEnvironment()) as pool,
        pytest.raises(
            CannotGoOn,
            match="Candidates of iteration 3 were sampled with weights of step 1, the learner is at"
            " step 2, which was not saved: .* start it again",
        ),
    ):
        train(config, tmp_path, environment=FakeEnvironment(), pool=pool)
    assert loaded == [1, 2]
    assert saved_steps(tmp_path)[-1] == 2  # and the file of the third iteration is not there
    assert len(read_metrics(tmp_path)) == 2
    monkeypatch.undo()
    with LocalPool(FakeEnvironment()) as pool:
        assert train(config, tmp_path, environment=FakeEnvironment(), pool=pool) == 2


def test_a_run_with_an_adapter_resumes_from_the_adapter_alone(models, tmp_path):
    """The base is read from the model's folder again."""
    base = PRESETS["fake-tiny"].with_models(*map(str, models))
    config = dataclasses.replace(
        base, iterations=1, reflector=dataclasses.replace(base.reflector, lora=LoraConfig(rank=2))
    )
    with WorkerPool("fake", num_workers=1) as pool:
        assert train(config, tmp_path, environment=FakeEnvironment(), pool=pool) == 0
        assert (
            train(
                dataclasses.replace(config, iterations=2),
                tmp_path,
                environment=FakeEnvironment(),
                pool=pool,
            )
            == 1
        )
    assert [record["skipped"] for record in read_metrics(tmp_path)] == [0, 0]
    template = init_state(initial_weights(config), make_optimizer(config.optimizer))
    assert set(template.params) == set(adapter_axes(config.reflector.lora))
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        state, _ = checkpointer.restore(2, template)
    assert int(state.step) == 2


def test_a_run_keeps_the_checkpoints_that_it_is_told_to(models, tmp_path):
    base = PRESETS["fake-tiny"].with_models(*map(str, models))
    config = dataclasses.replace(base, iterations=5, keep_last=1, keep_every=2)
    with WorkerPool("fake", num_workers=1) as pool:
        train(config, tmp_path, environment=FakeEnvironment(), pool=pool)
    assert saved_steps(tmp_path) == (2, 4, 5)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 3),
        ({"keep_last": 5}, 6),
        ({"keep_best": 2}, 5),
        ({"keep_every": 3, "iterations": 10}, 6),
        ({"keep_every": 3, "checkpoint_every": 2, "iterations": 13}, 5),
    ],
)
def test_how_many_checkpoints_a_run_holds_at_most(changes, most):
    assert dataclasses.replace(PRESETS["fake-tiny"], **changes).num_kept_checkpoints == most


def test_a_stopped_run_has_saved_its_last_iteration_and_says_how_to_go_on(start, tmp_path):
    run_dir = tmp_path / "stopped"
    for number in (signal.SIGTERM, signal.SIGINT):
        done = len(read_metrics(run_dir))
        process = start(run_dir, "--iterations", "10000", "--checkpoint-every", "1000")
        while len(read_metrics(run_dir)) <= done + 1:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "start it again with the same flags" in errors
        assert "Traceback" not in errors
        iterations = [record["iteration"] for record in read_metrics(run_dir)]
        assert iterations == list(range(1, len(iterations) + 1)) and len(iterations) > done
        assert saved_steps(run_dir)[-1] == len(iterations)
        assert not list(run_dir.rglob("*.tmp"))


def test_a_run_whose_every_game_fails_ends_with_the_reason(models, tmp_path):
    class Failing(FakeEnvironment):
        def open(self, family):
            raise OSError("No bell, no door.")

    config = dataclasses.replace(
        preset("fake-tiny").with_models(*map(str, models)), patience=2, checkpoint_every=1000
    )
    with pytest.raises(CannotGoOn, match=r"2 iterations in a row, up to 2, .*No bell, no door"):
        train(config, tmp_path, environment=FakeEnvironment(), pool=LocalPool(Failing()))
    assert [record["failed_episodes"] > 0 for record in read_metrics(tmp_path)] == [True, True]
    assert saved_steps(tmp_path)[-1] == 2


def test_a_run_that_is_shorter_than_its_patience_does_not_end_as_a_success(models, tmp_path):
    class Failing(FakeEnvironment):
        def open(self, family):
            raise OSError("No bell, no door.")

    config = dataclasses.replace(
        preset("fake-tiny").with_models(*map(str, models)), patience=3, iterations=1
    )
    with pytest.raises(CannotGoOn, match=r"an iteration, up to 1, .*more --iterations"):
        train(config, tmp_path, environment=FakeEnvironment(), pool=LocalPool(Failing()))
    assert saved_steps(tmp_path) == (1,)


def test_a_model_with_one_bad_weight_is_refused(models, tmp_path):
    folder = shutil.copytree(models[1], tmp_path / "reflector")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].flat[-1] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = preset("fake-tiny").with_models(str(models[0]), str(folder))
    with pytest.raises(ValueError, match="holds values that are not finite"):
        initial_weights(config)


@pytest.mark.parametrize(("given", "whole"), [(0, 12), (7, 7)])
def test_a_cosine_without_a_length_is_as_long_as_the_run(given, whole):
    config = preset("fake-tiny")
    config = dataclasses.replace(
        config,
        iterations=4,
        learner=dataclasses.replace(config.learner, epochs=3),
        optimizer=dataclasses.replace(config.optimizer, schedule="cosine", total_steps=given),
    )
    assert config.whole_optimizer.total_steps == whole
    late = dataclasses.replace(config.optimizer, total_steps=0, warmup_steps=12)
    with pytest.raises(ValueError, match="optimizer.warmup_steps = 12: lower"):
        dataclasses.replace(config, optimizer=late)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_configurations_survive_json(name):
    config = PRESETS[name]
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    slower = dataclasses.replace(config.task.rollout, max_steps=3)
    changed = dataclasses.replace(
        config, seed=7, task=dataclasses.replace(config.task, rollout=slower)
    )
    found = differences(to_dict(config), to_dict(changed))
    assert found == [
        ("task.rollout.max_steps", config.task.rollout.max_steps, 3),
        ("seed", config.seed, 7),
    ]


def test_what_configurations_of_older_versions_lack_is_as_it_was():
    config = PRESETS["fake-tiny"]
    older = to_dict(config)
    del older["meta"]["reward"]
    for name in ("refill_rounds", "overlong_penalty", "overlong_buffer"):
        del older["grpo"][name]
    for name in ("correction", "correction_level", "correction_cap"):
        del older["grpo"][name]
    assert from_dict(older) == config


def test_configurations_of_other_versions_are_refused():
    config = to_dict(PRESETS["fake-tiny"])
    with pytest.raises(
        ValueError,
        match="of another version: its field actor holds 'models/tiny' where several fields are",
    ):
        from_dict({**config, "actor": "models/tiny"})
    with pytest.raises(ValueError, match="of another version: its field colour is not known"):
        from_dict({**config, "colour": "red"})
    config["task"]["rollout"]["speed"] = 3
    with pytest.raises(ValueError, match="its field task.rollout.speed is not known"):
        from_dict(config)
    del config["task"]["rollout"]["speed"], config["grpo"]["group_size"]
    with pytest.raises(ValueError, match="its field grpo.group_size is missing"):
        from_dict(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations"),
        ({"keep_last": 0}, "keep_last must be a whole number from 1 .*got 0"),
        ({"keep_every": -1}, "keep_every must be a whole number from 0 .*got -1"),
        ({"batch": dataclasses.replace(PRESETS["fake-tiny"].batch, num_rows=4)}, "batch.num_rows"),
        (
            {"batch": dataclasses.replace(PRESETS["fake-tiny"].batch, token_buckets=(64,))},
            "batch.token_buckets = 64",
        ),
        (
            {"batch": dataclasses.replace(PRESETS["fake-tiny"].batch, response_buckets=(4,))},
            "response_buckets",
        ),
        (
            {
                "reflector_sampler": dataclasses.replace(
                    PRESETS["fake-tiny"].reflector_sampler, max_len=100, attended_buckets=()
                )
            },
            "max_len",
        ),
        (
            {
                "actor_sampler": dataclasses.replace(
                    PRESETS["fake-tiny"].actor_sampler,
                    max_len=4,
                    extend_buckets=(4,),
                    attended_buckets=(),
                )
            },
            "actor",
        ),
    ],
)
def test_limits_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["fake-tiny"], **changes)


@pytest.mark.parametrize(("before", "now"), [(True, "full"), (False, "none")])
def test_a_configuration_of_the_last_version_is_read(before, now):
    assert from_dict({**to_dict(PRESETS["fake-tiny"]), "remat": before}).remat == now


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("iterations", "three"),
        ("iterations", None),
        ("iterations", 2.5),
        ("seed", "x"),
        ("remat", "yes"),
        ("checkpoint_every", True),
        ("task.environment.train_families", "door"),
        ("task.environment.train_families", [1]),
        ("task.environment.options", []),
        ("task.rollout.temperature", "hot"),
        ("actor.model", None),
        ("actor.mesh", None),
        ("batch.token_buckets", 160),
        ("optimizer.learning_rate", [1]),
        ("meta.collection", "sometimes"),
    ],
)
def test_values_of_another_type_are_refused_by_the_name_of_their_field(place, value):
    config = to_dict(PRESETS["fake-tiny"])
    *folders, name = place.split(".")
    record = config
    for folder in folders:
        record = record[folder]
    record[name] = value
    with pytest.raises(ValueError, match=place.replace(".", r"\.")):
        from_dict(config)


def test_readers_beside_a_running_trainer_change_nothing(start, uninterrupted, tmp_path):
    """Evaluations, exports and reports, one after the other until it ends: they see whole
    checkpoints only, and it goes on as if alone.
    """
    run_dir, done = tmp_path / "beside", {"evaluate": 0, "export": 0, "report": 0}
    process = start(run_dir)
    while process.poll() is None:
        if not (run_dir / "checkpoints" / "1").is_dir() and not done["export"]:
            time.sleep(0.01)
            continue
        out = tmp_path / f"out{done['export']}"
        export.main(["--run-dir", str(run_dir), "--out", str(out)])
        done["export"] += 1
        report.main(["--run-dir", str(run_dir)])
        done["report"] += 1
        if done["evaluate"] < 2:
            flags = ("--evaluation.runs", "1", "--evaluation.test-games", "1")
            evaluate_main(["--run-dir", str(run_dir), *flags])
            done["evaluate"] += 1
    finish(process)
    assert all(done.values()), done
    assert timeless(run_dir) == timeless(uninterrupted)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {
        path.name for path in (uninterrupted / "checkpoints").iterdir()
    }


class _Held:
    """Notes how many bytes the devices hold when the rewards of an iteration are there, and the
    last checkpoint is written: what a disk is slow to take counts for nothing.
    """

    def __init__(self):
        self.bytes = []

    def reading(self, finished, total):
        pass

    def phase(self, name, finished, total):
        if name == "rewards" and finished == total:
            until = time.monotonic() + 20
            while (held := self._held()) > min(self.bytes, default=held):
                if time.monotonic() > until:
                    break
                time.sleep(0.05)
            self.bytes.append(held)

    @staticmethod
    def _held():
        arrays = [array for array in jax.live_arrays() if not array.is_deleted()]
        # the parts of an array are arrays themselves, of the same memory
        return sum({array.unsafe_buffer_pointer(): array.nbytes for array in arrays}.values())

    def iteration(self, number, total, metrics):
        pass


def test_neither_later_iterations_nor_a_resumed_run_hold_a_copy_more(models, tmp_path):
    config = preset("fake-tiny").with_models(*map(str, models))
    assert not config.reflector.lora.rank  # all weights are trained
    held = _Held()
    for iterations in (2, 3):
        with LocalPool(FakeEnvironment()) as pool:
            train(
                dataclasses.replace(config, iterations=iterations),
                tmp_path,
                environment=FakeEnvironment(),
                pool=pool,
                progress=held,
            )
    assert len(held.bytes) == 3
    assert max(held.bytes) - min(held.bytes) < 1000, held.bytes


def test_weights_that_a_run_begins_from_are_handed_over(models, tmp_path, monkeypatch):
    """Who copies them lets them go before there are moments: three copies at a time, not four."""
    config = preset("fake-tiny").with_models(*map(str, models))
    held = []

    def copied(params, *others):
        read = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
        state = init_state(params, *others)
        del params
        held.append((len(read), sum(leaf() is not None for leaf in read)))
        return state

    monkeypatch.setattr("ictjax.train.init_state", copied)
    with LocalPool(FakeEnvironment()) as pool:
        train(
            dataclasses.replace(config, iterations=1),
            tmp_path,
            environment=FakeEnvironment(),
            pool=pool,
        )
    ((weights, left),) = held
    assert weights and not left
