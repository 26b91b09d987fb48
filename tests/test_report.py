"""The report of a made-up run directory, whole and with pieces missing."""

import functools
import html
import io
import json
import re
import shutil
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from envs.api import GameId, Outcome
from experiments import (
    behaviour,
    bundle,
    pocket_models,
    report,
    report_data,
    report_episodes,
    report_figures,
    report_loops,
    report_page,
    wording,
)
from experiments import results as result_command
from experiments.arms import ARMS, check_arms
from experiments.report_games import disjointness
from experiments.result_table import result_tables
from experiments.visible import visible
from experiments.word_diff import word_diff
from ictjax.models.hf import content_hash
from ictjax.records import Context, ParseFailure, Trajectory, Turn, to_json
from tests.evaluations import FOLDER, RATES, evaluation
from tests.test_cli import refused

FAMILIES = {
    "eat": "train",
    "wield": "train",
    "locked_door": "train",
    "zap": "train",
    "wear": "heldout",
    "puton": "heldout",
}
LESSONS = {
    "initial": "",
    "untrained": "Search the walls.",
    "trained": "Pick up the dagger & wield it. Do not <wait>.",
}


def _trajectory(family: str, key: int, prompt: str, *, won: bool) -> Trajectory:
    reply = "Thought: the thing is two steps east.\nAction: go east"
    turns = tuple(
        Turn(
            observation=(
                f"You see here an apple.\n  here: @ you\n  east 2: ( {family}\n|..@.(..|\n|.......|"
            ),
            actions=(),
            reply=reply,
            thought="the thing is two steps east.",
            action="go east" if n % 3 else "",
            reward=0.0,
            failure=None if n % 3 else ParseFailure.NO_ACTION,
        )
        for n in range(2 if won else 5)
    )
    return Trajectory(
        game=GameId(env="minihack", family=family, key=str(key)),
        system_prompt=prompt,
        turns=turns,
        outcome=Outcome.SUCCESS if won else Outcome.STEP_LIMIT,
        final_observation="You won." if won else "Time is up.",
        state_hash=f"{key:x}",
    )


def _context(family: str, run: int, turn: int, prompt: str) -> Context:
    system = prompt if turn else "You play NetHack."
    return Context(
        loop=run,
        meta_turn=turn,
        family=family,
        system_prompt=system,
        trajectories=tuple(
            _trajectory(family, 100 * run + 10 * turn + n, system, won=False) for n in range(2)
        ),
    )


def _turns(family: str, arm: str, prompt: str) -> list[dict]:
    """Lines of turns.jsonl: three loops, of which the second loses by its last prompt."""
    success = {0: (0.2, 0.4, 0.6), 1: (0.4, 0.4, 0.2), 2: (0.0, 1.0, 1.0)}
    written = ("You play NetHack.", f"{prompt} Take care.", prompt)
    return [
        {"arm": arm, "family": family, "run": run, "turn": turn, "success": won}
        | {"select_success": won / 2, "system_prompt": written[turn], "failure": None}
        | ({"analysis": "The door was locked."} if turn else {})
        for run, of_run in success.items()
        for turn, won in enumerate(of_run)
    ]


@functools.cache
def _results() -> str:
    return json.dumps(evaluation(FAMILIES, runs=10))


