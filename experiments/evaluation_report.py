"""The written part of evaluation.json: how it was made, and what all parts hold, in numbers."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.arms import is_of_a_run
from experiments.evaluation_games import FamilyGames, games_per_context, in_several_families
from experiments.pretraining import unrecorded
from experiments.run_dir import read_manifest
from experiments.summary import summarise
from experiments.training_cost import of_all_runs
from ictjax.run_config import TrainConfig, to_dict

_PROTOCOL = {
    "mean": "the share of TEST games won under the last prompt of each loop of reflection (run)",
    "chosen": (
        "the same of the prompt that won most SELECT games, of the last one where there are none;"
        " with protocol paper most of these TEST games, which reads too high, and nothing is"
        " claimed of it"
    ),
    "arms": "who writes the prompts of a loop: see docs/evaluation.md",
    "splits": (
        "train: families trained on; heldout: other families of that benchmark; transfer: families"
        " of another benchmark"
    ),
    "overall": "the mean over the families of a split, each with the same weight",
    "malformed_replies": (
        "a reply without a usable prompt leaves the loop's prompt as it was, and is counted"
    ),
    "failed_episodes": "episodes the environment failed are left out of the means, and counted",
}

_COUNTS = {  # of parts, by their names in evaluation.json
    "malformed_replies": "malformed",
    "actor_failures": "actor_failures",
    "failed_episodes": "failed_episodes",
    "budget": "budget",
}

# What is true of one protocol alone.
_LABELS = {
    "strict": {
        "prompt_scored": (
            "the last prompt of each loop; that chosen on SELECT games stands beside it"
        ),
        "states": (
            "within a family no initial state (by hash) occurs twice among STREAM, SELECT and TEST"
            " games, and none occurs in the training of a run that is evaluated; the same games for"
            " all arms"
        ),
    },
    "paper": {
        "prompt_scored": (
            "the last prompt of each loop; the best one stands beside it, chosen and reported on"
            " the same games, which flatters it (protocol of arXiv 2605.20477)"
        ),
        "states": (
            "within a family no initial state (by hash) occurs among the STREAM games and among"
            " those that score, and none occurs in the training of a run that is evaluated; the"
            " same games for all arms and runs"
        ),
    },
}


def protocol(
    config: TrainConfig,
    named: TrainConfig,
    step: int,
    run_dirs: Sequence[pathlib.Path],
    costs: Sequence[Mapping[str, int]],
    games: Mapping[str, FamilyGames],
) -> dict[str, Any]:
    """What results say of how they were made.

    Args:
      config: what was played, models in folders.
      named: the models as people wrote them.
      step: whose checkpoint was evaluated.
      run_dirs: the runs.
      costs: what the training of each took.
      games: of every family.
    """
    labels = _LABELS[config.evaluation.protocol]
    adopted = [run_dir for run_dir in run_dirs if "adopted" in read_manifest(run_dir)]
    unknown_to_us = [
        *unrecorded(config, named),
        *(f"the adapter of {run_dir}" for run_dir in adopted),
    ]
    if config.evaluation.protocol == "strict" and not config.evaluation.select_games:
        labels = {**labels, "prompt_scored": "the last prompt of each loop; none is chosen"}
    return {
        **_PROTOCOL,
        **labels,
        "states": f"{labels['states']}; {_of_families(games)}",
        **to_dict(config)["evaluation"],
        "checkpoint": step,
        "iterations": named.iterations,
        "games_per_context": games_per_context(config),
        "run_dirs": [str(run_dir) for run_dir in run_dirs],
        "pretraining": (
            f"not recorded of {', '.join(unknown_to_us)}: games they were taught with may be among"
            " those played"
            if unknown_to_us
            else "games that the models were taught with are left out"
        ),
        "training_budget": _training_budget(run_dirs, adopted, costs),
    }


def _of_families(games: Mapping[str, FamilyGames]) -> str:
    shared, every = in_several_families(games)
    if not shared:
        return "no two families have a TEST game in common"
    return (
        f"{shared} of the {every} initial states of TEST games are those of several families (a"
        " renaming plays its family's games), and intervals take families' games as independent"
    )


def _training_budget(
    run_dirs: Sequence[pathlib.Path],
    adopted: Sequence[pathlib.Path],
    costs: Sequence[Mapping[str, int]],
) -> str:
    unknown = [
        f"{run_dir} (trained elsewhere, and adopted)"
        if run_dir in adopted
        else f"{run_dir} (its metrics.jsonl does not hold every iteration)"
        for run_dir, cost in zip(run_dirs, costs, strict=True)
        if not cost
    ]
    if unknown:
        return f"what training took is not known of {', '.join(unknown)}, so it is counted nowhere"
    return (
        "what training took stands in the budget of arms that ask a reflector of a run (training_*:"
        " all trained seeds together, the same number in every family)"
    )


def summary(
    results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    families: Mapping[str, str],
    task: str,
    costs: Sequence[Mapping[str, int]],
) -> dict[str, Any]:
    """The computed part of evaluation.json, with the counts of every part, and with the cost of
    training in the budgets of arms that ask a reflector of a run.

    Args:
      results: of every (arm, family), a record for each trained seed or a single one.
      families: the split of each.
      task: where another one is played than was trained on.
      costs: what the training of every run took.
    """
    trained = of_all_runs(costs)
    numbers_of = summarise(results, families, f" of {task}" if task else "")
    for family, numbers in numbers_of["families"].items():
        for name, field in _COUNTS.items():
            numbers[name] = {
                arm: _counts(of_arm, field)
                for (arm, of_family), of_arm in results.items()
                if of_family == family
            }
        for arm, budget in numbers["budget"].items():
            if is_of_a_run(arm):
                numbers["budget"][arm] = {**budget, **trained}
    return numbers_of


def _counts(results: Sequence[Mapping[str, Any]], name: str) -> int | dict[str, int]:
    """A count of a part, or of each of its kinds, over trained seeds."""
    counts = [result[name] for result in results]
    if isinstance(counts[0], int):
        return sum(counts)
    kinds = dict.fromkeys(kind for count in counts for kind in count)
    return {kind: sum(count.get(kind, 0) for count in counts) for kind in kinds}
