"""What an evaluation plays, on fake games with scripted players: no model is computed."""

import collections
import dataclasses
import importlib.util
import json

import pytest

from envs.alfworld import ALFWorld
from envs.api import Advised
from envs.fake import FakeEnvironment
from envs.minihack import MiniHack
from envs.pool import WorkerPool
from experiments.arms import ARMS, arm_named, check_arms
from experiments.arms.placebos import generic_prompt
from experiments.evaluation_folder import EvaluationFolder, is_part
from experiments.evaluation_games import choose_games, in_several_families
from experiments.evaluation_parts import PartKey, part_keys
from experiments.evaluation_report import protocol
from experiments.fake_pair import FOLDER as FAKE_PAIR
from experiments.outcomes import read_outcomes
from experiments.played_games import PlayedGames
from experiments.presets import PRESETS
from experiments.pretraining import entry, taught_games, unrecorded, write_record
from experiments.protocol import Part, chosen_turn, last_success
from experiments.tasks import FAKE
from experiments.wishes import Together, run_together
from ictjax import keys
from ictjax.chat import ChatTokenizer
from ictjax.config import RolloutConfig
from ictjax.function_speaker import FunctionSpeaker
from ictjax.loops import Arena
from ictjax.reflector import FULL, Reflector
from ictjax.rollout import Episode

WORDS = {"bell": "ring", "door": "open", "lamp": "light"}
FAMILIES = ("door", "lamp", "bell")
INSTALLED = [name for name in ARMS if name != "gepa" or importlib.util.find_spec("gepa")]
KEY = keys.root_key(7)
BASE = PRESETS["qwen2.5-7b-minihack"]  # its limits


def config(**evaluation):
    about = {"runs": 2, "meta_turns": 2, "test_games": 2, "select_games": 2, "games": "own"}
    about |= {"games_per_context": 2, **evaluation}
    task = dataclasses.replace(
        FAKE,
        initial_prompt="You play. Say nothing",
        rollout=RolloutConfig(max_steps=4, max_turn_tokens=60),
    )
    return dataclasses.replace(
        BASE,
        task=task,
        evaluation=dataclasses.replace(BASE.evaluation, **about),
    )


def act(messages, actions):
    """Walks to the thing, then says the last word of the system prompt."""
    system, *_, last = (message.content for message in messages)
    return system.split()[-1] if "right here" in last else "walk"


class Coach:
    """A reflector that finds the word in its second reflection on a family, and counts."""

    def __init__(self, answer=None):
        self.asked = []
        self.answer = answer or self.second_time

    def __call__(self, messages, actions):
        text = messages[-1].content
        self.asked.append(text)
        return self.answer(text)

    def second_time(self, text):
        family = next(family for family in WORDS if f"The {family} is" in text)
        word = WORDS[family] if "Say jump" in text else "jump"
        return f"ANALYSIS: it is a {family}.\nIMPROVED PROMPT: Say {word}"


class Counted:
    """An actor's function that notes which system prompts it plays under, once a game."""

    def __init__(self):
        self.games = collections.Counter()

    def __call__(self, messages, actions):
        if len(messages) == 2:
            self.games[messages[0].content] += 1
        return act(messages, actions)


@pytest.fixture(scope="module")
def pool():
    with WorkerPool("fake", num_workers=1) as pool:
        yield pool


@pytest.fixture
def drawn(pool):
    return draw(pool, config())


def draw(pool, settings, seen=frozenset(), environment=None):
    environment = environment or FakeEnvironment()
    return {
        family: choose_games(environment, pool, settings, family, seen, KEY) for family in FAMILIES
    }


def parts(names, settings, games, starts=None, family="door"):
    """Parts that are to be played."""
    return [
        Together(
            name,
            part(name, settings, games, family).loops(None if name == "initial" else starts),
        )
        for name in names
    ]