def make_run(folder: Path, *, evaluated: bool = True, iterations: int = 30) -> Path:
    """A run directory as training and evaluation write it."""
    generator = np.random.default_rng(0)
    for name in ("episodes", "prompts", "contexts"):
        (folder / name).mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "actor": "experiments/pocket/checkpoints/actor",
                "iterations": 30,
                "seed": 0,
                "meta": {"contexts_per_iteration": 8},
            }
        )
    )
    (folder / "manifest.json").write_text(
        json.dumps(
            {
                "git_revision": "0123abc",
                "packages": {"jax": "0.10.2", "flax": "0.12.8"},
                "devices": ["cpu:0"],
                "argv": ["__main__.py", "train", "--run-dir", "runs/a b"],
            }
        )
    )
    with (folder / "metrics.jsonl").open("w") as file:
        for n in range(1, iterations + 1):
            rise = 1 - np.exp(-n / 10)
            record = {
                "iteration": n,
                "reward_replay": 0.3 + 0.5 * rise + generator.normal(0, 0.04),
                "reward_fresh": 0.28 + 0.45 * rise + generator.normal(0, 0.05) if n != 7 else None,
                "dead_groups": int(generator.integers(3)),
                "kl": 0.05 * rise + generator.random() * 0.004,
                "entropy": 1.3 - 0.7 * rise + generator.random() * 0.05,
                "clip_fraction": generator.random() * 0.02,
                "malformed_candidates": int(generator.integers(2)),
                "grad_norm": 0.4 + generator.random(),
                "episodes": 300,
                "failed_episodes": 0,
                "time": {
                    "contexts_s": 3.0,
                    "candidates_s": 4.2,
                    "rewards_s": 21.0,
                    "update_s": 6.0,
                    "worker_crashes": 1 if n > 4 else 0,
                },
            }
            file.write(json.dumps(record) + "\n")
            candidates = [
                {"iteration": n, "family": family, "reward": rise, "failure": None}
                | {"replay_reward": rise, "fresh_reward": g / 2}
                for family in ("eat", "zap")
                for g in range(3)
            ]
            (folder / "prompts" / f"iteration_{n:05d}.jsonl").write_text(
                "".join(json.dumps(candidate) + "\n" for candidate in candidates)
            )
    if not evaluated:
        return folder
    results = json.loads(_results())
    for family in results["families"].values():
        family["malformed_replies"] = family["failed_episodes"] = {"trained": 1}
    prompts, turns = [], []
    for kind in ("episodes", "contexts"):
        (folder / FOLDER / kind).mkdir(parents=True)
    for family in FAMILIES:
        for arm, rate in RATES.items():
            prompt = "You play NetHack." + (" " + LESSONS[arm] if LESSONS[arm] else "")
            if arm != "initial":
                line = {"arm": arm, "family": family, "run": 0, "system_prompt": prompt}
                prompts.append({**line, "success": rate})
                turns += _turns(family, arm, prompt)
                (folder / FOLDER / "contexts" / f"{arm}_{family}.jsonl").write_text(
                    "".join(
                        to_json(_context(family, run, turn, prompt)) + "\n"
                        for run in range(3)
                        for turn in range(2)
                    )
                )
            (folder / FOLDER / "episodes" / f"{arm}_{family}.jsonl").write_text(
                "".join(
                    to_json(_trajectory(family, key, prompt, won=arm == "trained" and key != 1))
                    + "\n"
                    for key in range(3)
                )
            )
    (folder / "evaluation.json").write_text(json.dumps(results))
    for name, rows in (("prompts", prompts), ("turns", turns)):
        (folder / FOLDER / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return folder


def _written(folder: Path) -> Path:
    return report.write_report(report_data.load_run(folder))


class _Checker(HTMLParser):
    """Collects tags that stay open and every address a browser would fetch."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input", "wbr"})

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text, self.scripts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append(dict(attrs).get("type", ""))
        self.fetched += [
            value
            for name, value in attrs
            if name in ("src", "srcset", "data") or (name == "href" and tag in ("link", "image"))
        ]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)


def _check(page: str) -> str:
    """The visible text of a well-formed page that fetches nothing."""
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert "@import" not in page
    assert not re.search(r"url\(\s*['\"]?(?!#)", page)
    assert checker.scripts in ([""], ["application/json", ""])
    assert "default-src 'none'" in page
    return " ".join(checker.text)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return _written(make_run(tmp_path_factory.mktemp("runs") / "demo")).read_text(encoding="utf-8")


def test_page_is_self_contained_and_well_formed(page):
    text = _check(page)
    for expected in (
        "eat",
        "held out",
        "groups without signal (of 8)",
        "verdict",
        "The door was locked.",
        "0123abc",
        "0.10.2",
        "worker crashes",
    ):
        assert expected in text


def test_headline_is_the_claim_on_held_out_families(page, whole):
    text = _check(page)
    results = json.loads((whole / "evaluation.json").read_text())
    headline = results["headline"]
    assert headline["split"] == "heldout"
    assert f"<h1>{html.escape(headline['text'])}</h1>" in page
    test = results["overall"]["heldout"]["tests"]["trained_vs_untrained"]
    assert test["verdict"] in text and test["reason"] in text
    assert text.index("Held-out families") < text.index("Training families")
    assert "never evidence about language models" in text


def test_only_verdicts_of_the_file_are_shown(whole, tmp_path):
    """Whatever the interval and p beside it."""
    run = shutil.copytree(whole, tmp_path / "run")
    results = json.loads((run / "evaluation.json").read_text())
    for numbers in (*results["families"].values(), *results["overall"].values()):
        for test in numbers["tests"].values():
            test |= {"verdict": "not shown", "ci95": [0.3, 0.5], "p": 0.001, "p_corrected": 0.001}
    (run / "evaluation.json").write_text(json.dumps(results))
    results = _written(run).read_text(encoding="utf-8").partition('<section id="meta-turns"')[0]
    assert results.count('class="badge good"') == 1  # the headline's own
    assert "not shown" in results


def test_prompts_of_models_cannot_break_the_page(page):
    assert "not &lt;wait&gt;." in page
    assert "<wait>" not in page


def _episodes(page: str) -> list[tuple[dict, list[str]]]:
    """What the script finds: where each episode belongs, and its texts."""
    found = re.search('<script type="application/json" id="episodes-data">(.*?)</script>', page)
    data = json.loads(found[1])
    return [
        (
            dict(zip(report_episodes.FIELDS, (data["strings"][n] for n in place), strict=True)),
            [data["strings"][n] for n in texts],
        )
        for place, texts in data["episodes"]
    ]


def test_all_episodes_of_an_evaluation_are_there(page):
    episodes = _episodes(page)
    test = [about for about, _ in episodes if about["use"] == "TEST"]
    assert len(test) == 3 * 3 * len(FAMILIES) and test[0]["family"] == "wear"
    # the first batch of a loop is the same for both arms: 6 of their 12 contexts
    stream = [about for about, _ in episodes if about["use"] == "STREAM"]
    assert len(stream) == (12 + 6) * len(FAMILIES)
    about, texts = next(item for item in episodes if item[0]["arm"] == "trained")
    assert about["outcome"] == "success" and about["failures"] == "1"
    assert texts[:3] == [f"You play NetHack. {LESSONS['trained']}", "You won.", ""]
    assert texts[6] == "no action" and len(texts) == 3 + 4 * 2
    links = {int(n) for link in re.findall("#episode=([0-9,]+)", page) for n in link.split(",")}
    assert links and max(links) < len(episodes)


def test_what_does_not_fit_is_counted_and_not_linked(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(report_episodes, "MAX_STEPS", 10)
    run = shutil.copytree(whole, tmp_path / "run")
    page = _written(run).read_text(encoding="utf-8")
    assert sum((len(texts) - 3) // 4 for _, texts in _episodes(page)) <= 10
    assert "more did not fit into this page" in _check(page)
    assert f"contexts/ of the run directory and of {FOLDER}." in _check(page)


def test_what_was_read_for_the_prompts_shown_comes_before_what_others_read(whole, tmp_path):
    """A fourth loop in the first lines, of a gain that the rule chooses in no family."""
    run = shutil.copytree(whole, tmp_path / "run")
    path = run / FOLDER / "contexts" / "trained_wear.jsonl"
    fourth = [to_json(_context("wear", 3, turn, "You play NetHack.")) + "\n" for turn in range(2)]
    path.write_text("".join(fourth) + path.read_text())
    with (run / FOLDER / "turns.jsonl").open("a") as file:
        for row in _turns("wear", "trained", "You play NetHack. Wear it."):
            if row["run"] == 0:
                file.write(json.dumps(row | {"run": 3, "success": 0.1 * row["turn"]}) + "\n")
    found = [about for about, _ in _episodes(_written(run).read_text(encoding="utf-8"))]
    test = [about["arm"] for about in found if about["use"] == "TEST"]
    assert test == ["trained"] * 3 + ["untrained"] * 3 + ["initial"] * 3 + test[9:]
    stream = [about["run"] for about in found if about["use"] == "STREAM"]
    assert stream.count("4") == 4 and stream[-4:] == ["4"] * 4


def test_replies_without_a_prompt_are_counted_among_all(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    said = f"malformed replies of the reflector, trained: <b>{len(FAMILIES)}</b>"
    assert f"{said}</span>" in _written(run).read_text(encoding="utf-8")
    budget = {"trained": {"reflector_calls": 200}}
    _rewrite(
        run / "evaluation.json",
        lambda data: (
            data | {"families": {k: v | {"budget": budget} for k, v in data["families"].items()}}
        ),
    )
    page = _written(run).read_text(encoding="utf-8")
    assert f"{said} of {200 * len(FAMILIES):,}</span>" in page


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, ""),
        (0.417, "+0.42"),
        (-0.25, "-0.25"),
        (0.9984, "+0.998"),
        (-0.99961, "-0.9996"),
        (1.0, "+1.00"),
        (0.99999, "+1.00"),
    ],
)
def test_what_is_not_quite_one_is_not_said_to_be(value, said):
    assert wording.correlation(value) == said


def test_the_protocol_is_read_from_the_results(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    protocol = {"protocol": "paper", "runs": 10, "meta_turns": 2, "select_games": 0}
    _rewrite(run / "evaluation.json", lambda data: data | {"protocol": data["protocol"] | protocol})
    text = _check(_written(run).read_text(encoding="utf-8"))
    assert "which reads too high; nothing is claimed of them" in text
    assert "Trained seeds: 1; 10 loops (runs) per arm and family; 2 meta-turns each;" in text
    assert "strict" not in text


def test_what_actors_did_is_counted():
    played = [json.loads(to_json(_trajectory("eat", 0, "", won=won))) for won in (True, False)]
    # twice one sequence of "", "go east" and one of "", "go east", "go east", "", "go east"
    found = behaviour.of_actor([played[0], played[0], played[1]], 2)
    # both from one sequence in one of three draws of two
    assert {name: value and round(value, 4) for name, value in found.items()} == {
        "episodes": 3,
        "sequences": 0.6667,
        "draws": 2,
        "different_of_draws": 1.6667,
        "verb_bits": 0.0,
        "repeated_turns": 0.3333,
        "turns_without_action": 0.4444,
        "unavailable_actions": None,
    }
    # a fair coin
    assert behaviour.entropy([3, 3]) == 1.0


@pytest.mark.parametrize(
    ("counts", "draws", "expected"),
    [
        ([1, 1, 1], 2, 2.0),
        ([3], 2, 1.0),
        ([2, 1], 1, 1.0),
        ([2, 2], 2, 1 + 2 / 3),
        ([2, 1], 4, None),
        ([], 0, None),
    ],
)
def test_different_kinds_among_fewer_draws(counts, draws, expected):
    assert behaviour.rarefied(counts, draws) == (expected and pytest.approx(expected))


def test_results_of_before_have_analyses_of_what_is_there(whole, tmp_path):
    """Of format 3, and what training has kept of rewards only where it has."""
    run = shutil.copytree(whole, tmp_path / "run")
    results = json.loads((run / "evaluation.json").read_text())
    assert "What rewards were worth" in report_page.render(report_data.load_run(run))
    del results["analyses"]
    (run / "evaluation.json").write_text(json.dumps({**results, "format": 3}))
    page = report_page.render(report_data.load_run(run))
    assert "What rewards were worth" not in page and "single sentences" not in page
    assert "different sequences" in page and "Games won, from training to TEST" in page


def test_what_evaluates_a_run_can_be_pasted(tmp_path, capsys):
    run = make_run(tmp_path / "a run", evaluated=False, iterations=1)
    command = f"ictjax evaluate --run-dir '{run}'"
    report.main(["--run-dir", str(run)])
    assert f"No evaluation yet: run `{command}` for the table." in capsys.readouterr().out
    refused(capsys, result_command.main, [str(run)], f"run `{command}` first")


@pytest.mark.parametrize("said", ["x" * 2**20, "Open <b>doors</b>. " * 2**16, "go\n" * 2**18])
def test_a_megabyte_of_prompt_is_cut_wherever_it_stands(whole, tmp_path, said):
    run = shutil.copytree(whole, tmp_path / "run")
    for name in ("prompts.jsonl", "turns.jsonl", "episodes/trained_eat.jsonl"):
        path = run / FOLDER / name
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            if row.get("turn") != 0:
                row["system_prompt"] = f"{said}{row.get('turn')}"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = _written(run).read_text()
    text = _check(page)
    assert len(page) < 6_000_000 and said[:20_000] in html.unescape(page)
    assert f"\u2026 ({len(said) + 1 - 20_000:,} more characters)" in text
    assert "<b>doors" not in page


def test_actions_that_were_not_listed_are_counted():
    turns = [
        {"observation": "a", "action": action, "actions": listed}
        for action, listed in (("go", ["go"]), ("fly", ["go"]), ("fly", []), ("", ["go"]))
    ]
    assert behaviour.of_actor([{"turns": turns}], 1)["unavailable_actions"] == 0.5


def test_prompts_with_names_of_a_single_game_are_counted():
    def loop(prompt):
        context = _context("eat", 0, 0, "")
        return report_loops.Loop(
            arm="trained",
            family="eat",
            seed=0,
            run=0,
            prompts=[{"turn": 0, "system_prompt": "Go."}, {"turn": 1, "system_prompt": prompt}],
            contexts={0: json.loads(to_json(context))},
        )

    found = behaviour.of_prompts([loop("Go to East 2 now."), loop("Go to east 3.")])
    assert found["names"] == 0.5
    # "Go." is gone for five words, and for four
    assert (found["words"], found["words_changed"]) == (4.5, 5.5)
    assert (found["words_by_turn"], found["changed_by_turn"]) == ([1, 4.5], [5.5])


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1e100, -1e100], [1e-310, 2e-310], [1.0, 1.0 + 2e-16], [-5, 5]]
)
def test_charts_take_any_numbers(values):
    line = report_figures.Line(name="x", colour="--ink", points=list(enumerate(values)))
    chart = report_figures.line_chart("x", [line], x_label="n").markup
    assert chart.count('class="grid"') in (2, 3, 4, 5)
    assert "nan" not in chart and "inf" not in chart


def test_axes_are_labelled_with_round_numbers():
    line = report_figures.Line(name="x", colour="--ink", points=[(1, 0.2), (7, 0.9)])
    chart = report_figures.line_chart("x", [line], x_label="n", y_ends=(0, 1), percent=True).markup
    assert re.findall(r'class="end">([^<]*)', chart) == ["0", "50", "100"]
    assert re.findall(r'class="mid">([^<]*)', chart) == ["2", "4", "6", "n"]


def test_words_that_are_new_and_gone():
    pieces = list(word_diff("You play. Search <walls>.", "You play. Pick up\nthe dagger."))
    assert pieces == [
        ("same", "You play."),
        ("gone", " Search <walls>."),
        ("new", " Pick up\nthe dagger."),
    ]


@pytest.mark.parametrize("before", ["", "a b. c", "a " * 5000, "x\n" * 9000])
def test_a_diff_holds_the_whole_new_text(before):
    after = f"new. {before}\n end"
    pieces = list(word_diff(before, after))
    assert "".join(text for kind, text in pieces if kind != "gone") == after


def test_loops_that_are_shown_are_those_of_the_rule(whole):
    (evaluation,) = report_data.load_run(whole).evaluations
    loops = report_loops.loops(evaluation)
    assert len(loops) == 2 * 3 * len(FAMILIES)
    shown = report_loops.shown_loops(loops)
    assert list(shown) == ["wear", "puton", "eat", "wield", "locked_door", "zap"]
    for several in shown.values():
        assert [(one.why, one.loop.run) for one in several] == [
            ("largest gain", 2),
            ("in the middle", 0),
            ("largest regression", 1),
        ]
        for one in several:
            assert (one.loop.arm, one.beside.arm) == ("trained", "untrained")
            assert one.beside.run == one.loop.run and list(one.loop.contexts) == [0, 1]
    # rates of 0.6, 0.2 and 1.0
    assert report_loops.middle_half(loops, ["eat", "zap"], "trained")[2] == {
        "turn": 2,
        "low": pytest.approx(0.4),
        "high": pytest.approx(0.8),
    }


def test_loops_of_several_seeds_are_told_apart(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    path = run / FOLDER / "turns.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines + [line for line in lines if '"trained"' in line]))
    (evaluation,) = report_data.load_run(run).evaluations
    loops = report_loops.loops(evaluation)
    assert {(loop.arm, loop.seed) for loop in loops} == {
        ("untrained", 0),
        ("trained", 0),
        ("trained", 1),
    }
    assert all(len(loop.prompts) == 3 for loop in loops)
    shown = _section(_written(run).read_text(encoding="utf-8"), "lineage")
    # whose they are is not in the results
    assert "largest gain: run 1 of 2, loop 3" in shown and "seed" not in shown


def test_initial_states_are_counted(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    games = {name: f"minihack|eat|{name}" for name in "abcd"}
    drawn = {
        "stream": [[[games["a"]], [games["b"]]]],
        "select": [[games["c"]]],
        "test": [[games["d"]]],
        "states": {games["a"]: "1a", games["b"]: "1b", games["c"]: "1b", games["d"]: "1d"},
    }
    (run / FOLDER / "games.json").write_text(json.dumps({"eat": drawn}))
    (run / "episodes" / "iteration_00001.jsonl").write_text(
        to_json(_trajectory("eat", 0x1D, "", won=False)) + "\n"
    )
    read = report_data.load_run(run)
    text = disjointness(read, read.evaluations[0])
    assert (
        "1 TEST, 1 SELECT, 2 STREAM; 1 of them in two of these sets; 1 of them among the 1" in text
    )
    (run / FOLDER / "games.json").unlink()
    assert disjointness(read, read.evaluations[0]) == ""


HOSTILE = (
    "<script>alert(1)</script></pre></title></style><img src=x onerror=y>&lt;script&gt;",
    "\" onload=\"x' onload='x $\\frac{$ [red]x[/red] \\g<1> %s {} \u65e5\u672c \U0001f600",
    "\x1b[31m\x00\r\x7f\x9b\u202eabc\u2066\u200f\u2028\ufeff",
)
# what decides which part of the page a text is shown in
KEPT = {
    *(*FAMILIES.values(), "initial", "untrained", "trained", "success", "step_limit"),
    *("better", "worse", "not shown", FOLDER),
}


def _spoilt(value, text):
    """The same JSON with a text behind every other text, names of families among them."""
    if isinstance(value, dict):
        return {
            name + text if name in FAMILIES else name: _spoilt(item, text)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_spoilt(item, text) for item in value]
    return value + text if isinstance(value, str) and value not in KEPT else value


def _strange(value, text):
    """The same JSON with a text instead of every number."""
    if isinstance(value, dict):
        return {name: _strange(item, text) for name, item in value.items()}
    if isinstance(value, list):
        return [_strange(item, text) for item in value]
    return text if isinstance(value, int | float) else value


def _rewrite(path, change):
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in lines))


def _outline(page):
    """Every tag with its attributes' names, and what attributes hold beside style and drawing."""
    found = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.add((tag, tuple(name for name, _ in attrs)))
    parser.feed(page)
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_file_holds_is_taken_for_html(page, tmp_path, text):
    run = make_run(tmp_path / "run", iterations=3)
    for path in run.rglob("*.json*"):
        _rewrite(path, lambda data: _spoilt(data, text))
    for path in [*run.glob(f"{FOLDER}/*/*.jsonl")]:
        arm, _, family = path.stem.partition("_")
        quoted = urllib.parse.quote(family + text, safe=" ")
        path.rename(path.with_name(f"{arm}_{quoted}.jsonl"))
    for name in ("config.json", "manifest.json"):
        _rewrite(run / name, lambda data: _strange(data, text) | {text: text, "seed": text})
    _rewrite(run / "metrics.jsonl", lambda data: data | {"time": {f"{text}_s": 1.0}, "kl": text})
    _rewrite(
        run / "manifest.json",
        lambda data: data | {"environment": {"name": text, "source": text, "options": {"a": text}}},
    )
    name = text.replace("/", "").replace("\0", "")  # what a file can be called
    (run / f"evaluation-{name}.json").write_text((run / "evaluation.json").read_text())
    hostile = _written(run).read_text(encoding="utf-8")
    assert html.escape(visible(text)) in hostile  # it is shown
    _check(hostile)
    assert any(visible(text) in said for _, texts in _episodes(hostile) for said in texts)
    assert _outline(hostile) <= _outline(page)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", hostile
    )


