"""Actor and reflector of a run, opened once: who shares what, where it lies, and what is read."""

import contextlib
import dataclasses
import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.api import GameId, Outcome
from envs.fake import FakeEnvironment
from envs.local import LocalPool
from experiments.fake_pair import save_pair, word_tokenizer
from experiments.presets import preset
from ictjax import players as players_module
from ictjax.checkpoint import Checkpointer
from ictjax.config import EndpointConfig, LoraConfig, MeshConfig
from ictjax.endpoint_speaker import EndpointSpeaker
from ictjax.function_speaker import FunctionSpeaker
from ictjax.learner import init_state, make_optimizer
from ictjax.model_speaker import ModelSpeaker
from ictjax.models import transformer
from ictjax.models.config import ModelConfig
from ictjax.models.hf import save_checkpoint
from ictjax.players import (
    initial_weights,
    open_players,
    open_speaker,
    restore_trained,
    saved_steps,
    trained_shapes,
)
from ictjax.records import Message
from ictjax.reflector import ask_groups
from ictjax.rollout import Episode, rollout
from ictjax.speaker import Limits
from tests.chat_server import ChatServer, says
from tests.tiny import save_tiny_model

ONE, MESH = MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)  # of the eight virtual devices
FULL, LORA = LoraConfig(), LoraConfig(rank=2)
GREEDY = Limits(max_tokens=4, temperature=0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pair(folder)
    save_tiny_model(folder / "tiny")  # its width divides by the devices, that of the pair does not
    return folder


def make(
    folders,
    *,
    actor="actor",
    reflector="reflector",
    lora=FULL,
    mesh=ONE,
    kl="none",
    dtype="float32",
):
    config = preset("fake-tiny").with_models(str(folders / actor), str(folders / reflector))
    return dataclasses.replace(
        config,
        actor=dataclasses.replace(config.actor, mesh=mesh, dtype=dtype),
        reflector=dataclasses.replace(config.reflector, mesh=mesh, lora=lora, dtype=dtype),
        grpo=dataclasses.replace(config.grpo, kl=kl),
    )


def fresh_state(config):
    return init_state(initial_weights(config), make_optimizer(config.optimizer))


def save(run_dir, config, step=3):
    """A checkpoint as a run writes it, of weights that no other seed would give."""
    state = fresh_state(config)
    state = state._replace(params=jax.tree.map(lambda leaf: leaf + 0.25, state.params))
    with Checkpointer(run_dir / "checkpoints") as checkpointer:
        checkpointer.save(step, state, {"iteration": step})
    return state


def check_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def check_places(one, other):
    """Both trees have the same leaves in the same places; arrays or shapes."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert type(a.sharding) is type(b.sharding), path
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (path, a.sharding, b.sharding)


# --- what is trained ---


@pytest.mark.parametrize("model", ["reflector", "tiny"])
@pytest.mark.parametrize("mesh", [ONE, MESH], ids=["one device", "mesh"])
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_the_shapes_of_a_state_are_those_of_the_state_itself(
    folders, tmp_path, monkeypatch, lora, mesh, model
):
    config = make(folders, reflector=model, lora=lora, mesh=mesh)
    state = save(tmp_path, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    if model == "tiny":
        whole = all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
        assert whole == (mesh is ONE)
    with monkeypatch.context() as patch:  # no weight is read, and none is put anywhere
        patch.delattr(players_module, "load_checkpoint")
        patch.delattr(jax, "device_put")
        shapes = trained_shapes(config)
    check_places(shapes, state)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        restored, host = checkpointer.restore(None, shapes)
        check_equal(restored, state)
        check_places(restored, state)
        part, _ = checkpointer.restore_part(3, {"params": shapes.params})
    assert host == {"iteration": 3}
    assert set(part) == {"params"}  # not the moments, which are twice as large
    check_equal(part["params"], state.params)
    check_places(part["params"], state.params)


def test_initial_weights_are_the_models_own_or_an_adapter_that_adds_nothing(folders):
    full = initial_weights(make(folders))
    assert full["embed"].shape[0] == full["head"].shape[1]
    adapters = [
        initial_weights(dataclasses.replace(make(folders, lora=LORA), seed=seed))
        for seed in (0, 0, 1)
    ]
    check_equal(*adapters[:2])
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(adapters[0]), jax.tree.leaves(adapters[2]), strict=True)
    )


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("meshes", [(ONE, MESH), (MESH, ONE)], ids=["to a mesh", "from a mesh"])
def test_what_was_trained_is_read_onto_other_devices(folders, tmp_path, lora, meshes):
    before, after = (make(folders, lora=lora, mesh=mesh) for mesh in meshes)
    state = save(tmp_path, before)
    step, params = restore_trained(tmp_path, after)
    assert step == 3
    check_equal(params, state.params)
    check_places(params, trained_shapes(after).params)


def test_a_checkpoint_is_found_by_its_step(folders, tmp_path):
    config = make(folders, lora=LORA)
    for step in (1, 2):
        save(tmp_path, config, step)
    assert saved_steps(tmp_path)[-1] == 2
    assert restore_trained(tmp_path, config)[0] == 2
    assert restore_trained(tmp_path, config, 1)[0] == 1
    with pytest.raises(ValueError, match="no checkpoint of iteration 7: --step can be 1, 2"):
        restore_trained(tmp_path, config, 7)


@pytest.mark.parametrize("made", [False, True])
def test_a_run_without_a_checkpoint_is_told_so(folders, tmp_path, made):
    if made:
        (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint: train first"):
        saved_steps(tmp_path)
    with pytest.raises(ValueError, match="No checkpoint at all|holds no checkpoint"):
        restore_trained(tmp_path, make(folders))
    assert (tmp_path / "checkpoints").exists() == made


def test_a_checkpoint_of_other_weights_is_refused(folders, tmp_path):
    save(tmp_path, make(folders, lora=LORA))
    for other, difference in (
        (make(folders, lora=LoraConfig(rank=4)), "params/.* is .*, expected"),
        (make(folders), "it has no params/embed"),
        (make(folders, reflector="tiny", lora=LORA), "params/.* is .*, expected"),
    ):
        with pytest.raises(
            ValueError, match=f"does not fit this model and optimizer: {difference}"
        ):
            restore_trained(tmp_path, other)


def test_a_part_that_a_checkpoint_does_not_have_is_refused(folders, tmp_path):
    save(tmp_path, make(folders, lora=LORA))
    with (
        Checkpointer(tmp_path / "checkpoints") as checkpointer,
        pytest.raises(ValueError, match="it has no nothing/a"),
    ):
        checkpointer.restore_part(None, {"nothing": {"a": jnp.zeros(())}})


# --- who speaks ---


@contextlib.contextmanager
def opened(config, trained=None):
    weights = initial_weights(config) if trained is None else trained
    with open_players(config, weights) as players:
        yield players


def alive(shape):
    """How many arrays of a shape there are in this process."""
    gc.collect()
    return sum(array.shape == shape for array in jax.live_arrays())


@pytest.fixture
def reads(monkeypatch):
    """The folders that weights are read from."""
    found, load = [], players_module.load_checkpoint

    def counted(source, **settings):
        found.append(pathlib.Path(source).name)
        return load(source, **settings)

    monkeypatch.setattr(players_module, "load_checkpoint", counted)
    return found


@pytest.mark.parametrize("mesh", [ONE, MESH], ids=["one device", "mesh"])
def test_one_base_serves_both_roles(folders, reads, mesh):
    config = make(folders, reflector="actor", lora=LORA, mesh=mesh)
    whole = trained_shapes(make(folders, reflector="actor")).params
    shapes = [whole["embed"].shape, whole["head"].shape]
    before = [alive(shape) for shape in shapes]
    with opened(config) as players:
        assert reads == ["actor"]
        base = jax.tree.leaves(players.base)
        assert [leaf.shape for leaf in base].count(shapes[0]) == 1
        assert [alive(shape) for shape in shapes] == [count + 1 for count in before]
        assert speak(players.actor) == "Action: walk"
        players.set_trained(jax.tree.map(lambda leaf: leaf + 1, initial_weights(config)))
        reflect(players)
        assert [alive(shape) for shape in shapes] == [count + 1 for count in before]
        assert speak(players.actor) == "Action: walk"  # not what the reflector learned
    assert not any(leaf.is_deleted() for leaf in base)  # the caller's, for the update


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"reflector": "actor", "kl": "k3_in_loss"}, ["actor", "actor"]),  # trained, and frozen
        ({"kl": "k3_in_loss"}, ["reflector", "reflector", "actor"]),
        ({"lora": LORA}, ["reflector", "actor"]),
        ({}, ["reflector", "actor"]),
    ],
)
def test_each_checkpoint_is_read_once_for_each_use(folders, reads, settings, expected):
    config = make(folders, **settings)
    with opened(config) as players:
        assert reads == expected
        needed = config.grpo.kl != "none" or config.reflector.lora.rank > 0
        assert (players.base is not None) == needed
        assert isinstance(players.actor, ModelSpeaker)
        assert (players.lora, players.mesh) == (config.reflector.lora, None)
        assert players.pad_id == players.reflector.speaker.chat.pad_id


def door(key):
    return Episode(game=GameId(env="fake", family="door", key=str(key)), system_prompt="play OPEN")


def reflect(players, text="play"):
    """What the reflector says at its likeliest."""
    question = [Message(role="system", content="reflect"), Message(role="user", content=text)]
    ((reply,),) = ask_groups(players.reflector.speaker, [question], GREEDY, [[(0, 0)]])
    return reply


@pytest.mark.parametrize(
    ("lora", "mesh", "dtype"),
    [
        (FULL, MESH, "float32"),
        (LORA, ONE, "float32"),
        (FULL, MESH, "mixed"),
        (LORA, ONE, "mixed"),
    ],
    ids=["full", "lora", "full, mixed", "lora, mixed"],
)
def test_the_pair_plays_and_reflects_and_speaks_with_what_was_trained(folders, lora, mesh, dtype):
    config = make(folders, lora=lora, mesh=mesh, dtype=dtype)
    weights = initial_weights(config)
    with opened(config, weights) as players, LocalPool(FakeEnvironment()) as pool:
        trajectories = rollout(
            players.actor, pool, [door(key) for key in range(4)], config.task.rollout
        )
        assert {turn.action for t in trajectories for turn in t.turns} <= {"open", "walk"}
        assert any(turn.action == "open" for t in trajectories for turn in t.turns)
        first = reflect(players)
        assert first.text.startswith("ANALYSIS: seen IMPROVED PROMPT:")

        conversation = players.reflector.speaker.open([Message(role="user", content="play")])
        players.reflector.speaker.ask(conversation, GREEDY, (0, 0))
        with pytest.raises(ValueError, match="1 conversations are open: close them"):
            players.set_trained(weights)
        players.reflector.speaker.close(conversation)

        # Whatever else it says, a model without differences finds all words equally likely.
        flat = jax.tree.map(jnp.zeros_like, weights)
        players.set_trained(flat)
        changed = reflect(players)
        if lora.rank:
            assert changed.text == first.text  # an adapter of zeros adds nothing
        else:
            words = len(players.reflector.speaker.chat._tokenizer)
            np.testing.assert_allclose(changed.logprobs, -np.log(words), rtol=1e-5)
        players.set_trained(weights)
        assert reflect(players).text == first.text
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(weights))


def test_a_model_may_be_shared_in_play_and_still_be_trained_whole(folders, reads):
    """Nothing of the frozen actor changes when the reflector's weights do."""
    config = make(folders, reflector="actor")
    with opened(config) as players:
        question = [Message(role="system", content="RING"), Message(role="user", content="play")]
        ask = lambda: ask_groups(players.actor, [question], GREEDY, [[(0, 0)]])[0][0]  # noqa: E731
        before = ask()
        assert before.text == "Action: ring"
        players.set_trained(jax.tree.map(jnp.zeros_like, initial_weights(config)))
        assert ask().text == before.text
    assert reads[:2] == ["actor", "actor"]


def test_an_endpoint_is_the_actor_of_a_training_configuration(folders, reads, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def play(number, fields):
        near = "right here" in fields["messages"][-1]["content"]
        return says("Action: open" if near else "Action: walk")

    with ChatServer(play) as server:
        config = make(folders, lora=LORA)
        actor = dataclasses.replace(
            config.actor, model="big", endpoint=EndpointConfig(url=server.url)
        )
        config = dataclasses.replace(config, actor=actor)
        with opened(config) as players, LocalPool(FakeEnvironment()) as pool:
            assert isinstance(players.actor, EndpointSpeaker)
            assert reads == ["reflector"]
            trajectories = rollout(
                players.actor, pool, [door(key) for key in range(3)], config.task.rollout
            )
            assert [t.outcome for t in trajectories] == [Outcome.SUCCESS] * 3
            assert reflect(players).text.startswith("ANALYSIS:")
            assert players.actor.stats["calls"] == sum(len(t.turns) for t in trajectories)
        with pytest.raises(ValueError, match="shut down"):
            players.actor.open([])
        assert {request["model"] for request in server.requests} == {"big"}


# --- whoever is named ---


def speak(speaker, text="play"):
    number = speaker.open([Message(role="user", content=text)])
    speaker.ask(number, GREEDY, (0, 0))
    while not (replies := speaker.step()):
        pass
    speaker.close(number)
    return replies[0].text


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_folder_is_a_speaker(folders, kind):
    with open_speaker(kind(folders / "actor")) as speaker:
        assert isinstance(speaker, ModelSpeaker)
        assert speak(speaker) == "Action: walk"
    with pytest.raises(ValueError, match="the sampler is closed"):
        speaker.step()


def test_a_model_has_room_for_its_stop_ids_and_says_only_what_is_text(tmp_path):
    """Six stop ids, and embeddings for seven ids more than the tokenizer has."""
    tokenizer = word_tokenizer("walk look open".split())
    model = ModelConfig(
        vocab_size=len(tokenizer) + 7,
        num_layers=1,
        d_model=8,
        d_ff=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
    )
    params = transformer.init_params(model, jax.random.key(0))
    # the unused ids are the likeliest by far
    params["head"] = params["head"].at[:, len(tokenizer) :].mul(100)
    save_checkpoint(tmp_path, model, params)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 1, 2, 3, 4, 5]}')
    with open_speaker(tmp_path) as speaker:
        assert len(speaker.chat.stop_ids) >= 6
        assert speak(speaker, "walk look")