def part(name, settings, games, family="door"):
    other = FAMILIES[(FAMILIES.index(family) + 1) % 3]
    return Part(
        arm_name=name,
        arm=arm_named(name),
        family=family,
        other=other,
        games=games[family],
        other_games=games[other],
        config=settings,
        key=KEY,
        expert_prompt="Say open",
        num_tokens=len,
    )


def play(pool, names, settings, games, *, coach=None, actor=None, room=1000, starts=None):
    """The records of arms on doors."""
    coach, actor = coach or Coach(), actor or Counted()
    with (
        FunctionSpeaker(actor, threads=1, replies="action") as player,
        FunctionSpeaker(coach, threads=1) as writer,
    ):
        arena = Arena(
            actor=player,
            reflector=Reflector(writer, settings.reflection),
            pool=pool,
            task=settings.task,
            games={},
            key=KEY,
            meta=settings.meta,
        )
        done = run_together(arena, parts(names, settings, games, starts), room=room)
        return {name: part(name, settings, games).record(loops) for name, loops in done}


def rates(record):
    """The share of TEST games won by meta-turn, over all runs."""
    turns = list(zip(*record["test"], strict=True))
    return [sum(map(sum, turn)) / sum(map(len, turn)) for turn in turns]


def test_a_loop_scores_the_prompts_of_all_meta_turns_on_games_of_its_own(pool, drawn):
    record = play(pool, ["untrained"], config(), drawn)["untrained"]
    assert rates(record) == [0, 0, 1]  # nothing, jump, open
    assert record["select"] == [[[0, 0], [0, 0], [1, 1]]] * 2
    assert is_part({"drawn": "", **record}, 2)
    assert record["budget"] == {
        "actor_episodes": 2 * 2 * 2,
        "actor_tokens": record["budget"]["actor_tokens"],
        "reflector_calls": 4,
        "reflector_tokens": record["budget"]["reflector_tokens"],
    }
    assert record["budget"]["reflector_tokens"] > 4 * len("ANALYSIS:")


def test_no_initial_state_is_used_twice_nor_seen_in_training(pool):
    settings = config(runs=3, meta_turns=3)
    before = draw(pool, settings)["door"]
    seen = frozenset(list(before.states.values())[:9])
    games = draw(pool, settings, seen)["door"]
    everything = [
        *(game for run in games.stream for batch in run for game in batch),
        *(game for run in (*games.select, *games.test) for game in run),
    ]
    states = [games.states[game] for game in everything]
    assert len(states) == len(set(states)) == 3 * (3 * 2 + 2 + 2)
    assert seen.isdisjoint(states)
    # what training draws from is not touched, so that runs of other seeds play the same
    train = FakeEnvironment().games("door", "train")
    assert {*train}.isdisjoint(everything)
    assert games.stream == before.stream or seen & {*before.states.values()}


def test_results_say_how_many_test_games_families_have_in_common(pool):
    """A renaming plays its family's games, and is drawn by itself."""
    settings = config(runs=3)
    games = draw(pool, settings)

    def said(games):
        return protocol(settings, settings, 1, [], [], games)["states"]

    assert said(games).startswith("within a family no initial state (by hash) occurs twice")
    assert said(games).endswith("; no two families have a TEST game in common")
    door = games["door"]
    renamed = dataclasses.replace(
        door,
        test=(door.test[0], *games["lamp"].test[1:]),
        states=door.states | games["lamp"].states,
    )
    assert in_several_families({"door": door, "door~0": renamed}) == (2, 10)
    assert "; 2 of the 10 initial states of TEST" in said({"door": door, "door~0": renamed})


class Few(FakeEnvironment):
    """As many games as one says, and no more where `more` is false."""

    def __init__(self, count, more):
        super().__init__()
        self.count = count
        if not more:
            self.more_games = None

    def games(self, family, split):
        return super().games(family, split)[: self.count]

    def more_games(self, family, split, count):
        return (*self.games(family, split), *super().more_games(family, split, 10**4)[-count:])


