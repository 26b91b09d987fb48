"""Every number of every configuration has a stated range, and is refused outside it by the name of
its flag.
"""

import dataclasses
import json
import math
import typing
from typing import Annotated

import pytest

from experiments import cli, tasks
from experiments.commands import (
    adopt,
    bench,
    evaluate,
    export,
    games,
    generate,
    play,
    pretrain,
    serve,
    sft,
    train,
)
from experiments.model_flags import ModelFlags
from experiments.presets import PRESETS
from ictjax import config, ranges, run_config
from ictjax.ranges import Range, ranged_fields
from tests.test_cli import refused

ABSURD = (
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -1e300,
    0,
    1e-300,
    1e300,
    10**5000,
    "3",
    True,
    None,
    (1, 2),
    [1],
    {},
)
PRESET = PRESETS["fake-tiny"]


def records(kind, value=None):
    """Every record of a configuration, with the classes that others hold."""
    yield kind, value
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from records(hint, None if value is None else getattr(value, name))


RECORDS = {
    kind: value
    for kind, value in (
        *records(run_config.TrainConfig, PRESET),
        *records(config.RoleMeshes),
        *records(config.HostsConfig, config.HostsConfig()),
    )
    if value is not None
}
FIELDS = [(kind, field) for kind in RECORDS for field in ranged_fields(kind)]


def test_all_records_of_the_configuration_are_walked():
    defined = {
        kind
        for module in (config, run_config)
        for kind in vars(module).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        if kind.__module__ == module.__name__
    }
    # these hold nothing but other records
    assert defined - RECORDS.keys() <= {config.RoleMeshes, run_config.RoleConfig}
    for kind in defined - {config.RoleMeshes, run_config.TaskConfig}:
        assert issubclass(kind, ranges.Ranged), kind
    numbers = [field for _, field in FIELDS if field.kind is not None]
    assert len(numbers) > 60


@pytest.mark.parametrize(
    ("kind", "field"), FIELDS, ids=[f"{kind.__name__}.{field.name}" for kind, field in FIELDS]
)
def test_a_number_is_in_its_range_or_refused_by_name(kind, field):
    record, accepted = RECORDS[kind], []
    for value in (*ABSURD, (math.nan,), (0,), (10**30,), ("3",), "word"):
        if field.holds(value):
            accepted.append(value)
            continue
        with pytest.raises(ValueError, match=rf"^{kind.place}{field.name} must be ") as refusal:
            dataclasses.replace(record, **{field.name: value})
        assert len(str(refusal.value)) < 400 and str(refusal.value).endswith(".")
    for value in accepted:
        assert (
            value is None
            or (field.kind is not None and value in field.allowed)  # zero, mostly
            or (field.many and all(item in field.allowed for item in value))
        )
        assert not isinstance(value, bool | str)
    if field.kind is not None:
        assert field.allowed.low >= -1000 or field.name == "seed"
        assert math.isfinite(field.allowed.high)


def test_a_field_without_a_range_cannot_be_checked():
    @dataclasses.dataclass(frozen=True)
    class Bare(ranges.Ranged):
        number: int

    with pytest.raises(TypeError, match="number states no range"):
        Bare(1)

    @dataclasses.dataclass(frozen=True)
    class Stated(ranges.Ranged):
        few: Annotated[tuple[int, ...], Range(1, 3)]
        some: Annotated[float | None, Range(0.5, 2, also=0)] = None

    assert Stated((1, 3), 0).some == 0
    with pytest.raises(ValueError, match=r"few must be whole numbers from 1 to 3, got 1, 4\."):
        Stated((1, 4))
    with pytest.raises(ValueError, match=r"some must be 0, or from 0\.5 to 2, or None, got 0\.1"):
        Stated((), 0.1)


