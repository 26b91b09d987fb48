"""The ALFWorld engine: the quirks of the original, what it refuses, and the original itself as the
oracle.
"""

import gc
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tracemalloc

import pytest

from envs.alfworld import ALFWorld, differential, generate
from envs.alfworld.engine import NOTHING_HAPPENS, Answer, compile_game
from envs.alfworld.game import AlfworldGame
from envs.alfworld.grammar import parse_text, split_task
from envs.alfworld.rules import parse_domain, parse_formula, typed_names
from envs.alfworld.tables import package_text
from envs.api import GameId, Outcome

KITCHEN = """
(define (problem kitchen) (:domain alfred)
(:objects
  agent1 - agent
  Apple_bar_1 - object
  Knife_bar_1 - object
  DeskLamp_bar_1 - object
  Statue_bar_1 - object
  Fridge_bar_1 - receptacle
  Microwave_bar_1 - receptacle
  Sink_bar_1_bar_SinkBasin - receptacle
  Cabinet_bar_1 - receptacle
  Cabinet_bar_2 - receptacle
  CounterTop_bar_1 - receptacle
  loc_bar_0 - location
  loc_bar_1 - location
  loc_bar_2 - location
  loc_bar_3 - location
  loc_bar_4 - location
  AppleType - otype
  KnifeType - otype
  DeskLampType - otype
  StatueType - otype
  FridgeType - rtype
  MicrowaveType - rtype
  SinkBasinType - rtype
  CabinetType - rtype
  CounterTopType - rtype
)
(:init
  (atLocation agent1 loc_bar_0)
  (receptacleType Fridge_bar_1 FridgeType) (receptacleAtLocation Fridge_bar_1 loc_bar_1) (openable Fridge_bar_1)
  (receptacleType Microwave_bar_1 MicrowaveType) (receptacleAtLocation Microwave_bar_1 loc_bar_2) (openable Microwave_bar_1)
  (receptacleType Sink_bar_1_bar_SinkBasin SinkBasinType) (receptacleAtLocation Sink_bar_1_bar_SinkBasin loc_bar_3)
  (receptacleType CounterTop_bar_1 CounterTopType) (receptacleAtLocation CounterTop_bar_1 loc_bar_3)
  (receptacleType Cabinet_bar_1 CabinetType) (receptacleAtLocation Cabinet_bar_1 loc_bar_4) (openable Cabinet_bar_1)
  (receptacleType Cabinet_bar_2 CabinetType) (receptacleAtLocation Cabinet_bar_2 loc_bar_4) (openable Cabinet_bar_2)
  (canContain FridgeType AppleType) (canContain CounterTopType AppleType) (canContain CounterTopType KnifeType) (canContain CabinetType AppleType)
  (objectType Apple_bar_1 AppleType) (pickupable Apple_bar_1) (sliceable Apple_bar_1)
  (heatable Apple_bar_1) (coolable Apple_bar_1) (cleanable Apple_bar_1)
  (objectType Knife_bar_1 KnifeType) (pickupable Knife_bar_1)
  (objectType DeskLamp_bar_1 DeskLampType) (toggleable DeskLamp_bar_1)
  (objectType Statue_bar_1 StatueType) (pickupable Statue_bar_1)
  (inReceptacle Apple_bar_1 CounterTop_bar_1) (objectAtLocation Apple_bar_1 loc_bar_3)
  (inReceptacle Knife_bar_1 CounterTop_bar_1) (objectAtLocation Knife_bar_1 loc_bar_3)
  (inReceptacle DeskLamp_bar_1 CounterTop_bar_1) (objectAtLocation DeskLamp_bar_1 loc_bar_3)
  (inReceptacle Statue_bar_1 Cabinet_bar_2) (objectAtLocation Statue_bar_1 loc_bar_4)
)
(:goal (and (exists (?r - receptacle) (exists (?o - object)
  (and (isCool ?o) (objectType ?o AppleType) (receptacleType ?r FridgeType) (inReceptacle ?o ?r))))))
)
"""
WIN = (
    "go to countertop 1",
    "take apple 1 from countertop 1",
    "go to fridge 1",
    "cool apple 1 with fridge 1",
    "open fridge 1",
    "move apple 1 to fridge 1",
)


