"""What a plan says: machines by name, counted work, memory of compiled programs, and a clear no."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

import experiments.places
import experiments.plan
from experiments import plan_run
from experiments.assumptions import Assumptions
from experiments.commands import plan as command
from experiments.commands import train
from experiments.compiled_cache import FOLDER
from experiments.console import Terminal
from experiments.estimate import Times, Work, episodes_per_iteration, times, update_passes, work
from experiments.gpu_targets import compiler_is_here
from experiments.hlo import Traffic, traffic
from experiments.kept_figures import Compiled, kept_figures
from experiments.limits import check_idle, check_limits, check_meshes, local_roles
from experiments.machines import GPU_SHARE, GPUS, TPUS, machine
from experiments.memory import trained_shapes, uses, written_checkpoint
from experiments.plan import Place, Planner, compile_program, whole_run
from experiments.plan_changes import Change, single_changes
from experiments.plan_page import show, to_json, verdict
from experiments.plan_programs import Program, mesh_on, num_programs
from experiments.presets import PRESETS, on_named_mesh
from experiments.shapes import model_shape
from ictjax.config import MESHES, LoraConfig, MeshConfig, RoleMeshes
from ictjax.sampler import row_programs, turn_shapes
from tests.test_cli import refused

pytestmark = pytest.mark.usefixtures("optimised")

ROOT = pathlib.Path(__file__).parent.parent
TINY = PRESETS["fake-tiny"]
PAPER_7B = PRESETS["qwen2.5-7b-minihack"]
LORA_7B = PRESETS["qwen2.5-7b-lora"]

FIGURES = Compiled(
    argument_bytes=2**30,
    output_bytes=0,
    temporary_bytes=2**29,
    flops=1e9,
    sent_bytes=0,
    loops_once=0,
    refused=False,
)


PROGRAM = Program("update", "", (), lambda: None, frozenset(), frozenset())


def place(num_bytes, chip=None, count=1):
    return Place(name="here", devices=jax.devices()[:count], device_bytes=num_bytes, chip=chip)


@pytest.mark.parametrize(
    ("name", "topology", "count", "mesh"),
    [
        ("v5e:2x4", "v5e:2x4", 8, "v5e-8"),
        ("v5e-16", "v5e:4x4", 16, "v5e-16"),
        ("v5p-8", "v5p:2x2x1", 4, "v5p-8"),
        ("V6E-1", "v6e:1x1", 1, "v6e-1"),
        ("8xh100-80gb", "", 8, "h100-8"),
        ("a100-40gb", "", 1, "a100"),
    ],
)
def test_machines_have_the_devices_of_their_names(name, topology, count, mesh):
    found = machine(name)
    assert (found.topology, found.count, found.mesh) == (topology, count, mesh)
    assert MESHES[mesh].reflector.num_devices == count


@pytest.mark.parametrize(
    ("name", "hosts"),
    [("v5e-8", 1), ("v5e-16", 4), ("v6e-8", 1), ("v5p-8", 1), ("v5p-16", 2), ("8xh100-80gb", 1)],
)
def test_machines_are_of_so_many_hosts(name, hosts):
    assert machine(name).hosts == hosts


def test_every_gpu_is_described_to_its_compiler():
    for kind in GPUS:
        described, chip = machine(f"8x{kind}").target, GPUS[kind]
        assert f"memory_bandwidth: {chip.bandwidth:.0f}\n" in described
        assert f"device_memory_size: {chip.memory_bytes / GPU_SHARE:.0f}"[:-2] in described
        assert described.count("{") == described.count("}") == 2
    assert not machine("v5e-1").target


def test_every_named_mesh_is_of_a_machine():
    for name in MESHES:
        kind, _, count = name.partition("-")
        if kind in TPUS:
            assert machine(name).mesh == name
        else:
            assert any(gpu.startswith(kind) for gpu in GPUS) and count in ("", "8")


def test_an_unknown_machine_is_refused_with_the_nearest(capsys):
    for given, words in (("v5e:2x3", "v5e:2x2"), ("h101-80gb", "h100-80gb"), ("0xh200", "h200")):
        argv = ["--preset", "fake-tiny", "--topology", given]
        refused(capsys, command.main, argv, repr(given), words)


def test_the_compiler_that_is_not_installed_is_named(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    argv = ["--preset", "fake-tiny", "--topology", "v5e-1"]
    refused(capsys, command.main, argv, "libtpu", "extra `plan`")


def test_too_few_and_idle_devices_are_refused():
    eight = on_named_mesh(TINY, "v5e-8").with_slots(4, 4)
    with pytest.raises(ValueError, match="does not use all 4 devices: .*--actor.mesh.*--mesh NAME"):
        Planner(place(2**40, count=4)).plan(eight, Assumptions())
    with pytest.raises(ValueError, match="uses 1 of the 8 devices.*--mesh.*or say --even-so"):
        check_idle(TINY, jax.devices(), even_so=False)
    four = on_named_mesh(TINY, "v5e-4").with_slots(4, 4)
    with pytest.raises(ValueError, match=r"uses 4 of the 8 devices.*--actor.mesh.\*\)\.$"):
        check_idle(four, jax.devices(), even_so=False)
    check_idle(TINY, jax.devices(), even_so=True)
    check_idle(TINY, jax.devices()[:1], even_so=False)


HLO = """HloModule jit_f

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = f32[4]{0} get-tuple-element(%p), index=1
  ROOT %r = f32[4]{0} all-reduce(%g), replica_groups=[2,4]<=[8], to_apply=%add
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(28)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%unknown (p: (s32[], f32[4])) -> pred[] {
  ROOT %c = pred[] compare(%i, %m), direction=LT
}

