"""`ictjax train --preset NAME --run-dir DIR`."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import tyro

from experiments.command import Flags, parse, parse_known, run_main
from experiments.console import Terminal
from experiments.evaluation_results import next_command
from experiments.local_path import command_line, local_path, typed
from experiments.presets import (
    PRESETS,
    by_algorithm,
    check_model,
    on_named_mesh,
    preset,
    task,
    with_adapters_in_folders,
)
from experiments.remote_run import is_remote
from experiments.run_dir import (
    Start,
    check_families,
    check_restart,
    check_run,
    open_environment,
    preset_of,
    read_json,
)
from experiments.tasks import with_options
from experiments.trust import check_names
from ictjax.algorithms import ALGORITHMS
from ictjax.config import EndpointConfig, HostsConfig
from ictjax.ranges import Range
from ictjax.run_config import TrainConfig, from_dict
from ictjax.trackers import check_trackers

_Args = TypeVar("_Args", bound="RunArgs")
_SHOWN = "pocket-minihack"  # whose values --help shows where no preset is named
_LENGTHS = Range(1, 16_777_216)
_DESCRIPTION = (
    "Trains a reflector by GRPO to write better system prompts for a frozen actor. A run that was"
    " stopped goes on when it is started again with the same flags. Every field of the preset can"
    " be overridden, for example --meta.fresh-games 5; the values shown here are those of the"
    f" preset that is named, else of {_SHOWN}. Of a flag given twice, the last one counts."
    f" Presets: {', '.join(PRESETS)}. Algorithms: {', '.join(ALGORITHMS)} (docs/algorithms.md)."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartArgs(Flags):
    """What decides the defaults of all other flags, and is therefore read first."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Which configuration to start from."""
    config: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = (
        None
    )
    """Instead of a preset: the config.json of a run."""
    train_env: Annotated[
        str | None, tyro.conf.arg(metavar="TASK", help_behavior_hint="(default: the preset's)")
    ] = None
    """Another task to train the preset's models on, for example alfworld."""
    train_options: Annotated[str, tyro.conf.arg(metavar="KEY=VALUE,...", help_behavior_hint="")] = (
        ""
    )
    """Options of the environment, for example data=generated."""
    mesh: Annotated[
        str | None,
        tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: as the roles' own flags say)"),
    ] = None
    """Devices by name, for example v5e-8."""
    algorithm: Annotated[
        str | None,
        tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the preset's own settings)"),
    ] = None
    """What sets the --grpo flags, all but group size and temperature."""
    context: Annotated[
        int | None,
        Range(2, 16_777_216),
        tyro.conf.arg(metavar="TOKENS", help_behavior_hint="(default: the preset's)"),
    ] = None
    """The longest conversation: sets the samplers' lengths, what is read, and the update's rows."""
    trust: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Import and call what --config names: an environment by its import path, an endpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FirstArgs(StartArgs):
    """These, and the flags of the configuration that decide which options its environment has, and
    which of its names are the user's own.
    """

    environment: Annotated[str | None, tyro.conf.arg(name="task.environment.name")] = None
    url: Annotated[str | None, tyro.conf.arg(name="actor.endpoint.url")] = None
    reply_tokens: Annotated[str, tyro.conf.arg(name="reflection.max-reply-tokens")] = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunArgs(StartArgs):
    """These, and every field of the configuration."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """Fields of the preset."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArgs(RunArgs):
    """All flags."""

    run_dir: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/PRESET)"),
    ] = None
    """Where the run is written: a folder, or an address (gs://bucket/runs/a)."""
    restart: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Begin at iteration 1: a run that the directory holds is moved beside it, to DIR.old-1."""
    check: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Do what `ictjax plan` does, for the devices here or of all hosts, and end."""
    even_so: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Begin although the plan says that memory does not suffice, or that devices are left idle."""
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    """Several hosts that train one run."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(
        lambda: _main(words),
        "start it again with the same flags to go on from its last checkpoint.",
    )


def read_args(argv: Sequence[str]) -> tuple[TrainArgs, str | None]:
    """The flags, and the preset that the models are of, where it is known. Raises ValueError for
    what does not exist or does not fit together; --help ends the program.
    """
    return read_flags(TrainArgs, "train", _DESCRIPTION, argv)


