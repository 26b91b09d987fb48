"""`ictjax evaluate --run-dir DIR ...`."""

import contextlib
import dataclasses
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from envs.api import Environment
from experiments.arms import check_arms, check_playable
from experiments.command import HELP, Flags, parse, parse_known, run_main, unknown
from experiments.console import Terminal, counting_bar
from experiments.evaluation_results import read_results
from experiments.local_path import check_place, command_line, typed
from experiments.presets import PRESETS, on_named_mesh, task
from experiments.remote_run import is_remote, readable
from experiments.resume import MAY_CHANGE
from experiments.run_dir import (
    check_families,
    open_environment,
    preset_of,
    read_config,
)
from experiments.tasks import with_options
from experiments.trust import check_names
from ictjax.config import HostsConfig, MeshConfig, PagedAttentionName, RoleMeshes, SamplerConfig
from ictjax.ranges import Range, shown
from ictjax.run_config import (
    EnvironmentConfig,
    EvaluationConfig,
    RoleConfig,
    TaskConfig,
    TrainConfig,
    differences,
    from_dict,
    to_dict,
)

if TYPE_CHECKING:  # it brings JAX
    from ictjax.hosts import Hosts

_DESCRIPTION = (
    "Does the trained reflector write better prompts than the untrained one, on games never seen?"
    " Every arm plays the same games in the same order with the same keys, so differences are"
    " paired. A loop reflects on STREAM games; the prompts of all its meta-turns are scored on TEST"
    " games, and the last one counts; SELECT games choose one beside it. No initial state occurs"
    " twice within a family, in training, or in pretraining where that is recorded. Several runs,"
    " of one configuration with other seeds, are one experiment. --eval-env plays another task than"
    " the one trained on: transfer between benchmarks."
)
_LONGEST_NAME = 100  # of a folder for several runs
# What trained seeds of one experiment may differ in; a name ending in a dot holds all below it.
_FREE = ("seed", *(name for name in MAY_CHANGE if name != "iterations"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunArgs(Flags):
    """What decides the defaults of all other flags, and is therefore read first."""

    run_dir: Annotated[
        tuple[pathlib.Path, ...],
        tyro.conf.arg(metavar="DIR ...", help_behavior_hint="(required)"),
    ] = ()
    """The run to evaluate, for example runs/demo; or several that differ in their seeds."""
    trust: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Import and call what the run names: an environment by its import path, an endpoint."""
    mesh: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: as trained on)")
    ] = None
    """Devices by name, for example v5e-8; h200 is one device of any kind."""
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    """Several hosts that evaluate together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleArgs:
    """Where a model is; the run's config.json has the defaults."""

    model: str
    """Folder, where it has moved, or name at an endpoint."""
    adapter: str
    """Folder of its adapter, where that has moved."""
    mesh: MeshConfig
    """Devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerArgs:
    """How a model samples; the run's config.json has the defaults."""

    attention: PagedAttentionName
    """Over pages of its cache; auto on machines that lack the kernels it was trained with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArgs(RunArgs):
    """All flags."""

    out: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: the run's)"),
    ] = None
    """Where the results are written; of several runs by default DIR+DIR+..., beside the first."""
    eval_env: Annotated[
        str | None, tyro.conf.arg(metavar="TASK", help_behavior_hint="(default: as trained on)")
    ] = None
    """Another task to play, for example alfworld."""
    eval_options: Annotated[str, tyro.conf.arg(metavar="KEY=VALUE,...", help_behavior_hint="")] = ""
    """Options of its environment, for example test=valid_unseen."""
    step: Annotated[
        int | None,
        Range(0, 1_000_000_000),
        tyro.conf.arg(metavar="N", help_behavior_hint="(default: the newest)"),
    ] = None
    """The iteration whose checkpoint is evaluated."""
    num_workers: Annotated[
        int | None,
        Range(1, 1024),
        tyro.conf.arg(metavar="N", help_behavior_hint="(default: as trained on)"),
    ] = None
    """Processes that play."""
    deletions: Annotated[
        int, Range(0, 10_000), tyro.conf.arg(metavar="N", help_behavior_hint="(default: 0)")
    ] = 0
    """Last prompts of each family and run that are played without each of their sentences too."""
    accept_changes: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Evaluate with games or models that are no longer those of training, and say so."""
    actor: RoleArgs
    """The model that plays."""
    reflector: RoleArgs
    """The model that was trained."""
    actor_sampler: SamplerArgs
    """The sampler of the model that plays."""
    reflector_sampler: SamplerArgs
    """The sampler of the model that was trained."""
    evaluation: EvaluationConfig
    """How much to play; the run's config.json has the defaults."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(
        lambda: _main(words),
        "start it again with the same flags to go on with the arms that are missing (beside a"
        " running training also with --step and the iteration it said).",
    )


def check_flags(config: TrainConfig, argv: Sequence[str]) -> dict[str, bool]:
    """The families that the evaluation of such a run plays with these flags, and whether each was
    trained on.

    Raises ValueError for flags that it would refuse, or that leave out the trained reflector.
    """
    first, _ = parse_known(RunArgs, "evaluate", argv)
    args, config = _read(first, config, argv)
    config = _as_told(args, config, config.task, args.evaluation, pathlib.Path("config.json"))
    settings, arms = config.task.environment, args.evaluation.arms
    if "trained" not in arms:
        raise ValueError("--evaluation.arms must have trained among them.")
    families = played_families(settings, args.evaluation)
    environment = open_environment(settings.name, settings.options)
    check_playable(arms, families, environment, args.evaluation.expert_prompt)
    return {family: family in settings.train_families for family in families}


def played_families(settings: EnvironmentConfig, evaluation: EvaluationConfig) -> tuple[str, ...]:
    """Those of a task that an evaluation plays. Raises ValueError for one that the task lacks."""
    there = (*settings.train_families, *settings.heldout_families)
    for family in evaluation.families:
        if family not in there:
            raise unknown(f"The task has no family {family!r}", family, there)
    return tuple(family for family in there if family in (evaluation.families or there))


def evaluation_name(
    trained_on: TaskConfig, played: TaskConfig, task_name: str | None, options: str
) -> str:
    """What the files of an evaluation are called: "evaluation" for the task trained on, else the
    task and the options given, behind a hyphen.
    """
    if played == trained_on:
        return "evaluation"
    about = [task_name or played.environment.name, *sorted(filter(None, options.split(",")))]
    return "evaluation-" + re.sub(r"[^\w.=,-]", "_", ",".join(about))


def _main(argv: list[str]) -> None:
    if (times := sum(word.partition("=")[0] == "--run-dir" for word in argv)) > 1:
        raise ValueError(
            f"--run-dir is given {times} times, of which only the last would count: name all runs"
            " behind one, as in --run-dir runs/seed0 runs/seed1."
        )
    first, _ = parse_known(RunArgs, "evaluate", argv)
    if not first.run_dir:
        # --help ends here; what is misspelt is named before what is missing
        shown = _defaults(first, PRESETS["pocket-minihack"])
        parse(EvaluateArgs, "evaluate", _DESCRIPTION, argv, shown)
        raise ValueError(
            "--run-dir is missing: name the directory of a run, for example runs/demo."
        )
    with contextlib.ExitStack() as stack:
        hosts = None
        if not first.hosts.alone and not set(HELP) & set(argv):
            # JAX; what one host alone cannot read, it has to tell the others
            from experiments.hosts import connect, ended_together

            hosts = connect(first.hosts)
            stack.enter_context(ended_together(hosts))
        _evaluate_runs(first, argv, hosts)


def _evaluate_runs(first: RunArgs, argv: list[str], hosts: "Hosts | None") -> None:
    """Evaluates what the first flags name, with hosts that have come together for that, or None."""
    index = 0 if hosts is None else hosts.index
    told = contextlib.nullcontext if hosts is None else hosts.told
    with told():
        with readable(first.run_dir[0], host=index) as run_dir:
            config = from_dict(read_config(run_dir))
        args, config = _read(first, config, argv)
    step: int | Literal["newest"] = "newest" if args.step is None else args.step
    if hosts is not None:
        from experiments.host_differences import check_started_alike
        from experiments.hosts import evaluated_step

        check_started_alike(hosts, args, config)
        if args.step is None:
            step = evaluated_step(first.run_dir, hosts) or step
    with contextlib.ExitStack() as stack:
        with told():
            out = args.out
            if out is None and len(first.run_dir) > 1:
                out = results_place(first.run_dir)
            if out is not None:
                check_place(out, "--out")
            run_dirs = [
                stack.enter_context(readable(run_dir, checkpoint=step, host=index))
                for run_dir in first.run_dir
            ]
            wanted = _wanted(args, config, run_dirs)
        _evaluate(args, wanted, run_dirs, out, hosts)


def _read(
    first: RunArgs, config: TrainConfig, argv: Sequence[str]
) -> tuple[EvaluateArgs, TrainConfig]:
    """All flags, and the run on the devices that they name."""
    if first.mesh is not None:
        config = on_named_mesh(config, first.mesh)
    args = parse(EvaluateArgs, "evaluate", _DESCRIPTION, argv, _defaults(first, config))
    if (args.run_dir, args.mesh) != (first.run_dir, first.mesh):
        raise ValueError(
            "--run-dir or --mesh stands where the value of another flag is missing: write each as"
            " --FLAG=VALUE."
        )
    return args, config


def results_place(run_dirs: Sequence[pathlib.Path]) -> pathlib.Path:
    """Where the results of several runs are written, unless told: beside the first. Raises
    ValueError for one at an address.
    """
    if is_remote(run_dirs[0]):
        raise ValueError(
            f"{run_dirs[0]} is not on this machine: name a folder for the results of several runs"
            " with --out."
        )
    name = "+".join(run_dir.name for run_dir in run_dirs)
    if len(name) > _LONGEST_NAME:
        name = f"{run_dirs[0].name}+{len(run_dirs) - 1}"
    return run_dirs[0].resolve().parent / name


def _beside(out: pathlib.Path, first: pathlib.Path, given: pathlib.Path | None) -> pathlib.Path:
    """The folder of the results of several runs, as short as the first run was typed."""
    beside = first.parent / out.name
    return beside if given is None and beside.resolve() == out.resolve() else out


def _check_others(run_dirs: Sequence[pathlib.Path]) -> None:
    """Raises ValueError for a run that is named twice, or that is of another configuration than the
    first one in more than its seed.
    """
    first, *others = (from_dict(read_config(run_dir)) for run_dir in run_dirs)
    seeds = {first.seed: run_dirs[0]}
    for run_dir, other in zip(run_dirs[1:], others, strict=True):
        if other.seed in seeds:
            raise ValueError(
                f"{run_dir} and {seeds[other.seed]} have the same seed, {other.seed}: name each"
                " trained seed once."
            )
        seeds[other.seed] = run_dir
        for found in differences(to_dict(first), to_dict(other)):
            if not any(
                found.field == name or (name.endswith(".") and found.field.startswith(name))
                for name in _FREE
            ):
                raise ValueError(
                    f"{run_dir} differs from {run_dirs[0]} in {found.field}"
                    f" ({shown(found.now)}, not {shown(found.before)}): evaluate runs that differ"
                    " in their seed alone together, others one by one."
                )


class _Wanted(NamedTuple):
    """What the flags ask for, found to be there."""

    config: TrainConfig  # of the run, with the models and meshes of now
    played: TaskConfig
    environment: Environment
    name: str  # of the results


def _wanted(args: EvaluateArgs, config: TrainConfig, run_dirs: Sequence[pathlib.Path]) -> _Wanted:
    """Raises ValueError for what cannot be evaluated."""
    run_dir = run_dirs[0]
    _check_others(run_dirs)
    played = with_options(_task(config, args.eval_env, run_dir), args.eval_options)
    settings, evaluation = played.environment, args.evaluation
    elsewhere = settings.name != config.task.environment.name
    if elsewhere and evaluation.families == config.evaluation.families:
        evaluation = dataclasses.replace(evaluation, families=())  # those of the run's own task
    config = _as_told(args, config, played, evaluation, run_dir / "config.json")
    environment = open_environment(settings.name, settings.options)
    families = (*settings.train_families, *settings.heldout_families)
    check_families(environment, (*families, *evaluation.families))
    for directory in run_dirs:
        if not (directory / "checkpoints").is_dir():
            raise ValueError(f"{directory} holds no checkpoint: train first (`ictjax train`).")
    console = Terminal(quiet=args.hosts.index > 0)
    with counting_bar("finding games", console) as advance:  # the first time an index is made
        for done, family in enumerate(families):
            advance(done, len(families))
            environment.games(family, "test")
    name = evaluation_name(config.task, played, args.eval_env, args.eval_options)
    return _Wanted(config, played, environment, name)


def _as_told(
    args: EvaluateArgs,
    config: TrainConfig,
    played: TaskConfig,
    evaluation: EvaluationConfig,
    file: pathlib.Path,
) -> TrainConfig:
    """The run with the models, devices, samplers and evaluation of these flags. Raises ValueError
    for those that do not fit it, and for names in its file that need --trust.
    """
    meshes = RoleMeshes(actor=args.actor.mesh, reflector=args.reflector.mesh)
    config = dataclasses.replace(
        config.on_mesh(meshes)
        .with_models(args.actor.model, args.reflector.model)
        .with_adapters(args.actor.adapter, args.reflector.adapter),
        actor_sampler=_sampler("actor", config.actor_sampler, args.actor_sampler),
        reflector_sampler=_sampler("reflector", config.reflector_sampler, args.reflector_sampler),
        evaluation=evaluation,
    )
    if not args.trust:
        for endpoint in (config.actor.endpoint, config.evaluation.endpoint):
            check_names(file, environment=played.environment.name, endpoint=endpoint)
    check_arms(evaluation.arms, evaluation.endpoint.url)
    if args.deletions and "trained" not in evaluation.arms:
        raise ValueError(
            f"--deletions {args.deletions} needs prompts of the trained reflector: add the arm"
            " trained to --evaluation.arms, or leave it out."
        )
    return config


def _evaluate(
    args: EvaluateArgs,
    wanted: _Wanted,
    run_dirs: Sequence[pathlib.Path],
    out: pathlib.Path | None,
    hosts: "Hosts | None",
) -> None:
    run_dir, (config, played, environment, name) = run_dirs[0], wanted
    # what plays is JAX; flags are right when it is loaded
    from experiments.deletions import largest_drop
    from experiments.evaluate import changed_since, evaluate
    from experiments.hosts import reading_copies
    from experiments.result_table import result_tables
    from ictjax.hosts import ALONE

    hosts = reading_copies(args.run_dir, ALONE if hosts is None else hosts)
    console = Terminal(quiet=not hosts.first)
    with hosts.told():
        before = _protocol((out or run_dir) / f"{name}.json")
        changes = list(
            dict.fromkeys(
                change
                for directory in run_dirs
                for change in changed_since(directory, config, played, environment)
            )
        )
        if changes and not args.accept_changes:
            raise ValueError(
                f"Changed since {run_dir} was trained: {'; '.join(changes)}. Restore it, or"
                " evaluate as things are now with --accept-changes."
            )
    if args.num_workers is not None:
        settings = dataclasses.replace(
            played.environment,
            num_workers=args.num_workers,
            max_live_games=max(played.environment.max_live_games, args.num_workers),
        )
        played = dataclasses.replace(played, environment=settings)
    report = evaluate(
        run_dir,
        config,
        console,
        others=run_dirs[1:],
        out=out,
        task=played,
        name=name,
        step=args.step,
        deletions=args.deletions,
        changes=changes,
        hosts=hosts,
    )
    for table in result_tables(report):
        console.print(table, "")
    if report["headline"] is not None:
        console.print(report["headline"]["text"], highlight=False)
    if args.deletions and hosts.first:
        console.print(largest_drop(report["analyses"]["deletions"]), highlight=False, markup=False)
    results = (out or run_dir) / name
    console.print(f"Evaluated. Results: {results}.json", highlight=False, soft_wrap=True)
    if before and (other := _other_choice(before, report["protocol"])):
        console.print(
            f"They take the place of an evaluation with {other}. What it played is kept in"
            f" {results}/: evaluate with its flags to show it again; nothing is played again.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    reported = typed(args.run_dir[0] if out is None else _beside(out, args.run_dir[0], args.out))
    console.print(f"Next: {command_line(f'report --run-dir {reported}')}", soft_wrap=True)


def _protocol(path: pathlib.Path) -> Mapping[str, Any]:
    """How results were made that may be there; empty where there are none that can be read."""
    try:
        return read_results(path)["protocol"]
    except (OSError, ValueError):
        return {}


def _other_choice(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The flags of earlier results, as they are typed, in which they are not as those of now; empty
    where they are alike.
    """
    flags = []
    if before["checkpoint"] != now["checkpoint"]:
        flags.append(f"--step {before['checkpoint']}")
    fields = [field.name for field in dataclasses.fields(EvaluationConfig)]
    settings = [{name: of[name] for name in fields if name in of} for of in (before, now)]
    for found in differences(*settings):
        flag = f"--evaluation.{found.field.replace('_', '-')}"
        values = found.before if isinstance(found.before, list) else [found.before]
        if found.before is None:  # not known to that version
            continue
        words = [shlex.quote(str(value)) for value in values]
        flags.append(" ".join([flag, *words]) if words else f"no {flag}")
    return ", ".join(flags)


def _defaults(first: RunArgs, config: TrainConfig) -> EvaluateArgs:
    return EvaluateArgs(
        run_dir=first.run_dir,
        trust=first.trust,
        mesh=first.mesh,
        hosts=first.hosts,
        actor=_role(config.actor),
        reflector=_role(config.reflector),
        actor_sampler=SamplerArgs(attention=config.actor_sampler.attention),
        reflector_sampler=SamplerArgs(attention=config.reflector_sampler.attention),
        evaluation=config.evaluation,
    )


def _role(role: RoleConfig) -> RoleArgs:
    return RoleArgs(model=role.model, adapter=role.adapter, mesh=role.mesh)


def _sampler(name: str, sizes: SamplerConfig, args: SamplerArgs) -> SamplerConfig:
    if args.attention != "auto" and not sizes.page_size:
        raise ValueError(
            f"--{name}-sampler.attention {args.attention} is of a cache of pages, and the {name} of"
            " this run has one of slots: leave it out."
        )
    return dataclasses.replace(sizes, attention=args.attention)


def _task(config: TrainConfig, name: str | None, run_dir: pathlib.Path) -> TaskConfig:
    if name is None:
        return config.task
    preset = preset_of(run_dir)
    if preset is None:
        raise ValueError(
            f"--eval-env {name} has no meaning here: {run_dir / 'manifest.json'} does not say which"
            " preset the models are of; evaluate without it."
        )
    return task(preset, name)
