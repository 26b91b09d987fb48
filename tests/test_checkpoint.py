import asyncio
import contextlib
import errno
import gc
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.serialization import serialization, type_handlers

from envs.stopping import armed
from ictjax.checkpoint import Checkpointer, CheckpointReader, check_space, checkpoint_bytes
from ictjax.learner import LearnerState, init_state


def _state(seed=0) -> LearnerState:
    params = {"layers": {"w": jax.random.normal(jax.random.key(seed), (3, 4))}, "norm": jnp.ones(3)}
    return init_state(params, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))


def save(checkpointer, *what, **more):
    """Saves, and waits until it is written."""
    checkpointer.save(*what, **more)
    checkpointer.wait()


def _abstract(state):
    return jax.eval_shape(lambda: state)


HOST = {"iteration": 7, "key": [1, 2], "nested": {"reward": 0.1 + 0.2, "none": None}}


def test_round_trip_keeps_structure_bits_and_host(tmp_path):
    state = _state()
    with Checkpointer(tmp_path / "deep" / "folder") as checkpointer:
        assert checkpointer.latest_step is None
        save(checkpointer, 3, state, HOST)
        assert checkpointer.latest_step == 3
    with Checkpointer(tmp_path / "deep" / "folder") as checkpointer:
        for template in (state, _abstract(state)):
            restored, host = checkpointer.restore(None, template)
            chex.assert_trees_all_equal(restored, state)
            assert jax.tree.structure(restored) == jax.tree.structure(state)
            assert host == HOST


def test_a_restore_says_when_it_has_read_all_and_compares_then(tmp_path, monkeypatch):
    order = []
    arrays, check = Checkpointer._arrays, Checkpointer._check
    monkeypatch.setattr(
        Checkpointer, "_arrays", lambda self, *what: order.append("arrays") or arrays(self, *what)
    )
    monkeypatch.setattr(
        Checkpointer, "_check", lambda self, *what: order.append("check") or check(self, *what)
    )
    state = _state()
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, state, HOST)
        for restore in (checkpointer.restore, checkpointer.restore_part):
            order.clear()
            restored, _ = restore(1, state, lambda: order.append("read"))
            chex.assert_trees_all_equal(restored, state)
            assert order == ["arrays", "read", "check"]


def test_dtypes_and_numpy_leaves(tmp_path):
    state = {
        "half": jnp.asarray([1.5, -2.0], jnp.bfloat16),
        "count": np.int32(3),
        "raw": np.arange(4, dtype=np.uint32),
        "flag": jnp.asarray(True),
    }
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 0, state, {})
        restored, _ = checkpointer.restore(0, state)
    for name, value in state.items():
        assert restored[name].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(restored[name]), np.asarray(value))


def test_restore_onto_the_shardings_of_the_template(tmp_path):
    mesh = jax.make_mesh((4,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = {"w": jnp.arange(8.0).reshape(4, 2)}
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 0, state, {})
        restored, _ = checkpointer.restore(
            0, {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=sharding)}
        )
    assert restored["w"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(restored["w"], state["w"])


def test_keeps_the_last(tmp_path):
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        for step in range(1, 8):
            save(checkpointer, step, {"x": jnp.asarray(float(step))}, {"step": step})
        assert checkpointer.steps == (6, 7)
        assert checkpointer.restore(6, {"x": jnp.zeros(())})[1] == {"step": 6}


def test_keeps_the_multiples_too(tmp_path):
    with Checkpointer(tmp_path, keep_last=1, keep_every=3) as checkpointer:
        for step in range(1, 9):
            save(checkpointer, step, {"x": jnp.zeros(())}, {})
        assert checkpointer.steps == (3, 6, 8)
    assert sorted(os.listdir(tmp_path)) == ["3", "6", "8"]


# --- who only reads ---


def test_a_reader_makes_and_removes_nothing(tmp_path):
    with CheckpointReader(tmp_path / "missing") as reader:
        assert reader.latest_step is None and reader.steps == ()
        with pytest.raises(ValueError, match="No checkpoint at all"):
            reader.restore(None, {"x": jnp.zeros(())})
    assert not (tmp_path / "missing").exists()
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, {"x": jnp.ones(())}, {})
    saving = tmp_path / "2.orbax-checkpoint-tmp" / "state"
    saving.mkdir(parents=True)
    with CheckpointReader(tmp_path) as reader:
        assert reader.steps == (1,)
        assert reader.restore(None, {"x": jnp.zeros(())})[0]["x"] == 1
    assert saving.is_dir()
    with Checkpointer(tmp_path):
        assert os.listdir(tmp_path) == ["1"]  # the one who writes removes what a killed one left


