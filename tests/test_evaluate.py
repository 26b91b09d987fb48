"""What an evaluation keeps, goes on with and refuses, on a run of fake games."""

import contextlib
import io
import json
import pathlib
import re
import shutil

import pytest

from envs.api import GameId
from experiments import compare, evaluate, export, report_data, report_loops, report_page
from experiments.evaluation_folder import EvaluationFolder
from experiments.evaluation_games import FamilyGames, hashes_of_training
from experiments.run_dir import run_prompt
from experiments.training_cost import NAMES as TRAINING
from ictjax.json_lines import read_records
from ictjax.loops import Arena
from ictjax.records import trajectory_from_json
from tests.chat_server import ChatServer, says
from tests.evaluations import evaluation
from tests.test_cli import refused, train

SCHEMA = "evaluation.schema.json"
SMALL = ("--evaluation.runs", "1", "--evaluation.test-games", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three iterations, of which the last two have checkpoints."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.main(["--preset", "fake-tiny", "--run-dir", str(run_dir)])
    run_dir.with_name("said").write_text(said.getvalue())
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run [1]")


def test_a_training_says_how_it_goes_and_what_is_next(trained, run_dir, capsys):
    *_, first, second, third, end, hint = trained.with_name("said").read_text().splitlines()
    for number, line in enumerate((first, second, third), start=1):
        assert line.startswith(f"iterations {number}/3  reward ")
        assert re.search(r"  dead groups [012]  ", line)
        assert re.search(
            r"  seconds: contexts \d+\.\d, candidates \d+\.\d, rewards \d+\.\d, update \d+\.\d,"
            r" checkpoint \d+\.\d  about ",
            line,
        )
    assert end == f"Trained 3 iterations. Results: {trained / 'metrics.jsonl'}"
    assert hint == f"Next: ictjax evaluate --run-dir {trained}"
    train.main(["--preset", "fake-tiny", "--run-dir", str(run_dir)])
    *_, end, hint = capsys.readouterr().out.splitlines()
    assert f"{run_dir} is finished" in end
    assert hint == f"Next: ictjax evaluate --run-dir '{run_dir}'"
    for step, word in ((2, "evaluate"), (3, "report")):  # of that iteration, or not
        results = evaluation({"door": "heldout"}) | {"protocol": {"checkpoint": step}}
        (run_dir / "evaluation.json").write_text(json.dumps(results))
        train.main(["--preset", "fake-tiny", "--run-dir", str(run_dir)])
        assert capsys.readouterr().out.endswith(f"Next: ictjax {word} --run-dir '{run_dir}'\n")


@pytest.fixture(scope="module")
def evaluated_once(trained, tmp_path_factory):
    run_dir = shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "run")
    evaluate.main(["--run-dir", str(run_dir), *SMALL])
    return run_dir


