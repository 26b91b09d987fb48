import dataclasses
import json

import pytest

from envs.api import GameId, Observation, Outcome, PoolStats, Step
from envs.registry import BUILT_IN, import_path, load_environment


def test_a_game_id_reads_back_what_it_wrote():
    game = GameId(env="minihack", family="Room-5x5", key="17:x")
    assert str(game) == "minihack|Room-5x5|17:x"
    assert GameId.parse(str(game)) == game


@pytest.mark.parametrize(
    "text", ["", "fake", "fake|door", "fake|door|1|2", "|door|1", "fake||1", "fake|door|"]
)
def test_text_that_is_no_game_id_is_refused_by_name(text):
    with pytest.raises(ValueError, match="game id|GameId"):
        GameId.parse(text)


@pytest.mark.parametrize("field", ["env", "family", "key"])
def test_a_separator_in_a_field_is_refused(field):
    with pytest.raises(ValueError, match=f"GameId.{field}"):
        GameId(**{"env": "e", "family": "f", "key": "k", field: "a|b"})


def test_game_ids_are_ordered_hashable_and_frozen():
    games = [GameId(env="a", family=family, key=key) for family in "fg" for key in "12"]
    assert sorted([games[2], games[1], games[3], games[0]]) == games
    assert len({*games, *games}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        games[0].key = "3"


def test_outcomes_are_their_names_in_json():
    assert json.dumps([*Outcome]) == '["success", "death", "step_limit", "failed"]'
    assert Outcome("death") is Outcome.DEATH


def test_defaults_say_that_nothing_happened():
    step = Step(observation=Observation(text="hello"))
    assert (step.reward, step.outcome, step.error, step.observation.actions) == (0.0, None, "", ())
    assert set(dataclasses.asdict(PoolStats()).values()) == {0}


def test_short_names_and_import_paths_resolve():
    assert import_path("fake") == "envs.fake:FakeEnvironment"
    assert import_path("some.where:Thing") == "some.where:Thing"
    assert set(BUILT_IN) >= {"fake", "minihack"}
    assert (
        load_environment("fake").name
        == load_environment("envs.fake:FakeEnvironment").name
        == "fake"
    )


@pytest.mark.parametrize(
    "name",
    ["", "alfword", "envs.fake", "envs.fake:", ":FakeEnvironment", "envs fake:X", "envs.fake:a.b"],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="use one of alfworld, fake, minihack, or an import path"):
        import_path(name)


def test_what_cannot_be_imported_or_built_is_said_in_one_sentence():
    with pytest.raises(ValueError, match="'no_such_module:X' cannot be imported: No module named"):
        load_environment("no_such_module:X")
    with pytest.raises(ValueError, match="'envs.fake:Nothing' cannot be imported"):
        load_environment("envs.fake:Nothing")
    with pytest.raises(ValueError, match="'fake' does not take the options speed=3"):
        load_environment("fake", {"speed": "3"})
    with pytest.raises(
        ValueError, match="'builtins:dict' is not an environment: dict lacks name, families"
    ):
        load_environment("builtins:dict")