def test_a_family_with_too_few_games_is_extended_or_refused_with_the_count(pool):
    games = draw(pool, config(test_games=9), environment=Few(4, more=True))["lamp"]
    assert len({game for run in games.test for game in run}) == 18
    with pytest.raises(ValueError, match="door has 4 for TEST, of 18; .*: lower --evaluation.runs"):
        draw(pool, config(test_games=9), environment=fixed(Few(4, more=False)))
    # a set for all runs is smaller
    shared = draw(pool, config(test_games=4, games="shared"), environment=fixed(Few(9, more=False)))
    assert shared["door"].test[0] == shared["door"].test[1]
    assert shared["door"].stream[0] != shared["door"].stream[1]


def fixed(environment):
    """The same without what makes it extensible."""
    return type("Fixed", (), {"games": environment.games, "name": environment.name})()


def test_the_paper_s_protocol_chooses_and_reports_on_the_same_games(pool):
    settings = config(protocol="paper", scored="ends")
    games = draw(pool, settings)
    record = play(pool, ["untrained"], settings, games)["untrained"]
    assert record["select"] == record["games"]["select"] == []
    assert record["games"]["test"][0] == record["games"]["test"][1]
    assert all(all(run) for run in record["test"])  # else it could not be chosen


def test_without_select_games_none_is_played_and_none_is_chosen(pool):
    settings = config(select_games=0)
    games = draw(pool, settings)
    record = play(pool, ["untrained"], settings, games)["untrained"]
    assert record["select"] == [[[], [], []]] * 2  # unlike the paper's, chosen on TEST
    assert record["games"]["select"] == [[], []]
    assert is_part({**record, "drawn": "x"}, 2)
    assert read_outcomes([record]).chosen_srg.tolist() == [
        [run[-1] for run in record["test"]],
    ]


def test_only_ends_are_scored_where_that_is_asked_for(pool, drawn):
    settings = config(scored="ends", meta_turns=4)
    games = draw(pool, settings)
    answers = iter(["jump", "open", "ring", "light"] * 2)

    def answer(text):
        return f"ANALYSIS: a.\nIMPROVED PROMPT: Say {next(answers)}"

    settings = dataclasses.replace(
        settings, evaluation=dataclasses.replace(settings.evaluation, runs=1)
    )
    games = draw(pool, settings)
    record = play(pool, ["untrained"], settings, games, coach=Coach(answer))["untrained"]
    (run,) = record["test"]
    assert [len(turn) for turn in run] == [2, 0, 2, 0, 2]
    assert run[2] == [1, 1]  # chosen by SELECT
    assert last_success(record) == [0]


def test_all_arms_play_the_same_games_and_begin_alike(pool, drawn, tmp_path):
    settings, names = config(), [name for name in INSTALLED if name != "initial"]
    folder = EvaluationFolder(tmp_path, "evaluation", {"step": 1})
    actor = Counted()
    with (
        FunctionSpeaker(actor, threads=1, replies="action") as player,
        FunctionSpeaker(Coach()) as writer,
    ):
        arena = Arena(
            actor=player, reflector=Reflector(writer, FULL), pool=pool, task=settings.task,
            games={}, key=KEY, meta=settings.meta,
        )  # fmt: skip
        ((_, loops),) = run_together(arena, parts(["initial"], settings, drawn), room=1)
    initial = part("initial", settings, drawn).record(loops)
    assert initial["budget"] == dict.fromkeys(initial["budget"], 0)
    assert actor.games["You play. Say nothing"] == 2 * (2 + 2 + 2)
    folder.keep_part("initial", "door", drawn["door"], initial, loops)
    starts = folder.starts("door", drawn["door"])

    settings = config(candidates=2)
    actor = Counted()
    records = play(pool, names, settings, drawn, actor=actor, starts=starts)
    assert {str(r["games"]) for r in (initial, *records.values())} == {str(initial["games"])}
    assert all(
        r["test"][run][0] == initial["test"][run][0] for r in records.values() for run in (0, 1)
    )
    # the first prompt is played again by those alone whose batches are of another family, or who
    # keep it for the next one
    own = [name for name in names if ARMS[name].reads == "own"]
    again = play(pool, ["untrained"], settings, drawn, actor=(alone := Counted()), starts=starts)
    assert alone.games["You play. Say nothing"] == 0
    assert again["untrained"] == records["untrained"]
    assert len(own) > 5
    assert rates(records["expert"]) == [0, 1, 1]
    assert rates(records["trained"]) == rates(records["untrained"]) == [0, 0, 1]
    assert rates(records["other-family"])[2] == 0  # what lamps need opens no door
    assert "Say light" in records["other-family"]["prompts"][2]
    assert records["best-of-n"]["budget"]["reflector_calls"] == 2 * 4
    assert records["best-of-n"]["budget"]["actor_episodes"] == 4 * 2 + 4 * 2 * 2
    assert records["expert"]["budget"]["actor_episodes"] == 0


