"""In-context Training loops: contexts collected over meta-turns, G candidate prompts for each, and
their rewards on replayed and fresh games.

Host logic only: no arrays, no weights. Everything random is keyed by what it belongs to (iteration,
context, candidate, game), and `LoopState` is all there is to remember between iterations, so a
resumed run draws the same games, prompts and tokens.
"""

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from envs.api import GameId, Outcome, Pool
from ictjax import keys
from ictjax.config import MetaConfig
from ictjax.hosts import ALONE, Hosts
from ictjax.records import (
    Candidate,
    Context,
    ParseFailure,
    Trajectory,
    candidate_from_json,
    count_failures,
    to_json,
    trajectory_from_json,
)
from ictjax.reflector import Question, Reflector
from ictjax.rollout import Episode, parse_failures, rollout, success_rate
from ictjax.run_config import TaskConfig
from ictjax.speaker import Speaker

PhaseProgress = Callable[[str, int, int], None]  # phase, finished, total


class Loop(NamedTuple):
    """One In-context Training loop under way."""

    number: int
    family: str
    meta_turn: int
    last_turn: int  # the loop is replaced after this meta-turn
    system_prompt: str


class LoopState(NamedTuple):
    """What is remembered between iterations."""

    loops: tuple[Loop, ...]
    next_loop: int
    positions: Mapping[str, int]  # per family: how many games of its shuffled order are used


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arena:
    """Where loops run: the players, the games and the settings. Fixed during a run, apart from the
    reflector's weights inside its speaker.
    """

    actor: Speaker
    reflector: Reflector
    pool: Pool
    task: TaskConfig
    games: Mapping[str, Sequence[GameId]]  # per family, to draw from
    key: keys.Key
    meta: MetaConfig
    progress: PhaseProgress | None = None
    hosts: Hosts = ALONE

    def __post_init__(self):
        fresh = self.meta.fresh_games if self.meta.replay_weight < 1 else 0
        needed = self.meta.games_per_context + fresh
        for family, games in self.games.items():
            if len(games) < needed:
                raise ValueError(
                    f"Family {family!r} has {len(games)} games, a context and its fresh games need"
                    f" {needed}: lower meta.games_per_context or meta.fresh_games."
                )

    def play(self, episodes: Sequence[Episode], phase: str) -> list[Trajectory]:
        """Rolls episodes out with the actor."""
        return self.hosts.together(
            episodes,
            lambda share: rollout(
                self.actor, self.pool, share, self.task.rollout, progress=self.reporter(phase)
            ),
            to_json,
            trajectory_from_json,
        )

    def ask(
        self,
        asked: Sequence[Context | Question],
        group_keys: Sequence[Sequence[keys.Key]],
        phase: str | None = None,
    ) -> list[list[Candidate]]:
        """Samples a reply of the reflector to every context, or question, with each of its keys.

        Args:
          phase: what whoever watches is told of it; None: nothing.
        """
        return self.hosts.together(
            list(zip(asked, group_keys, strict=True)),
            lambda share: self.reflector.candidates(
                [one for one, _ in share],
                [some for _, some in share],
                None if phase is None else self.reporter(phase),
            ),
            lambda group: json.dumps([to_json(candidate) for candidate in group]),
            lambda text: [candidate_from_json(line) for line in json.loads(text)],
        )

    def reporter(self, phase: str) -> Callable[[int, int], None] | None:
        """Tells whoever watches how far a phase is."""
        return None if self.progress is None else functools.partial(self.progress, phase)


class Scored(NamedTuple):
    """Candidates with their rewards, and the episodes behind these; all by context."""

    groups: list[list[Candidate]]
    played: list[list[Trajectory]]  # of the candidates in turn, then of the previous prompt
    # the rate of the previous prompt, which "improvement" takes off; None: not measured
    baselines: list[float | None]

    @property
    def trajectories(self) -> list[Trajectory]:
        """Every reward episode, context by context."""
        return [trajectory for played in self.played for trajectory in played]


def initial_state(arena: Arena, num_loops: int) -> LoopState:
    """New loops, staggered: the first life of loop i ends after meta-turn i (modulo), so that later
    iterations mix all meta-turns.
    """
    loops = tuple(
        _new_loop(arena, number, number % arena.meta.meta_turns) for number in range(num_loops)
    )
    return LoopState(loops, num_loops, dict.fromkeys(arena.games, 0))


def state_to_json(state: LoopState) -> dict[str, Any]:
    """Plain lists and dicts."""
    return {
        "loops": [loop._asdict() for loop in state.loops],
        "next_loop": state.next_loop,
        "positions": dict(state.positions),
    }


