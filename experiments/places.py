"""The devices that a plan is made for: those of this machine, of a topology of TPUs or GPUs, or of
the CPU in place of GPUs for which there is no compiler here.
"""

import jax
from jax.experimental import topologies

from experiments.gpu_targets import compiler_is_here
from experiments.machines import Machine
from experiments.memory import device_bytes, host_bytes
from experiments.plan import Place


def place_of(machine: Machine | None, *, own_copies: bool = False) -> Place:
    """Opens the devices. `commands.plan` has set the environment that this needs.

    Args:
      machine: None for the devices of this machine.
      own_copies: whether each of several hosts has a copy of the run, as at an address.
    """
    if machine is None:
        devices, own = jax.devices(), jax.local_devices()
        there = device_bytes(own[0])  # those of other hosts do not say
        if there is not None and own[0].platform == "cpu":
            there //= len(own)  # all are parts of the same memory
        free = host_bytes()
        return Place(
            name=devices[0].device_kind,
            devices=devices,
            device_bytes=there,
            host_bytes=None if free is None else free // len(own),
            hosts=jax.process_count(),
            own_copies=own_copies,
            one_memory=devices[0].platform == "cpu",
        )
    if machine.topology:
        bounds = {"chips_per_host_bounds": machine.host_bounds} if machine.host_bounds else {}
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=machine.topology, **bounds
        )
        # v4 and v5p can be described as two cores a chip
        devices, estimated_on = list(described.devices)[: machine.count], ""
    elif compiler_is_here():
        described = topologies.get_topology_desc(
            topology_name=machine.name,
            platform="cuda",
            topology=f"1x1x{machine.count}",  # slices, hosts of each, devices of each
            target_config=machine.target,
        )
        devices, estimated_on = described.devices, ""
    else:
        devices, estimated_on = jax.devices("cpu")[: machine.count], "CPU"
    return Place(
        name=machine.name,
        devices=devices,
        device_bytes=machine.chip.memory_bytes,
        host_bytes=machine.chip.host_bytes,
        chip=machine.chip,
        estimated_on=estimated_on,
        hosts=machine.hosts,
        own_copies=own_copies,
    )
