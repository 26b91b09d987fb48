"""Readers of damaged files: each returns something, or refuses with one sentence that names the
file; none hangs, and none takes more memory than is stated here.

A long run by hand: `ICTJAX_FUZZ=100 pytest tests/test_fuzz.py -n 0` tries 100 times as many files.
Files whose readers are tested in the same manner elsewhere:

| file | test |
|---|---|
| lines of JSON, any text in them | `test_json_lines.py` |
| config.json of a model, header and index of safetensors | `test_hf.py` |
| adapter_config.json | `test_peft.py` |
| packed ALFWorld games, folders and names in a tree | `test_alfworld_data.py` |
| frames between pool and worker | `test_wire.py` |
| replies of models | `test_actions.py`, `test_reflector.py` |
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import time
import tracemalloc
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs.alfworld import generate
from envs.alfworld import tree as trees
from envs.alfworld.differential import _read as read_differences
from envs.alfworld.tables import FAMILIES
from envs.fake import FakeEnvironment
from envs.minihack import index as minihack
from experiments import games, report, report_data, report_page
from experiments.arms.arm import written
from experiments.bundle import write_bundle
from experiments.commands.train import read_args
from experiments.compare import compare
from experiments.evaluation_folder import EvaluationFolder
from experiments.evaluation_games import hashes_of_training
from experiments.manifest import make_manifest
from experiments.packed_folder import unpacked
from experiments.play import read_prompt
from experiments.presets import PRESETS
from experiments.pretraining import entry, taught_games, write_record
from experiments.protocol import LoopRecord, Read, Scored
from experiments.result_formats import TEXTS
from experiments.resume import check_models, going_on
from experiments.run_dir import check_run, read_manifest, read_run, run_prompt
from experiments.run_lock import FILE_NAME as LOCK
from experiments.run_lock import RunLock, check_free
from experiments.summary import summarise
from ictjax import endpoint_speaker, keys, loops
from ictjax.call_speaker import CallFailed
from ictjax.chat import ChatTokenizer
from ictjax.checkpoint import Checkpointer, CheckpointReader
from ictjax.config import EndpointConfig, LoraConfig
from ictjax.endpoint_speaker import EndpointSpeaker
from ictjax.manners import Manners, manners_for, write_manners
from ictjax.metrics import MetricsWriter
from ictjax.models.config import ModelConfig
from ictjax.models.hf import content, content_hash
from ictjax.models.hf.reader import check_checkpoint
from ictjax.models.lora import init_adapter
from ictjax.models.peft import load_adapter, save_adapter
from ictjax.precollection import precollected
from ictjax.records import to_json
from ictjax.run_config import to_dict
from ictjax.run_files import drop_after, write_iteration, write_lines
from tests.evaluations import FOLDER
from tests.test_evaluate import family_games, part_record
from tests.test_json_lines import candidate, context, episode
from tests.test_report import make_run

TIMES = int(os.environ.get("ICTJAX_FUZZ", "1"))
MAX_BYTES, MAX_CPU_S, MAX_CHARS = 64 * 2**20, 10.0, 1200
CONFIG = PRESETS["fake-tiny"]

# What stands in a JSON file instead of what was there.
VALUES = (
    *("null", "true", "false", "[]", "{}", "[null]", "[[]]", "[{}]", '{"a":null}', '{"a":[1]}'),
    *("0", "1", "-1", "2", "0.5", "-0.5", "NaN", "Infinity", "-Infinity", "1e999", "1e308"),
    *("9" * 25, "-" + "9" * 25, "9" * 400, "9" * 5000, "1" + "0" * 4000),
    *('""', '"x"', '"1"', '"../../x"', '"/etc"', '"a\\nb"', '"\\u0000"', '"\\ud800"', '"\\u2028"'),
    *("[" * depth + "]" * depth for depth in (50, 300, 900, 50_000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (300, 900, 50_000)),
    json.dumps("x" * 100_000),
    json.dumps(["x"] * 10_000),
)
FILES = (
    b"",
    b"\n",
    b"\n\n\n",
    b"\0" * 4096,
    b"\xff" * 64,
    bytes(range(256)),
    b"\x1f\x8b\x08\x00" + bytes(range(64)),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"<!doctype html><html></html>",
    b"[" * 100_000,
    *(value.encode() for value in VALUES),
)


# Damages of bytes.


def cut(draw, data):
    return data[: draw(st.integers(0, max(len(data) - 1, 0)))]


def flipped(draw, data):
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        if changed:
            changed[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


def zeroed(draw, data):
    start = draw(st.integers(0, len(data)))
    length = min(draw(st.sampled_from((1, 16, 512, 4096))), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def another_line(draw, data):
    """One line twice, or not at all, or two that change places."""
    lines = data.splitlines(keepends=True)
    if lines:
        at, to = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        line = lines.pop(at)
        lines[to:to] = draw(st.sampled_from(([], [line], [line, line])))
    return b"".join(lines)


def another_file(draw, data):
    encoded = data.decode(errors="replace")
    return draw(
        st.sampled_from(
            (*FILES, b"\xef\xbb\xbf" + data, encoded.encode("utf-16", "replace"), data + data)
        )
    )


# Damages of JSON.


def documents(data):
    """The JSON in a file: one, or one a line; none where it is none."""
    if b"\0" in data:
        return []
    with contextlib.suppress(ValueError, RecursionError):
        return [json.loads(data)]
    lines = data.split(b"\n")
    return [line for line in lines if line.startswith(b"{")] if b"{" in data else []


def another_value(draw, data):
    return edited(draw, data, "\ufdd0")


def another_key(draw, data):
    return edited(draw, data, None)


def edited(draw, data, mark):
    """One place of one document with another value; or, without a mark, with its key lost or under
    another name.
    """
    found = documents(data)
    if not found:
        return flipped(draw, data)
    number = draw(st.integers(0, len(found) - 1))
    document = found[number]
    if isinstance(document, bytes):
        try:
            document = json.loads(document)
        except (ValueError, RecursionError):
            return flipped(draw, data)
    else:
        document = json.loads(data)
    holder, key = place(draw, document)
    if holder is None:
        return flipped(draw, data)
    if mark is not None:
        holder[key] = mark
    else:
        value = holder.pop(key)
        if isinstance(holder, dict) and draw(st.booleans()):
            holder[
                draw(st.sampled_from((f"{key}_", "", "a.b", "a\nb", "x" * 5000, "__class__")))
            ] = value
    try:
        text = json.dumps(document, ensure_ascii=False)
    except RecursionError:
        return data
    if mark is not None:
        text = text.replace(json.dumps(mark, ensure_ascii=False), draw(st.sampled_from(VALUES)))
    edited_document = text.encode("utf-8", "replace")
    if not isinstance(found[number], bytes):
        return edited_document
    return data.replace(found[number], edited_document, 1)


def place(draw, document):
    """Somewhere in a document: what holds it, and under which key. What is nearer to the top is
    likelier.
    """
    holder, key, node = None, None, document
    while isinstance(node, dict | list) and node and (holder is None or draw(st.booleans())):
        holder = node
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        node = holder[key]
    return holder, key


PLAIN = (cut, flipped, zeroed, another_line, another_file)
OF_JSON = (*PLAIN, *(another_value, another_key) * 5)


@st.composite
def damages(draw, whole):
    data, ways = whole, OF_JSON if documents(whole) else PLAIN
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        data = draw(st.sampled_from(ways))(draw, data)
    return data


# Whole files, and who reads them.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A file that is damaged.

    make: writes the folder that it is in, whole.
    file: its name there, as a pattern; of several one is drawn each time.
    read: everybody who reads it.
    examples: how many are tried.
    """

    make: Callable[[pathlib.Path], object]
    file: str
    read: Callable[[pathlib.Path], object]
    examples: int = 25


