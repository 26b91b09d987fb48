"""The report of a made-up run directory, whole and with pieces missing."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from envs.api import GameId, Outcome
from experiments import report, report_data, report_figures, report_page
from experiments.visible import visible
from ictjax.records import Trajectory, Turn, to_json

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
                "argv": ["train"],
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
    if not evaluated:
        return folder
    rates = {"initial": 0.12, "untrained": 0.42, "trained": 0.8}
    families, prompts, episodes = {}, [], {}
    for index, (family, split) in enumerate(FAMILIES.items()):
        shift = -0.02 * index - (0.2 if split == "heldout" else 0)
        arms = {
            arm: {
                "mean": max(0.02, r + shift),
                "sd": 0.2,
                "ci95": [max(0.0, r + shift - 0.09), max(0.1, r + shift + 0.09)],
            }
            for arm, r in rates.items()
        }
        test = (
            {"difference": 0.38, "ci95": [0.25, 0.5], "p": 0.0007}
            if split == "train"
            else {"difference": 0.1, "ci95": [-0.04, 0.24], "p": 0.17}
        )
        families[family] = {
            "split": split,
            "games": 16,
            "runs": 10,
            "arms": arms,
            "tests": {"trained_vs_untrained": test},
        }
        for arm in rates:
            prompt = "You play NetHack." + (" " + LESSONS[arm] if LESSONS[arm] else "")
            if arm != "initial":
                prompts.append(
                    {
                        "arm": arm,
                        "family": family,
                        "run": 0,
                        "system_prompt": prompt,
                        "success": rates[arm],
                    }
                )
            episodes[arm, family] = [
                _trajectory(family, key, prompt, won=arm == "trained" and key != 1)
                for key in range(3)
            ]
    overall = {
        split: {"split": split, "games": 40, "runs": 24, **_pooled(families, split)}
        for split in ("train", "heldout")
    }
    (folder / "evaluation.json").write_text(json.dumps({"families": families, "overall": overall}))
    (folder / "prompts" / "evaluation.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in prompts)
    )
    for (arm, family), played in episodes.items():
        (folder / "episodes" / f"evaluation_{arm}_{family}.jsonl").write_text(
            "".join(to_json(t) + "\n" for t in played)
        )
    return folder


def _pooled(families, split):
    """Arms and tests of a split: the means of its families, with made-up intervals."""
    members = [family for family in families.values() if family["split"] == split]
    arms = {
        arm: np.mean([family["arms"][arm]["mean"] for family in members])
        for arm in members[0]["arms"]
    }
    return {
        "arms": {
            arm: {"mean": mean, "sd": 0.2, "ci95": [max(0.0, mean - 0.05), mean + 0.05]}
            for arm, mean in arms.items()
        },
        "tests": {
            "trained_vs_untrained": {
                "difference": arms["trained"] - arms["untrained"],
                "ci95": [0.32, 0.44],
                "p": 0.00001,
            }
        },
    }


def _written(folder: Path) -> Path:
    return report.write_report(report_data.load_run(folder))


class _Checker(HTMLParser):
    """Collects tags that stay open and every address a browser would fetch."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [
            value
            for name, value in attrs
            if name in ("src", "srcset", "data") or (name == "href" and tag in ("link", "image"))
        ]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _check(page: str) -> str:
    """The visible text of a well-formed page that fetches nothing."""
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert "@import" not in page
    assert not re.search(r"url\(\s*['\"]?(?!#)", page)
    assert "<script" not in page
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
        "You won.",
        "p, Holm",
        "0123abc",
        "0.10.2",
        "worker crashes",
    ):
        assert expected in text


def test_headline_states_result_and_interval_and_what_pocket_models_are(page):
    text = _check(page)
    # Means .80 - .02 n over four training families: .77; untrained .39.
    assert (
        "win 77 % of the games, those of the untrained one 39 %: better than before training (+38"
        " points, 95 % interval +32 to +44)" in text
    )
    assert "never evidence about language models" in text


@pytest.mark.parametrize(("p", "verdict"), [(0.01, ": better than"), (1.0, ": not distinguish")])
def test_one_run_has_an_interval_of_no_width_and_proves_nothing(p, verdict, tmp_path):
    run = make_run(tmp_path / "one", iterations=0)
    data = json.loads((run / "evaluation.json").read_text())
    data["overall"]["train"]["tests"]["trained_vs_untrained"] |= {"ci95": [1.0, 1.0], "p": p}
    (run / "evaluation.json").write_text(json.dumps(data))
    splits = report_data.split_summaries(report_data.load_run(run).evaluations[0])
    assert verdict in report_page.headlines(splits)[0]


