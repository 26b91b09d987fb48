"""The report as one self-contained HTML page: text, tables and inline figures; no script, no font
or image from anywhere else.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import report_figures
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
from experiments.wording import interval, p_value, percent, points

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
    tiles = joined(_tile(split) for split in splits)
    first, *others = headlines(run.evaluations)
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
        for arm, cell in split.overall["arms"].items()
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
    names = [arm for arm in ARMS if any(arm in split.overall["arms"] for split in splits)]
    head = joined(html("<th>{}{}</th>", _dot(arm), arm) for arm in names)
    rows = []
    for split in splits:
        rows.append(
            html(
                '<tr class="group"><td colspan="{}">{}</td></tr>',
                len(names) + 7,
                split.title.capitalize(),
            )
        )
        for name, family in split.families.items():
            rows.append(_row(Html("<tr>"), name, family, names))
        rows.append(_row(Html('<tr class="pooled">'), "all families", split.overall, names))
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
            "<th>trained - untrained</th><th>p</th><th>n</th><th>verdict</th></tr></thead>"
            "<tbody>{}</tbody></table></div>",
            head,
            joined(rows),
        ),
        Html(
            '<p class="lead" style="margin:12px 0 0">Per cent of games won under the last prompt of'
            " a loop of reflection (a run). p: two-sided, of the paired difference, by Holm's"
            " correction for the families of a split; that of all families is tested alone. n:"
            " trained seeds, or the runs of a single one, which are what the test counts. What may"
            " be claimed is decided by p alone, never by an interval.</p>"
        ),
        joined(_comparisons(split) for split in splits),
        joined(_arms(split) for split in splits),
        _evaluation_faults(evaluation),
    )


def _row(start: Html, name: str, numbers: Json, arms: Sequence[str]) -> Html:
    return html(
        "{}<td>{}</td><td>{}</td><td>{}</td>{}{}</tr>",
        start,
        name,
        numbers["games"],
        numbers["runs"],
        _arm_cells(numbers["arms"], arms),
        _test_cells(numbers["tests"].get("trained_vs_untrained")),
    )


def _comparisons(split: SplitSummary) -> Html:
    """All comparisons of a split, each with the reason of its verdict."""
    rows = joined(
        html(
            '<tr><td>{}</td>{}<td>{:.0f} %</td><td class="reason">{}</td></tr>',
            name.replace("_vs_", " - "),
            _test_cells(test),
            100 * test["improvement"],
            test["reason"],
        )
        for name, test in split.overall["tests"].items()
    )
    return html(
        "<details{}><summary>Comparisons on the {}</summary>"
        '<div class="scroll"><table><thead><tr><th>arms</th><th>difference</th><th>p</th><th>n</th>'
        "<th>verdict</th><th>wins more, of pairs</th><th>reason</th></tr></thead>"
        "<tbody>{}</tbody></table></div></details>",
        Html(" open") if split.name != "train" else "",
        split.title,
        rows,
    )


def _arms(split: SplitSummary) -> Html:
    """Every arm of a split, with what stands beside the headline's number."""
    rows = joined(
        html(
            "<tr><td>{}</td>{}<td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            arm,
            _arm_cells(split.overall["arms"], [arm]),
            html("{} {}", percent(cell["chosen"]["mean"]), _ci(cell["chosen"]["ci95"])),
            percent(cell["area"]),
            "" if cell["sd_runs"] is None else percent(cell["sd_runs"]),
            "not measured" if cell["sd_seeds"] is None else percent(cell["sd_seeds"]),
        )
        for arm, cell in split.overall["arms"].items()
    )
    return html(
        "<details><summary>Arms on the {}</summary>"
        '<div class="scroll"><table><thead><tr><th>arm</th><th>last prompt</th><th>chosen prompt'
        "</th><th>mean over meta-turns</th><th>spread of runs</th><th>spread of trained seeds</th>"
        "</tr></thead><tbody>{}</tbody></table></div></details>",
        split.title,
        rows,
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
        html("<td>{} {}</td>", percent(arms[arm]["mean"]), _ci(arms[arm]["ci95"]))
        if arm in arms
        else Html("<td></td>")
        for arm in names
    )


def _ci(ends: Sequence[float]) -> Html:
    return html('<span class="ci">{}</span>', interval(ends))


def _test_cells(test: Json | None) -> Html:
    if test is None:
        return Html("<td></td><td></td><td></td><td></td>")
    tone = {"better": "badge good", "worse": "badge bad"}.get(test["verdict"], "badge")
    return html(
        '<td>{} <span class="ci">{}</span></td><td>{}</td><td>{}</td>'
        '<td><span class="{}" title="{}">{}</span></td>',
        points(test["difference"]),
        interval(test["ci95"], signed=True),
        p_value(test["p_corrected"]),
        test["num_units"],
        tone,
        test["reason"],
        test["verdict"],
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