def run_folder(folder):
    """A run as training leaves it after two iterations."""
    about = make_manifest(
        "fake-tiny", CONFIG, FakeEnvironment(), ["cpu"], {"actor": "1"}, "blocks", {}
    )
    manifest = {**about, "resumed": [{"from_iteration": 1}], "finished": "now"}
    write_lines(folder / "config.json", [json.dumps(to_dict(CONFIG), indent=1)])
    write_lines(folder / "manifest.json", [json.dumps(manifest, indent=1)])
    for number in (1, 2):
        write_iteration(folder, number, [context("x")], [[candidate("x")] * 2], [episode("x")])
    with MetricsWriter(folder) as writer:
        for number in (1, 2):
            writer.write(number, {"reward": 0.5, "distinct_prompts": 1, "episodes": 2}, {"a_s": 1})
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / "checkpoints" / "2" / "x").touch()


def without_checkpoints(folder):
    """The same, killed before its first checkpoint."""
    run_folder(folder)
    shutil.rmtree(folder / "checkpoints" / "2")
    (folder / "checkpoints" / "x").touch()
    drop_after(folder, 1)
    with MetricsWriter(folder, last_iteration=1):
        pass
    manifest = {**read_manifest(folder), "resumed": [{"from_iteration": 0}]}
    del manifest["finished"]
    write_lines(folder / "manifest.json", [json.dumps(manifest)])


