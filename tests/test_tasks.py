"""Tasks by name, and the whole loop across benchmarks: trained on generated ALFWorld games,
evaluated there and on fake ones.
"""

import dataclasses
import json
import pathlib

import pytest

from envs.registry import load_environment
from experiments import compare, evaluate, report, train
from experiments.commands.evaluate import evaluation_name
from experiments.presets import PRESET_TASKS, PRESETS, in_folders, model_folder, preset, task
from experiments.run_dir import check_families
from experiments.tasks import POCKET_ALFWORLD, POCKET_MINIHACK, manners, with_options
from ictjax.manners import read_manners
from ictjax.metrics import read_metrics
from ictjax.models.hf import load_checkpoint, save_checkpoint
from ictjax.players import check_language
from ictjax.records import trajectory_from_json


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The flags of a run on ALFWorld with hand-made models, which cannot read it."""
    folder = tmp_path_factory.mktemp("alfworld")
    return ["--preset", "fake-tiny", "--run-dir", str(folder / "run"), "--iterations", "1"]


@pytest.fixture(scope="module")
def trained(start):
    train.main([*start, "--train-env", "alfworld"])
    return pathlib.Path(start[start.index("--run-dir") + 1])


@pytest.fixture(scope="module")
def evaluated(trained):
    evaluate.main(["--run-dir", str(trained), "--evaluation.runs", "2"])
    evaluate.main(["--run-dir", str(trained), "--eval-env", "fake"])
    report.main(["--run-dir", str(trained)])
    return trained


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_manifest_says_which_games_were_played(trained):
    manifest = read(trained / "manifest.json")
    assert manifest["preset"] == "fake-tiny"
    played = manifest["environment"]
    assert (played["name"], played["source"]) == ("alfworld", "generated")
    assert played["options"] == {"data": "generated", "rooms": "small", "text": "compact"}
    assert set(played["counts"]) == {"train", "select", "test"}


def test_training_plays_the_families_of_the_task(trained):
    (record,) = read_metrics(trained)
    assert set(record["reward_family"]) == {"look", "put"}
    assert record["failed_episodes"] == 0
    lines = (trained / "contexts" / "iteration_00001.jsonl").read_text().splitlines()
    shown = [
        turn["observation"]
        for line in lines
        for t in json.loads(line)["trajectories"]
        for turn in t["turns"]
    ]
    assert shown and all("task " in text for text in shown)


def test_evaluations_stand_side_by_side(evaluated):
    own, other = read(evaluated / "evaluation.json"), read(evaluated / "evaluation-fake.json")
    assert {name: family["split"] for name, family in own["families"].items()} == {
        "put": "train",
        "look": "train",
        "cool": "heldout",
    }
    assert {name: family["split"] for name, family in other["families"].items()} == dict.fromkeys(
        ("door", "lamp", "bell"), "transfer"
    )
    assert (own["environment"]["source"], own["environment"]["rooms"]) == ("generated", "small")
    assert other["environment"]["name"] == "fake"
    assert other["overall"]["transfer"]["runs"] == other["protocol"]["runs"]
    assert other["headline"]["text"].startswith("On the families of fake, prompts of this one")
    assert own["environment"]["games_sha256"] != other["environment"]["games_sha256"]
    for name, env in (("evaluation", "alfworld"), ("evaluation-fake", "fake")):
        folder = read(evaluated / f"{name}.json")["folder"]
        episodes, *_ = sorted((evaluated / folder / "episodes").glob("trained_*.jsonl"))
        assert {
            trajectory_from_json(line).game.env for line in episodes.read_text().splitlines()
        } == {env}


def test_the_report_names_the_games_of_every_number(evaluated):
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert "trained on alfworld, generated games, rooms=small, text=compact" in page
    assert "Measured on alfworld, generated games, rooms=small, text=compact." in page
    assert "Results, on fake" in page and "Measured on fake." in page
    columns = compare.compare((evaluated,)).table.columns
    assert list(columns[2].cells) == ["alfworld", "alfworld", "fake"]
    assert list(columns[3].cells) == ["heldout", "train", "transfer"]


def test_an_evaluation_is_named_by_what_differs_from_training():
    own = task("fake-tiny", "alfworld")
    assert evaluation_name(own, own, None, "") == "evaluation"
    assert evaluation_name(own, own, "alfworld", "") == "evaluation"
    assert evaluation_name(own, task("fake-tiny", "fake"), "fake", "") == "evaluation-fake"
    options = "test=valid_seen,data=/my games"
    assert (
        evaluation_name(own, with_options(own, options), None, options)
        == "evaluation-alfworld,data=_my_games,test=valid_seen"
    )


def test_a_run_whose_games_changed_does_not_go_on(trained, start, capsys):
    path = trained / "manifest.json"
    before = path.read_text()
    path.write_text(
        json.dumps({**json.loads(before), "games_sha256": "of a download that came later"})
    )
    try:
        refused(
            capsys,
            train.main,
            [*start, "--train-env", "alfworld"],
            "'alfworld' are no longer those",
            "--run-dir",
        )
    finally:
        path.write_text(before)


def test_an_unknown_task_or_option_is_one_sentence(trained, start, capsys):
    refused(
        capsys,
        train.main,
        [*start, "--train-env", "chess"],
        "'fake-tiny' has no task 'chess'",
        "fake, alfworld",
    )
    refused(
        capsys, evaluate.main, ["--run-dir", str(trained), "--eval-env", "chess"], "no task 'chess'"
    )
    refused(
        capsys,
        evaluate.main,
        ["--run-dir", str(trained), "--eval-options", "rooms"],
        "KEY=VALUE",
        "'rooms'",
    )
    refused(
        capsys,
        evaluate.main,
        ["--run-dir", str(trained), "--eval-options", "rooms=huge"],
        "'huge'",
        "small",
    )
    refused(
        capsys,
        evaluate.main,
        ["--run-dir", str(trained), "--eval-options", "size=9"],
        "does not take the options",
        "size",
    )


def refused(capsys, main, argv, *words):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    errors = capsys.readouterr().err
    assert ended.value.code == 2, errors
    (sentence,) = [line for line in errors.splitlines() if line.startswith("ictjax: ")]
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_tasks_of_a_preset_fit_its_models_and_their_environments(name):
    for task_name, setting in PRESET_TASKS[name].items():
        config = preset(name).on(task(name, task_name))  # its limits are checked
        assert config.task == setting
        options = {
            **setting.environment.options,
            **({"data": "generated"} if setting.environment.name == "alfworld" else {}),
        }
        environment = load_environment(setting.environment.name, options)
        check_families(
            environment,
            (*setting.environment.train_families, *setting.environment.heldout_families),
        )


def test_options_are_added_to_those_of_the_task():
    base = task("pocket-alfworld", "alfworld")
    changed = with_options(base, "data=official,rooms=full")
    assert changed.environment.options == {"text": "compact", "data": "official", "rooms": "full"}
    assert dataclasses.replace(changed, environment=base.environment) == base
    assert with_options(base, "") == base


@pytest.mark.parametrize(
    ("folder", "taught"),
    [
        (PRESETS["pocket-minihack"], (POCKET_MINIHACK,)),
        (PRESETS["pocket-alfworld"], (POCKET_MINIHACK, POCKET_ALFWORLD)),
    ],
)
def test_shipped_models_and_their_exports_say_how_they_are_spoken_to(folder, taught, tmp_path):
    for role in (folder.actor, folder.reflector):
        source = model_folder(role.model)
        assert read_manners(source) == manners(*taught)
        save_checkpoint(
            tmp_path / source.replace("/", "_"), *load_checkpoint(source), source=source
        )
        assert read_manners(tmp_path / source.replace("/", "_")) == manners(*taught)


@pytest.mark.parametrize(
    ("preset", "task", "complaint"),
    [
        ("pocket-minihack", "alfworld", "knows minihack only, not alfworld"),
        ("pocket-alfworld", "alfworld", ""),
        ("pocket-alfworld", "minihack", ""),
    ],
)
def test_a_task_that_the_models_have_no_words_for_is_refused(preset, task, complaint):
    config = in_folders(PRESETS[preset].on(PRESET_TASKS[preset][task]))
    if not complaint:
        check_language(config)
        return
    with pytest.raises(ValueError, match=complaint):
        check_language(config)


def test_another_style_of_text_and_a_prompt_of_unknown_words_are_refused():
    config = in_folders(PRESETS["pocket-minihack"])
    environment = dataclasses.replace(config.task.environment, options={"text": "full"})
    full = dataclasses.replace(config.task, environment=environment)
    with pytest.raises(ValueError, match="reads compact text only: .* text=compact"):
        check_language(config.on(full))
    foreign = dataclasses.replace(config.task, initial_prompt="Traverse the labyrinth swiftly")
    with pytest.raises(ValueError, match="has no words for 75% of the prompt 'Traverse"):
        check_language(config.on(foreign))


@pytest.mark.parametrize("benchmark", ["alfworld", "minihack"])
@pytest.mark.parametrize("k", [3, 5])
def test_presets_of_the_paper_are_its_setting(benchmark, k):
    """What is known of arXiv 2605.20477, see docs/reproduction.md."""
    config = PRESETS[f"paper-{benchmark}-k{k}"]
    assert config.actor.model == config.reflector.model == "Qwen/Qwen2.5-7B-Instruct"
    assert config.reflector.lora.rank == 0
    assert config.task == PRESET_TASKS[f"paper-{benchmark}-k{k}"][benchmark]
    rollout = config.task.rollout
    assert (rollout.max_steps, rollout.max_turn_tokens, rollout.temperature) == (25, 500, 0.0)
    assert config.actor_sampler.max_len == 32_768
    meta = config.meta
    assert (meta.games_per_context, meta.fresh_games, meta.replay_weight) == (k, 0, 1.0)
    assert (meta.collection, meta.precollected_loops, meta.meta_turns) == ("precollected", 128, 4)
    # every context once
    assert config.iterations * meta.contexts_per_iteration == 128 * 4
    assert (config.grpo.group_size, config.grpo.kl_coefficient) == (8, 0.001)
    assert config.optimizer.learning_rate == 3e-6
    assert config.reflection.max_reply_tokens == 2048
    evaluation = config.evaluation
    assert (evaluation.protocol, evaluation.runs, evaluation.meta_turns) == ("paper", 10, 10)
    assert evaluation.games_per_context in (0, k)


def test_families_that_are_evaluated_belong_to_the_task():
    """Every preset as shipped, and on every other task that suits its models."""
    for name, config in PRESETS.items():
        for other in (config.task, *PRESET_TASKS[name].values()):
            there = (*other.environment.train_families, *other.environment.heldout_families)
            assert set(config.on(other).evaluation.families) <= set(there), name
    paper = PRESETS["qwen2.5-7b-minihack"]
    assert "room" not in paper.evaluation.families  # of which there are 12 games
    assert paper.on(PRESETS["qwen2.5-7b-alfworld"].task).evaluation.families == ()
    assert paper.on(paper.task) == paper
