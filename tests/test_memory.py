"""What a run keeps in memory is compared with what is there, before it is allocated."""

import dataclasses

import pytest

from experiments import bench, generate, memory, play, train
from experiments.command import run_main
from experiments.console import Terminal
from experiments.evaluate import evaluate
from experiments.limits import check_limits
from experiments.memory import check_evaluation_memory, check_memory, free_bytes
from experiments.presets import PRESETS
from experiments.shapes import model_shape
from ictjax.models.cpu_kernels import switched_off
from tests.test_cli import refused

PRESET = PRESETS["fake-tiny"]
MEMINFO = "MemTotal: 900 kB\nMemAvailable:  300 kB\n"


def with_slots(num_slots, max_len):
    sizes = dataclasses.replace(PRESET.actor_sampler, num_slots=num_slots, max_len=max_len)
    return dataclasses.replace(PRESET, actor_sampler=sizes)


def test_a_preset_fits_and_its_parts_are_counted():
    check_memory(PRESET)
    kept = {use.what: use for use in memory.uses(PRESET)}
    trained = kept["trained weights"]
    assert trained.whole_bytes == 4 * trained.parameters == kept["first moments"].whole_bytes
    assert trained.device_bytes == trained.whole_bytes and trained.devices == 1


def test_pages_take_a_quarter_of_full_slots():
    config = PRESETS["qwen2.5-7b-minihack"]
    caches = [use for use in memory.uses(config) if use.kind == "cache"]
    assert [use.what for use in caches] == [
        "actor cache, 2048 pages x 128 tokens",
        "reflector cache, 1024 pages x 128 tokens",
    ]
    assert [use.whole_bytes for use in caches] == [2048 * 128 * 57_344, 1024 * 128 * 57_344]
    sizes = dataclasses.replace(config.actor_sampler, page_size=0)
    slots = dataclasses.replace(config, actor_sampler=sizes)
    (actor, _) = (use.whole_bytes for use in memory.uses(slots) if use.kind == "cache")
    assert actor == 4 * caches[0].whole_bytes


