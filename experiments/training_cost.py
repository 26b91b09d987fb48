"""What a run played and wrote to train its reflector, by its metrics."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report_data import counter_total, nested
from ictjax.metrics import read_metrics
from ictjax.run_config import TrainConfig

NAMES = (
    "training_actor_episodes",
    "training_actor_tokens",
    "training_reflector_calls",
    "training_reflector_tokens",
)
# as samplers count tokens, and endpoints
_DECODED = ("decoded_tokens", "reply_tokens")

Json = Mapping[str, Any]


def training_cost(run_dir: pathlib.Path, config: TrainConfig, step: int) -> dict[str, int]:
    """Games of the actor, its tokens, replies of the reflector and their tokens, from the first
    iteration to `step`: as far as metrics tell, those of groups that were drawn again and of
    contexts collected before training too.

    Tokens are counted by the processes that trained (of several hosts by the first): what was
    played again after a kill counts once.

    Returns:
      By `NAMES`. Nothing where metrics.jsonl does not hold every iteration: of a run that was
      adopted, for example. Without tokens where speakers do not count them.

    Raises:
      ValueError: a line of metrics.jsonl is none.
    """
    lines = [line for line in read_metrics(run_dir) if 0 < line["iteration"] <= step]
    counts = [_counts(line, config) for line in lines]
    if [line["iteration"] for line in lines] != list(range(1, step + 1)) or None in counts:
        return {}
    known = [of_line for of_line in counts if of_line is not None]
    meta = config.meta
    episodes, calls = (sum(of_line[n] for of_line in known) for n in (0, 1))
    if meta.collection == "precollected" and step:
        # they are collected once, and read again and again
        read = step * meta.contexts_per_iteration
        collected = meta.precollected_loops * meta.meta_turns
        episodes += (collected - read) * meta.games_per_context
        calls += collected - meta.precollected_loops  # behind all meta-turns but the last
    tokens = [_tokens(lines, role) for role in ("actor", "reflector")]
    values = (episodes, tokens[0], calls, tokens[1])
    return {name: value for name, value in zip(NAMES, values, strict=True) if value is not None}


def of_all_runs(costs: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The sums over all runs, of what is known of each."""
    return {
        name: sum(cost[name] for cost in costs)
        for name in NAMES
        if all(name in cost for cost in costs)
    }


def _counts(line: Json, config: TrainConfig) -> tuple[int, int] | None:
    """Games and replies of one iteration; None where its line does not say."""
    played, asked = line.get("episodes"), line.get("candidates")
    again, thrown = line.get("refill_episodes", 0), line.get("refill_thrown_away", 0)
    for count in (played, asked, again, thrown):
        if type(count) is not int or count < 0:
            return None
    return played + again, asked + thrown * config.grpo.group_size


def _tokens(lines: Sequence[Json], role: str) -> int | None:
    """What a role wrote; None where an iteration does not say."""
    for name in _DECODED:
        counted = nested(lines, "time", f"{role}_{name}")
        if all(count is not None and count >= 0 for count in counted):
            return round(counter_total(lines, f"{role}_{name}"))
    return None