def state_from_json(data: Mapping[str, Any]) -> LoopState:
    """Reads what `state_to_json` wrote."""
    return LoopState(
        tuple(Loop(**loop) for loop in data["loops"]), data["next_loop"], dict(data["positions"])
    )


def draw_games(
    arena: Arena, state: LoopState, family: str, count: int
) -> tuple[tuple[GameId, ...], LoopState]:
    """The next `count` different games of a family: none comes back before the others were used,
    and every pass has its own order.
    """
    games, position = next_games(
        arena.key, arena.games[family], family, state.positions[family], count
    )
    return games, state._replace(positions={**state.positions, family: position})


def draw_fresh(
    arena: Arena, state: LoopState, context: Context
) -> tuple[tuple[GameId, ...], LoopState]:
    """The next `fresh_games` games of a context's family, without those that the context holds:
    these may come next where a pass over the games ends, or where contexts were drawn before.
    """
    drawn: list[GameId] = []
    while missing := arena.meta.fresh_games - len(drawn):
        games, state = draw_games(arena, state, context.family, missing)
        drawn += [game for game in games if game not in (*context.games, *drawn)]
    return tuple(drawn), state


def next_games(
    key: keys.Key, games: Sequence[GameId], family: str, position: int, count: int
) -> tuple[tuple[GameId, ...], int]:
    """The `count` games at `position` of a family's shuffled passes, and the position behind
    them.
    """
    total = len(games)
    if position % total + count > total:
        # a draw never straddles two passes, so it holds no game twice
        position += total - position % total
    order = _order(key, family, position // total, total)
    return (
        tuple(games[i] for i in order[position % total : position % total + count]),
        position + count,
    )


def collect(
    arena: Arena, state: LoopState, iteration: int, numbers: Sequence[int] | None = None
) -> tuple[list[Context], LoopState]:
    """Plays one new batch of games under the prompt of every loop.

    Args:
      numbers: of the contexts, which their randomness is keyed by; a context of number n is of
        loop n, counted around. One of every loop by default.
    """
    numbers = range(len(state.loops)) if numbers is None else numbers
    asked = [state.loops[number % len(state.loops)] for number in numbers]
    batches = []
    for loop in asked:
        games, state = draw_games(arena, state, loop.family, arena.meta.games_per_context)
        batches.append(games)
    places = list(zip(numbers, asked, batches, strict=True))
    return play_contexts(arena, places, iteration), state


def play_contexts(
    arena: Arena, batches: Sequence[tuple[int, Loop, Sequence[GameId]]], iteration: int
) -> list[Context]:
    """Plays games under the prompts of loops, each with its number among the contexts of this
    iteration, on which its keys depend.
    """
    episodes = [
        Episode(
            game=game,
            system_prompt=loop.system_prompt,
            key=keys.fold(arena.key, "context", iteration, q, str(game)),
        )
        for q, loop, games in batches
        for game in games
    ]
    played = iter(arena.play(episodes, "contexts"))
    return [
        Context(
            loop=loop.number,
            meta_turn=loop.meta_turn,
            family=loop.family,
            system_prompt=loop.system_prompt,
            trajectories=tuple(next(played) for _ in games),
        )
        for _, loop, games in batches
    ]


def propose(
    arena: Arena,
    contexts: Sequence[Context],
    group_size: int,
    iteration: int,
    numbers: Sequence[int] | None = None,
) -> list[list[Candidate]]:
    """Samples `group_size` replies to every context from the reflector; `numbers` as in
    `collect`.
    """
    group_keys = [
        [candidate_key(arena, iteration, q, g) for g in range(group_size)]
        for q in (range(len(contexts)) if numbers is None else numbers)
    ]
    return arena.ask(contexts, group_keys, "candidates")


def candidate_key(arena: Arena, iteration: int, context: int, candidate: int) -> keys.Key:
    """The key of one reply of the reflector."""
    return keys.fold(arena.key, "candidate", iteration, context, candidate)


def score(
    arena: Arena,
    state: LoopState,
    contexts: Sequence[Context],
    groups: Sequence[Sequence[Candidate]],
    iteration: int,
    numbers: Sequence[int] | None = None,
) -> tuple[Scored, LoopState]:
    """Plays the reward games of every candidate, all in one rollout, and fills in the rewards;
    `numbers` as in `collect`.

    Replay: the context's own games under the new prompt (the paper's reward). Fresh: `fresh_games`
    other games of the family, the same for all candidates of a context. A reply without a usable
    prompt gets `malformed_reward`. A candidate whose reward games all failed through the
    environment's fault has reward None and is left out of its group.

    With `meta.reward` "improvement" (LSE, https://arxiv.org/abs/2603.18620) the rate of the
    previous prompt on the same games is taken off: of the replayed ones the context's own episodes,
    and fresh ones are played under it once, for the whole group. Within a group it is a constant
    and cancels in the advantages; what changes are rewards as they are shown, the place of
    `malformed_reward` among them (0 is then as good as the previous prompt, below -1 is worse than
    any prompt), and groups that lose all rewards because the baseline could not be measured.
    """
    meta = arena.meta
    numbers = range(len(contexts)) if numbers is None else numbers
    batches: list[tuple[tuple[GameId, ...], tuple[GameId, ...]]] = []
    for context in contexts:
        fresh: tuple[GameId, ...] = ()
        if meta.replay_weight < 1:
            fresh, state = draw_fresh(arena, state, context)
        batches.append((context.games if meta.replay_weight > 0 else (), fresh))
    episodes = [
        Episode(
            game=game,
            system_prompt=candidate.system_prompt,
            key=keys.fold(arena.key, "reward", iteration, q, g, str(game)),
        )
        for q, group, batch in zip(numbers, groups, batches, strict=True)
        for g, candidate in enumerate(group)
        if candidate.system_prompt is not None
        for games in batch
        for game in games
    ]
    improvement = meta.reward == "improvement"
    if improvement:
        episodes += [
            Episode(
                game=game,
                system_prompt=context.system_prompt,
                key=keys.fold(arena.key, "baseline", iteration, q, str(game)),
            )
            for q, context, (_, fresh) in zip(numbers, contexts, batches, strict=True)
            for game in fresh
        ]
    trajectories = arena.play(episodes, "rewards")
    num_baseline = sum(len(fresh) for _, fresh in batches) if improvement else 0
    split = len(trajectories) - num_baseline
    played, before = iter(trajectories[:split]), iter(trajectories[split:])
    scored = Scored([], [], [])
    for context, group, (replay_games, fresh_games) in zip(contexts, groups, batches, strict=True):
        baseline, rewarded, shown, unchanged = 0.0, [], [], []
        if improvement:
            unchanged = [next(before) for _ in fresh_games]
            baseline = mixed_reward(
                success_rate(context.trajectories), success_rate(unchanged), meta.replay_weight
            )
            scored.baselines.append(baseline)
        for candidate in group:
            if candidate.system_prompt is None:
                reward = None if baseline is None else meta.malformed_reward
                rewarded.append(dataclasses.replace(candidate, reward=reward))
                continue
            replays, others = (
                [next(played) for _ in games] for games in (replay_games, fresh_games)
            )
            replay, fresh_rate = success_rate(replays), success_rate(others)
            reward = mixed_reward(replay, fresh_rate, meta.replay_weight)
            rewarded.append(
                dataclasses.replace(
                    candidate,
                    replay_reward=replay,
                    fresh_reward=fresh_rate,
                    reward=None if reward is None or baseline is None else reward - baseline,
                )
            )
            shown += [*replays, *others]
        scored.groups.append(rewarded)
        scored.played.append([*shown, *unchanged])
    return scored, state


def mixed_reward(replay: float | None, fresh: float | None, replay_weight: float) -> float | None:
    """The weighted mean of the parts that the weight asks for; None when one of them could not be
    measured.
    """
    reward = 0.0
    for weight, rate in ((replay_weight, replay), (1 - replay_weight, fresh)):
        if weight > 0:
            if rate is None:
                return None
            reward += weight * rate
    return reward


def advance(
    arena: Arena, state: LoopState, groups: Sequence[Sequence[Candidate]], iteration: int
) -> LoopState:
    """Moves every loop to its next meta-turn under one of the valid candidates, drawn by key (the
    old prompt when there is none).
    """
    loops, next_loop = [], state.next_loop
    for q, (loop, group) in enumerate(zip(state.loops, groups, strict=True)):
        if loop.meta_turn >= loop.last_turn:
            loops.append(_new_loop(arena, next_loop, arena.meta.meta_turns - 1))
            next_loop += 1
        else:
            prompt = following_prompt(arena, loop, group, iteration, q)
            loops.append(loop._replace(meta_turn=loop.meta_turn + 1, system_prompt=prompt))
    return state._replace(loops=tuple(loops), next_loop=next_loop)


def following_prompt(
    arena: Arena, loop: Loop, group: Sequence[Candidate], iteration: int, context: int
) -> str:
    """What a loop goes on with behind the context of this number; its own prompt where none of the
    candidates is valid.
    """
    key = keys.fold(arena.key, "next", iteration, context)
    return next_prompt(group, key) or loop.system_prompt


def next_prompt(group: Sequence[Candidate], key: keys.Key) -> str | None:
    """The prompt of one valid candidate drawn by key; None when no candidate is valid."""
    prompts = [
        candidate.system_prompt for candidate in group if candidate.system_prompt is not None
    ]
    return prompts[int(keys.generator(key).integers(len(prompts)))] if prompts else None


def draw_contexts(arena: Arena, contexts: Sequence[Context], iteration: int) -> list[Context]:
    """The precollected contexts of one iteration (counted from 1): passes over all of them, each
    pass in its own order.
    """
    first = (iteration - 1) * arena.meta.contexts_per_iteration
    total = len(contexts)
    positions = range(first, first + arena.meta.contexts_per_iteration)
    return [
        contexts[_order(arena.key, "contexts", position // total, total)[position % total]]
        for position in positions
    ]


def summarise(arena: Arena, contexts: Sequence[Context], scored: Scored) -> dict[str, Any]:
    """The host-side metrics of an iteration; rates and rewards are fractions, lengths are tokens.
    None where nothing was measured.
    """
    candidates = [candidate for group in scored.groups for candidate in group]
    prompts = [
        candidate.system_prompt for candidate in candidates if candidate.system_prompt is not None
    ]
    by_family: dict[str, list[float | None]] = defaultdict(list)
    for context, group in zip(contexts, scored.groups, strict=True):
        by_family[context.family] += [candidate.reward for candidate in group]
    played = [t for context in contexts for t in context.trajectories] + scored.trajectories
    kinds = (
        ParseFailure.TRUNCATED,
        ParseFailure.NO_ANALYSIS,
        ParseFailure.NO_PROMPT,
        ParseFailure.EMPTY_PROMPT,
        ParseFailure.PROMPT_TOO_LONG,
    )
    return {
        "reward": _mean([c.reward for c in candidates]),
        "reward_replay": _mean([c.replay_reward for c in candidates]),
        "reward_fresh": _mean([c.fresh_reward for c in candidates]),
        "reward_best": _mean(
            [
                max((c.reward for c in group if c.reward is not None), default=None)
                for group in scored.groups
            ]
        ),
        "reward_family": {family: _mean(rewards) for family, rewards in sorted(by_family.items())},
        "context_success": success_rate([t for context in contexts for t in context.trajectories]),
        "context_meta_turn": _mean([float(context.meta_turn) for context in contexts]),
        "unrewarded_candidates": sum(c.reward is None for c in candidates),
        "candidates": len(candidates),
        "malformed_candidates": sum(c.system_prompt is None for c in candidates),
        "cut_contexts": sum(map(arena.reflector.cuts, contexts)),
        "distinct_prompts": len(set(prompts)),
        "prompt_tokens": _mean(
            [float(arena.reflector.speaker.num_tokens(prompt)) for prompt in prompts]
        ),
        "reply_tokens": _mean([float(len(c.reply_ids)) for c in candidates]),
        "reflector_tokens": sum(len(c.reply_ids) for c in candidates),
        "reflector_failures": count_failures(kinds, [c.failure for c in candidates]),
        "actor_failures": parse_failures(played),
        "episodes": len(played),
        "turns": sum(len(t.turns) for t in played),
        "failed_episodes": sum(t.outcome is Outcome.FAILED for t in played),
        **({"reward_baseline": _mean(scored.baselines)} if scored.baselines else {}),
    }


def counts(arena: Arena) -> dict[str, int | float]:
    """What workers and speakers have counted so far; depends on the wall clock."""
    return {
        f"{who}_{name}": count
        for who, stats in (
            ("worker", dataclasses.asdict(arena.pool.stats)),
            ("actor", arena.actor.stats),
            ("reflector", arena.reflector.speaker.stats),
        )
        for name, count in stats.items()
    }


def _new_loop(arena: Arena, number: int, last_turn: int) -> Loop:
    return Loop(
        number,
        family_of_loop(arena.key, sorted(arena.games), number),
        0,
        last_turn,
        arena.task.initial_prompt,
    )


def family_of_loop(key: keys.Key, families: Sequence[str], number: int) -> str:
    """The family of the n-th loop: they take turns, in an order of their own for every pass over
    them.
    """
    order = _order(key, "families", number // len(families), len(families))
    return families[order[number % len(families)]]


@functools.lru_cache(maxsize=256)
def _order(key: keys.Key, what: str, epoch: int, total: int) -> tuple[int, ...]:
    """A shuffled order of 0 .. total - 1."""
    return tuple(keys.generator(keys.fold(key, "order", what, epoch)).permutation(total).tolist())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