def go_on(folder):
    check_run(folder, CONFIG, FakeEnvironment())
    with RunLock(folder) as lock:
        manifest = read_manifest(folder)
        check_models(folder, manifest.get("models", {}), CONFIG, {"actor": "1"})
        before = read_run(folder)
        with going_on(
            folder, lock, CONFIG, before, manifest, {"actor": "1"}, "blocks", {}
        ) as resumed:
            resumed.lines(folder)
        with MetricsWriter(folder, last_iteration=resumed.first):
            pass


def config_flag(folder):
    args, name = read_args(["--config", str(folder / "config.json")])
    assert name is None or isinstance(name, str)
    assert to_dict(args.settings)


def prompts_of(folder):
    assert isinstance(run_prompt(folder, "door", "trained"), str)


def scored_prompts_of(folder):
    assert isinstance(run_prompt(folder, "eat", "trained"), str)


def reported(folder):
    run = report_data.load_run(folder)
    report.tables(run)
    page = report_page.render(run)
    assert page.count("<script") == (2 if "episodes-data" in page.partition("<script>")[0] else 1)


def compared(folder):
    compare((folder,))


def exported(folder):
    evaluations = report_data.load_run(folder).evaluations
    for text in TEXTS.values():
        text(evaluations).encode()


def bundled(folder):
    write_bundle(folder, "run", (), folder / "out.tar.gz")


def packed_run(folder):
    """A bundle, of as few files as there can be."""
    (folder / "run").mkdir()
    write_lines(folder / "run" / "config.json", [json.dumps(to_dict(CONFIG))])
    write_bundle(folder / "run", "run", (3,), folder / "run.tar.gz")
    shutil.rmtree(folder / "run")


def unpacked_run(folder):
    with unpacked(folder / "run.tar.gz") as found:
        assert not {path.name for path in found.iterdir()} - {"config.json", "bundle.json"}


def evaluated_run(folder):
    make_run(folder, iterations=3)
    write_lines(folder / "config.json", [json.dumps(to_dict(CONFIG))])
    for path in (folder / FOLDER / "episodes").glob("*.jsonl"):
        if not path.stem.endswith("_eat"):
            path.unlink()
    path = folder / "evaluation.json"
    results = json.loads(path.read_text()) | {
        "changes": ["the actor's model (its files differ)"],
        "environment": {"name": "fake", "options": {"a": "b"}, "source": "official"},
    }
    write_lines(path, [json.dumps(results)])


SETTINGS = {"step": 1}


def loops_of(prompt):
    """Loops that have ended, one after another."""
    scored = {prompt: Scored([episode("x")], [1])}
    return [
        LoopRecord(
            prompts=[prompt] * 2, scored=scored, turns=[Read(context("x"), written(None), [], [])]
        )
    ] * 2


def evaluation_folder(folder):
    kept = EvaluationFolder(folder, "evaluation", SETTINGS)
    games = family_games()
    kept.keep_games({"door": games})
    for arm in ("initial", "untrained", "trained"):
        kept.keep_part(arm, "door", games, part_record(), loops_of("x"))
    place_ = folder / "evaluation"
    (only,) = place_.iterdir()
    only.rename(place_ / "kept")


def parts_of(folder):
    kept = EvaluationFolder(folder, "evaluation", SETTINGS)
    (folder / "evaluation" / "kept").rename(folder / kept.name)
    games = kept.games(("door",), 2).get("door", family_games())
    arms = ("initial", "untrained", "trained")
    parts = {(arm, "door"): [kept.part(arm, "door", games)] for arm in arms}
    if all(part is not None for (part,) in parts.values()):
        summarise(parts, {"door": "train"})


def starts_of(folder):
    kept = EvaluationFolder(folder, "evaluation", SETTINGS)
    (folder / "evaluation" / "kept").rename(folder / kept.name)
    kept.starts("door", family_games())


def taught_folder(folder):
    write_record(folder, {"fake": entry({}, ["door"], "train", 2)})


