import collections
import dataclasses
import json

import pytest

from envs.fake import FakeEnvironment
from envs.pool import WorkerPool
from ictjax import keys, loops
from ictjax.chat import ChatTokenizer
from ictjax.config import MetaConfig, ReflectorConfig, RolloutConfig
from ictjax.loops import Arena
from ictjax.model_speaker import ModelSpeaker
from ictjax.records import Candidate, ParseFailure
from ictjax.reflector import Reflector
from ictjax.run_config import EnvironmentConfig, TaskConfig
from tests.test_rollout import play
from tests.tiny import ScriptedSampler, byte_tokenizer

TOKENIZER = byte_tokenizer()
CHAT = ChatTokenizer(TOKENIZER)
END = TOKENIZER.eos_token_id
WORDS = {"bell": "ring", "door": "open", "lamp": "light"}
META = MetaConfig(
    contexts_per_iteration=3,
    games_per_context=2,
    fresh_games=3,
    replay_weight=0.25,
    meta_turns=3,
    collection="online",
    precollected_loops=0,
    reward="success",
    malformed_reward=-0.5,
)
REFLECTION = ReflectorConfig(
    style="compact", max_context_tokens=4000, max_reply_tokens=200, max_prompt_tokens=20
)


def reflect(ids, request):
    """One of: the right word, a wrong one, no prompt, too long a prompt; drawn by the request's
    key.
    """
    text = TOKENIZER.decode(ids)
    family = next(family for family in WORDS if f"the {family} is" in text)
    kind = int(request.key[0]) % 4
    prompt = (f"say {WORDS[family]}", "say jump", "", "say " + "very " * 20 + "much")[kind]
    return TOKENIZER(f"ANALYSIS: about the {family}\nIMPROVED PROMPT: {prompt}")["input_ids"] + [
        END
    ]


@pytest.fixture(scope="module")
def pool():
    with WorkerPool("fake", num_workers=1) as pool:
        yield pool


def make_arena(pool, *, meta=META, families=("bell", "door", "lamp"), num_games=10, seed=0):
    environment = FakeEnvironment()
    task = TaskConfig(
        environment=EnvironmentConfig(
            name="fake", train_families=tuple(families), heldout_families=()
        ),
        initial_prompt="say nothing",
        rollout=RolloutConfig(max_steps=4, max_turn_tokens=60),
    )
    return Arena(
        actor=ModelSpeaker(ScriptedSampler(play), CHAT),
        reflector=Reflector(ModelSpeaker(ScriptedSampler(reflect), CHAT), REFLECTION, 1.0),
        pool=pool,
        task=task,
        games={family: environment.games(family, "train")[:num_games] for family in families},
        key=keys.root_key(seed),
        meta=meta,
    )


def iterate(arena, state, iteration, group_size=6):
    contexts, state = loops.collect(arena, state, iteration)
    groups = loops.propose(arena, contexts, group_size, iteration)
    scored, state = loops.score(arena, state, contexts, groups, iteration)
    return contexts, scored, loops.advance(arena, state, groups, iteration)


def test_rewards_are_the_known_ones_of_a_scripted_policy(pool):
    arena = make_arena(pool)
    contexts, scored, _ = iterate(arena, loops.initial_state(arena, 3), 1)
    kinds = collections.Counter()
    for context, group in zip(contexts, scored.groups, strict=True):
        assert [t.success for t in context.trajectories] == [False, False]
        for candidate in group:
            if candidate.system_prompt is None:
                assert candidate.reward == -0.5
                assert candidate.replay_reward is candidate.fresh_reward is None
                kinds[candidate.failure] += 1
            else:
                right = candidate.system_prompt == f"say {WORDS[context.family]}"
                assert (
                    candidate.reward
                    == candidate.replay_reward
                    == candidate.fresh_reward
                    == float(right)
                )
                assert candidate.analysis == f"about the {context.family}"
                kinds[right] += 1
    assert set(kinds) == {True, False, ParseFailure.EMPTY_PROMPT, ParseFailure.PROMPT_TOO_LONG}
    metrics = loops.summarise(arena, contexts, scored)
    rewards = [candidate.reward for group in scored.groups for candidate in group]
    assert metrics["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert metrics["context_success"] == 0
    assert (
        metrics["malformed_candidates"]
        == kinds[ParseFailure.EMPTY_PROMPT] + kinds[ParseFailure.PROMPT_TOO_LONG]
    )
    assert metrics["reflector_failures"]["empty_prompt"] == kinds[ParseFailure.EMPTY_PROMPT]
    assert metrics["episodes"] == 3 * 2 + 5 * (kinds[True] + kinds[False])
    assert set(metrics["reward_family"]) == {"bell", "door", "lamp"}
    json.dumps(metrics)


def test_replayed_games_are_the_contexts_own_and_fresh_ones_are_new_and_shared_by_the_group(pool):
    arena = make_arena(pool)
    contexts, scored, _ = iterate(arena, loops.initial_state(arena, 3), 1)
    played = collections.defaultdict(list)
    for trajectory in scored.trajectories:
        played[trajectory.game.family].append(trajectory.game)
    for context, group in zip(contexts, scored.groups, strict=True):
        games = played[context.family]
        rounds = [games[i : i + 5] for i in range(0, len(games), 5)]
        assert len(rounds) == sum(candidate.system_prompt is not None for candidate in group)
        assert all(batch == rounds[0] for batch in rounds)
        assert tuple(rounds[0][:2]) == context.games
        assert not set(rounds[0][2:]) & set(context.games)


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 0.4), (0.0, 0.8), (0.25, 0.7)])
def test_the_reward_mixes_replay_and_fresh(weight, expected):
    assert loops.mixed_reward(0.4, 0.8, weight) == pytest.approx(expected)


