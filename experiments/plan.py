"""What a training run needs of a machine: every large program compiled ahead of time, its memory
against what a device has, and the single changes that would make it fit.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.stages import Lowered

from experiments.assumptions import Assumptions
from experiments.estimate import Times, Work, episodes_per_iteration, times, work
from experiments.hlo import traffic
from experiments.kept_figures import Compiled, kept_figures
from experiments.limits import check_limits, check_meshes
from experiments.machines import Chip
from experiments.memory import Use, gathered_checkpoint, uses, written_checkpoint
from experiments.plan_changes import Change
from experiments.plan_programs import Program, num_programs, run_programs
from experiments.presets import with_adapters_in_folders
from experiments.shapes import config_folder
from ictjax.players import check_language
from ictjax.run_config import TrainConfig

Report = Callable[[int, int], None]  # programs compiled, of how many
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Phase(NamedTuple):
    """One program at its place in the run, bytes per device."""

    name: str
    what: str
    weights: int
    optimizer: int
    gradients: int
    cache: int
    temporaries: int  # of the program, and what it returns beside its arguments
    total: int
    compiled: Compiled
    work: Work | None  # of one iteration
    times: Times | None  # of one iteration

    @property
    def seconds(self) -> float | None:
        """Of one iteration."""
        return None if self.times is None else self.times.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs, and whether it is there."""

    machine: str
    chip: Chip | None  # None: nobody publishes peaks of this device
    device_bytes: int | None  # that a device has; None: unknown
    host_bytes: int | None  # that its host has for it; None: unknown
    devices: int
    hosts: int  # that these devices are of
    estimated_on: str  # the platform that compiled, where it is not the machine's own
    uses: tuple[Use, ...]
    phases: tuple[Phase, ...]
    num_programs: int
    one_memory: bool = (
        False  # the devices are the host's processors: what they hold is in its memory
    )

    @property
    def needed(self) -> int:
        """Bytes per device, in the phase that needs most."""
        held = sum(use.device_bytes for use in self.uses)
        return max([held, *(phase.total for phase in self.phases)])

    @property
    def host_needed(self) -> int:
        """Bytes of its host's memory, for each device."""
        return sum(use.host_bytes for use in self.uses)

    @property
    def suspended(self) -> int:
        """Bytes of it for pages of suspended conversations, at most."""
        return sum(use.host_bytes for use in self.uses if use.kind == "suspended")

    @property
    def gathers(self) -> bool:
        """Whether the first host is sent all of each checkpoint."""
        return any("gathered" in use.parts for use in self.uses)

    @property
    def devices_fit(self) -> bool:
        """Whether every phase has room on its device."""
        return self.device_bytes is None or (
            self.needed <= self.device_bytes
            and not any(phase.compiled.refused for phase in self.phases)
        )

    @property
    def host_fits(self) -> bool:
        """Whether the host has room."""
        beside = self.needed if self.one_memory else 0
        return self.host_bytes is None or beside + self.host_needed <= self.host_bytes

    @property
    def fits(self) -> bool:
        """Whether every phase has room, and the host."""
        return self.host_fits and self.devices_fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The devices that a plan is made for."""

    name: str
    devices: Sequence[jax.Device]  # real, or those of a topology
    device_bytes: int | None
    host_bytes: int | None = None  # for each device
    chip: Chip | None = None
    estimated_on: str = ""
    hosts: int = 1  # that these devices are of
    # of several hosts each has a copy of the run, as at an address: the first one saves all
    own_copies: bool = False
    one_memory: bool = False  # the devices are the host's processors, as those of CPUs


def _without_kernels(config: TrainConfig) -> TrainConfig:
    """The same run where the compiler of another platform estimates for GPUs, whose kernels it does
    not have.
    """
    learner, actor, reflector = (
        dataclasses.replace(part, attention="auto") if part.attention == "pallas_gpu" else part
        for part in (config.learner, config.actor_sampler, config.reflector_sampler)
    )
    return dataclasses.replace(
        config, learner=learner, actor_sampler=actor, reflector_sampler=reflector
    )


class Planner:
    """Makes plans for one place; programs that several configurations share are compiled once.

    Args:
      place: the devices.
      report: is told before and after every compilation.
    """

    def __init__(self, place: Place, report: Report | None = None) -> None:
        self.place = place
        self._report = report
        self._compiled: dict[tuple[Any, ...], Compiled] = {}
        self._sizes: dict[str, int] = {}  # of the phases of the last plan: the largest decide first
        self._wanted = 0  # programs, those that are compiled included

    def plan(self, config: TrainConfig, assumed: Assumptions) -> Plan:
        """Compiles what the run would. Raises ValueError for what does not fit together, or cannot
        be started on these devices.
        """
        self._check(config)
        folders = [config_folder(role.model) for role in (config.actor, config.reflector)]
        if None not in folders and not config.actor.endpoint.url:  # their small files are here
            check_language(with_adapters_in_folders(config.with_models(*map(str, folders))))
        kept = self._kept(config)
        works = {one.phase: one for one in work(config, assumed)}
        phases = []
        if self._kept_fits(kept):  # else no program needs to be made
            phases = [
                self._phase(config, program, kept, works.get(program.phase), assumed)
                for program in self._programs(config)
            ]
        self._sizes = {phase.name: phase.total for phase in phases}
        return Plan(
            machine=self.place.name,
            chip=self.place.chip,
            device_bytes=self.place.device_bytes,
            host_bytes=self.place.host_bytes,
            devices=len(self.place.devices),
            hosts=self.place.hosts,
            estimated_on=self.place.estimated_on,
            uses=kept,
            phases=tuple(phases),
            num_programs=num_programs(config),
            one_memory=self.place.one_memory,
        )

    def fits(self, config: TrainConfig) -> bool:
        """Whether a run has room; stops at the first program that has none. Raises as `plan`."""
        self._check(config)
        kept = self._kept(config)
        if not self._kept_fits(kept):
            return False
        for program in self._programs(config):
            phase = self._phase(config, program, kept, None, Assumptions())
            if phase.compiled.refused or not self._fit(phase.total, kept):
                return False
        return True

    def changes(
        self, config: TrainConfig, candidates: Sequence[Change], found: Callable[[Change], None]
    ) -> list[Change]:
        """The single changes with which a run fits, in their order; of each field the smallest.

        Args:
          config: a run that does not fit.
          candidates: of a field, the smaller change first.
          found: is told of each at once.
        """
        kept: list[Change] = []
        for change in candidates:
            if any(change.field == other.field for other in kept):
                continue
            try:
                if self.fits(change.config):
                    kept.append(change)
                    found(change)
            except ValueError:
                continue  # it does not fit together with the rest
        return kept

    def _check(self, config: TrainConfig) -> None:
        check_limits(config)
        check_meshes(config, len(self.place.devices), self.place.hosts)

    def _programs(self, config: TrainConfig) -> list[Program]:
        if self.place.estimated_on:
            config = _without_kernels(config)
        programs = sorted(
            run_programs(config, self.place.devices, self.place.hosts),
            key=lambda program: self._sizes.get(program.phase, 0),
            reverse=True,
        )
        self._wanted = len({program.key for program in programs} | self._compiled.keys())
        return programs

    def _kept(self, config: TrainConfig) -> tuple[Use, ...]:
        hosts = self.place.hosts
        if self.place.own_copies and hosts > 1:
            return (*uses(config), gathered_checkpoint(config, hosts))
        return (*uses(config), written_checkpoint(config))

    def _kept_fits(self, kept: Sequence[Use]) -> bool:
        return self._fit(sum(use.device_bytes for use in kept), kept)

    def _fit(self, num_bytes: int, kept: Sequence[Use]) -> bool:
        """Whether a device has room for so much, and its host beside it for what is kept."""
        there, of_host = self.place.device_bytes, self.place.host_bytes
        beside = num_bytes if self.place.one_memory else 0
        return (there is None or num_bytes <= there) and (
            of_host is None or beside + sum(use.host_bytes for use in kept) <= of_host
        )

    def _phase(
        self,
        config: TrainConfig,
        program: Program,
        kept: Sequence[Use],
        one: Work | None,
        assumed: Assumptions,
    ) -> Phase:
        compiled = self._compile(program)
        held = [use for use in kept if use.parts & program.holds]
        beside = [
            use for use in kept if use.parts & program.beside and not use.parts & program.holds
        ]

        def of(kind: str) -> int:
            return sum(use.device_bytes for use in (*held, *beside) if use.kind == kind)

        total = (
            compiled.argument_bytes
            + compiled.output_bytes
            + compiled.temporary_bytes
            + sum(use.device_bytes for use in beside)
        )
        gradients = (
            sum(use.device_bytes for use in held if "trained" in use.parts)
            if program.phase == "update"
            else 0
        )
        known = of("weights") + of("optimizer") + of("cache") + gradients
        chip, taken = self.place.chip, None
        if chip is not None and one is not None:
            count = program_devices(config, program)
            taken = times(one, chip, count, compiled.sent_bytes, assumed)
        return Phase(
            name=program.phase,
            what=program.what,
            weights=of("weights"),
            optimizer=of("optimizer"),
            gradients=gradients,
            cache=of("cache"),
            temporaries=max(total - known, 0),
            total=total,
            compiled=compiled,
            work=one,
            times=taken,
        )

    def _compile(self, program: Program) -> Compiled:
        if program.key not in self._compiled:
            self._say()
            self._compiled[program.key] = kept_figures(
                program.lower(), self._linked, self.place.devices[0], compile_program
            )
            self._say()
        return self._compiled[program.key]

    @property
    def _linked(self) -> str:
        """How these devices are linked: a mesh goes over the hosts one after the other, which the
        text of a program does not say.
        """
        place = self.place
        return place.name if place.hosts == 1 else f"{place.name} of {place.hosts} hosts"

    def _say(self) -> None:
        if self._report is not None:
            self._report(len(self._compiled), max(self._wanted, len(self._compiled)))


def compile_program(lowered: Lowered) -> Compiled:
    """Compiles one program, and reads what the compiler says of it."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        asked = re.search(r"\(([\d.]+)([KMGT]?)i?B?\) exceeds available", str(error)) or re.search(
            r"Used ([\d.]+)([KMGT]?) of", str(error)
        )
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(
            argument_bytes=0,
            output_bytes=0,
            temporary_bytes=0 if asked is None else int(float(asked[1]) * _UNITS[asked[2]]),
            flops=None,
            sent_bytes=0,
            loops_once=0,
            refused=True,
        )
    memory = compiled.memory_analysis()
    assert memory is not None  # every compiler of JAX's own platforms says it
    costs = compiled.cost_analysis() or {}
    sent = traffic(compiled.as_text() or "")
    flops = costs.get("flops", -1.0)
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        temporary_bytes=memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        flops=flops if flops > 0 else None,
        sent_bytes=sent.sent,
        loops_once=sent.loops_once,
        refused=False,
    )