def test_prompts_of_models_cannot_break_the_page(page):
    assert "Do not &lt;wait&gt;." in page
    assert "<wait>" not in page


def test_only_what_one_prompt_has_is_marked():
    before, after = report_page._marked(
        "You play. Search <walls>.", "You play. Pick up\nthe dagger. Wield it."
    )
    assert before.markup == "You play. <mark>Search &lt;walls&gt;.</mark>"
    after = after.markup
    assert re.sub("</?mark>", "", after) == "You play. Pick up\nthe dagger. Wield it."
    assert not after.startswith("<mark>You")


HOSTILE = (
    "<script>alert(1)</script></pre></title></style><img src=x onerror=y>&lt;script&gt;",
    "\" onload=\"x' onload='x $\\frac{$ [red]x[/red] \\g<1> %s {} \u65e5\u672c \U0001f600",
    "\x1b[31m\x00\r\x7f\x9b\u202eabc\u2066\u200f\u2028\ufeff",
)
# what decides which part of the page a text is shown in
KEPT = {*FAMILIES.values(), "initial", "untrained", "trained", "success", "step_limit"}


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
    assert "[+25, +50]" in printed and "\x1b" not in printed


def test_no_evaluation_and_no_metrics_are_said(tmp_path):
    run = make_run(tmp_path / "young", evaluated=False, iterations=0)
    text = _check(_written(run).read_text(encoding="utf-8"))
    assert "No evaluation of the trained" in text
    assert "No finished iteration yet" in text
    assert report.result_table(report_data.load_run(run)) is None


def test_half_written_last_metrics_line_is_ignored(tmp_path):
    run = make_run(tmp_path / "killed", evaluated=False, iterations=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "reward_re')
    assert "3 of 30 iterations" in _check(_written(run).read_text(encoding="utf-8"))


def test_evaluation_of_some_families_and_arms_only(tmp_path):
    run = make_run(tmp_path / "part")
    data = json.loads((run / "evaluation.json").read_text())
    for family in data["families"].values():
        del family["arms"]["untrained"], family["tests"]
    del data["overall"]
    data["families"] = {
        name: family for name, family in data["families"].items() if family["split"] == "train"
    }
    (run / "evaluation.json").write_text(json.dumps(data))
    text = _check(_written(run).read_text(encoding="utf-8"))
    assert "locked_door" in text


def test_report_does_not_depend_on_when_it_is_made(tmp_path):
    run = make_run(tmp_path / "twice")
    first = _written(run).read_bytes()
    assert _written(run).read_bytes() == first


def test_another_benchmark_stands_beside_with_its_games(tmp_path):
    run = make_run(tmp_path / "both")
    for path in [*run.glob("evaluation.json"), *run.glob("*/evaluation*")]:
        shutil.copy(path, path.with_name(path.name.replace("evaluation", "evaluation-alfworld", 1)))
    data = json.loads((run / "evaluation.json").read_text())
    data["families"] = {
        name: {**data["families"]["zap"], "split": "transfer"} for name in ("heat", "cool")
    }
    data["overall"] = {"transfer": {**data["overall"]["train"], "games": 7, "split": "transfer"}}
    data["environment"] = {
        "name": "alfworld",
        "options": {"rooms": "small"},
        "source": "generated",
        "games_sha256": "aa",
    }
    (run / "evaluation-alfworld.json").write_text(json.dumps(data))
    text = _check(_written(run).read_text(encoding="utf-8"))
    assert "On the training families, prompts of the trained reflector win 77 %" in text
    assert "On the families of alfworld, prompts of the trained reflector win 77 %" in text
    assert "Results, on alfworld" in text
    assert "Measured on alfworld, generated games, rooms=small." in text
    table = report.result_table(report_data.load_run(run))
    assert [*table.columns[0].cells][-3:] == ["heat", "cool", "families of alfworld"]


def test_split_summary_is_that_of_the_file(tmp_path):
    run = report_data.load_run(make_run(tmp_path / "split"))
    split = report_data.split_summary(run.evaluations[0], "heldout")
    assert list(split.families) == ["wear", "puton"]
    assert (split.games, split.runs, split.test["ci95"]) == (40, 24, [0.32, 0.44])
    assert report_data.split_summary(run.evaluations[0], "transfer") is None


def test_game_pairs_are_the_same_game_lost_then_won(tmp_path):
    run = report_data.load_run(make_run(tmp_path / "pairs"))
    (evaluation,) = run.evaluations
    pairs = report_data.game_pairs(evaluation, 4)
    assert len(pairs) == 4
    assert [evaluation.families[pair.family]["split"] for pair in pairs] == ["train"] * 3 + [
        "heldout"
    ]
    for pair in pairs:
        assert report_data.game_name(pair.before) == report_data.game_name(pair.after)
        assert (pair.before["outcome"], pair.after["outcome"]) == ("step_limit", "success")


def test_smoothing_keeps_a_constant_and_follows_a_step():
    assert report_figures.smooth([0.3, 0.3, 0.3]) == pytest.approx([0.3, 0.3, 0.3])
    # Weights .25 and .75 * .25 over their sum: (.25 * 1 + .1875 * 0) / .4375.
    assert report_figures.smooth([0.0, 1.0]) == pytest.approx([0.0, 4 / 7])


def test_counters_that_start_again_are_added_up():
    # 0, 2, 2 in one process, then 1, 3 in the next: 2 + 3.
    assert report_data.counter_total([0, 2, None, 2, 1, 3]) == 5


def test_unknown_flag_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["--run-dir", "x", "--colour", "red"])
    assert stopped.value.code == 2
    assert "--colour" in capsys.readouterr().err


