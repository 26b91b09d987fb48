"""Roles that begin with an adapter: one frozen base, an actor that plays with one, and a reflector
whose training and whose reference start from another.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from envs.fake import FakeEnvironment
from envs.local import LocalPool
from experiments import evaluate, evaluation_parts, memory, play, train
from experiments.contents import content_hashes
from experiments.fake_pair import save_pair
from experiments.plan_programs import run_programs
from experiments.presets import adapter_folder, in_folders, preset
from experiments.pretraining import unrecorded
from experiments.resume import check_changes
from ictjax.chat import ChatTokenizer
from ictjax.config import BatchConfig, LearnerConfig, LoraConfig, MeshConfig, OptimizerConfig
from ictjax.grpo import kl_k3
from ictjax.learner import (
    init_state,
    make_optimizer,
    make_update,
    state_shardings,
    token_logprobs,
    transformer_functions,
)
from ictjax.manners import Manners, write_manners
from ictjax.mesh import split_rows
from ictjax.metrics import read_metrics
from ictjax.models.hf import load_checkpoint, save_checkpoint
from ictjax.models.hf.reader import read_config
from ictjax.models.lora import init_adapter, merge
from ictjax.models.peft import load_adapter, save_adapter
from ictjax.players import (
    check_language,
    initial_weights,
    open_players,
    open_speaker,
    trained_shapes,
)
from ictjax.records import Message
from ictjax.run_config import ActorConfig, from_dict, to_dict
from ictjax.sampler import sampling_shapes
from ictjax.sft import encode_chat, pack_chats
from ictjax.speaker import Limits
from ictjax.train import train as train_run
from tests.test_cli import flags, refused
from tests.test_players import alive, check_equal, check_places
from tests.test_start import trained
from tests.tiny import save_tiny_model

ONE, MESH = MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)  # of the eight virtual devices
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "gate", "up", "down"))
ACTING = LoraConfig(rank=3, alpha=3.0)
GREEDY = Limits(max_tokens=4, temperature=0.0)


def factors(model, lora, seed, size):
    """Of an adapter that changes what the model says."""
    shapes = init_adapter(model, lora, jax.random.key(0))
    named = dict(zip(shapes, jax.random.split(jax.random.key(seed), len(shapes)), strict=True))
    return {
        name: size * jax.random.normal(named[name], leaf.shape) for name, leaf in shapes.items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The pair and a tiny model, each with adapters beside it, and the latter with each merged."""
    folder = tmp_path_factory.mktemp("models")
    save_pair(folder)
    save_tiny_model(folder / "tiny")
    for name, base, lora, size in (
        ("acting", "actor", ACTING, 0.05),
        ("acting-tiny", "tiny", ACTING, 1.0),
        ("reflecting", "reflector", LORA, 0.4),
        ("reflecting-tiny", "tiny", LORA, 1.0),
    ):
        model, params = load_checkpoint(folder / base)
        adapter = factors(model, lora, len(name), size)
        save_adapter(folder / name, model, lora, adapter, base=base)
        if base == "tiny":
            merged = merge(lora, params, adapter)
            save_checkpoint(folder / f"{name}-merged", model, merged, source=folder / base)
    return folder


def config_of(folder):
    return dataclasses.replace(read_config(folder), dtype="float32")


def adapter_of(model, adapter):
    config = config_of(model)
    return config, *load_adapter(adapter, config)


def make(folders, *, tiny=False, mesh=ONE, actor="acting", reflector="reflecting"):
    """Both roles with an adapter, of the pair or on one base; "" leaves one out."""
    models = ("tiny", "tiny") if tiny else ("actor", "reflector")
    named = [
        name and str(folders / (f"{name}-tiny" if tiny else name)) for name in (actor, reflector)
    ]
    config = preset("fake-tiny").with_models(*(str(folders / name) for name in models))
    config = dataclasses.replace(
        config,
        actor=dataclasses.replace(config.actor, mesh=mesh),
        reflector=dataclasses.replace(config.reflector, mesh=mesh, lora=LORA),
        grpo=dataclasses.replace(config.grpo, kl="k3_in_loss", kl_coefficient=0.1),
    )
    return config.with_adapters(*named)


def logprobs(speaker, text="walk look"):
    """Of the likeliest reply."""
    number = speaker.open([Message(role="user", content=text)])
    speaker.ask(number, GREEDY, (0, 0))
    while not (replies := speaker.step()):
        pass
    speaker.close(number)
    return replies[0].text, np.asarray(replies[0].logprobs)