ENTRY %main (a: bf16[8]) -> bf16[16] {
  %w = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body
  %v = (s32[], f32[4]{0}) while(%t), condition=%unknown, body=%body
  %s = (bf16[8]{0}, bf16[16]{0}) all-gather-start(%a), replica_groups={{0,1},{2,3}}, dimensions={0}
  %p = bf16[16]{0} collective-permute(%a), source_target_pairs={{0,1}}
  %x = bf16[4]{0} reduce-scatter(%a), replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %d = bf16[16]{0} all-gather-done(%s)
}
"""


def test_traffic_is_that_of_every_round_of_a_loop():
    reduced = 2 * 16 * 3 // 4  # of four devices, there and back, three quarters of 4 float32
    gathered, permuted, scattered = 32 // 2, 32, 8
    assert traffic(HLO) == Traffic(28 * reduced + reduced + gathered + permuted + scattered, 1)
    assert traffic("") == Traffic(0, 0)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("[2,4]<=[8]", 4),
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("mesh['axis_0'=16,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=16,'axis_1'=4] {'axis_0'}", 16),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=8] {'a','b':(2)2}", 4),
        ("mesh['a'=2,'b'=4, device_ids=([4,2]T(1,0))] {'b'}", 4),
    ],
)
def test_devices_that_take_part_together_are_counted_however_they_are_written(groups, size):
    line = f"  ROOT %r = bf16[8]{{0}} all-gather(%a), replica_groups={groups}, dimensions={{0}}"
    text = "\n".join(["ENTRY %main (a: bf16[8]) -> bf16[8] {", line, "}"])
    assert traffic(text).sent == 16 * (size - 1) // size


def test_work_is_counted_from_shapes():
    assert update_passes(PAPER_7B) == 2 + 2 + 2 + 2 + 2  # forward twice, backward, reference
    assert update_passes(LORA_7B) == 2 + 2 + 2 + 2
    assert update_passes(dataclasses.replace(LORA_7B, remat="none")) == 2 + 2 + 2
    assert episodes_per_iteration(PAPER_7B) == 8 * 8 * 5  # replayed; contexts are there before
    assert episodes_per_iteration(TINY) == 2 * 4 * (2 + 2) + 2 * 2
    phases = {one.phase: one for one in work(PAPER_7B, Assumptions(turns=10, reply_tokens=50))}
    assert phases["actor decode"].tokens == 320 * 10 * 50
    assert phases["update"].tokens == 8 * 47_104
    weights = 7_615_616_512 - 152_064 * 3584
    assert phases["actor decode"].flops > 2 * weights * 320 * 10 * 50
    # every step reads the weights, and of 32 conversations the pages of 800 + 10 x 250 tokens
    read = 2 * 7_615_616_512 + 32 * 26 * 128 * 57_344
    assert phases["actor decode"].device_bytes == pytest.approx(320 * 10 * 50 / 32 * read, rel=1e-3)
    chip = TPUS["v5e"]
    one = Work("x", 1, flops=chip.flops * 8, device_bytes=chip.bandwidth * 3, runs=1)
    assumed = Assumptions(compute_efficiency=0.5, bandwidth_efficiency=0.5)
    sent = int(chip.interconnect)
    assert times(one, chip, 8, sent, assumed) == pytest.approx((2, 6, 2))
    assert times(one, chip, 2, 5 * sent, assumed) == pytest.approx((8, 6, 10))
    for parts, seconds, limit in (
        ((2, 6, 2), 8, "memory"),
        ((8, 6, 2), 10, "products"),
        ((8, 6, 10), 18, "interconnect"),
    ):
        assert (Times(*parts).seconds, Times(*parts).limit) == (seconds, limit)


@pytest.fixture(scope="module")
def planner():
    return Planner(place(2**40, TPUS["v5e"]))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            dict(tensor=8),
            r"tensor = 8 does not divide num_heads = 28 of Qwen\S+, .* --actor\.mesh\.tensor 4\.",
        ),
        (dict(tensor=7), "tensor = 7 does not divide d_ff = 18944 .*tensor 4"),
        (dict(tensor=3), "tensor = 3 does not divide num_heads = 28 and d_ff = .*tensor 2 or 4"),
        (dict(fsdp=3), "fsdp = 3 does not divide d_model = 3584 .*fsdp 2 or 4"),
        (dict(fsdp=1000), "fsdp = 1000 .*fsdp 896 or 1792"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_with_the_nearest_that_does(mesh, message):
    sizes = MeshConfig(**mesh)
    config = dataclasses.replace(PAPER_7B, actor=dataclasses.replace(PAPER_7B.actor, mesh=sizes))
    with pytest.raises(ValueError, match=f"^actor.mesh.{message}"):
        check_limits(config)
    assert Planner(place(None)).changes(PAPER_7B, [Change("mesh", "", config)], print) == []


def test_a_mesh_that_divides_the_model_is_taken_and_small_models_are_on_any():
    for size in (2, 4):
        sizes = MeshConfig(tensor=size)
        check_limits(PAPER_7B.on_mesh(RoleMeshes(actor=sizes, reflector=sizes)))
        check_limits(TINY.on_mesh(RoleMeshes(actor=sizes, reflector=sizes)))  # one head, and small


def test_a_plan_of_the_pipeline_check(planner):
    plan = planner.plan(TINY, Assumptions())
    assert plan.fits and plan.num_programs == num_programs(TINY) == 7
    phases = {phase.name: phase for phase in plan.phases}
    assert {"restore", "hand-over", "update", "actor prefill", "reflector decode"} <= phases.keys()
    update = phases["update"]
    trained = next(use.device_bytes for use in plan.uses if use.what == "trained weights")
    assert (update.gradients, update.optimizer) == (trained, 2 * trained)
    assert update.total == plan.needed > sum(use.device_bytes for use in plan.uses)
    parts = update.weights + update.optimizer + update.gradients + update.cache
    assert update.total == parts + update.temporaries
    slow = dataclasses.replace(Assumptions(), host_gb_per_second=2.0)
    whole = whole_run(TINY, plan, slow)
    assert whole.episodes == 3 * 36 and whole.checkpoint_bytes == 3 * trained
    assert whole.checkpoint_seconds == pytest.approx(3 * trained / 2e9)
    rarely = dataclasses.replace(TINY, checkpoint_every=3)
    share = whole.checkpoint_seconds / (whole.checkpoint_seconds + 3 * whole.seconds_per_iteration)
    assert whole_run(rarely, plan, slow).checkpoint_share == pytest.approx(share)
    record = json.loads(json.dumps(to_json(plan, TINY, Assumptions(), [])))
    assert record["fits"] and record["run"]["hours"] == pytest.approx(whole.hours)
    timed = [phase for phase in record["phases"] if phase["limited_by"]]
    assert len(timed) == 5
    for phase in timed:
        parts = phase["seconds_by_part"]
        assert parts[phase["limited_by"]] == max(parts.values())
        of_phase = max(parts["products"], parts["memory"]) + parts["interconnect"]
        assert phase["seconds_per_iteration"] == of_phase
    console = Terminal(width=80)
    with console.capture() as captured:
        show(plan, TINY, Assumptions(), console)
    text = captured.get()
    assert phases["update"].times.limit in text and max(map(len, text.splitlines())) <= 80
    assert "counts once" not in text
    looping = update._replace(compiled=dataclasses.replace(update.compiled, loops_once=2))
    with console.capture() as captured:
        show(dataclasses.replace(plan, phases=(looping,)), TINY, Assumptions(), console)
    assert "counts once (2 in update)" in " ".join(captured.get().split())


def test_changes_are_those_that_fit_when_they_are_compiled(planner):
    plan = planner.plan(TINY, Assumptions())
    tight = plan.needed - 1
    small = Planner(place(tight))
    small._compiled = planner._compiled
    refused_plan = small.plan(TINY, Assumptions())
    assert not refused_plan.fits
    found = []
    tried = [change for change in single_changes(TINY, 1, 1) if change.field in ("slots", "remat")]
    changes = small.changes(TINY, tried, found.append)
    assert found == changes and changes
    for change in changes:
        assert small.plan(change.config, Assumptions()).needed <= tight


def test_what_is_kept_alone_may_be_too_much():
    plan = Planner(place(2**34)).plan(PAPER_7B, Assumptions())
    assert not plan.fits and not plan.phases  # nothing was compiled
    changes = list(single_changes(PAPER_7B, 8, 1))
    fields = {change.field for change in changes}
    assert fields == {"mesh", "moments", "slots", "pages", "prefill", "int8", "LoRA", "context"}
    rounded = [change for change in changes if change.field == "int8"]
    assert [change.flags for change in rounded] == [
        "--actor-sampler.cache int8",
        "--actor.weights int8",
    ]
    now, cache, weights = (
        sum(use.device_bytes for use in uses(config))
        for config in (PAPER_7B, *(change.config for change in rounded))
    )
    assert cache < now < weights  # which are a copy beside those that both roles share
    pocket = {change.flags for change in single_changes(PRESETS["pocket-minihack"], 1, 1)}
    assert {"--remat full", "--learner.num-microbatches 8"} <= pocket


def test_fewer_pages_are_one_change_of_both_samplers():
    def caches(config):
        return sum(use.device_bytes for use in uses(config) if use.kind == "cache")

    def pages(config):
        return [change for change in single_changes(config, 8, 1) if change.field == "pages"]

    half, quarter = pages(PAPER_7B)
    assert half.flags == "--actor-sampler.num-pages 1024 --reflector-sampler.num-pages 512"
    assert 4 * caches(quarter.config) == 2 * caches(half.config) == caches(PAPER_7B)
    # the longest conversation of each of two copies has 256 pages, and there are no fewer
    (spread,) = pages(on_named_mesh(half.config, "v5e-8"))
    assert spread.flags == "--actor-sampler.num-pages 512 --reflector-sampler.num-pages 512"
    check_limits(spread.config)
    assert not pages(spread.config)
    assert not pages(TINY)  # whose cache is of slots


def test_moments_in_the_memory_of_the_host_have_to_fit_there(monkeypatch):
    monkeypatch.delenv(FOLDER)
    monkeypatch.setattr(experiments.plan, "compile_program", lambda program: FIGURES)
    optimizer = dataclasses.replace(TINY.optimizer, memory="host")
    away = dataclasses.replace(TINY, optimizer=optimizer)
    room = dataclasses.replace(place(2**40, TPUS["v5e"]), host_bytes=2**40)
    plan = Planner(room).plan(away, Assumptions())
    (saved,) = (use.host_bytes for use in plan.uses if use.kind == "checkpoint")
    assert plan.fits and plan.host_needed - saved == sum(
        use.whole_bytes for use in plan.uses if use.kind == "optimizer"
    )
    tight = dataclasses.replace(room, host_bytes=plan.host_needed - 1)
    assert Planner(tight).plan(TINY, Assumptions()).fits
    refused_plan = Planner(tight).plan(away, Assumptions())
    assert not refused_plan.fits and not Planner(tight).fits(away)
    said = verdict(refused_plan)
    assert "the host holds the optimizer and a copy of each" in said and "--optimizer.mom" in said
    unknown = dataclasses.replace(room, host_bytes=None)
    assert Planner(unknown).plan(away, Assumptions()).fits


@pytest.mark.parametrize("count", [1, 8])
def test_a_host_holds_a_copy_of_each_checkpoint_until_it_is_written(monkeypatch, count):
    monkeypatch.delenv(FOLDER)
    monkeypatch.setattr(experiments.plan, "run_programs", lambda *_: ())
    config = TINY if count == 1 else on_named_mesh(TINY, "v5e-8").with_slots(8, 8)
    room = dataclasses.replace(place(2**40, count=count), host_bytes=2**40)
    plan = Planner(room).plan(config, Assumptions())
    (parameters,) = (use.parameters for use in plan.uses if use.what == "trained weights")
    *_, saved = plan.uses
    whole = 3 * 4 * parameters  # float32, with two moments
    assert (saved.whole_bytes, saved.device_bytes) == (whole, 0)
    # the copy, and as much of it that is packed, shared by the devices
    assert saved.host_bytes == plan.host_needed == 2 * whole // count
    console = Terminal(quiet=False)
    with console.capture() as captured:
        show(plan, config, Assumptions(), console)
    assert "a checkpoint being written" in " ".join(captured.get().split())
    tight = dataclasses.replace(room, host_bytes=plan.host_needed - 1)
    assert Planner(room).fits(config) and not Planner(tight).fits(config)
    refused_plan = Planner(tight).plan(config, Assumptions())
    assert "the host holds a copy of each checkpoint until" in verdict(refused_plan)
    # a CPU's devices are in that memory too
    held = sum(use.device_bytes for use in plan.uses) + plan.host_needed
    for more, fits in ((0, True), (-1, False)):
        cpu = dataclasses.replace(room, host_bytes=held + more, one_memory=True)
        assert Planner(cpu).fits(config) == Planner(cpu).plan(config, Assumptions()).fits == fits
    said = verdict(Planner(cpu).plan(config, Assumptions()))
    assert "the host holds a copy of each checkpoint until" in said and "of the run" in said
    # which the run alone exceeds: it is to blame then, not its checkpoint
    less = held - plan.host_needed - 1
    full = dataclasses.replace(cpu, device_bytes=less, host_bytes=less)
    said = verdict(Planner(full).plan(config, Assumptions()))
    assert "weights, optimizer and caches alone take" in said and "checkpoint" not in said


def test_a_host_holds_pages_of_suspended_conversations(monkeypatch):
    monkeypatch.setattr(experiments.plan, "run_programs", lambda *_: ())
    waiting = {use.what: use for use in uses(PAPER_7B) if use.kind == "suspended"}
    assert {what: use.whole_bytes for what, use in waiting.items()} == {
        "actor pages of suspended conversations, at most 6144": 6144 * 128 * 57_344,
        "reflector pages of suspended conversations, at most 3072": 3072 * 128 * 57_344,
    }
    assert all(use.device_bytes == 0 for use in waiting.values())
    eight = on_named_mesh(PAPER_7B, "v5e-8")  # the same pages, a share of them for each device
    assert sum(8 * use.host_bytes for use in uses(eight) if use.kind == "suspended") == sum(
        use.host_bytes for use in waiting.values()
    )
    full = dataclasses.replace(PAPER_7B.actor_sampler, num_pages=32 * 256)
    for config in (TINY, dataclasses.replace(PAPER_7B, actor_sampler=full)):
        assert not [use for use in uses(config) if use.what.startswith("actor pages")]
    room = dataclasses.replace(place(2**40), host_bytes=2**40)
    plan = Planner(room).plan(PAPER_7B, Assumptions())
    (saved,) = (use.host_bytes for use in plan.uses if use.kind == "checkpoint")
    assert plan.fits and plan.host_needed - saved == plan.suspended == 63 * 2**30
    console = Terminal(quiet=False)
    with console.capture() as captured:
        show(plan, PAPER_7B, Assumptions(), console)
    said = " ".join(captured.get().split())
    assert "Up to 63.00 of these are pages of suspended conversations." in said
    tight = dataclasses.replace(room, host_bytes=plan.host_needed - 1)
    said = verdict(Planner(tight).plan(PAPER_7B, Assumptions()))
    assert "up to 63.0 GiB of it are pages of suspended" in said
    assert "fewer num-slots or more num-pages (--actor-sampler.*" in said
    assert not Planner(tight).fits(PAPER_7B)


def test_of_an_adapter_little_is_saved():
    adapter, whole = map(written_checkpoint, (LORA_7B, PAPER_7B))
    assert adapter.host_bytes == 2 * adapter.whole_bytes // adapter.devices
    assert 1.7 < adapter.whole_bytes / 2**30 < 1.9 and 84 < whole.whole_bytes / 2**30 < 86


def test_the_first_host_of_a_run_at_an_address_holds_whole_checkpoints(monkeypatch):
    monkeypatch.setattr(experiments.plan, "run_programs", lambda *_: ())
    eight = on_named_mesh(TINY, "v5e-8").with_slots(8, 8)
    mesh = eight.reflector.mesh
    folder = dataclasses.replace(place(2**40, count=8), hosts=2, host_bytes=2**40)
    address = dataclasses.replace(folder, own_copies=True)
    each = Planner(folder).plan(eight, Assumptions())
    plan = Planner(address).plan(eight, Assumptions())
    *others, saved = plan.uses
    assert tuple(others) == each.uses[:-1] and plan.gathers and not each.gathers
    parts = {use.what: use for use in others}
    whole = sum(
        parts[name].whole_bytes for name in ("trained weights", "first moments", "second moments")
    )
    assert saved.whole_bytes == whole == 3 * 4 * parts["trained weights"].parameters
    # of which, twice, each of its four devices counts a quarter; of its own part half as much
    assert saved.host_bytes == plan.host_needed == 2 * whole // 4 == 2 * each.host_needed
    shapes, _ = trained_shapes(eight, model_shape(eight.reflector))
    largest = 4 * max(leaf.size for leaf in jax.tree.leaves(shapes))
    assert largest // (mesh.fsdp * mesh.tensor) <= saved.device_bytes <= largest
    tight = dataclasses.replace(address, host_bytes=plan.host_needed - 1)
    assert Planner(dataclasses.replace(folder, host_bytes=plan.host_needed - 1)).fits(eight)
    assert not Planner(tight).fits(eight)
    said = verdict(Planner(tight).plan(eight, Assumptions()))
    assert (
        "the first host holds whole checkpoints" in said and "a folder that all hosts see" in said
    )
    for where, words in (
        (address, "first of the 2 hosts is sent all of each checkpoint"),
        (folder, "at an address the first one holds all"),
    ):
        console = Terminal(quiet=False)
        with console.capture() as captured:
            show(Planner(where).plan(eight, Assumptions()), eight, Assumptions(), console)
        assert words in " ".join(captured.get().split())
    # one host has nothing to gather
    alone = dataclasses.replace(place(2**40), own_copies=True)
    assert not Planner(alone).plan(TINY, Assumptions()).gathers


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of another host."""

    id: int
    process_index: int
    device_kind: str = "cpu"
    platform: str = "cpu"


