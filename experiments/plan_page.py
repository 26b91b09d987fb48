"""A plan as people and programs read it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.assumptions import Assumptions
from experiments.estimate import (
    context_tokens,
    episode,
    reply_tokens,
    update_passes,
)
from experiments.plan import Phase, Plan, phases_by_name, refusal, whole_run
from experiments.plan_changes import Change
from experiments.wording import counted
from ictjax.compilation import MOST_PROGRAMS
from ictjax.run_config import TrainConfig, to_dict


def show(plan: Plan, config: TrainConfig, assumed: Assumptions, console: Console) -> None:
    """Prints what is needed, per device, what an iteration takes, and what was assumed."""
    console.print(f"Plan for {plan.devices} x {_device(plan)}, {_mesh(config)}", highlight=False)
    held = Table(title="What is kept, GiB", title_justify="left")
    for column in ("what", "parameters", "in all", "per device", "of host"):
        held.add_column(column, justify="left" if column == "what" else "right")
    for use in plan.uses:
        count = "" if use.parameters is None else f"{use.parameters:,}"
        of_host = _gib(use.host_bytes) if use.host_bytes else ""
        held.add_row(use.what, count, _gib(use.whole_bytes), _gib(use.device_bytes), of_host)
    console.print(held)
    if plan.phases:
        console.print(_memory(plan))
        console.print(_times(plan))
    for line in _words(plan, config, assumed):
        console.print(line, highlight=False, markup=False)


def verdict(plan: Plan) -> str:
    """One sentence."""
    if plan.fits:
        there = "" if plan.device_bytes is None else f" of the {_gib(plan.device_bytes)}"
        return f"It fits: it needs at most {_gib(plan.needed)}{there} GiB of a device."
    return f"It does not fit: {refusal(plan)}."


def change_line(change: Change) -> str:
    """One change that would make it fit."""
    return f"  {change.field}: {change.flags}"


def to_json(
    plan: Plan, config: TrainConfig, assumed: Assumptions, changes: list[Change]
) -> dict[str, Any]:
    """The same for programs: sizes in bytes, times in seconds, per device unless said otherwise."""
    whole = whole_run(config, plan, assumed)
    return {
        "machine": plan.machine,
        "devices": plan.devices,
        "hosts": plan.hosts,
        "device_bytes": plan.device_bytes,
        "host_bytes_per_device": plan.host_bytes,
        "estimated_on": plan.estimated_on,
        "mesh": dataclasses.asdict(config.reflector.mesh),
        "fits": plan.fits,
        "needed_bytes": plan.needed,
        "needed_host_bytes_per_device": plan.host_needed,
        "verdict": verdict(plan),
        "changes": [{"field": change.field, "flags": change.flags} for change in changes],
        "programs": plan.num_programs,
        "kept": [
            {
                "what": use.what,
                "parameters": use.parameters,
                "whole_bytes": use.whole_bytes,
                "device_bytes": use.device_bytes,
                "host_bytes_per_device": use.host_bytes,
            }
            for use in plan.uses
        ],
        "phases": [_phase_json(phase) for phase in plan.phases],
        "run": None if whole is None else whole._asdict(),
        "assumed": dataclasses.asdict(assumed),
        "config": to_dict(config),
    }


def _phase_json(phase: Phase) -> dict[str, Any]:
    return {
        "phase": phase.name,
        "program": phase.what,
        "weights_bytes": phase.weights,
        "optimizer_bytes": phase.optimizer,
        "gradients_bytes": phase.gradients,
        "cache_bytes": phase.cache,
        "temporaries_bytes": phase.temporaries,
        "total_bytes": phase.total,
        "refused_by_compiler": phase.compiled.refused,
        "compiler_flops_loops_once": phase.compiled.flops,
        "interconnect_bytes_per_run": phase.compiled.sent_bytes,
        "interconnect_loops_counted_once": phase.compiled.loops_once,
        "flops_per_iteration_all_devices": None if phase.work is None else phase.work.flops,
        "memory_traffic_bytes_per_iteration": (
            None if phase.work is None else phase.work.device_bytes
        ),
        "tokens_per_iteration": None if phase.work is None else phase.work.tokens,
        "seconds_per_iteration": phase.seconds,
        "seconds_by_part": None if phase.times is None else phase.times._asdict(),
        "limited_by": None if phase.times is None else phase.times.limit,
    }


def _memory(plan: Plan) -> Table:
    there = "unknown" if plan.device_bytes is None else _gib(plan.device_bytes)
    table = Table(title=f"Memory per device, GiB (there: {there})", title_justify="left")
    columns = ("phase", "weights", "optim.", "grads", "cache", "temp.", "total")
    for column in columns:
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, phase in phases_by_name(plan):
        total = "> " * phase.compiled.refused + _gib(phase.total)
        sizes = (phase.weights, phase.optimizer, phase.gradients, phase.cache, phase.temporaries)
        table.add_row(name, *map(_gib, sizes), total)
    return table


def _times(plan: Plan) -> Table:
    table = Table(title="Work of one iteration", title_justify="left")
    for column in ("phase", "tokens", "PFLOP", "memory GB", "sent GB", "seconds", "limit"):
        left = column in ("phase", "limit")
        table.add_column(column, justify="left" if left else "right")
    for name, phase in phases_by_name(plan):
        one = phase.work
        if one is not None:
            table.add_row(
                name,
                f"{one.tokens:,}",
                f"{one.flops / 1e15:.2f}",
                f"{one.device_bytes / 1e9:,.0f}",
                f"{phase.compiled.sent_bytes * one.runs / 1e9:,.1f}",
                "-" if phase.seconds is None else f"{phase.seconds:,.1f}",
                "-" if phase.times is None else phase.times.limit,
            )
    return table


def _words(plan: Plan, config: TrainConfig, assumed: Assumptions) -> Iterator[str]:
    whole = whole_run(config, plan, assumed)
    if whole is not None:
        yield (
            f"The run: {whole.hours:,.1f} hours for {config.iterations} iterations"
            f" ({whole.iterations_per_hour:,.1f} iterations and {whole.episodes_per_hour:,.0f}"
            f" episodes an hour), {whole.tokens / 1e6:,.0f} million tokens,"
            f" {_gib(whole.checkpoint_bytes)} GiB a checkpoint, which keeps the run waiting for"
            f" {whole.checkpoint_seconds:.1f} s ({whole.checkpoint_share:.1%} of the time)."
        )
        if whole.seconds_before:
            yield (
                f"Of these, {whole.seconds_before / 3600:,.1f} hours collect contexts before the"
                " first update."
            )
    if plan.hosts > 1:
        state = [use for use in plan.uses if use.parts & {"trained", "optimizer"}]
        size = _gib(sum(use.whole_bytes for use in state))
        yield (
            f"The first of the {plan.hosts} hosts is sent all of each checkpoint and holds its"
            f" {size} GiB until it is written."
            if plan.gathers
            else f"In a folder that all {plan.hosts} hosts see, each saves its own part of a"
            f" checkpoint; at an address the first one holds all {size} GiB of it, which"
            " --run-dir gs://... counts."
        )
    if plan.host_needed:
        there = (
            "how much it has is not known"
            if plan.host_bytes is None
            else f"it has {_gib(plan.host_bytes)} for each"
        )
        waiting = (
            f" Up to {_gib(plan.suspended)} of these are pages of suspended conversations."
            if plan.suspended
            else ""
        )
        needed = _gib(plan.host_needed)
        yield f"Of the host's memory {needed} GiB a device are needed; {there}.{waiting}"
    count = plan.num_programs
    yield (
        f"A run compiles {count} programs at its start."
        if count <= MOST_PROGRAMS
        else f"A run has {count} programs, more than {MOST_PROGRAMS}: each is compiled when it is"
        " first needed. Fewer buckets make them fewer."
    )
    played = episode(config, assumed)
    yield (
        f"Assumed: episodes of {counted(played.turns, 'turn')} and {played.whole:,} tokens,"
        f" {played.sampled:,} of them sampled; a context of"
        f" {context_tokens(config, assumed):,} tokens; replies of"
        f" {reply_tokens(config, assumed):,}. Environments cost no time. (--assume.*)"
    )
    yield (
        f"Times: the larger of FLOPs at {assumed.compute_efficiency:.0%} of the peak and memory"
        f" traffic at {assumed.bandwidth_efficiency:.0%}, plus what is sent; the limit is the"
        f" largest of the three. FLOPs: 2 x weights x"
        f" tokens in sampling, {update_passes(config):.0f} x in the update (forward, recomputed,"
        " backward, reference), and 4 x layers x heads x head size for each pair of tokens that"
        " attention looks at."
    )
    once = {phase.name: phase.compiled.loops_once for phase in plan.phases}
    if any(once.values()):
        loops = ", ".join(f"{number} in {name}" for name, number in once.items() if number)
        yield (
            "What is sent in loops whose rounds the compiled program does not tell counts once"
            f" ({loops}): more is sent."
        )
    if plan.estimated_on:
        yield (
            f"An estimate: the sizes are those that the compiler for {plan.estimated_on} gives, on"
            f" as many devices; that for {_device(plan)} needs less, or more. With the extra"
            " `plan-gpu` it is asked itself."
        )


def _device(plan: Plan) -> str:
    return plan.machine if plan.chip is None else plan.chip.name


def _mesh(config: TrainConfig) -> str:
    mesh = config.reflector.mesh
    return f"mesh data={mesh.data} x fsdp={mesh.fsdp} x tensor={mesh.tensor}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"
