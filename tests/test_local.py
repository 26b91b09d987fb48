"""The pool without workers answers like the one with them."""

import sys

import pytest

from envs.api import GameId, Observation, Outcome, Step
from envs.fake import FakeEnvironment, FakeGame
from envs.local import LocalPool
from envs.pool import MAX_ACTION_CHARS, WorkerPool

DOOR = GameId(env="fake", family="door", key="1")


def answers(pool, actions, *, max_steps=20):
    """The events of one episode, without their tickets."""
    ticket = pool.reset(DOOR, max_steps=max_steps)
    (event,) = pool.poll(60.0)
    events = [(event.step, event.state_hash)]
    for action in actions:
        if events[-1][0].outcome is not None:
            break
        pool.step(ticket, action)
        (event,) = pool.poll(60.0)
        events.append((event.step, event.state_hash))
    return events


@pytest.mark.parametrize(
    "actions",
    [
        ["walk", "walk", "open"],
        ["jump"],
        ["look"] * 9,
        ["x" * (MAX_ACTION_CHARS + 1), "a\ud800b", ""],
    ],
    ids=["won", "dead", "long", "junk"],
)
def test_the_answers_are_those_of_the_worker_pool(actions):
    with LocalPool(FakeEnvironment()) as local, WorkerPool("fake", num_workers=1) as pool:
        assert answers(local, actions, max_steps=5) == answers(pool, actions, max_steps=5)
        assert local.stats == pool.stats


@pytest.mark.parametrize(
    ("reward", "cause"),
    [(float("nan"), "the reward nan"), (float("inf"), "the reward inf"), ("1", "the reward '1'")],
)
def test_a_reward_that_is_no_number_fails_the_episode(monkeypatch, reward, cause):
    monkeypatch.setattr(
        FakeGame, "step", lambda *_: Step(observation=Observation(text="x"), reward=reward)
    )
    with LocalPool(FakeEnvironment()) as pool:
        (_, (step, _)) = answers(pool, ["look"])
    assert step.outcome is Outcome.FAILED
    assert step.reward == 0.0
    assert cause in step.error


def test_lone_surrogates_are_replaced_and_an_exit_is_a_failure(monkeypatch):
    def reset(self, game):
        return Observation(text="\ud800", actions=("\udfff",))

    monkeypatch.setattr(FakeGame, "reset", reset)
    monkeypatch.setattr(FakeGame, "step", lambda *_: sys.exit(3))
    with LocalPool(FakeEnvironment()) as pool:
        ((first, _), (last, _)) = answers(pool, ["look"])
    assert first.observation == Observation(text="?", actions=("?",))
    assert last.error == "The game fake|door|1 failed: it raised SystemExit: 3."


def test_a_game_that_raises_ends_its_own_episode():
    with LocalPool(FakeEnvironment(raise_on="boom")) as pool:
        events = answers(pool, ["look", "boom", "look"])
        assert len(events) == 3
        assert events[-1][0].outcome is Outcome.FAILED
        assert (
            events[-1][0].error
            == "The game fake|door|1 failed: it raised RuntimeError: the fake game was told to"
            " raise on 'boom'."
        )
        assert answers(pool, ["walk", "walk", "open"])[-1][0].outcome is Outcome.SUCCESS
        assert pool.stats.quarantined == 1


def test_a_game_of_another_environment_fails_with_the_cause():
    with LocalPool(FakeEnvironment()) as pool:
        pool.reset(GameId(env="fake", family="cup", key="1"), max_steps=3)
        (event,) = pool.poll(0.0)
    assert event.step.outcome is Outcome.FAILED
    assert "Unknown family 'cup'" in event.step.error


def test_calls_that_make_no_sense_are_refused():
    pool = LocalPool(FakeEnvironment())
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        pool.reset(DOOR, max_steps=0)
    ticket = pool.reset(DOOR, max_steps=3)
    with pytest.raises(ValueError, match="still waits for the answer"):
        pool.step(ticket, "look")
    pool.release(ticket)
    assert pool.poll(0.0) == []  # released before it started
    with pytest.raises(ValueError, match="names no running episode"):
        pool.step(ticket, "look")
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="The local pool was closed: open a new one"):
        pool.poll(0.0)
