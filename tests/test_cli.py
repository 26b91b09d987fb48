"""The command lines: every command is found, helps at once and reads each flag in one way; bad
input is one sentence on stderr and exit code 2, and nothing is overwritten or left behind.
"""

import collections
import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import random
import re
import shlex
import subprocess
import sys
import tomllib

import jax
import pytest

import experiments.__main__
import experiments.train
from envs.api import CannotGoOn
from experiments import cli, evaluate, limits, places, plan_run, run_dir, train
from experiments.command import run_main, unknown
from experiments.commands import games, parity, play
from experiments.commands import train as train_command
from experiments.fake_pair import FOLDER, save_pair
from experiments.presets import PRESETS
from experiments.shapes import PUBLISHED, model_shape
from ictjax.algorithms import ALGORITHMS
from ictjax.run_config import RoleConfig, to_dict
from tests.evaluations import evaluation

ROOT = pathlib.Path(__file__).parents[1]
WORDS = [
    *((name,) for name in cli.COMMANDS),
    *(("games", word) for word in ("list", "pack", "generate", "check")),
    *(("bench", word) for word in ("sampler", "update", "envs", "rollout", "cache", "all")),
]
HEAVY = ("jax", "flax", "transformers", "torch")


def flags(folder, *more):
    return ["--preset", "fake-tiny", "--run-dir", str(folder), *more]


def refused(capsys, main, argv, *words):
    """Asserts that the program ends with exit code 2 and one sentence that holds all words and
    names no class; gives the sentence.
    """
    with pytest.raises(SystemExit) as ended:
        main(argv)
    errors = capsys.readouterr().err
    assert ended.value.code == 2, errors
    sentence = [line for line in errors.splitlines() if line.startswith("ictjax: ")]
    assert len(sentence) == 1, errors
    for word in words:
        assert word in sentence[0], sentence[0]
    assert "Traceback" not in errors and "{" not in sentence[0]
    assert not re.search(r"\b[A-Za-z]+(Args|Config|Games|Bench|Benches)\b", sentence[0]), sentence[
        0
    ]
    return sentence[0]


def tree(folder):
    """Every file below a folder with its bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def program(*argv, **settings):
    """Runs `python -m experiments ...` beside this process."""
    environ = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environ |= {"PYTHONPATH": str(ROOT)} | settings.pop("environ", {})
    command = [sys.executable, *argv]
    return subprocess.run(
        command, cwd=ROOT, env=environ, text=True, timeout=120, check=False, **settings
    )


# Commands.


def test_the_script_is_the_module():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert scripts["scripts"] == {"ictjax": "experiments.__main__:main"}
    entry = importlib.metadata.EntryPoint("ictjax", scripts["scripts"]["ictjax"], "console_scripts")
    assert entry.load() is experiments.__main__.main
    for name in ("experiments", "experiments.games"):
        argv = ["games", "list", "--env", "fake"][name != "experiments" :]
        shown = program("-m", name, *argv, capture_output=True)
        assert shown.returncode == 0 and "door" in shown.stdout and not shown.stderr


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(capsys, argv):
    cli.main(argv)
    lines = capsys.readouterr().out.splitlines()
    for name, about in cli.COMMANDS.items():
        assert sum(line.split() == [name, *about.split()] for line in lines) == 1
    assert max(map(len, lines)) <= 80


def test_an_unknown_command_names_the_nearest(capsys):
    refused(capsys, cli.main, ["trian"], "'trian'", "did you mean 'train'?", "evaluate")
    refused(capsys, cli.main, ["--train"], "'--train'")
    refused(capsys, cli.main, ["games", "lst"], "'lst'", "did you mean 'list'?", "pack")
    refused(capsys, cli.main, ["bench", "samplr"], "'samplr'", "did you mean 'sampler'?")


def test_every_command_is_found_by_its_name(monkeypatch):
    for name in cli.COMMANDS:
        module = importlib.import_module(f"experiments.commands.{name}")
        given = []
        monkeypatch.setattr(module, "main", given.append)
        cli.main([name, "--flag", "value"])
        assert given == [["--flag", "value"]]


_LIGHT = f"""\
import sys
from experiments.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code or 0
else:
    code = 0