def test_parts_side_by_side_come_to_what_each_comes_to_alone(pool, drawn):
    names = ["initial", "untrained", "best-of-n", "flipped"]
    together = play(pool, names, config(candidates=2), drawn)
    assert together == {
        name: play(pool, [name], config(candidates=2), drawn, room=1)[name] for name in names
    }


def test_a_part_ends_as_soon_as_it_can_and_no_more_begin_than_there_is_room_for(pool, drawn):
    begun = []

    def lazily():
        for together in parts(["untrained", "initial", "flipped"], config(), drawn):
            begun.append(together.name)
            yield together

    settings = config()
    with FunctionSpeaker(act, replies="action") as player, FunctionSpeaker(Coach()) as writer:
        arena = Arena(
            actor=player, reflector=Reflector(writer, FULL), pool=pool, task=settings.task,
            games={}, key=KEY, meta=settings.meta,
        )  # fmt: skip
        done = run_together(arena, lazily(), room=13)
        assert next(done)[0] == "initial"
        assert begun == ["untrained", "initial"]
        assert [name for name, _ in done] == ["untrained", "flipped"]


HOSTILE = {
    "a megabyte": "ANALYSIS: a.\nIMPROVED PROMPT: " + "x " * 500_000,
    "control characters": "ANALYSIS: \x1b[2J\x00.\nIMPROVED PROMPT: \x1b]0;x\x07 \x85\u2028 Say open",
    "half a character": "ANALYSIS: \ud800.\nIMPROVED PROMPT: \udfff Say open",
    "nothing": "",
}


@pytest.mark.parametrize("reply", HOSTILE.values(), ids=HOSTILE)
def test_whatever_a_reflector_writes_becomes_a_record(pool, drawn, tmp_path, reply):
    settings = config(meta_turns=1)
    games = draw(pool, settings)
    names = ["untrained", "best-of-n", "reflexion", "insights", "opro", "generic", "demonstration"]
    records = play(pool, names, settings, games, coach=Coach(lambda text: reply))
    folder = EvaluationFolder(tmp_path, "evaluation", {"step": 1})
    for name, record in records.items():
        folder.keep_part(name, "door", games["door"], record, [])
        assert folder.part(name, "door", games["door"])["test"] == record["test"]
        assert all("\n" not in line for line in record["prompts"])
    usable = "open" in reply
    assert records["untrained"]["malformed"] == (0 if usable else 2)
    assert rates(records["untrained"]) == [0, 1 if usable else 0]


def test_the_best_of_several_is_taken_by_replay(pool, drawn):
    answers = iter(["jump", "open", "jump"] * 4)
    coach = Coach(lambda text: f"ANALYSIS: a.\nIMPROVED PROMPT: Say {next(answers)}")
    record = play(pool, ["best-of-n"], config(candidates=3), drawn, coach=coach)["best-of-n"]
    assert rates(record) == [0, 1, 1]