def test_a_function_is_a_speaker_that_may_return_the_bare_action():
    for replies, text in (("text", "walk"), ("action", "Action: walk")):
        function = lambda messages, actions: messages[0].content  # noqa: E731
        with open_speaker(function, replies=replies) as speaker:
            assert isinstance(speaker, FunctionSpeaker)
            assert speak(speaker, "walk") == text
        with pytest.raises(ValueError, match="shut down"):
            speaker.open([])


def test_a_url_is_a_speaker(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ChatServer(lambda number, fields: says("hi"), models=("a", "b")) as server:
        with open_speaker(server.url, model="b") as speaker:
            assert isinstance(speaker, EndpointSpeaker)
            assert (speak(speaker), speaker.model) == ("hi", "b")
        with pytest.raises(ValueError, match="has 2 models"), open_speaker(server.url):
            pass


def test_a_speaker_stays_the_callers_to_close():
    with FunctionSpeaker(lambda messages, actions: "mine") as mine:
        with open_speaker(mine) as speaker:
            assert speaker is mine
        assert speak(mine) == "mine"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (7, "A speaker needs a function of (messages, actions) that returns a reply, got 7."),
        (None, "A speaker needs a function of (messages, actions) that returns a reply, got None."),
        (b"models", "got b'models'."),
        ("no/such/folder", "'no/such/folder' is neither a folder nor"),
        (pathlib.Path("tests"), "No model in 'tests' (config.json is missing)"),
        ("ftp://somewhere", "ftp://somewhere"),
        ("", "''"),
    ],
)
def test_what_is_no_speaker_is_refused_in_one_sentence(source, message):
    with pytest.raises(ValueError) as caught, open_speaker(source):
        pass
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
