"""The page of a run as a browser shows it: filters, links, widths, paper."""

import json
import random
import shutil
import time

import pytest

from experiments import report, report_data
from experiments.wording import interval, p_value, percent, points
from tests.browser import PATH, Browser
from tests.evaluations import FOLDER, evaluation
from tests.test_report import FAMILIES, _rewrite, _spoilt, make_experiment, make_run

pytestmark = pytest.mark.skipif(PATH is None, reason="chromium is not installed")

LONG = "<img src=x onerror=alert(1)></script><b>\x1b[31m\x00\u202e&lt;" + "W" * 6000
WIDTH = 390


def _written(folder):
    return report.write_report(report_data.load_run(folder))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def watched(browser):
    browser.complaints.clear()
    yield browser
    assert browser.complaints == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "run", iterations=3)


def _choose(browser, name, value):
    return browser.run(
        f"""(() => {{
            const field = document.querySelector('#episode-filters [name={name}]');
            if (field.type === "checkbox") field.checked = {json.dumps(value)};
            else field.value = {json.dumps(value)};
            field.dispatchEvent(new Event("input"));
            return document.getElementById("episode-count").textContent;
        }})()"""
    )


def test_episodes_are_chosen_searched_and_opened(watched, run):
    watched.open(_written(run), width=1440)
    every = (9 + 18) * len(FAMILIES)
    assert watched.run("document.getElementById('episode-count').textContent") == (
        f"1 to 25 of {every} episodes"
    )
    assert _choose(watched, "family", "zap").endswith(" of 27 episodes")
    assert _choose(watched, "use", "TEST") == "1 to 9 of 9 episodes"
    assert _choose(watched, "arm", "trained") == "1 to 3 of 3 episodes"
    assert _choose(watched, "outcome", "step limit") == "1 to 1 of 1 episode"
    assert _choose(watched, "outcome", "success") == "1 to 2 of 2 episodes"
    assert _choose(watched, "text", "time is UP.") == "0 episodes"
    assert _choose(watched, "text", "you WON") == "1 to 2 of 2 episodes"
    assert _choose(watched, "failures", True) == "1 to 2 of 2 episodes"
    watched.run("document.querySelector('#episode-list a').click()")
    watched.run("new Promise(done => setTimeout(done))")  # behind the event of the link
    shown = watched.run("document.getElementById('episode-view').innerText")
    assert "zap, trained success" in shown and "parse failure: no action" in shown
    assert watched.run(
        "[...document.querySelectorAll('#episode-view mark')].map(m => m.innerText)"
    ) == ["You won"]
    # only the map keeps its layout
    maps = watched.run(
        "[...document.querySelectorAll('#episode-view pre.map')].map(m => m.innerText)"
    )
    assert maps == ["|..@.(..|\n|.......|"] * 2


def test_a_link_opens_two_episodes_side_by_side(watched, run):
    watched.open(_written(run), width=1440, part="#episode=0,9")
    assert watched.run("document.querySelectorAll('#episode-view article').length") == 2
    watched.open(_written(run), width=1440, part="#episode=99999")
    assert watched.run("document.getElementById('episode-view').innerText") == (
        "This page holds no such episode."
    )


def test_numbers_are_those_of_the_results(watched, run):
    results = json.loads((run / "evaluation.json").read_text())
    watched.open(_written(run), width=1440)
    tables = watched.run(
        "[...document.querySelectorAll('.split > .scroll table')].map(table =>"
        " [...table.rows].map(row => [...row.cells].map(cell => cell.innerText)))"
    )
    assert len(tables) == len(results["overall"])
    for (head, *rows), split in zip(tables, results["overall"].values(), strict=True):
        assert head[:3] == ["family", "trained - untrained", "verdict"]
        expected = [split, *(results["families"][name] for name in split["families"])]
        assert [row[0] for row in rows] == ["all families", *split["families"]]
        for row, numbers in zip(rows, expected, strict=True):
            test, arms = numbers["tests"]["trained_vs_untrained"], numbers["arms"]
            assert row[1] == f"{points(test['difference'])} {interval(test['ci95'], signed=True)}"
            assert row[2].endswith(test["verdict"])
            assert row[3:5] == [p_value(test["p_corrected"]), str(test["num_units"])]
            assert row[5:8] == [
                f"{percent(arms[arm]['mean'])} {interval(arms[arm]['ci95'])}"
                for arm in ("trained", "untrained", "initial")
            ]
            assert row[8:] == [str(numbers["games"]), str(numbers["runs"])]