def test_opro_climbs_by_scores_alone(pool, drawn):
    def better(text):  # a word that was not tried yet, else the best one, which is the last
        tried = [word for word in ("open", "jump") if f"Say {word}" in text]
        scores = [line for line in text.splitlines() if line.startswith("Games won")]
        assert len(scores) == len(tried) + 1
        word = "open" if tried == ["jump"] else text.split("\n>>>")[-2].split()[-1]
        return f"ANALYSIS: a.\nIMPROVED PROMPT: Say {word if tried else 'jump'}"

    record = play(
        pool, ["opro"], config(meta_turns=3), draw(pool, config(meta_turns=3)), coach=Coach(better)
    )
    assert rates(record["opro"]) == [0, 0, 1, 1]
    assert record["opro"]["budget"]["reflector_calls"] == 6
    assert record["opro"]["budget"]["actor_episodes"] == 12


@pytest.mark.parametrize("k", [1, 2, 4])  # minibatches have 3, filled up where there are fewer
def test_gepa_finds_a_prompt_with_no_more_games_than_best_of_n_replays(pool, k):
    pytest.importorskip("gepa", reason="an optional package")
    settings = config(meta_turns=3, games_per_context=k, candidates=4)
    answers = [
        "",
        "ANALYSIS: a.\nIMPROVED PROMPT: Say jump",
        "ANALYSIS: b.\nIMPROVED PROMPT: Say open",
    ]
    games, tried = draw(pool, settings), []

    def answer(text):
        tried.append(text)
        return answers[(len(tried) - 1) % 3]

    records = play(pool, ["gepa"], settings, games, coach=Coach(answer))
    assert rates(records["gepa"])[0] == 0 and rates(records["gepa"])[-1] == 1
    assert all(f"=== Episode {min(k, 3)} ===" in text for text in tried)
    budget = records["gepa"]["budget"]
    assert budget["reflector_calls"] == len(tried)
    # 2 runs of 3 batches, and in each what the replay of 4 candidates may take
    assert budget["actor_episodes"] <= 2 * 3 * (k + 4 * k)
    tried.clear()
    assert records == play(pool, ["gepa"], settings, games, coach=Coach(answer))


@pytest.mark.parametrize(
    ("reply", "malformed"), [("ANALYSIS: a.\nIMPROVED PROMPT: Say jump", 0), ("?", 2)]
)
def test_gepa_keeps_the_prompt_where_nothing_better_is_found(pool, drawn, reply, malformed):
    pytest.importorskip("gepa", reason="an optional package")
    record = play(pool, ["gepa"], config(meta_turns=1), drawn, coach=Coach(lambda _: reply))
    assert rates(record["gepa"]) == [0, 0]
    assert record["gepa"]["malformed"] == malformed


def test_gepa_asks_nothing_where_every_game_is_won(pool, drawn):
    pytest.importorskip("gepa", reason="an optional package")
    won = config(meta_turns=1)
    won = dataclasses.replace(won, task=dataclasses.replace(won.task, initial_prompt="Say open"))
    record = play(pool, ["gepa"], won, drawn)["gepa"]
    assert record["budget"]["reflector_calls"] == 0
    assert rates(record) == [1, 1]


def test_demonstrations_findings_and_placebos_say_what_they_should(pool):
    settings = config(meta_turns=2)
    games = draw(pool, settings)
    coach = Coach()
    records = play(
        pool, ["demonstration", "reflexion", "flipped", "generic"], settings, games, coach=coach
    )
    assert "it is a door." in records["reflexion"]["prompts"][1]
    assert any("Success: Yes" in text for text in coach.asked)  # nobody had won anything
    assert "Take your time" not in records["generic"]["prompts"][0]
    win = dataclasses.replace(
        settings, task=dataclasses.replace(settings.task, initial_prompt="Always say open")
    )
    shown = play(pool, ["demonstration"], win, games)["demonstration"]["prompts"][1]
    assert "This is how you won" in shown and "Action: open" in shown