heavy = [name for name in {HEAVY} if name in sys.modules]
sys.exit(f"loaded {{heavy}}" if heavy else code)
"""


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_help_is_what_people_type_and_loads_nothing_heavy(words):
    shown = program("-c", _LIGHT, *words, "--help", capture_output=True, environ={"COLUMNS": "80"})
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"usage: ictjax {' '.join(words)} ")
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "None}" not in shown.stdout or words in (("train",), ("plan",), ("adopt",))
    for line, following in itertools.pairwise(shown.stdout.splitlines()):
        if continued := re.match(
            r"(?:│ {4,})?([^\W_(]\S*)", following
        ):  # not broken before its end
            text = line.rstrip("│ ")
            whole = len(f"{text} {continued[1]}{' │' * line.startswith('│')}") > 80
            assert whole or not text or not re.match(r"│ {4,}\S|\w", text), (line, following)


@pytest.mark.parametrize("command", [train, evaluate])
def test_every_flag_of_a_run_has_words_of_its_own(capsys, monkeypatch, command):
    """A comment also lands on the fields below it that have none."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    names, about, groups = [], {}, {}
    for line in capsys.readouterr().out.splitlines():
        if group := re.match("╭─ (.*?) options ─", line):
            names.append(f"--{group[1]}")
            groups[names[-1]] = ""
        elif flag := re.match("│ (--[^ ,]*)", line):
            names.append(flag[1])
            about[flag[1]] = ""
        elif names and names[-1] not in about and names[-1] in groups and line.startswith("│ "):
            groups[names[-1]] += line.strip("│ ─") + " "
        elif names and line.startswith("│    "):
            about[names[-1]] += line.strip("│ ") + " "
    words = {flag: text.partition("(default:")[0].strip() for flag, text in about.items()}
    options = "--task.environment.options"  # have names that no comment knows
    assert all(about for name, about in words.items() if not name.startswith(options))
    texts = {**words, **{group: text.strip() for group, text in groups.items()}}
    records = collections.defaultdict(list)  # what stands beside each other, flags and groups
    for name, text in texts.items():
        records[name.rpartition(".")[0]].append(text)
    for place, beside in records.items():
        if place:  # of the whole command the two roles have groups of the same kind
            assert len(set(beside)) == len(beside), (place, beside)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_values_of_every_preset_fit_a_terminal(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help", "--preset", name])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = re.sub(r"[\s│]+", " ", "\n".join(lines))
    assert f"(default: {PRESETS[name].actor.model})" in text
    assert f"--iterations INT updates (default: {PRESETS[name].iterations})" in text


@pytest.mark.parametrize(
    "argv",
    [
        ("train", "--preset", "gpt-9"),
        ("train", "--preset", "fake-tiny", "--train-env", "chess"),
        ("train", "--preset", "fake-tiny", "--mesh", "v9"),
        ("train", "--preset", "fake-tiny", "--sead", "3"),
        ("train", "--preset", "fake-tiny", "--grpo.group-size", "1"),
        ("train", "--preset", "fake-tiny", "--actor.model", "./nowhere"),
        ("train", "--preset", "fake-tiny", "--task.environment.train-families", "castle"),
        ("train", "--preset", "fake-tiny", "--run-dir", "tests"),
        ("train", "--config", "pyproject.toml"),
        ("evaluate", "--run-dir", "tests"),
        ("report", "--run-dir", "tests"),
        ("compare", "tests"),
        ("export", "--run-dir"),
        ("play", "--env", "fake", "--family", "castle"),
        ("play", "--env", "fake", "--family", "door", "--model", "./nowhere"),
        ("games", "list", "--env", "chess"),
        ("generate", "--model", "x", "--prompt", "x", "--top-p", "0"),
        ("generate", "--model", "./nowhere", "--prompt", "x"),
        ("bench", "envs", "--minihack", "castle"),
        ("pretrain", "--stage", "everything"),
    ],
    ids=" ".join,
)
def test_bad_input_is_refused_before_anything_heavy_is_loaded(argv):
    said = program("-c", _LIGHT, *argv, capture_output=True)
    assert said.returncode == 2, said.stderr
    assert said.stderr.startswith("ictjax: ") and said.stderr.count("\n") == 1
    assert said.stdout == ""


def test_lists_and_tables_load_nothing_heavy(tmp_path):
    config = to_dict(PRESETS["fake-tiny"])
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    compared = tmp_path / "compared"
    compared.mkdir()
    (compared / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (compared / "evaluation.json").write_text(
        json.dumps(evaluation({"a": "train"})), encoding="utf-8"
    )
    for argv, word in (
        (("games", "list", "--env", "fake"), "door"),
        (("report", "--run-dir", str(tmp_path)), "report.html"),
        (("compare", str(compared)), "compared"),
    ):
        shown = program("-c", _LIGHT, *argv, capture_output=True)
        assert (shown.returncode, shown.stderr) == (0, ""), argv
        assert word in shown.stdout


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("train", "--help"),
        ("games", "--help"),
        ("games", "list", "--env", "fake"),
        ("play", "--env", "fake", "--family", "door", "--policy", "random"),
    ],
    ids=" ".join,
)
def test_a_closed_pipe_ends_a_command_quietly(argv):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = program("-m", "experiments", *argv, stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize(
    ("closed", "argv", "code"),
    [
        (">&-", ("train", "--help"), 0),
        (">&-", ("games", "list", "--env", "fake"), 0),
        ("<&-", ("play", "--env", "fake", "--family", "door"), 0),
        ("2>&-", ("train", "--preset", "nope"), 2),
        ("<&- >&- 2>&-", ("train", "--preset", "nope"), 2),
        ("2>/dev/full", ("train", "--preset", "nope"), 2),
    ],
)
def test_a_closed_or_full_stream_changes_no_exit_code(closed, argv, code):
    command = shlex.join([sys.executable, "-m", "experiments", *argv])
    ended = subprocess.run(
        ["sh", "-c", f"{command} {closed}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (code, "")


def test_devices_that_are_not_there_are_one_sentence():
    source = "import jax; from experiments.command import run_main; run_main(jax.devices, '')"
    ended = program("-c", source, capture_output=True, environ={"JAX_PLATFORMS": "nope"})
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("ictjax: JAX cannot use the devices") and "backend 'nope'" in line
    assert "set JAX_PLATFORMS to" in line


def test_transformers_does_not_advise_to_install_pytorch():
    script = (
        "import ictjax, os; before = dict(os.environ); import logging, transformers;"
        " logging.getLogger('transformers').warning('something else');"
        " assert dict(os.environ) == before"
    )
    without = {
        "TRANSFORMERS_VERBOSITY": "",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "",
        "USE_TORCH": "0",
    }
    said = program("-c", script, capture_output=True, environ=without)
    assert said.returncode == 0, said.stderr
    assert "something else" in said.stderr and "PyTorch" not in said.stderr


def test_parity_without_pytorch_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    pins = "constraints-py312.txt" if sys.version_info >= (3, 12) else "constraints.txt"
    refused(capsys, parity.main, [], "PyTorch is not installed", f"-c {pins}", "[parity]")
    assert "torch==" in (ROOT / pins).read_text(encoding="utf-8")


# Flags.


def test_unknown_preset(capsys):
    refused(capsys, train.main, ["--preset", "gpt-9"], "'gpt-9'", "pocket-minihack")
    refused(capsys, train.main, ["--preset=pocket-minihak"], "did you mean 'pocket-minihack'?")
    refused(capsys, train.main, [], "--preset is missing", "pocket-minihack")


@pytest.mark.parametrize("flag", ["--train-env", "--train_env"])
@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_a_flag_that_decides_defaults_is_read_in_every_form(flag, form):
    argv = ["--preset", "fake-tiny", *form.format(flag, "alfworld").split()]
    args, preset = train_command.read_args(argv)
    assert preset == "fake-tiny"
    assert args.settings.task.environment.name == args.train_env == "alfworld"
    for name in ("nonsense", "alfwrld"):
        argv[2:] = form.format(flag, name).split()
        with pytest.raises(ValueError, match=f"no task '{name}'.*use one of fake, alfworld"):
            train_command.read_args(argv)
    assert "did you mean" in str(unknown("x", "alfwrld", ["fake", "alfworld"]))


def test_an_algorithm_sets_the_estimator_and_explicit_flags_win():
    argv = ["--grpo.clip-high", "0.4", "--algorithm", "dapo", "--preset", "fake-tiny"]
    found = train_command.read_args(argv)[0].settings
    preset = PRESETS["fake-tiny"]
    assert found.grpo == dataclasses.replace(
        ALGORITHMS["dapo"], group_size=preset.grpo.group_size, clip_high=0.4
    )
    assert dataclasses.replace(found, grpo=preset.grpo) == preset
    # Dr. GRPO divides by the run's limit of a reply, also where a flag sets that
    argv[2:] = ["--algorithm=dr-grpo", "--preset=fake-tiny"]
    assert train_command.read_args(argv)[0].settings.grpo.constant_length == 8
    argv += ["--reflection.max-reply-tokens", "6"]
    assert train_command.read_args(argv)[0].settings.grpo.constant_length == 6
    argv += ["--grpo.constant-length", "7"]
    assert train_command.read_args(argv)[0].settings.grpo.constant_length == 7


def test_an_algorithm_that_is_none_and_a_limit_that_is_none_are_named(capsys):
    argv = ["--preset", "fake-tiny", "--algorithm"]
    refused(capsys, train.main, [*argv, "gpso"], "Unknown algorithm 'gpso'", "'gspo'", "dapo")
    argv += ["dr-grpo", "--reflection.max-reply-tokens", "-1"]
    refused(capsys, train.main, argv, "reflection.max_reply_tokens must be")


def test_flags_come_in_any_order():
    parts = [
        ["--preset", "qwen2.5-7b-minihack"],
        ["--train_env=alfworld"],
        ["--mesh", "v5e-8"],
        ["--train-options", "data=generated,rooms=small"],
        ["--seed=3"],
        ["--task.environment.train-families", "put", "look"],
        ["--actor.mesh.data", "4"],
        ["--check"],
    ]
    wanted, _ = train_command.read_args([*itertools.chain(*parts)])
    config = wanted.settings
    assert config.task.environment.options["rooms"] == "small"
    assert config.task.environment.train_families == ("put", "look")
    assert (config.seed, config.reflector.mesh.tensor, config.actor.mesh.data) == (3, 4, 4)
    rng = random.Random(0)
    for _ in range(5):
        rng.shuffle(parts)
        assert train_command.read_args([*itertools.chain(*parts)]) == (
            wanted,
            "qwen2.5-7b-minihack",
        )


def test_of_a_flag_given_twice_the_last_one_counts():
    argv = ["--preset", "pocket-minihack", "--train-env", "minihack", "--seed", "1"]
    args, preset = train_command.read_args(
        [*argv, "--preset", "fake-tiny", "--train-env=alfworld", "--seed=2"]
    )
    assert (preset, args.train_env, args.settings.seed) == ("fake-tiny", "alfworld", 2)
    assert args.settings.actor == PRESETS["fake-tiny"].actor


def test_a_flag_in_the_place_of_a_value_is_no_value(capsys):
    refused(capsys, train.main, ["--preset"], "--preset has no value")
    argv = ["--preset", "fake-tiny", "--task.initial-prompt", "--mesh", "v5e-8"]
    refused(capsys, train.main, argv, "--task.initial-prompt has no value")


def test_options_belong_to_the_environment_that_they_were_written_for():
    argv = ["--preset", "pocket-minihack", "--task.environment.name=fake"]
    assert train_command.read_args(argv)[0].settings.task.environment.options == {}


def test_unknown_flag(capsys, tmp_path):
    refused(
        capsys,
        train.main,
        flags(tmp_path / "run", "--sead", "3"),
        "--sead",
        "did you mean --seed?",
        "`ictjax train --help`",
    )
    refused(capsys, train.main, flags(tmp_path / "run", "stray"), "'stray'")
    refused(capsys, evaluate.main, ["--run-dir", str(tmp_path)], "no config.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--meta.replay-weight", "3"), ("meta.replay_weight", "3")),
        (("--seed", "x"), ("--seed takes a whole number, not 'x'",)),
        (("--optimizer.learning-rate", "x"), ("--optimizer.learning-rate takes a number",)),
        (("--reflector.dtype", "bfloat"), ("did you mean 'bfloat16'?", "float32")),
        (("--reflector.lora.rank", "-1"), ("reflector.lora.rank must be", "got -1")),
        (("--actor-sampler.num-slots", "0"), ("actor_sampler.num_slots must be", "got 0")),
        (("--reflector.mesh.tensor", "0"), ("reflector.mesh.tensor must be", "got 0")),
        (("--batch.num-rows", "7"), ("batch.num_rows", "got 7 x 1")),
        (("--mesh", "v5e-9"), ("'v5e-9'", "did you mean 'v5e-8'?", "h200")),
        (("--train-options", "rooms"), ("KEY=VALUE", "'rooms'")),
        (("--task.environment.train-families", "castle"), ("'castle'", "bell, door, lamp")),
        (("--task.environment.name", "chess"), ("'chess'", "minihack")),
        (("--actor.model", "/no/where"), ("/no/where", "--actor.model")),
        (("--reflector.model", "no/such-model"), ("no/such-model", "hub")),
    ],
)
def test_values_that_do_not_fit(capsys, tmp_path, more, words):
    refused(capsys, train.main, flags(tmp_path / "run", *more), *words)
    assert not list(tmp_path.iterdir())