def kitchen(**changes: str) -> dict:
    grammar = package_text("data/alfred.twl2").replace("UNKNOWN GOAL", "put a cool apple in fridge")
    return {
        "pddl_domain": package_text("data/alfred.pddl"),
        "grammar": grammar,
        "pddl_problem": KITCHEN,
        "walkthrough": list(WIN),
        "solvable": True,
    } | changes


def start(content: dict | None = None):
    live = compile_game(content or kitchen()).start()
    live.reset()
    return live


def play(live, *commands: str) -> Answer:
    for command in commands:
        answer = live.step(command)
        assert answer.text != NOTHING_HAPPENS, command
    return answer


# --- what the original shows ---


def test_the_first_text_and_commands():
    first = compile_game(kitchen()).start().reset()
    assert (
        first.text
        == "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly"
        " around you, you see a cabinet 2, a cabinet 1, a countertop 1, a fridge 1, a microwave"
        " 1, and a sinkbasin 1.\n\nYour task is to: put a cool apple in fridge."
    )
    places = ("cabinet 1", "cabinet 2", "countertop 1", "fridge 1", "microwave 1", "sinkbasin 1")
    assert first.commands == (*(f"go to {place}" for place in places), "help", "inventory", "look")
    assert not first.won


def test_places_that_share_a_location():
    answer = play(start(), "go to cabinet 1")
    assert answer.text == "You arrive at cabinet 1. The cabinet 1 is closed."
    assert {"open cabinet 1", "open cabinet 2", "examine cabinet 2"} <= set(answer.commands)
    assert not {"go to cabinet 1", "go to cabinet 2"} & set(answer.commands)


def test_look():
    live = start()
    assert (
        play(live, "look").text
        == "You are in the middle of a room. Looking quickly around you, you see nothing."
    )
    play(live, "go to sinkbasin 1")
    assert (
        play(live, "look").text
        == "You are facing the countertop 1, and sinkbasin 1. Next to it, you see nothing."
    )
    play(
        live,
        "take apple 1 from countertop 1",
        "go to fridge 1",
        "open fridge 1",
        "move apple 1 to fridge 1",
    )
    assert play(live, "look").text == "You are facing the fridge 1. Next to it, you see nothing."


def test_next_to_it_tells_of_what_was_taken_away():
    live = start(
        kitchen(
            pddl_problem=KITCHEN.replace(
                "(canContain CabinetType AppleType)", "(canContain SinkBasinType AppleType)"
            )
        )
    )
    play(
        live, "go to countertop 1", "take apple 1 from countertop 1", "move apple 1 to sinkbasin 1"
    )
    assert (
        play(live, "look").text
        == "You are facing the countertop 1, and sinkbasin 1. Next to it, you see a apple 1."
    )


def test_examine_is_for_places_and_the_thing_in_hand():
    live = start()
    assert "examine apple 1" not in play(live, "go to countertop 1").commands
    assert (
        play(live, "examine countertop 1").text
        == "On the countertop 1, you see a apple 1, a desklamp 1, and a knife 1."
    )
    assert "examine apple 1" in play(live, "take apple 1 from countertop 1").commands
    assert play(live, "examine apple 1").text == "There's nothing special about apple 1."