def test_the_table_shows_names_as_they_are(tmp_path, capsys):
    run = make_run(tmp_path / "[red]run[bold]")
    _rewrite(run / "evaluation.json", lambda data: _spoilt(data, "[/]:x:\x1b"))
    report.main(["--run-dir", str(run)])
    printed = capsys.readouterr().out
    assert "eat[/]:x:\u241b" in printed and f"Report: {run}/report.html" in printed
    assert "better" in printed and "\x1b" not in printed


def test_no_evaluation_and_no_metrics_are_said(tmp_path):
    run = make_run(tmp_path / "young", evaluated=False, iterations=0)
    text = _check(_written(run).read_text(encoding="utf-8"))
    assert "No evaluation of the trained" in text
    assert "ictjax evaluate --run-dir 'runs/a b'" in text
    assert "ictjax train --run-dir 'runs/a b'" in text
    assert "No finished iteration yet" in text
    assert report.tables(report_data.load_run(run)) == []


def test_what_was_read_last_in_training_can_be_read_before_an_evaluation(tmp_path):
    run = make_run(tmp_path / "young", evaluated=False, iterations=3)
    for n in (1, 2):
        (run / "contexts" / f"iteration_{n:05d}.jsonl").write_text(
            to_json(_context("zap", n, 1, "Wave it.")) + "\n"
        )
    page = _written(run).read_text(encoding="utf-8")
    places = [about for about, _ in _episodes(page)]
    assert [(about["use"], about["run"], about["family"]) for about in places] == [
        ("training", "3", "zap")
    ] * 2
    assert "what was read in the newest iteration of training" in _check(page)