def test_a_reader_sees_what_is_saved_and_removed_meanwhile(tmp_path):
    zero = {"x": jnp.zeros(())}
    with Checkpointer(tmp_path, keep_last=1) as checkpointer, CheckpointReader(tmp_path) as reader:
        for step in (1, 2):
            save(checkpointer, step, {"x": jnp.full((), float(step))}, {"step": step})
            state, host = reader.restore(None, zero)
            assert (state["x"], host) == (step, {"step": step})
        with pytest.raises(ValueError, match=r"No checkpoint of step 1 .* \(there: 2\)"):
            reader.restore(1, zero)


@pytest.mark.parametrize("asked", [None, 1])
def test_a_checkpoint_that_goes_while_it_is_read_makes_way_for_the_newest(
    tmp_path, monkeypatch, asked
):
    zero = {"x": jnp.zeros(())}
    with Checkpointer(tmp_path, keep_last=1) as checkpointer, CheckpointReader(tmp_path) as reader:
        save(checkpointer, 1, {"x": jnp.ones(())}, {"step": 1})
        load = reader._load

        def slow(step, **items):
            if step == 1 and "state" in items:
                save(checkpointer, 2, {"x": jnp.full((), 2.0)}, {"step": 2})
            return load(step, **items)

        monkeypatch.setattr(reader, "_load", slow)
        if asked is None:
            state, host = reader.restore(None, zero)
            assert (state["x"], host) == (2, {"step": 2})
        else:
            with pytest.raises(ValueError, match=r"No checkpoint of step 1 .* \(there: 2\)"):
                reader.restore(asked, zero)


@pytest.fixture
def slow_disk(monkeypatch):
    """Writes no array before it is set, whether it is JAX's or NumPy's."""
    gate = threading.Event()

    def late(write):
        async def slow(*args, **more):
            while not gate.is_set():
                await asyncio.sleep(0.001)
            return await write(*args, **more)

        return slow

    for place, name in (
        (serialization, "async_serialize_from_host"),
        (type_handlers.NumpyHandler, "_open_and_write"),
    ):
        monkeypatch.setattr(place, name, late(getattr(place, name)))
    yield gate
    gate.set()


@pytest.mark.parametrize("own_copies", [False, True])
def test_what_is_saved_is_the_state_of_its_step_whatever_becomes_of_the_arrays(
    tmp_path, slow_disk, own_copies
):
    mesh = jax.make_mesh((4,), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    expected = np.arange(4000.0, dtype=np.float32)
    state = {"x": jnp.asarray(expected), "split": jax.device_put(expected, split), "raw": expected}
    state["raw"] = expected.copy()
    with Checkpointer(tmp_path, own_copies=own_copies) as checkpointer:
        checkpointer.save(1, state, {})
        assert checkpointer.steps == ()  # not before it is complete
        state["raw"][:] = -1
        arrays = {name: state[name] for name in ("x", "split")}
        update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
        for _ in range(3):
            arrays = update(arrays)
        jax.block_until_ready(arrays)
        assert checkpointer.steps == ()
        slow_disk.set()
        checkpointer.wait()
        restored, _ = checkpointer.restore(1, state)
    for name, array in restored.items():
        np.testing.assert_array_equal(array, expected, name)


def test_the_next_save_and_the_end_wait_for_the_one_before(tmp_path, slow_disk):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(3)}, {})
        later = threading.Thread(target=checkpointer.save, args=(2, {"x": jnp.ones(3)}, {}))
        later.start()
        slow_disk.set()
        later.join()
        assert 1 in checkpointer.steps
    assert checkpointer.steps == (1, 2)