CHIPS = [Chip(number, number // 2 % 2) for number in range(8)]  # those of two hosts, in turns


@pytest.mark.parametrize("name", ["actor", "reflector"])
@pytest.mark.parametrize("room", [2**40, 1])  # what has no room is not compiled
def test_a_mesh_that_several_hosts_cannot_start_is_refused_as_training_does(name, room):
    config = on_named_mesh(TINY, "v5e-8")
    mesh = MeshConfig(fsdp=2, tensor=4)
    config = dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), mesh=mesh)}
    )
    two = Planner(dataclasses.replace(place(room, count=8), hosts=2))
    for ask in (lambda: two.plan(config, Assumptions()), lambda: two.fits(config)):
        with pytest.raises(ValueError) as error:
            ask()
        assert str(error.value) == (
            "mesh data=1 is not a multiple of the 2 hosts, each of which samples with copies of its"
            " own: make it one, and fsdp x tensor at most the devices of a host"
            f" (--{name}.mesh.*, or --mesh NAME)."
        )
    check_meshes(config, 8, 1)  # eight GPUs are one host


def test_programs_lie_on_the_hosts_one_after_the_other():
    mesh = mesh_on(CHIPS, MeshConfig(data=2, tensor=4), 2)
    assert [[chip.id for chip in copy.flat] for copy in mesh.devices] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
    ]