def test_half_written_last_metrics_line_is_ignored(tmp_path):
    run = make_run(tmp_path / "killed", evaluated=False, iterations=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "reward_re')
    assert "3 of 30 iterations" in _check(_written(run).read_text(encoding="utf-8"))


def test_evaluation_of_some_families_and_arms_only(tmp_path):
    run = make_run(tmp_path / "part")
    some = evaluation({"eat": "train", "zap": "train"}, {"initial": 0.1, "trained": 0.5})
    (run / "evaluation.json").write_text(json.dumps(some))
    text = _check(_written(run).read_text(encoding="utf-8"))
    assert "No evaluation of the trained and the untrained reflector yet" in text
    assert "zap" in text and "trained - initial" in text


def test_arms_of_every_kind_are_compared(tmp_path):
    run = make_run(tmp_path / "many")
    rates = {**RATES, "best-of-n": 0.6, "flipped": 0.3}
    (run / "evaluation.json").write_text(json.dumps(evaluation(FAMILIES, rates, seeds=3)))
    text = _check(_written(run).read_text(encoding="utf-8"))
    assert "trained - best-of-n" in text and "flipped - initial" in text
    results = json.loads((run / "evaluation.json").read_text())
    for split in results["overall"].values():
        won = wording.percent(split["arms"]["best-of-n"]["mean"])
        test = split["tests"]["trained_vs_best-of-n"]
        difference = (
            f"{wording.points(test['difference'])} {wording.interval(test['ci95'], signed=True)}"
        )
        assert (
            f"Of 2 other arms best-of-n won most: {won} %; trained - best-of-n: {difference},"
            f" {test['verdict']}." in text
        )
    assert "3 trained seeds cannot give p &lt; 0.250" in html.escape(text)


def test_every_arm_has_its_own_look(whole, tmp_path):
    arms = [*ARMS, *(f"{arm}@endpoint" for arm in ARMS if ARMS[arm].asks == "untrained")]
    check_arms(arms, "http://localhost")
    looks = [report_figures.arm_look(arm) for arm in arms]
    assert len(set(looks)) == len(arms) == 25
    css = Path(report_page.__file__).with_name("report.css").read_text(encoding="utf-8")
    for colour, style in set(looks):
        assert css.count(f"{colour}: #") == 2 and css.count(f"svg .{style}") == (style != "solid")
        assert f".key.{style}" in css
    # nine of them, in another order in each part of the page
    run = make_run(tmp_path / "run", iterations=3)
    names = ["initial", "untrained", "trained", *list(ARMS)[-6:]]
    results = evaluation(FAMILIES, dict.fromkeys(names, 0.5), runs=2)
    results["analyses"]["arms"] = dict(reversed(results["analyses"]["arms"].items()))
    (run / "evaluation.json").write_text(json.dumps(results))
    page = _written(run).read_text(encoding="utf-8")
    keys = re.compile(r'<span class="key (\w+)" style="--c:var\(([\w-]+)\)"></span>([\w-]+)</span>')
    for part in ("results", "meta-turns", "analyses"):
        found = {arm: (colour, style) for style, colour, arm in keys.findall(_section(page, part))}
        assert found == {arm: report_figures.arm_look(arm) for arm in names}


def test_the_middle_half_of_loops_stands_beside_its_meta_turn(whole, tmp_path):
    """As bars that touch no other turn; as a band where there are too many turns for them."""
    shown = _section(_written(whole).read_text(encoding="utf-8"), "meta-turns")
    assert 'class="band"' not in shown
    for chart in re.findall("<svg.*?</svg>", shown):
        turns = sorted(
            float(x) for x in re.findall(r'<text x="([\d.]+)"[^>]*class="mid">\d', chart)
        )
        assert len(turns) == 3 and turns[0] > report_figures.BOX_WIDTH * 3
        boxes = re.findall(r'class="box" d="M([\d.]+) ([\d.]+)V([\d.]+)"', chart)
        assert len(boxes) == 2 * 3  # of two arms at all turns
        for x, low, high in ([float(one) for one in box] for box in boxes):
            right = min(turn for turn in turns if turn > x)
            assert right - 13 < x < right and low > high  # downwards
    run = shutil.copytree(whole, tmp_path / "run")
    results = json.loads((run / "evaluation.json").read_text())
    for numbers in (*results["overall"].values(), *results["families"].values()):
        for arm in numbers["arms"].values():
            arm["curve"] = arm["curve"] * 20
    (run / "evaluation.json").write_text(json.dumps(results))
    shown = _section(_written(run).read_text(encoding="utf-8"), "meta-turns")
    assert 'class="band"' in shown and 'class="box"' not in shown


def _section(page: str, anchor: str) -> str:
    return page.partition(f'<section id="{anchor}"')[2].partition("</section>")[0]


def test_rewards_are_drawn_as_the_results_count_them(whole, tmp_path):
    """Whatever candidates are in the files; those of before have no counts."""
    signal = _section(_written(whole).read_text(encoding="utf-8"), "signal")
    assert re.findall("<title>([^<]*)", signal) == [
        "0.00 to 0.25: 30",
        "0.25 to 0.50: 0",
        "0.50 to 1.00: 130",
    ]
    assert "in 40 groups (in 7 of these all rewards are equal)" in signal
    run = shutil.copytree(whole, tmp_path / "run")
    results = json.loads((run / "evaluation.json").read_text())
    for name in ("histogram", "dead_groups"):
        del results["analyses"]["reward_signal"][name]
    (run / "evaluation.json").write_text(json.dumps(results))
    signal = _section(_written(run).read_text(encoding="utf-8"), "signal")
    assert "in 40 groups, iterations" in signal
    # of two iterations 1 - exp(-1/10) and 1 - exp(-2/10), of six candidates each
    assert re.findall(r"<title>[\d.]+ to [\d.]+: (\d+)", signal) == ["6", "6", *"00000000"]


def test_prompts_of_one_sentence_are_said(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    results = json.loads((run / "evaluation.json").read_text())
    for family in ("eat", "zap"):
        results["analyses"]["deletions"][family]["sentences"] = []
    (run / "evaluation.json").write_text(json.dumps(results))
    shown = _section(_written(run).read_text(encoding="utf-8"), "analyses")
    assert "Nothing could be left out of the last prompts on eat, zap:" in shown
    assert "eat: TEST games lost" not in shown and "wear: TEST games lost" in shown


def test_sentences_of_held_out_families_stand_first(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    results = json.loads((run / "evaluation.json").read_text())
    found = results["analyses"]["deletions"]
    results["analyses"]["deletions"] = {name: found[name] for name in FAMILIES}  # trained first
    (run / "evaluation.json").write_text(json.dumps(results))
    shown = _section(_written(run).read_text(encoding="utf-8"), "analyses")
    families = re.findall(r"<caption>(\w+): TEST games lost", shown)
    assert families == sorted(FAMILIES, key=lambda name: FAMILIES[name] == "train")[:2] + [
        name for name in families[2:] if FAMILIES[name] == "train"
    ]
    assert set(families) == set(FAMILIES)


def test_prompts_are_followed_over_meta_turns(whole, tmp_path):
    shown = _section(_written(whole).read_text(encoding="utf-8"), "analyses")
    assert "words of the prompt. trained: from 4 to 21;" in shown
    assert "words changed by a meta-turn. trained: from 26.5 to 26.5;" in shown
    run = shutil.copytree(whole, tmp_path / "run")
    results = json.loads((run / "evaluation.json").read_text())
    for arm in results["analyses"]["arms"].values():
        arm |= {"words_by_turn": [4, 30], "changed_by_turn": [26]}
    (run / "evaluation.json").write_text(json.dumps(results))
    assert "Prompts from one" not in _written(run).read_text(encoding="utf-8")


def make_experiment(folder: Path) -> Path:
    """Two trainings, and the results of both beside them."""
    names = ("a", "b")
    for seed, name in enumerate(names):
        make_run(folder / name, evaluated=False, iterations=3 + seed)
        _rewrite(folder / name / "config.json", lambda data, seed=seed: data | {"seed": seed})
        (folder / name / FOLDER).mkdir(parents=True)
    both = make_run(folder / "a+b", iterations=0)
    for name in ("config.json", "manifest.json", "metrics.jsonl"):
        (both / name).unlink()
    _rewrite(both / "evaluation.json", lambda data: _of_runs(data, names))
    return both


def _of_runs(results: dict, names) -> dict:
    protocol = results["protocol"] | {"run_dirs": [f"elsewhere/{name}" for name in names]}
    return results | {"protocol": protocol}


def test_trainings_of_several_seeds_stand_side_by_side(tmp_path):
    both = make_experiment(tmp_path)
    page = _written(both).read_text(encoding="utf-8")
    text = _check(page)
    training, signal, cost = (_section(page, name) for name in ("training", "signal", "cost"))
    assert re.findall("<figcaption>(run [^<]*)", training) == ["run a, seed 0", "run b, seed 1"]
    assert "Families of run b, seed 1" in training and "initial prompt, as evaluated" in training
    assert "Not here" not in training
    # replayed and fresh games with their bands, and the first prompt
    first, *_ = re.findall("<figure.*?</figure>", training)
    assert first.count('<path class="band"') == 2 and first.count('<path class="line') == 3
    assert "each counts once for every trained seed" in text
    # a line for each in every panel, and the counts of the results
    assert len(re.findall('<path class="line', signal.partition("KL to the ref")[2])) == 2 * 4
    assert "0.50 to 1.00: 130" in signal and "in 7 of these all rewards are equal" in signal
    # 34.2 s an iteration, 300 episodes
    assert "2 trained seeds together: 3 min 59 s of training in 7 iterations." in cost
    rows = re.findall('<tr class="">(.*?)</tr>', cost)
    assert [re.findall("<td>([^<]*)", row) for row in rows] == [
        ["3", "103", "34.20", "", "8.8", ""],
        ["4", "137", "34.20", "", "8.8", ""],
        *([seconds] * 2 for seconds in ("21.00", "6.00", "4.20", "3.00")),
    ]
    assert "run b, seed 1" in rows[1] and "rewards" in rows[2] and "The run" not in text
    assert "2 trained seeds" in text.partition("Results")[0]


def test_trainings_that_are_not_here_are_said(tmp_path):
    both = make_experiment(tmp_path)
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    page = _written(both).read_text(encoding="utf-8")
    said = "Not here: what the {} written (or there is no finished iteration)."
    assert said.format("training of b has") in page
    assert re.findall("<figcaption>(run [^<]*)", page) == ["run a, seed 0"]
    assert "run a, seed 0" in _section(page, "cost") and "run b" not in _section(page, "cost")
    # another run of that name, which has no part in this evaluation
    (tmp_path / "a" / FOLDER).rmdir()
    page = _written(both).read_text(encoding="utf-8")
    assert said.format("trainings of a, b have") in page
    assert "0.50 to 1.00: 130" in _section(page, "signal") and 'id="cost"' not in page
    # what is no path of any machine
    strange = ["\0", "x" * 5000, 7]
    _rewrite(both / "evaluation.json", lambda data: data | {
        "protocol": data["protocol"] | {"run_dirs": strange}
    })  # fmt: skip
    assert "Not here" in _check(_written(both).read_text(encoding="utf-8"))


def _twice(both: Path) -> None:
    """What the trained reflectors wrote, of two runs."""
    for path in (both / FOLDER / "turns.jsonl", *(both / FOLDER).glob("*/trained_*.jsonl")):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines + [line for line in lines if _is_trained(path, line)]))


def _is_trained(path: Path, line: str) -> bool:
    return path.name != "turns.jsonl" or '"trained"' in line


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("a", "b"), ["run a, seed 0", "run b, seed 1"]),
        (("b", "a"), ["run b, seed 1", "run a, seed 0"]),
        (("b", "gone"), ["run b, seed 1", "run gone"]),
        (("a", "a"), ["run a, seed 0 (run 1 of 2)", "run a, seed 0 (run 2 of 2)"]),
        (("a", "b", "c"), ["run 1 of 2", "run 2 of 2"]),  # there are parts of two
    ],
)
def test_runs_are_called_by_their_names_and_seeds(tmp_path, names, labels):
    both = make_experiment(tmp_path)
    _twice(both)
    _rewrite(both / "evaluation.json", lambda data: _of_runs(data, names))
    _rewrite(both / "evaluation.json", lambda data: data | {
        "protocol": data["protocol"] | {"runs": 3, "test_games": 1}
    })  # fmt: skip
    page = _written(both).read_text(encoding="utf-8")
    arms = {about["arm"] for about, _ in _episodes(page) if about["arm"].startswith("trained")}
    assert arms == {f"trained ({label})" for label in labels}
    assert f"largest gain: {labels[0]}, loop 3" in _section(page, "lineage")
    if names == ("b", "a"):
        for part in ("training", "signal", "cost"):
            shown = _section(page, part)
            assert 0 < shown.find(labels[0]) < shown.find(labels[1])
    assert not re.search(r"(?<!, )seed \d", page)