def test_a_write_that_fails_is_told_by_whatever_comes_next_and_once(tmp_path, monkeypatch):
    state = {"x": jnp.ones(3)}
    later = {
        "save": lambda checkpointer: checkpointer.save(3, state, {}),
        "wait": Checkpointer.wait,
        "close": Checkpointer.close,
    }
    for number, (name, call) in enumerate(later.items()):
        with contextlib.closing(Checkpointer(tmp_path / str(number))) as checkpointer:
            save(checkpointer, 1, state, {})

            async def fail(*args, **more):
                raise OSError(errno.ENOSPC, "x")

            with monkeypatch.context() as patched:
                patched.setattr(serialization, "async_serialize_from_host", fail)
                checkpointer.save(2, state, {})
                with pytest.raises(
                    ValueError, match="Too little disk for the checkpoint of step 2"
                ):
                    call(checkpointer)
            checkpointer.wait()
            assert os.listdir(tmp_path / str(number)) == ["1"], name
            if name != "close":
                save(checkpointer, 2, state, {})
                assert checkpointer.steps == (1, 2)
    gc.collect()


def test_only_a_second_signal_ends_a_write_and_any_does_after_it(tmp_path, slow_disk):
    with armed() as program, Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(3)}, {})
        assert program._held == 1
        slow_disk.set()
        checkpointer.wait()
        assert program._held == 0


def test_keeps_the_best_by_score_the_newest_of_equals_and_knows_them_after_a_restart(tmp_path):
    scores = (0.5, 0.9, None, 0.9, 0.1, 0.2)
    for step, score in enumerate(scores, start=1):
        with Checkpointer(tmp_path, keep_last=1, keep_best=1) as checkpointer:
            checkpointer.save(step, {"x": jnp.zeros(())}, {}, score=score)
    assert checkpointer.steps == (4, 6)
    with Checkpointer(tmp_path, keep_last=1, keep_best=1) as checkpointer:
        for step, score in ((7, 0.95), (8, 0.0)):
            checkpointer.save(step, {"x": jnp.zeros(())}, {}, score=score)
    assert checkpointer.steps == (7, 8)


def test_what_eight_devices_saved_is_restored_on_any_mesh(tmp_path):
    """From data 8 to data 2 x tensor 4, and to a split of what was whole."""
    axes = jax.sharding.PartitionSpec
    eight = jax.make_mesh((8,), ("data",))
    mixed = jax.make_mesh((2, 4), ("data", "tensor"))
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    split = jax.sharding.NamedSharding(eight, axes("data"))
    whole = jax.sharding.NamedSharding(eight, axes())
    state = {"split": jax.device_put(values, split), "whole": jax.device_put(values, whole)}
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, state, {})
        for spec in (axes("data", "tensor"), axes("tensor", "data"), axes(None, "tensor"), axes()):
            place = jax.sharding.NamedSharding(mixed, spec)
            shapes = {
                name: jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place)
                for name in state
            }
            restored, _ = checkpointer.restore(1, shapes)
            for array in restored.values():
                assert array.sharding.is_equivalent_to(place, 2)
                np.testing.assert_array_equal(array, values)


def test_another_model_is_refused_by_its_first_differing_leaf(tmp_path):
    state = _state()
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 0, state, {})
        wider = state._replace(params={"layers": {"w": jnp.zeros((3, 5))}, "norm": jnp.ones(3)})
        with pytest.raises(
            ValueError, match=r"params/layers/w is 'float32\[3, 4\]', expected 'float32\[3, 5\]'"
        ):
            checkpointer.restore(0, wider)
        with pytest.raises(
            ValueError, match=r"params/norm is 'float32\[3\]', expected 'bfloat16\[3\]'"
        ):
            checkpointer.restore(
                0, state._replace(params={**state.params, "norm": jnp.ones(3, jnp.bfloat16)})
            )
        with pytest.raises(ValueError, match="it has no params/head"):
            checkpointer.restore(0, state._replace(params={**state.params, "head": jnp.ones(3)}))
        with pytest.raises(ValueError, match="it has params/norm, which is not expected"):
            checkpointer.restore(0, state._replace(params={"layers": state.params["layers"]}))