def taught(folder):
    config = CONFIG.with_models(str(folder / "actor"), str(folder / "reflector"))
    taught_games(config, FakeEnvironment(), "door")


@functools.cache
def arena():
    meta = dataclasses.replace(
        CONFIG.meta, collection="precollected", precollected_loops=2, meta_turns=1
    )
    return loops.Arena(
        actor=None, reflector=None, pool=None, task=CONFIG.task, games={}, key=keys.root_key(0),
        meta=meta,
    )  # fmt: skip


def contexts_folder(folder):
    write_lines(folder / "contexts" / "precollected.jsonl", [to_json(context("x"))] * 2)


def collected(folder):
    for found in precollected(arena(), folder, resumed=True):
        assert all(trajectory.game.family for trajectory in found.trajectories)
        to_json(found)


def locked_folder(folder):
    """The lock of somebody whose process is gone."""
    with RunLock(folder):
        holder = json.loads((folder / LOCK).read_text())
    write_lines(folder / LOCK, [json.dumps({**holder, "pid": 2**22 - 1})])


def unlock(folder):
    check_free(folder)
    with RunLock(folder):
        pass


STATE = {"w": jnp.arange(6.0).reshape(2, 3), "count": jnp.int32(3)}


@functools.cache
def checkpoint_files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def checkpoints(folder):
    with Checkpointer(folder / "checkpoints") as checkpointer:
        loop = loops.Loop(0, "door", 0, 1, "x")
        meta = loops.state_to_json(loops.LoopState((loop,), 1, {"door": 0}))
        checkpointer.save(3, STATE, {"iteration": 3, "meta": meta})


def restored(folder):
    with CheckpointReader(folder / "checkpoints") as reader:
        state, host = reader.restore(None, STATE)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), state, STATE))
        assert host["iteration"] == 3
        loops.state_from_json(host["meta"])


def manners_folder(folder):
    manners = Manners(
        options={"text": "compact"}, initial_prompt="Play.", max_steps=1, max_turn_tokens=1
    )
    write_manners(folder, {"fake": manners})


def model_folder(folder):
    shutil.copytree(PRESETS_FAKE / "actor", folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "a": 1}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "added_tokens.json").write_text("{}")


PRESETS_FAKE = pathlib.Path(games.__file__).parent / "pocket" / "checkpoints" / "fake"


def spoken_to(folder):
    talk = ChatTokenizer(folder)
    talk.unused(100)
    talk.unknown("play")
    assert talk.decode([0, 1])


def checked(folder):
    check_checkpoint(folder)


MODEL = ModelConfig(
    vocab_size=8, num_layers=1, d_model=4, d_ff=4, num_heads=1, num_kv_heads=1, head_dim=4
)
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "v"))


def adapter_folder(folder):
    adapter = init_adapter(MODEL, LORA, jax.random.key(0))
    save_adapter(folder, MODEL, LORA, adapter, base="x")


def with_content(folder):
    assert len(content_hash(folder)) == 64


def minihack_cache(folder):
    splits = {"train": [1, 2], "select": [3], "test": [4]}
    write_lines(folder / "ictjax" / "index.json", [json.dumps(splits)])


def minihack_index(folder):
    found = minihack._read(folder / "ictjax" / "index.json")
    assert found is None or all(type(seed) is int for seeds in found.values() for seed in seeds)


def alfworld_tree(folder):
    """One game, and the index of it that is kept from run to run."""
    draft = generate.draw(1, generate.ROOMS["small"])
    task = FAMILIES[draft.family]
    trial = folder / trees.FOLDER / "train" / f"{task}-X-None-Y-1" / "trial_1"
    write_lines(trial / "game.tw-pddl", [json.dumps(generate.content(draft, "x"))])
    write_lines(trial / "traj_data.json", [json.dumps(generate.trajectory(draft))])
    kept = indexed(folder)
    assert kept.count("train") == 1
    (cache,) = (folder.parent / "cache" / "ictjax").iterdir()
    cache.rename(folder / "index.json")


def indexed(folder):
    trees._cached_index.cache_clear()
    return trees.Tree(folder).index()


def tree_of(folder):
    found = indexed(folder)
    assert found.count("train") + sum(found.left_out.values()) + len(found.damaged) <= 1
    for families in found.games.values():
        for family in families.values():
            for key in family:
                trees.Tree(folder).load(key)