def test_pocket_models_are_said_wherever_the_runs_are(tmp_path):
    """Beside the runs, by their configurations; in a bundle, by what the models held."""
    both = make_experiment(tmp_path / "all")
    note = "never evidence about language models"
    assert note in _written(both).read_text(encoding="utf-8")
    settings = both / FOLDER / "settings.json"
    settings.write_text(json.dumps({"models": {"actor": "0" * 64, "reflector": "Qwen/Qwen3"}}))
    for name in ("a", "b"):
        assert note in _written(both).read_text(encoding="utf-8")
        _rewrite(both.parent / name / "config.json", lambda data: data | {"actor": "Qwen/Qwen3"})
    assert note not in _written(both).read_text(encoding="utf-8")
    shipped = Path(pocket_models.__file__).parent / "pocket" / "checkpoints"
    folders = [path.parent for path in shipped.rglob("model.safetensors")]
    assert len(folders) >= 6
    for folder in folders:
        settings.write_text(json.dumps({"models": {"actor": "Qwen/Qwen3"}}))
        bundled = tmp_path / "bundles" / folder.relative_to(shipped)
        _rewrite(settings, lambda data, one=folder: {
            "models": data["models"] | {"reflector": content_hash(one)}
        })  # fmt: skip
        bundle.write_bundle(both, "both", [], bundled)
        assert note in _written(bundled).read_text(encoding="utf-8"), folder


