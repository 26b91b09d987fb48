"""How a run goes on: what is written, said and found lost."""

import contextlib
import dataclasses
import json

import pytest

from experiments.presets import PRESETS
from experiments.resume import (
    MAY_CHANGE,
    check_changes,
    check_models,
    going_on,
    newest_checkpoint,
    newest_record,
)
from experiments.run_lock import FILE_NAME, RunLock
from ictjax.run_config import from_dict, to_dict
from ictjax.run_files import FOLDERS, gaps

CONFIG = dataclasses.replace(PRESETS["fake-tiny"], iterations=6)


@pytest.fixture
def run(tmp_path):
    """A run of five iterations, whose newest checkpoint holds four."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        for number in range(1, 6):
            (tmp_path / name / f"iteration_{number:05d}.jsonl").write_text("{}\n")
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"iteration": number}) + "\n" for number in range(1, 6))
    )
    for step in (2, 4):
        (tmp_path / "checkpoints" / str(step) / "state").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(to_dict(CONFIG)))
    (tmp_path / "manifest.json").write_text(json.dumps({"preset": "fake-tiny", "finished": "x"}))
    return tmp_path


@pytest.fixture
def lock(run):
    with RunLock(run) as held:
        yield held


def changed(place, value):
    """The configuration with another value in one field."""
    data = to_dict(CONFIG)
    *folders, name = place.split(".")
    record = data
    for folder in folders:
        record = record[folder]
    record[name] = value
    return from_dict(data)


def fields(record, prefix=""):
    """The dotted names of all fields of a configuration, and those of the records in it."""
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield f"{prefix}{name}."
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_what_may_change_is_there():
    assert set(MAY_CHANGE) <= set(fields(to_dict(CONFIG)))
    assert len(set(MAY_CHANGE)) == len(MAY_CHANGE)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("iterations", 100),
        ("task.environment.num_workers", 7),
        ("task.environment.max_live_games", 7),
        ("task.environment.deadline_s", 7.0),
        ("actor.mesh.data", 2),
        ("reflector.mesh.data", 4),
        ("actor.endpoint.concurrency", 99),
        ("evaluation.runs", 1),
        ("actor_sampler.num_slots", 8),
    ],
)
def test_where_and_how_fast_may_change(run, place, value):
    check_changes(run, CONFIG, changed(place, value), (), "go away")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("seed", 4, "--seed was 0, is 4"),
        ("grpo.group_size", 2, "--grpo.group-size was 4, is 2"),
        ("task.initial_prompt", "x" * 99, f'--task.initial-prompt was .*, is "{"x" * 56}...'),
        ("task.environment.options", {"a": "b"}, '--task.environment.options.a was null, is "b"'),
        ("actor.model", "elsewhere", '--actor.model was ".*fake/actor", is "elsewhere"'),
        ("actor.endpoint.url", "http://a/v1", '--actor.endpoint.url was "", is "http://a/v1"'),
        ("actor_sampler.max_top_k", 7, "--actor-sampler.max-top-k was 1, is 7"),
    ],
)
def test_what_changes_the_experiment_is_refused_with_both_values(run, place, value, words):
    with pytest.raises(ValueError, match=rf"another configuration \({words}\): go away"):
        check_changes(run, CONFIG, changed(place, value), (), "go away")


def test_an_endpoint_may_move_but_not_become_another_model(run):
    served = changed("actor.endpoint.url", "http://a/v1")
    endpoint = dataclasses.replace(served.actor.endpoint, url="http://b/v1")
    moved = dataclasses.replace(served, actor=dataclasses.replace(served.actor, endpoint=endpoint))
    check_changes(run, served, moved, ("actor", "reflector"), "go away")
    other = moved.with_models("gpt", moved.reflector.model)
    with pytest.raises(ValueError, match='--actor.model was .*, is "gpt"'):
        check_changes(run, served, other, ("actor", "reflector"), "go away")


def test_a_model_that_only_moved_is_the_same_model(run):
    moved = CONFIG.with_models("there/actor", "there/reflector")
    check_changes(run, CONFIG, moved, ("actor", "reflector"), "go away")
    with pytest.raises(ValueError, match="--reflector.model was"):
        check_changes(run, CONFIG, moved, ("actor",), "go away")
    known = {"actor": "1", "reflector": "2"}
    check_models(run, known, moved, dict(known))
    check_models(run, {}, moved, dict(known))
    with pytest.raises(ValueError, match=r"reflector's model in there/reflector is not the one"):
        check_models(run, known, moved, {"actor": "1", "reflector": "3"})


def test_many_differences_are_counted(run):
    config = dataclasses.replace(
        CONFIG,
        seed=7,
        grpo=dataclasses.replace(
            CONFIG.grpo, group_size=3, std_eps=0.5, clip_low=0.5, clip_high=0.5, temperature=0.5
        ),
    )
    with pytest.raises(ValueError, match=r"; and 2 more\)"):
        check_changes(run, CONFIG, config, (), "go away")


def test_a_run_goes_on_with_its_new_settings_and_keeps_its_history(run, lock):
    config = dataclasses.replace(CONFIG, iterations=9)
    for known in ({"preset": "fake-tiny", "finished": "x"}, None):
        manifest = known or json.loads((run / "manifest.json").read_text())
        with going_on(run, lock, config, CONFIG, manifest, {"actor": "1"}, "plain", {}) as resumed:
            assert resumed.lines(run) == [
                f"Going on with {run} from iteration 4; 1 iteration after it is made again.",
                "Different from now on: --iterations was 6, is 9.",
            ]
        assert json.loads((run / "config.json").read_text()) == to_dict(config)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["preset"] == "fake-tiny" and "finished" not in manifest
    assert manifest["models"] == {"actor": "1"}
    assert len(manifest["resumed"]) == 2
    assert {"date", "argv"} <= set(manifest["resumed"][1])
    assert manifest["resumed"][1]["from_iteration"] == 4
    assert manifest["resumed"][1]["made_again"] == 1
    assert manifest["resumed"][1]["attention"] == "plain"
    assert manifest["resumed"][1]["changes"] == [{"field": "iterations", "before": 6, "now": 9}]


@pytest.mark.parametrize("manifest", [True, False])
def test_a_resume_that_fails_before_anything_is_gained_leaves_all_as_it_was(run, lock, manifest):
    if not manifest:
        (run / "manifest.json").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    config = dataclasses.replace(CONFIG, iterations=9)
    with (
        pytest.raises(ValueError, match="too large"),
        going_on(run, lock, config, CONFIG, {}, {}, "blocks", {}),
    ):
        raise ValueError("too large")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_resume_that_fails_later_keeps_its_settings(run, lock):
    config = dataclasses.replace(CONFIG, iterations=9)
    with contextlib.suppress(ValueError), going_on(run, lock, config, CONFIG, {}, {}, "blocks", {}):
        (run / "checkpoints" / "5" / "state").mkdir(parents=True)
        raise ValueError("disk")
    assert json.loads((run / "config.json").read_text())["iterations"] == 9


def test_a_run_that_was_taken_over_is_left_to_its_new_trainer(run, lock):
    config = dataclasses.replace(CONFIG, iterations=9)
    with contextlib.suppress(ValueError), going_on(run, lock, config, CONFIG, {}, {}, "blocks", {}):
        (run / FILE_NAME).write_text("another trainer")
        raise ValueError("taken over")
    assert json.loads((run / "config.json").read_text())["iterations"] == 9


def cosine(iterations, total_steps=0):
    return dataclasses.replace(
        CONFIG,
        iterations=iterations,
        optimizer=dataclasses.replace(CONFIG.optimizer, schedule="cosine", total_steps=total_steps),
    )


def test_a_cosine_keeps_its_course_when_iterations_are_added(run):
    check_changes(run, cosine(6), cosine(6), (), "go away")
    check_changes(run, cosine(6), cosine(9, 6), (), "go away")
    check_changes(run, cosine(9, 6), cosine(6), (), "go away")
    with pytest.raises(ValueError, match="at its end, update 6; .* --optimizer.total-steps 6, or"):
        check_changes(run, cosine(6), cosine(9), (), "go away")
    with pytest.raises(ValueError, match="--optimizer.total-steps was 0, is 9"):
        check_changes(run, cosine(6), cosine(9, 9), (), "go away")
    with pytest.raises(ValueError, match='--optimizer.schedule was "constant", is "cosine"'):
        check_changes(run, CONFIG, cosine(6), (), "go away")


def test_where_a_run_stands(run, tmp_path_factory):
    assert (newest_checkpoint(run), newest_record(run)) == (4, 5)
    (run / "metrics.jsonl").unlink()
    assert newest_record(run) == 5
    (run / "checkpoints" / "8").write_text("no folder")
    (run / "checkpoints" / "9.removed").mkdir()
    (run / "checkpoints" / "99").mkdir()  # what an interrupted copy leaves
    assert newest_checkpoint(run) == 4
    empty = tmp_path_factory.mktemp("empty")
    assert (newest_checkpoint(empty), newest_record(empty)) == (0, 0)


# What is lost.


def test_a_whole_record_has_no_gaps(run):
    assert gaps(run, 5) == gaps(run, 0) == []


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_files_that_are_missing_empty_or_cut_are_named(run, folder, damage):
    for number in (1, 2, 3, 5):
        path = run / folder / f"iteration_{number:05d}.jsonl"
        if damage == "missing":
            path.unlink()
        else:
            path.write_text("" if damage == "empty" else '{}\n{"a":')
    assert gaps(run, 5) == [f"{folder}/ lacks iterations 1-3, 5"]
    assert gaps(run, 1) == [f"{folder}/ lacks iteration 1"]


def test_an_iteration_without_a_prompt_has_no_episodes_of_rewards(run):
    (run / "episodes" / "iteration_00002.jsonl").write_text("")
    lines = [{"iteration": n, "distinct_prompts": 0 if n == 2 else 3} for n in range(1, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert gaps(run, 5) == []


def test_holes_in_the_metrics_are_named(run, lock):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], *lines[3:]]))
    assert gaps(run, 5) == ["metrics.jsonl lacks iterations 2-3"]
    (run / "metrics.jsonl").unlink()
    with going_on(run, lock, CONFIG, CONFIG, {}, {}, "blocks", {}) as resumed:
        assert resumed.lines(run)[-1].startswith(
            f"The record of {run} is no longer whole: metrics.jsonl lacks iterations 1-4. Training"
        )
    assert json.loads((run / "manifest.json").read_text())["resumed"][0]["lost"] == [
        "metrics.jsonl lacks iterations 1-4"
    ]