def check_says(speaker, folder):
    """A speaker says what the model of a folder says."""
    with open_speaker(folder) as other:
        (text, there), (expected, here) = logprobs(speaker), logprobs(other)
    assert text == expected
    np.testing.assert_allclose(there, here, atol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "actor"), [(MESH, "acting"), (ONE, "")], ids=["both, on a mesh", "reflector alone"]
)
def test_each_role_has_its_own_adapter_on_one_base(folders, mesh, actor):
    config = make(folders, tiny=True, mesh=mesh, actor=actor)
    whole = load_checkpoint(folders / "tiny")[1]["embed"].shape
    before = alive(whole)
    with open_players(config, initial_weights(config)) as players:
        check_says(players.actor, folders / ("acting-tiny-merged" if actor else "tiny"))
        check_says(players.reflector.speaker, folders / "reflecting-tiny-merged")
        assert alive(whole) == before + 1
        if players.mesh is not None:  # as it is planned
            check_places(sampling_shapes(players.model, players.mesh, LORA), players.base)
        players.set_trained(jax.tree.map(jnp.zeros_like, initial_weights(config)))
        check_says(players.reflector.speaker, folders / "tiny")
        check_says(players.actor, folders / ("acting-tiny-merged" if actor else "tiny"))


def test_an_actor_in_8_bits_plays_with_its_adapter(folders):
    config = make(folders, tiny=True)
    config = dataclasses.replace(config, actor=dataclasses.replace(config.actor, weights="int8"))
    with open_players(config, initial_weights(config)) as players:
        text, found = logprobs(players.actor)
    with open_speaker(folders / "acting-tiny-merged") as merged:
        assert logprobs(merged)[0] == text
        np.testing.assert_allclose(found, logprobs(merged)[1], atol=0.1)


def test_a_speaker_of_the_library_has_an_adapter(folders):
    with open_speaker(folders / "tiny", adapter=folders / "acting-tiny") as speaker:
        check_says(speaker, folders / "acting-tiny-merged")
    with (
        pytest.raises(ValueError, match="adapter is 'x', and the speaker is no model"),
        open_speaker("http://localhost:1", adapter="x"),
    ):
        pass


@pytest.mark.parametrize("mesh", [ONE, MESH], ids=["one device", "mesh"])
def test_the_reference_is_the_start_and_stays_it(folders, mesh):
    """The KL of every update is that between merged weights: of what is trained by then, and of the
    base with the start adapter.
    """
    config = make(folders, tiny=True, mesh=mesh)
    chat = ChatTokenizer(folders / "tiny")
    talk = [
        Message(role="user", content="look look"),
        Message(role="assistant", content="walk open walk"),
    ]
    sizes = BatchConfig(num_rows=4, token_buckets=(24,), response_buckets=(24,))
    batch = pack_chats(sizes, [[encode_chat(chat, talk)]] * 4, chat.pad_id)
    model, base = load_checkpoint(folders / "tiny")
    start = load_adapter(folders / "reflecting-tiny", model)[1]
    plain = transformer_functions(model, remat="none")

    def merged_logprobs(adapter):
        host = jax.tree.map(np.asarray, adapter)
        return token_logprobs(
            plain, merge(LORA, base, host), batch, temperature=1.0, positions_per_chunk=8
        )[0]

    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.3))
    state = init_state(initial_weights(config), optimizer)
    check_equal(state.params, start)
    with open_players(config, state.params) as players:
        functions = transformer_functions(
            players.model, remat="none", lora=players.lora, mesh=players.mesh
        )
        update = make_update(
            functions, config.grpo, optimizer, LearnerConfig(), shardings=state_shardings(state)
        )
        check_places(trained_shapes(config).params, state.params)
        kls = []
        for step in range(3):
            mask_br = batch.response_mask_br
            kl_br = kl_k3(merged_logprobs(state.params), merged_logprobs(start), mask_br)
            expected = float(kl_br.sum() / mask_br.sum())
            state, metrics = update(state, players.base, split_rows(batch, players.mesh))
            kls.append(float(metrics["kl"]))
            assert kls[-1] == pytest.approx(expected, rel=1e-3, abs=1e-7)
            if step == 0:
                assert kls == [0.0]
                assert (float(metrics["ratio_min"]), float(metrics["ratio_max"])) == (1.0, 1.0)
    assert kls[2] > kls[1] > 1e-5  # far above the rounding of the comparison