def test_missing_and_repeated_steps_are_named(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="No checkpoint at all"):
            checkpointer.restore(None, _state())
        save(checkpointer, 5, _state(), {})
        with pytest.raises(ValueError, match=r"No checkpoint of step 4.*there: 5"):
            checkpointer.restore(4, _state())
        with pytest.raises(ValueError, match="Step 5 is already in"):
            save(checkpointer, 5, _state(), {})
        save(checkpointer, 4, _state(), {})  # an older step is a checkpoint too
        assert checkpointer.steps == (4, 5)


def _files(step: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def _flip(path: pathlib.Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _zero(path: pathlib.Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = draw.randrange(max(1, len(data) - 4096))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def _cut(path: pathlib.Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def _like_trained() -> dict[str, jax.Array]:
    """Random floats, which do not compress: damage in a compressed block would be noticed."""
    return {
        "w": jax.random.normal(jax.random.key(0), (64, 256)),
        "half": jax.random.normal(jax.random.key(1), (999,)).astype(jnp.bfloat16),
        "count": jnp.int32(7),
    }


@pytest.mark.parametrize("damage", [_flip, _zero, _cut])
def test_no_damage_restores_something_else(tmp_path, damage):
    state, draw = _like_trained(), random.Random(0)
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, state, HOST)
    files = [path for path in _files(tmp_path / "1") if path.stat().st_size]
    largest = max(files, key=lambda path: path.stat().st_size)  # the arrays' own bytes
    noticed = 0
    for attempt in range(30):
        path = largest if attempt % 3 == 0 else draw.choice(files)
        whole = path.read_bytes()
        damage(path, draw)
        with CheckpointReader(tmp_path) as reader:
            try:
                restored, host = reader.restore(None, state)
            except ValueError:
                noticed += 1
            else:
                chex.assert_trees_all_equal(restored, state)
                assert host == HOST
        path.write_bytes(whole)
    assert noticed >= 5
    gc.collect()


def _damage_arrays(tmp_path, step):
    """Swaps two array files' bytes for others that Orbax takes: another state of the same shapes."""
    with Checkpointer(tmp_path / "other") as checkpointer:
        other = {**_like_trained(), "w": jnp.zeros((64, 256))}
        save(checkpointer, step, other, HOST)
    shutil.rmtree(tmp_path / "run" / str(step) / "state")
    shutil.move(tmp_path / "other" / str(step) / "state", tmp_path / "run" / str(step) / "state")


def test_what_is_damaged_is_named_with_what_else_there_is(tmp_path):
    state = _like_trained()
    with Checkpointer(tmp_path / "run") as checkpointer:
        for step in (3, 4):
            save(checkpointer, step, state, HOST)
        _damage_arrays(tmp_path, 4)
        for restore in (checkpointer.restore, checkpointer.restore_part):
            with pytest.raises(ValueError) as refused:
                restore(None, state)
            assert str(refused.value) == (
                f"The checkpoint of step 4 in {tmp_path}/run is damaged: w is not what was saved."
                f" Name another with --step (3), or remove {tmp_path}/run/4: training goes on from"
                " step 3 then."
            )
        checkpointer.restore_part(None, {"half": state["half"]})  # is whole
        shutil.rmtree(tmp_path / "run" / "3")
        with pytest.raises(ValueError, match="There is no other: put back a copy, or start again"):
            checkpointer.restore(None, state)


def test_a_checkpoint_without_digests_is_read_still(tmp_path):
    state = _like_trained()
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, state, HOST)
        (record,) = (path for path in _files(tmp_path / "1" / "host") if path.name == "metadata")
        whole = json.loads(record.read_text())
        record.write_text(json.dumps({name: whole[name] for name in ("host", "leaves")}))
        restored, host = checkpointer.restore(None, state)
        chex.assert_trees_all_equal(restored, state)
        assert host == HOST
        for broken in ({**whole, "more": 1}, {**whole, "sha256": "0"}, [], {"host": HOST}):
            record.write_text(json.dumps(broken))
            with pytest.raises(ValueError, match="its record is not what was saved"):
                checkpointer.restore(None, state)


def test_every_bit_is_kept(tmp_path):
    """Negative zeros and payloads of NaN, which compare equal to what they are not, or unequal."""
    bits = np.asarray([0x80000000, 0x7FC00001, 0xFF800001, 0], np.uint32)
    state = {"odd": jnp.asarray(bits.view(np.float32)), "zero": -jnp.zeros((3, 5))}
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, state, {})
        restored, _ = checkpointer.restore(1, state)
    np.testing.assert_array_equal(np.asarray(restored["odd"]).view(np.uint32), bits)
    assert np.signbit(restored["zero"]).all()


def test_a_damaged_checkpoint_is_named(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 0, _state(), {})
    for path in (tmp_path / "0" / "state").rglob("*"):
        if path.is_file() and "METADATA" not in path.name and path.name != "commit_success.txt":
            path.write_bytes(b"")
    with Checkpointer(tmp_path) as checkpointer:
        _refuses_to_restore(checkpointer)
    gc.collect()  # what would complain of an unfinished restore does so here


def _refuses_to_restore(checkpointer: Checkpointer) -> None:
    with pytest.raises(ValueError, match="step 0 in .* cannot be read"):
        checkpointer.restore(0, _state())


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 0, _state(), {})
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
        with pytest.raises(
            ValueError,
            match=(
                r"Too little disk for the checkpoint of step 1: .* needs 16 MiB and has 1 MiB free"
            ),
        ):
            save(checkpointer, 1, _state(), {})
        assert checkpointer.steps == (0,)
    assert not (tmp_path / "1").exists()


