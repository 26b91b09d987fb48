import pytest

from envs.api import GameId, Outcome
from envs.fake import ACTIONS, WORDS, FakeEnvironment


@pytest.fixture
def environment():
    return FakeEnvironment()


def play(environment, game, actions):
    live = environment.open(game.family)
    texts = [live.reset(game).text]
    for action in actions:
        step = live.step(action)
        texts.append(step.observation.text)
        if step.outcome is not None:
            break
    return texts, step


@pytest.mark.parametrize("family", ["bell", "door", "lamp"])
def test_only_the_word_of_its_family_wins_a_game(environment, family):
    for game in environment.games(family, "train")[:20]:
        for word in WORDS.values():
            _, step = play(environment, game, ["walk", "walk", word])
            won = word == WORDS[family]
            assert (step.outcome, step.reward) == ((Outcome.SUCCESS, 1.0) if won else (None, 0.0))


def test_the_word_does_nothing_from_afar(environment):
    far = [
        game
        for game in environment.games("door", "train")[:20]
        if "2 steps away" in environment.open("door").reset(game).text
    ]
    assert far
    for game in far:
        texts, step = play(environment, game, ["walk", "open"])
        assert step.outcome is None
        assert texts[-1].startswith("You are too far away")


def test_a_jump_kills_and_a_finished_game_repeats_its_outcome(environment):
    live = environment.open("lamp")
    live.reset(environment.games("lamp", "test")[0])
    first = live.step("jump")
    again = live.step("light")
    assert (first.outcome, again.outcome) == (Outcome.DEATH, Outcome.DEATH)
    assert first.reward == again.reward == 0.0
    assert again.observation.actions == ()


def test_the_same_id_gives_the_same_game_on_a_used_and_on_a_fresh_one(environment):
    game, other = environment.games("bell", "train")[:2]
    used = environment.open("bell")
    used.reset(other)
    used.step("walk")
    fresh = environment.open("bell")
    assert used.reset(game) == fresh.reset(game)
    assert used.state_hash() == fresh.state_hash()
    for action in ("look", "walk", "open", "", "\ud800", "ring"):
        assert used.step(action) == fresh.step(action)


def test_the_state_hash_tells_states_apart_whatever_their_ids(environment):
    live = environment.open("door")
    hashes = []
    for key in ("7", "007", "8"):
        live.reset(GameId(env="fake", family="door", key=key))
        hashes.append(live.state_hash())
    assert hashes[0] == hashes[1] != hashes[2]


def test_splits_are_disjoint_and_in_a_fixed_order(environment):
    for family in environment.families:
        splits = [environment.games(family, split) for split in ("train", "select", "test")]
        assert [len(split) for split in splits] == [1000, 200, 200]
        assert len({game for split in splits for game in split}) == 1400
        assert splits[0] == environment.games(family, "train")


def test_unknown_names_are_refused(environment):
    with pytest.raises(ValueError, match="Unknown family 'cup': use one of bell, door, lamp"):
        environment.games("cup", "train")
    with pytest.raises(ValueError, match="Unknown split 'valid': use one of train, select, test"):
        environment.games("door", "valid")
    with pytest.raises(ValueError, match="Unknown family 'cup'"):
        environment.open("cup")


@pytest.mark.parametrize(
    "game", ["real|door|1", "fake|lamp|1", "fake|door|one", "fake|door|-1", "fake|door|²"]
)
def test_a_game_of_another_family_is_refused(environment, game):
    with pytest.raises(ValueError, match="is not a game of fake.door"):
        environment.open("door").reset(GameId.parse(game))


def test_junk_costs_a_step_and_never_raises(environment):
    live = environment.open("door")
    start = live.reset(environment.games("door", "train")[0])
    for junk in ("", " ", "\x00", "é" * 1000, "OPEN", "open door"):
        step = live.step(junk)
        assert step.outcome is None
        assert step.observation.text.startswith("Nothing happens")
        assert step.observation.actions == start.actions == ACTIONS


def test_a_fault_strikes_on_its_action_only_and_once_when_told_so(tmp_path):
    environment = FakeEnvironment(raise_on="boom", once_in=str(tmp_path))
    live = environment.open("door")
    live.reset(environment.games("door", "train")[0])
    live.step("look")
    with pytest.raises(RuntimeError, match="told to raise on 'boom'"):
        live.step("boom")
    assert live.step("boom").outcome is None


def test_noise_goes_to_stdout(capfd):
    live = FakeEnvironment(print_on="reset:3").open("door")
    live.reset(GameId(env="fake", family="door", key="3"))
    assert "noise" in capfd.readouterr().out
