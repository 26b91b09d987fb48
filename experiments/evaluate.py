"""Does the trained reflector write better prompts than the untrained one, on games never seen?

Every arm plays the same games in the same order with the same keys, so differences are paired. A
loop reflects `meta_turns` times on STREAM games (split "train"); its last prompt, never its best,
is scored once on TEST games (split "test") whose initial states occur neither among the STREAM
games nor in training. `--eval-env` plays another task than the one trained on: transfer between
benchmarks.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from envs.api import Environment, Pool
from envs.registry import load_environment
from experiments.commands.evaluate import main
from experiments.console import LiveProgress
from experiments.manifest import describe_games
from experiments.presets import in_folders
from experiments.protocol import ARMS, choose_games, hashes_of_training, play_arm
from experiments.run_dir import check_families, open_pool
from experiments.stats import mean_ci, paired_test
from ictjax import keys
from ictjax.json_lines import to_json_line
from ictjax.loops import Arena
from ictjax.players import (
    check_language,
    initial_weights,
    newest_step,
    open_players,
    restore_trained,
)
from ictjax.records import Trajectory, to_json
from ictjax.run_config import (
    EnvironmentConfig,
    EvaluationConfig,
    TaskConfig,
    TrainConfig,
)
from ictjax.run_files import write_lines

TESTS = (("trained", "untrained"), ("trained", "initial"), ("untrained", "initial"))

PROTOCOL = {
    "unit": (
        "one independent loop of reflection (run): the share of TEST games won under the last"
        " prompt of the loop"
    ),
    "prompt_scored": "the last prompt of each loop; no prompt is selected",
    "stream": "split train, the same games for all arms",
    "test": (
        "split test, without games whose initial state (by hash) occurs among the stream games or"
        " in training; the same for all arms"
    ),
    "arms": (
        "initial: the actor's first prompt; untrained: reflector before training; trained:"
        " reflector of the last checkpoint"
    ),
    "intervals": (
        "means: Student t over runs; differences: percentile bootstrap over pairs; p: two-sided"
        " sign-flip permutation test of pairs"
    ),
    "splits": (
        "train: families trained on; heldout: other families of that benchmark; transfer: families"
        " of another benchmark"
    ),
    "overall": "runs of all families of a split pooled",
    "malformed_replies": (
        "a reply without a usable prompt leaves the loop's prompt as it was, and is counted"
    ),
    "failed_episodes": "episodes the environment failed are left out of the means, and counted",
}


def evaluate(
    run_dir: pathlib.Path,
    config: TrainConfig,
    console: Console,
    *,
    task: TaskConfig | None = None,
    name: str = "evaluation",
) -> dict[str, Any]:
    """Plays what is missing of every (arm, family), then writes and returns the results.

    Args:
      run_dir: of the trained reflector.
      config: of the run.
      console: where progress is shown.
      task: what to play; by default what was trained on.
      name: of all that is written: NAME.json, NAME/, prompts/NAME.jsonl, episodes/NAME_*.jsonl.
        "evaluation" is that of the task trained on.

    Raises:
      ValueError: no checkpoint, a missing model, or a family without test games.
    """
    played = config if task is None else config.on(task)
    settings, evaluation = played.task.environment, config.evaluation
    families = {
        family: _split_of(config, settings, family)
        for family in (*settings.train_families, *settings.heldout_families)
    }
    environment = load_environment(settings.name, settings.options)
    check_families(environment, tuple(families))
    check_language(in_folders(played))
    step = newest_step(run_dir)
    games = describe_games(settings, environment)
    identity = {
        "step": step,
        "evaluation": dataclasses.asdict(evaluation),
        "task": dataclasses.asdict(played.task),
        "games": games["games_sha256"],
    }
    parts = {
        (arm, family): _Part(run_dir, name, arm, family, identity)
        for arm in ARMS
        for family in families
    }
    missing = [place for place, part in parts.items() if part.read() is None]
    if missing:
        pool = open_pool(settings)
        progress = LiveProgress(
            "evaluation", done=len(parts) - len(missing), total=len(parts), console=console
        )
        with pool, progress:
            _play_missing(
                run_dir,
                in_folders(played),
                step,
                environment,
                pool,
                [parts[place] for place in missing],
                len(parts),
                progress,
            )
    results = {place: part.read() for place, part in parts.items()}
    report = summarise(results, families, evaluation, {"checkpoint": step, "seed": evaluation.seed})
    report["environment"] = games
    write_lines(
        run_dir / "prompts" / f"{name}.jsonl",
        (line for result in results.values() for line in result["prompts"]),
    )
    write_lines(run_dir / f"{name}.json", [json.dumps(report, indent=1)])
    return report


def _split_of(config: TrainConfig, settings: EnvironmentConfig, family: str) -> str:
    if settings.name != config.task.environment.name:
        return "transfer"
    return "train" if family in config.task.environment.train_families else "heldout"


class _Part:
    """The result of one arm on one family, in a file of its own: what is done stays done when the
    evaluation is stopped.
    """

    def __init__(
        self, run_dir: pathlib.Path, name: str, arm: str, family: str, identity: Mapping[str, Any]
    ):
        self.arm, self.family, self._identity = arm, family, json.loads(json.dumps(identity))
        self._path = run_dir / name / f"{arm}_{family}.json"
        self._episodes = run_dir / "episodes" / f"{name}_{arm}_{family}.jsonl"

    def read(self) -> dict[str, Any] | None:
        """The result; None when it is missing or of another checkpoint or protocol."""
        if not self._path.is_file():
            return None
        result = json.loads(self._path.read_text(encoding="utf-8"))
        return result if result["identity"] == self._identity else None

    def write(self, result: dict[str, Any], trajectories: Iterable[Trajectory]) -> None:
        write_lines(self._episodes, map(to_json, trajectories))
        write_lines(self._path, [to_json_line({"identity": self._identity, **result})])


def summarise(
    results: Mapping[tuple[str, str], Mapping[str, Any]],
    families: Mapping[str, str],
    evaluation: EvaluationConfig,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The contents of evaluation.json from the results of every (arm, family)."""
    values: dict[str, dict[str, list[float]]] = {}
    report: dict[str, Any] = {
        "families": {},
        "overall": {},
        "protocol": {**PROTOCOL, **dataclasses.asdict(evaluation), **about},
    }
    for family, split in families.items():
        rates = {arm: results[arm, family]["success"] for arm in ARMS}
        # A run in which the environment failed every test game of an arm is no pair.
        whole = [
            run
            for run in range(evaluation.runs)
            if all(rates[arm][run] is not None for arm in ARMS)
        ]
        if not whole:
            raise ValueError(
                f"The environment failed every test game of family {family!r}: see the errors in"
                " episodes/."
            )
        values[family] = {arm: [rates[arm][run] for run in whole] for arm in ARMS}
        report["families"][family] = {
            "split": split,
            "games": results["initial", family]["num_games"],
            "runs": len(whole),
            **_statistics(values[family]),
            "malformed_replies": {arm: results[arm, family]["malformed"] for arm in ARMS},
            "actor_failures": {arm: results[arm, family]["actor_failures"] for arm in ARMS},
            "failed_episodes": {arm: results[arm, family]["failed_episodes"] for arm in ARMS},
        }
    for split in ("train", "heldout", "transfer"):
        members = [family for family, where in families.items() if where == split]
        if members:
            pooled = {
                arm: [value for family in members for value in values[family][arm]] for arm in ARMS
            }
            games = sum(report["families"][family]["games"] for family in members)
            report["overall"][split] = {
                "split": split,
                "games": games,
                "runs": len(pooled["initial"]),
                **_statistics(pooled),
            }
    return report