def test_a_host_that_only_gives_its_part_keeps_no_copy_of_it(tmp_path, monkeypatch):
    state = {name: jnp.ones((2**20,)) for name in "abcd"}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Checkpointer(tmp_path, own_copies=True) as checkpointer:
        tracemalloc.start()
        try:
            checkpointer.save(1, state, {})
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert checkpointer.steps == ()
    assert peak < state["a"].nbytes


def test_the_host_that_saves_for_all_copies_each_array_once(tmp_path):
    state = {name: jnp.full((2**20,), ord(name), jnp.float32) for name in "abcd"}
    whole = sum(array.nbytes for array in state.values())
    with Checkpointer(tmp_path, own_copies=True) as checkpointer:
        tracemalloc.start()
        try:
            checkpointer.save(1, state, {})
            checkpointer.wait()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        restored, _ = checkpointer.restore(1, state)
    assert whole <= peak < whole + state["a"].nbytes
    assert all((restored[name] == state[name]).all() for name in state)


def test_the_space_for_all_checkpoints_is_known_before_the_first(tmp_path, monkeypatch):
    shapes = _abstract(_like_trained())
    folder = tmp_path / "new" / "checkpoints"
    free = SimpleNamespace(free=3 * checkpoint_bytes(shapes))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free if path.exists() else None)
    check_space(folder, shapes, 3)
    with pytest.raises(ValueError, match=r"4 of 16 MiB each need 64 MiB, and 48 MiB are free"):
        check_space(folder, shapes, 4)
    with Checkpointer(folder) as checkpointer:
        save(checkpointer, 1, _like_trained(), {})
    check_space(folder, shapes, 4)  # one is there
    free.free = 0
    with pytest.raises(ValueError, match="Too little disk for the checkpoints"):
        check_space(folder, shapes, 1)  # the next is written before the last is removed