def test_a_long_list_is_named_by_the_command_that_shows_it(capsys):
    for main, argv in (
        (train.main, ["--preset", "pocket-minihack", "--task.environment.train-families", "eet"]),
        (play.main, ["--family", "eet"]),
        (games.main, ["list", "--families", "eet"]),
        (cli.main, ["bench", "envs", "--minihack", "eet"]),
    ):
        said = refused(capsys, main, argv, "'eet'", "eat", "`ictjax games list --env minihack`")
        assert len(said) < 200
    assert len(refused(capsys, play.main, [], "--family is missing", "ictjax games list")) < 200


def test_commands_play_the_same_environment_unless_told(capsys):
    games.main(["list", "--families", "eat"])
    assert capsys.readouterr().out.startswith("minihack")
    refused(capsys, play.main, ["--family", "castle"], "of minihack")


def test_a_path_is_never_broken_in_a_message(capsys, tmp_path):
    long = f"/a/{'very-long-name/' * 8}end"
    refused(capsys, train.main, flags(tmp_path, "--seed", long), f"not '{long}'")


# Configurations of other runs.


def saved_config(folder, **changes):
    folder.mkdir()
    config = dataclasses.replace(PRESETS["fake-tiny"], iterations=7)
    (folder / "config.json").write_text(json.dumps({**to_dict(config), **changes}))
    return config, folder / "config.json"