def _statistics(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    arms = {arm: mean_ci(values[arm]).to_json() for arm in ARMS}
    return {
        "arms": arms,
        "tests": {f"{a}_vs_{b}": paired_test(values[a], values[b]).to_json() for a, b in TESTS},
    }


def _play_missing(
    run_dir: pathlib.Path,
    config: TrainConfig,
    step: int,
    environment: Environment,
    pool: Pool,
    parts: Sequence[_Part],
    total: int,
    progress: LiveProgress,
) -> None:
    evaluation = config.evaluation
    key = keys.fold(keys.root_key(evaluation.seed), "evaluation")
    seen = hashes_of_training(run_dir)
    choose = functools.cache(
        lambda family: choose_games(environment, pool, config, family, seen, key)
    )
    _, trained = restore_trained(run_dir, config, step)
    with open_players(config, initial_weights(config), progress.reading) as players:
        arena = Arena(
            actor=players.actor,
            reflector=dataclasses.replace(players.reflector, temperature=evaluation.temperature),
            pool=pool,
            task=config.task,
            games={},
            key=key,
            meta=config.meta,
            progress=progress.phase,
        )
        done, weights = total - len(parts), "untrained"
        for part in parts:
            if part.arm == "trained" and weights != "trained":
                players.set_trained(trained)
                weights = "trained"
            result, trajectories = play_arm(
                arena, part.arm, part.family, choose(part.family), evaluation
            )
            part.write(result, trajectories)
            done += 1
            progress.advance(
                done,
                f"{part.arm} on {part.family}: {_percent(result['success'])} of test games won",
            )


def _percent(rates: Sequence[float | None]) -> str:
    known = [rate for rate in rates if rate is not None]
    return f"{100 * sum(known) / len(known):.1f} %" if known else "none"


if __name__ == "__main__":
    main()