def rows(run_dir):
    return [
        {name: value for name, value in record.items() if name != "time"}
        for record in read_metrics(run_dir)
    ]


class _Killed(Exception):
    pass


class _Killer:
    """Ends the run in its third iteration."""

    def __init__(self):
        self.done = 0

    def reading(self, finished, total):
        pass

    def phase(self, name, finished, total):
        if self.done == 2:
            raise _Killed

    def iteration(self, number, total, metrics):
        self.done = number


def test_a_run_from_adapters_goes_on_and_is_evaluated_against_its_start(
    folders, tmp_path, monkeypatch
):
    config = dataclasses.replace(make(folders), iterations=3, checkpoint_every=2)
    environment = FakeEnvironment()

    def run(name, progress=None):
        pool = LocalPool(environment)
        return train_run(
            config, tmp_path / name, environment=environment, pool=pool, progress=progress
        )

    run("whole")
    with pytest.raises(_Killed):
        run("killed", _Killer())
    assert run("killed") == 2
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    first, *later = rows(tmp_path / "whole")
    assert first["kl"] == 0 and first["ratio_max"] == 1
    assert later[-1]["kl"] > 0

    begun = []

    def noted(config, weights, *_, hosts):
        begun.append(weights)
        raise _Killed

    monkeypatch.setattr(evaluation_parts, "open_players", noted)
    evaluation = dataclasses.replace(
        config.evaluation, runs=1, test_games=1, select_games=1, families=("door",)
    )
    short = dataclasses.replace(config, evaluation=evaluation)
    with pytest.raises(_Killed):
        evaluate.evaluate(tmp_path / "whole", short, Console(quiet=True))
    check_equal(begun[0], load_adapter(folders / "reflecting", config_of(folders / "reflector"))[1])


# --- what is asked for, and what is refused ---