def test_the_configuration_of_a_run_can_be_given_back(tmp_path, capsys):
    config, path = saved_config(tmp_path / "a")
    args, preset = train_command.read_args(["--config", str(path), "--seed", "3"])
    assert preset is None and args.settings == dataclasses.replace(config, seed=3)
    refused(capsys, train.main, ["--config", str(path)], "--run-dir is missing")
    argv = ["--config", str(path), "--train-env", "alfworld"]
    refused(capsys, train.main, argv, "--train-env", "which preset")
    (tmp_path / "a" / "manifest.json").write_text('{"preset": "fake-tiny"}')
    args, preset = train_command.read_args(argv)
    assert preset == "fake-tiny" and args.settings.task.environment.name == "alfworld"
    refused(capsys, train.main, [*argv, "--preset", "fake-tiny"], "exclude each other")
    refused(capsys, train.main, ["--config", str(tmp_path)], "is no file")


@pytest.mark.parametrize(
    ("platform", "dtype", "actor", "reflector"),
    [
        ("cpu", "float32", "pages, kernels for this CPU", "slots, kernels for this CPU"),
        (
            "cpu",
            "bfloat16",
            "pages, XLA alone: the model computes bfloat16",
            "slots, kernels for this CPU",
        ),
        ("tpu", "bfloat16", "pallas_tpu", "slots"),
    ],
)
def test_the_manifest_says_how_samplers_attend(
    tmp_path, monkeypatch, platform, dtype, actor, reflector
):
    monkeypatch.setattr(experiments.train, "train", lambda *_, **__: None)
    monkeypatch.setattr(limits, "platform_of", lambda mesh: platform)
    train.main(flags(tmp_path, "--actor-sampler.page-size", "128", "--actor.dtype", dtype))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["sampling_attention"] == {"actor": actor, "reflector": reflector}