def test_doors_matter_for_hands_but_not_for_heat_and_cold():
    live = start()
    play(live, "go to countertop 1", "take apple 1 from countertop 1")
    assert "move apple 1 to fridge 1" not in play(live, "go to fridge 1").commands
    assert (
        play(live, "cool apple 1 with fridge 1").text == "You cool the apple 1 using the fridge 1."
    )
    assert play(live, "examine apple 1").text == "This is a cold apple 1."
    play(live, "go to microwave 1", "heat apple 1 with microwave 1")
    assert play(live, "examine apple 1").text == "This is a hot apple 1."
    play(live, "go to sinkbasin 1", "clean apple 1 with sinkbasin 1")
    assert play(live, "examine apple 1").text == "This is a hot and clean apple 1."
    assert "move apple 1 to sinkbasin 1" not in live.step("look").commands  # not in canContain
    assert (
        play(live, "go to fridge 1", "open fridge 1").text
        == "You open the fridge 1. The fridge 1 is open. In it, you see nothing."
    )
    assert play(live, "move apple 1 to fridge 1").text == "You move the apple 1 to the fridge 1."
    assert "take apple 1 from fridge 1" not in play(live, "close fridge 1").commands


def test_hands_hold_one_thing():
    live = start()
    assert play(live, "inventory").text == "You are not carrying anything."
    assert "take knife 1 from countertop 1" in play(live, "go to countertop 1").commands
    assert not [
        command
        for command in play(live, "take apple 1 from countertop 1").commands
        if command.startswith("take")
    ]
    assert play(live, "inventory").text == "You are carrying: a apple 1."


def test_use_always_turns_on():
    live = start()
    play(live, "go to countertop 1")
    assert {play(live, "use desklamp 1").text for _ in range(3)} == {"You turn on the desklamp 1."}


def test_slice():
    live = start()
    play(live, "go to countertop 1", "take knife 1 from countertop 1")
    assert (
        play(live, "slice apple 1 with knife 1").text == "You sliced the apple 1 with the knife 1."
    )
    play(live, "move knife 1 to countertop 1", "take apple 1 from countertop 1")
    assert play(live, "examine apple 1").text == "This is a sliced apple 1."


def test_help_starts_with_its_first_word_and_ends_with_a_newline():
    text = play(start(), "help").text
    assert text.startswith("Available commands:\n  look:   ") and text.endswith(
        "using a sharp object\n"
    )


@pytest.mark.parametrize("blank", [" {}", "{}\n", "\t{} \r\n", "\u3000{}"])
def test_blanks_around_a_command_are_left_out(blank):
    assert start().step(blank.format("go to fridge 1")).text.startswith("You arrive at fridge 1.")


@pytest.mark.parametrize(
    "junk",
    [
        "",
        " ",
        "Look",
        "LOOK",
        "look.",
        "look\x00",
        "go  to fridge 1",
        "go to fridge",
        "go to fridge 2",
        "\ud800",
        "öffne",
        "{o.name}",
        "x" * 10_000_000,
    ],
    ids=range(13),
)
def test_junk_changes_nothing(junk):
    live = start()
    before = play(live, "go to countertop 1")
    assert live.step(junk) == Answer(NOTHING_HAPPENS, before.commands, False)
    assert play(live, "take apple 1 from countertop 1").text.startswith("You pick up")


def test_after_the_win_the_last_answer_is_repeated():
    live = start()
    last = play(live, *WIN)
    assert last.won and live.step("look") == last and live.step("") == last
    assert not live.reset().won and live.step("look").text.startswith("You are in the middle")


# --- what is refused, and what is not ---


