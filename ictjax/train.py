"""The training loop: contexts -> candidates -> rewards -> advantages -> update -> metrics ->
checkpoint.
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from envs.api import Environment, Pool
from ictjax import grpo, keys, meta_env
from ictjax.batch import Batch, pack
from ictjax.chat import ChatTokenizer
from ictjax.checkpoint import Checkpointer
from ictjax.learner import (
    init_state,
    make_optimizer,
    make_update,
    state_shardings,
    transformer_policy,
)
from ictjax.mesh import split_rows
from ictjax.metrics import MetricsWriter
from ictjax.records import Candidate
from ictjax.roles import initial_weights, load_roles
from ictjax.run_config import TrainConfig
from ictjax.run_files import drop_after, write_iteration
from ictjax.sampler import Sampler


class Progress(Protocol):
    """What the loop tells whoever watches."""

    def phase(self, name: str, finished: int, total: int) -> None: ...

    def iteration(self, number: int, total: int, metrics: dict[str, Any]) -> None: ...


def train(
    config: TrainConfig,
    run_dir: pathlib.Path,
    *,
    environment: Environment,
    pool: Pool,
    progress: Progress | None = None,
) -> int:
    """Trains the reflector, continuing from the newest checkpoint in `run_dir`, and returns the
    iteration it continued from.

    Per iteration it writes episodes, contexts and prompts (one file each), a line of metrics.jsonl,
    and a checkpoint (every `checkpoint_every`). All randomness is keyed by the iteration, and the
    loss is computed from the learner's own log-probabilities at fixed shapes, so a run that was
    killed and resumed writes the same lines, the key "time" apart.

    Raises:
      ValueError: a folder, tokenizer, family or limit that does not fit; nothing has been
        overwritten then.
    """
    actor_chat, reflector_chat = (
        ChatTokenizer(role.model, thinking=role.thinking)
        for role in (config.actor, config.reflector)
    )
    roles = load_roles(
        config,
        (
            None
            if progress is None
            else lambda done, total: progress.phase("reading weights, MiB", done >> 20, total >> 20)
        ),
    )
    optimizer = make_optimizer(config.optimizer)
    state = init_state(initial_weights(config, roles), optimizer)
    policy = transformer_policy(
        roles.reflector, remat=config.remat, lora=roles.lora, mesh=roles.mesh
    )
    update = make_update(
        policy, config.grpo, optimizer, config.learner, shardings=state_shardings(state)
    )
    weights = roles.reflecting(state.params)
    with (
        Checkpointer(run_dir / "checkpoints") as checkpointer,
        Sampler(
            roles.actor,
            roles.actor_params,
            config.actor_sampler,
            actor_chat.pad_id,
            mesh=roles.actor_mesh,
        ) as actor,
        Sampler(
            roles.reflector,
            weights,
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
            games={
                family: environment.games(family, "train")
                for family in config.task.environment.train_families
            },
            initial_prompt=config.task.initial_prompt,
            key=keys.root_key(config.seed),
            meta=config.meta,
            rollout=config.task.rollout,
            reflector_config=config.reflection,
            temperature=config.grpo.temperature,
            progress=None if progress is None else progress.phase,
        )
        first, meta = 0, meta_env.initial_state(world, config.meta.contexts_per_iteration)
        if checkpointer.latest_step is not None:
            state, host = checkpointer.restore(None, state)
            first, meta = host["iteration"], meta_env.state_from_json(host["meta"])
        drop_after(run_dir, first)
        collected = (
            meta_env.precollected(world, run_dir / "contexts" / "precollected.jsonl")
            if config.meta.collection == "precollected"
            else None
        )
        reflector.set_params(roles.reflecting(state.params))
        with MetricsWriter(run_dir, last_iteration=first) as writer:
            for iteration in range(first + 1, config.iterations + 1):
                clock = Clock()
                if collected is None:
                    contexts, meta = meta_env.collect(world, meta, iteration)
                else:
                    contexts = meta_env.draw_contexts(world, collected, iteration)
                clock.lap("contexts_s")
                groups = meta_env.propose(world, contexts, config.grpo.group_size, iteration)
                clock.lap("candidates_s")
                scored, meta = meta_env.score(world, meta, contexts, groups, iteration)
                if collected is None:
                    meta = meta_env.advance(world, meta, groups, iteration)
                clock.lap("rewards_s")
                batch, dead_groups = pack_groups(config, scored.groups, reflector_chat.pad_id)
                state, learned = update(state, roles.base, split_rows(batch, roles.mesh))
                reflector.set_params(roles.reflecting(state.params))
                learned = jax.device_get(learned)
                clock.lap("update_s")
                write_iteration(run_dir, iteration, contexts, scored.groups, scored.trajectories)
                metrics, timing = meta_env.summarise(world, contexts, scored), clock.times
                for name, value in learned.items():
                    # What the sampler reported depends on how requests happened to be batched.
                    (timing if name.startswith("sampler_gap") else metrics)[name] = float(value)
                metrics["dead_groups"] = dead_groups
                for who, stats in (
                    ("worker", pool.stats),
                    ("actor", actor.stats),
                    ("reflector", reflector.stats),
                ):
                    timing |= {
                        f"{who}_{name}": count for name, count in dataclasses.asdict(stats).items()
                    }
                writer.write(iteration, metrics, timing)
                if iteration % config.checkpoint_every == 0 or iteration == config.iterations:
                    checkpointer.save(
                        iteration,
                        state,
                        {"iteration": iteration, "meta": meta_env.state_to_json(meta)},
                    )
                if progress is not None:
                    progress.iteration(iteration, config.iterations, metrics)
    return first


def pack_groups(
    config: TrainConfig, groups: Sequence[Sequence[Candidate]], pad_id: int
) -> tuple[Batch, int]:
    """The update's batch of all candidates with their group-relative advantages, and how many
    groups hold no signal.
    """
    reward_qg = np.array(
        [[0.0 if c.reward is None else c.reward for c in group] for group in groups], np.float32
    )
    valid_qg = np.array([[c.reward is not None for c in group] for group in groups])
    result = jax.device_get(grpo.advantages(config.grpo, reward_qg, valid_qg))
    candidates = [candidate for group in groups for candidate in group]
    batch = pack(
        config.batch,
        [candidate.prompt_ids for candidate in candidates],
        [candidate.reply_ids for candidate in candidates],
        advantages=result.advantage_qg.ravel().tolist(),
        weights=result.weight_qg.ravel().tolist(),
        sampler_logprobs=[candidate.logprobs for candidate in candidates],
        pad_id=pad_id,
    )
    return batch, int(result.dead_q.sum())


class Clock:
    """Seconds per phase of one iteration."""

    def __init__(self):
        self.times: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Books the time since the last lap under `name`."""
        now = time.perf_counter()
        self.times[name], self._last = now - self._last, now
