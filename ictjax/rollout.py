"""Games x system prompt -> trajectories: token generation overlaps with environment steps, and every conversation keeps its KV cache."""

import dataclasses
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from envs.api import GameId, Outcome, Pool, PoolEvent
from ictjax import keys
from ictjax.actions import parse_react
from ictjax.chat import ChatTokenizer
from ictjax.records import Message, ParseFailure, Trajectory, Turn
from ictjax.sampler import Generation, Request, Sampler

# How long one wait for an environment may last when nothing is left to decode. Deadlines are the pool's; this only bounds a single poll.
_POLL_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the actor plays. Limits: per episode (`max_steps`), per turn (`max_turn_tokens`), and the sampler's context for both together."""

    max_steps: int
    max_turn_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    show_actions: bool = False  # list the available actions below each observation
    fork_min_tokens: int = 128  # a system prompt this long, shared by several games, is prefilled once and forked
    gather_s: float = 0.002  # how long to wait for more environment answers before decoding without them

    def __post_init__(self):
        for name in ("max_steps", "max_turn_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {getattr(self, name)}.")
        if self.temperature < 0:
            raise ValueError(f"rollout.temperature must be 0 (greedy) or above, got {self.temperature}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """One game to play under one system prompt; `key` drives the sampling of its turns."""

    game: GameId
    system_prompt: str
    key: keys.Key = (0, 0)


@dataclasses.dataclass(kw_only=True)
class _Play:
    """An episode under way."""

    episode: Episode
    ticket: int = -1
    admitted: bool = False  # has a slot, or the right to open one with its first observation
    started: bool = False  # the game has answered the reset
    conversation: int | None = None
    num_ids_open: int = 0  # start ids that the conversation already holds (a forked prefix)
    held_for_fork: bool = False  # the conversation is still the prefix that siblings fork from
    observation: str = ""
    actions: tuple[str, ...] = ()
    state_hash: str = ""
    last_finish: str = ""
    turns: list[Turn] = dataclasses.field(default_factory=list)
    pending: Turn | None = None  # the reply whose action the environment is working on
    trajectory: Trajectory | None = None


def rollout(
    sampler: Sampler,
    chat: ChatTokenizer,
    pool: Pool,
    episodes: Sequence[Episode],
    config: RolloutConfig,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trajectory]:
    """Plays every episode and returns the trajectories in the order asked.

    At most as many episodes are open as the sampler has slots; whenever an environment answers, its conversation is extended by the new
    observation's tokens only, while the others keep decoding. Tokens depend on (weights, prompt, game, key) alone, so slots, workers and
    arrival order do not change a trajectory. At temperature 0 equal (system prompt, game) pairs are played once and shared.

    A reply without a usable action is played as the empty action, which every game answers with a note and which costs a step; the turn
    records the failure. A context that is full ends the episode like a step limit. A fault of the environment gives an `Outcome.FAILED`
    trajectory with its error, and never stops the others.

    Args:
      sampler: of the actor; all its conversations must be closed.
      chat: the actor's tokenizer.
      pool: of the environment that the games belong to.
      episodes: what to play.
      config: limits and sampling.
      progress: called with (finished, total) after every finished episode.
    """
    greedy = config.temperature == 0
    unique: dict[tuple, _Play] = {}
    plays = []
    for episode in episodes:
        identity = (episode.system_prompt, episode.game) if greedy else (episode.system_prompt, episode.game, episode.key, len(plays))
        plays.append(unique.setdefault(identity, _Play(episode=episode)))
    run = _Rollout(sampler, chat, pool, config, list(unique.values()), progress)
    try:
        run.play()
    finally:
        run.close()
    return [_finished(play) for play in plays]


def parse_failures(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """How many replies failed to parse, by type (types that did not occur are 0)."""
    kinds = (ParseFailure.NO_ACTION, ParseFailure.EMPTY_ACTION, ParseFailure.TRUNCATED)
    found = [turn.failure for trajectory in trajectories for turn in trajectory.turns]
    return {str(kind): found.count(kind) for kind in kinds}


def success_rate(trajectories: Sequence[Trajectory]) -> float | None:
    """The share of won episodes among those the environment did not fail; None when it failed all of them."""
    valid = [t.success for t in trajectories if t.outcome is not Outcome.FAILED]
    return sum(valid) / len(valid) if valid else None


def user_message(text: str, actions: Sequence[str], show_actions: bool) -> Message:
    """What the actor is shown each turn: the observation and, if asked for, the actions it may take."""
    listed = f"\nAvailable actions: {', '.join(actions)}" if show_actions and actions else ""
    return Message(role="user", content=text + listed)


def _finished(play: _Play) -> Trajectory:
    assert play.trajectory is not None
    return play.trajectory


class _Rollout:
    """The state of one call of `rollout`."""

    def __init__(self, sampler, chat, pool, config, plays: list[_Play], progress):
        self.sampler, self.chat, self.pool, self.config, self.progress = sampler, chat, pool, config, progress
        by_prompt: dict[str, list[_Play]] = defaultdict(list)
        for play in plays:
            by_prompt[play.episode.system_prompt].append(play)
        # Games of one prompt follow each other, so that their shared prefix is held for as short a time as possible. The first of a group
        # holds the prefix and plays last, so its game starts last.
        self.queue = deque(play for group in by_prompt.values() for play in group)
        self.resets = deque(play for group in by_prompt.values() for play in (*group[1:], group[0]))
        self.group_size = {prompt: len(group) for prompt, group in by_prompt.items()}
        self.num_waiting = dict(self.group_size)  # members without a slot
        self.holders: dict[str, _Play] = {}
        self.by_ticket: dict[int, _Play] = {}
        self.by_conversation: dict[int, _Play] = {}
        self.total, self.num_done, self.num_admitted = len(plays), 0, 0
        self.num_busy = 0  # calls the pool has not answered

    def play(self) -> None:
        while self.num_done < self.total:
            self.admit()
            for event in self.answers():
                self.num_busy -= 1
                self.on_event(self.by_ticket[event.ticket], event)
            if not self.sampler.idle:
                for generation in self.sampler.step():
                    self.on_generation(self.by_conversation[generation.conversation], generation)

    def close(self) -> None:
        for play in self.by_ticket.values():
            if play.trajectory is None:
                self.pool.release(play.ticket)
        for conversation in list(self.by_conversation):
            self.sampler.close(conversation)

    def admit(self) -> None:
        """Gives free slots to the next episodes, and starts the games of as many more, so that they are ready when a slot gets free."""
        slots = self.sampler.config.num_slots
        while self.queue and self.num_admitted < slots:
            self.take_slot(self.queue.popleft(), slots)
        while self.resets and len(self.by_ticket) - self.num_done < 2 * slots:
            play = self.resets.popleft()
            play.ticket = self.pool.reset(play.episode.game, max_steps=self.config.max_steps)
            self.by_ticket[play.ticket] = play
            self.num_busy += 1

    def take_slot(self, play: _Play, slots: int) -> None:
        """Forks the prompt's prefix; the first of a group opens it, and continues it itself when the last one has forked."""
        prompt = play.episode.system_prompt
        self.num_waiting[prompt] -= 1
        if play.trajectory is None:  # else its game failed to start before it had a slot
            self.num_admitted += 1
            play.admitted = True
            prefix = self.chat.system_prefix(prompt)
            if self.group_size[prompt] > 1 and slots > 1 and len(prefix) >= self.config.fork_min_tokens:
                if holder := self.holders.get(prompt):
                    play.conversation = self.sampler.fork(holder.conversation)
                else:
                    self.holders[prompt] = play
                    play.held_for_fork = True
                    play.conversation = self.sampler.open(prefix)
                self.by_conversation[play.conversation] = play
                play.num_ids_open = len(prefix)
            self.begin(play)
        if self.num_waiting[prompt] == 0 and prompt in self.holders:
            holder = self.holders.pop(prompt)
            holder.held_for_fork = False
            if holder.trajectory is None:
                self.begin(holder)
            else:
                self.leave(holder)

    def answers(self) -> list[PoolEvent]:
        """Environment answers: waits briefly for stragglers while there is something to decode, and long when there is nothing."""
        if not self.num_busy:
            assert not self.sampler.idle, "nothing is under way"
            return []
        if self.sampler.idle:
            return self.pool.poll(_POLL_S)
        events, deadline = [], time.monotonic() + self.config.gather_s
        while len(events) < self.num_busy:
            left = deadline - time.monotonic()
            events += self.pool.poll(max(left, 0.0))
            if left <= 0:
                break
        return events

    def on_event(self, play: _Play, event: PoolEvent) -> None:
        step = event.step
        if play.pending is not None:
            play.turns.append(dataclasses.replace(play.pending, reward=step.reward))
            play.pending = None
        else:
            play.state_hash = event.state_hash
        play.observation, play.actions = step.observation.text, step.observation.actions
        if step.outcome is not None:
            self.finish(play, step.outcome, step.error)
        elif play.turns:
            turn = user_message(play.observation, play.actions, self.config.show_actions)
            self.sampler.extend(play.conversation, self.chat.encode_turn(turn, stopped=play.last_finish == "stop"))
            self.generate(play)
        else:
            play.started = True
            self.begin(play)

    def begin(self, play: _Play) -> None:
        """Starts the first turn once the episode has a slot, its game has started, and nobody forks from its prefix any more."""
        if not (play.admitted and play.started) or play.held_for_fork:
            return
        messages = [
            Message(role="system", content=play.episode.system_prompt),
            user_message(play.observation, play.actions, self.config.show_actions),
        ]
        ids = self.chat.encode_start(messages)
        if play.conversation is None:
            play.conversation = self.sampler.open(ids)
            self.by_conversation[play.conversation] = play
        else:
            self.sampler.extend(play.conversation, ids[play.num_ids_open :])
        self.generate(play)

    def generate(self, play: _Play) -> None:
        key = keys.fold(play.episode.key, "turn", len(play.turns)) if self.config.temperature > 0 else (0, 0)
        request = Request(
            max_new_tokens=self.config.max_turn_tokens,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            stop_ids=self.chat.stop_ids,
            key=keys.as_array(key),
        )
        self.sampler.generate(play.conversation, request)

    def on_generation(self, play: _Play, generation: Generation) -> None:
        play.last_finish = generation.finish
        text = self.chat.decode(generation.ids)
        parsed = parse_react(text, truncated=generation.finish != "stop")
        failed = isinstance(parsed, ParseFailure)
        turn = Turn(
            observation=play.observation,
            actions=play.actions,
            reply=text,
            thought="" if failed else parsed.thought,
            action="" if failed else parsed.action,
            reward=0.0,
            failure=parsed if failed else None,
        )
        if generation.finish == "context":
            play.turns.append(turn)
            self.finish(play, Outcome.STEP_LIMIT)
            return
        play.pending = turn
        self.pool.step(play.ticket, turn.action)
        self.num_busy += 1

    def finish(self, play: _Play, outcome: Outcome, error: str = "") -> None:
        play.trajectory = Trajectory(
            game=play.episode.game,
            system_prompt=play.episode.system_prompt,
            turns=tuple(play.turns),
            outcome=outcome,
            final_observation=play.observation,
            state_hash=play.state_hash,
            error=error,
        )
        self.pool.release(play.ticket)
        self.leave(play)
        self.num_done += 1
        if self.progress is not None:
            self.progress(self.num_done, self.total)

    def leave(self, play: _Play) -> None:
        """Frees the slot, unless siblings still fork from it."""
        if not play.admitted or play.held_for_fork:
            return
        self.num_admitted -= 1
        if play.conversation is not None:
            self.sampler.close(play.conversation)
            del self.by_conversation[play.conversation]