def test_figures_of_several_hosts_are_not_those_of_one(monkeypatch):
    config, asked = on_named_mesh(TINY, "v5e-8").with_slots(8, 8), []
    monkeypatch.setattr(
        experiments.plan, "run_programs", lambda *words: asked.append(words[2]) or [PROGRAM]
    )
    monkeypatch.setattr(
        experiments.plan, "kept_figures", lambda *words: asked.append(words[1]) or FIGURES
    )
    for hosts in (1, 2):
        Planner(dataclasses.replace(place(2**40, count=8), hosts=hosts)).plan(config, Assumptions())
    assert asked == [1, "here", 2, "here of 2 hosts"]


@pytest.mark.parametrize(("devices", "hosts"), [(16, 4), (64, 16), (8, 2), (8, 1)])
def test_other_meshes_are_those_that_start_on_so_many_hosts(devices, hosts):
    config = on_named_mesh(LORA_7B, "v5e-16") if devices == 16 else LORA_7B
    meshes = [
        change.config.reflector.mesh
        for change in single_changes(config, devices, hosts)
        if change.field == "mesh"
    ]
    assert meshes
    for mesh in meshes:
        assert mesh.num_devices == devices and mesh.data % hosts == 0


@pytest.mark.parametrize("actor", [[], ["--actor.mesh.data=8", "--actor.mesh.tensor=2"]])
def test_a_change_of_the_mesh_names_the_rows_and_parts_that_go_with_it(actor):
    """Of each role what it is, whatever mesh the other one has."""
    flags = ["--preset", "qwen2.5-14b-lora", "--mesh", "v5e-16", *actor]
    config = train.read_args(flags)[0].settings
    named = 0
    for change in single_changes(config, 16, 4):
        if change.field == "mesh":
            changed = train.read_args([*flags, *change.flags.split()])[0].settings
            assert changed == change.config
            named += "--learner.num-microbatches" in change.flags
    assert named