def cached_tree(folder):
    cache = trees._cache_path(str((folder / trees.FOLDER).absolute()))
    cache.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "index.json", cache)
    # of the same files
    assert indexed(folder).count("train") == 1


def differences_file(folder):
    episode_ = {"steps": 3, "won": True, "difference": None}
    game = {"expert": episode_}
    data = {"settings": {"policies": ["expert"]}, "games": {"alfworld|put|x": game}}
    write_lines(folder / "out.json", [json.dumps(data)])


def differences_of(folder):
    assert isinstance(read_differences(folder / "out.json", {"policies": ["expert"]}), dict)


def prompt_file(folder):
    (folder / "prompt.txt").write_text("Play. Naïve 東京\n", encoding="utf-8")


def prompt_of(folder):
    read_prompt(str(folder / "prompt.txt"), "").encode()


def event_folder(folder):
    with MetricsWriter(folder) as writer:
        writer.write(1, {"reward": 0.5})
        writer.write(2, {"reward": 0.5})
    (path,) = (folder / "tensorboard").iterdir()
    path.rename(path.with_name("events.out.tfevents.1.x"))


def events_of(folder):
    with MetricsWriter(folder, last_iteration=1):
        pass


BODY = {
    "choices": [{"message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    "data": [{"id": "only"}],
    "error": {"message": "no"},
}


def body_file(folder):
    (folder / "body").write_text(json.dumps(BODY))


@functools.cache
def speaker():
    return EndpointSpeaker(EndpointConfig(url="http://localhost:1/v1"), "x")


def answered(folder):
    body = (folder / "body").read_bytes()
    assert isinstance(endpoint_speaker._message(body), str)
    with contextlib.suppress(CallFailed):
        answer = speaker()._answer_in(body)
        assert isinstance(answer.text, str)
    speaker()._body = lambda request: body
    try:
        assert isinstance(speaker()._only_model(), str)
    except ValueError as error:
        raise ValueError(f"body: {error}") from error


CASES = {
    "config of a run that goes on": Case(make=run_folder, file="config.json", read=go_on),
    "config by --config": Case(make=run_folder, file="config.json", read=config_flag, examples=15),
    "config in a comparison": Case(make=evaluated_run, file="config.json", read=compared),
    "manifest of a run that goes on": Case(make=run_folder, file="manifest.json", read=go_on),
    "manifest without checkpoints": Case(
        make=without_checkpoints, file="manifest.json", read=go_on
    ),
    "manifest by --config": Case(
        make=run_folder, file="manifest.json", read=config_flag, examples=5
    ),
    "metrics of a run that goes on": Case(make=run_folder, file="metrics.jsonl", read=go_on),
    "metrics in an evaluation": Case(
        make=run_folder, file="metrics.jsonl", read=lambda folder: hashes_of_training(folder, 2)
    ),
    "episodes in an evaluation": Case(
        make=run_folder,
        file="episodes/iteration_00001.jsonl",
        read=lambda folder: hashes_of_training(folder, 2),
    ),
    "contexts in an evaluation": Case(
        make=run_folder,
        file="contexts/iteration_00001.jsonl",
        read=lambda folder: hashes_of_training(folder, 2),
    ),
    "prompts of training": Case(
        make=run_folder, file="prompts/iteration_00002.jsonl", read=prompts_of
    ),
    "prompts of an evaluation": Case(
        make=evaluated_run, file=f"{FOLDER}/prompts.jsonl", read=scored_prompts_of
    ),
    "results and their prompts": Case(
        make=evaluated_run, file="evaluation.json", read=scored_prompts_of
    ),
    "precollected contexts": Case(
        make=contexts_folder, file="contexts/precollected.jsonl", read=collected
    ),
    "lock": Case(make=locked_folder, file=LOCK, read=unlock),
    "files in a report": Case(
        make=evaluated_run,
        file="**/*.json*",
        read=reported,
        examples=2,
    ),
    "files in a table": Case(
        make=evaluated_run,
        file="**/*.json*",
        read=lambda folder: report.tables(report_data.load_run(folder)),
    ),
    "results for other programs": Case(make=evaluated_run, file="evaluation.json", read=exported),
    "files in a bundle": Case(make=evaluated_run, file="**/*.json*", read=bundled, examples=10),
    "packed bundle": Case(make=packed_run, file="run.tar.gz", read=unpacked_run),
    "results in a comparison": Case(make=evaluated_run, file="evaluation.json", read=compared),
    "games of an evaluation": Case(
        make=evaluation_folder, file="evaluation/kept/games.json", read=parts_of
    ),
    "part of an evaluation": Case(
        make=evaluation_folder, file="evaluation/kept/trained_door.json", read=parts_of
    ),
    "what all arms begin with": Case(
        make=evaluation_folder, file="evaluation/kept/episodes/initial_door.jsonl", read=starts_of
    ),
    "what models were taught with": Case(make=taught_folder, file="pretraining.json", read=taught),
    "events": Case(make=event_folder, file="tensorboard/events.out.tfevents.1.x", read=events_of),
    "manners": Case(
        make=manners_folder, file="ictjax.json", read=lambda folder: manners_for(folder, "fake")
    ),
    "tokenizer": Case(make=model_folder, file="tokenizer.json", read=spoken_to),
    "config of a tokenizer": Case(
        make=model_folder, file="tokenizer_config.json", read=spoken_to, examples=15
    ),
    "config of a generation": Case(
        make=model_folder, file="generation_config.json", read=spoken_to, examples=15
    ),
    "special tokens": Case(
        make=model_folder, file="special_tokens_map.json", read=spoken_to, examples=5
    ),
    "added tokens": Case(make=model_folder, file="added_tokens.json", read=spoken_to, examples=5),
    "chat template": Case(
        make=model_folder, file="chat_template.jinja", read=spoken_to, examples=15
    ),
    "config beside a tokenizer": Case(
        make=model_folder, file="config.json", read=spoken_to, examples=15
    ),
    "tokenizer of a model": Case(
        make=model_folder, file="tokenizer.json", read=checked, examples=15
    ),
    "tokenizer config of a model": Case(
        make=model_folder, file="tokenizer_config.json", read=checked, examples=15
    ),
    "config of a model": Case(make=model_folder, file="config.json", read=checked, examples=15),
    "header of weights": Case(
        make=model_folder, file="model.safetensors", read=checked, examples=15
    ),
    "weights of an adapter": Case(
        make=adapter_folder,
        file="adapter_model.safetensors",
        read=lambda folder: load_adapter(folder, MODEL),
    ),
    "config of an adapter": Case(
        make=adapter_folder,
        file="adapter_config.json",
        read=lambda folder: load_adapter(folder, MODEL),
    ),
    "weights whose content counts": Case(
        make=model_folder, file="model.safetensors", read=with_content
    ),
    "splits of MiniHack": Case(make=minihack_cache, file="ictjax/index.json", read=minihack_index),
    "index of ALFWorld": Case(make=alfworld_tree, file="index.json", read=cached_tree),
    "game of ALFWorld": Case(make=alfworld_tree, file="**/game.tw-pddl", read=tree_of),
    "trajectory of ALFWorld": Case(make=alfworld_tree, file="**/traj_data.json", read=tree_of),
    "checkpoint": Case(make=checkpoints, file="checkpoints/**/*", read=restored, examples=15),
    "host in a checkpoint": Case(
        make=checkpoints, file="checkpoints/3/host/*", read=restored, examples=10
    ),
    "prompt": Case(make=prompt_file, file="prompt.txt", read=prompt_of),
    "games compared": Case(make=differences_file, file="out.json", read=differences_of),
    "answer of an endpoint": Case(make=body_file, file="body", read=answered),
}


@pytest.fixture(autouse=True)
def _nothing_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    # a process per template takes a second
    monkeypatch.setattr("ictjax.template._tried", lambda question: "")
    monkeypatch.setattr(content, "_WHOLE", 512)
    monkeypatch.setattr(content, "_BLOCK", 32)


def try_it(folder, path, read):
    """Reads a folder that holds a damaged file, within bounds. Returns what was said where it was
    refused; empty where it was read.
    """
    said = ""
    tracemalloc.start()
    begun_s = time.process_time()
    try:
        read(folder)
    except ValueError as error:
        assert_refusal(error, folder, path)
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - begun_s < MAX_CPU_S
    assert peak < MAX_BYTES
    return said


def assert_refusal(error, folder, path):
    text = str(error)
    assert not isinstance(error, UnicodeError | json.JSONDecodeError), text
    assert "\n" not in text, text
    assert path.name in text or str(folder) in text, text
    assert len(text) < MAX_CHARS, text


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_back(folder, files):
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path not in files:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for path, data in files.items():
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_file_is_read_or_refused(name, tmp_path):
    case, folder = CASES[name], tmp_path / "folder"
    folder.mkdir()
    case.make(folder)
    files = snapshot(folder)
    damaged = sorted(path for path in folder.glob(case.file) if path.is_file())
    case.read(folder)  # whole, it is read

    @settings(
        max_examples=case.examples * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def damage(data):
        path = data.draw(st.sampled_from(damaged))
        put_back(folder, files)
        path.write_bytes(data.draw(damages(files[path])))
        try_it(folder, path, case.read)

    damage()


def changed(*place_, value):
    """One value of a JSON document is another."""

    def edit(data):
        document = json.loads(data)
        *above, last = place_
        functools.reduce(lambda node, key: node[key], above, document)[last] = value
        return json.dumps(document).encode()

    return edit


def both(*edits):
    return lambda data: functools.reduce(lambda changed_, edit: edit(changed_), edits, data)


def appended(line):
    return lambda data: line + b"\n" + data


NESTED = b"[" * 100_000


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("config of a run that goes on", changed("a\nb", value=1)),
        ("manifest without checkpoints", changed("resumed", value=[1])),
        ("manifest without checkpoints", changed("resumed", value=["x"])),
        ("manifest by --config", changed("preset", value=["fake-tiny"])),
        ("prompts of training", appended(b"{}")),
        ("prompts of training", appended(b'{"family":"door","system_prompt":"x","reward":"1"}')),
        ("prompts of training", appended(b'{"family":"door","system_prompt":1,"reward":1}')),
        ("prompts of an evaluation", appended(b'{"arm":"trained","family":"eat"}')),
        ("precollected contexts", lambda data: data.replace(b'"family"', b'"families"')),
        ("precollected contexts", lambda data: data.replace(b'"reply":"x"', b'"reply":1')),
        ("precollected contexts", lambda data: data.replace(b"success", b"won")),
        ("precollected contexts", lambda data: b"{}\n{}\n"),
        ("lock", both(changed("machine", value="other"), changed("host", value=["x"] * 999))),
        ("lock", both(changed("machine", value="other"), changed("since", value="a\nb"))),
        (
            "part of an evaluation",
            both(changed("test", value=[[[0], [1]]]), changed("prompts", value=["{}", "{}"])),
        ),
        ("part of an evaluation", changed("prompts", value=["{}\n{}", "{}", "{}", "{}"])),
        ("part of an evaluation", changed("games", "test", value=[[["ab"]], [["ab"]]])),
        ("part of an evaluation", changed("test", value=[[[0], [1]], [[0], [1, 1]]])),
        ("what all arms begin with", lambda data: data.replace(b'"family"', b'"families"')),
        ("manners", changed("environments", "fake", "x" * 5000, value=1)),
        ("manners", lambda data: data.replace(b'"fake"', rb'"a\nb"')),
        ("config of an adapter", changed("lora_alpha", value=10**400)),
        ("config of an adapter", changed("lora_alpha", value=1e308)),
        ("config of an adapter", changed("use_rslora", value=["x"] * 999)),
        ("config of an adapter", changed("a\nb", value="x")),
        ("games compared", lambda data: b"\xff" + data),
        ("games compared", lambda data: NESTED),
        ("games compared", changed("games", "alfworld|put|x", "expert", value=1)),
        ("tokenizer of a model", changed("version", value="a\nb")),
        ("config of a model", changed("architectures", value=["x"] * 999)),
        (
            "header of weights",
            lambda data: data.replace(b"norm.weight", b"nor\\nweight"),
        ),
        ("answer of an endpoint", lambda data: NESTED),
        ("prompt", lambda data: data.decode().encode("utf-16")),
    ],
)
def test_a_damage_is_refused(name, edit, tmp_path):
    assert tried(name, edit, tmp_path)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("index of ALFWorld", changed("index", "left_out", value={"x": float("inf")})),
        ("index of ALFWorld", lambda data: NESTED),
        ("splits of MiniHack", lambda data: NESTED),
    ],
)
def test_what_is_only_kept_to_save_time_is_made_again(name, edit, tmp_path):
    assert not tried(name, edit, tmp_path)


def tried(name, edit, tmp_path):
    """What the readers of a damaged file say, see `try_it`."""
    case, folder = CASES[name], tmp_path / "folder"
    folder.mkdir()
    case.make(folder)
    (path,) = folder.glob(case.file)
    path.write_bytes(edit(path.read_bytes()))
    return try_it(folder, path, case.read)