@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(page_size=128),
        dict(page_size=128, num_pages=4096),
        dict(page_size=128, max_len=65_536, num_slots=16),  # a copy has room for one, no more
    ],
    ids=["slots", "pages", "so many pages", "a conversation each"],
)
@pytest.mark.parametrize(("hosts", "copies"), [(2, 2), (4, 4), (4, 8), (16, 16)])
def test_a_device_holds_the_same_however_many_hosts_there_are(sizes, hosts, copies):
    paper = PRESETS["qwen2.5-7b-minihack"].actor_sampler
    whole = dataclasses.replace(paper, **(dict(page_size=0, row_buckets=(16,)) | sizes))
    own = whole.of_host(hosts)
    rows, positions = own.cache_rows(copies // hosts)
    assert (hosts * rows, positions) == whole.cache_rows(copies)
    for name, sizes_of in (("slots", lambda s: (s.num_slots,)), ("rows", lambda s: s.row_buckets)):
        assert [hosts * size for size in sizes_of(own)] == list(sizes_of(whole)), name
    assert whole.of_host(1) == whole


def test_slots_of_no_host_are_refused_with_their_number():
    sizes = PRESETS["qwen2.5-7b-minihack"].actor_sampler
    for changes, words in (
        (dict(num_slots=33), "num_slots = 33 .* by the 2 hosts, .* multiples of 2"),
        (dict(row_buckets=(16, 31)), "row_buckets = 16, 31 .* by the 2 hosts"),
        (dict(num_pages=4097), "num_pages = 4097 .* by the 2 hosts"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(sizes, **changes).of_host(2)


def test_moments_take_what_their_dtype_and_place_say():
    def moments(**changes):
        optimizer = dataclasses.replace(PRESET.optimizer, **changes)
        kept = memory.uses(dataclasses.replace(PRESET, optimizer=optimizer))
        return {use.what: use for use in kept if "moments" in use.what}

    wide, narrow, away = moments(), moments(moments="bfloat16"), moments(memory="host")
    for name, use in wide.items():
        assert narrow[name].whole_bytes * 2 == use.whole_bytes == use.device_bytes
        other = away[f"{name}, in the host's memory"]
        assert (other.whole_bytes, other.device_bytes) == (use.whole_bytes, 0)
        assert (use.host_bytes, other.host_bytes) == (0, use.device_bytes)


def test_what_does_not_fit_is_said_with_number_part_and_remedy(monkeypatch):
    message = r"take [\d,.]+ GiB and this machine has free [\d,.]+; .* actor cache.*num-slots"
    with pytest.raises(ValueError, match=message):
        check_memory(with_slots(60_000, 2**23))
    kept = *memory.uses(PRESET), *memory.packed_of_roles(PRESET)
    needed = sum(use.whole_bytes for use in kept)
    monkeypatch.setattr(memory, "device_bytes", lambda device: needed)
    check_memory(PRESET)
    monkeypatch.setattr(memory, "device_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match="take"):
        check_memory(PRESET)
    monkeypatch.setattr(memory, "device_bytes", lambda device: None)  # nobody knows
    check_memory(with_slots(60_000, 2**23))


def test_weights_that_are_packed_for_this_cpu_count_once_for_all_who_share_them():
    both = {use.what: use for use in memory.packed_of_roles(PRESET)}
    assert [*both] == [f"{role} weights, packed for this CPU" for role in ("actor", "reflector")], (
        "the reflector of this preset trains weights of its own"
    )
    size = 4 * model_shape(PRESET.actor).num_params
    assert both["actor weights, packed for this CPU"].whole_bytes == size
    shared = PRESETS["smollm2-minihack"]
    assert shared.actor.frozen_key == shared.reflector.frozen_key
    adapted = dataclasses.replace(
        PRESET.reflector, model=PRESET.actor.model, lora=shared.reflector.lora
    )
    together = dataclasses.replace(PRESET, reflector=adapted)
    assert [use.whole_bytes for use in memory.packed_of_roles(together)] == [size]
    mixed = dataclasses.replace(PRESET.actor, dtype="mixed")
    first, *_ = memory.packed_of_roles(dataclasses.replace(PRESET, actor=mixed))
    assert first.whole_bytes == size // 2
    with switched_off():
        assert not list(memory.packed_of_roles(PRESET))


def test_training_says_it_before_a_run_is_made(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda device: 1000)
    argv = ["--preset", "fake-tiny", "--run-dir", str(tmp_path / "run")]
    refused(capsys, train.main, argv, "GiB", "--check")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_keeps_no_optimizer_but_weights_before_and_after(monkeypatch):
    kept = {use.what: use.whole_bytes for use in memory.uses(PRESET)}
    packed = sum(use.whole_bytes for use in memory.packed_of_roles(PRESET))
    needed = sum(kept.values()) - kept["second moments"] + packed
    monkeypatch.setattr(memory, "device_bytes", lambda device: needed)
    check_evaluation_memory(PRESET)
    monkeypatch.setattr(memory, "device_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"^Weights and caches take .*\.$"):
        check_evaluation_memory(PRESET)


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        (bench, ["sampler", "--rows", "65536", "--prompt", "8000", "--turns", "1"]),
        (bench, ["rollout", "--preset", "fake-tiny", "--games", "1", "--decode-rows", "65536"]),
        (bench, ["update", "--groups", "65536", "--group-size", "65536"]),
        (bench, ["update", "--groups", "60000", "--against", "nothing", "--group-size", "60000"]),
        (bench, ["update", "--vocab-size", "16777216", "--groups", "1000"]),
        (generate, ["--model", PRESET.reflector.model, "--tokens", "1,2"]),
        (play, ["--env", "fake", "--family", "bell", "--model", PRESET.actor.model]),
    ],
)
def test_commands_say_what_exceeds_the_memory_before_they_take_it(
    module, argv, capsys, monkeypatch
):
    monkeypatch.setattr(memory, "device_bytes", lambda device: 2**10)
    refused(capsys, module.main, argv, "GiB", "this machine has free 0.0")


def test_evaluate_says_it_before_a_checkpoint_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="Weights and caches take"):
        evaluate(tmp_path, PRESET, Terminal())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "does not suffice:"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1234 bytes."), "(1234 bytes"),
        (RuntimeError("RESOURCE_EXHAUSTED: x"), "does not suffice:"),
    ],
)
def test_memory_that_ends_later_is_one_sentence_too(error, words, capsys):
    def body():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(body, "")
    assert ended.value.code == 1
    assert words in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="another fault"):
        run_main(_another_fault, "")


def _another_fault():
    raise RuntimeError("another fault")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((MEMINFO, "", "", ""), 300 * 1024),
        ((MEMINFO, "max\n", "5", ""), 300 * 1024),
        ((MEMINFO, "2000\n", "1500\n", ""), 500),
        ((MEMINFO, "2000\n", "1500\n", "anon 3\ninactive_file 100\n"), 600),
        (("", "", "", ""), None),
        (("MemAvailable: x kB\nMemAvailable:\n", "", "", ""), None),
    ],
)
def test_free_memory_is_what_the_machine_and_its_control_group_leave(files, expected):
    assert free_bytes(*files) == expected


def test_an_adapter_is_of_no_higher_rank_than_the_model_is_wide():
    lora = dataclasses.replace(PRESET.reflector.lora, rank=16_384)
    reflector = dataclasses.replace(PRESET.reflector, lora=lora)
    with pytest.raises(
        ValueError, match=r"reflector\.lora\.rank = 16384 exceeds the width of .*, "
    ):
        check_limits(dataclasses.replace(PRESET, reflector=reflector))
