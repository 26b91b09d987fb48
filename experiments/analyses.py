"""What evaluation.json says beside the results: what actors did and prompts held, where games were
won, and what rewards were worth in training.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.behaviour import of_actor, of_prompts
from experiments.report_data import Evaluation
from experiments.report_loops import Loop
from experiments.reward_signal import reward_signal
from experiments.training_records import Group

Json = dict[str, Any]

_LAST = 4  # of training the last quarter is compared with what it came to


def analyse(
    evaluation: Evaluation, loops: Sequence[Loop], training: Sequence[Sequence[Group]]
) -> Json:
    """The "analyses" of evaluation.json.

    Args:
      evaluation: with the results.
      loops: of it.
      training: the groups of every run; empty where nothing is known of any.
    """
    return {
        "arms": _arms(evaluation, loops),
        "success": _success(evaluation, loops, training),
        "reward_signal": reward_signal(training),
    }


def _arms(evaluation: Evaluation, loops: Sequence[Loop]) -> dict[str, Json]:
    """Of every arm with episodes, over all families: see `experiments.behaviour`."""
    episodes: dict[str, list[Json]] = {}
    for (arm, _), played in evaluation.episodes.items():
        episodes.setdefault(arm, []).extend(played)
    fewest = min(map(len, episodes.values()), default=0)
    return {
        arm: {
            **of_actor(played, fewest),
            **of_prompts([loop for loop in loops if loop.arm == arm]),
        }
        for arm, played in episodes.items()
    }


def _success(
    evaluation: Evaluation, loops: Sequence[Loop], training: Sequence[Sequence[Group]]
) -> dict[str, Json]:
    """Of every family the shares of games won: "training" under the candidates of the last quarter
    of its iterations, on games that they were written from ("replay") and on others ("fresh"), null
    for families that were not trained on; and under the last prompts of every arm, "select" and
    "test".
    """
    trained = _success_in_training(training)
    return {
        family: {
            "training": trained.get(family),
            "arms": {
                arm: {
                    "select": _mean(
                        [
                            rate
                            for loop in loops
                            if (loop.arm, loop.family) == (arm, family)
                            for rate in [loop.prompts[-1].get("select_success")]
                        ]
                    ),
                    "test": found["mean"],
                }
                for arm, found in numbers["arms"].items()
            },
        }
        for family, numbers in evaluation.families.items()
    }


def _success_in_training(training: Sequence[Sequence[Group]]) -> Mapping[str, Json]:
    by_family: dict[str, list[Group]] = {}
    for groups in training:
        numbers = sorted({group.iteration for group in groups})
        last = set(numbers[-max(1, len(numbers) // _LAST) :]) if numbers else set()
        for group in groups:
            if group.iteration in last:
                by_family.setdefault(group.family, []).append(group)
    return {
        family: {
            "first_iteration": min(group.iteration for group in groups),
            "last_iteration": max(group.iteration for group in groups),
            **{
                name: _mean([row[field] for group in groups for row in group.candidates])
                for name, field in (("replay", "replay_reward"), ("fresh", "fresh_reward"))
            },
        }
        for family, groups in by_family.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