def test_a_damaged_training_of_several_is_named(tmp_path):
    both = make_experiment(tmp_path)
    (tmp_path / "b" / "metrics.jsonl").write_text("{}\n{}\n")
    with pytest.raises(ValueError, match=r"b/metrics\.jsonl"):
        _written(both)


def test_report_does_not_depend_on_when_it_is_made(tmp_path):
    run = make_run(tmp_path / "twice")
    first = _written(run).read_bytes()
    assert _written(run).read_bytes() == first


def test_another_benchmark_stands_beside_with_its_games(tmp_path):
    run = make_run(tmp_path / "both")
    transfer = dict.fromkeys(("heat", "cool"), "transfer")
    data = evaluation(transfer, {"untrained": 0.5, "trained": 0.5})
    data["environment"] = {
        "name": "alfworld",
        "options": {"rooms": "small"},
        "source": "generated",
        "games_sha256": "aa",
    }
    (run / "evaluation-alfworld.json").write_text(json.dumps(data))
    text = _check(_written(run).read_text(encoding="utf-8"))
    assert data["headline"]["text"] in text and "On the held-out families, prompts of" in text
    assert "Results, on alfworld" in text
    assert "Measured on alfworld, generated games, rooms=small." in text
    tables = report.tables(report_data.load_run(run))
    *_, won = (table for table in tables if str(table.title).startswith("Games won"))
    assert [*won.columns[0].cells][-3:] == ["heat", "cool", "families of alfworld"]
    assert str(tables[-1].title).endswith("after the first, families of alfworld")
    assert [*tables[-1].columns[0].cells] == ["untrained", "trained"]