def test_what_does_not_fit_is_one_sentence(folders):
    config = make(folders)
    with pytest.raises(ValueError, match=r"reflector\.lora\.rank = 0 trains all weights: set"):
        dataclasses.replace(config.reflector, lora=LoraConfig())
    with pytest.raises(
        ValueError, match=r"^actor\.adapter is 'x', and the actor is at actor\.endp"
    ):
        ActorConfig(
            model="gpt",
            endpoint=dataclasses.replace(config.actor.endpoint, url="http://a/v1"),
            adapter="x",
        )
    other = dataclasses.replace(
        config.reflector, lora=LoraConfig(rank=3, alpha=4.0, targets=("q", "down"))
    )
    check_language(config)
    for role, words in (
        (other, r"set --reflector\.lora\.rank 2, --reflector\.lora\.targets down gate q up$"),
        (
            dataclasses.replace(config.reflector, adapter=str(folders / "reflecting-tiny")),
            r"^reflector\.adapter: .*reflecting-tiny/adapter_model.* does not fit the model: ",
        ),
        (
            dataclasses.replace(config.reflector, adapter=str(folders / "nowhere")),
            r"^reflector\.adapter: .*nowhere' has no adapter_config\.json",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            check_language(dataclasses.replace(config, reflector=role))
        with pytest.raises(ValueError, match=words):
            initial_weights(dataclasses.replace(config, reflector=role))


def test_an_adapter_is_a_path_or_ships_with_the_repository(folders, monkeypatch):
    config = make(folders)
    assert in_folders(config).actor.adapter == config.actor.adapter
    monkeypatch.setattr("experiments.presets._ROOT", folders)
    assert adapter_folder("acting", "--actor.adapter") == str(folders / "acting")
    with pytest.raises(ValueError, match=r"^No adapter in 'none' .* with --actor\.adapter\.$"):
        in_folders(config.with_adapters("none", ""))


def test_a_configuration_holds_them_and_one_of_an_older_version_has_none(folders):
    config = make(folders)
    assert from_dict(to_dict(config)) == config
    older = to_dict(preset("fake-tiny"))
    for role in ("actor", "reflector"):
        del older[role]["adapter"]
    assert from_dict(older) == preset("fake-tiny")
    assert unrecorded(config) == []  # beside the pair, which is beside them
    assert unrecorded(config.with_adapters("elsewhere/acting", "")) == ["elsewhere/acting"]


def test_a_run_knows_its_adapters_by_content(capsys, folders, tmp_path, monkeypatch):
    config, folder = make(folders), tmp_path / "run"
    hashes = content_hashes(config)
    assert set(hashes) == {"actor", "actor adapter", "reflector", "reflector adapter"}
    copy = tmp_path / "copy"
    save_adapter(copy, *adapter_of(folders / "actor", folders / "acting"), base="actor")
    given = (
        *("--actor.model", config.actor.model, "--reflector.model", config.reflector.model),
        *("--reflector.adapter", config.reflector.adapter, "--reflector.lora.rank", "2"),
        *("--reflector.lora.alpha", "4", "--reflector.lora.targets", *LORA.targets),
    )
    refused(capsys, train.main, flags(folder, *given, "--actor.adapter", "none"), "--actor.adapter")
    refused(capsys, train.main, flags(folder, *given[:6]), "reflector.adapter is", "lora.rank = 0")
    trained(monkeypatch, folder, *given, "--actor.adapter", config.actor.adapter)
    assert json.loads((folder / "manifest.json").read_text())["models"] == hashes
    train.main(flags(folder, *given, "--actor.adapter", str(copy)))
    assert json.loads((folder / "config.json").read_text())["actor"]["adapter"] == str(copy)
    refused(capsys, train.main, flags(folder, *given), "--actor.adapter was", 'is ""')
    kept = json.loads((folder / "config.json").read_text())
    with (copy / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    argv = flags(folder, *given, "--actor.adapter", str(copy))
    refused(
        capsys, train.main, argv, f"actor's adapter in {copy} is not the one", "--actor.adapter"
    )
    assert evaluate.changed_since(folder, from_dict(kept), config.task, FakeEnvironment()) == [
        "the actor's adapter (its files differ)"
    ]
    for actor, reflector, what in (
        ("", config.reflector.adapter, "actor's adapter (there is none)"),
        (config.actor.adapter, "", "reflector's adapter (there is none)"),
    ):
        other = config.with_adapters(actor, reflector)
        changes = evaluate.changed_since(folder, other, config.task, FakeEnvironment())
        assert changes == [f"the {what}"]
    with pytest.raises(ValueError, match=r"--reflector\.adapter was"):
        check_changes(folder, config, config.with_adapters(config.actor.adapter, "x"), (), "go")


def test_a_plan_counts_them(folders):
    config = make(folders, tiny=True)
    kept = {use.what: use for use in memory.uses(config)}
    without = {
        use.what: use for use in memory.uses(make(folders, tiny=True, actor="", reflector=""))
    }
    more = {name: kept[name] for name in kept.keys() - without.keys()}
    model = config_of(folders / "tiny")
    for name, lora, part in (
        ("adapter of the actor", ACTING, "actor weights"),
        ("adapter that the reflector starts from", LORA, "base"),
    ):
        use = more.pop(name)
        size = sum(leaf.size for leaf in jax.tree.leaves(factors(model, lora, 0, 1.0)))
        assert (use.whole_bytes, use.parts) == (4 * size, {part})
    assert not more
    programs = {one.phase: one for one in run_programs(config, jax.devices(), 1)}
    names = {
        phase: str(jax.tree_util.tree_structure(programs[phase].lower().in_avals))
        for phase in ("actor decode", "update")
    }
    assert "up_lora_a" in names["actor decode"]
    assert names["update"].count("up_lora_a") == 1 + 1 + 2  # start, trained, and its moments


# --- how it is spoken to ---

SHORT = Manners(options={}, initial_prompt="play RING", max_steps=3, max_turn_tokens=4)


def test_an_adapter_says_how_its_model_is_spoken_to(folders, tmp_path, capsys):
    own = tmp_path / "acting"
    save_adapter(own, *adapter_of(folders / "actor", folders / "acting"), base="actor")
    write_manners(own, {"fake": SHORT})
    base = ("--env", "fake", "--family", "door", "--model", str(folders / "actor"))
    play.main([*base, "--adapter", str(own), "--record", str(tmp_path / "game.json")])
    record = json.loads((tmp_path / "game.json").read_text())
    assert record["system_prompt"] == "play RING"
    assert [turn["action"] for turn in record["turns"]] == ["ring"] * 3
    write_manners(own, {"minihack": SHORT})
    refused(capsys, play.main, [*base, "--adapter", str(own)], f"{own} knows minihack only")
    with pytest.raises(ValueError, match=rf"actor\.model: The model in {own} knows minihack only"):
        check_language(make(folders).with_adapters(str(own), ""))
    refused(capsys, play.main, [*base[:4], "--adapter", str(own)], "--adapter", "--model")
    refused(capsys, play.main, [*base, "--adapter", "none"], "No adapter in 'none'", "--adapter")
