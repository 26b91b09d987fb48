"""Games x system prompt -> trajectories: token generation overlaps with environment steps, and
every conversation keeps its KV cache.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

from envs.api import GameId, Outcome, Pool, PoolEvent
from ictjax import keys
from ictjax.actions import parse_react
from ictjax.chat import ChatTokenizer
from ictjax.config import RolloutConfig
from ictjax.records import Message, ParseFailure, Trajectory, Turn
from ictjax.sampler import Generation, Request, Sampler

# How long one wait for an environment may last when nothing is left to decode. Deadlines are the
# pool's; this only bounds a single poll.
_POLL_S = 1.0


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
    conversation: int | None = None
    observation: str = ""
    actions: tuple[str, ...] = ()
    state_hash: str = ""
    stopped: bool = False  # the last reply ended with a stop token
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
    watch: Callable[[Episode, Turn], None] | None = None,
) -> list[Trajectory]:
    """Plays every episode and returns the trajectories in the order asked.

    Whenever an environment answers, its conversation is extended by the new observation's tokens
    only, while the others keep decoding; a long system prompt is prefilled once for all its games.
    Tokens depend on (weights, prompt, game, key) alone, so slots, workers and arrival order do not
    change a trajectory. At temperature 0 equal (system prompt, game) pairs are played once and
    shared.

    A reply without a usable action is played as the empty action, which every game answers with a
    note and which costs a step; the turn records the failure. A context that is full ends the
    episode like a step limit. A fault of the environment gives an `Outcome.FAILED` trajectory with
    its error, and never stops the others.

    Args:
      sampler: of the actor.
      chat: the actor's tokenizer.
      pool: of the environment that the games belong to.
      episodes: what to play.
      config: limits and sampling.
      progress: called with (finished, total) after every finished episode.
      watch: called with every turn as soon as the environment has answered it.
    """
    greedy = config.temperature == 0
    unique: dict[tuple, _Play] = {}
    plays = []
    for episode in episodes:
        identity = (
            (episode.system_prompt, episode.game)
            if greedy
            else (episode.system_prompt, episode.game, episode.key, len(plays))
        )
        plays.append(unique.setdefault(identity, _Play(episode=episode)))
    run = _Rollout(sampler, chat, pool, config, list(unique.values()), progress, watch)
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
    """The share of won episodes among those the environment did not fail; None when it failed all
    of them.
    """
    valid = [t.success for t in trajectories if t.outcome is not Outcome.FAILED]
    return sum(valid) / len(valid) if valid else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObservationMessage(Message):
    """What the actor is shown in one turn, with the actions that were available, whether the text
    lists them or not.
    """

    actions: tuple[str, ...] = ()


def user_message(text: str, actions: Sequence[str], show_actions: bool) -> ObservationMessage:
    """What the actor is shown each turn: the observation and, if asked for, the actions it may
    take.
    """
    listed = f"\nAvailable actions: {', '.join(actions)}" if show_actions and actions else ""
    return ObservationMessage(role="user", content=text + listed, actions=tuple(actions))


def _finished(play: _Play) -> Trajectory:
    assert play.trajectory is not None
    return play.trajectory


class _Rollout:
    """The state of one call of `rollout`."""

    def __init__(
        self,
        sampler: Sampler,
        chat: ChatTokenizer,
        pool: Pool,
        config: RolloutConfig,
        plays: list[_Play],
        progress: Callable[[int, int], None] | None,
        watch: Callable[[Episode, Turn], None] | None,
    ):
        self.sampler, self.chat, self.pool, self.config, self.plays = (
            sampler,
            chat,
            pool,
            config,
            plays,
        )
        self.progress, self.watch = progress, watch
        self.by_ticket: dict[int, _Play] = {}
        self.by_conversation: dict[int, _Play] = {}
        self.num_games = collections.Counter(play.episode.system_prompt for play in plays)
        # prompts whose first episode has no reply yet
        self.followers: dict[str, list[tuple[_Play, tuple[int, ...]]]] = {}
        self.shared: set[str] = set()  # prompts that had a first episode
        self.num_done, self.num_busy = 0, 0  # busy: calls that the pool has not answered

    def play(self) -> None:
        for play in self.plays:
            play.ticket = self.pool.reset(play.episode.game, max_steps=self.config.max_steps)
            self.by_ticket[play.ticket] = play
        self.num_busy = len(self.plays)
        while self.num_done < len(self.plays):
            for event in self.answers():
                self.num_busy -= 1
                self.on_event(self.by_ticket[event.ticket], event)
            for generation in self.sampler.step():
                self.on_generation(self.by_conversation[generation.conversation], generation)

    def close(self) -> None:
        """Gives back what an exception left open."""
        for play in self.by_ticket.values():
            if play.trajectory is None:
                self.pool.release(play.ticket)
        for conversation in self.by_conversation:
            self.sampler.close(conversation)

    def answers(self) -> list[PoolEvent]:
        """Environment answers: waits briefly for stragglers while there is something to decode, and
        long when there is nothing.
        """
        if not self.num_busy:
            return []
        if self.sampler.idle:
            return self.pool.poll(_POLL_S)
        deadline = time.monotonic() + self.config.gather_s
        events = self.pool.poll(self.config.gather_s)
        while len(events) < self.num_busy and (left := deadline - time.monotonic()) > 0:
            events += self.pool.poll(left)
        return events

    def on_event(self, play: _Play, event: PoolEvent) -> None:
        step = event.step
        if play.pending is None:
            play.state_hash = event.state_hash
        else:
            self.book(play, dataclasses.replace(play.pending, reward=step.reward))
            play.pending = None
        play.observation, play.actions = step.observation.text, step.observation.actions
        message = user_message(play.observation, play.actions, self.config.show_actions)
        if step.outcome is not None:
            self.finish(play, step.outcome, step.error)
        elif play.turns:
            self.sampler.extend(
                play.conversation, self.chat.encode_turn(message, stopped=play.stopped)
            )
            self.generate(play)
        else:
            self.begin(
                play,
                self.chat.encode_start(
                    [Message(role="system", content=play.episode.system_prompt), message]
                ),
            )

    def begin(self, play: _Play, ids: tuple[int, ...]) -> None:
        """Opens the conversation; a long start waits for the first reply under the same prompt,
        since the sampler then has its prefix.
        """
        prompt = play.episode.system_prompt
        if prompt in self.followers:
            self.followers[prompt].append((play, ids))
            return
        if (
            self.num_games[prompt] > 1
            and prompt not in self.shared
            and len(ids) >= self.config.share_min_tokens
        ):
            self.shared.add(prompt)
            self.followers[prompt] = []
        play.conversation = self.sampler.open(ids)
        self.by_conversation[play.conversation] = play
        self.generate(play)

    def generate(self, play: _Play) -> None:
        key = (
            keys.fold(play.episode.key, "turn", len(play.turns))
            if self.config.temperature > 0
            else (0, 0)
        )
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
        for follower, ids in self.followers.pop(play.episode.system_prompt, []):
            self.begin(follower, ids)
        play.stopped = generation.finish == "stop"
        text = self.chat.decode(generation.ids)
        # an actor outside the sampler (see ictjax.policy) gave a reason where a reply was expected
        if generation.finish == "failed":
            self.finish(play, Outcome.FAILED, text)
            return
        parsed = parse_react(text, truncated=not play.stopped)
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
            self.book(play, turn)
            self.finish(play, Outcome.STEP_LIMIT)
            return
        play.pending = turn
        self.pool.step(play.ticket, turn.action)
        self.num_busy += 1

    def book(self, play: _Play, turn: Turn) -> None:
        play.turns.append(turn)
        if self.watch is not None:
            self.watch(play.episode, turn)

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
        if play.conversation is not None:
            self.sampler.close(play.conversation)
            del self.by_conversation[play.conversation]
        self.num_done += 1
        if self.progress is not None:
            self.progress(self.num_done, len(self.plays))