def test_the_memory_of_a_device_is_that_of_one_of_this_host(monkeypatch):
    class Gpu:
        platform = "gpu"
        device_kind = "NVIDIA L4"

        def memory_stats(self):
            if self is gpus[0]:
                raise RuntimeError("MemoryStats is only supported for addressable PjRt devices.")
            return {"bytes_limit": 7}

    gpus = [Gpu(), Gpu()]
    monkeypatch.setattr(jax, "devices", lambda: gpus)
    monkeypatch.setattr(jax, "local_devices", lambda: gpus[1:])
    here = experiments.places.place_of(None)
    assert (here.device_bytes, here.devices) == (7, gpus)


def test_a_plan_knows_an_address(monkeypatch):
    asked = []
    monkeypatch.setattr(plan_run, "check", lambda *_, own_copies, **__: asked.append(own_copies))
    for more in ([], ["--run-dir=runs/a"], ["--run-dir=gs://bucket/runs/a"]):
        command.main(["--preset", "fake-tiny", *more])
    assert asked == [False, False, True]


def test_check_says_no_with_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(plan_run, "place_of", lambda machine, **_: place(1000))
    with pytest.raises(SystemExit) as ended:
        train.main(["--preset", "fake-tiny", "--check"])
    text = capsys.readouterr().out
    assert ended.value.code == 1
    assert "It does not fit" in text and "none of those tried" in text


