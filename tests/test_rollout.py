import dataclasses
import itertools

import pytest

from envs.api import GameId, Outcome
from envs.pool import WorkerPool
from ictjax import keys
from ictjax.chat import ChatTokenizer
from ictjax.config import RolloutConfig
from ictjax.model_speaker import ModelSpeaker
from ictjax.records import ParseFailure
from ictjax.rollout import Episode, parse_failures, rollout, success_rate, user_message
from tests.tiny import ScriptedSampler, byte_tokenizer

TOKENIZER = byte_tokenizer()
CHAT = ChatTokenizer(TOKENIZER)
END = TOKENIZER.eos_token_id
CONFIG = RolloutConfig(max_steps=5, max_turn_tokens=60)


def game(key, family="door"):
    return GameId(env="fake", family=family, key=str(key))


def play(ids, request):
    """Walks to the thing, then says the last word of the system prompt. Reads the whole
    conversation, so lost or mixed-up tokens show.
    """
    system, *turns = TOKENIZER.decode(ids).split("<|im_start|>")[1:]
    word = system.removesuffix("<|im_end|>\n").split()[-1]
    action = word if "right here" in turns[-2] else "walk"
    return TOKENIZER(f"Thought: turn {len(turns) // 2}\nAction: {action}")["input_ids"] + [END]


@pytest.fixture(scope="module")
def pool():
    with WorkerPool("fake", num_workers=1) as pool:
        yield pool


def speak(double, config=CONFIG):
    return ModelSpeaker(double, CHAT, share_min_tokens=config.share_min_tokens)


def run(pool, episodes, config=CONFIG, script=play, **sampler):
    double = ScriptedSampler(script, **sampler)
    trajectories = rollout(speak(double, config), pool, episodes, config)
    assert not double.ids  # every conversation is closed
    return trajectories, double


def test_a_good_prompt_wins_and_a_bad_one_loses_with_every_turn_recorded(pool):
    episodes = [
        Episode(game=game(key), system_prompt=prompt)
        for key in range(4)
        for prompt in ("Say open", "Say ring")
    ]
    trajectories, _ = run(pool, episodes)
    assert [t.game for t in trajectories] == [e.game for e in episodes]
    assert [t.success for t in trajectories] == [True, False] * 4
    assert success_rate(trajectories) == 0.5
    for trajectory in trajectories:
        assert trajectory.outcome is (Outcome.SUCCESS if trajectory.success else Outcome.STEP_LIMIT)
        assert sum(turn.reward for turn in trajectory.turns) == float(trajectory.success)
        assert [turn.thought for turn in trajectory.turns] == [
            f"turn {i + 1}" for i in range(len(trajectory.turns))
        ]
        assert trajectory.turns[0].observation.startswith(f"You are in room {trajectory.game.key}.")
        assert trajectory.turns[0].actions == ("walk", "look", "open", "light", "ring", "jump")
        assert len(trajectory.state_hash) == 64
    assert trajectories[0].final_observation.startswith("You open the door. You win.")
    assert len(trajectories[1].turns) == CONFIG.max_steps


def test_the_conversation_grows_by_the_new_tokens_only_and_reads_like_the_template(pool):
    (trajectory,), double = run(pool, [Episode(game=game(1), system_prompt="Say light")])
    before = [ids for ids, _ in double.requests]
    assert len(before) == len(trajectory.turns)
    for shorter, longer in itertools.pairwise(before):
        assert longer[: len(shorter)] == shorter
    messages = [{"role": "system", "content": "Say light"}]
    for turn in trajectory.turns[:-1]:
        messages += [
            {"role": "user", "content": turn.observation},
            {"role": "assistant", "content": turn.reply},
        ]
    messages.append({"role": "user", "content": trajectory.turns[-1].observation})
    whole = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert before[-1] == tuple(TOKENIZER(whole)["input_ids"])


def test_arrival_order_slots_and_workers_do_not_change_a_trajectory(pool):
    config = dataclasses.replace(CONFIG, temperature=1.0, share_min_tokens=1)

    def noisy(ids, request):
        choice = ("open", "walk", "look", "ring")[int(request.key[0]) % 4]
        return TOKENIZER(f"Thought: x\nAction: {choice}")["input_ids"] + [END]

    root = keys.root_key(0)
    episodes = [
        Episode(game=game(i % 5), system_prompt=f"p{i % 2}", key=keys.fold(root, "episode", i))
        for i in range(12)
    ]
    wanted, _ = run(pool, episodes, config, noisy, num_slots=1)
    assert len({tuple(turn.action for turn in t.turns) for t in wanted}) > 3
    with WorkerPool("fake", num_workers=2, max_live_games=3) as other:
        for num_slots, order in ((12, 1), (3, 2)):
            assert (
                run(other, episodes, config, noisy, num_slots=num_slots, order=order)[0] == wanted
            )


def test_equal_games_are_played_once_when_greedy_and_each_for_itself_when_sampling(pool):
    episodes = [Episode(game=game(1), system_prompt="Say open")] * 3 + [
        Episode(game=game(1), system_prompt="Say ring")
    ]
    trajectories, double = run(pool, episodes)
    assert trajectories[0] is trajectories[1] is trajectories[2]
    greedy_replies = len(double.requests)
    assert greedy_replies == len(trajectories[0].turns) + len(trajectories[3].turns)
    _, double = run(pool, episodes, dataclasses.replace(CONFIG, temperature=1.0))
    assert len(double.requests) == 3 * len(trajectories[0].turns) + len(trajectories[3].turns)