def program_devices(config: TrainConfig, program: Program) -> int:
    """Devices that a program runs on."""
    role = config.actor if program.phase.startswith("actor") else config.reflector
    return role.mesh.num_devices


class Whole(NamedTuple):
    """The whole run in numbers that people ask for."""

    seconds_per_iteration: float
    seconds_before: float  # contexts collected before the first update
    hours: float
    iterations_per_hour: float
    episodes_per_hour: float
    episodes: int
    tokens: int  # sampled and appended by both models, of all iterations
    checkpoint_bytes: int  # of one
    # that a save keeps the next iteration waiting: what the devices hold of it is copied to their
    # hosts, all devices at once, or one copy of all of it to the first host, and written from there
    # while the run goes on
    checkpoint_seconds: float
    checkpoint_share: float  # of the iterations' time


def whole_run(config: TrainConfig, plan: Plan, assumed: Assumptions) -> Whole | None:
    """What an iteration takes, times the iterations; None where nobody knows the peaks."""
    timed = [phase for phase in plan.phases if phase.work is not None]
    if any(phase.seconds is None for phase in timed) or not timed:
        return None
    one = sum(phase.seconds or 0.0 for phase in timed)
    games = episodes_per_iteration(config)
    played = sum(phase.seconds or 0.0 for phase in timed if phase.name.startswith("actor "))
    meta, before, early = config.meta, 0.0, 0
    if meta.collection == "precollected":
        early = meta.precollected_loops * meta.meta_turns * meta.games_per_context
        replies = meta.precollected_loops * (meta.meta_turns - 1)
        group = meta.contexts_per_iteration * config.grpo.group_size
        written = sum(
            phase.seconds or 0.0 for phase in timed if phase.name.startswith("reflector ")
        )
        before = played * early / games + written * replies / group
    hours = (before + one * config.iterations) / 3600
    state = [use for use in plan.uses if use.parts & {"trained", "optimizer"}]
    copied = sum(use.device_bytes for use in state)
    if plan.gathers:
        mesh = config.reflector.mesh
        copied = sum(use.whole_bytes for use in state) // (mesh.fsdp * mesh.tensor)
    saving = copied / (assumed.host_gb_per_second * 1e9)
    return Whole(
        seconds_per_iteration=one,
        seconds_before=before,
        hours=hours,
        iterations_per_hour=3600 / one,
        episodes_per_hour=3600 / one * games,
        episodes=early + games * config.iterations,
        tokens=config.iterations * sum(phase.work.tokens for phase in timed if phase.work),
        checkpoint_bytes=sum(use.whole_bytes for use in state),
        checkpoint_seconds=saving,
        checkpoint_share=saving / (saving + config.checkpoint_every * one),
    )


