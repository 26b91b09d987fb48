"""What a plan has to assume. Standard library only: these are flags."""

import dataclasses
from typing import Annotated

from ictjax.ranges import Range, Ranged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions(Ranged):
    """What a plan cannot know about the games and the machine."""

    place = "assume."

    # actions of an episode; 0: task.rollout.max_steps, as if none ended early
    turns: Annotated[int, Range(0, 1_000_000)] = 0
    prompt_tokens: Annotated[int, Range(1, 1_000_000)] = 800  # of the actor's system prompt
    observation_tokens: Annotated[int, Range(1, 1_000_000)] = 200  # of one turn
    reply_tokens: Annotated[int, Range(1, 1_000_000)] = 80  # of the actor, of one turn
    # of the reflector, of one reply; 0: half of reflection.max_reply_tokens
    reflection_tokens: Annotated[int, Range(0, 1_000_000)] = 0
    compute_efficiency: Annotated[float, Range(0.001, 1)] = 0.4  # of the peak, in matrix products
    bandwidth_efficiency: Annotated[float, Range(0.001, 1)] = 0.6  # of memory and interconnect
    host_gb_per_second: Annotated[float, Range(0.001, 1000)] = 4.0  # of a device to its host