def test_the_placebo_for_length_is_as_long_as_what_was_written_and_says_nothing(pool, drawn):
    written = "Say open" + " and open" * 30
    coach = Coach(lambda text: f"ANALYSIS: a.\nIMPROVED PROMPT: {written}")
    record = play(pool, ["generic"], config(), drawn, coach=coach)["generic"]
    first, *later = (json.loads(line)["system_prompt"] for line in record["prompts"][:3])
    for prompt in later:
        assert prompt.startswith(f"{first} Take your time") and "open" not in prompt
        assert len(written) - 60 < len(prompt) <= len(written)  # no phrase is longer
    assert rates(record) == [0, 0, 0] and record["budget"]["reflector_calls"] == len(coach.asked)


def test_episodes_that_were_won_are_told_as_lost_to_the_flipped_placebo(pool, drawn):
    settings = dataclasses.replace(
        config(), task=dataclasses.replace(config().task, initial_prompt="Always say open")
    )
    asked = {}
    for arm in ("untrained", "flipped"):
        coach = Coach(lambda text: "ANALYSIS: a.\nIMPROVED PROMPT: Say open")
        play(pool, [arm], settings, drawn, coach=coach)
        asked[arm] = coach.asked
    assert all("Success: Yes" in one and "Success: No" not in one for one in asked["untrained"])
    assert all("Success: No" in one and "Success: Yes" not in one for one in asked["flipped"])


@pytest.mark.parametrize(
    ("rates", "turn"),
    [([0.0, 0.5, 0.5], 1), ([0.0, 0.0], 0), ([None, 0.0], 1), ([None, None], 1), ([1.0], 0)],
)
def test_the_chosen_prompt_is_the_earliest_of_the_best(rates, turn):
    assert chosen_turn(rates) == turn


@pytest.mark.parametrize(
    ("names", "endpoint", "words"),
    [
        (("untraind",), "", "Unknown arm 'untraind' .did you mean 'untrained'"),
        (("untrained@endpoint",), "", "'untrained@endpoint' has nobody to ask"),
        (("trained@endpoint",), "http://x/v1", "'trained' asks no reflector that an endpoint"),
    ],
)
def test_arms_that_cannot_be_played_are_refused(names, endpoint, words):
    with pytest.raises(ValueError, match=words):
        check_arms(names, endpoint)


def test_gepa_is_refused_where_its_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"gepa, which is not installed: .*'\.\[gepa\]'"):
        check_arms(("initial", "gepa@endpoint"), "http://x/v1")


def test_trained_arms_are_played_last_and_once_per_seed():
    found = part_keys(("trained", "initial", "expert", "untrained@endpoint"), ("a", "b"), 2)
    assert found == [
        *(PartKey("initial", family) for family in "ab"),
        *(PartKey("expert", family) for family in "ab"),
        *(PartKey("untrained@endpoint", family) for family in "ab"),
        *(PartKey("trained", family, seed) for seed in (0, 1) for family in "ab"),
    ]


def test_arms_that_ask_any_reflector_are_played_for_each_run_that_draws_by_itself():
    found = part_keys(("trained", "initial", "expert", "flipped", "untrained"), ("a",), 2, "own")
    assert found == [
        PartKey("initial", "a"),
        PartKey("expert", "a"),
        *(PartKey(arm, "a", seed) for arm in ("flipped", "untrained") for seed in (0, 1)),
        *(PartKey("trained", "a", seed) for seed in (0, 1)),
    ]


def test_names_of_arms_fit_the_names_of_their_files():
    assert not any("_" in name or name.startswith("evaluation") for name in ARMS)


