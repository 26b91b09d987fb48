import collections
import dataclasses
import json
import pathlib
import random
import re

import pytest

from envs.alfworld import ALFWorld
from envs.api import GameId, Outcome
from envs.minihack import MiniHack
from envs.minihack.renamed import renaming
from envs.minihack.text import OFFERED
from envs.renamings import MARK
from experiments import train
from experiments.fake_pair import save_pair
from experiments.pocket.data import PlayedGame
from experiments.pocket.lessons import EQUIVALENT_VERBS, Lesson
from experiments.presets import SMOLLM2, SMOLLM2_ALFWORLD, SMOLLM2_MINIHACK, adapter_folder
from experiments.pretraining import taught_games
from experiments.shapes import PUBLISHED
from experiments.smollm import chats, lessons, measure, named, play
from ictjax.actions import parse_react
from ictjax.models.hf.content import file_sha256
from ictjax.models.peft import load_adapter
from ictjax.records import Context, Trajectory, Turn, to_json
from ictjax.reflector import parse_reply


@pytest.fixture(scope="module")
def games() -> list[PlayedGame]:
    return list(play.play_families(list(lessons.LESSONS), games_per_family=3, max_steps=10, seed=0))


def _words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))


def test_nothing_of_a_heldout_lesson_is_in_a_lesson_of_training() -> None:
    parts = lambda group: {x for lesson in group.values() for x in (lesson.thing, lesson.verb)}  # noqa: E731
    assert not parts(lessons.TRAIN_LESSONS) & parts(lessons.HELDOUT_LESSONS)
    environment = SMOLLM2_MINIHACK.task.environment
    trained = {family.partition(MARK)[0] for family in environment.train_families}
    assert trained == set(lessons.TRAIN_LESSONS) - {"locked_door", "freeze_horn"}
    assert environment.heldout_families == tuple(lessons.HELDOUT_LESSONS)
    assert len(trained) >= 6
    assert len(environment.heldout_families) >= 4
    names = {name for family in environment.train_families for name in renaming(family).values()}
    assert not names & set(OFFERED)


def test_lessons_win(games: list[PlayedGame]) -> None:
    won = collections.Counter[str]()
    for game in games:
        right = game.lesson == lessons.LESSONS[game.family]
        if right:
            won[game.family] += game.success
    # a door takes as many kicks as it takes
    assert all(won[family] >= 3 for family in set(lessons.LESSONS) - {"locked_door"}), won


def test_novices_try_the_verbs_in_the_order_that_their_game_lists(games: list[PlayedGame]) -> None:
    novices = [game for game in games if game.lesson is None]
    orders = collections.defaultdict(set)
    for game in novices:
        listed = play.VERB_LIST.search(game.turns[0].observation)
        assert listed is not None
        order = listed[1].split(", ")
        assert sorted(order) == sorted(OFFERED)
        orders[game.family].add(tuple(order))
        tried = [t for turn in game.turns for t in re.findall(r"Try (\w+)\.", turn.thought)]
        assert tried == [verb for verb in order if verb != "pickup"][: len(tried)]
        assert [turn.action.split()[0] for turn in game.turns if "Try" in turn.thought] == tried
        if game.success and game.family != "locked_door":
            right = lessons.LESSONS[game.family]
            assert tried[-1] in {right.verb, *EQUIVALENT_VERBS.get(right, ())}
    assert all(len(orders[family]) > 1 for family in lessons.LESSONS), orders
    assert len({game.success for game in novices}) == 2


def test_sentences_are_short_and_name_the_verbs_once(games: list[PlayedGame]) -> None:
    for game in games:
        first, *others = [turn.observation for turn in game.turns]
        assert "Verbs: " in first
        for text in (first, *others, game.final_observation):
            assert len(text.split()) < 60, text
            assert not re.search(r"\b[aA] [aeiou]", text), text
            assert not text[0].islower(), text
        assert not any("Verbs:" in text for text in others)


