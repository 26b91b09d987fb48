"""The report as one self-contained HTML page: text, tables and inline figures; no script, no font
or image from anywhere else.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import report_figures, stats
from experiments.html import Html, html, joined
from experiments.report_data import (
    ARMS,
    Evaluation,
    Json,
    RunData,
    SplitSummary,
    counter_total,
    game_pairs,
    games_played,
    phase_seconds,
    prompt_pairs,
    series,
    split_summaries,
)

POCKET_NOTE = (
    "The actor and the reflector of this run are pocket models: small networks that ship with the"
    " package to show the whole system on two CPU cores. Their numbers say that the machinery"
    " works; they are never evidence about language models."
)
_ARM_TEXTS = {
    "initial": "initial prompt",
    "untrained": "untrained reflector",
    "trained": "trained reflector",
}
_CSS = Path(__file__).with_name("report.css")


def render(run: RunData) -> str:
    """The whole page."""
    splits = [split for evaluation in run.evaluations for split in split_summaries(evaluation)]
    parts = (
        _header(run, splits),
        *(_results(run, evaluation) for evaluation in run.evaluations),
        Html("") if run.evaluations else _no_results(),
        _training(run),
        *(section(evaluation) for evaluation in run.evaluations for section in (_prompts, _games)),
        _timings(run),
        _manifest(run),
    )
    return html(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>{} - ictjax report</title>\n<style>\n{}</style>\n</head>\n<body>\n<main>\n{}\n"
        "<footer>Made by <code>ictjax report</code> from the files of the run"
        " directory.</footer>\n</main>\n</body>\n</html>\n",
        run.folder.resolve().name,
        Html(_CSS.read_text(encoding="utf-8")),
        joined(parts, "\n"),
    ).markup


# Numbers as text, for the page and the terminal.


def percent(value: float) -> str:
    """0.417 -> 42"""
    return f"{100 * value:.0f}"


def points(value: float) -> str:
    """0.417 -> +42; -0.001 -> +0"""
    text = f"{100 * value:+.0f}"
    return "+0" if text == "-0" else text


def interval(ci: Sequence[float], *, signed: bool = False) -> str:
    """[0.3, 0.5] -> [30, 50]; signed: [+30, +50]"""
    return f"[{', '.join((points if signed else percent)(value) for value in ci)}]"


def p_value(p: float) -> str:
    """0.0123 -> 0.012; tiny values are bounded, not written out."""
    return "<1e-4" if p < 0.0001 else f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def headlines(splits: Sequence[SplitSummary]) -> list[str]:
    """The result in one sentence, with the interval; then one for every other benchmark."""
    complete = [
        (split, split.test)
        for split in splits
        if split.test is not None and {"trained", "untrained"} <= split.arms.keys()
    ]
    if not complete:
        return [
            "No evaluation of the trained and the untrained reflector yet: this page shows the"
            " training so far."
        ]
    return [
        _sentence(split, test)
        for n, (split, test) in enumerate(complete)
        if n == 0 or split.name == "transfer"
    ]


def _verdict(test: Json) -> int:
    """1 for better, -1 for worse, 0 for neither: by the interval, unless p says that so few runs
    can come out like that by chance (one run has an interval of no width).
    """
    low, high = test["ci95"]
    return 0 if test["p"] >= 0.05 else 1 if low > 0 else -1 if high < 0 else 0


def _sentence(split: SplitSummary, test: Json) -> str:
    trained, untrained = split.arms["trained"], split.arms["untrained"]
    low, high = test["ci95"]
    verdict = {1: "better than", -1: "worse than"}.get(_verdict(test), "not distinguishable from")
    return (
        f"On the {split.title}, prompts of the trained reflector win {percent(trained['mean'])} %"
        f" of the games, those of the untrained one {percent(untrained['mean'])} %: {verdict}"
        f" before training ({points(test['difference'])} points, 95 % interval {points(low)} to"
        f" {points(high)})."
    )


# Sections.


def _header(run: RunData, splits: Sequence[SplitSummary]) -> Html:
    total = run.config.get("iterations")
    done = run.metrics[-1]["iteration"] if run.metrics else 0
    kicker = [
        html("ictjax run <b>{}</b>", run.folder.resolve().name),
        html("{} of {} iterations", done, total) if total else html("{} iterations", done),
    ]
    if "seed" in run.config:
        kicker.append(html("seed {}", run.config["seed"]))
    if games := games_played(run.manifest.get("environment", {})):
        kicker.append(html("trained on {}", games))
    if families := sum(len(evaluation.families) for evaluation in run.evaluations):
        kicker.append(html("{} families evaluated", families))
    tiles = joined(_tile(split) for split in splits if split.arms)
    first, *others = headlines(splits)
    return html(
        '<header><p class="kicker">{}</p><h1>{}</h1>{}{}{}</header>',
        joined(kicker, " &nbsp;\u00b7&nbsp; "),
        first,
        joined(html('<p class="lead">{}</p>', other) for other in others),
        html('<div class="tiles">{}</div>', tiles) if tiles else Html(""),
        html('<p class="note">{}</p>', POCKET_NOTE) if run.pocket else Html(""),
    )


def _dot(arm: str) -> Html:
    return html('<span class="dot arm-{}"></span>', arm)


def _tile(split: SplitSummary) -> Html:
    cells = (
        html(
            '<div><div class="label">{}{}</div><div class="value">{} %</div>'
            '<div class="detail">{} to {}</div></div>',
            _dot(arm),
            _ARM_TEXTS[arm],
            percent(cell["mean"]),
            percent(cell["ci95"][0]),
            percent(cell["ci95"][1]),
        )
        for arm, cell in split.arms.items()
        if arm in _ARM_TEXTS
    )
    return html(
        '<div class="tile"><h3>{}: games won</h3><div class="values">{}</div></div>',
        split.title.capitalize(),
        joined(cells),
    )


def _no_results() -> Html:
    return _section(
        "Results",
        Html(
            "No evaluation.json yet: run <code>ictjax evaluate</code> on this directory,"
            " then report again."
        ),
    )


def _checkpoint(run: RunData, evaluation: Evaluation) -> Html:
    """Which checkpoint was evaluated, unless it is the last of the run; and what had changed."""
    step = evaluation.checkpoint
    early = step not in (None, run.config.get("iterations"))
    return html(
        "{}{}",
        f"Of iteration {step}. " if early else "",
        joined(
            html("<b>Changed since training: {}.</b> ", str(change))
            for change in evaluation.changes
        ),
    )


def _results(run: RunData, evaluation: Evaluation) -> Html:
    splits = split_summaries(evaluation)
    names = [
        arm
        for arm in ARMS
        if any(
            arm in family.get("arms", {}) for split in splits for family in split.families.values()
        )
    ]
    adjusted = stats.holm(
        {
            name: family["tests"]["trained_vs_untrained"]["p"]
            for name, family in evaluation.families.items()
            if family.get("tests", {}).get("trained_vs_untrained")
        }
    )
    head = joined(html("<th>{}{}</th>", _dot(arm), arm) for arm in names)
    rows = []
    for split in splits:
        rows.append(
            html(
                '<tr class="group"><td colspan="{}">{}</td></tr>',
                len(names) + 6,
                split.title.capitalize(),
            )
        )
        for name, family in split.families.items():
            rows.append(
                html(
                    "<tr><td>{}</td><td>{}</td><td>{}</td>{}{}</tr>",
                    name,
                    family.get("games", ""),
                    family.get("runs", ""),
                    _arm_cells(family["arms"], names),
                    _test_cells(
                        family.get("tests", {}).get("trained_vs_untrained"), adjusted.get(name)
                    ),
                )
            )
        rows.append(
            html(
                '<tr class="pooled"><td>all runs</td><td>{}</td><td>{}</td>{}{}</tr>',
                split.games or "",
                split.runs or "",
                _arm_cells(split.arms, names),
                _test_cells(split.test, None),
            )
        )
    bars = report_figures.family_bars(
        {
            split.title.capitalize(): {
                name: family["arms"] for name, family in split.families.items()
            }
            for split in splits
        },
        names,
    )
    legend = joined((html("{}{}", _dot(arm), _ARM_TEXTS[arm]) for arm in names), " &nbsp; ")
    games = games_played(evaluation.environment)
    return _section(
        f"Results{_on(evaluation)}",
        html(
            "{}{}Games won per family, with 95 % intervals: {}. All arms play the same games, so"
            " their differences are paired. No test game has an initial state that training or"
            " reflection has seen.",
            f"Measured on {games}. " if games else "",
            _checkpoint(run, evaluation),
            legend,
        ),
        html('<div class="figure">{}</div>', bars),
        html(
            '<div class="scroll"><table><thead><tr><th>family</th><th>games</th><th>runs</th>{}'
            "<th>trained - untrained</th><th>p</th><th>p, Holm</th></tr></thead>"
            "<tbody>{}</tbody></table></div>",
            head,
            joined(rows),
        ),
        Html(
            '<p class="lead" style="margin:12px 0 0">Per cent of games won. p: two-sided, of the'
            " paired difference; Holm: corrected for testing every family. A run is one loop of"
            " reflection; its value is the share of its test games that the last prompt of the loop"
            " wins.</p>"
        ),
        _evaluation_faults(evaluation),
    )


def _evaluation_faults(evaluation: Evaluation) -> Html:
    """What went wrong in the evaluation, by arm; zeros included."""
    texts = {
        "malformed_replies": "malformed replies of the reflector",
        "failed_episodes": "episodes failed by the environment",
    }
    counts = {
        f"{text}, {arm}": sum(
            family.get(key, {}).get(arm, 0) for family in evaluation.families.values()
        )
        for key, text in texts.items()
        for arm in ARMS
        if any(arm in family.get(key, {}) for family in evaluation.families.values())
        and (key, arm) != ("malformed_replies", "initial")
    }
    return _badges(counts)


def _badges(counts: Mapping[str, float]) -> Html:
    badges = joined(
        (
            html('<span class="badge">{}: <b>{:,.0f}</b></span>', text, value)
            for text, value in counts.items()
        ),
        " ",
    )
    return html('<p style="margin:10px 0 0">{}</p>', badges) if badges else badges


def _arm_cells(arms: Mapping[str, Json], names: Sequence[str]) -> Html:
    return joined(
        html(
            '<td>{} <span class="ci">{}</span></td>',
            percent(arms[arm]["mean"]),
            interval(arms[arm]["ci95"]),
        )
        if arm in arms
        else Html("<td></td>")
        for arm in names
    )


def _test_cells(test: Json | None, adjusted: float | None) -> Html:
    if test is None:
        return Html("<td></td><td></td><td></td>")
    tone = {1: "good", -1: "bad"}.get(_verdict(test), "")
    difference = points(test["difference"])
    return html(
        '<td>{} <span class="ci">{}</span></td><td>{}</td><td>{}</td>',
        html('<span class="{}">{}</span>', tone, difference)
        if tone
        else html("<span>{}</span>", difference),
        interval(test["ci95"], signed=True),
        p_value(test["p"]),
        "" if adjusted is None else p_value(adjusted),
    )


def _training(run: RunData) -> Html:
    if not run.metrics:
        return _section("Training", Html("No finished iteration yet."))
    iterations = [record["iteration"] for record in run.metrics]
    per_iteration = run.config.get("meta", {}).get("contexts_per_iteration")
    curve = report_figures.learning_curve(
        iterations, series(run.metrics, "reward_replay"), series(run.metrics, "reward_fresh")
    )
    panels = {
        f"groups without signal{f' (of {per_iteration})' if per_iteration else ''}": series(
            run.metrics, "dead_groups"
        ),
        "KL to the reference": series(run.metrics, "kl"),
        "entropy, nats per token": series(run.metrics, "entropy"),
        "clipped tokens, fraction": series(run.metrics, "clip_fraction"),
        "malformed replies": series(run.metrics, "malformed_candidates"),
        "gradient norm": series(run.metrics, "grad_norm"),
    }
    small = report_figures.small_multiples(iterations, panels)
    return _section(
        "Training",
        Html(
            "Mean reward of the candidate prompts in each iteration. Replayed games are those the"
            " reflector has just read about; fresh ones are other games of the same family. Dots:"
            " iterations; lines: exponential moving average."
        ),
        html('<div class="figure">{}</div>', curve),
        html('<div class="figure">{}</div>', small) if small else small,
        _faults(run),
    )


def _faults(run: RunData) -> Html:
    """Counts of everything that went wrong and was survived; shown even when all are zero, so that
    silence is a statement.
    """
    labels = {
        "episodes": "episodes played",
        "failed_episodes": "episodes failed by the environment",
        "unrewarded_candidates": "candidates without a reward",
        "malformed_candidates": "malformed replies of the reflector",
        "skipped": "updates skipped (not finite)",
    }
    counts = {
        text: sum(value or 0 for value in series(run.metrics, name))
        for name, text in labels.items()
        if any(name in r for r in run.metrics)
    }
    times = [record.get("time", {}) for record in run.metrics]
    for name, text in (
        ("crashes", "worker crashes"),
        ("timeouts", "worker timeouts"),
        ("replays", "episodes replayed"),
    ):
        if any(f"worker_{name}" in time for time in times):
            counts[text] = counter_total(series(times, f"worker_{name}"))
    return _badges(counts)


def _prompts(evaluation: Evaluation) -> Html:
    pairs = prompt_pairs(evaluation, 3)
    if not pairs:
        return Html("")
    blocks = []
    for pair in pairs:
        before, after = _marked(
            str(pair.before.get("system_prompt")), str(pair.after.get("system_prompt"))
        )
        blocks.append(
            html(
                '<h3>{} {}</h3><div class="pair">{}{}</div>',
                pair.family,
                _split_badge(evaluation, pair.family),
                _prompt("untrained", pair.before, before),
                _prompt("trained", pair.after, after),
            )
        )
    return _section(
        f"The prompt, before and after training{_on(evaluation)}",
        Html(
            "What the reflector wrote for the actor after reading the same games: a typical loop of"
            " the family (the middle one by what its trained prompt won). Sentences that only one"
            " side has are marked."
        ),
        *blocks,
    )


def _prompt(arm: str, row: Json, text: Html) -> Html:
    success = row.get("success")
    return html(
        "<div><h3>{}{}{}</h3><pre>{}</pre>{}</div>",
        _dot(arm),
        _ARM_TEXTS[arm],
        html(' <span class="badge">wins {} %</span>', percent(success))
        if isinstance(success, (int, float))
        else Html(""),
        text,
        html(
            "<details><summary>its analysis</summary><pre>{}</pre></details>", str(row["analysis"])
        )
        if row.get("analysis")
        else Html(""),
    )


def _marked(before: str, after: str) -> tuple[Html, Html]:
    """Both prompts, the sentences marked that the other lacks."""
    first, second = _sentences(before), _sentences(after)
    shown: tuple[list[Html], list[Html]] = ([], [])
    for tag, a, b, c, d in difflib.SequenceMatcher(
        a=[s.strip() for s in first], b=[s.strip() for s in second], autojunk=False
    ).get_opcodes():
        for out, part in ((shown[0], first[a:b]), (shown[1], second[c:d])):
            out += [
                html("{}", s)
                if tag == "equal" or not s.strip()
                else html("<mark>{}</mark>{}", s.rstrip(), s[len(s.rstrip()) :])
                for s in part
            ]
    return joined(shown[0]), joined(shown[1])


def _sentences(text: str) -> list[str]:
    """Sentences and lines, each with the space behind it."""
    return [part for part in re.split(r"(?<=[.!?]\s)|(?<=\n)", text) if part]


def _games(evaluation: Evaluation) -> Html:
    pairs = game_pairs(evaluation, 4)
    if not pairs:
        return Html("")
    blocks = [
        html(
            '<details{}><summary>{} {}</summary><div class="pair">{}{}</div></details>',
            Html(" open") if index == 0 else "",
            pair.family,
            _split_badge(evaluation, pair.family),
            _trajectory("initial", pair.before),
            _trajectory("trained", pair.after),
        )
        for index, pair in enumerate(pairs)
    ]
    return _section(
        f"The same game, before and after{_on(evaluation)}",
        Html("Lost under the initial prompt, won under a prompt that the trained reflector wrote."),
        *blocks,
    )


def _action_shown(turn: Mapping[str, Any]) -> str:
    return turn["action"] or f"(no usable action: {turn.get('failure')})"


def _trajectory(arm: str, trajectory: Json) -> Html:
    turns = (
        html(
            '<div class="turn"><div class="step">turn {}</div><pre class="map">{}</pre>{}'
            '<div class="act">&rarr; {}</div></div>',
            number,
            turn["observation"],
            html('<div class="thought">{}</div>', turn["thought"])
            if turn.get("thought")
            else Html(""),
            _action_shown(turn),
        )
        for number, turn in enumerate(trajectory["turns"], start=1)
    )
    return html(
        '<div><h3>{}{} <span class="badge {}">{}, {} turns</span></h3>'
        "<details><summary>system prompt</summary><pre>{}</pre></details>{}"
        '<div class="turn"><div class="step">end</div><pre class="map">{}</pre></div></div>',
        _dot(arm),
        _ARM_TEXTS[arm],
        "good" if trajectory["outcome"] == "success" else "bad",
        str(trajectory["outcome"]).replace("_", " "),
        len(trajectory["turns"]),
        trajectory["system_prompt"],
        joined(turns),
        trajectory["final_observation"],
    )


def _timings(run: RunData) -> Html:
    seconds = phase_seconds(run.metrics)
    total = sum(seconds.values())
    if total <= 0:
        return Html("")
    shades = ("--trained", "--fresh", "--untrained", "--initial", "--muted", "--line")
    coloured = [
        (name, value, shades[min(n, len(shades) - 1)])
        for n, (name, value) in enumerate(seconds.items())
    ]
    bar = joined(
        html(
            '<span style="flex:{:.4f};background:var({})" title="{}"></span>',
            value / total,
            shade,
            name,
        )
        for name, value, shade in coloured
    )
    rows = joined(
        html(
            '<tr><td><span class="dot" style="background:var({})"></span>{}</td><td>{:,.1f}</td>'
            "<td>{:,.2f}</td><td>{:.0f} %</td></tr>",
            shade,
            name.replace("_", " "),
            value,
            value / len(run.metrics),
            100 * value / total,
        )
        for name, value, shade in coloured
    )
    return _section(
        "Where the time went",
        html("{} of training in {} iterations.", _duration(total), len(run.metrics)),
        html(
            '<div class="stack">{}</div><div class="scroll"><table><thead><tr><th>phase</th>'
            "<th>seconds</th><th>per iteration</th><th>share</th></tr></thead>"
            "<tbody>{}</tbody></table></div>",
            bar,
            rows,
        ),
    )


def _manifest(run: RunData) -> Html:
    if not run.manifest and not run.config:
        return Html("")
    rows = joined(
        html("<tr><td>{}</td><td>{}</td></tr>", name, _value(value))
        for name, value in run.manifest.items()
    )
    return _section(
        "The run",
        Html("What is needed to run it again."),
        html(
            '<div class="scroll"><table class="plain"><tbody>{}</tbody></table></div>',
            rows,
        )
        if rows
        else rows,
        html(
            "<details><summary>config.json</summary><pre>{}</pre></details>",
            json.dumps(run.config, indent=2, ensure_ascii=False),
        )
        if run.config
        else Html(""),
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    return str(value)


def _on(evaluation: Evaluation) -> str:
    """The end of a heading: which task, when it is not the one trained on."""
    return f", on {evaluation.label}" if evaluation.label else ""


def _split_badge(evaluation: Evaluation, family: str) -> Html:
    if evaluation.families.get(family, {}).get("split") == "heldout":
        return Html('<span class="badge">held out</span>')
    return Html("")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _section(title: str, lead: Html, *parts: Html) -> Html:
    return html(
        '<section><h2>{}</h2><p class="lead">{}</p>{}</section>', title, lead, joined(parts, "\n")
    )
