"""Does the trained reflector write better prompts than the untrained one, on games never seen?

Every arm plays the same games in the same order with the same keys, so differences are paired. A
loop reflects `meta_turns` times on STREAM games (split "train"); its last prompt, never its best,
is scored once on TEST games (split "test") whose initial states occur neither among the STREAM
games nor in training. `--eval-env` plays another task than the one trained on: transfer between
benchmarks.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from envs.api import Environment, Pool
from envs.registry import load_environment
from experiments.commands.evaluate import main
from experiments.console import LiveProgress
from experiments.evaluation_folder import EvaluationFolder
from experiments.evaluation_results import ARMS, FORMAT
from experiments.limits import check_limits, check_meshes, local_roles
from experiments.manifest import describe_games, games_sha256
from experiments.memory import check_evaluation_memory
from experiments.presets import in_folders
from experiments.protocol import FamilyGames, choose_games, hashes_of_training, play_arm
from experiments.run_dir import check_families, open_pool, read_manifest
from experiments.summary import summarise
from ictjax import keys
from ictjax.hosts import these_hosts
from ictjax.loops import Arena
from ictjax.models.hf import content_hash
from ictjax.models.transformer import Params
from ictjax.players import (
    check_language,
    initial_weights,
    open_players,
    restore_trained,
    saved_steps,
)
from ictjax.run_config import (
    EnvironmentConfig,
    EvaluationConfig,
    TaskConfig,
    TrainConfig,
)

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
        " reflector of the checkpoint"
    ),
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


def evaluate(
    run_dir: pathlib.Path,
    config: TrainConfig,
    console: Console,
    *,
    task: TaskConfig | None = None,
    name: str = "evaluation",
    step: int | None = None,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Plays what is missing of every (arm, family), then writes and returns the results.

    With several hosts (`ictjax.hosts`) all of them call this, each plays its share, and the first
    writes.

    May run beside the training of the same run: it reads only what is complete, and keeps the games
    that it drew at its start.

    Args:
      run_dir: of the trained reflector.
      config: of the run; its meshes and workers may be others than those of training.
      console: where progress is shown.
      task: what to play; by default what was trained on.
      name: of the results, NAME.json, and of the folder NAME/ that keeps all of a setting (see
        `EvaluationFolder`). "evaluation" is that of the task trained on.
      step: which checkpoint; None for the newest.
      changes: what is accepted to be no longer as it was in training, see `changed_since`; kept
        with the results.

    Raises:
      ValueError: no such checkpoint, a missing model, limits or meshes that do not fit, a family
        without test games, or damaged files of the run.
    """
    played = config if task is None else config.on(task)
    settings, evaluation = played.task.environment, config.evaluation
    families = {
        family: _split_of(config, settings, family)
        for family in (*settings.train_families, *settings.heldout_families)
    }
    environment = load_environment(settings.name, settings.options)
    check_families(environment, tuple(families))
    check_limits(played)
    check_meshes(played)
    check_evaluation_memory(played)
    check_language(in_folders(played))
    games = describe_games(settings, environment)
    about = {
        "evaluation": dataclasses.asdict(evaluation),
        "task": _what_is_played(played.task),
        "games_sha256": games["games_sha256"],
        # whoever has no folder has a name at an endpoint
        "models": {"actor": config.actor.model, **_models(in_folders(played))},
    }
    trained, hosts = None, these_hosts()
    if step is None:  # at once: training that goes on removes old checkpoints
        newest = hosts.agree(saved_steps(run_dir)[-1]) if hosts.count > 1 else None
        step, trained = restore_trained(run_dir, in_folders(played), newest)
    folder = EvaluationFolder(run_dir, name, {"step": step, **about})
    parts = [(arm, family) for arm in ARMS for family in families]
    missing = [part for part in parts if folder.part(*part, evaluation.runs) is None]
    missing = [(arm, family) for arm, family in hosts.agree(missing)]
    if missing and trained is None:
        _, trained = restore_trained(run_dir, in_folders(played), step)
    console.print(
        f"Evaluating iteration {step}: {len(missing)} of {len(parts)} parts to play, kept in"
        f" {run_dir / folder.name}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if trained is not None and missing:
        drawn = folder.games(tuple(families), evaluation.runs)
        hosts.meet()  # all have looked before the first one keeps any
        seen = hashes_of_training(run_dir, step) if drawn is None else frozenset()
        pool = open_pool(settings)
        progress = LiveProgress(
            "evaluation", done=len(parts) - len(missing), total=len(parts), console=console
        )
        with pool, progress:
            if drawn is None:
                drawn = {
                    family: choose_games(environment, pool, played, family, seen, _key(evaluation))
                    for family in families
                }
                if hosts.first:
                    folder.keep_games(drawn)
            _play_missing(
                in_folders(played), trained, drawn, pool, folder, missing, len(parts), progress
            )
    hosts.meet()  # the first one has kept all
    results = {part: _kept(folder, *part, evaluation.runs) for part in parts}
    report = {
        "format": FORMAT,
        "folder": folder.name,
        "protocol": {
            **PROTOCOL,
            **dataclasses.asdict(evaluation),
            "checkpoint": step,
            "seed": evaluation.seed,
        },
        **_summary(results, families, _drawn(folder, families, evaluation.runs)),
        "environment": games,
        "changes": list(changes),
    }
    if hosts.first:
        folder.finish(report, (line for result in results.values() for line in result["prompts"]))
    return report


def changed_since(
    run_dir: pathlib.Path, config: TrainConfig, task: TaskConfig, environment: Environment
) -> list[str]:
    """What is no longer as the run was trained with it, a few words each: its models, and, where it
    is what it trained on that is played, its games. Nothing is known of a run without manifest.
    """
    manifest = read_manifest(run_dir)
    known = manifest.get("models", {})
    found = [
        f"the {name}'s model (its files differ)"
        for name, content in _models(in_folders(config)).items()
        if known.get(name, content) != content
    ]
    before = manifest.get("games_sha256")
    if task == config.task and before not in (None, games_sha256(task.environment, environment)):
        found.append(
            f"the games of {task.environment.name!r} (a download or a package has changed)"
        )
    return found


def _models(folders: TrainConfig) -> dict[str, str]:
    """The hash of every model that is computed here, by role."""
    return {name: content_hash(pathlib.Path(role.model)) for name, role, _ in local_roles(folders)}


def _what_is_played(task: TaskConfig) -> dict[str, Any]:
    """Without the workers, who change no result."""
    played = dataclasses.asdict(task)
    for name in ("num_workers", "max_live_games", "deadline_s"):
        del played["environment"][name]
    return played


def _key(evaluation: EvaluationConfig) -> keys.Key:
    return keys.fold(keys.root_key(evaluation.seed), "evaluation")


def _kept(folder: EvaluationFolder, arm: str, family: str, runs: int) -> dict[str, Any]:
    result = folder.part(arm, family, runs)
    assert result is not None, f"{arm} on {family} was played"
    return result


def _drawn(
    folder: EvaluationFolder, families: Mapping[str, str], runs: int
) -> dict[str, FamilyGames]:
    games = folder.games(tuple(families), runs)
    assert games is not None, "they were drawn before anything was played"
    return games


def _split_of(config: TrainConfig, settings: EnvironmentConfig, family: str) -> str:
    if settings.name != config.task.environment.name:
        return "transfer"
    return "train" if family in config.task.environment.train_families else "heldout"


def _summary(
    results: Mapping[tuple[str, str], Mapping[str, Any]],
    families: Mapping[str, str],
    games: Mapping[str, FamilyGames],
) -> dict[str, Any]:
    """The computed part of evaluation.json, with the counts of every part."""
    parts = {
        (arm, family): [
            {
                "test": [[outcomes] for outcomes in result["outcomes"]],
                "select": [],
                "games": {"test": [list(map(str, run)) for run in games[family].test]},
            }
        ]
        for (arm, family), result in results.items()
    }
    summary = summarise(parts, families)
    for family, numbers in summary["families"].items():
        for count, name in (
            ("malformed_replies", "malformed"),
            ("actor_failures", "actor_failures"),
            ("failed_episodes", "failed_episodes"),
        ):
            numbers[count] = {arm: results[arm, family][name] for arm in ARMS}
    return summary


def _play_missing(
    config: TrainConfig,
    trained: Params,
    games: Mapping[str, FamilyGames],
    pool: Pool,
    folder: EvaluationFolder,
    missing: Sequence[tuple[str, str]],
    total: int,
    progress: LiveProgress,
) -> None:
    evaluation, hosts = config.evaluation, these_hosts()
    with open_players(config, initial_weights(config), progress.reading) as players:
        arena = Arena(
            actor=players.actor,
            reflector=dataclasses.replace(players.reflector, temperature=evaluation.temperature),
            pool=pool,
            task=config.task,
            games={},
            key=_key(evaluation),
            meta=config.meta,
            hosts=hosts,
            progress=progress.phase,
        )
        done, weights = total - len(missing), "untrained"
        for arm, family in missing:
            if arm == "trained" and weights != "trained":
                players.set_trained(trained)
                weights = "trained"
            result, trajectories = play_arm(arena, arm, family, games[family], evaluation)
            if hosts.first:
                folder.keep_part(arm, family, result, trajectories)
            done += 1
            progress.advance(
                done,
                f"{arm} on {family}: {_percent(result['success'])} of test games won",
            )


def _percent(rates: Sequence[float | None]) -> str:
    known = [rate for rate in rates if rate is not None]
    return f"{100 * sum(known) / len(known):.1f} %" if known else "none"


if __name__ == "__main__":
    main()