def test_splits_are_those_of_the_file(whole):
    run = report_data.load_run(whole)
    first, second = report_data.split_summaries(run.evaluations[0])
    assert (first.name, list(first.families)) == ("heldout", ["wear", "puton"])
    assert (second.name, len(second.families)) == ("train", 4)
    assert first.overall == run.evaluations[0].results["overall"]["heldout"]


def test_games_are_compared_one_by_one(whole):
    (evaluation,) = report_data.load_run(whole).evaluations
    for pair in report_loops.paired_games(evaluation, "initial", "trained"):
        # the trained arm wins games 0 and 2 of three, the other none
        assert (pair.both, pair.neither, pair.lost) == (0, 1, [])
        assert [(a["game"]["key"], b["game"]["key"]) for a, b in pair.gained] == [
            ("0", "0"),
            ("2", "2"),
        ]
    (first, *_) = report_loops.paired_games(evaluation, "trained", "untrained")
    assert first.family == "wear" and len(first.lost) == 2


def test_the_table_fits_a_terminal(whole):
    """Whole words and numbers in 80 columns, the longest ones included."""
    results = json.loads((whole / "evaluation.json").read_text())
    for numbers in (*results["families"].values(), *results["overall"].values()):
        for arm in numbers["arms"].values():
            arm["mean"] = 1.0
        for test in numbers["tests"].values():
            test |= {"difference": -1.0, "ci95": [-1.0, 1.0], "p_corrected": 0.00012}
            test |= {"num_units": 100, "verdict": "not shown"}
    results["families"]["a_family_with_a_very_long_name"] = results["families"]["wear"]
    results["overall"]["heldout"]["families"].append("a_family_with_a_very_long_name")
    page = io.StringIO()
    for table in result_tables(results):
        Console(file=page, width=80).print(table)
    lines = page.getvalue().splitlines()
    assert "\u2026" not in page.getvalue() and max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if "not shown" in line]
    assert len(rows) == 7 + 2 + 2  # families, splits, other comparisons
    for row in rows:
        assert row[-7:] == ["-100", "[-100,", "+100]", "0.0001", "100", "not", "shown"]


def test_smoothing_keeps_a_constant_and_follows_a_step():
    assert report_figures.smooth([0.3, 0.3, 0.3]) == pytest.approx([0.3, 0.3, 0.3])
    # Weights .25 and .75 * .25 over their sum: (.25 * 1 + .1875 * 0) / .4375.
    assert report_figures.smooth([0.0, 1.0]) == pytest.approx([0.0, 4 / 7])


def test_counters_that_start_again_are_added_up():
    def total(*counts, began=()):
        lines = [{"time": {} if count is None else {"worker_crashes": count}} for count in counts]
        for one, process in zip(lines, began, strict=bool(began)):
            one["time"]["process_began"] = process
        return report_data.counter_total(lines, "worker_crashes")

    # 0, 2, 2 in one process, then 1, 3 in the next: 2 + 3.
    assert total(0, 2, None, 2, 1, 3) == 5
    # the next process has counted more by the time that it says so
    assert total(1, 2, 2, 5, began=(1, 1, 3, 3)) == 2 + 5
    assert total(2, 2, 2, began=(1, 2, 3)) == 6
    assert total() == 0


def test_unknown_flag_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["--run-dir", "x", "--colour", "red"])
    assert stopped.value.code == 2
    assert "--colour" in capsys.readouterr().err


def test_numbers_as_text():
    assert (
        wording.percent(0.417),
        wording.points(-0.06),
        wording.interval([-0.003, 0.5], signed=True),
    ) == (
        "42",
        "-6",
        "[+0, +50]",
    )
    assert [wording.counted(n, "game") for n in (0, 1, 2, 1204)] == [
        "0 games",
        "1 game",
        "2 games",
        "1,204 games",
    ]
    assert wording.counted(1, "family", "families") == "1 family"
    assert [wording.p_value(p) for p in (0.00001, 0.00071, 0.0123, 0.5)] == [
        "<1e-4",
        "0.0007",
        "0.012",
        "0.500",
    ]