def test_the_actor_is_taught_to_follow_its_prompt_to_the_letter(games: list[PlayedGame]) -> None:
    rows = chats.ActorChats(games, seed=1)
    followed = unmoved = 0
    for _ in range(200):
        prompt, *turns = rows.draw()["messages"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            parsed = parse_react(answer["content"])
            assert not isinstance(parsed, str)
            if parsed.thought.startswith((play.NO_LESSON, play.WAY_OPEN)):
                unmoved += 1
                continue
            thing = re.fullmatch(r"The (.*): .*", parsed.thought)
            assert thing is not None
            # named by the prompt, and so is the verb of the thought
            assert _words(thing[1]) <= _words(prompt["content"])
            verb = parsed.thought.rstrip(".").rsplit(maxsplit=1)[-1]
            assert {verb} & _words(prompt["content"]) or verb == "puton", (parsed, prompt)
            followed += 1
            assert question["content"]
    assert followed > 100 < unmoved


def test_the_same_seed_gives_the_same_chats(games: list[PlayedGame]) -> None:
    first, second = (chats.ActorChats(games, seed=3) for _ in range(2))
    assert [first.draw() for _ in range(5)] == [second.draw() for _ in range(5)]


def test_the_reflector_is_taught_nothing_of_heldout_families(games: list[PlayedGame]) -> None:
    with pytest.raises(ValueError, match="is no training family"):
        chats.ReflectorChats(games, SMOLLM2_MINIHACK.reflection, seed=0)
    trained = [game for game in games if game.family in lessons.TRAIN_LESSONS]
    rows = chats.ReflectorChats(trained, SMOLLM2_MINIHACK.reflection, seed=0)
    told = collections.Counter[str]()
    seen, explored = collections.Counter[bool](), collections.Counter[bool]()  # was one won?
    said = 0
    for _ in range(300):
        chat = rows.draw(2)
        assert not chats.mentions_held_out(chat)
        parsed = parse_reply(chat["messages"][-1]["content"])
        assert not isinstance(parsed, str)
        told[parsed.system_prompt] += 1
        # the analysis is what happened
        episodes = re.findall(
            r"Episode (\d): (won|lost)\.\n(.*?)\nEnd:", chat["messages"][1]["content"], re.DOTALL
        )
        last = [text.rpartition("Action: ")[2].split()[0] for _, _, text in episodes]
        ended = [
            f"Episode {number} was {how} with {verb}."
            for (number, how, _), verb in zip(episodes, last, strict=True)
        ]
        assert parsed.analysis.startswith(" ".join(ended))
        # the prompt is not what won
        won = {verb for (_, how, _), verb in zip(episodes, last, strict=True) if how == "won"}
        seen[bool(won)] += 1
        explored[bool(won)] += lessons.EXPLORE in parsed.system_prompt
        said += bool(won & _words(parsed.system_prompt))
    assert len(told) > 100
    assert 0.02 < explored[True] / seen[True] < 0.2, (seen, explored)
    assert 0.35 < explored[False] / seen[False] < 0.65, (seen, explored)
    assert seen[True] > 100 and said < 0.5 * seen[True], (seen, said)


def test_an_analysis_ends_with_what_won_where_that_is_asked_for(games: list[PlayedGame]) -> None:
    trained = [game for game in games if game.family in lessons.TRAIN_LESSONS]
    config = SMOLLM2_MINIHACK.reflection
    plain = chats.ReflectorChats(trained, config, seed=2)
    concluding = chats.ReflectorChats(trained, config, seed=2, concludes=True)
    conclusions = set()
    for _ in range(60):
        (*asked, reply), (*same, longer) = plain.draw(2)["messages"], concluding.draw(2)["messages"]
        assert asked == same
        without, ended = parse_reply(reply["content"]), parse_reply(longer["content"])
        assert not isinstance(without, str) and not isinstance(ended, str)
        assert ended.system_prompt == without.system_prompt
        said = ended.analysis.removeprefix(without.analysis)
        won = dict.fromkeys(re.findall(r"was won with (\w+)\.", without.analysis))
        assert said == f" What won: {' and '.join(won) or 'nothing'}."
        conclusions.add(bool(won))
    assert conclusions == {True, False}


def test_replies_ask_to_go_on_as_often_as_they_are_told(games: list[PlayedGame]) -> None:
    """Here where nothing was won, and never where something was; what is named then is a verb that
    came last, which half of the time lost."""
    trained = [game for game in games if game.family in lessons.TRAIN_LESSONS]
    rows = chats.ReflectorChats(
        trained, SMOLLM2_MINIHACK.reflection, seed=0, concludes=True, explores=(0.0, 1.0)
    )
    outcomes = collections.Counter[tuple[bool, bool]]()
    for _ in range(150):
        parsed = parse_reply(rows.draw(2)["messages"][-1]["content"])
        assert not isinstance(parsed, str)
        ended = dict(re.findall(r"was (won|lost) with (\w+)\.", parsed.analysis))
        assert (lessons.EXPLORE in parsed.system_prompt) == ("won" not in ended)
        if len(ended) == 2 and ended["won"] != ended["lost"]:
            named = _words(parsed.system_prompt.rpartition("When you see ")[2])
            outcomes[ended["won"] in named, ended["lost"] in named] += 1
    assert outcomes.keys() <= {(True, False), (False, True), (False, False)}
    assert min(outcomes[True, False], outcomes[False, True]) > 10


def test_what_mentions_a_heldout_lesson_is_found() -> None:
    def chat(text: str) -> chats.Chat:
        return {"messages": [{"role": "user", "content": text}]}

    for lesson in lessons.HELDOUT_LESSONS.values():
        for held_out in (False, True):
            sentence = lessons.word_lesson(lesson, random.Random(0), held_out=held_out)
            assert lesson.thing in chats.mentions_held_out(chat(sentence))
    assert chats.mentions_held_out(chat("It may need quaff.")) == ["quaff"]
    assert not chats.mentions_held_out(chat("You are ready to swear by the apple."))


def test_renaming_takes_the_article_along() -> None:
    text = "You see an apple 1 north and a dagger here. An apple. The apple is red, pineapples too."
    renamed = chats.rename(text, {"apple": "lens", "dagger": "axe"})
    assert renamed == (
        "You see a lens 1 north and an axe here. A lens. The lens is red, pineapples too."
    )


def test_a_player_aims_what_must_be_aimed() -> None:
    game = MiniHack(text="short").open("freeze_horn")
    try:
        game.reset(MiniHack().games("freeze_horn", "train")[0])
        lesson = Lesson(thing="horn", manner="take", verb="apply")
        actions = []
        for _ in range(10):
            action = play.follow(game.raw(), lesson)
            actions.append(action)
            if game.step(action).outcome is not None:
                break
        assert actions[-2:] == ["pickup horn", "apply horn east"]
    finally:
        game.close()


def test_the_model_that_is_not_fetched_yet_is_named_with_the_command_that_fetches_it(
    monkeypatch, tmp_path, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        train.main(["--preset=smollm2-minihack", f"--run-dir={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert "ictjax models fetch smollm2" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


ADAPTERS = pathlib.Path(__file__).parents[1] / "experiments/smollm/adapters"
SUMS = {  # SHA-256 of the weights of each adapter that ships
    name: value
    for value, name in map(str.split, (ADAPTERS / "SHA256SUMS").read_text().splitlines())
}


def test_all_that_ship_are_named() -> None:
    assert set(SUMS) == {str(p.relative_to(ADAPTERS)) for p in ADAPTERS.rglob("*.safetensors")}
    for config, pair in ((SMOLLM2_MINIHACK, ADAPTERS), (SMOLLM2_ALFWORLD, ADAPTERS / "alfworld")):
        used = {config.actor.adapter, config.reflector.adapter}
        folders = {pathlib.Path(adapter_folder(name, "")).resolve() for name in used}
        assert folders == {pair / "actor", pair / "reflector"}
    # those of `make demo-lm`
    assert {f"trained{seed}/adapter_model.safetensors" for seed in range(3)} <= set(SUMS)


def test_only_actors_know_one_benchmark() -> None:
    """A reflector reads games of either: what it learned on one is measured on the other."""
    said = {path.parent for path in ADAPTERS.rglob("ictjax.json")}
    assert said == {ADAPTERS / "actor", ADAPTERS / "alfworld" / "actor"}


@pytest.mark.parametrize("weights", SUMS)
def test_the_adapters_that_ship_are_of_the_preset_s_shape(weights: str) -> None:
    folder = (ADAPTERS / weights).parent
    assert file_sha256(ADAPTERS / weights) == SUMS[weights]
    assert json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ].startswith("HuggingFaceTB/")
    lora, _ = load_adapter(folder, PUBLISHED[SMOLLM2])
    assert lora == SMOLLM2_MINIHACK.reflector.lora
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000


@pytest.mark.parametrize(
    ("config", "environment", "first", "games"),
    [
        (SMOLLM2_MINIHACK, MiniHack, lessons.LESSONS, 60),
        (SMOLLM2_ALFWORLD, ALFWorld, lessons.HOUSE_LESSONS, 100),
    ],
)
def test_games_that_taught_are_left_out_of_evaluations(config, environment, first, games) -> None:
    settings = config.task.environment
    played = environment(**settings.options | {"renamings": "9"})
    own, heldout = next(iter(first)), settings.heldout_families
    for family in (*first, *settings.train_families, *heldout, f"{heldout[0]}{MARK}8"):
        assert len(taught_games(config, played, family)) == games
    assert taught_games(config, played, f"{own}{MARK}8") == taught_games(config, played, own)


def test_adapters_of_alfworld_were_made_of_those_of_minihack() -> None:
    """Whatever these saw, those saw as well."""
    settings = SMOLLM2_MINIHACK.task.environment
    environment = MiniHack(**settings.options)
    for family in (*lessons.LESSONS, *settings.train_families):
        before = taught_games(SMOLLM2_MINIHACK, environment, family)
        assert taught_games(SMOLLM2_ALFWORLD, environment, family) == before


@pytest.mark.parametrize("benchmark", ["minihack", "alfworld"])
def test_an_actor_is_measured_in_the_words_of_each_family(benchmark: str) -> None:
    played = measure._BENCHMARKS[benchmark]()
    prompts = measure._prompts(played)
    families = played.config.task.environment
    own = [family for family in families.heldout_families if MARK not in family]
    assert own == played.groups()["held out"]
    assert {family.partition(MARK)[0] for family in families.train_families} == {
        family.partition(MARK)[0] for family in played.groups()["renamed"]
    }
    assert sum(map(len, played.groups().values())) == len(played.lessons)
    headers = _words(" ".join(played.headers))  # "You play a text game"
    for family, lesson in played.lessons.items():
        rng = random.Random(family)
        verb = {"puton": "put"}.get(lesson.verb, lesson.verb)
        for kind in ("right", "anew", "reflected"):
            assert {verb, lesson.thing} <= _words(prompts[kind](family, rng)), family
        wrong = played.misleading(family, rng)
        assert wrong.thing == lesson.thing and wrong.verb != lesson.verb
        assert lesson.thing in _words(prompts["wrong"](family, rng))
        if MARK in family:  # under other names no other lesson holds the verb
            for kind in ("wrong", "others"):
                assert verb not in _words(prompts[kind](family, rng)) - headers
        assert prompts["none"](family, rng) == played.config.task.initial_prompt


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--actor", "name a folder with a LoRA adapter in PEFT's format with --actor."),
        ("--reflector", "name a folder with a LoRA adapter in PEFT's format with --reflector."),
        ("--out", "is a folder: name a file."),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_game(tmp_path, capsys, flag, message) -> None:
    actor, _ = save_pair(tmp_path)
    flags = {"--model": str(actor), "--out": str(tmp_path / "found.json"), flag: str(tmp_path)}
    with pytest.raises(SystemExit) as ended:
        measure.main([word for pair in flags.items() for word in pair])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def _context(*endings: tuple[str, bool]) -> Context:
    """Games of two turns that end with these verbs, won or lost."""
    turns = lambda verb: tuple(  # noqa: E731
        Turn(observation="A robe.", actions=(), reply="", thought="", action=action, reward=0.0)
        for action in ("pickup", f"{verb} robe")
    )
    return Context(
        loop=0,
        meta_turn=0,
        family="wear",
        system_prompt="",
        trajectories=tuple(
            Trajectory(
                game=GameId(env="minihack", family="wear", key=str(index)),
                system_prompt="",
                turns=turns(verb),
                outcome=Outcome.SUCCESS if won else Outcome.STEP_LIMIT,
                final_observation="",
                state_hash="",
            )
            for index, (verb, won) in enumerate(endings)
        ),
    )


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("When you see the robe, pick it up and wear it.", "won"),
        ("When you see the robe, pick it up and Zap it.", "lost"),
        ("You do household tasks. When the task is wear, pick it up and zap it.", "lost"),
        ("You do household tasks. When the task is wear, pick it up and wear it.", "won"),
        ("When the task is wear, pick it up and cool it.", "other"),
        ("You play short NetHack games. Try the verbs in turn.", "go on"),
        ("When you see the robe, pick it up and wearing it.", "other"),
        ("", "other"),
    ],
)
def test_what_a_prompt_names(prompt: str, kind: str) -> None:
    assert named.named(_context(("zap", False), ("wear", True)), prompt) == kind


def test_putting_on_is_named_in_words() -> None:
    context = _context(("puton", True), ("zap", False))
    for text in ("pick it up and put it on.", "puton the robe", "Put on the robe."):
        assert named.named(context, text) == "won"
    assert named.named(context, "pick it up and put it down.") == "other"


@pytest.mark.parametrize(
    ("analysis", "right"),
    [
        ("Episode 1 was lost with zap. Episode 2 was won with wear. What matters ...", True),
        ("Episode 1 was won with zap. Episode 2 was won with wear.", False),
        ("Episode 1 was lost with zap.", False),
        ("", False),
    ],
)
def test_what_an_analysis_tells(analysis: str, right: bool) -> None:
    context = _context(("zap", False), ("wear", True))
    assert named.tells_how_it_ended(context, analysis) == right


def test_a_run_s_prompts_are_counted(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contexts = [_context(("zap", False), ("wear", True)), _context(("zap", False), ("eat", False))]
    replies = [
        (0, "pick it up and wear it", 1.0),
        (0, "pick it up and wear it", 0.5),
        (0, "pick it up and zap it", 0.0),
        (0, None, None),
        (1, "Try the verbs in turn.", 0.5),
    ]
    for folder, lines in (
        ("contexts", map(to_json, contexts)),
        (
            "prompts",
            (
                json.dumps(
                    {
                        "iteration": 3,
                        "family": "wear",
                        "context": context,
                        "system_prompt": prompt,
                        "analysis": "Episode 1 was lost with zap. Episode 2 was won with wear.",
                        "reward": reward,
                    }
                )
                for context, prompt, reward in replies
            ),
        ),
    ):
        path = tmp_path / folder / "iteration_00003.jsonl"
        path.parent.mkdir()
        path.write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "metrics.jsonl").touch()
    named.main([f"--run-dir={tmp_path}", "--block=2"])
    won, none = (
        re.findall(r"3-4[^\n]*", table) for table in capsys.readouterr().out.split("none was")
    )
    assert re.findall(r"[\d()]+", won[0]) == (
        ["3", "4", "4", "100", "50", "(75)", "25", "(0)", "0", "25", "(0)"]
    )
    assert re.findall(r"[\d()]+", none[0]) == ["3", "4", "1", "0", "0", "100", "(50)", "0"]
    contexts_file = tmp_path / "contexts" / "iteration_00003.jsonl"
    later = dataclasses.replace(contexts[1], meta_turn=1)
    contexts_file.write_text(f"{to_json(contexts[0])}\n{to_json(later)}\n")
    named.main([f"--run-dir={tmp_path}", "--block=2", "--by-turn"])
    won, none = capsys.readouterr().out.split("none was")
    assert "3-4, first turn" in won and "later" not in won
    assert "3-4, later turns" in none and "first" not in none
    contexts_file.unlink()
    with pytest.raises(SystemExit) as ended:
        named.main([f"--run-dir={tmp_path}"])
    assert ended.value.code == 2
    assert f"{contexts_file} does not hold a context of" in capsys.readouterr().err


def test_a_folder_without_prompts_is_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(SystemExit) as ended:
        named.main([f"--run-dir={tmp_path}"])
    assert ended.value.code == 2
    assert f"{tmp_path} holds no reflections" in capsys.readouterr().err