def _refuses_to_save(checkpointer: Checkpointer, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as refused:
        save(checkpointer, 2, _like_trained(), {})
    assert "\n" not in str(refused.value)
    assert checkpointer.steps == (1,)
    assert os.listdir(checkpointer._folder) == ["1"]


def test_a_save_that_fails_on_the_way_leaves_nothing(tmp_path, caplog):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, _like_trained(), {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            _refuses_to_save(checkpointer, "step 2 cannot be written to .* \\(File too large\\):")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not caplog.records  # Orbax tells of each failure with several tracebacks
        save(checkpointer, 2, _like_trained(), {})
        assert checkpointer.steps == (1, 2)
    gc.collect()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "x"), "Too little disk for the checkpoint of step 2"),
        (OSError(errno.EDQUOT, "x"), "Too little disk for the checkpoint of step 2"),
        (ValueError("Failed [os_error_code='28']"), "Too little disk for the checkpoint of step 2"),
        (OSError(errno.EROFS, "x"), r"cannot be written to .* \(Read-only file system\): make"),
        (ValueError("Failed [os_error_code='5']"), r"cannot be written to .* \(Input/output error"),
    ],
)
def test_a_disk_that_refuses_is_told_in_one_sentence(tmp_path, monkeypatch, error, expected):
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, _like_trained(), {})

        def fail(path, **_):
            (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
            raise error

        monkeypatch.setattr(checkpointer._writer, "save", fail)
        _refuses_to_save(checkpointer, expected)


def test_the_first_save_is_read_back(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        write = checkpointer._writer.save

        def lossy(path, args):
            arrays = {name: array * 0 for name, array in args.state.item.items()}
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), host=args.host)
            write(path, args=args)

        monkeypatch.setattr(checkpointer._writer, "save", lossy)
        with pytest.raises(ValueError, match="step 1 is not what .* holds when it is read back"):
            save(checkpointer, 1, _like_trained(), {})
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "exp[1]",
        "a b",
        "-x",
        "q'u\"o",
        "st*r",
        "wh?t",
        "back\\slash",
        "new\nline",
        "é☃",
        "gs:",
        "\udcff",
    ],
)
def test_folders_of_any_name(tmp_path, name):
    state = {"x": jnp.arange(3.0)}
    (tmp_path / "star" / "checkpoints").mkdir(parents=True)  # as a pattern the name may mean this
    folder = tmp_path / name / "checkpoints"
    for step in (1, 2):
        with Checkpointer(folder) as checkpointer:
            save(checkpointer, step, state, {"step": step})
    with CheckpointReader(folder) as reader:
        for step in (1, 2):
            restored, host = reader.restore(step, state)
            np.testing.assert_array_equal(restored["x"], state["x"])
            assert host == {"step": step}
    assert sorted(os.listdir(folder)) == ["1", "2"]
    assert os.listdir(tmp_path / "star" / "checkpoints") == []


def test_host_state_that_is_not_json_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for host in ({"x": object()}, {"x": float("nan")}):
            with pytest.raises(ValueError, match="host must be JSON"):
                save(checkpointer, 0, _state(), host)
        assert checkpointer.latest_step is None


def test_bad_counts_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpointer(tmp_path, keep_last=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot make the checkpoint folder"):
        Checkpointer(tmp_path / "file" / "checkpoints")
    with pytest.raises(ValueError, match="keep_every=-1"):
        Checkpointer(tmp_path, keep_every=-1)
    with pytest.raises(ValueError, match="keep_best=-1"):
        Checkpointer(tmp_path, keep_best=-1)


_SAVES_FOREVER = """
import sys, itertools, jax.numpy as jnp
from ictjax.checkpoint import Checkpointer, CheckpointReader
with Checkpointer(sys.argv[1], keep_last=3) as checkpointer:
    for step in itertools.count(1):
        checkpointer.save(step, {"x": jnp.full((200_000,), float(step)), "y": jnp.full((50,), step)}, {"step": step})
        print(step, flush=True)
"""


def test_sigkill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", _SAVES_FOREVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    reported = 0
    try:
        while reported < 2:
            reported = int(process.stdout.readline())
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(tmp_path.glob("*tmp*")):  # a save has begun
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        remaining, _ = process.communicate()
    reported = max([reported, *map(int, remaining.split())])
    with Checkpointer(tmp_path, keep_last=3) as checkpointer:
        # a save returns before it is complete, and after the one before is
        assert checkpointer.latest_step in (reported - 1, reported, reported + 1)
        step = checkpointer.latest_step
        state, host = checkpointer.restore(
            None, {"x": jnp.zeros(200_000), "y": jnp.zeros(50, jnp.int32)}
        )
        assert host == {"step": step} and (state["x"] == step).all() and (state["y"] == step).all()
        save(checkpointer, step + 1, state, {})
        assert checkpointer.latest_step == step + 1
    assert not list(tmp_path.glob("*tmp*"))