@pytest.fixture
def evaluated(evaluated_once, tmp_path):
    return shutil.copytree(evaluated_once, tmp_path / "evaluated")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def files(folder):
    """Every file below a folder, by what is in it and when it was written."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def kept(run_dir):
    """The files of the evaluation that the run shows."""
    return run_dir / read(run_dir / "evaluation.json")["folder"]


def family_games(runs=2):
    """One game for everything."""
    game = GameId(env="fake", family="door", key="1")
    return FamilyGames(
        stream=(((game,),),) * runs,
        select=((game,),) * runs,
        test=((game,),) * runs,
        states={game: "ab"},
    )


def part_record(runs=2, won=1):
    """What a part on `family_games` gives, in one meta-turn."""
    return {
        "test": [[[0], [won]]] * runs,
        "select": [[[0], [1]]] * runs,
        "games": {"test": [["ab"]] * runs, "select": [["ab"]] * runs},
        "malformed": 0,
        "actor_failures": {"no_action": 1},
        "failed_episodes": 0,
        "budget": {"actor_episodes": 1},
        "prompts": ['{"a":1}'] * 2 * runs,
    }


def test_every_setting_keeps_its_own(evaluated):
    first = kept(evaluated)
    before = files(first)
    assert {str(path) for path in before} >= {
        "settings.json",
        "games.json",
        "trained_door.json",
        "episodes/trained_door.jsonl",
        "prompts.jsonl",
        "evaluation.json",
    }
    evaluate.main(["--run-dir", str(evaluated), *SMALL, "--evaluation.test-games", "2"])
    second = kept(evaluated)
    assert read(evaluated / "evaluation.json")["protocol"]["test_games"] == 2
    evaluate.main(["--run-dir", str(evaluated), *SMALL, "--step", "2"])
    third = kept(evaluated)
    assert len({first, second, third}) == 3
    assert read(third / "settings.json")["step"] == 2
    assert read(evaluated / "evaluation.json")["protocol"]["checkpoint"] == 2
    assert files(first) == before
    # what is there already is shown again, and nothing is played; not even its checkpoint is read
    shutil.rmtree(evaluated / "checkpoints" / "3")
    evaluate.main(["--run-dir", str(evaluated), *SMALL, "--step", "3", "--num-workers", "1"])
    assert kept(evaluated) == first
    parts = ("games.json", "trained_door.json", "episodes/trained_door.jsonl")
    assert all(files(first)[pathlib.Path(name)] == before[pathlib.Path(name)] for name in parts)


def test_analyses_are_of_what_was_played(evaluated):
    results = read(evaluated / "evaluation.json")
    jsonschema = pytest.importorskip("jsonschema", reason="a development dependency")
    jsonschema.validate(results, read(pathlib.Path(evaluate.__file__).with_name(SCHEMA)))
    found = results["analyses"]
    assert found["arms"].keys() == {"initial", "untrained", "trained"}
    assert {arm["episodes"] for arm in found["arms"].values()} == {len(results["families"])}
    door, bell = found["success"]["door"], found["success"]["bell"]
    assert bell["training"] is None and door["training"]["last_iteration"] == 3
    assert door["arms"]["trained"]["test"] == results["families"]["door"]["arms"]["trained"]["mean"]
    assert found["reward_signal"]["groups"] == 6
    assert "Games won, from training to TEST" in report_page.render(report_data.load_run(evaluated))


def test_what_training_took_is_in_the_budget_of_those_who_ask_its_reflector(evaluated):
    results = read(evaluated / "evaluation.json")
    lines = read_records(evaluated / "metrics.jsonl").values
    assert len(lines) == 3
    written = sum(line["reflector_tokens"] for line in lines)
    for family in results["families"].values():
        trained = family["budget"]["trained"]
        assert trained["training_actor_episodes"] == sum(line["episodes"] for line in lines) > 0
        assert trained["training_reflector_calls"] == sum(line["candidates"] for line in lines)
        # the same, though processes have counted it
        assert trained["training_reflector_tokens"] == written > 0
        assert trained["training_actor_tokens"] > 0
        assert family["budget"]["untrained"].keys() == family["budget"]["initial"].keys()
        assert not any(name.startswith("training") for name in family["budget"]["untrained"])
    assert "training_*" in results["protocol"]["training_budget"]
    page = report_page.render(report_data.load_run(evaluated))
    assert f"<td>{trained['training_actor_episodes']:,}</td>" in page
    # of one iteration less, and of a run that does not know
    evaluate.main(["--run-dir", str(evaluated), *SMALL, "--step", "2"])
    earlier = read(evaluated / "evaluation.json")["families"]["door"]["budget"]["trained"]
    assert earlier["training_actor_episodes"] == sum(line["episodes"] for line in lines[:2])
    (evaluated / "metrics.jsonl").unlink()
    evaluate.main(["--run-dir", str(evaluated), *SMALL])
    results = read(evaluated / "evaluation.json")
    assert results["families"]["door"]["budget"]["trained"].keys().isdisjoint(TRAINING)
    assert "metrics.jsonl does not hold every" in results["protocol"]["training_budget"]


def test_sentences_are_left_out_once_and_kept(evaluated, capsys):
    def without(*flags):
        evaluate.main(["--run-dir", str(evaluated), *SMALL, *flags])
        return read(evaluated / "evaluation.json")["analyses"]["deletions"]

    files_before = files(kept(evaluated) / "episodes")
    assert without() == {}
    found = without("--deletions", "3")
    # one loop a family; its only prompt has one sentence or more
    assert found.keys() == {"door", "bell", "lamp"}
    printed = capsys.readouterr().out
    assert re.search(r"left out, the one worth most: |Nothing could be left out", printed)
    said = re.search(r"(\d+) sentences of 3 last prompts, (\d+) games", printed)
    assert said[1] == said[2] == str(sum(of["games"] for of in found.values()))
    place = kept(evaluated) / "deletions"
    before = files(place)
    assert without() == without("--deletions", "1") == found
    assert files(place) == before and files(kept(evaluated) / "episodes") == files_before
    jsonschema = pytest.importorskip("jsonschema", reason="a development dependency")
    schema = pathlib.Path(evaluate.__file__).with_name(SCHEMA)
    jsonschema.validate(read(evaluated / "evaluation.json"), read(schema))
    page = report_page.render(report_data.load_run(evaluated))
    assert "What single sentences are worth" in page
    (place / "trained_door.json").write_text('{"loops": [{}]}')
    refused(capsys, evaluate.main, ["--run-dir", str(evaluated), *SMALL], "trained_door.json",
            "remove")  # fmt: skip


def test_a_report_shows_the_prompts_and_episodes_of_its_evaluation_only(evaluated):
    evaluate.main(["--run-dir", str(evaluated), *SMALL, "--evaluation.test-games", "2"])
    (evaluation,) = report_data.load_run(evaluated).evaluations
    assert [len(evaluation.episodes["trained", name]) for name in evaluation.families] == [2] * 3
    assert len(evaluation.prompts) == 3 * len(evaluation.families)
    line = next(
        row for row in evaluation.prompts if (row["arm"], row["family"]) == ("trained", "door")
    )
    assert run_prompt(evaluated, "door", "trained") == line["system_prompt"]


@pytest.mark.parametrize("text", ['{"overall": {}}', "{"])
def test_results_of_an_earlier_version_are_kept(evaluated, text):
    (evaluated / "evaluation.json").write_text(text)
    evaluate.main(["--run-dir", str(evaluated), *SMALL])
    assert "folder" in read(evaluated / "evaluation.json")
    assert (evaluated / "evaluation" / "older.json").read_text() == text


def test_what_was_stopped_goes_on_with_the_games_that_were_drawn(evaluated):
    """Though training has played these games meanwhile."""
    folder = kept(evaluated)
    part, episodes = folder / "trained_door.json", folder / "episodes" / "trained_door.jsonl"
    before, played = read(part), episodes.read_bytes()
    part.unlink()
    (evaluated / "episodes" / "iteration_00004.jsonl").write_bytes(played)
    hashes = {trajectory_from_json(line).state_hash for line in played.decode().splitlines()}
    assert hashes <= hashes_of_training(evaluated, 3)
    evaluate.main(["--run-dir", str(evaluated), *SMALL])
    assert (read(part), episodes.read_bytes()) == (before, played)


def test_a_family_may_have_any_name(tmp_path):
    folder = EvaluationFolder(tmp_path, "evaluation", {"step": 1})
    games, record = family_games(), part_record()
    folder.keep_games({})
    for family in ("a/b", "..", "[red]*?", "π d"):
        folder.keep_part("trained", family, games, record, [])
        assert folder.part("trained", family, games)["test"] == record["test"]
    assert {path.parent for path in tmp_path.rglob("*.json*")} == {
        tmp_path / folder.name,
        tmp_path / folder.name / "contexts",
        tmp_path / folder.name / "episodes",
    }


def test_what_the_environment_failed_stays_to_be_played(tmp_path):
    folder = EvaluationFolder(tmp_path, "evaluation", {"step": 1})
    games, record = family_games(), part_record(won=None)
    folder.keep_part("trained", "door", games, record, [])
    assert folder.part("trained", "door", games) is None


# What is refused changes nothing.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--step", "9"), ("no checkpoint of iteration 9", "--step can be 2, 3")),
        (("--step=-1",), ("--step must be",)),
        (("--num-workers", "0"), ("--num-workers must be",)),
        (("--mesh", "v5p-8"), ("does not use all 8 devices", "--mesh NAME")),
        (("--reflector.mesh.data", "2"), ("--reflector.mesh", "--mesh NAME")),
        (("--mesh", "v9"), ("Unknown mesh 'v9'",)),
        (("--actor.model", "nowhere/at/all"), ("nowhere/at/all",)),
        (("--evaluation.runs", "0"), ("evaluation.runs",)),
    ],
    ids=" ".join,
)
def test_a_refused_evaluation_changes_nothing(run_dir, capsys, flags, words):
    before = files(run_dir)
    refused(capsys, evaluate.main, ["--run-dir", str(run_dir), *SMALL, *flags], *words)
    assert files(run_dir) == before


def test_an_export_is_of_any_step(run_dir, capsys, tmp_path):
    out = tmp_path / "out"
    argv = ["--run-dir", str(run_dir), "--out", str(out)]
    refused(capsys, export.main, [*argv, "--step", "1"], "--step can be 2, 3")
    assert not out.exists()
    export.main([*argv, "--step", "2"])
    assert "iteration 2" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"success": 1}', "[" * 100_000])
@pytest.mark.parametrize("name", ["trained_door.json", "games.json"])
def test_a_damaged_part_is_named(evaluated, capsys, name, text):
    path = kept(evaluated) / name
    path.write_text(text)
    (kept(evaluated) / "initial_bell.json").unlink()
    before = files(evaluated)
    refused(capsys, evaluate.main, ["--run-dir", str(evaluated), *SMALL], str(path))
    assert files(evaluated) == before


@pytest.mark.parametrize("folder", ["episodes", "contexts"])
@pytest.mark.parametrize("text", [None, "", "[]\n", '{"game": 1}\n', "\x00\n"])
def test_games_that_training_has_seen_must_be_known(run_dir, capsys, folder, text):
    path = run_dir / folder / "iteration_00002.jsonl"
    path.unlink()
    if text is not None:
        path.write_text(text)
    before = files(run_dir)
    refused(capsys, evaluate.main, ["--run-dir", str(run_dir), *SMALL], str(path))
    assert files(run_dir) == before


def test_a_cut_file_of_episodes_is_noticed(run_dir):
    path = run_dir / "episodes" / "iteration_00002.jsonl"
    path.write_text(path.read_text().partition("\n")[0] + "\n")
    with pytest.raises(ValueError, match="were played: restore it"):
        hashes_of_training(run_dir, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"games_sha256": "of before"}, "the games of 'fake'"), ({"models": {"actor": "0"}}, "actor")],
)
def test_what_changed_since_training_is_refused_or_said(run_dir, capsys, change, words):
    path = run_dir / "manifest.json"
    path.write_text(json.dumps({**read(path), **change}))
    argv = ["--run-dir", str(run_dir), *SMALL]
    refused(capsys, evaluate.main, argv, "Changed since", words, "--accept-changes")
    assert not (run_dir / "evaluation").exists()
    evaluate.main([*argv, "--accept-changes"])
    (said,) = read(run_dir / "evaluation.json")["changes"]
    assert words in said


def test_a_run_from_elsewhere_is_evaluated_on_the_devices_that_are_here(run_dir, capsys):
    path = run_dir / "config.json"
    config = read(path)
    for role in ("actor", "reflector"):
        config[role]["mesh"] = {"data": 1, "fsdp": 1, "tensor": 64}
        config[role]["model"] = f"/elsewhere/{role}"
    path.write_text(json.dumps(config))
    argv = ["--run-dir", str(run_dir), *SMALL]
    for role in ("actor", "reflector"):
        argv += [f"--{role}.model", f"experiments/pocket/checkpoints/fake/{role}"]
    refused(capsys, evaluate.main, argv, "tensor=64", "--actor.mesh.*, or --mesh NAME")
    evaluate.main([*argv, "--mesh", "h200"])
    assert read(run_dir / "evaluation.json")["changes"] == []


def test_a_run_of_kernels_that_are_not_here_is_evaluated_without_them(run_dir, capsys):
    path = run_dir / "config.json"
    config = read(path)
    for name in ("actor_sampler", "reflector_sampler"):
        config[name] |= {"page_size": 40, "attention": "pallas_tpu"}
    path.write_text(json.dumps(config))
    argv = ["--run-dir", str(run_dir), *SMALL]
    refused(capsys, evaluate.main, argv, "'pallas_tpu', and it runs on cpu", "(--actor-sampler.att")
    argv += ["--actor-sampler.attention", "auto"]
    refused(capsys, evaluate.main, argv, "take auto or pages (--reflector-sampler.attention)")
    assert not (run_dir / "evaluation").exists()  # no games were drawn for it
    evaluate.main([*argv, "--reflector-sampler.attention", "auto"])
    assert ": 9 of 9 parts to play" in capsys.readouterr().out
    evaluate.main([*argv, "--reflector-sampler.attention", "pages"])
    assert ": 0 of 9 parts to play" in capsys.readouterr().out  # the same evaluation


def test_a_cache_of_slots_has_one_attention(run_dir, capsys):
    argv = ["--run-dir", str(run_dir), "--reflector-sampler.attention", "pages"]
    refused(capsys, evaluate.main, argv, "--reflector-sampler.attention pages", "leave it out")


def test_a_run_that_is_not_finished_is_evaluated_and_called_that(run_dir, capsys):
    config = read(run_dir / "config.json")
    (run_dir / "config.json").write_text(json.dumps({**config, "iterations": 5}))
    argv = ["--run-dir", str(run_dir), *SMALL, "--evaluation.families", "door"]
    evaluate.main(argv)
    said = capsys.readouterr().out
    assert "Evaluating iteration 3 of 5: 3 of 3 parts to play, kept in " in said
    assert said.endswith(f"\nNext: ictjax report --run-dir '{run_dir}'\n")
    assert read(run_dir / "evaluation.json")["protocol"]["checkpoint"] == 3
    (run_dir / "config.json").write_text(json.dumps(config))
    evaluate.main(argv)
    assert "Evaluating iteration 3: 0 of 3 parts" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_greedy_reflector_always_replies_the_same(run_dir, monkeypatch, temperature):
    """Here and at an endpoint; one that samples does not."""
    replies, real = [], Arena.ask

    def ask(self, asked, keys, phase):
        found = real(self, asked, keys, phase)
        replies.extend([candidate.reply for candidate in group] for group in found)
        return found

    monkeypatch.setattr(Arena, "ask", ask)
    script = [says("ANALYSIS: it is closed.\nIMPROVED PROMPT: OPEN")]
    with ChatServer(lambda number, request: script[0]) as server:
        evaluate.main(
            ["--run-dir", str(run_dir), *SMALL, "--trust", "--evaluation.families", "door", "lamp",
             "--evaluation.arms", "best-of-n", "untrained@endpoint",
             "--evaluation.candidates", "8", "--evaluation.endpoint.url", server.url,
             "--evaluation.temperature", str(temperature)]
        )  # fmt: skip
    assert {request["temperature"] for request in server.requests} == {temperature}
    groups = [group for group in replies if len(group) == 8]
    assert len(groups) == 2
    assert all(len(set(group)) == 1 for group in groups) == (temperature == 0)


def test_an_evaluation_says_which_one_it_takes_the_place_of(run_dir, capsys):
    argv = ["--run-dir", str(run_dir), *SMALL, "--evaluation.families", "door"]
    evaluate.main(argv)
    evaluate.main(argv)
    assert "take the place" not in capsys.readouterr().out
    first = read(run_dir / "evaluation.json")
    evaluate.main([*argv, "--step", "2", "--evaluation.arms", "untrained", "trained", "best-of-n"])
    said = capsys.readouterr().out
    arms = "untrained trained best-of-n"
    before = "--step 3, --evaluation.arms initial untrained trained"
    assert f"They take the place of an evaluation with {before}. What it played is kept" in said
    evaluate.main(argv)
    said = capsys.readouterr().out
    assert "0 of 3 parts to play" in said
    assert f"evaluation with --step 2, --evaluation.arms {arms}." in said
    assert read(run_dir / "evaluation.json") == first


# Several trained seeds.


def played(said):
    """How many parts were to be played, of how many, by what an evaluation printed."""
    found = re.search(r": (\d+) of (\d+) parts to play", said)
    return int(found[1]), int(found[2])


@pytest.fixture(scope="module")
def seeds(trained, tmp_path_factory):
    """Three runs: that of seed 0, and copies of it that say they have other seeds."""
    folder = tmp_path_factory.mktemp("seeds")
    runs = [shutil.copytree(trained, folder / f"seed{seed}") for seed in range(3)]
    for seed, run in enumerate(runs):
        config = read(run / "config.json")
        (run / "config.json").write_text(json.dumps({**config, "seed": seed}))
    return runs


def test_seeds_are_one_experiment_and_one_more_plays_its_own_part_only(seeds, capsys, monkeypatch):
    first, second, _ = map(str, seeds)
    evaluate.main(["--run-dir", first, *SMALL])
    assert played(capsys.readouterr().out) == (9, 9)
    before = files(kept(seeds[0]))
    evaluate.main(["--run-dir", first, second, *SMALL])
    said = capsys.readouterr().out
    assert played(said) == (3, 12)  # the trained arm of the second
    both = seeds[0].parent / "seed0+seed1"
    assert said.endswith(f"\nNext: ictjax report --run-dir {both}\n")
    monkeypatch.chdir(both.parent)
    evaluate.main(["--run-dir", "seed0", "seed1", *SMALL])
    assert capsys.readouterr().out.endswith("\nNext: ictjax report --run-dir seed0+seed1\n")
    results = read(both / "evaluation.json")
    assert results["protocol"]["run_dirs"] == ["seed0", "seed1"]
    shown_again = compare.compare((both,)).table
    assert list(shown_again.columns[1].cells) == ["of 2"] * len(results["overall"])
    assert list(shown_again.columns[2].cells) == ["fake"] * len(results["overall"])
    assert results["overall"]["heldout"]["arms"].keys() == {"initial", "untrained", "trained"}
    now = files(kept(seeds[0]))
    assert all(now[path] == before[path] for path in before)
    assert not (seeds[1] / "evaluation.json").exists()
    (of_second,) = (seeds[1] / "evaluation").iterdir()
    assert {path.name for path in of_second.glob("*_*.json")} == {
        "trained_bell.json", "trained_door.json", "trained_lamp.json",
    }  # fmt: skip
    # the same games for all, and the episodes of both in one file for the report
    assert read(of_second / "games.json") == read(kept(seeds[0]) / "games.json")
    rows = (kept(both) / "episodes" / "trained_door.jsonl").read_text().splitlines()
    assert len(rows) == 2
    assert read(kept(both) / "games.json") == read(kept(seeds[0]) / "games.json")
    shown = report_data.load_run(both)
    (evaluation,) = shown.evaluations
    # what the reflectors of both read, each with its loop
    assert [row["loop"] for row in evaluation.contexts["trained", "door"]] == [0, 0]
    loops = [loop for loop in report_loops.loops(evaluation) if loop.arm == "trained"]
    assert {(loop.family, loop.seed, len(loop.contexts)) for loop in loops} == {
        (family, seed, 1) for family in evaluation.families for seed in (0, 1)
    }
    page = report_page.render(shown)
    assert "run seed0, seed 0" in page and "Cost and speed by trained run" in page
    assert (
        "trained (run seed1, seed 1)" in page
        and "the STREAM games that reflectors read about" in page
    )
    assert re.search(r"; 0 of them among the \d+ that training has played", page)
    signal = results["analyses"]["reward_signal"]
    assert signal["groups"] == 2 * 6 >= signal["dead_groups"]
    assert 0 < sum(signal["histogram"]["counts"]) <= signal["candidates"]
    # another order, another first: what is there is found and not played again
    evaluate.main(["--run-dir", second, first, *SMALL, "--out", str(seeds[0].parent / "out")])
    assert played(capsys.readouterr().out) == (0, 12)
    assert (seeds[0].parent / "out" / "evaluation.json").is_file()


def test_runs_that_draw_by_themselves_have_the_untrained_reflector_beside_each(
    seeds, tmp_path, capsys, monkeypatch
):
    unplayed = shutil.ignore_patterns("evaluation*")  # other tests evaluate them
    runs = [shutil.copytree(run, tmp_path / run.name, ignore=unplayed) for run in seeds]
    both, flags = tmp_path / "both", [*SMALL, "--evaluation.families", "door", "lamp"]
    asked, contexts_read, real = [], [], Arena.ask

    def ask(self, contexts, keys, phase):
        asked.extend(key for of_context in keys for key in of_context)
        contexts_read.extend(contexts)
        return real(self, contexts, keys, phase)

    monkeypatch.setattr(Arena, "ask", ask)

    def evaluate_runs(*named, own=True):
        asked.clear()
        contexts_read.clear()
        draws = ["--evaluation.draws", "own"] if own else []
        evaluate.main(["--run-dir", *map(str, named), *flags, *draws, "--out", str(both)])
        return played(capsys.readouterr().out)

    assert evaluate_runs(*runs[:2], own=False) == (8, 8)
    assert len(asked) == 6 and len(set(asked)) == 2  # all arms of a family by one key
    shared = read(both / "evaluation.json")
    assert evaluate_runs(*runs[:2]) == (8, 10)  # what nobody wrote is there
    assert len(asked) == 8 and len(set(asked)) == 4  # by two in each family, one of each run
    assert len(contexts_read) == 6  # the untrained one reads what both runs ask about once
    results = read(both / "evaluation.json")
    assert results["protocol"]["draws"] == "own" != shared["protocol"]["draws"]
    for arm in ("untrained", "trained"):
        numbers = results["families"]["door"]
        assert numbers["arms"][arm]["sd_seeds"] is not None
        assert numbers["budget"][arm]["reflector_calls"] == 2
    assert results["families"]["door"]["arms"]["initial"]["sd_seeds"] is None
    assert results["families"]["door"]["tests"]["trained_vs_untrained"]["num_units"] == 2
    (evaluation,) = report_data.load_run(both).evaluations
    shown = report_loops.shown_loops(report_loops.loops(evaluation))
    for of_family in shown.values():
        assert all(one.beside.seed == one.loop.seed for one in of_family)
    assert report_page.render(report_data.load_run(both))
    # a third run plays its own; alone, a run lacks the initial prompt, which the first one keeps
    assert evaluate_runs(*runs) == (4, 14)
    assert evaluate_runs(runs[1]) == (2, 6)


def test_sentences_of_all_seeds_are_left_out_and_each_run_keeps_its_own(seeds, tmp_path):
    runs = [shutil.copytree(run, tmp_path / run.name) for run in seeds]
    both = tmp_path / "both"
    flags = [*SMALL, "--evaluation.families", "door"]

    def found(place):
        return read(place / "evaluation.json")["analyses"]["deletions"]["door"]

    evaluate.main(["--run-dir", *map(str, runs), *flags, "--out", str(both)])
    # these reflectors are the same and write one word: as if they had written more
    for run, word in zip(runs, ("WALK", "LOOK", "WALK"), strict=True):
        (part,) = run.glob("evaluation/*/trained_door.json")
        record = read(part)
        last = json.loads(record["prompts"][-1]) | {"system_prompt": f"OPEN\n{word}"}
        record["prompts"][-1] = json.dumps(last)
        part.write_text(json.dumps(record))
    flags += ["--deletions", "1"]
    evaluate.main(["--run-dir", *map(str, runs[:2]), *flags, "--out", str(both)])
    of_both = found(both)
    assert (of_both["prompts"], of_both["seeds"], of_both["games"]) == (2, 2, 4)
    assert {row["text"]: (row["prompts"], row["seeds"]) for row in of_both["sentences"]} == {
        "OPEN": (2, 2),
        "WALK": (1, 1),
        "LOOK": (1, 1),
    }
    places = [
        path for run in runs[:2] for path in run.glob("evaluation/*/deletions/trained_door.json")
    ]
    texts = [[s["text"] for loop in read(place)["loops"] for s in loop["sentences"]]
             for place in places]  # fmt: skip
    assert texts == [["OPEN", "WALK"], ["OPEN", "LOOK"]]
    assert not list(both.rglob("deletions"))
    before = [files(place.parent) for place in places]
    # a third seed plays its own alone, and one alone shows what it has
    evaluate.main(["--run-dir", *map(str, runs), *flags, "--out", str(both)])
    assert (found(both)["seeds"], found(both)["games"]) == (3, 6)
    assert [files(place.parent) for place in places] == before
    evaluate.main(["--run-dir", str(runs[1]), *flags[:-2]])
    alone = found(runs[1])
    assert (alone["seeds"], alone["games"]) == (1, 2)
    assert {row["text"] for row in alone["sentences"]} == {"OPEN", "LOOK"}


def test_arms_are_chosen_and_what_is_there_is_shown_with_them(evaluated, capsys):
    evaluate.main(["--run-dir", str(evaluated), *SMALL, "--evaluation.arms", "expert", "trained",
                   "--evaluation.expert-prompt", "OPEN", "--evaluation.families", "door"])  # fmt: skip
    assert played(capsys.readouterr().out) == (1, 3)  # initial is always there
    results = read(evaluated / "evaluation.json")
    assert results["families"].keys() == {"door"}
    evaluate.main(["--run-dir", str(evaluated), *SMALL, "--step", "2"])
    assert played(capsys.readouterr().out) == (3, 9)  # of another step: the trained arm alone


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iterations": 4}, ("differs from", "in iterations (4, not 3)", "one by one")),
        ({"seed": 0}, ("have the same seed, 0", "name each trained seed once")),
        (None, ("no checkpoint of iteration 3", "finish its training, or give --step (2 ")),
    ],
)
def test_runs_that_are_no_experiment_are_refused(seeds, tmp_path, capsys, change, words):
    other = shutil.copytree(seeds[1], tmp_path / "other")
    if change is None:
        shutil.rmtree(other / "checkpoints" / "3")
    else:
        config = read(other / "config.json")
        (other / "config.json").write_text(json.dumps({**config, **change}))
    before = files(seeds[0])
    refused(capsys, evaluate.main, ["--run-dir", str(seeds[0]), str(other), *SMALL], *words)
    assert files(seeds[0]) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--evaluation.arms", "untraind"), ("Unknown arm 'untraind'", "'untrained'")),
        (("--evaluation.arms", "expert"), ("fake has no expert prompt", "--evaluation.expert-pro")),
        (("--evaluation.families", "dor"), ("'dor'", "'door'")),
        (
            ("--evaluation.arms", "flipped", "other-family", "--evaluation.families", "door"),
            ("'other-family' reads about another family", "only 'door'"),
        ),
        (
            ("--evaluation.arms", "flipped@endpoint", "--evaluation.endpoint.url", "http://a/v1"),
            ("--trust",),
        ),
        (("--evaluation.arms", "untrained", "--deletions", "1"), ("--deletions 1 needs prompts",)),
    ],
    ids=" ".join,
)
def test_an_arm_that_cannot_be_played_changes_nothing(run_dir, capsys, flags, words):
    before = files(run_dir)
    refused(capsys, evaluate.main, ["--run-dir", str(run_dir), *SMALL, *flags], *words)
    assert files(run_dir) == before


def test_games_that_all_fail_are_said_when_all_families_were_tried(run_dir, capsys):
    """And nothing begins on them."""
    config = read(run_dir / "config.json")
    environment = {**config["task"]["environment"], "options": {"raise_on": "walk"}}
    (run_dir / "config.json").write_text(
        json.dumps({**config, "task": {**config["task"], "environment": environment}})
    )
    argv = ["--run-dir", str(run_dir), *SMALL, "--accept-changes"]
    refused(capsys, evaluate.main, argv, "failed every test game of family", "arm initial")
    (folder,) = (run_dir / "evaluation").iterdir()
    episodes = {path.name for path in (folder / "episodes").iterdir()}
    assert episodes == {f"initial_{family}.jsonl" for family in ("door", "lamp", "bell")}
    assert [path.name for path in folder.glob("*_*.json")] == []


def test_an_endpoint_writes_the_prompts_of_an_arm(run_dir, capsys):
    def script(number, request):
        return says("ANALYSIS: it is closed.\nIMPROVED PROMPT: OPEN")

    with ChatServer(script) as server:
        evaluate.main(
            ["--run-dir", str(run_dir), *SMALL, "--trust", "--evaluation.families", "door", "lamp",
             "--evaluation.arms", "initial", "untrained@endpoint", "flipped@endpoint",
             "--evaluation.endpoint.url", server.url]
        )  # fmt: skip
    assert played(capsys.readouterr().out) == (6, 6)
    part = read(kept(run_dir) / "untrained@endpoint_door.json")
    assert part["budget"]["reflector_calls"] == 1
    assert json.loads(part["prompts"][-1])["system_prompt"] == "OPEN"
    assert len(server.requests) == 4
    assert {request["model"] for request in server.requests} == {"only"}


def test_a_reflector_is_taught_the_best_candidates_of_its_run(evaluated, capsys, monkeypatch):
    """Once, and of families that were to be trained on alone."""
    flags = (*SMALL, "--evaluation.arms", "trained", "sft-best", "--evaluation.sft.epochs", "1")
    flags += ("--evaluation.families", "bell")
    for path in (evaluated / "contexts").glob("iteration_*.jsonl"):  # as if one were held out
        rows = read_records(path).values
        rows[0]["family"] = "bell"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(["--run-dir", str(evaluated), *flags])
    said = capsys.readouterr().out
    assert "steps of 4 x " in said and "ictjax generate" not in said
    taught = kept(evaluated) / "sft-best"
    chats = [row["messages"] for row in read_records(taught / "chats.jsonl").values]
    rows = [
        row
        for path in sorted((evaluated / "prompts").glob("iteration_*.jsonl"))
        for row in read_records(path).values
    ]
    best = [
        max((row for row in rows if (row["iteration"], row["context"]) == (number, 1)),
            key=lambda row: row["reward"])
        for number in (1, 2, 3)
    ]  # fmt: skip
    assert [chat[-1]["content"] for chat in chats] == [row["reply"] for row in best]
    record = read(kept(evaluated) / "sft-best_bell.json")
    steps = read(taught / "sft.json")["steps"]
    assert record["budget"]["training_steps"] == steps > 0
    assert record["budget"]["training_tokens"] == read(taught / "sft.json")["targets"] > 0
    budget = read(evaluated / "evaluation.json")["families"]["bell"]["budget"]
    episodes = [row["episodes"] for row in read_records(evaluated / "metrics.jsonl").values]
    assert budget["sft-best"]["training_actor_episodes"] == sum(episodes)
    assert budget["sft-best"]["training_steps"] == steps
    assert budget["trained"].keys() == budget["initial"].keys() | set(TRAINING)
    assert (
        "trained_vs_sft-best" in read(evaluated / "evaluation.json")["overall"]["heldout"]["tests"]
    )
    # without its part the weights are read again, and it plays the same
    (kept(evaluated) / "sft-best_bell.json").unlink()
    evaluate.main(["--run-dir", str(evaluated), *flags])
    assert "is finished" in capsys.readouterr().out
    assert read(kept(evaluated) / "sft-best_bell.json") == record
    # what is complete asks for no training
    shutil.rmtree(taught)
    evaluate.main(["--run-dir", str(evaluated), *flags])
    assert not taught.exists()
    # on other devices it is taught by as many steps of as many rows
    flags = [*flags, "door"]
    evaluate.main(["--run-dir", str(evaluated), *flags, "--reflector.mesh.fsdp", "8"])
    assert f"{steps} steps of 4 x " in capsys.readouterr().out
    # and read on these, the path being written otherwise
    part = kept(evaluated) / "sft-best_door.json"
    part.unlink()
    monkeypatch.chdir(evaluated.parent)
    evaluate.main(["--run-dir", evaluated.name, *flags])
    said = capsys.readouterr().out
    assert played(said) == (1, 6) and f"sft-best is finished: {steps} steps" in said
    # an older version rounded the rows of a step up to the devices, and kept their numbers
    part.unlink()
    record = read(taught / "sft.json")
    assert record["settings"]["rows"] == 4
    older = record["settings"] | {"rows": 8, "data_parallel": 1, "fsdp": 8, "tensor": 1}
    (taught / "sft.json").write_text(json.dumps(record | {"settings": older}))
    evaluate.main(["--run-dir", str(evaluated), *flags])
    assert f"sft-best is finished: {steps} steps" in capsys.readouterr().out
    part.unlink()
    (taught / "sft.json").write_text(json.dumps(record | {"sha256": {}}))
    words = "another value of the model", "to play this evaluation again"
    refused(capsys, evaluate.main, ["--run-dir", str(evaluated), *flags], *words)


def test_a_run_dir_that_would_be_dropped_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--run-dir", "a", "--run-dir=b", "--out", "c"])
    assert stopped.value.code == 2
    assert (
        "--run-dir is given 2 times, of which only the last would count" in capsys.readouterr().err
    )
