"""Does the trained reflector write better prompts
than the untrained one, on games never seen?

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from envs.api import Environment, GameId, Outcome, Pool
from envs.registry import load_environment
from experiments.commands.evaluate import main
from experiments.console import LiveProgress, reading_bar
from experiments.presets import in_folders
from experiments.run_dir import (
    check_families,
    describe_games,
    open_pool,
)
from experiments.stats import mean_ci, paired_test
from ictjax import keys, meta_env
from ictjax.chat import ChatTokenizer
from ictjax.checkpoint import Checkpointer
from ictjax.learner import init_state, make_optimizer
from ictjax.records import Candidate, Context, Trajectory, to_json
from ictjax.roles import Roles, initial_weights, load_roles
from ictjax.rollout import Episode, parse_failures, success_rate
from ictjax.run_config import (
    EnvironmentConfig,
    EvaluationConfig,
    TaskConfig,
    TrainConfig,
)
from ictjax.run_files import prompt_line, write_lines
from ictjax.sampler import Sampler

ARMS = ("initial", "untrained", "trained")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Games:
    """The games of one family: per run, the batches of its meta-turns and the games of its
    score.
    """

    stream: tuple[tuple[tuple[GameId, ...], ...], ...]
    test: tuple[tuple[GameId, ...], ...]


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
    folders = in_folders(config)
    with reading_bar("reading weights") as reading:
        roles = load_roles(folders, reading)
    step, trained = _trained_weights(run_dir, folders, roles)
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
                environment,
                pool,
                roles,
                trained,
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
        write_lines(
            self._path, [json.dumps({"identity": self._identity, **result}, ensure_ascii=False)]
        )


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


def _trained_weights(run_dir: pathlib.Path, config: TrainConfig, roles: Roles) -> tuple[int, Any]:
    """The step of the newest checkpoint, and what was trained."""
    if not (run_dir / "checkpoints").is_dir():
        raise ValueError(f"{run_dir} holds no checkpoint: train first (`ictjax train`).")
    with Checkpointer(run_dir / "checkpoints") as checkpointer:
        step = checkpointer.latest_step
        if step is None:
            raise ValueError(f"{run_dir} holds no checkpoint: train first (`ictjax train`).")
        fresh = init_state(initial_weights(config, roles), make_optimizer(config.optimizer))
        state, _ = checkpointer.restore(
            step,
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh
            ),
        )
    return step, state.params


def _play_missing(
    run_dir: pathlib.Path,
    config: TrainConfig,
    environment: Environment,
    pool: Pool,
    roles: Roles,
    trained: Any,
    parts: Sequence[_Part],
    total: int,
    progress: LiveProgress,
) -> None:
    evaluation = config.evaluation
    actor_chat, reflector_chat = (
        ChatTokenizer(role.model, thinking=role.thinking)
        for role in (config.actor, config.reflector)
    )
    untrained = roles.reflecting(initial_weights(config, roles))
    key = keys.fold(keys.root_key(evaluation.seed), "evaluation")
    seen = _hashes_of_training(run_dir)
    choose = functools.cache(
        lambda family: choose_games(environment, pool, config, family, seen, key)
    )
    with (
        Sampler(
            roles.actor,
            roles.actor_params,
            config.actor_sampler,
            actor_chat.pad_id,
            mesh=roles.actor_mesh,
        ) as actor,
        Sampler(
            roles.reflector,
            untrained,
            config.reflector_sampler,
            reflector_chat.pad_id,
            mesh=roles.mesh,
        ) as reflector,
    ):
        world = meta_env.World(
            actor=actor,
            actor_chat=actor_chat,
            reflector=reflector,
            reflector_chat=reflector_chat,
            pool=pool,
            games={},
            initial_prompt=config.task.initial_prompt,
            key=key,
            meta=config.meta,
            rollout=config.task.rollout,
            reflector_config=config.reflection,
            temperature=evaluation.temperature,
            progress=progress.phase,
        )
        done, weights = total - len(parts), "untrained"
        for part in parts:
            if part.arm == "trained" and weights != "trained":
                reflector.set_params(roles.reflecting(trained))
                weights = "trained"
            result, trajectories = play_arm(
                world, part.arm, part.family, choose(part.family), evaluation
            )
            part.write(result, trajectories)
            done += 1
            progress.advance(
                done,
                f"{part.arm} on {part.family}: {_percent(result['success'])} of test games won",
            )


def play_arm(
    world: meta_env.World, arm: str, family: str, games: Games, evaluation: EvaluationConfig
) -> tuple[dict[str, Any], list[Trajectory]]:
    """Runs all loops of one arm on one family side by side; returns its result and the TEST
    trajectories, run by run.
    """
    runs = range(evaluation.runs)
    prompts = [world.initial_prompt] * evaluation.runs
    lines: list[tuple[Context, Candidate]] = []
    malformed = 0
    for meta_turn in range(evaluation.meta_turns if arm != "initial" else 0):
        contexts = _contexts(
            world, family, prompts, [games.stream[run][meta_turn] for run in runs], meta_turn
        )
        questions = [
            meta_env.reflector_prompt_ids(world.reflector_chat, world.reflector_config, context)
            for context in contexts
        ]
        # The same keys for every arm: what differs between arms is the weights alone.
        group_keys = [[keys.fold(world.key, "reflection", family, run, meta_turn)] for run in runs]
        groups = meta_env.sample_candidates(
            world.reflector,
            world.reflector_chat,
            world.reflector_config,
            questions,
            group_keys,
            world.temperature,
        )
        candidates = [group[0] for group in groups]
        malformed += sum(candidate.system_prompt is None for candidate in candidates)
        prompts = [
            candidate.system_prompt or prompt
            for candidate, prompt in zip(candidates, prompts, strict=True)
        ]
        lines = list(zip(contexts, candidates, strict=True))
    episodes = [
        Episode(
            game=game,
            system_prompt=prompts[run],
            key=keys.fold(world.key, "test", family, run, str(game)),
        )
        for run in runs
        for game in games.test[run]
    ]
    trajectories = world.play(episodes, f"{arm} on {family}")
    played = iter(trajectories)
    success = [success_rate([next(played) for _ in games.test[run]]) for run in runs]
    return {
        "success": success,
        "num_games": len({game for batch in games.test for game in batch}),
        "malformed": malformed,
        "actor_failures": parse_failures(trajectories),
        "failed_episodes": sum(t.outcome is Outcome.FAILED for t in trajectories),
        "prompts": [
            _prompt_line(
                arm, family, run, prompts[run], success[run], lines[run] if lines else None
            )
            for run in runs
        ],
    }, trajectories


def _prompt_line(
    arm: str,
    family: str,
    run: int,
    prompt: str,
    success: float | None,
    last: tuple[Context, Candidate] | None,
) -> str:
    """The prompt that was scored, and what the reflector read and wrote in the loop's last
    meta-turn.
    """
    where = {"arm": arm, "family": family, "run": run, "success": success}
    wrote = {} if last is None else json.loads(prompt_line(*last))
    return json.dumps(
        {**wrote, **where, "system_prompt": prompt}, ensure_ascii=False, separators=(",", ":")
    )


def _contexts(
    world: meta_env.World,
    family: str,
    prompts: Sequence[str],
    batches: Sequence[Sequence[GameId]],
    meta_turn: int,
) -> list[Context]:
    episodes = [
        Episode(
            game=game,
            system_prompt=prompt,
            key=keys.fold(world.key, "stream", family, run, meta_turn, str(game)),
        )
        for run, (prompt, batch) in enumerate(zip(prompts, batches, strict=True))
        for game in batch
    ]
    played = iter(world.play(episodes, f"stream of {family}"))
    return [
        Context(
            loop=run,
            meta_turn=meta_turn,
            family=family,
            system_prompt=prompt,
            trajectories=tuple(next(played) for _ in batches[run]),
        )
        for run, prompt in enumerate(prompts)
    ]


def choose_games(
    environment: Environment,
    pool: Pool,
    config: TrainConfig,
    family: str,
    seen: frozenset[str],
    key: keys.Key,
) -> Games:
    """Draws the STREAM games of every run, then TEST games with initial states that are new and
    pairwise different.

    Runs share TEST games only when the split has too few. Raises ValueError when it has none.
    """
    evaluation, per_batch = config.evaluation, config.meta.games_per_context
    train = _shuffled(environment.games(family, "train"), keys.fold(key, "stream games", family))
    needed = evaluation.runs * evaluation.meta_turns * per_batch
    flat = [train[i % len(train)] for i in range(needed)]
    batches = [tuple(flat[i : i + per_batch]) for i in range(0, needed, per_batch)]
    taken = set(seen) | set(state_hashes(pool, flat))
    test: list[GameId] = []
    candidates = _shuffled(environment.games(family, "test"), keys.fold(key, "test games", family))
    wanted = evaluation.runs * evaluation.test_games
    for chunk in _chunks(candidates, wanted):
        for game, digest in zip(chunk, state_hashes(pool, chunk), strict=True):
            if digest and digest not in taken and len(test) < wanted:
                taken.add(digest)
                test.append(game)
        if len(test) == wanted:
            break
    if not test:
        raise ValueError(
            f"Family {family!r} has no test game whose initial state is new: leave it out of"
            " task.environment.heldout_families."
        )
    size, turns = min(evaluation.test_games, len(test)), evaluation.meta_turns
    return Games(
        stream=tuple(
            tuple(batches[run * turns : (run + 1) * turns]) for run in range(evaluation.runs)
        ),
        test=tuple(
            tuple(test[(run * size + i) % len(test)] for i in range(size))
            for run in range(evaluation.runs)
        ),
    )


def state_hashes(pool: Pool, games: Sequence[GameId]) -> list[str]:
    """The hash of every game's initial state; empty for a game that the environment cannot
    start.
    """
    places = {pool.reset(game, max_steps=1): index for index, game in enumerate(games)}
    hashes = [""] * len(games)
    waiting = set(places)
    while waiting:
        for event in pool.poll(1.0):
            hashes[places[event.ticket]] = event.state_hash
            pool.release(event.ticket)
            waiting.discard(event.ticket)
    return hashes


def _hashes_of_training(run_dir: pathlib.Path) -> frozenset[str]:
    """Initial states of all games that training has played."""
    found: set[str] = set()
    for path in (run_dir / "episodes").glob("iteration_*.jsonl"):
        found |= {
            json.loads(line)["state_hash"] for line in path.read_text(encoding="utf-8").splitlines()
        }
    for path in (run_dir / "contexts").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            found |= {trajectory["state_hash"] for trajectory in json.loads(line)["trajectories"]}
    return frozenset(found)


def _shuffled(games: Sequence[GameId], key: keys.Key) -> list[GameId]:
    return [games[i] for i in keys.generator(key).permutation(len(games))]


def _chunks(games: Sequence[GameId], size: int) -> Iterator[Sequence[GameId]]:
    return (games[i : i + size] for i in range(0, len(games), size))


def _percent(rates: Sequence[float | None]) -> str:
    known = [rate for rate in rates if rate is not None]
    return f"{100 * sum(known) / len(known):.1f} %" if known else "none"


if __name__ == "__main__":
    main()