def test_games_that_models_were_taught_with_are_left_out(pool, tmp_path):
    settings = config(runs=1, meta_turns=1, families=("bell",)).with_models(
        str(tmp_path / "actor"), str(tmp_path / "reflector")
    )
    assert unrecorded(settings) == [settings.actor.model, settings.reflector.model]
    # by the names that people gave them
    assert unrecorded(settings, settings.with_models("a.gguf", "a.gguf")) == ["a.gguf"]
    held_out = FakeEnvironment().games("bell", "train")
    write_record(tmp_path, {"fake": entry({}, ["bell"], "train", 998)})
    assert unrecorded(settings) == []
    games = choose_games(FakeEnvironment(), pool, settings, "bell", frozenset(), KEY)
    assert {*games.stream[0][0]} == {*held_out[998:]}


@pytest.mark.parametrize("folder", ["", "both", "fake"])
def test_the_pairs_that_ship_say_what_they_were_taught_with(folder):
    pair = FAKE_PAIR.parent / folder
    config = BASE.with_models(str(pair / "actor"), str(pair / "reflector"))
    assert unrecorded(config) == []
    taught = taught_games(config, MiniHack(), "eat")
    assert len(taught) == (0 if folder == "fake" else 80)


@pytest.mark.parametrize(
    ("environment", "folder"),
    [(MiniHack(text="compact"), "actor"), (ALFWorld(text="compact", rooms="small"), "both/actor")],
    ids=["minihack", "alfworld"],
)
def test_pocket_actors_have_words_for_experts_and_placebos(environment, folder):
    chat = ChatTokenizer(FAKE_PAIR.parent / folder)
    assert isinstance(environment, Advised)
    generic = dataclasses.replace(
        part("generic", config(), dict.fromkeys(FAMILIES)).place(0, 0),
        reflection=PRESETS["pocket-minihack"].reflection,
        num_tokens=chat.count,
        task=dataclasses.replace(FAKE, initial_prompt=environment.initial_prompt),
    )
    for prompt in (environment.expert_prompt, generic_prompt(generic, 40)):
        assert chat.unknown(prompt) == 0
    assert 30 < chat.count(generic_prompt(generic, 40)) <= 40


class Repeats(FunctionSpeaker):
    """A function that is known to answer alike."""

    def repeats(self, limits):
        return True


def test_what_a_greedy_actor_has_played_is_not_played_again(pool, drawn):
    settings, actor, played = config(), Counted(), PlayedGames()
    coaches = Coach(), Coach()
    records = []
    for coach in coaches:
        with (
            Repeats(actor, threads=1, replies="action") as player,
            FunctionSpeaker(coach, threads=1) as writer,
        ):
            arena = Arena(
                actor=player, reflector=Reflector(writer, FULL), pool=pool, task=settings.task,
                games={}, key=KEY, meta=settings.meta,
            )  # fmt: skip
            ((_, loops),) = run_together(
                arena, parts(["untrained"], settings, drawn), room=99, played=played
            )
        records.append(part("untrained", settings, drawn).record(loops))
        assert sum(actor.games.values()) == 2 * (3 * 4 + 2 * 2)  # none the second time
    assert records[0] == records[1] == play(pool, ["untrained"], settings, drawn)["untrained"]
    assert records[1]["budget"]["actor_episodes"] == 8


def test_no_more_turns_are_remembered_than_asked_for(pool, drawn):
    settings, actor, played = config(), Counted(), PlayedGames(max_turns=0)
    with Repeats(actor, threads=1, replies="action") as player, FunctionSpeaker(Coach()) as writer:
        arena = Arena(
            actor=player, reflector=Reflector(writer, FULL), pool=pool, task=settings.task,
            games={}, key=KEY, meta=settings.meta,
        )  # fmt: skip
        episodes = [Episode(game=game, system_prompt="a") for game in drawn["door"].test[0]]
        for times in (1, 2):
            played.play(arena, episodes, "")
            assert actor.games["a"] == times * 2