def test_a_run_is_not_begun_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(plan_run, "place_of", lambda machine, **_: place(1000))
    plan_run.check_plan(TINY)  # small models are left to check_memory
    monkeypatch.setattr(plan_run, "SMALL", 0)
    with pytest.raises(ValueError, match="does not fit the devices here: .* --even-so"):
        plan_run.check_plan(TINY)


def test_a_gpu_is_an_estimate_and_says_so(capsys, monkeypatch):
    monkeypatch.delenv(FOLDER)
    monkeypatch.setattr(experiments.plan, "compile_program", lambda program: FIGURES)
    monkeypatch.setattr(experiments.places, "compiler_is_here", lambda: False)
    plan_run.check(TINY, Terminal(width=80), machine=machine("l4"))
    text = capsys.readouterr().out
    assert "An estimate: " in text and "plan-gpu" in text and "It fits" in text
    assert max(map(len, text.splitlines())) <= 80


def _by_kernels(name):
    """The tiny run, its update and its actor's pages by kernels of this name."""
    pages = dataclasses.replace(TINY.actor_sampler, page_size=128, attention=name)
    learner = dataclasses.replace(TINY.learner, attention=name)
    return dataclasses.replace(TINY, learner=learner), dataclasses.replace(
        TINY, actor_sampler=pages
    )


