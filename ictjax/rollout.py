"""Games x system prompt -> trajectories: replies overlap with environment steps, and every
conversation goes on where it was.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

from envs.api import GameId, Outcome, Pool, PoolEvent
from envs.stopping import check, unwinding
from ictjax import keys
from ictjax.actions import parse_react
from ictjax.config import RolloutConfig
from ictjax.records import Message, ParseFailure, Trajectory, Turn, count_failures
from ictjax.speaker import Finish, Limits, Reply, Speaker

# How long one wait for an environment may last when nobody is left to speak. Deadlines are the
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
    ticket: int
    conversation: int
    observation: str = ""
    actions: tuple[str, ...] = ()
    state_hash: str = ""
    turns: list[Turn] = dataclasses.field(default_factory=list)
    pending: Turn | None = None  # the reply whose action the environment is working on
    trajectory: Trajectory | None = None


def rollout(
    speaker: Speaker,
    pool: Pool,
    episodes: Sequence[Episode],
    config: RolloutConfig,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[Episode, Turn], None] | None = None,
) -> list[Trajectory]:
    """Plays every episode and returns the trajectories in the order asked.

    Whenever an environment answers, its conversation goes on by the new observation, while the
    others keep speaking. A model's tokens depend on (weights, prompt, game, key) alone, so slots,
    workers and arrival order do not change a trajectory. Where the speaker repeats itself (a greedy
    model) equal (system prompt, game) pairs are played once and shared.

    A reply without a usable action is played as the empty action, which every game answers with a
    note and which costs a step; the turn records the failure. A context that is full ends the
    episode like a step limit. A fault of the environment, or a reply that failed, gives an
    `Outcome.FAILED` trajectory with its error, and never stops the others.

    Args:
      speaker: the actor; other conversations with it rest meanwhile.
      pool: of the environment that the games belong to.
      episodes: what to play.
      config: limits and sampling.
      progress: called with (finished, total) after every finished episode.
      watch: called with every turn as soon as the environment has answered it.
    """
    limits = turn_limits(config)
    repeats = speaker.repeats(limits)
    places: list[int] = []  # of every episode in `unique`
    unique: list[Episode] = []
    known: dict[tuple[str, GameId], int] = {}
    for episode in episodes:
        new = len(unique)
        place = known.setdefault((episode.system_prompt, episode.game), new) if repeats else new
        if place == new:
            unique.append(episode)
        places.append(place)
    run = _Rollout(speaker, pool, config, limits, progress, watch)
    try:
        with unwinding():
            trajectories = run.play(unique)
    finally:
        run.close()
    return [trajectories[place] for place in places]


def turn_limits(config: RolloutConfig) -> Limits:
    """How the actor's replies are drawn."""
    return Limits(
        max_tokens=config.max_turn_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        stop=config.stop,
    )


def parse_failures(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """How many replies failed to parse, by type: the usual types always, others where they
    occurred.
    """
    kinds = (ParseFailure.NO_ACTION, ParseFailure.EMPTY_ACTION, ParseFailure.TRUNCATED)
    return count_failures(
        kinds, [turn.failure for trajectory in trajectories for turn in trajectory.turns]
    )


def success_rate(trajectories: Sequence[Trajectory]) -> float | None:
    """The share of won episodes among those the environment did not fail; None when it failed all
    of them.
    """
    valid = [t.success for t in trajectories if t.outcome is not Outcome.FAILED]
    return sum(valid) / len(valid) if valid else None


def user_message(text: str, actions: Sequence[str], show_actions: bool) -> Message:
    """What the actor is shown each turn: the observation and, if asked for, the actions it may
    take.
    """
    listed = f"\nAvailable actions: {', '.join(actions)}" if show_actions and actions else ""
    return Message(role="user", content=text + listed)


class _Rollout:
    """The state of one call of `rollout`."""

    def __init__(
        self,
        speaker: Speaker,
        pool: Pool,
        config: RolloutConfig,
        limits: Limits,
        progress: Callable[[int, int], None] | None,
        watch: Callable[[Episode, Turn], None] | None,
    ):
        self.speaker, self.pool, self.config, self.limits = speaker, pool, config, limits
        self.progress, self.watch = progress, watch
        self.plays: list[_Play] = []
        self.by_ticket: dict[int, _Play] = {}
        self.by_conversation: dict[int, _Play] = {}
        self.num_done, self.num_busy = 0, 0  # busy: calls that the pool has not answered

    def play(self, episodes: Sequence[Episode]) -> list[Trajectory]:
        for episode in episodes:
            play = _Play(
                episode=episode,
                ticket=self.pool.reset(episode.game, max_steps=self.config.max_steps),
                conversation=self.speaker.open(
                    [Message(role="system", content=episode.system_prompt)]
                ),
            )
            self.plays.append(play)
            self.by_ticket[play.ticket] = self.by_conversation[play.conversation] = play
        self.num_busy = len(self.plays)
        while self.num_done < len(self.plays):
            check()
            for event in self.answers():
                self.num_busy -= 1
                self.on_event(self.by_ticket[event.ticket], event)
            for reply in self.speaker.step():
                self.on_reply(self.by_conversation[reply.conversation], reply)
        return [play.trajectory for play in self.plays if play.trajectory is not None]

    def close(self) -> None:
        """Gives back what an exception left open."""
        for play in self.plays:
            if play.trajectory is None:
                self.pool.release(play.ticket)
                self.speaker.close(play.conversation)

    def answers(self) -> list[PoolEvent]:
        """Environment answers: waits briefly for stragglers while there is something to say, and
        long when there is nothing.
        """
        if not self.num_busy:
            return []
        if self.speaker.idle:
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
        if step.outcome is not None:
            self.finish(play, step.outcome, step.error)
            return
        message = user_message(play.observation, play.actions, self.config.show_actions)
        self.speaker.hear(play.conversation, message, play.actions)
        key = (0, 0)
        if self.config.temperature > 0:
            key = keys.fold(play.episode.key, "turn", len(play.turns))
        self.speaker.ask(play.conversation, self.limits, key)

    def on_reply(self, play: _Play, reply: Reply) -> None:
        if reply.finish is Finish.FAILED:
            self.finish(play, Outcome.FAILED, f"The actor failed: {reply.error}.")
            return
        parsed = parse_react(reply.text, truncated=reply.truncated)
        failed = isinstance(parsed, ParseFailure)
        turn = Turn(
            observation=play.observation,
            actions=play.actions,
            reply=reply.text,
            thought="" if failed else parsed.thought,
            action="" if failed else parsed.action,
            reward=0.0,
            failure=parsed if failed else None,
        )
        if reply.finish is Finish.CONTEXT:
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
        self.speaker.close(play.conversation)
        del self.by_conversation[play.conversation]
        self.num_done += 1
        if self.progress is not None:
            self.progress(self.num_done, len(self.plays))