def test_the_manifest_names_the_preset_that_the_other_run_was_of(tmp_path, monkeypatch):
    _, path = saved_config(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text('{"preset": "fake-tiny"}')
    monkeypatch.setattr(experiments.train, "train", lambda *_, **__: None)
    train.main(["--config", str(path), "--seed", "3", "--run-dir", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["preset"] == "fake-tiny"
    assert json.loads((tmp_path / "b" / "config.json").read_text())["seed"] == 3


def test_a_configuration_of_another_version_names_the_field(tmp_path, capsys):
    _, path = saved_config(tmp_path / "a", shape=None)
    for main, argv in (
        (train.main, ["--config", str(path), "--run-dir", str(tmp_path / "b")]),
        (evaluate.main, ["--run-dir", str(path.parent)]),
    ):
        refused(capsys, main, argv, "of another version", "field shape")
    assert not (tmp_path / "b").exists()


# Run directories.


def test_a_run_directory_of_another_configuration_is_left_alone(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"seed": 5}))
    monkeypatch.delenv("MAKELEVEL", raising=False)
    said = refused(capsys, train.main, flags(folder), "another configuration", "--run-dir")
    assert "RUN=" not in said
    monkeypatch.setenv("MAKELEVEL", "1")
    refused(capsys, train.main, flags(folder), "another configuration", "--run-dir", "RUN=name")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert json.loads((folder / "config.json").read_text()) == {"seed": 5}


def test_a_folder_that_holds_something_else_is_left_alone(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    refused(capsys, train.main, flags(tmp_path), "no run directory", "--run-dir")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_little_disk(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "_MIN_FREE_BYTES", 2**60)
    refused(capsys, train.main, flags(tmp_path / "run"), "MiB of disk", "--run-dir")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def reads_no_weights(monkeypatch):
    """Whoever starts to read weights fails."""
    monkeypatch.setattr(experiments.train, "train", None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ("--actor-sampler.max-len", "65536", "--actor-sampler.attended-buckets", "160"),
            ("actor_sampler.max_len = 65536", "32768 positions", "--actor-sampler.max-len"),
        ),
        (
            ("--reflector-sampler.max-len", "65536"),
            ("reflector_sampler.max_len = 65536", "--reflector-sampler.max-len"),
        ),
        (
            ("--actor.mesh.data", "3"),
            ("actor_sampler.num_slots = 4", "actor.mesh.data = 3"),
        ),
        (
            (
                *("--actor-sampler.page-size", "16", "--actor-sampler.num-pages", "12"),
                *("--actor.mesh.data", "2", "--reflector.mesh.data", "2"),
            ),
            ("actor_sampler.num_pages = 12 on 2 copies", "a multiple of 2, at least 20"),
        ),
        (
            ("--actor.mesh.data", "2", "--reflector.mesh.data", "2"),
            ("does not use all 8 devices",),
        ),
    ],
)
@pytest.mark.usefixtures("reads_no_weights")
def test_limits_that_do_not_fit_are_said_before_weights_are_read(capsys, tmp_path, more, words):
    refused(capsys, train.main, flags(tmp_path / "new" / "run", *more), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("reads_no_weights")
def test_a_tokenizer_of_another_model_is_said_before_weights_are_read(capsys, tmp_path):
    actor, _ = save_pair(tmp_path)
    config = json.loads((actor / "config.json").read_text())
    (actor / "config.json").write_text(json.dumps(config | {"vocab_size": 9}))
    argv = flags(tmp_path / "run", "--actor.model", str(actor))
    refused(capsys, train.main, argv, "has embeddings of 9 ids")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("role", ["actor", "reflector"])
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", '{"rms_norm_eps": NaN}', "sets rms_norm_eps to nan"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        (
            "tokenizer_config.json",
            '{"auto_map": ["a.B", null], "tokenizer_class": "B"}',
            "is a program",
        ),
        ("generation_config.json", '{"eos_token_id": "<end>"}', "sets eos_token_id to '<end>'"),
        ("chat_template.jinja", "{{ 'a' * 10 ** 10 }}", "128 MB of memory"),
        ("model.safetensors", None, "has neither model.safetensors nor"),
        ("model.safetensors", "", "model.safetensors cannot be read"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b"}}', "has weights twice"),
    ],
)
@pytest.mark.usefixtures("reads_no_weights")
def test_a_folder_that_is_no_model_is_said_with_its_role(capsys, tmp_path, role, name, text, words):
    folder = save_pair(tmp_path)[role == "reflector"]
    path = folder / name
    if text is None:
        path.unlink()
    elif name in ("config.json", "tokenizer_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(text)))
    else:
        path.write_text(text)
    argv = flags(tmp_path / "run", f"--{role}.model", str(folder))
    refused(capsys, train.main, argv, f"{role}.model: ", str(folder), words)
    assert not (tmp_path / "run").exists()


def failing(monkeypatch, *made):
    """Training that raises after it has made some files of its run directory."""

    def train_(_config, folder, **_):
        for name in ("checkpoints/half", "tensorboard/events", "metrics.jsonl", *made):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("")
        raise ValueError("it does not fit")

    monkeypatch.setattr(experiments.train, "train", train_)


def test_a_start_that_fails_leaves_nothing_behind(capsys, tmp_path, monkeypatch):
    failing(monkeypatch)
    refused(capsys, train.main, flags(tmp_path / "new" / "run"), "it does not fit")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    refused(capsys, train.main, flags(tmp_path / "mine"), "it does not fit")
    assert (tmp_path / "mine").is_dir() and not list((tmp_path / "mine").iterdir())


def test_what_was_played_is_kept_when_a_start_fails(capsys, tmp_path, monkeypatch):
    failing(monkeypatch, "contexts/precollected.jsonl")
    refused(capsys, train.main, flags(tmp_path / "run"), "it does not fit")
    assert {"config.json", "manifest.json", "contexts"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


def test_a_start_that_fails_leaves_an_old_run_as_it_was(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.train, "train", lambda *_, **__: None)
    train.main(flags(tmp_path / "run"))
    before = tree(tmp_path)
    assert before

    def train_(*_, **__):
        raise ValueError("it does not fit")

    monkeypatch.setattr(experiments.train, "train", train_)
    refused(capsys, train.main, flags(tmp_path / "run"), "it does not fit")
    assert tree(tmp_path) == before


def test_evaluate_without_checkpoint(capsys, tmp_path):
    refused(capsys, evaluate.main, [], "--run-dir is missing")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(PRESETS["fake-tiny"])))
    refused(capsys, evaluate.main, ["--run-dir", str(tmp_path)], "no checkpoint", "train first")


