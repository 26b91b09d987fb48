"""The training loop: contexts -> candidates -> rewards -> advantages -> update -> metrics ->
checkpoint.

Where it deviates from In-context Training as published (arXiv 2605.20477), and from GRPO (arXiv
2402.03300); settings in parentheses:

- Contexts may come from the reflector as it is now, refreshed every iteration, instead of from the
  base reflector before training (meta.collection; "precollected" is the paper's way).
- Loops are staggered, so that an iteration mixes all meta-turns, and go on under one of the valid
  candidates, drawn by key; the paper collects whole loops beforehand.
- The reward may mix fresh games of the family with the replayed ones (meta.replay_weight; 1 is the
  paper's). A reply without a usable prompt earns meta.malformed_reward and is not repaired. A
  candidate whose games the environment failed has no reward and leaves its group.
- Texts of actor, reflector and environments are our own, and so are the splits: disjoint by initial
  state, not by seed.
- Groups whose rewards are all equal hold no signal; they can be given no weight at all
  (grpo.dead_groups).
- The loss is normalised over all tokens of the batch (grpo.loss_normalisation; GRPO averages over
  sequences first). The clip range may be asymmetric (grpo.clip_high), the ratio of tokens or of
  whole sequences (grpo.importance), advantages unscaled by the deviation (grpo.advantage).
- Groups without signal can be refilled from other contexts (grpo.refill_rounds), rewards can be
  lower for long replies (grpo.overlong_penalty), or relative to the previous prompt (meta.reward).
- The old log-probabilities are the learner's own, computed anew at fixed shapes, not the sampler's:
  a resumed run is equal bit by bit. What the sampler reported counts with grpo.correction only,
  whose weights depend on how requests happened to be batched. By default one optimizer step is
  taken per batch of samples (learner.epochs), so that the ratio is 1 and the clip at rest.
- A step whose gradient is not finite changes nothing and is counted; a loss, weight or reward that
  is not, or iterations in a row without anything to learn from (patience), end the run.
- An adapter may be trained instead of all weights (reflector.lora.rank).
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import jax

from envs.api import Environment, Pool
from envs.stopping import check, held
from ictjax import keys, loops
from ictjax.batch import compile_advantages, pack_groups, shaped
from ictjax.checkpoint import Checkpointer
from ictjax.compilation import Updates, compile_all, counted_compilations
from ictjax.health import Health, most_frequent_error
from ictjax.hosts import ALONE, Hosts
from ictjax.keeper import Keeper
from ictjax.learner import (
    init_state,
    make_optimizer,
    make_update,
    state_shardings,
    transformer_functions,
)
from ictjax.metrics import Clock, MetricsWriter, read_metrics
from ictjax.models.attention_choice import attention_of, platform_of, resolve
from ictjax.players import initial_weights, open_players, trained_shapes
from ictjax.precollection import precollected
from ictjax.refill import refill
from ictjax.run_config import TrainConfig
from ictjax.run_files import drop_after, write_iteration
from ictjax.trackers import open_trackers


class TrainProgress(Protocol):
    """What the loop tells whoever watches."""

    def reading(self, finished: int, total: int) -> None: ...  # bytes of a checkpoint

    def phase(self, name: str, finished: int, total: int) -> None: ...

    def iteration(self, number: int, total: int, metrics: dict[str, Any]) -> None: ...


def train(
    config: TrainConfig,
    run_dir: pathlib.Path,
    *,
    environment: Environment,
    pool: Pool,
    progress: TrainProgress | None = None,
    kept: Callable[[], None] | None = None,
    hosts: Hosts = ALONE,
) -> int:
    """Trains the reflector, continuing from the newest checkpoint in `run_dir`, and returns the
    iteration it continued from.

    Per iteration it writes episodes, contexts and prompts (one file each), a line of metrics.jsonl,
    and a checkpoint (every `checkpoint_every`). All randomness is keyed by the iteration, and the
    loss is computed from the learner's own log-probabilities at fixed shapes, so a run that was
    killed and resumed writes the same lines, the key "time" apart: with grpo.correction up to the
    rounding of the sampler's log-probabilities only.

    Contexts that are collected before training are written piece by piece, and `kept` is called
    whenever another one is there.

    With several hosts (`ictjax.hosts`) all of them call this. The first writes to the run
    directory; the others see the same one, or each its own copy.

    Raises:
      ValueError: a folder, tokenizer, family or limit that does not fit; nothing has been
        overwritten then.
      CannotGoOn: nothing can be learned (see `ictjax.health`), or another host cannot go on.
      Stopped: the program was asked to end; the last finished iteration is saved then.
    """
    optimizer = make_optimizer(config.whole_optimizer)
    with contextlib.ExitStack() as stack:
        host: dict[str, Any] | None = None
        with hosts.told():
            checkpointer = stack.enter_context(
                Checkpointer(
                    run_dir / "checkpoints",
                    keep_last=config.keep_last,
                    keep_every=config.keep_every,
                    keep_best=config.keep_best,
                    own_copies=hosts.own_copies,
                )
            )
            newest = hosts.agree(checkpointer.latest_step)
        if newest is None:
            begun = [initial_weights(config, hosts)]  # handed over: gone before there are moments
            with hosts.told():
                state = init_state(begun.pop(), optimizer, config.optimizer.memory)
        else:
            with hosts.told_until() as read:
                state, host = checkpointer.restore(newest, trained_shapes(config), read)
        players = stack.enter_context(
            open_players(
                config,
                state.params,
                None if progress is None else progress.reading,
                step=int(state.step),
                hosts=hosts,
            )
        )
        with hosts.told():
            attention = resolve(config.learner.attention, players.model, platform_of(players.mesh))
            functions = transformer_functions(
                players.model,
                remat=config.remat,
                lora=players.lora,
                mesh=players.mesh,
                attention=attention_of(attention, players.model, players.mesh),
            )
            shardings = state_shardings(state)
            update = Updates(
                make_update(functions, config.grpo, optimizer, config.learner, shardings=shardings),
                config.batch,
                players.mesh,
            )
            compile_all(
                [*players.programs, *update.programs(state, players.base)],
                None if progress is None else functools.partial(progress.phase, "compiling"),
            )
            compile_advantages(config.grpo, config.meta.contexts_per_iteration)
            arena = loops.Arena(
                actor=players.actor,
                reflector=players.reflector,
                pool=pool,
                task=config.task,
                games={
                    family: environment.games(family, "train")
                    for family in config.task.environment.train_families
                },
                key=keys.root_key(config.seed),
                meta=config.meta,
                hosts=hosts,
                progress=None if progress is None else progress.phase,
            )
            first, meta = 0, loops.initial_state(arena, config.meta.contexts_per_iteration)
            if host is not None:
                first, meta = host["iteration"], loops.state_from_json(host["meta"])
            if hosts.first:
                drop_after(run_dir, first)
        hosts.meet()
        collected = None
        if config.meta.collection == "precollected":
            collected = precollected(arena, run_dir, resumed=host is not None, kept=kept)
        writer = None
        with hosts.told():
            if hosts.first:
                trackers = open_trackers(config, run_dir)
                writer = stack.enter_context(
                    MetricsWriter(run_dir, last_iteration=first, mirrors=trackers)
                )
            keeper = stack.enter_context(
                Keeper(
                    checkpointer,
                    every=config.checkpoint_every,
                    last=config.iterations,
                    alone=hosts.count == 1,
                    rewards=[record.get("reward") for record in read_metrics(run_dir)],
                )
            )
        compilations = stack.enter_context(counted_compilations())
        health = Health(min(config.patience, config.iterations))  # a short run, too
        for iteration in range(first + 1, config.iterations + 1):
            clock = Clock()
            if collected is None:
                contexts, meta = loops.collect(arena, meta, iteration)
            else:
                contexts = loops.draw_contexts(arena, collected, iteration)
            clock.lap("contexts_s")
            groups = loops.propose(arena, contexts, config.grpo.group_size, iteration)
            clock.lap("candidates_s")
            scored, meta = loops.score(arena, meta, contexts, groups, iteration)
            clock.lap("rewards_s")
            refills: dict[str, int] = {}
            if config.grpo.refill_rounds:
                refilled, meta = refill(
                    arena,
                    meta,
                    contexts,
                    scored,
                    iteration,
                    max_rounds=config.grpo.refill_rounds,
                    collected=collected,
                )
                contexts, scored, refills = refilled.contexts, refilled.scored, refilled.counts
                clock.lap("refill_s")
            if collected is None:
                meta = loops.advance(arena, meta, scored.groups, iteration)
            if config.grpo.overlong_penalty:
                limit = config.reflection.max_reply_tokens
                scored = scored._replace(groups=shaped(scored.groups, config.grpo, limit))
            health.check_rewards(iteration, scored.groups)
            health.check_samples(iteration, scored.groups, int(state.step))
            check()
            batch, dead_groups = pack_groups(
                config.batch, config.grpo, scored.groups, players.pad_id
            )
            keeper.let_go()
            state, learned = update(state, players.base, batch)
            players.set_trained(state.params, int(state.step))
            learned = jax.device_get(learned)
            bad_leaves = learned.pop("bad_leaves")
            health.check_update(iteration, state.params, bad_leaves, learned["loss"])
            clock.lap("update_s")
            clock.times["compilations"] = compilations.count
            clock.times["process_began"] = first + 1  # counters are those of one process
            metrics, timing = loops.summarise(arena, contexts, scored) | refills, clock.times
            for name, value in learned.items():
                # What the sampler reported depends on how requests happened to be batched.
                (timing if name.startswith("sampler_") else metrics)[name] = float(value)
            metrics["dead_groups"] = dead_groups
            timing["checkpoint_s"] = keeper.settle()
            with held():
                if writer is not None:
                    write_iteration(
                        run_dir, iteration, contexts, scored.groups, scored.trajectories
                    )
                    writer.write(iteration, metrics, timing | loops.counts(arena))
                record = {"iteration": iteration, "meta": loops.state_to_json(meta)}
                keeper.finish(iteration, state, record, metrics["reward"])
            if progress is not None:
                # the error is not in the file: it may name processes and times
                error = most_frequent_error(scored.trajectories)
                more = {"time": timing, "error": error}
                progress.iteration(iteration, config.iterations, metrics | more)
            health.check_iteration(
                iteration,
                scored.groups,
                scored.trajectories,
                updated=metrics["skipped"] < config.learner.epochs,
            )
    return first