def test_a_hostile_run_is_text_on_a_narrow_page(watched, run, tmp_path):
    """Everything but the names of families, and these in another evaluation."""
    hostile = shutil.copytree(run, tmp_path / "run")
    for path in hostile.glob(f"{FOLDER}/*/*.jsonl"):
        if not path.stem.endswith(("_eat", "_wear")):
            path.unlink()
    path = hostile / FOLDER / "turns.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"family": "wear"' in line))
    results = evaluation({"eat": "train", "wear": "heldout"}, runs=2)
    (hostile / "evaluation.json").write_text(json.dumps(results))
    (hostile / "evaluation-other.json").write_text(json.dumps(_spoilt(results, LONG)))
    for path in hostile.rglob("*.json*"):
        if path.name != "evaluation-other.json":
            _rewrite(path, lambda data: _with_text(data, LONG))
    watched.open(_written(hostile), width=WIDTH, part="#episode=0,9")
    watched.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert watched.run("document.documentElement.scrollWidth") <= WIDTH
    assert watched.run("document.querySelectorAll('img, b b, section b > b').length") == 0
    assert watched.run("document.body.innerText.includes('<img src=x onerror=alert(1)>')")
    # what is wide scrolls by itself and can be reached with the keyboard
    assert watched.run(
        "[...document.querySelectorAll('.scroll, pre.map')].every(one => one.tabIndex === 0)"
    )


def _with_text(value, text):
    """The same JSON with a text behind every other, keys and names of families apart."""
    if isinstance(value, dict):
        return {name: _with_text(item, text) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_text(item, text) for item in value]
    return value if value in FAMILIES else _spoilt(value, text)


def test_paper_shows_what_is_folded(watched, run):
    watched.open(_written(run), width=WIDTH)
    assert watched.run("document.querySelectorAll('details:not([open])').length") > 0
    watched.run("dispatchEvent(new Event('beforeprint'))")
    assert watched.run("document.querySelectorAll('details:not([open])').length") == 0


PAPER_WIDTH = 718  # CSS pixels between the margins of A4


@pytest.fixture
def experiment(tmp_path):
    """Two trained seeds, and arms that say all that they take."""
    both = make_experiment(tmp_path)
    names = ("actor_episodes", "actor_tokens", "reflector_calls", "reflector_tokens")
    names += ("training_steps", "training_tokens", "training_actor_episodes")
    results = json.loads((both / "evaluation.json").read_text())
    for family in results["families"].values():
        family["budget"] = {"trained": dict.fromkeys(names, 12_345_678)}
    (both / "evaluation.json").write_text(json.dumps(results))
    return both