@pytest.mark.parametrize(
    ("field", "old", "new", "message"),
    [
        (
            "grammar",
            "move {o} to {r}",
            "put {o} in/on {r}",
            "The game's grammar differs from alfworld .*commands of 'putobject'.*",
        ),
        (
            "grammar",
            "You move the {o.name}",
            "You put the {o.name}",
            "The game's grammar differs from alfworld .*rule 'PutObject.feedback'",
        ),
        (
            "grammar",
            "look around your",
            "look round your",
            "The game's grammar differs from alfworld .*feedback of 'help'",
        ),
        ("grammar", '"task": [', '"tusk": [', 'no rule "task"'),
        (
            "grammar",
            "action look",
            "motion look",
            "The grammar is not understood at '.*motion look",
        ),
        (
            "pddl_domain",
            "(not (holdsAny ?a))",
            "(holdsAny ?a)",
            "The game's PDDL domain differs from alfworld .*pickupobject",
        ),
        (
            "pddl_domain",
            "(checked ?r)\n",
            "(inspected ?r)\n",
            "Undefined predicate 'inspected' in the action 'examinereceptacle'",
        ),
        ("pddl_domain", "(define (domain alfred)", "(define (domain alfred2)", "must start with"),
        ("pddl_domain", "(define", "define", "closes a parenthesis that was never opened"),
        (
            "pddl_problem",
            "(isCool ?o)",
            "(isFrozen ?o)",
            "Undefined predicate 'isfrozen' in the goal",
        ),
        (
            "pddl_problem",
            "(heatable Apple_bar_1)",
            "(eatable Apple_bar_1)",
            "Undefined predicate 'eatable' in the initial facts",
        ),
        (
            "pddl_problem",
            "(heatable Apple_bar_1)",
            "(heatable Pear_bar_1)",
            "initial fact 'heatable pear_bar_1' is not about objects of type object",
        ),
        (
            "pddl_problem",
            "(heatable Apple_bar_1)",
            "(heatable Apple_bar_1 Fridge_bar_1)",
            "initial fact 'heatable apple_bar_1 fridge_bar_1'",
        ),
        (
            "pddl_problem",
            "(heatable Apple_bar_1)",
            "heatable Apple_bar_1",
            "'heatable apple_bar_1' among its initial facts",
        ),
        (
            "pddl_problem",
            "(heatable Apple_bar_1)",
            "(not (heatable Apple_bar_1))",
            "among its initial facts",
        ),
        (
            "pddl_problem",
            "(heatable Apple_bar_1)",
            "((heatable Apple_bar_1)",
            "opening and .* closing parentheses",
        ),
        (
            "pddl_problem",
            "AppleType) (receptacleType ?r",
            "PearType) (receptacleType ?r",
            "goal of the game names 'peartype'",
        ),
        (
            "pddl_problem",
            "  Apple_bar_1 - object\n",
            "  Apple_bar_1 - object\n  Apple_bar_1 - object\n",
            "declares 'apple_bar_1' twice",
        ),
        (
            "pddl_problem",
            "(isCool ?o)",
            "(not (isCool ?o) (isHot ?o))",
            "formula .* in the goal is not understood",
        ),
        ("pddl_problem", "(isCool ?o)", "(isCool ?x)", "declared nowhere"),
        ("pddl_problem", "(isCool ?o)", "(not (isCool ?x))", "declared nowhere"),
        ("pddl_problem", "(:init", "(:start", "must have :objects, :init and :goal"),
    ],
)
def test_refusals(field, old, new, message):
    content = kitchen()
    assert old in content[field]
    with pytest.raises(ValueError, match=message) as raised:
        compile_game(content | {field: content[field].replace(old, new)})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [None, [], {}, {"pddl_domain": 3}, kitchen() | {"grammar": None}]
)
def test_a_mapping_that_is_no_game_is_refused(content):
    with pytest.raises(ValueError, match="A game file must hold"):
        compile_game(content)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("field", ["pddl_domain", "grammar", "pddl_problem"])
def test_a_truncated_file_is_refused(field, cut):
    content = kitchen()
    with pytest.raises(ValueError):
        compile_game(content | {field: content[field][: int(len(content[field].rstrip()) * cut)]})


def test_damage_is_refused_or_harmless():
    for seed in range(80):
        rng = random.Random(seed)
        words = KITCHEN.split(" ")
        words[rng.randrange(len(words))] = rng.choice(
            [*words[5:], "(and)", "?x", "(not)", "()", "(", ")"]
        )
        try:
            live = start(kitchen(pddl_problem=" ".join(words)))
        except ValueError:
            continue
        for command in WIN:
            live.step(command)