COMMANDS = {
    "generate": (generate, generate.GenerateArgs, ["--model", "x", "--prompt", "y"]),
    "serve": (serve, serve.ServeArgs, ["--model", "x"]),
    "play": (play, play.PlayArgs, ["--env", "fake", "--family", "door"]),
    "export": (export, export.ExportArgs, ["--run-dir", "x", "--out", "y"]),
    "adopt": (adopt, adopt.AdoptArgs, ["--preset", "fake-tiny", "--adapter", "x"]),
    "pretrain": (pretrain, pretrain.PretrainArgs, []),
    "sft": (sft, sft.SftArgs, ["--model", "x", "--data", "y", "--out", "z"]),
    "games generate": (games, games.GenerateGames, ["generate", "--out", "x"]),
    "games check": (games, games.CheckGames, ["check", "--env", "fake"]),
    "bench sampler": (bench, bench.SamplerBench, ["sampler"]),
    "bench update": (bench, bench.UpdateBench, ["update"]),
    "bench envs": (bench, bench.EnvsBench, ["envs"]),
    "bench rollout": (bench, bench.RolloutBench, ["rollout"]),
    "bench cache": (bench, bench.CacheBench, ["cache"]),
    "bench": (bench, bench.AllBenches, ["all"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_of_commands_are_in_their_ranges_or_refused_by_flag(command, capsys):
    module, kind, argv = COMMANDS[command]
    kinds = [kind, *([ModelFlags] if "held" in kind.__dataclass_fields__ else [])]
    numbers = [field for each in kinds for field in ranged_fields(each) if field.kind is not None]
    assert numbers
    for field in numbers:
        flag = f"--{field.name.replace('_', '-')}"
        for text in ("nan", "inf", "-1e300", "1e300", "-1", "9" * 5000):
            sentence = refused(capsys, module.main, [*argv, f"{flag}={text}"], flag)
            assert len(sentence) < 300
        assert math.isfinite(field.allowed.high) and field.allowed.low >= 0


@pytest.mark.parametrize(
    "flag",
    [
        "--meta.malformed-reward=nan",
        "--optimizer.learning-rate=inf",
        "--task.rollout.gather-s=nan",
        "--task.rollout.temperature=1e-300",
        "--task.rollout.min-p=1.1",
        "--task.rollout.stop=",
        "--grpo.temperature=1e-300",
        "--reflector.lora.rank=1000000",
        "--reflector.lora.rank=" + "9" * 5000,
        "--actor-sampler.num-slots=0",
        "--reflector.mesh.data=0",
        "--task.environment.num-workers=0",
        "--task.environment.deadline-s=nan",
        "--task.environment.max-live-games=0",
        "--seed=99999999999999999999999",
        "--iterations=0",
        "--grpo.group-size=1",
        "--batch.num-rows=0",
        "--evaluation.test-games=0",
        "--evaluation.temperature=1e-9",
    ],
)
def test_a_run_refuses_numbers_without_sense_by_flag(flag, capsys, tmp_path):
    name, _, _ = flag.removeprefix("--").partition("=")
    argv = ["--preset", "fake-tiny", "--run-dir", str(tmp_path / "run"), flag]
    sentence = refused(capsys, train.main, argv)
    assert name.replace("-", "_") in sentence.replace("-", "_"), sentence
    assert not (tmp_path / "run").exists()


def test_families_are_listed_once(capsys, tmp_path):
    argv = ["--preset", "fake-tiny", "--run-dir", str(tmp_path / "run")]
    for flag in ("train", "heldout"):
        twice = [f"--task.environment.{flag}-families", "door", "door"]
        refused(capsys, train.main, [*argv, *twice], f"{flag}_families holds door twice")
    with pytest.raises(ValueError, match="both trained on and held out"):
        dataclasses.replace(tasks.FAKE.environment, heldout_families=("door",))
    few = ["--task.environment.num-workers=3", "--task.environment.max-live-games=2"]
    refused(capsys, train.main, [*argv, *few], "max_live_games = 2", "num_workers = 3")


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "https://secret@host", "http://a@b@c"])
def test_a_password_in_a_url_is_refused_and_not_shown(url, capsys, tmp_path):
    argv = ["--preset", "fake-tiny", "--run-dir", str(tmp_path / "run")]
    for main, flags in (
        (train.main, [*argv, "--actor.endpoint.url", url]),
        (play.main, ["--env", "fake", "--family", "door", "--model", url]),
    ):
        sentence = refused(capsys, main, flags, "endpoint.url holds a user name or a password")
        assert "secret" not in sentence and "host" not in sentence
    assert not (tmp_path / "run").exists()


def test_evaluate_refuses_numbers_before_a_run_is_read(capsys):
    refused(capsys, evaluate.main, ["--evaluation.runs", "0"], "evaluation.runs", "1 to")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompt", "x"], ["--prompt is for a model"]),
        (["--temperature", "1", "--max-turn-tokens", "3"], ["--temperature and --max-turn-tokens"]),
        (["--arm", "initial"], ["--arm initial is of a run"]),
        (["--model", "x", "--arm", "initial"], ["--arm initial is of a run"]),
        (["--run-dir", "x", "--arm", "initial", "--prompt", "y"], ["--prompt and --arm initial"]),
        (["--game", "6", "--split", "test"], ["--game and --split test"]),
        (["--options", "text"], ["--options takes pairs"]),
        (["--prompt", "\udcff"], ["is not text in UTF-8", "udcff"]),
        (["--prompt", "-x"], ["--prompt has no value", "--prompt=-x"]),
        (["--max-steps", "many"], ["--max-steps cannot be 'many'"]),
    ],
)
def test_flags_of_play_that_cannot_act_are_refused(more, words, capsys):
    refused(capsys, play.main, ["--env", "fake", "--family", "door", *more], *words)


def test_a_switch_lists_the_words_it_takes(capsys):
    argv = ["--preset", "fake-tiny", "--actor.thinking", "x"]
    assert "None" not in refused(capsys, train.main, argv, "True", "False")
    digits = ["--preset", "fake-tiny", "--seed", "9" * 5000]
    refused(capsys, train.main, digits, "--seed takes a whole number, not one of thousands")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--start", "{}"], ["--start", "holds no model"]),
        (["--start", "{}", "--stage", "measure"], ["--stage measure has none"]),
        (["--stage", "reflector", "--out", "{}"], ["actor", "--stage actor"]),
        (["--stage", "measure", "--out", "{}"], ["actor", "--stage actor"]),
        (["--out", "{}/file"], ["is a file"]),
        (["--out", "{}/file/below"], ["cannot be made"]),
    ],
)
def test_pretraining_says_what_is_missing_before_hours_of_work(more, words, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    argv = [word.replace("{}", str(tmp_path)) for word in more]
    refused(capsys, pretrain.main, argv, *words)


@pytest.mark.parametrize("columns", ["40", "10", "1"])
def test_overviews_fit_narrow_terminals(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    cli.main([])
    with pytest.raises(SystemExit):
        games.main([])
    printed = capsys.readouterr().out
    assert "generate" in printed
    if columns == "40":
        assert max(map(len, printed.splitlines())) <= 40


def test_what_a_configuration_holds_is_shown_in_few_characters(tmp_path, capsys):
    path = tmp_path / "config.json"
    for wrong in ([1] * 9000, {"a": "x" * 9000}, "word", 10**300):
        path.write_text(json.dumps({**run_config.to_dict(PRESET), "meta": wrong}))
        argv = ["--config", str(path), "--run-dir", str(tmp_path / "run")]
        assert len(refused(capsys, train.main, argv, str(path), "meta")) < 400
