import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from envs.api import CannotGoOn, GameId, Outcome
from experiments.command import run_main
from experiments.console import iteration_line
from ictjax.health import Health, check_loaded, most_frequent_error, not_finite
from ictjax.keeper import Keeper
from ictjax.records import Candidate, ParseFailure, Trajectory, Turn


def candidate(failure=None, reward=0.0):
    return Candidate(
        prompt_ids=(1,),
        reply_ids=(2,),
        logprobs=(0.0,),
        reply="",
        analysis="",
        system_prompt=None if failure else "Play.",
        failure=failure,
        reward=reward,
    )


def turn(failure=None):
    return Turn(
        observation="", actions=(), reply="", thought="", action="", reward=0.0, failure=failure
    )


def trajectory(error="", failure=None):
    return Trajectory(
        game=GameId(env="fake", family="door", key="1"),
        system_prompt="",
        turns=() if error else (turn(failure), turn(failure)),
        outcome=Outcome.FAILED if error else Outcome.STEP_LIMIT,
        final_observation="",
        state_hash="",
        error=error,
    )


GOOD = ([[candidate(), candidate(ParseFailure.NO_PROMPT)]], [trajectory(), trajectory("It died.")])
NOTHING = {
    "every game fails": ([[candidate()]], [trajectory("It died."), trajectory("It died.")]),
    "no prompt": ([[candidate(ParseFailure.NO_PROMPT)] * 2], []),
    "no action": ([[candidate()]], [trajectory(failure=ParseFailure.NO_ACTION)]),
    "no step": GOOD,
}
REASONS = {
    "every game fails": r"every game failed \(It died\)",
    "no prompt": r"no reply of the reflector .*\(mostly no_prompt\)",
    "no action": r"no reply of the actor .*\(mostly no_action\)",
    "no step": "no gradient was finite",
}


@pytest.mark.parametrize("what", NOTHING)
def test_iterations_in_vain_end_a_run_once_its_patience_is_gone(what):
    health = Health(3)
    updated = what != "no step"
    for iteration in (1, 2):
        health.check_iteration(iteration, *NOTHING[what], updated=updated)
    health.check_iteration(3, *GOOD, updated=True)  # starts the count anew
    for iteration in (4, 5):
        health.check_iteration(iteration, *NOTHING[what], updated=updated)
    with pytest.raises(CannotGoOn, match=f"3 iterations in a row, up to 6,.*{REASONS[what]}"):
        health.check_iteration(6, *NOTHING[what], updated=updated)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_ends_a_run_at_once(bad):
    health = Health(3)
    good = {"a": jnp.ones(2), "b": (jnp.zeros(3),), "ids": jnp.arange(2)}
    damaged = {**good, "b": (jnp.zeros(3).at[1].set(bad),)}
    assert not_finite(good) == "" and not_finite(damaged) == "b/0"
    check_loaded(good, "m")
    with pytest.raises(ValueError, match="weight b/0 of the model m"):
        check_loaded(damaged, "m")
    one, zero = np.float32(1), np.float32(0)
    health.check_update(1, good, zero, one)
    with pytest.raises(CannotGoOn, match="The weight b/0 is not finite in iteration 7"):
        health.check_update(7, damaged, one, one)
    with pytest.raises(CannotGoOn, match="The loss is not finite in iteration 7"):
        health.check_update(7, good, zero, np.float32(bad))
    health.check_rewards(1, [[candidate(reward=None), candidate(reward=1.0)]])
    with pytest.raises(CannotGoOn, match="A reward of iteration 7"):
        health.check_rewards(7, [[candidate(reward=1.0), candidate(reward=float(bad))]])


def test_the_error_that_is_named_is_the_most_frequent():
    played = [trajectory("a b."), trajectory("x"), trajectory(), trajectory("x")]
    assert most_frequent_error(played) == "x"
    assert most_frequent_error([trajectory()]) == ""
    assert len(most_frequent_error([trajectory("long " * 1000)])) == 300


def test_a_run_that_cannot_go_on_is_one_sentence_and_exit_code_1(capsys):
    def body():
        raise CannotGoOn("Nothing could be learned.")

    with pytest.raises(SystemExit) as ended:
        run_main(body, "")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "ictjax: Nothing could be learned.\n"


def test_failures_stand_in_the_line_of_an_iteration_when_there_are_any():
    metrics = {
        "reward": 0.5,
        "reward_replay": 0.5,
        "reward_fresh": None,
        "kl": 0.0,
        "candidates": 8,
        "malformed_candidates": 0,
        "reflector_failures": {"truncated": 0},
        "actor_failures": {"no_action": 0, "truncated": 0},
        "turns": 40,
        "failed_episodes": 0,
        "episodes": 12,
        "cut_contexts": 0,
        "skipped": 0.0,
        "error": "",
    }
    assert iteration_line(metrics) == "reward 0.500  replay 0.500  KL 0.000"
    metrics |= {
        "malformed_candidates": 3,
        "reflector_failures": {"truncated": 2},
        "actor_failures": {"no_action": 4, "truncated": 1},
        "failed_episodes": 6,
        "cut_contexts": 1,
        "skipped": 1.0,
        "refill_rounds": 2,
        "refill_thrown_away": 5,
        "error": "It died",
    }
    assert iteration_line(metrics).endswith(
        "KL 0.000  malformed 3/8  truncated 2/8  actor malformed 5/40  failed games 6/12"
        "  cut contexts 1  skipped steps 1  refill rounds 2  groups thrown away 5  (It died)"
    )


@dataclasses.dataclass
class Saves:
    """What a checkpointer was given."""

    steps: list = dataclasses.field(default_factory=list)

    def save(self, step, state, host, *, score):
        assert state == host == step
        assert score is None  # no iteration had a reward
        self.steps.append(step)

    def wait(self):
        """What is saved is complete."""


@pytest.mark.parametrize(
    ("finished", "last_donated", "saved"),
    [
        ((1, 2, 3), False, [2, 3]),
        ((1, 2, 3), True, [2]),
        ((1, 2), False, [2]),
        ((1, 2, 3, 4, 5), False, [2, 4, 5]),
        ((), False, []),
    ],
)
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_last_finished_iteration_is_saved_whatever_ends_the_run(
    finished, last_donated, saved, error
):
    saves = Saves()

    def run():
        with Keeper(saves, every=2, last=5) as keeper:
            for iteration in finished:
                keeper.let_go()
                keeper.finish(iteration, iteration, iteration)
            if last_donated:
                keeper.let_go()
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert saves.steps == saved