@pytest.mark.parametrize("which", ["run", "experiment"])
def test_paper_keeps_colours_and_leaves_no_heading_alone(watched, request, which):
    watched.open(_written(request.getfixturevalue(which)), width=PAPER_WIDTH, dark=True)
    hidden = "[...document.querySelectorAll('nav, form, .pager, .skip')]"
    shown = f"{hidden}.filter(one => one.checkVisibility()).length"
    folded = (
        "[...document.querySelectorAll('details:not([open]) > :not(summary)')]"
        ".filter(one => one.checkVisibility()).length"
    )
    kept_colours = (
        "[...document.querySelectorAll('body *')].every("
        "one => getComputedStyle(one).printColorAdjust === 'exact')"
    )
    assert watched.run(shown) > 3 and watched.run(folded) == 0
    assert not watched.run(kept_colours)
    watched.ask(
        "Emulation.setEmulatedMedia",
        media="print",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    assert watched.run(shown) == 0
    assert watched.run(kept_colours)
    heads = "h1, h2, h3, h4, summary, figcaption, caption"
    assert watched.run(
        f"[...document.querySelectorAll('{heads}')].every("
        "one => getComputedStyle(one).breakAfter === 'avoid')"
    )
    assert watched.run(
        "[...document.querySelectorAll('.chart, .bars, tr, li')].every("
        "one => getComputedStyle(one).breakInside === 'avoid')"
    )
    # what is folded is printed, on white, and nothing runs off the sheet
    assert watched.run(folded) == watched.run(
        "document.querySelectorAll('details:not([open]) > :not(summary)').length"
    )
    assert watched.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert watched.run(WIDE) == []


# what reaches over the right edge of the sheet
WIDE = f"""[...document.querySelectorAll("body *")].filter((one) => one.checkVisibility()
    && one.getBoundingClientRect().right > {PAPER_WIDTH} + 1)
    .map((one) => `${{one.tagName}}.${{one.className}} ${{one.innerText?.slice(0, 40)}}`)"""


def test_names_of_a_run_end_lines_at_their_underscores(watched, tmp_path):
    folder = make_run(tmp_path / "run", iterations=3)
    names = ["environment", "games_sha256", "sampling_attention", "_<b>_"]
    _rewrite(folder / "manifest.json", lambda data: data | {key: {"a": 1} for key in names})
    watched.open(_written(folder), width=WIDTH)
    heads = "[...document.querySelectorAll('#run tbody th')]"
    assert watched.run(f"{heads}.map(one => one.textContent)")[-len(names) :] == names
    # rows of text: a word each
    rows = (
        f"{heads}.map(one => one.clientHeight / parseFloat(getComputedStyle(one).lineHeight) | 0)"
    )
    assert watched.run(rows)[-len(names) : -1] == [1, 2, 2]


def test_tables_of_arms_fit_the_page(watched, tmp_path):
    """Of nine arms, one of them taught, with all that they can take."""
    folder = make_run(tmp_path / "run", iterations=3)
    arms = ["initial", "untrained", "trained", "expert", "best-of-n", "sft-best", "gepa", "opro"]
    arms.append("trained-other-family")
    results = evaluation(FAMILIES, dict.fromkeys(arms, 0.5), runs=2)
    results["protocol"]["training_budget"] = "counted (training_*: all runs together)"
    for family in results["families"].values():
        family["budget"] = dict.fromkeys(arms, dict.fromkeys(BUDGET, 12_345_678))
    (folder / "evaluation.json").write_text(json.dumps(results))
    watched.open(_written(folder), width=1440)
    watched.run("for (const one of document.querySelectorAll('details')) one.open = true")
    for name in ("Games won by every arm on the", "What every arm took on the"):
        of_arms = f"[...document.querySelectorAll(`.scroll[aria-label^='{name}']`)]"
        assert watched.run(f"{of_arms}.length") == 2
        assert watched.run(f"{of_arms}.every(one => one.scrollWidth <= one.clientWidth)")
    took = watched.run(f"[...{of_arms}[0].querySelectorAll('tbody tr')].map(one => one.innerText)")
    assert len(took) == len(BUDGET) and all(one.count("12,345,678") == 0 for one in took[:4])
    assert all(one.count("12,345,678") == len(arms) for one in took[4:])
    results_text = watched.run("document.getElementById('results').innerText")
    assert 'its rows end with "in training": all runs together' in results_text
    assert "training_" not in results_text
    assert sum("in training" in one for one in took) == 4


BUDGET = (
    *("actor_episodes", "actor_tokens", "reflector_calls", "reflector_tokens"),
    *("training_steps", "training_tokens", "training_actor_episodes", "training_actor_tokens"),
    *("training_reflector_calls", "training_reflector_tokens"),
)

NEEDLE = "a saltshaker that nobody expected"
PLACES = (
    "cabinet",
    "countertop",
    "drawer",
    "fridge",
    "shelf",
    "sinkbasin",
    "stoveburner",
    "toaster",
)
THINGS = (
    "apple",
    "bowl",
    "butterknife",
    "cup",
    "egg",
    "fork",
    "lettuce",
    "mug",
    "pan",
    "plate",
    "spatula",
    "tomato",
)


def _alfworld_turn(draw, number):
    """As the official texts are, with the admissible commands behind them."""
    place = f"{draw.choice(PLACES)} {draw.randint(1, 30)}"
    things = [f"{draw.choice(THINGS)} {draw.randint(1, 9)}" for _ in range(draw.randint(1, 6))]
    there = [f"{draw.choice(PLACES)} {draw.randint(1, 30)}" for _ in range(30)]
    actions = [f"go to {name}" for name in there]
    actions += [f"take {thing} from {place}" for thing in things] + ["inventory", "look"]
    return {
        "observation": (
            f"You arrive at {place}. On the {place}, you see {', '.join(f'a {t}' for t in things)}."
            f"\nAvailable actions: {', '.join(actions)}"
        ),
        "actions": actions,
        "reply": (
            f"Thought: Step {number}: the {things[0]} is not what I need, {there[0]} and {there[1]}"
            f" are still to be looked at, and the {place} is done.\nAction: {actions[0]}"
        ),
        "action": actions[0],
        "failure": None if draw.random() < 0.98 else "no_action",
    }


def _large_run(folder):
    """Two arms, 2,000 episodes of 25 turns."""
    draw = random.Random(0)
    families = dict.fromkeys(("clean", "cool", "heat", "look", "put"), "heldout")
    results = evaluation(families, {"untrained": 0.3, "trained": 0.6}, runs=2)
    (folder / FOLDER / "episodes").mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(results))
    for arm in ("untrained", "trained"):
        for family in families:
            with (folder / FOLDER / "episodes" / f"{arm}_{family}.jsonl").open("w") as file:
                for key in range(200):
                    turns = [_alfworld_turn(draw, number) for number in range(25)]
                    if (arm, family, key) == ("trained", "put", 199):
                        turns[24]["observation"] += NEEDLE
                    row = {
                        "game": {"env": "alfworld", "family": family, "key": f"{arm}-{key}"},
                        "system_prompt": f"You are in a house. Lesson {key} of {family}.",
                        "turns": turns,
                        "outcome": "success" if key % 4 == 0 else "step_limit",
                        "final_observation": f"Nothing happens. ({key})",
                    }
                    file.write(json.dumps(row) + "\n")
    return folder