def test_numbers_as_text():
    assert (
        report_page.percent(0.417),
        report_page.points(-0.06),
        report_page.interval([-0.003, 0.5], signed=True),
    ) == (
        "42",
        "-6",
        "[+0, +50]",
    )
    assert [report_page.p_value(p) for p in (0.00001, 0.00071, 0.0123, 0.5)] == [
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
    "name", ["prompts/evaluation.jsonl", "episodes/evaluation_trained_eat.jsonl"]
)
def test_a_damaged_line_is_named(whole, tmp_path, name, line):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / name).write_bytes(line)
    with pytest.raises(ValueError, match=f"run/{name}"):
        report_data.load_run(run)


_ARM = {"mean": 0.5, "ci95": [0.4, 0.6]}
_TEST = {"difference": 0.1, "ci95": [0.0, 0.2], "p": 0.5}
_FAMILY = {"split": "train", "games": 1, "runs": 1, "arms": {"trained": _ARM}}


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"families": {}},
        {"families": []},
        {"families": {"eat": {}}},
        {"families": {"eat": [1]}},
        {"families": {"eat": {**_FAMILY, "split": "other"}}},
        {"families": {"eat": {**_FAMILY, "split": ["train"]}}},
        {"families": {"eat": {**_FAMILY, "games": "1"}}},
        {"families": {"eat": {**_FAMILY, "arms": {"trained": 0.5}}}},
        {"families": {"eat": {**_FAMILY, "arms": {"trained": {"mean": 0.5}}}}},
        {"families": {"eat": {**_FAMILY, "arms": {"trained": {**_ARM, "mean": None}}}}},
        {"families": {"eat": {**_FAMILY, "arms": {"trained": {**_ARM, "mean": float("nan")}}}}},
        {"families": {"eat": {**_FAMILY, "arms": {"trained": {**_ARM, "ci95": [0]}}}}},
        {"families": {"eat": {**_FAMILY, "tests": {"trained_vs_untrained": {**_TEST, "p": 2}}}}},
        {"families": {"eat": {**_FAMILY, "malformed_replies": {"trained": "x"}}}},
        {"families": {"eat": _FAMILY}, "overall": [1]},
        {"families": {"eat": _FAMILY}, "overall": {"train": {"runs": None}}},
        {"families": {"eat": _FAMILY}, "folder": "../../elsewhere"},
        {"families": {"eat": _FAMILY}, "folder": "evaluation/../.."},
        {"families": {"eat": _FAMILY}, "protocol": "x"},
        {"families": {"eat": _FAMILY}, "format": 3},
        {"families": {"eat": _FAMILY}, "format": "x"},
        {"arms": {"trained": 0.5}, "success": [1]},
    ],
    ids=str,
)
def test_results_of_another_shape_are_named(whole, tmp_path, results):
    run = shutil.copytree(whole, tmp_path / "run")
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
        assert ("Of iteration 7. <b>Changed since training" in text) == shown
        assert "<i>x" not in text
