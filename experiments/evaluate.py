"""Does the trained reflector write better prompts than the untrained one, on games never seen?

Plays what is missing of every part (an arm on a family, for each trained seed where the arm asks a
trained reflector) side by side, and summarises what all parts hold: `experiments.protocol` says
what one loop plays, `experiments.arms` who writes its prompts. `--eval-env` plays another task than
the one trained on: transfer between benchmarks.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from envs.api import Advised, Environment, Pool
from envs.registry import load_environment
from experiments.analyses import analyse
from experiments.arms import arm_named, check_arms, check_playable
from experiments.best_candidates import BestCandidates
from experiments.commands.evaluate import main, played_families
from experiments.console import LiveProgress, counting_bar
from experiments.contents import content_hashes
from experiments.deletions import shortened, summarise_deletions
from experiments.evaluation_folder import EvaluationFolder
from experiments.evaluation_games import (
    FamilyGames,
    TooFewGames,
    choose_games,
    hashes_of_training,
)
from experiments.evaluation_parts import Deletion, Evaluator, PartKey, evaluation_key, part_keys
from experiments.evaluation_report import protocol, summary
from experiments.evaluation_results import FORMAT
from experiments.host_differences import check_same_files
from experiments.limits import check_limits, check_meshes, sampling_attention
from experiments.manifest import describe_games, games_sha256
from experiments.memory import check_evaluation_memory
from experiments.presets import in_folders
from experiments.protocol import last_prompts
from experiments.report_data import read_evaluation
from experiments.report_loops import loops
from experiments.reward_signal import signal_of_run
from experiments.run_dir import check_families, open_pool, read_manifest, read_run
from experiments.training_cost import training_cost
from ictjax.hosts import ALONE, Hosts
from ictjax.models.transformer import Params
from ictjax.players import check_language, check_saved, restore_trained, saved_steps
from ictjax.run_config import EnvironmentConfig, TaskConfig, TrainConfig, to_dict


def evaluate(
    run_dir: pathlib.Path,
    config: TrainConfig,
    console: Console,
    *,
    others: Sequence[pathlib.Path] = (),
    out: pathlib.Path | None = None,
    task: TaskConfig | None = None,
    name: str = "evaluation",
    step: int | None = None,
    deletions: int = 0,
    changes: Sequence[str] = (),
    hosts: Hosts = ALONE,
) -> dict[str, Any]:
    """Plays what is missing of every part, then writes and returns the results.

    With several hosts (`ictjax.hosts`) all of them call this, each plays its share, and the first
    writes.

    May run beside the training of the same run: it reads only what is complete, and keeps the games
    that it drew at its start.

    Args:
      run_dir: of the trained reflector; parts of arms that ask none are kept here.
      config: of the run; its meshes and workers may be others than those of training.
      console: where progress is shown.
      others: runs of the same configuration with other seeds, each with a trained reflector.
      out: where the results are written; by default `run_dir`. Every run keeps its own parts.
      task: what to play; by default what was trained on.
      name: of the results, NAME.json, and of the folder NAME/ that keeps all of a setting (see
        `EvaluationFolder`). "evaluation" is that of the task trained on.
      step: which checkpoint; None for the newest.
      deletions: so many last prompts of every trained reflector are played without each of their
        sentences, in every family; what is there already is kept, with each run.
      changes: what is accepted to be no longer as it was in training, see `changed_since`; kept
        with the results.
      hosts: that evaluate together.

    Raises:
      ValueError: no such checkpoint, a missing model, limits or meshes that do not fit, a family
        with too few games, an arm that cannot be played, or damaged files of the run.
    """
    run_dirs = [run_dir, *others]
    with hosts.told():
        plan = _planned(config, task)
    check_same_files(hosts, plan.about["models"], plan.about["games_sha256"])
    hosts.meet()  # what is there, all of them see
    step, newest = _steps(run_dirs, plan.config, name, step, hosts)
    with hosts.told():
        costs = [training_cost(path, config, step) for path in run_dirs]
    with contextlib.ExitStack() as stack:
        pool = functools.cache(lambda: stack.enter_context(open_pool(plan.config.task.environment)))
        with hosts.told():
            folders, drawn = _games(run_dirs, name, step, plan, pool, console, hosts)
            parts = _Parts(
                keys=part_keys(
                    plan.arms, tuple(plan.families), len(run_dirs), plan.config.evaluation.draws
                ),
                folders=folders,
                games=drawn,
            )
            missing = parts.missing(run_dirs, hosts)
        unfinished = f" of {config.iterations}" if step < config.iterations else ""
        console.print(
            f"Evaluating iteration {step}{unfinished}: {len(missing)} of {len(parts.keys)} parts to"
            f" play, kept in {', '.join(str(folder.run_dir / folder.name) for folder in folders)}.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        taught = _taught(missing, run_dirs, config, step, folders, hosts)
        for best in taught.values():
            best.teach(console)

        def evaluator(progress: LiveProgress) -> Evaluator:
            with hosts.told():
                workers = pool()
            return Evaluator(
                config=plan.config,
                pool=workers,
                games=drawn,
                folders=folders,
                draws=(
                    [read_run(path).seed for path in run_dirs]
                    if plan.config.evaluation.draws == "own"
                    else None
                ),
                trained=lambda seed: (
                    newest[seed]
                    if seed in newest
                    else restore_trained(run_dirs[seed], plan.config, step, hosts=hosts)[1]
                ),
                taught=taught,
                expert_prompt=plan.expert_prompt,
                hosts=hosts,
                progress=progress,
            )

        if missing:
            total = len(parts.keys)
            with LiveProgress(
                "evaluation", done=total - len(missing), total=total, console=console
            ) as progress:
                evaluator(progress).play(missing)
        with hosts.told():
            results = parts.results()
            last = {family: _last(results, family) for family in drawn}
            wanted = _still_whole(last, folders, drawn, hosts, deletions)
        if wanted:
            _say_deletions(wanted, config.evaluation.test_games, console)
            with LiveProgress("deletions", done=0, total=len(wanted), console=console) as progress:
                evaluator(progress).play_deletions(wanted)
    report = {
        "format": FORMAT,
        "folder": folders[0].name,
        "protocol": protocol(plan.config, config, step, run_dirs, costs, drawn),
        **summary(results, plan.families, name.removeprefix("evaluation").removeprefix("-"), costs),
        "environment": plan.games,
        "changes": list(changes),
    }
    if hosts.first:
        place = folders[0] if out is None else folders[0].moved(out)
        if out is not None:
            place.keep_games(drawn)
            place.gather(parts.keys, folders)
        every = [record for records in results.values() for record in records]
        place.keep_prompts(
            (line for record in every for line in last_prompts(record)),
            (line for record in every for line in record["prompts"]),
        )
        found = read_evaluation(place.run_dir, name, report)
        training = [signal_of_run(path, to_dict(config)["meta"], step) for path in run_dirs]
        report["analyses"] = {
            **analyse(found, loops(found), training),
            "deletions": {
                family: summarise_deletions(records)
                for family, games in drawn.items()
                if (records := _without_sentences(last[family], folders, family, games))
            },
        }
        place.finish(report)
    return report


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is evaluated, found to fit together; nothing was played for it."""

    config: TrainConfig  # on the task that is played, models in folders
    families: Mapping[str, str]  # and the split of each
    arms: tuple[str, ...]
    environment: Environment
    expert_prompt: str
    games: Mapping[str, Any]  # about the environment's games, for the results
    about: Mapping[str, Any]  # what parts must have in common, but for the step


