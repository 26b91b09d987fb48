"""Results of evaluations for tests: outcomes drawn from known rates, summarised as evaluations
are.
"""

from collections.abc import Mapping

import numpy as np

from experiments.behaviour import of_actor, of_prompts
from experiments.evaluation_results import FORMAT
from experiments.summary import summarise

FOLDER = "evaluation/step3-0123456789"
CORRELATION = {"value": 0.4, "ci95": [0.1, 0.7], "groups": 30, "pairs": 120, "note": ""}
SIGNAL = {
    "first_iteration": 1,
    "last_iteration": 3,
    "groups": 40,
    "candidates": 160,
    "dead_groups": 7,
    "histogram": {"edges": [0.0, 0.25, 0.5, 1.0], "counts": [30, 0, 130]},
    "reliability": {**CORRELATION, "games": 5, "games_needed": 30},
    "replay_and_fresh": CORRELATION,
    "reward_and_next": {**CORRELATION, "ci95": None, "note": "3 groups are too few"},
    "reward_and_words": {"value": None, "ci95": None, "groups": 0, "pairs": 0, "note": "nothing"},
}
RATES = {"initial": 0.1, "untrained": 0.4, "trained": 0.8}


def part(rates: np.ndarray, generator: np.random.Generator, *, turns: int = 1, games: int = 5):
    """The part record of loops with these success rates after the first of `turns` + 1 prompts,
    which always wins a tenth.
    """
    num_runs = len(rates)
    rates_rtg = np.repeat(np.asarray(rates, float)[:, None, None], turns + 1, axis=1)
    rates_rtg[:, 0] = 0.1 if turns else rates_rtg[:, 0]

    def outcomes(count):
        return (generator.random((num_runs, turns + 1, count)) < rates_rtg).astype(int).tolist()

    return {
        "test": outcomes(games),
        "select": outcomes(4),
        "games": {"test": [[f"{run}-{n}" for n in range(games)] for run in range(num_runs)]},
    }


def analyses(splits: Mapping[str, str], rates: Mapping[str, float]):
    """What stands beside the results."""
    behaviour = of_actor([{"turns": []}], 1) | of_prompts([])
    behaviour |= {"words_by_turn": [4, 30.5, 21], "changed_by_turn": [26.5, None]}
    sentence = {"text": "Look first.", "prompts": 2, "whole": 0.8, "drop": 0.3, "ci95": [-0.1, 0.6]}
    trained = {"first_iteration": 3, "last_iteration": 4, "replay": 0.7, "fresh": 0.6}
    return {
        "arms": dict.fromkeys(rates, behaviour),
        "success": {
            family: {
                "training": trained if split == "train" else None,
                "arms": {arm: {"select": None, "test": rate} for arm, rate in rates.items()},
            }
            for family, split in splits.items()
        },
        "reward_signal": SIGNAL,
        "deletions": {
            family: {"prompts": 2, "seeds": 2, "games": 20, "sentences": [{**sentence, "seeds": 2}]}
            for family in splits
        },
    }


def evaluation(
    splits: Mapping[str, str], rates: Mapping[str, float] = RATES, *, runs: int = 8, seeds: int = 1
):
    """evaluation.json of some families; the arm "trained" once for every trained seed."""
    generator = np.random.default_rng(0)
    parts = {
        (arm, family): [
            part(np.full(runs, rate), generator, turns=0 if arm == "initial" else 2)
            for _ in range(seeds if arm.startswith("trained") else 1)
        ]
        for family in splits
        for arm, rate in rates.items()
    }
    return {
        "format": FORMAT,
        "folder": FOLDER,
        "protocol": {"checkpoint": 3},
        **summarise(parts, splits),
        "analyses": analyses(splits, rates),
        "environment": {},
        "changes": [],
    }