def test_turns_can_be_watched_as_they_are_played(pool):
    seen = {}
    episodes = [Episode(game=game(key), system_prompt="Say open") for key in range(3)]
    watch = lambda episode, turn: seen.setdefault(episode.game, []).append(turn)  # noqa: E731
    trajectories = rollout(speak(ScriptedSampler(play)), pool, episodes, CONFIG, watch=watch)
    assert [tuple(seen[t.game]) for t in trajectories] == [t.turns for t in trajectories]


def test_long_prompts_wait_for_the_first_reply_under_them(pool):
    """The sampler can reuse a prefix only once it has been computed."""
    episodes = [
        Episode(game=game(key), system_prompt=prompt)
        for prompt in ("Say open", "Say ring")
        for key in range(3)
    ]
    opened = []

    class Watching(ScriptedSampler):
        def open(self, ids):
            opened.append((len(self.requests), "ring" in TOKENIZER.decode(ids)[:40]))
            return super().open(ids)

    for share, early in ((1, 2), (10_000, 6)):
        opened.clear()
        config = dataclasses.replace(CONFIG, share_min_tokens=share, gather_s=0.5)
        speaker = speak(Watching(play, num_slots=1), config)
        trajectories = rollout(speaker, pool, episodes, config)
        assert len(opened) == 6
        assert sum(answered == 0 for answered, _ in opened) <= early
        assert [t.success for t in trajectories] == [True] * 3 + [False] * 3
        if share == 1:
            assert sorted(prompt for _, prompt in opened[:1]) == [False]


def test_useless_replies_cost_a_step_with_the_empty_action_and_are_counted(pool):
    replies = [
        "no idea",
        "Action:",
        "Thought: I will think for a very long time and never get anywhere at all before the limit",
    ]

    def useless(ids, request):
        return TOKENIZER(replies[TOKENIZER.decode(ids).count("<|im_start|>assistant") - 1])[
            "input_ids"
        ] + [END]

    (trajectory,), _ = run(
        pool,
        [Episode(game=game(3), system_prompt="p")],
        dataclasses.replace(CONFIG, max_steps=3),
        useless,
    )
    assert [turn.failure for turn in trajectory.turns] == [
        ParseFailure.NO_ACTION,
        ParseFailure.EMPTY_ACTION,
        ParseFailure.TRUNCATED,
    ]
    assert [turn.action for turn in trajectory.turns] == [""] * 3
    assert trajectory.turns[1].observation.startswith("Nothing happens")
    assert trajectory.outcome is Outcome.STEP_LIMIT
    assert parse_failures([trajectory]) == {"no_action": 1, "empty_action": 1, "truncated": 1}


def test_rare_failures_are_counted_where_they_occur(pool):
    def thinks(ids, request):
        return [*TOKENIZER("<think>\nAction: open")["input_ids"], END]

    (trajectory,), _ = run(
        pool,
        [Episode(game=game(3), system_prompt="p")],
        dataclasses.replace(CONFIG, max_steps=2),
        thinks,
    )
    assert {turn.action for turn in trajectory.turns} == {""}
    assert parse_failures([trajectory]) == {
        "no_action": 0,
        "empty_action": 0,
        "truncated": 0,
        "unfinished_thought": 2,
    }


def test_a_full_context_ends_the_episode_like_a_step_limit(pool):
    double = ScriptedSampler(play)
    double.max_len = 200
    (trajectory,) = rollout(
        speak(double), pool, [Episode(game=game(1), system_prompt="Say ring")], CONFIG
    )
    assert trajectory.outcome is Outcome.STEP_LIMIT
    assert trajectory.turns[-1].failure is ParseFailure.TRUNCATED
    assert 1 < len(trajectory.turns) < CONFIG.max_steps
    (again,), _ = run(pool, [Episode(game=game(1), system_prompt="Say open")])
    assert again.success  # the pool is still in order


def test_a_fault_of_the_environment_is_a_typed_trajectory_and_no_reward():
    with WorkerPool("fake", num_workers=1, options={"raise_on": "ring"}) as pool:
        episodes = [
            Episode(game=game(key), system_prompt=prompt)
            for key in (1, 2)
            for prompt in ("Say ring", "Say open")
        ]
        trajectories, _ = run(pool, episodes)
    assert [t.outcome for t in trajectories] == [Outcome.FAILED, Outcome.SUCCESS] * 2
    assert "told to raise" in trajectories[0].error
    assert success_rate(trajectories) == 1.0
    assert success_rate(trajectories[:1]) is None


def test_an_exception_gives_back_games_and_conversations(pool):
    def broken(ids, request):
        raise RuntimeError("no reply today")

    double = ScriptedSampler(broken)
    episodes = [Episode(game=game(key), system_prompt="p") for key in range(3)]
    with pytest.raises(RuntimeError, match="no reply today"):
        rollout(speak(double), pool, episodes, CONFIG)
    assert not double.ids
    trajectories, _ = run(
        pool, [Episode(game=game(key), system_prompt="Say open") for key in range(3)]
    )
    assert all(t.success for t in trajectories)


def test_actions_are_listed_only_when_asked_for():
    assert user_message("You see.", ("go", "stay"), False).content == "You see."
    assert (
        user_message("You see.", ("go", "stay"), True).content
        == "You see.\nAvailable actions: go, stay"
    )
    assert user_message("You see.", (), True).content == "You see."


@pytest.mark.parametrize(
    "changes", [{"max_steps": 0}, {"max_turn_tokens": 0}, {"temperature": -1.0}]
)
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match="rollout"):
        dataclasses.replace(CONFIG, **changes)