def test_a_part_that_could_not_be_measured_leaves_no_reward_unless_its_weight_is_zero():
    assert loops.mixed_reward(None, 0.8, 0.5) is None
    assert loops.mixed_reward(0.4, None, 0.5) is None
    assert loops.mixed_reward(None, 0.8, 0.0) == 0.8
    assert loops.mixed_reward(0.4, None, 1.0) == 0.4


def test_a_candidate_whose_games_the_environment_failed_has_no_reward():
    with WorkerPool("fake", num_workers=1, options={"raise_on": "jump"}) as pool:
        arena = make_arena(pool)
        _, scored, _ = iterate(arena, loops.initial_state(arena, 3), 1)
    by_prompt = {
        c.system_prompt: c.reward for group in scored.groups for c in group if c.system_prompt
    }
    assert by_prompt.pop("say jump") is None
    assert set(by_prompt.values()) == {1.0}


def test_no_game_comes_back_before_all_others_and_no_draw_holds_one_twice(pool):
    arena = make_arena(pool, families=("door",), num_games=10)
    state = loops.initial_state(arena, 1)
    draws = []
    for _ in range(8):
        games, state = loops.draw_games(arena, state, "door", 3)
        assert len(set(games)) == 3
        draws.append(games)
    first_pass, second_pass = draws[:3], draws[3:6]
    for batch in (first_pass, second_pass):
        assert len({game for games in batch for game in games}) == 9
    assert first_pass != second_pass


def test_families_take_turns_and_loops_restart_with_the_initial_prompt(pool):
    arena = make_arena(pool)
    state = loops.initial_state(arena, 3)
    started = [loop.family for loop in state.loops]
    assert sorted(started) == ["bell", "door", "lamp"]
    for iteration in range(1, 9):
        before = {loop.number for loop in state.loops}
        contexts, scored, state = iterate(arena, state, iteration, group_size=2)
        for context, loop, group in zip(contexts, state.loops, scored.groups, strict=True):
            if loop.number in before:
                valid = [
                    candidate.system_prompt
                    for candidate in group
                    if candidate.system_prompt is not None
                ]
                assert loop.meta_turn == context.meta_turn + 1 < 3
                assert loop.system_prompt in (valid or [context.system_prompt])
            else:
                assert (loop.meta_turn, loop.system_prompt) == (0, "say nothing")
                started.append(loop.family)
    # staggered: not all loops are at the same meta-turn
    assert len({context.meta_turn for context in contexts}) > 1
    assert all(
        sorted(started[i : i + 3]) == ["bell", "door", "lamp"]
        for i in range(0, len(started) - 2, 3)
    )


def test_state_survives_json_and_continues_equally(pool):
    arena = make_arena(pool)
    state = loops.initial_state(arena, 3)
    _, _, state = iterate(arena, state, 1)
    restored = loops.state_from_json(json.loads(json.dumps(loops.state_to_json(state))))
    assert restored == state
    one, two = (iterate(make_arena(pool), start, 2) for start in (state, restored))
    assert one == two
    assert one != iterate(make_arena(pool, seed=1), state, 2)


def test_the_next_prompt_is_a_valid_candidate_or_none():
    def candidate(prompt):
        return Candidate(
            prompt_ids=(1,),
            reply_ids=(2,),
            logprobs=(0.0,),
            reply="",
            analysis="",
            system_prompt=prompt,
        )

    group = [candidate(None), candidate("a"), candidate("b")]
    drawn = {loops.next_prompt(group, keys.fold(keys.root_key(0), i)) for i in range(20)}
    assert drawn == {"a", "b"}
    assert loops.next_prompt(group[:1], (0, 0)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"replay_weight": 1.5},
        {"fresh_games": 0},
        {"collection": "never"},
        {"meta_turns": 0},
        {"collection": "precollected"},
    ],
)
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match="meta"):
        dataclasses.replace(META, **changes)


def test_too_few_games_are_refused(pool):
    with pytest.raises(ValueError, match="has 2 games"):
        make_arena(pool, num_games=2)


def test_fresh_games_are_never_the_context_s_own(pool):
    """Not where a pass over few games ends, nor for contexts that were drawn long before."""
    arena = make_arena(pool, families=("door",), num_games=6)
    games = arena.games["door"]
    state = loops.initial_state(arena, 1)
    for _ in range(40):
        batch, state = loops.draw_games(arena, state, "door", 2)
        context = loops.play_contexts(arena, [(0, state.loops[0], batch)], 1)[0]
        fresh, state = loops.draw_fresh(arena, state, context)
        assert len({*fresh, *batch}) == 5 and {*fresh} <= {*games}
    assert state.positions["door"] > 200


def test_fresh_games_are_the_next_ones_where_the_context_holds_none_of_them(pool):
    arena = make_arena(pool, families=("door",), num_games=1000)
    state = loops.initial_state(arena, 1)
    contexts, state = loops.collect(arena, state, 1)
    assert loops.draw_fresh(arena, state, contexts[0]) == loops.draw_games(arena, state, "door", 3)


def test_a_family_too_small_for_a_context_and_its_fresh_games_is_refused(pool):
    with pytest.raises(ValueError, match="has 4 games, a context and its fresh games need 5"):
        make_arena(pool, num_games=4)