def test_the_two_differences_of_downloaded_games_are_accepted():
    content = kitchen()
    rule = re.search(r'action help \{.*?"rhs": "(.*?)".*?\n\}', content["grammar"], re.DOTALL)
    in_place = (
        'action help {\n    template :: "help";\n    feedback :: "'
        + rule.group(1).replace("\\n", "\n")
        + '";\n}'
    )
    theirs = content | {
        "pddl_domain": (
            content["pddl_domain"].replace(
                ";(receptacleType ?r SinkType)", "(receptacleType ?r SinkType)"
            )
        ),
        "grammar": content["grammar"].replace(rule.group(), in_place),
    }
    assert (
        theirs["pddl_domain"] != content["pddl_domain"] and theirs["grammar"] != content["grammar"]
    )
    ours, other = start(content), start(theirs)
    for command in ("help", *WIN):
        assert ours.step(command) == other.step(command)


def test_pddl_and_texts_that_are_not_understood():
    for text, message in [
        ("(a", "open parentheses"),
        ("(a))", "never opened"),
        ("(a) (b)", "one parenthesised"),
        ("a", "one parenthesised"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_formula(text)
    assert typed_names(("a", "b", "-", "t", "c")) == {"a": "t", "b": "t", "c": "object"}
    with pytest.raises(ValueError, match="'import os' of the grammar"):
        parse_text("{import os}")
    with pytest.raises(ValueError, match="unknown section ':axiom'"):
        parse_domain("(define (domain alfred) (:axiom x))")
    with pytest.raises(ValueError, match="task sentence"):
        split_task('"task": [{"rhs": "put {o.name} there"}]')


# --- the game ---


def game_id(key: str = "kitchen", family: str = "cool") -> GameId:
    return GameId(env="alfworld", family=family, key=key)


def test_reward_once_and_outcome():
    game = AlfworldGame("cool", lambda key: kitchen())
    first = game.reset(game_id())
    assert first.text.startswith("-= Welcome") and first.actions[-1] == "look"
    steps = [game.step(action) for action in (*WIN, "look", "junk")]
    assert [step.reward for step in steps] == [0.0] * 5 + [1.0, 0.0, 0.0]
    assert [step.outcome for step in steps] == [None] * 5 + [Outcome.SUCCESS] * 3
    game.close()
    game.close()
    with pytest.raises(ValueError, match="call reset first"):
        game.step("look")


def test_foreign_ids_and_options_are_refused():
    game = AlfworldGame("cool", lambda key: kitchen())
    for other in (game_id(family="heat"), GameId(env="minihack", family="cool", key="1")):
        with pytest.raises(ValueError, match="is no game of"):
            game.reset(other)
    with pytest.raises(ValueError, match="cannot be played: The PDDL problem must have"):
        AlfworldGame("cool", lambda key: kitchen(pddl_problem="")).reset(game_id())
    with pytest.raises(ValueError, match="Unknown text style 'long'"):
        AlfworldGame("cool", lambda key: {}, style="long")
    with pytest.raises(ValueError, match="Unknown ALFWorld engine 'java'"):
        AlfworldGame("cool", lambda key: {}, engine="java")


def test_compact_style_speaks_in_few_words():
    game = AlfworldGame("cool", lambda key: kitchen(), style="compact")
    first = game.reset(game_id())
    assert "Welcome" not in first.text and "apple" in first.text and first.actions == ()
    assert "countertop" in game.step("go countertop").observation.text
    assert game.official().text.startswith("You arrive at countertop 1.")


def test_state_hash_is_of_the_state_alone():
    def digest(problem: str, task: str = "cool") -> str:
        content = kitchen(pddl_problem=problem)
        content["grammar"] = content["grammar"].replace("put a cool apple", f"put a {task} apple")
        game = AlfworldGame("cool", lambda key: content)
        game.reset(game_id())
        before = game.state_hash()
        game.step("go to fridge 1")
        assert game.state_hash() == before
        return before

    facts = [line for line in KITCHEN.splitlines() if line.startswith("  (")][:-1]
    shuffled = KITCHEN.replace("\n".join(facts), "\n".join(reversed(facts))).replace(
        "problem kitchen", "problem other"
    )
    assert shuffled != KITCHEN
    assert digest(KITCHEN) == digest(shuffled) == digest(KITCHEN, "chilled")
    assert digest(KITCHEN) != digest(
        KITCHEN.replace(
            "(inReceptacle Apple_bar_1 CounterTop_bar_1)",
            "(inReceptacle Apple_bar_1 Cabinet_bar_1)",
        )
    )
    assert digest(KITCHEN) != digest(KITCHEN.replace("(isCool ?o)", "(isHot ?o)"))
    assert digest(KITCHEN) != digest(KITCHEN.replace("?r FridgeType)", "?r CabinetType)"))


def test_generated_games_are_won_by_their_walkthrough():
    for seed in range(12):
        content = generate.generate(seed)
        live = start(content)
        assert play(live, *content["walkthrough"]).won


# --- processes and memory ---

SESSION = """
import hashlib, json, random, sys
from envs.alfworld import ALFWorld
world = ALFWorld(data="generated")
digest = hashlib.sha256()
for family in world.families:
    game = world.open(family)
    for game_id in world.games(family, "test")[:2]:
        rng = random.Random(str(game_id))
        step = game.reset(game_id)
        digest.update(game.state_hash().encode())
        for _ in range(40):
            digest.update(repr(step).encode())
            step = game.step(rng.choice(game.official().commands)).observation
    game.close()
heavy = {"textworld", "tatsu", "fast_downward", "mementos", "alfworld", "gymnasium", "numpy"} & set(sys.modules)
print(json.dumps({"digest": digest.hexdigest(), "heavy": sorted(heavy)}))
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | environment,
        cwd=pathlib.Path(__file__).parents[1],
    )


def test_equal_in_every_process_and_light():
    results = [json.loads(python("-c", SESSION, PYTHONHASHSEED=seed).stdout) for seed in ("1", "2")]
    assert results[0] == results[1]
    assert results[0]["heavy"] == []


def test_memory_stays_flat():
    contents = [generate.generate(seed) for seed in range(6)]
    game = AlfworldGame("put", lambda key: contents[int(key)])

    def episodes(count: int):
        for number in range(count):
            observation = game.reset(game_id(str(number % 6), "put"))
            game.state_hash()
            for _ in range(3):
                observation = game.step(
                    random.Random(number).choice(observation.actions)
                ).observation

    episodes(12)
    gc.collect()
    tracemalloc.start()
    try:
        episodes(6)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        episodes(60)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20_000, f"{grown} bytes in 60 episodes"  # one compiled game is about 90,000


# --- the original, untouched here and with parse caches below ---

STOCK = """
import sys
from envs.alfworld import ALFWorld
argv = list(sys.argv)
world, plain = ALFWorld(data="generated", rooms="small", engine="textworld"), ALFWorld(data="generated", rooms="small")
game_id = world.games("heat", "test")[0]
game = world.open("heat")
try:
    world.open("heat")
except RuntimeError as error:
    assert "one game per process" in str(error), error
else:
    raise AssertionError("a second open was not refused")
ours = plain.open("heat")
assert game.reset(game_id) == ours.reset(game_id)
assert game.state_hash() == ours.state_hash()
rewards = []
junk = ["", " \\n", "\\x00", "\\ud800", "LOOK", "look", " help\\t", "examine", "x" * 10_000]
for command in (*junk, *world.walkthrough(game_id), "look"):
    step = game.step(command)
    assert step == ours.step(command), command
    rewards.append(step.reward)
assert rewards[-2:] == [1.0, 0.0] and sum(rewards) == 1.0, rewards
import mementos.core
game.close()
game.close()
assert not mementos.core._memento_cache
world.open("put").close()
assert sys.argv == argv
sys.stderr.write("done")
"""


def test_the_stock_engine_as_a_game():
    done = python("-c", STOCK)
    assert done.stderr.endswith("done"), done.stderr[-3000:]
    assert done.stdout == ""


def rows(table: str) -> dict[str, list[int]]:
    return {
        line.split()[1]: [int(word) for word in line.split()[2:]]
        for line in table.splitlines()
        if line.startswith("all")
    }


def test_results_are_kept_for_the_same_settings_only(tmp_path):
    file, settings = tmp_path / "result.json", {"steps": 8}
    assert differential._read(None, settings) == differential._read(file, settings) == {}
    differential._write(file, {"settings": settings, "games": {"alfworld|put|a": {}}})
    assert differential._read(file, settings) == {"alfworld|put|a": {}}
    for text in (file.read_text(), "[]", "{"):
        file.write_text(text)
        with pytest.raises(ValueError, match="give another --json file"):
            differential._read(file, {"steps": 9})


def official_data() -> dict[str, str]:
    places = [os.environ.get("ALFWORLD_DATA", ""), os.path.expanduser("~/.cache/alfworld")]
    found = next(
        (
            place
            for place in places
            if place and (pathlib.Path(place) / "json_2.1.1" / "valid_seen").is_dir()
        ),
        None,
    )
    if found is None:
        pytest.skip("no official ALFWorld games in $ALFWORLD_DATA or ~/.cache/alfworld")
    return {"ALFWORLD_DATA": found}


@pytest.mark.parametrize(("data", "split"), [("generated", "train"), ("official", "valid_seen")])
def test_equal_to_the_stock_engine_in_every_family(data, split):
    environment = official_data() if data == "official" else {}
    done = python(
        "-m",
        "envs.alfworld.differential",
        "--data",
        data,
        "--split",
        split,
        "--limit",
        "6",
        "--steps",
        "10",
        "--policies",
        "detour,junk",
        **environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert all(
        games == 6 and steps >= 24 and differ == 0
        for games, steps, _, differ in rows(done.stdout).values()
    )


class Echo:
    """A stand-in for the stock engine: our own, with one word changed from some step on."""

    def __init__(self, content: dict, wrong_from: int, field: str):
        self._live, self._wrong_from, self._field = compile_game(content).start(), wrong_from, field
        self._steps, self.score = 0, 0.0

    def reset(self) -> Answer:
        return self._spoil(self._live.reset())

    def step(self, command: str) -> Answer:
        self._steps += 1
        answer = self._live.step(command)
        self.score = float(answer.won)
        if self._field == "reward" and self._steps >= self._wrong_from:
            self.score += 1.0
        return self._spoil(answer)

    def _spoil(self, answer: Answer) -> Answer:
        if self._steps < self._wrong_from:
            return answer
        changed = {
            "text": answer.text + "!",
            "commands": answer.commands[::-1],
            "won": not answer.won,
        }
        return (
            answer._replace(**{self._field: changed[self._field]})
            if self._field in changed
            else answer
        )


@pytest.mark.parametrize("field", ["text", "commands", "won", "reward"])
@pytest.mark.parametrize("policy", sorted(differential.POLICIES))
def test_the_comparison_sees_every_difference(policy, field):
    for wrong_from in (0, 3):
        if (field, wrong_from) == ("reward", 0):
            continue  # a reset pays nothing
        episode = differential.play_both(
            game_id(), kitchen(), Echo(kitchen(), wrong_from, field), policy, seed=0, steps=9
        )
        assert field in episode["difference"] and episode["steps"] == wrong_from
    equal = differential.play_both(
        game_id(), kitchen(), Echo(kitchen(), 10**9, "text"), policy, seed=0, steps=9
    )
    assert not equal["difference"] and equal["steps"] >= 9
    assert policy != "expert" or equal == {
        "steps": len(WIN) + differential.PAST_END,
        "won": True,
        "difference": {},
    }


def test_games_are_spread_over_families():
    chosen = differential.choose(ALFWorld(data="generated"), "test", 13)
    assert len(set(chosen)) == 13
    assert {
        family: sum(game.family == family for game in chosen) for family in ("clean", "put")
    } == {"clean": 3, "put": 2}