# Models.


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B", 4_022_468_096),
    ],
)
def test_published_models_have_as_many_weights_as_published(name, count):
    assert PUBLISHED[name].num_params == count
    assert model_shape(RoleConfig(model=name)) == PUBLISHED[name]


def test_every_preset_is_of_a_model_that_ships_or_is_published():
    for config in PRESETS.values():
        for role in (config.actor, config.reflector):
            assert model_shape(role).num_params > 0


def planned(argv, monkeypatch, capsys):
    """What --check prints of a run that a device of 16 GiB has no room for."""
    here = places.Place(name="here", devices=jax.devices()[:1], device_bytes=2**34)
    monkeypatch.setattr(plan_run, "place_of", lambda machine, **_: here)
    with pytest.raises(SystemExit) as ended:
        train.main(argv)
    assert ended.value.code == 1
    return capsys.readouterr().out


def test_the_7b_preset_is_planned_on_shapes_alone(capsys, monkeypatch):
    text = planned(["--preset", "qwen2.5-7b-minihack", "--check"], monkeypatch, capsys)
    assert "7,615,616,512" in text
    assert "It does not fit: weights, optimizer and caches alone take 134.5 GiB" in text


def test_another_reflector_is_counted_by_its_own_shape(capsys, monkeypatch):
    argv = ["--preset", "qwen2.5-7b-minihack", "--check", "--reflector.model", "Qwen/Qwen3-4B"]
    text = planned(argv, monkeypatch, capsys)
    rows = [line.split("│") for line in text.splitlines() if "│" in line]
    counts = {row[1].strip(): row[2].strip() for row in rows}
    assert counts["actor"] == "7,615,616,512"
    assert counts["reference"] == counts["trained weights"] == "4,022,468,096"


