"""The arms of an evaluation by name: who writes the prompts. Light to import."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from envs.api import Advised, Environment
from experiments.arms.arm import OF_A_RUN, Arm
from experiments.arms.best_of_n import BestOfN
from experiments.arms.demonstration import Demonstration
from experiments.arms.fixed import Expert, Initial
from experiments.arms.gepa import Gepa, check_gepa
from experiments.arms.insights import Insights
from experiments.arms.opro import Opro
from experiments.arms.placebos import Flipped, Generic
from experiments.arms.reflecting import Reflecting
from experiments.arms.reflexion import Reflexion
from experiments.command import unknown

ENDPOINT = "@endpoint"  # behind an arm that asks `evaluation.endpoint` instead of the base model

ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "initial": Initial(),
        "expert": Expert(),
        "untrained": Reflecting("untrained"),
        "best-of-n": BestOfN(),
        "trained": Reflecting("trained"),
        "sft-best": Reflecting("taught", settings=("sft",)),
        "demonstration": Demonstration(),
        "reflexion": Reflexion(),
        "gepa": Gepa(),
        "insights": Insights(),
        "opro": Opro(),
        # placebos
        "generic": Generic(),
        "other-family": Reflecting("untrained", reads="other"),
        "flipped": Flipped("untrained"),
        "trained-other-family": Reflecting("trained", reads="other"),
        "trained-flipped": Flipped("trained"),
    }
)
"""A name has no underscore: files are called ARM_FAMILY."""


def arm_named(name: str) -> Arm:
    """An arm by its name, with or without `@endpoint`."""
    return ARMS[name.removesuffix(ENDPOINT)]


def is_of_a_run(name: str) -> bool:
    """Whether an arm asks a reflector that every trained run has its own of."""
    return arm_named(name).asks in OF_A_RUN


def is_played_by_each(name: str, draws: str) -> bool:
    """Whether an arm is played for every trained run: it asks a reflector that each has its own of,
    or any, where runs draw replies with keys of their own (`EvaluationConfig.draws`).
    """
    return is_of_a_run(name) or (draws == "own" and arm_named(name).asks != "nobody")


def at_endpoint(name: str) -> bool:
    """Whether an arm asks the endpoint."""
    return name.endswith(ENDPOINT)


def check_arms(names: Sequence[str], endpoint: str) -> None:
    """Raises ValueError for a name that is none, and for an endpoint that is not there, or that an
    arm cannot ask, and for a package that is not installed.

    Args:
      names: as in `EvaluationConfig.arms`.
      endpoint: its URL; empty for none.
    """
    for name in names:
        known = name.removesuffix(ENDPOINT)
        if known not in ARMS:
            raise unknown(f"Unknown arm {name!r}", name, list(ARMS))
        if known == "gepa":
            check_gepa()
        if at_endpoint(name) and ARMS[known].asks != "untrained":
            asks = [name for name, arm in ARMS.items() if arm.asks == "untrained"]
            raise ValueError(
                f"The arm {known!r} asks no reflector that an endpoint could stand for: put"
                f" {ENDPOINT} behind one of {', '.join(asks)}."
            )
        if at_endpoint(name) and not endpoint:
            raise ValueError(
                f"The arm {name!r} has nobody to ask: give --evaluation.endpoint.url, or name"
                f" {known!r}."
            )


def check_playable(
    arms: Sequence[str], families: Sequence[str], environment: Environment, expert_prompt: str
) -> None:
    """Raises ValueError for an arm that lacks what it needs to play these families.

    Args:
      arms: their names.
      families: that are played.
      environment: that has them.
      expert_prompt: for an environment that has none; may be empty.
    """
    own = environment.expert_prompt if isinstance(environment, Advised) else ""
    if "expert" in arms and not (own or expert_prompt):
        raise ValueError(
            f"{environment.name} has no expert prompt: give one with --evaluation.expert-prompt, or"
            " leave out the arm expert."
        )
    for arm in arms:
        if arm_named(arm).reads == "other" and len(families) < 2:
            raise ValueError(
                f"The arm {arm!r} reads about another family, and only {families[0]!r} is played:"
                " add one with --evaluation.families, or leave out the arm."
            )
