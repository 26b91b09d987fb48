"""Plans a run and says what came out: the work of `ictjax plan` and of `train --check`."""

import dataclasses
import json
import sys

from rich.console import Console

from experiments.assumptions import Assumptions
from experiments.console import counting_bar
from experiments.limits import SMALL, check_idle
from experiments.machines import Machine
from experiments.places import place_of
from experiments.plan import Planner, refusal
from experiments.plan_changes import Change, single_changes
from experiments.plan_page import change_line, show, to_json, verdict
from experiments.shapes import model_shape
from ictjax.hosts import ALONE, Hosts
from ictjax.run_config import TrainConfig


def check(
    config: TrainConfig,
    console: Console,
    *,
    machine: Machine | None = None,
    assumed: Assumptions | None = None,
    as_json: bool = False,
    own_copies: bool = False,
    hosts: Hosts = ALONE,
) -> None:
    """Prints a plan; where it says no, what would fit, and ends the program with exit code 1.

    Args:
      config: of the run.
      console: for people.
      machine: None for the devices of this machine.
      assumed: of games and machine.
      as_json: one object on standard output, and nothing else there.
      own_copies: whether each of several hosts has a copy of the run, as at an address.
      hosts: that plan for the devices of all of them, each of which calls this; they say the same.
    """
    assumed = assumed or Assumptions()
    place = place_of(machine, own_copies=own_copies)
    if hosts.count > 1:
        said = hosts.all_say((place.device_bytes, place.host_bytes))
        there, free = (
            min((size for size in sizes if size is not None), default=None)
            for sizes in zip(*said, strict=True)
        )
        place = dataclasses.replace(place, device_bytes=there, host_bytes=free)
    # of this machine's CPU, one device is as good as all
    here = machine is None and place.devices[0].platform == "cpu"
    check_idle(config, place.devices, even_so=here)
    changes: list[Change] = []
    with counting_bar("compiling") as advance:
        planner = Planner(place, advance)
        plan = planner.plan(config, assumed)
        if not as_json:
            show(plan, config, assumed, console)
            console.print(verdict(plan), highlight=False, soft_wrap=True)
        if not plan.fits:
            if not as_json:
                console.print("Single changes with which it fits, each compiled:")
            changes = planner.changes(
                config,
                list(single_changes(config, len(place.devices), place.hosts)),
                lambda change: (
                    None
                    if as_json
                    else console.print(change_line(change), highlight=False, soft_wrap=True)
                ),
            )
            if not changes and not as_json:
                console.print("  none of those tried; change two at once, or take more devices")
    if as_json:
        print(json.dumps(to_json(plan, config, assumed, changes), indent=2))
    if not plan.fits:
        sys.exit(1)


def check_plan(config: TrainConfig, *, own_copies: bool = False) -> None:
    """Raises ValueError where a run would not fit this machine's devices. Small models are left to
    `memory.check_memory`: compiling twice would take longer than their run does.

    Args:
      own_copies: whether each of several hosts has a copy of the run, as at an address.
    """
    roles = [config.reflector, *([] if config.actor.endpoint.url else [config.actor])]
    if max(model_shape(role).num_params for role in roles) < SMALL:
        return
    with counting_bar("compiling") as advance:
        place = place_of(None, own_copies=own_copies)
        plan = Planner(place, advance).plan(config, Assumptions())
    if not plan.fits:
        raise ValueError(
            f"This run does not fit the devices here: {refusal(plan)}. --check lists single changes"
            " with which it does; --even-so begins all the same."
        )