def _planned(config: TrainConfig, task: TaskConfig | None) -> _Plan:
    """Raises ValueError as `evaluate` does, for all that is wrong before games are drawn."""
    played = config if task is None else config.on(task)
    settings, evaluation = played.task.environment, config.evaluation
    families = _families(config, played.task)
    arms = tuple(dict.fromkeys(("initial", *evaluation.arms)))
    environment = load_environment(settings.name, settings.options)
    check_families(environment, tuple(families))
    check_arms(arms, evaluation.endpoint.url)
    expert = environment.expert_prompt if isinstance(environment, Advised) else ""
    check_playable(arms, tuple(families), environment, evaluation.expert_prompt)
    check_limits(played)
    check_meshes(played)
    sampling_attention(played)
    check_evaluation_memory(played)
    played = in_folders(played)
    check_language(played)
    games = describe_games(settings, environment)
    return _Plan(
        config=played,
        families=families,
        arms=arms,
        environment=environment,
        expert_prompt=expert,
        games=games,
        about={
            "evaluation": dataclasses.asdict(evaluation),
            "task": _what_is_played(played.task),
            "games_sha256": games["games_sha256"],
            "games_per_context": played.meta.games_per_context,
            # whoever has no folder has a name at an endpoint
            "models": {"actor": config.actor.model, **content_hashes(played)},
        },
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """Every part of an evaluation, and where it is kept."""

    keys: Sequence[PartKey]
    folders: Sequence[EvaluationFolder]  # by number of the run
    games: Mapping[str, FamilyGames]

    def kept(self, part: PartKey) -> dict[str, Any] | None:
        """The record of a part; None for one that is to be played."""
        return self.folders[part.seed].part(part.arm, part.family, self.games[part.family])

    def missing(self, run_dirs: Sequence[pathlib.Path], hosts: Hosts) -> list[PartKey]:
        """Those to be played, after what other runs have played of them is taken over."""
        if hosts.first:
            for part in self.keys:
                if self.kept(part) is None:
                    games = self.games[part.family]
                    self.folders[part.seed].adopt(part.arm, part.family, games, run_dirs)
        hosts.meet()
        missing = hosts.agree([part for part in self.keys if self.kept(part) is None])
        return [PartKey(*part) for part in missing]

    def results(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """The records of every (arm, family), in the order of the runs; nothing may be missing."""
        results: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for part in self.keys:
            record = self.kept(part)
            assert record is not None, f"{part.arm} on {part.family} was played"
            results.setdefault((part.arm, part.family), []).append(record)
        return results


def _taught(
    missing: Sequence[PartKey],
    run_dirs: Sequence[pathlib.Path],
    config: TrainConfig,
    step: int,
    folders: Sequence[EvaluationFolder],
    hosts: Hosts,
) -> dict[int, BestCandidates]:
    """The reflectors that are to be taught for parts that ask one, by number of the run."""
    taught = {
        seed: BestCandidates(
            run_dirs[seed],
            dataclasses.replace(in_folders(config), seed=read_run(run_dirs[seed]).seed),
            step,
            folders[seed].taught,
        )
        for seed in sorted({p.seed for p in missing if arm_named(p.arm).asks == "taught"})
    }
    if taught and hosts.count > 1:
        raise ValueError(
            "The arm sft-best is taught by one host: evaluate it on one first, with the same flags,"
            " then its parts are there."
        )
    return taught


def _say_deletions(
    wanted: Mapping[str, Sequence[Deletion]], test_games: int, console: Console
) -> None:
    texts = [deletion.prompt for of_family in wanted.values() for deletion in of_family]
    num_sentences = sum(len(shortened(text)) for text in texts)
    console.print(
        f"Without one sentence: {num_sentences} sentences of {len(texts)} last prompts,"
        f" {num_sentences * test_games} games.",
        highlight=False,
        soft_wrap=True,
    )


def _families(config: TrainConfig, task: TaskConfig) -> dict[str, str]:
    """The families to play, and the split of each."""
    played = played_families(task.environment, config.evaluation)
    return {family: _split_of(config, task.environment, family) for family in played}


def _steps(
    run_dirs: Sequence[pathlib.Path],
    config: TrainConfig,
    name: str,
    step: int | None,
    hosts: Hosts,
) -> tuple[int, dict[int, Params]]:
    """The step that is evaluated, and weights that were restored to find it, by the number of their
    run: the newest one of the first run at once, as training that goes on removes old ones.
    """
    if step is not None:
        with hosts.told():
            for run_dir in run_dirs:
                if not any((run_dir / name).glob(f"step{step}-*")):  # what is there may be shown
                    check_saved(run_dir, step, saved_steps(run_dir))
        return step, {}
    with hosts.told():
        newest = hosts.agree(saved_steps(run_dirs[0])[-1]) if hosts.count > 1 else None
    step, weights = restore_trained(run_dirs[0], config, newest, hosts=hosts)
    with hosts.told():
        for run_dir in run_dirs[1:]:
            steps = saved_steps(run_dir)
            if step not in steps:
                there = ", ".join(map(str, steps))
                raise ValueError(
                    f"{run_dir} has no checkpoint of iteration {step}, the newest of {run_dirs[0]}:"
                    f" finish its training, or give --step ({there} are there)."
                )
    return step, {0: weights}


def _games(
    run_dirs: Sequence[pathlib.Path],
    name: str,
    step: int,
    plan: _Plan,
    pool: Callable[[], Pool],
    console: Console,
    hosts: Hosts,
) -> tuple[list[EvaluationFolder], dict[str, FamilyGames]]:
    """Where every run keeps its parts, and the games of all of them: those that were drawn before,
    where they are the same for all runs and new to all of them, else drawn now.
    """
    evaluation, families = plan.config.evaluation, tuple(plan.families)
    seen = functools.cache(lambda number: hashes_of_training(run_dirs[number], step))
    settings = {"step": step, **plan.about}
    seeds = sorted(read_run(run_dir).seed for run_dir in run_dirs) if len(run_dirs) > 1 else []
    # a setting of their own for runs that have been evaluated on other games before
    for own in (settings, {**settings, "seeds": seeds}):
        folders = [EvaluationFolder(run_dir, name, own) for run_dir in run_dirs]
        agreed = _agreed(folders, families, evaluation.runs, seen)
        if agreed is not None:
            break
    else:
        raise ValueError(
            f"The games in {folders[0].run_dir / folders[0].name} are no longer new to all runs:"
            " remove this folder to draw others."
        )
    hosts.meet()  # all have looked before the first one keeps any
    if len(agreed) < len(families):
        of_all = frozenset().union(*(seen(number) for number in range(len(run_dirs))))
        key, short = evaluation_key(evaluation), []
        with counting_bar("drawing games", console) as advance:  # new ones take seconds
            for done, family in enumerate(families):
                advance(done, len(families))
                try:
                    if family not in agreed:
                        agreed[family] = choose_games(
                            plan.environment, pool(), plan.config, family, of_all, key
                        )
                except TooFewGames as error:
                    short += error.shortfalls
        if short:
            raise TooFewGames(evaluation, short)
    if hosts.first:
        for folder in folders:
            folder.keep_games(agreed)
    return folders, {family: agreed[family] for family in families}


def _agreed(
    folders: Sequence[EvaluationFolder],
    families: Sequence[str],
    runs: int,
    seen: Callable[[int], frozenset[str]],
) -> dict[str, FamilyGames] | None:
    """The games that some runs have kept; None where they differ, or where a run that has kept none
    has trained on some.
    """
    kept = [folder.games(families, runs) for folder in folders]
    agreed: dict[str, FamilyGames] = {}
    for of_run in kept:
        for family, games in of_run.items():
            if agreed.setdefault(family, games) != games:
                return None
    for number, of_run in enumerate(kept):
        for family in agreed.keys() - of_run.keys():
            if not seen(number).isdisjoint(agreed[family].states.values()):
                return None
    return agreed


def _last(
    results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], family: str
) -> list[Deletion]:
    """The last prompts of all trained reflectors, seed by seed and loop by loop; none where that is
    no arm.
    """
    return [
        Deletion(seed, run, json.loads(line)["system_prompt"], record["test"][run][-1])
        for seed, record in enumerate(results.get(("trained", family), ()))
        for run, line in enumerate(last_prompts(record))
    ]


def _without_sentences(
    last: Sequence[Deletion],
    folders: Sequence[EvaluationFolder],
    family: str,
    games: FamilyGames,
) -> list[dict[str, Any]]:
    """What is kept of these prompts without sentences, each with its "seed"."""
    prompts = {(deletion.seed, deletion.run, deletion.prompt) for deletion in last}
    return [
        {**loop, "seed": seed}
        for seed in sorted({deletion.seed for deletion in last})
        for loop in folders[seed].deletions(family, games)
        if (seed, loop["run"], loop["prompt"]) in prompts
    ]


def _still_whole(
    last: Mapping[str, Sequence[Deletion]],
    folders: Sequence[EvaluationFolder],
    games: Mapping[str, FamilyGames],
    hosts: Hosts,
    number: int,
) -> dict[str, list[Deletion]]:
    """By family, those of the first so many prompts of every seed that were not played without
    sentences yet.
    """
    wanted: dict[str, list[Deletion]] = {}
    for family, prompts in last.items():
        kept = _without_sentences(prompts, folders, family, games[family])
        there = {(loop["seed"], loop["run"]) for loop in kept}
        if some := [
            deletion
            for deletion in prompts
            if deletion.run < number and (deletion.seed, deletion.run) not in there
        ]:
            wanted[family] = some
    return {
        family: [Deletion(*one) for one in some] for family, some in hosts.agree(wanted).items()
    }


def changed_since(
    run_dir: pathlib.Path, config: TrainConfig, task: TaskConfig, environment: Environment
) -> list[str]:
    """What is no longer as the run was trained with it, a few words each: its models and adapters,
    and, where it is what it trained on that is played, its games. Nothing is known of a run
    without manifest.
    """
    manifest = read_manifest(run_dir)
    known = manifest.get("models", {})
    now = content_hashes(in_folders(config))
    found = [what for role in ("actor", "reflector") for what in _changed(role, known, now)]
    before = manifest.get("games_sha256")
    if task == config.task and before not in (None, games_sha256(task.environment, environment)):
        found.append(
            f"the games of {task.environment.name!r} (a download or a package has changed)"
        )
    return found


def _changed(role: str, known: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """What of a role is no longer what it was, by the hashes in the manifest and those of now."""
    if role in now and known.get(role, now[role]) != now[role]:
        yield f"the {role}'s model (its files differ)"
    name = f"{role} adapter"
    if known and known.get(name) != now.get(name):
        about = "its files differ" if name in now else "there is none"
        yield f"the {role}'s adapter ({about if name in known else 'there was none'})"


def _what_is_played(task: TaskConfig) -> dict[str, Any]:
    """Without the workers, who change no result."""
    played = dataclasses.asdict(task)
    for name in ("num_workers", "max_live_games", "deadline_s"):
        del played["environment"][name]
    return played


def _split_of(config: TrainConfig, settings: EnvironmentConfig, family: str) -> str:
    if settings.name != config.task.environment.name:
        return "transfer"
    return "train" if family in config.task.environment.train_families else "heldout"


if __name__ == "__main__":
    main()