def test_terminal_shows_the_table_and_ends_with_the_path(tmp_path, capsys):
    run = make_run(tmp_path / "cli")
    report.main(["--run-dir", str(run)])
    out = capsys.readouterr().out
    assert "locked_door" in out
    assert out.strip().splitlines()[-1] == f"Report: {run / 'report.html'}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("evaluation.json", "{oops", "is not JSON"), (None, None, "no run directory")],
)
def test_bad_input_is_one_sentence_and_exit_code_two(tmp_path, capsys, name, text, message):
    run = tmp_path / "missing"
    if name is not None:
        run = make_run(tmp_path / "bad", evaluated=False, iterations=1)
        (run / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        report.main(["--run-dir", str(run)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (run / "report.html").exists()


# Damaged files: one sentence that names the file.

_DAMAGED = {
    "empty": b"",
    "cut": b'{"families": {"eat"',
    "binary": b"\x00\xff\xfe\x80",
    "list": b"[]",
    "null": b"null",
    "nested": b"[" * 100_000,
    "digits": b'{"iterations": ' + b"9" * 5000 + b"}",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("whole") / "run", iterations=2)


@pytest.mark.parametrize("damage", _DAMAGED)
@pytest.mark.parametrize("name", ["config.json", "manifest.json", "evaluation.json"])
def test_a_damaged_file_is_named(whole, tmp_path, name, damage):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / name).write_bytes(_DAMAGED[damage])
    with pytest.raises(ValueError, match=f"run/{name} "):
        report_data.load_run(run)


@pytest.mark.parametrize("line", [b"", b"[]\n", b"null\n", b"{}\n", b"\x00\xff\n{}\n", b"{\n{}\n"])
@pytest.mark.parametrize(
    "name", [f"{FOLDER}/prompts.jsonl", f"{FOLDER}/episodes/trained_eat.jsonl"]
)
def test_a_damaged_line_is_named(whole, tmp_path, name, line):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / name).write_bytes(line)
    with pytest.raises(ValueError, match=f"run/{name}"):
        report_data.load_run(run)


def _without(*path):
    """Takes something out of results."""

    def change(data):
        for name in path[:-1]:
            data = data[name]
        del data[path[-1]]

    return change


def _with(value, *path):
    """Puts something into results."""

    def change(data):
        for name in path[:-1]:
            data = data[name]
        data[path[-1]] = value

    return change


_EAT = ("families", "eat")
_TRAINED = (*_EAT, "arms", "trained")
_TEST = (*_EAT, "tests", "trained_vs_untrained")


@pytest.mark.parametrize(
    "change",
    [
        dict.clear,
        _with({}, "families"),
        _with([], "families"),
        _with({}, *_EAT),
        _with([1], *_EAT),
        _with("other", *_EAT, "split"),
        _with(["train"], *_EAT, "split"),
        _with("1", *_EAT, "games"),
        _with(-1, *_EAT, "runs"),
        _with(0.5, *_TRAINED),
        _with(None, *_TRAINED, "mean"),
        _with(float("nan"), *_TRAINED, "mean"),
        _with([0], *_TRAINED, "ci95"),
        _with("x", *_TRAINED, "sd_seeds"),
        _with(["x"], *_TRAINED, "curve"),
        _with({"difference": 0.1, "p": 0.2}, *_TRAINED, "rise"),
        _with({"difference": 0.1, "ci95": [0, 0.2], "p": "x"}, *_TRAINED, "rise"),
        _without(*_TRAINED, "ci95"),
        _without(*_TRAINED, "chosen"),
        _without(*_EAT, "arms", "untrained"),
        _without(*_EAT, "tests"),
        _with(2, *_TEST, "p"),
        _with("best", *_TEST, "verdict"),
        _without(*_TEST, "reason"),
        _with({"trained": "x"}, *_EAT, "malformed_replies"),
        _with({"trained": {"actor_episodes": "x"}}, *_EAT, "budget"),
        _with([1], "overall"),
        _with({}, "overall"),
        _with(None, "overall", "train", "runs"),
        _with(["eat", "nowhere"], "overall", "train", "families"),
        _with("elsewhere", "overall", "train", "split"),
        _with("../../elsewhere", "folder"),
        _with("evaluation/../..", "folder"),
        _without("folder"),
        _with("x", "protocol"),
        _without("protocol", "checkpoint"),
        _with({"text": 1}, "headline"),
        _with([], "analyses"),
        _with("x", "analyses", "arms", "trained"),
        _with("x", "analyses", "arms", "trained", "verb_bits"),
        _without("analyses", "success", "eat", "training"),
        _with({"test": 1}, "analyses", "success", "eat", "arms", "trained"),
        _with("x", "analyses", "reward_signal", "groups"),
        _with([0], "analyses", "reward_signal", "reliability", "ci95"),
        _with(1, "analyses", "reward_signal", "reward_and_next", "note"),
        _with(-1, "analyses", "reward_signal", "dead_groups"),
        _with([1], "analyses", "reward_signal", "histogram"),
        _with({"edges": [0, 1], "counts": [1, 2]}, "analyses", "reward_signal", "histogram"),
        _with({"edges": [1, 0], "counts": [1]}, "analyses", "reward_signal", "histogram"),
        _with({"edges": [0, 1], "counts": ["1"]}, "analyses", "reward_signal", "histogram"),
        _with(3, "analyses", "arms", "trained", "words_by_turn"),
        _with(["x"], "analyses", "arms", "trained", "changed_by_turn"),
        _with([{"text": "x"}], "analyses", "deletions", "eat", "sentences"),
        _with(2, "format"),
        _with("x", "format"),
        _without("format"),
    ],
)
def test_results_of_another_shape_are_named(whole, tmp_path, change):
    run = shutil.copytree(whole, tmp_path / "run")
    results = json.loads((run / "evaluation.json").read_text())
    change(results)
    (run / "evaluation.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="run/evaluation.json ") as refused:
        report_data.load_run(run)
    assert "{" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", {"meta": [], "seed": 0}),
        ("manifest.json", {"environment": "fake"}),
        ("metrics.jsonl", {"iteration": 1, "time": [1]}),
        ("metrics.jsonl", {"iteration": 1, "time": {"update_s": "x"}}),
    ],
)
def test_a_record_of_another_shape_is_named(whole, tmp_path, name, data):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / name).write_text(json.dumps(data) + "\n")
    with pytest.raises(ValueError, match=name):
        report_data.load_run(run)


def test_which_checkpoint_was_evaluated_is_said(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    results = json.loads((run / "evaluation.json").read_text())
    changed = "the games of <i>x</i>"
    for step, shown in ((30, False), (7, True)):
        about = {"protocol": {"checkpoint": step}, "changes": [changed] if shown else []}
        (run / "evaluation.json").write_text(json.dumps({**results, **about}))
        text = _written(run).read_text(encoding="utf-8")
        assert ("Of iteration 7." in text) == ("<b>Changed since training" in text) == shown
        assert "<i>x" not in text