def test_kernels_are_refused_before_a_program_is_compiled_and_left_out_of_estimates(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        experiments.plan, "compile_program", lambda program: compiled.append(program) or FIGURES
    )
    for name in ("pallas_tpu", "pallas_gpu"):
        for config in _by_kernels(name):
            with pytest.raises(ValueError, match=f"attention .*{name}', and .* runs on cpu"):
                Planner(place(2**40)).plan(config, Assumptions())
    assert not compiled
    estimate = dataclasses.replace(place(2**40), estimated_on="CPU")
    for config in _by_kernels("pallas_gpu"):
        assert Planner(estimate).plan(config, Assumptions()).fits
    assert compiled


NO_TPU_COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the compiler for TPUs is not installed (the extra `plan`)",
)
NO_GPU_COMPILER = pytest.mark.skipif(
    not compiler_is_here(),
    reason="the compiler for GPUs is not installed (the extra `plan-gpu`)",
)


SIXTEEN = [  # rows for as many hosts
    f"--{role}-sampler.{flag}=16"
    for role in ("actor", "reflector")
    for flag in ("num-slots", "row-buckets")
]


@pytest.mark.parametrize(
    ("topology", "count", "more"),
    [
        pytest.param("v5e:2x2", 4, [], marks=NO_TPU_COMPILER),
        pytest.param("v6e:2x2", 4, [], marks=NO_TPU_COMPILER),
        # sixteen hosts, to which not every order of the chips gives a way to send anything
        pytest.param("v5e-64", 64, SIXTEEN, marks=NO_TPU_COMPILER),
        pytest.param("v5e:2x2", 4, ["--optimizer.memory=host"], marks=NO_TPU_COMPILER),
        pytest.param("v5e:2x2", 4, ["--remat=attention"], marks=NO_TPU_COMPILER),
        pytest.param("8xh100-80gb", 8, [], marks=NO_GPU_COMPILER),
    ],
)
def test_programs_compile_for_devices_that_are_not_here(topology, count, more):
    argv = ["--preset", "fake-tiny", "--topology", topology, "--json", *more]
    argv += ["--actor-sampler.page-size", "128"]  # as the large presets: with kernels on TPU
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "plan", *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    record = json.loads(done.stdout)
    assert record["fits"] and record["estimated_on"] == ""
    sent = {phase["phase"]: phase["interconnect_bytes_per_run"] for phase in record["phases"]}
    assert record["devices"] == count and sent["update"] > 0