def test_a_model_on_disk_is_read_whatever_it_is_called(tmp_path, monkeypatch):
    actor, _ = save_pair(tmp_path)
    (tmp_path / "Qwen").mkdir()
    actor.rename(tmp_path / "Qwen" / "Qwen3-4B")
    monkeypatch.chdir(tmp_path)
    assert model_shape(RoleConfig(model="Qwen/Qwen3-4B")).num_params < 10_000


def test_a_model_that_nobody_knows_is_never_counted_as_another(capsys):
    argv = ["--preset", "qwen2.5-7b-minihack", "--check", "--actor.model", "Qwen/Qwen9-4B"]
    refused(capsys, train.main, argv, "Qwen/Qwen9-4B", "give a checkpoint folder")


def test_the_pair_that_ships_is_the_one_that_is_made(tmp_path):
    save_pair(tmp_path)
    shipped = {path.relative_to(FOLDER): data for path, data in tree(FOLDER).items()}
    assert shipped == {path.relative_to(tmp_path): data for path, data in tree(tmp_path).items()}
    assert sum(map(len, shipped.values())) < 40_000


def test_what_is_misspelt_is_named_before_what_is_missing(capsys):
    refused(capsys, train.main, ["--presset", "fake-tiny"], "'--presset'", "--preset?")
    refused(capsys, evaluate.main, ["--run-dri", "a"], "'--run-dri'", "--run-dir?")
    refused(capsys, train.main, ["--preset", ""], "Unknown preset ''")


def test_a_name_that_no_file_can_have_is_one_sentence(capsys):
    refused(capsys, train.main, ["--preset", "fake-tiny", "--run-dir", "x" * 300], "too long")
    refused(capsys, evaluate.main, ["--run-dir", "x" * 300], "xxx")


@pytest.mark.parametrize("said", ["it is no file", "it is no file."])
@pytest.mark.parametrize("kind", [ValueError, CannotGoOn])
def test_whatever_is_said_is_a_sentence(capsys, kind, said):
    def body():
        raise kind(said)

    with pytest.raises(SystemExit):
        run_main(body, "")
    assert capsys.readouterr().err == "ictjax: it is no file.\n"


@pytest.mark.parametrize("command", ["watch", "results", "compare", "bundle"])
@pytest.mark.parametrize("words", [("--run-dir", "gone"), ("--run-dir=gone",), ("gone",)], ids=str)
def test_a_run_may_stand_behind_its_flag_or_by_itself(
    command, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"experiments.commands.{command}").main
    assert "gone" in refused(capsys, main, list(words))
