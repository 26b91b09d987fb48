"""The hash of a model folder: equal wherever it lies, another where anything that is read differs."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from ictjax.models.hf import content, content_hash


@pytest.fixture(params=[10**9, 100], ids=["whole", "sampled"])
def folder(tmp_path, monkeypatch, request):
    monkeypatch.setattr(content, "_WHOLE", request.param)
    monkeypatch.setattr(content, "_NUM_PLACES", 2)
    monkeypatch.setattr(content, "_BLOCK", 16)
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(40).astype(np.float32) for name in "abcdefgh"}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("hello")
    return folder


def test_the_same_wherever_it_lies(folder, tmp_path):
    before = content_hash(folder)
    assert len(before) == 64 and before == content_hash(folder)
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / "README.md").write_text("not read")
    (copied / "original").mkdir()
    linked = tmp_path / "links"  # as in the cache of the hub
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert content_hash(copied) == content_hash(linked) == before


def _trained(folder):
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = bytes(byte ^ 1 for byte in data[start:])
    path.write_bytes(data)


def _one_tensor(folder):
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])["d"]["data_offsets"]
    data[8 + length + begin : 8 + length + end] = bytes(end - begin)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        _trained,
        _one_tensor,
        lambda folder: (folder / "chat_template.jinja").write_text("hullo"),
        lambda folder: (folder / "chat_template.jinja").write_text("hello "),
        lambda folder: (folder / "chat_template.jinja").rename(folder / "chat.jinja"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "generation_config.json").write_text("{}"),
        lambda folder: (folder / "model.safetensors").rename(folder / "adapter_model.safetensors"),
    ],
)
def test_another_where_anything_that_is_read_differs(folder, change):
    before = content_hash(folder)
    change(folder)
    assert content_hash(folder) != before


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"[" * 10_000,
        b'{"a": {"data_offsets": [1' + b"0" * 400 + b"]}}",
        b'{"a": {"data_offsets": [-1e999]}}',
    ],
    ids=["none", "list", "nested", "far", "infinite"],
)
@pytest.mark.parametrize("size", [None, 2**63])
def test_a_damaged_file_has_a_hash_too(folder, header, size):
    head = (len(header) if size is None else size).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(head + header + bytes(200))
    assert len(content_hash(folder)) == 64


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="missing.* cannot be read .*: give a folder"):
        content_hash(tmp_path / "missing")