@NO_TPU_COMPILER
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_a_decode_step_moves_little_more_than_weights_and_cache(topology):
    """Of Qwen2.5-7B on four chips at 64 rows of 2,048 positions at most 1.15 times. Two of its
    layers are compiled, and all that is moved beside the weights of the head counts as theirs.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.decode_bytes", topology],
        # compiled as users' are, see conftest.py
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    width, heads, kv = 3584, 28 * 128, 4 * 128  # a weight, a key and a value take 2 bytes
    layer = 2 * (2 * width * (heads + kv) + 3 * width * 18_944 + 2 * kv * 64 * 2048) / 4
    head = 2 * width * 152_064 / 4
    assert 1 <= (int(done.stdout) - head) / (2 * layer) <= 1.15


def test_figures_are_kept_until_the_program_changes(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    asked = []

    def figures_of(add, machine="here"):
        def compile_it(lowered):
            asked.append(add)
            return compile_program(lowered)

        lowered = jax.jit(lambda x: x + add).lower(1.0)
        return kept_figures(lowered, machine, jax.devices()[0], compile_it)

    first = figures_of(1.0)
    assert figures_of(1.0) == first and asked == [1.0]
    figures_of(2.0)
    assert asked == [1.0, 2.0]
    figures_of(2.0, "elsewhere")
    assert asked.pop() == 2.0 and asked == [1.0, 2.0]
    for path in tmp_path.glob("figures/*.json"):
        path.write_text("{")  # cut off
    assert figures_of(1.0) == first and asked == [1.0, 2.0, 1.0]


def test_large_presets_compile_few_programs():
    for name, config in PRESETS.items():
        if name.startswith(("qwen", "paper")):
            assert num_programs(config) <= 12, name
            for _, _, sizes in local_roles(config):
                assert len(list(turn_shapes(sizes))) + len(row_programs(sizes)) <= 8, name


def test_the_page_on_performance_counts_the_programs_of_each_role():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    roles = {
        (name.partition("-")[0], role): len(list(turn_shapes(sizes))) + len(row_programs(sizes))
        for name, config in PRESETS.items()
        for role, _, sizes in local_roles(config)
    }
    for name in ("pocket", "smollm2"):
        for role in ("actor", "reflector"):
            assert f"| `{name}-*`, {role} | {roles[name, role]} |" in page
    large = {
        count for (name, _), count in roles.items() if name not in ("fake", "pocket", "smollm2")
    }
    assert large == {5} and "| presets of large models, each role | 5 |" in page


def test_rows_are_filled_up_for_many_devices():
    meshes = RoleMeshes(actor=MeshConfig(data=3, tensor=2), reflector=MeshConfig(data=3, tensor=2))
    spread = PAPER_7B.on_mesh(meshes)
    assert (spread.batch.num_rows, spread.learner.num_microbatches) == (9, 3)
    many = PAPER_7B.on_mesh(MESHES["v5e-64"])
    assert (many.batch.num_rows, many.learner.num_microbatches) == (16, 1)
    assert PAPER_7B.on_mesh(MESHES["v5p-8"]).batch == PAPER_7B.batch


def test_one_number_sets_every_length():
    config = PAPER_7B.with_context(16_384)
    assert config.reflection.max_context_tokens == 14_336
    assert config.actor_sampler.max_len == config.reflector_sampler.max_len == 16_384
    assert config.batch.token_buckets == (24_576, 14_336 + 8 * 2048)
    args, _ = train.read_args(["--preset", "qwen2.5-7b-minihack", "--context", "16384"])
    assert args.settings == config
    with pytest.raises(ValueError, match="leaves no room"):
        PAPER_7B.with_context(2048)


def test_the_base_is_counted_once_where_it_is_one():
    parts = [use.parts for use in uses(LORA_7B)]
    assert {"actor weights", "base", "reflector weights"} in parts
    other = dataclasses.replace(TINY.reflector, lora=LoraConfig(rank=2))
    assert {"base", "reflector weights"} in [
        use.parts for use in uses(dataclasses.replace(TINY, reflector=other))
    ]
