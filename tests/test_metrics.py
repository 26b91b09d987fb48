import errno
import json
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ictjax.metrics import MetricsWriter, read_metrics


def _write(folder, iterations, **options):
    with MetricsWriter(folder, **options) as writer:
        for iteration in iterations:
            writer.write(iteration, {"loss": iteration / 10}, time={"seconds": 1.5})


def test_one_line_an_iteration_with_time_apart(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(
            0,
            {
                "loss": jnp.float32(0.5),
                "count": np.int64(3),
                "name": "é",
                "families": {"Eat": np.float32(0.25)},
            },
            time={"update": 2.0},
        )
        # On disk as soon as `write` returns: a killed process loses nothing.
        line = (tmp_path / "new" / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(line) == {
        "iteration": 0,
        "loss": 0.5,
        "count": 3,
        "name": "é",
        "families": {"Eat": 0.25},
        "time": {"update": 2.0},
    }
    assert line.endswith("}\n") and line.count("\n") == 1


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"a": float("nan"), "b": [jnp.float32(jnp.inf), 1.0], "c": None})
    record = read_metrics(tmp_path)[0]
    assert (record["a"], record["b"], record["c"]) == (None, [None, 1.0], None)


@pytest.mark.parametrize(
    ("last_iteration", "kept"), [(None, []), (-1, []), (0, [0]), (2, [0, 1, 2]), (9, [0, 1, 2, 3])]
)
def test_resume_drops_the_lines_past_the_restored_iteration(tmp_path, last_iteration, kept):
    _write(tmp_path, range(4))
    with MetricsWriter(tmp_path, last_iteration=last_iteration) as writer:
        assert [record["iteration"] for record in read_metrics(tmp_path)] == kept
        writer.write(5, {"loss": 0.0})
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [*kept, 5]


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    _write(tmp_path / "straight", range(5))
    _write(tmp_path / "resumed", range(4))
    _write(tmp_path / "resumed", range(2, 5), last_iteration=1)
    assert (tmp_path / "straight" / "metrics.jsonl").read_bytes() == (
        tmp_path / "resumed" / "metrics.jsonl"
    ).read_bytes()


def test_a_torn_last_line_is_ignored_and_removed_on_resume(tmp_path):
    _write(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    # the second: whole, but for its newline
    for torn in (b'{"iteration":3,"lo', b'{"iteration":3}', '{"name":"é'.encode()[:-1]):
        path.write_bytes(whole + torn)
        assert [record["iteration"] for record in read_metrics(path)] == [0, 1, 2]
    _write(tmp_path, [3], last_iteration=5)
    assert [record["iteration"] for record in read_metrics(path)] == [0, 1, 2, 3]


def test_a_broken_line_before_the_last_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for broken in ("{", "[1]", '{"iteration":"x"}', ""):
        path.write_text(f'{{"iteration":0}}\n{broken}\n{{"iteration":2}}\n')
        with pytest.raises(ValueError, match="Line 2 of .*metrics.jsonl"):
            read_metrics(path)
        with pytest.raises(ValueError, match="Line 2"):
            MetricsWriter(tmp_path, last_iteration=5)
        assert path.read_text().count("\n") == 3  # left as it was


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_bad_values_are_named(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for key in ("iteration", "time"):
            with pytest.raises(ValueError, match=key):
                writer.write(0, {key: 1})
        with pytest.raises(ValueError, match="object"):
            writer.write(0, {"x": object()})
        with pytest.raises(ValueError, match="ndarray"):
            writer.write(0, {"x": np.zeros(2)})
    assert read_metrics(tmp_path) == []


def test_close_is_idempotent(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.close()
    writer.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorboardX
def test_tensorboard_gets_every_number_once_over_all_resumes(tmp_path):
    pytest.importorskip("tensorboardX")
    from ictjax.events import _events

    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5, "name": "x", "skipped": None}, time={"update": 1.0})
        writer.write(2, {"loss": 0.7})
    with MetricsWriter(tmp_path, last_iteration=1) as writer:
        writer.write(2, {"loss": 0.25})
    path = max((tmp_path / "tensorboard").iterdir())  # those before it are empty
    assert [
        (value.tag, event.step, value.simple_value)
        for event, _ in _events(path.read_bytes())
        for value in event.summary.value
    ] == [("loss", 1, 0.5), ("time/update", 1, 1.0), ("loss", 2, 0.25)]


def test_a_disk_that_is_full_leaves_whole_lines(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": 0.5})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _full)
            with pytest.raises(OSError, match=r"No space left on device: .*metrics.jsonl"):
                writer.write(1, {"loss": 0.5})
        writer.write(1, {"loss": 0.25})
    assert [record["loss"] for record in read_metrics(tmp_path)] == [0.5, 0.25]


def _full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "ictjax.events", raising=False)
    for name in ("tensorboardX", "tensorboardX.proto", "tensorboardX.record_writer"):
        monkeypatch.setitem(sys.modules, name, None)
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": 0.5})
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (['{"iteration":1}', '{"iteration":1}'], "Line 2 .* of iteration 1, which comes twice"),
        (['{"iteration":2}', '{"iteration":1}'], "Line 2 .* of iteration 1, which comes twice or"),
        (['{"iteration":true}'], "Line 1 .* not a metrics record"),
        (['{"iteration":' + "9" * 5000 + "}"], "Line 1 .* not a metrics record"),
        (["[" * 100_000], "Line 1 .* not a metrics record"),
        (["\0" * 9], "Line 1 .* not a metrics record"),
        (["null"], "Line 1 .* not a metrics record"),
    ],
)
def test_lines_that_a_writer_never_writes_are_named(tmp_path, lines, named):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    before = path.read_bytes()
    for reader in (read_metrics, lambda folder: MetricsWriter(folder, last_iteration=5)):
        with pytest.raises(ValueError, match=named):
            reader(tmp_path)
    assert path.read_bytes() == before


def test_a_hole_is_no_fault_of_the_file(tmp_path):
    _write(tmp_path, [1, 4])
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [1, 4]
