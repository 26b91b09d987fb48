"""The report as one self-contained HTML page: text, tables, figures and one script of its own;
nothing is fetched from anywhere, and the page forbids it.
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.html import Html, html, joined
from experiments.report_analyses import analyses
from experiments.report_data import (
    Evaluation,
    RunData,
    SplitSummary,
    games_played,
    plays_pocket,
    split_summaries,
    trainings,
)
from experiments.report_episodes import Episodes, viewer
from experiments.report_lineage import lineage, same_games
from experiments.report_loops import loops
from experiments.report_parts import (
    ARM_TEXTS,
    Section,
    details,
    row,
    section,
    table,
    verdict_badge,
)
from experiments.report_results import curves, results
from experiments.report_training import cost, rewards, signal
from experiments.wording import counted, interval, percent, points

POCKET_NOTE = (
    "The actor and the reflector here are pocket models: small networks that ship with the"
    " package to show the whole system on two CPU cores. Their numbers say that the machinery"
    " works; they are never evidence about language models."
)
_CSS, _SCRIPT = (Path(__file__).with_name(f"report.{kind}") for kind in ("css", "js"))


def render(run: RunData) -> str:
    """The whole page."""
    script = _SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sections = [one for one in _sections(run) if one is not None]
    contents = joined(
        html('<li><a href="#{}">{}</a></li>', one.anchor, one.title) for one in sections
    )
    return html(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
        " style-src 'unsafe-inline'; script-src 'sha256-{}'\">\n"
        "<title>{} - ictjax report</title>\n<style>\n{}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the report</a>\n{}\n'
        '<nav aria-label="Contents"><ol>{}</ol></nav>\n<main id="main">\n{}\n</main>\n'
        "<footer>Made by <code>ictjax report</code> from the files of the run directory."
        "</footer>\n<script>{}</script>\n</body>\n</html>\n",
        digest,
        run.folder.resolve().name,
        Html(_CSS.read_text(encoding="utf-8")),
        _header(run),
        contents,
        joined((one.body for one in sections), "\n"),
        Html(script),
    ).markup


def headlines(evaluations: Sequence[Evaluation]) -> list[str]:
    """The claim of every evaluation in words, that on the task trained on first."""
    texts = [
        evaluation.results["headline"]["text"]
        for evaluation in evaluations
        if evaluation.results["headline"] is not None
    ]
    return texts or [
        "No evaluation of the trained and the untrained reflector yet: this page shows the"
        " training so far."
    ]


def _sections(run: RunData) -> Iterator[Section | None]:
    episodes = Episodes(run)
    if not run.evaluations:
        yield _no_results(run)
    of_each = [(evaluation, loops(evaluation)) for evaluation in run.evaluations]
    # the first evaluation's anchors are the plain words
    endings = ["", *(f"-{number}" for number in range(2, len(of_each) + 1))]
    for (evaluation, found), ending in zip(of_each, endings, strict=False):
        yield results(run, evaluation, f"results{ending}")
        yield curves(evaluation, found, f"meta-turns{ending}")
    for (evaluation, found), ending in zip(of_each, endings, strict=False):
        yield lineage(evaluation, found, episodes, f"lineage{ending}")
        yield same_games(evaluation, episodes, f"same-games{ending}")
        yield analyses(evaluation, found, f"analyses{ending}")
    yield viewer(run, episodes)
    trained, absent = trainings(run)
    yield rewards(run, trained, absent)
    yield signal(run, trained)
    yield cost(trained)
    yield _manifest(run)


def _header(run: RunData) -> Html:
    total = run.config.get("iterations")
    done = run.metrics[-1]["iteration"] if run.metrics else 0
    several = [
        len(names)
        for evaluation in run.evaluations
        if isinstance(names := evaluation.results["protocol"].get("run_dirs"), list)
    ]
    if "adopted" in run.manifest:
        trained = html("reflector trained elsewhere")
    elif several and not run.metrics and not run.config:
        trained = html("{}", counted(max(several), "trained seed"))
    elif isinstance(total, int) and total:
        trained = html("{} of {}", done, counted(total, "iteration"))
    else:
        trained = html("{}", counted(done, "iteration"))
    kicker = [html("ictjax run <b>{}</b>", run.folder.resolve().name), trained]
    if "seed" in run.config:
        kicker.append(html("seed {}", run.config["seed"]))
    if games := games_played(run.manifest.get("environment", {})):
        kicker.append(html("trained on {}", games))
    if families := sum(len(evaluation.families) for evaluation in run.evaluations):
        kicker.append(html("{} evaluated", counted(families, "family", "families")))
    claims = [
        evaluation.results["headline"]
        for evaluation in run.evaluations
        if evaluation.results["headline"] is not None
    ]
    first, *others = headlines(run.evaluations)
    tiles = joined(
        _tile(split) for evaluation in run.evaluations for split in split_summaries(evaluation)
    )
    return html(
        '<header><p class="kicker">{}</p>{}<h1>{}</h1>{}{}{}</header>',
        joined(kicker, " &nbsp;\u00b7&nbsp; "),
        html('<p class="verdict">{}</p>', verdict_badge(claims[0]["verdict"]))
        if claims
        else Html(""),
        first,
        joined(html('<p class="lead">{}</p>', other) for other in others),
        html('<div class="tiles">{}</div>', tiles) if tiles else tiles,
        html('<p class="note">{}</p>', POCKET_NOTE) if plays_pocket(run) else Html(""),
    )


def _tile(split: SplitSummary) -> Html:
    cells = (
        html(
            '<div style="--c:var(--{})"><div class="label"><span class="key"></span>{}</div>'
            '<div class="value">{} %</div><div class="detail">{} to {}</div></div>',
            arm,
            text,
            percent(found["mean"]),
            percent(found["ci95"][0]),
            percent(found["ci95"][1]),
        )
        for arm, text in reversed(ARM_TEXTS.items())
        for found in [split.overall["arms"].get(arm)]
        if found
    )
    return html(
        '<div class="tile"><p class="title">{}: games won</p><div class="values">{}</div>{}</div>',
        split.title.capitalize(),
        joined(cells),
        _best_other(split),
    )


def _best_other(split: SplitSummary) -> Html:
    """Which of the arms without a number in the tile won most, and what trained is against it."""
    others = {arm: of for arm, of in split.overall["arms"].items() if arm not in ARM_TEXTS}
    if not others:
        return Html("")
    best = max(others, key=lambda arm: others[arm]["mean"])
    test = split.overall["tests"].get(f"trained_vs_{best}")
    against = (
        html(
            "; trained - {}: {} {}, {}",
            best,
            points(test["difference"]),
            interval(test["ci95"], signed=True),
            test["verdict"],
        )
        if test
        else Html("")
    )
    return html(
        '<p class="detail">{}{} %{}.</p>',
        f"Of {len(others)} other arms {best} won most: "
        if len(others) > 1
        else f"The other arm, {best}: ",
        percent(others[best]["mean"]),
        against,
    )


def _no_results(run: RunData) -> Section:
    return section(
        "results",
        "Results",
        html(
            "No evaluation.json yet: run the evaluation, then report again.<pre>{}</pre>",
            f"ictjax evaluate --run-dir {shlex.quote(_named(run))}",
        ),
    )


def _named(run: RunData) -> str:
    """The run directory as it was given to training: what is read here may be a copy of it."""
    words = _argv(run)
    if "--run-dir" in words[:-1]:
        return words[words.index("--run-dir") + 1]
    return str(run.folder)


def _argv(run: RunData) -> list[str]:
    words = run.manifest.get("argv")
    return [str(word) for word in words[1:]] if isinstance(words, list) else []


def _manifest(run: RunData) -> Section | None:
    if not run.manifest and not run.config:
        return None
    argv = _argv(run)
    rows = [
        row(_breakable(str(name)), html('<td class="text">{}</td>', _value(value)))
        for name, value in run.manifest.items()
        if name != "argv" or not argv
    ]
    return section(
        "run",
        "The run",
        Html("What is needed to run it again."),
        html("<pre>ictjax {}</pre>", shlex.join(argv)) if argv else Html(""),
        html('<div class="plain">{}</div>', table("manifest.json", ["what", "value"], rows))
        if rows
        else Html(""),
        details(
            "config.json",
            html("<pre>{}</pre>", json.dumps(run.config, indent=2, ensure_ascii=False)),
        )
        if run.config
        else Html(""),
    )


def _breakable(name: str) -> Html:
    """A name with places where a line may end."""
    return Html("_<wbr>".join(html("{}", part).markup for part in name.split("_")))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return _plain(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