def _timed(browser, name, value):
    start = time.monotonic()
    return _choose(browser, name, value), time.monotonic() - start


@pytest.mark.timeout(900)
def test_fifty_thousand_turns_are_shown_and_searched(watched, tmp_path):
    page = _written(_large_run(tmp_path / "run"))
    start = time.monotonic()
    watched.open(page, width=1440)
    times = {"load": time.monotonic() - start}
    data = "JSON.parse(document.getElementById('episodes-data').textContent)"
    assert watched.run(
        f"{data}.episodes.reduce((sum, [, texts]) => sum + (texts.length - 3) / 4, 0)"
    ) == 50_000  # fmt: skip
    assert watched.run(f"{data}.strings.length") > 100_000  # observations and replies differ
    assert watched.run("document.getElementById('episodes').innerText.includes("
                       "'2,000 episodes with 50,000 turns')")  # fmt: skip
    assert not watched.run("document.body.innerText.includes('did not fit')")
    assert watched.run("document.getElementById('episode-count').textContent") == (
        "1 to 25 of 2000 episodes"
    )
    for name, value, count in (
        ("arm", "trained", 1000),
        ("family", "put", 200),
        ("outcome", "success", 50),
        ("text", NEEDLE, 0),
        ("outcome", "step limit", 1),
        ("text", "SALTSHAKER", 1),
        ("family", "", 1),
    ):
        said, times[f"{name} {value}"] = _timed(watched, name, value)
        assert said.endswith(f"{count} episode{'s' * (count != 1)}")
    watched.run("document.querySelector('#episode-list a').click()")
    watched.run("new Promise(done => setTimeout(done))")  # behind the event of the link
    assert watched.run("document.querySelectorAll('#episode-view .turn').length") == 25 + 1
    assert watched.run(
        "[...document.querySelectorAll('#episode-view mark')].map(m => m.innerText)"
    ) == ["saltshaker"]
    print(f"{page.stat().st_size / 1e6:.1f} MB", times)
    assert max(times.values()) < 120  # seconds; it hangs then


CONTRAST = """(() => {
    const level = (colour) => {
        const [r, g, b] = colour.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const faint = new Set();
    for (const element of document.querySelectorAll("body *")) {
        if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
        if (element.closest("script, style, :disabled") || !element.checkVisibility()) continue;
        const style = getComputedStyle(element);
        const ink = parse(element instanceof SVGElement ? style.fill : style.color);
        let under = element;
        while (under && (parse(getComputedStyle(under).backgroundColor)[3] ?? 1) === 0) under = under.parentElement;
        const ground = parse(getComputedStyle(under ?? document.body).backgroundColor);
        const [low, high] = [level(ink), level(ground)].sort((a, b) => a - b);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < 4.5) faint.add(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
    }
    return [...faint];
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_and_tables_can_be_heard(watched, run, dark):
    watched.open(_written(run), width=1440, dark=dark, part="#episode=0,9")
    watched.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert watched.run(CONTRAST) == []
    assert watched.run("document.querySelectorAll('th:not([scope])').length") == 0
    assert watched.run("document.querySelectorAll('table:not(:has(caption))').length") == 0
    assert watched.run("document.querySelectorAll('svg:not([aria-label])').length") == 0