def read_flags(
    kind: type[_Args],
    command: str,
    description: str,
    argv: Sequence[str],
    mesh: Callable[[], str | None] = lambda: None,
) -> tuple[_Args, str | None]:
    """`read_args` of another command that takes a training run.

    Args:
      kind: of its flags.
      command: its name.
      description: what its --help begins with.
      argv: its arguments.
      mesh: the name of the devices, where --mesh is not given.
    """
    first, _ = parse_known(_FirstArgs, command, argv)
    name, config = _configuration(first)
    if first.train_env is not None:
        if name is None:
            raise ValueError(
                f"--train-env {first.train_env} has no meaning here: {first.config} does not say"
                " which preset its models are of; set the fields --task.environment.* instead."
            )
        config = config.on(task(name, first.train_env))
    chosen = config.task
    if first.config is not None and not first.trust:
        check_names(
            first.config,
            environment=chosen.environment.name if first.environment is None else "",
            endpoint=config.actor.endpoint if first.url is None else EndpointConfig(),
        )
    # options are of the environment that they were written for
    if first.environment not in (None, chosen.environment.name):
        chosen = dataclasses.replace(
            chosen,
            environment=dataclasses.replace(chosen.environment, name=first.environment, options={}),
        )
    config = config.on(with_options(chosen, first.train_options))
    if first.context is not None:
        config = config.with_context(first.context)
    if (named := first.mesh or mesh()) is not None:
        config = on_named_mesh(config, named)
    if first.algorithm is not None:
        config = by_algorithm(config, first.algorithm)
        length = first.reply_tokens
        # what is no length is refused below, by its name
        if first.algorithm == "dr-grpo" and length.isdecimal() and int(length) in _LENGTHS:
            estimator = dataclasses.replace(config.grpo, constant_length=int(length))
            config = dataclasses.replace(config, grpo=estimator)
    given = {field.name: getattr(first, field.name) for field in dataclasses.fields(StartArgs)}
    args = parse(kind, command, description, argv, kind(**given, settings=config))
    # --help has ended by now; what is misspelt is named before what is missing
    if first.preset is None and first.config is None:
        raise ValueError(f"--preset is missing: use one of {', '.join(PRESETS)}.")
    for flag, value in given.items():
        if getattr(args, flag) != value:
            raise ValueError(
                f"--{flag.replace('_', '-')} stands where the value of another flag is missing:"
                " write each as --FLAG=VALUE."
            )
    return args, name


def _configuration(first: StartArgs) -> tuple[str | None, TrainConfig]:
    """What the other flags are differences to, and its preset."""
    if first.config is not None:
        if first.preset is not None:
            raise ValueError("--preset and --config exclude each other: give one of them.")
        if not first.config.is_file():
            raise ValueError(
                f"--config {first.config} is no file: name the config.json of a run, for example"
                " runs/demo/config.json."
            )
        try:
            config = from_dict(read_json(first.config))
        except ValueError as error:
            raise ValueError(f"--config {first.config} cannot be used: {error}") from error
        return preset_of(first.config.parent), config
    name = _SHOWN if first.preset is None else first.preset
    return name, preset(name)


def with_local_models(config: TrainConfig) -> TrainConfig:
    """The same run with the folders of its models and adapters as this machine knows them. Raises
    ValueError for what can be nowhere.
    """
    actor, reflector = config.actor, config.reflector
    model = actor.model
    if not actor.endpoint.url:
        model = local_path(model, "--actor.model")
        check_model(model, "--actor.model")
    local = config.with_models(model, local_path(reflector.model, "--reflector.model"))
    check_model(local.reflector.model, "--reflector.model")
    local = local.with_adapters(
        local_path(actor.adapter, "--actor.adapter"),
        local_path(reflector.adapter, "--reflector.adapter"),
    )
    with_adapters_in_folders(local)
    return local


def _check(args: TrainArgs) -> None:
    """Plans for the devices here, those of all hosts."""
    # what compiles is JAX; flags are right when it is loaded
    from experiments.host_differences import check_started_alike
    from experiments.hosts import connect, ended_together
    from experiments.plan_run import check

    hosts = connect(args.hosts)
    with ended_together(hosts):
        check_started_alike(hosts, args, args.settings)
        console, at_address = Terminal(quiet=not hosts.first), is_remote(args.run_dir)
        check(args.settings, console, own_copies=at_address, hosts=hosts)


def _main(argv: list[str]) -> None:
    args, name = read_args(argv)
    args = dataclasses.replace(args, settings=with_local_models(args.settings))
    check_trackers(args.settings.track)
    console = Terminal()
    if args.check:
        _check(args)
        return
    if args.run_dir is None and args.preset is None:
        raise ValueError("--run-dir is missing: a run from --config needs a directory of its own.")
    run_dir = named = args.run_dir or pathlib.Path("runs") / str(args.preset)
    settings = args.settings.task.environment
    environment = open_environment(settings.name, settings.options)
    check_families(environment, (*settings.train_families, *settings.heldout_families))
    if args.restart and is_remote(run_dir):
        raise ValueError("--restart moves folders of this machine only: choose another --run-dir.")

    def judge() -> Start:
        if args.restart:
            return check_restart(run_dir)
        return check_run(run_dir, args.settings, environment)

    how = judge() if args.hosts.alone and not is_remote(run_dir) else None
    # JAX; flags are right when it is loaded
    from experiments.host_differences import check_started_alike
    from experiments.hosts import connect, decide, ended_together, working_copies
    from experiments.train import start

    hosts = connect(args.hosts)
    if not hosts.first:
        console = Terminal(quiet=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_together(hosts))
        check_started_alike(hosts, args, args.settings)
        run_dir, hosts, sender = stack.enter_context(working_copies(run_dir, hosts, console.print))
        start(
            name,
            args.settings,
            run_dir,
            environment,
            console,
            how=decide(hosts, judge) if how is None else how,
            even_so=args.even_so,
            sender=sender,
            hosts=hosts,
        )
    word = next_command(run_dir, args.settings.iterations)
    console.print(f"Next: {command_line(f'{word} --run-dir {typed(named)}')}", soft_wrap=True)
