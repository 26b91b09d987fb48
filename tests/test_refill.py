import collections
import dataclasses
import json

import pytest

from envs.fake import FakeEnvironment
from envs.local import LocalPool
from ictjax import loops
from ictjax.model_speaker import ModelSpeaker
from ictjax.precollection import precollect
from ictjax.records import Candidate, context_from_json
from ictjax.refill import is_dead, refill
from ictjax.reflector import Reflector
from tests.test_loops import CHAT, END, META, REFLECTION, TOKENIZER, make_arena
from tests.tiny import ScriptedSampler


@pytest.fixture
def pool():
    with LocalPool(FakeEnvironment()) as pool:
        yield pool


def candidate(reward, length=1):
    return Candidate(
        prompt_ids=(1,),
        reply_ids=(2,) * length,
        logprobs=(0.0,) * length,
        reply="",
        analysis="",
        system_prompt="Play.",
        reward=reward,
    )


def with_reply(arena, prompt="say jump"):
    """The arena with a reflector that always writes the same."""
    ids = [*TOKENIZER(f"ANALYSIS: none\nIMPROVED PROMPT: {prompt}")["input_ids"], END]
    speaker = ModelSpeaker(ScriptedSampler(lambda _ids, _request: ids), CHAT)
    return dataclasses.replace(arena, reflector=Reflector(speaker, REFLECTION, 1.0))


def begin(arena, iteration=1, contexts=None):
    """An iteration up to its rewards."""
    state = loops.initial_state(arena, 3)
    if contexts is None:
        contexts, state = loops.collect(arena, state, iteration)
    groups = loops.propose(arena, contexts, 2, iteration)
    scored, state = loops.score(arena, state, contexts, groups, iteration)
    return state, contexts, scored, iteration


def test_a_group_is_dead_where_its_rewards_hold_no_signal():
    for rewards, dead in (
        ([0.5, 0.5], True),
        ([0.5, 0.25], False),
        ([0.5, None], True),
        ([None, None], True),
        ([None, 1.0, 0.0], False),
        ([0.1 + 0.2, 0.3], True),  # what float64 tells apart, the estimator does not
    ):
        assert is_dead([candidate(reward) for reward in rewards]) == dead


def test_dead_groups_get_other_games_of_the_same_loop_and_live_ones_stay(pool):
    arena = make_arena(pool)
    start = begin(arena)
    state, contexts, scored, _ = start
    dead = [is_dead(group) for group in scored.groups]
    assert any(dead) and not all(dead)
    done, after = refill(arena, *start, max_rounds=20, collected=None)
    assert not any(map(is_dead, done.scored.groups)) and 0 < done.rounds < 20
    for old, new, was_dead, group, played in zip(
        contexts, done.contexts, dead, done.scored.groups, done.scored.played, strict=True
    ):
        assert (old.loop, old.family, old.system_prompt) == (
            new.loop,
            new.family,
            new.system_prompt,
        )
        assert (old.games != new.games) == was_dead
        # two replayed and three fresh games for every usable prompt, of this group
        assert len(played) == 5 * sum(c.system_prompt is not None for c in group)
        for reward_games in (played[i : i + 5] for i in range(0, len(played), 5)):
            assert tuple(t.game for t in reward_games[:2]) == new.games
    assert done.scored.groups[dead.index(False)] == scored.groups[dead.index(False)]
    assert sum(after.positions.values()) - sum(state.positions.values()) == 5 * done.thrown_away
    assert done.thrown_away >= sum(dead) and done.counts["refill_rounds"] == done.rounds
    # a resumed run repeats it, from what its checkpoint holds
    restored = loops.state_from_json(json.loads(json.dumps(loops.state_to_json(state))))
    again = refill(make_arena(pool), restored, *start[1:], max_rounds=20, collected=None)
    assert again == (done, after)
    # the first round is the same, whatever may come after it
    one, _ = refill(arena, *start, max_rounds=1, collected=None)
    assert one.rounds == 1 and one.thrown_away == sum(dead)


def test_no_more_rounds_than_asked_and_then_the_dead_stay(pool):
    arena = with_reply(make_arena(pool))
    start = begin(arena)
    done, _ = refill(arena, *start, max_rounds=3, collected=None)
    assert (done.rounds, done.thrown_away) == (3, 9)
    assert done.episodes == 9 * (2 + 2 * 5)
    assert done.contexts == start[1] and done.scored == start[2]


def test_precollected_contexts_are_refilled_from_those_the_iteration_has_not_seen(pool, tmp_path):
    meta = dataclasses.replace(META, collection="precollected", precollected_loops=4)
    arena = make_arena(pool, meta=meta)
    lines = precollect(arena, tmp_path / "partial.jsonl")
    collected = [context_from_json(line) for line in lines]
    start = begin(arena, 1, loops.draw_contexts(arena, collected, 1))
    done, _ = refill(arena, *start, max_rounds=20, collected=collected)
    places = collections.Counter((c.loop, c.meta_turn) for c in done.contexts)
    assert set(places.values()) == {1} and done.thrown_away > 0
    assert set(done.contexts) <= set(collected)
    # none is left: the rounds end
    few, _ = refill(arena, *start, max_rounds=20, collected=start[1])
    assert (few.rounds, few.thrown_away, few.scored) == (0, 0, start[2])


def test_an_improvement_is_the_success_less_that_of_the_previous_prompt(pool):
    """At bells and doors the first prompt, "say nothing", wins nothing; here it is the right word for
    one family.
    """
    plain = make_arena(pool)
    arena = dataclasses.replace(plain, meta=dataclasses.replace(META, reward="improvement"))
    start = loops.initial_state(arena, 3)
    winning = start.loops[0]._replace(
        system_prompt={"bell": "say ring", "door": "say open", "lamp": "say light"}[
            start.loops[0].family
        ]
    )
    start = start._replace(loops=(winning, *start.loops[1:]))
    contexts, state = loops.collect(arena, start, 1)
    groups = loops.propose(arena, contexts, 4, 1)
    scored, after = loops.score(arena, state, contexts, groups, 1)
    before, same = loops.score(plain, state, contexts, groups, 1)
    assert after == same and scored.baselines == [1.0, 0.0, 0.0] and not before.baselines
    for baseline, group, old, played, fewer in zip(
        scored.baselines, scored.groups, before.groups, scored.played, before.played, strict=True
    ):
        assert played[: len(fewer)] == fewer
        # the fresh games once more, under the previous prompt, and the same as the candidates'
        assert [t.game for t in played[len(fewer) :]] == [t.game for t in fewer[2:5]]
        for new, was in zip(group, old, strict=True):
            malformed = new.system_prompt is None
            assert new.reward == (-0.5 if malformed else was.reward - baseline)
            assert (new.replay_reward, new.fresh_reward) == (was.replay_reward, was.fresh_reward)
    metrics = loops.summarise(arena, contexts, scored)
    assert metrics["reward_baseline"] == pytest.approx(1 / 3)
    assert "reward_baseline" not in loops.summarise(plain, contexts, before)


def test_a_group_whose_baseline_failed_has_no_rewards():
    with LocalPool(FakeEnvironment(raise_on="nothing")) as pool:
        meta = dataclasses.replace(META, reward="improvement", replay_weight=1.0)
        _, _, scored, _ = begin(with_reply(make_arena(pool, meta=meta)))
    assert scored.baselines == [None] * 3
    assert {c.reward for group in scored.groups for c in group} == {None}