def refusal(plan: Plan) -> str:
    """Why a run does not fit, in one clause."""
    gib = 2**30
    worst = max(plan.phases, key=lambda phase: phase.total, default=None)
    there = (plan.device_bytes or 0) / gib
    # of a CPU whose memory the run alone exceeds, the checkpoint is not to blame
    if not plan.host_fits and (plan.devices_fit or not plan.one_memory):
        needed, has = plan.host_needed / gib, (plan.host_bytes or 0) / gib
        saved = next(use for use in plan.uses if use.kind == "checkpoint")
        beside = f" beside the {plan.needed / gib:.1f} of the run" if plan.one_memory else ""
        room = f"needs {needed:.1f} GiB for each device{beside} and has {has:.1f}"
        pages = (
            f"; up to {plan.suspended / gib:.1f} GiB of it are pages of suspended conversations:"
            " give fewer num-slots or more num-pages (--actor-sampler.*, --reflector-sampler.*)"
            if plan.suspended
            else ""
        )
        if plan.gathers:
            return (
                f"the first host holds whole checkpoints of {saved.whole_bytes / gib:.1f} GiB, for"
                f" which it {room}: write the run to a folder that all hosts see, where each holds"
                f" its own part, or train an adapter{pages}"
            )
        moments = any(use.host_bytes for use in plan.uses if use.kind == "optimizer")
        kept = "the optimizer and " if moments else ""
        return (
            f"the host holds {kept}a copy of each checkpoint until it is written, for which it"
            f" {room}: train an adapter, or take"
            f" {'moments in bfloat16 (--optimizer.moments)' if moments else 'more devices'}{pages}"
        )
    if worst is None:
        held = sum(use.device_bytes for use in plan.uses)
        largest = max(plan.uses, key=lambda use: use.device_bytes)
        return (
            f"weights, optimizer and caches alone take {held / gib:.1f} GiB of the {there:.1f} that"
            f" a device has; the largest part is: {largest.what}, {largest.device_bytes / gib:.1f}"
        )
    return (
        f"{worst.name} ({worst.what}) needs {worst.total / gib:.1f} GiB of the {there:.1f} that a"
        " device has"
    )


def phases_by_name(plan: Plan) -> Iterator[tuple[str, Phase]]:
    """Phases in the order of an iteration."""
    order = ("restore", "actor", "reflector", "update", "hand-over")
    ranked = sorted(
        plan.phases,
        key=lambda phase: next(
            number for number, name in enumerate(order) if phase.name.startswith(name)
        ),
    )
    return ((phase.name, phase) for phase in ranked)
