"""The report as one self-contained HTML page: text, tables and inline figures; no script, no font
or image from anywhere else.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments import report_figures, stats
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
    body = "\n".join(
        part
        for part in (
            _header(run, splits),
            *(_results(run, evaluation) for evaluation in run.evaluations),
            "" if run.evaluations else _no_results(),
            _training(run),
            *(
                section(evaluation)
                for evaluation in run.evaluations
                for section in (_prompts, _games)
            ),
            _timings(run),
            _manifest(run),
        )
        if part
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.folder.resolve().name)} - ictjax"
        f" report</title>\n<style>\n{_CSS.read_text(encoding='utf-8')}</style>\n"
        f"</head>\n<body>\n<main>\n{body}\n"
        "<footer>Made by <code>ictjax report</code> from the files of the run"
        " directory.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


# Numbers as text, for the page and the terminal.


def percent(value: float) -> str:
    """0.417 -> 42"""
    return f"{100 * value:.0f}"


def points(value: float) -> str:
    """0.417 -> +42"""
    return f"{100 * value:+.0f}"


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


def _sentence(split: SplitSummary, test: Json) -> str:
    trained, untrained = split.arms["trained"], split.arms["untrained"]
    low, high = test["ci95"]
    verdict = "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
    return (
        f"On the {split.title}, prompts of the trained reflector win {percent(trained['mean'])} %"
        f" of the games, those of the untrained one {percent(untrained['mean'])} %: {verdict}"
        f" before training ({points(test['difference'])} points, 95 % interval {points(low)} to"
        f" {points(high)})."
    )


# Sections.


def _header(run: RunData, splits: Sequence[SplitSummary]) -> str:
    total = run.config.get("iterations")
    done = run.metrics[-1]["iteration"] if run.metrics else 0
    kicker = [
        f"ictjax run <b>{escape(run.folder.resolve().name)}</b>",
        f"{done} of {total} iterations" if total else f"{done} iterations",
    ]
    if "seed" in run.config:
        kicker.append(f"seed {run.config['seed']}")
    if games := games_played(run.manifest.get("environment", {})):
        kicker.append(f"trained on {escape(games)}")
    if families := sum(len(evaluation.families) for evaluation in run.evaluations):
        kicker.append(f"{families} families evaluated")
    tiles = "".join(_tile(split) for split in splits if split.arms)
    first, *others = headlines(splits)
    return (
        f'<header><p class="kicker">{" &nbsp;·&nbsp; ".join(kicker)}</p><h1>{escape(first)}</h1>'
        + "".join(f'<p class="lead">{escape(other)}</p>' for other in others)
        + (f'<div class="tiles">{tiles}</div>' if tiles else "")
        + (f'<p class="note">{escape(POCKET_NOTE)}</p>' if run.pocket else "")
        + "</header>"
    )


def _tile(split: SplitSummary) -> str:
    cells = "".join(
        f'<div><div class="label"><span class="dot arm-{arm}"></span>{_ARM_TEXTS[arm]}</div>'
        f'<div class="value">{percent(cell["mean"])} %</div>'
        f'<div class="detail">{percent(cell["ci95"][0])} to {percent(cell["ci95"][1])}</div></div>'
        for arm, cell in split.arms.items()
    )
    return (
        f'<div class="tile"><h3>{escape(split.title.capitalize())}: games won</h3><div'
        f' class="values">{cells}</div></div>'
    )


def _no_results() -> str:
    return _section(
        "Results",
        "No evaluation.json yet: run <code>ictjax evaluate</code> on this directory,"
        " then report again.",
    )


def _checkpoint(run: RunData, evaluation: Evaluation) -> str:
    """Which checkpoint was evaluated, unless it is the last of the run; and what had changed."""
    step = evaluation.checkpoint
    early = step not in (None, run.config.get("iterations"))
    return (f"Of iteration {escape(str(step))}. " if early else "") + "".join(
        f"<b>Changed since training: {escape(str(change))}.</b> " for change in evaluation.changes
    )


def _results(run: RunData, evaluation: Evaluation) -> str:
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
    head = "".join(f'<th><span class="dot arm-{arm}"></span>{arm}</th>' for arm in names)
    rows = []
    for split in splits:
        rows.append(
            '<tr class="group"><td'
            f' colspan="{len(names) + 6}">{escape(split.title.capitalize())}</td></tr>'
        )
        for name, family in split.families.items():
            size = f"<td>{family.get('games', '')}</td><td>{family.get('runs', '')}</td>"
            test = family.get("tests", {}).get("trained_vs_untrained")
            rows.append(
                f"<tr><td>{escape(name)}</td>{size}{_arm_cells(family['arms'], names)}"
                f"{_test_cells(test, adjusted.get(name))}</tr>"
            )
        rows.append(
            '<tr class="pooled"><td>all'
            f" runs</td><td>{split.games or ''}</td><td>{split.runs or ''}</td>"
            f"{_arm_cells(split.arms, names)}{_test_cells(split.test, None)}</tr>"
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
    legend = " &nbsp; ".join(
        f'<span class="dot arm-{arm}"></span>{_ARM_TEXTS[arm]}' for arm in names
    )
    games = games_played(evaluation.environment)
    return _section(
        f"Results{_on(evaluation)}",
        (f"Measured on {escape(games)}. " if games else "")
        + _checkpoint(run, evaluation)
        + f"Games won per family, with 95 % intervals: {legend}. All arms play the same games, so"
        " their differences are paired. No test game has an initial state that training or"
        " reflection has seen.",
        f'<div class="figure">{bars}</div>',
        '<div class="scroll"><table><thead><tr><th>family</th><th>games</th><th>runs</th>'
        f"{head}<th>trained - untrained</th><th>p</th><th>p,"
        f" Holm</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>",
        '<p class="lead" style="margin:12px 0 0">Per cent of games won. p: two-sided, of the paired'
        " difference; Holm: corrected for testing every family. A run is one loop of reflection;"
        " its value is the share of its test games that the last prompt of the loop wins.</p>",
        _evaluation_faults(evaluation),
    )


def _evaluation_faults(evaluation: Evaluation) -> str:
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


def _badges(counts: Mapping[str, float]) -> str:
    badges = " ".join(
        f'<span class="badge">{escape(text)}: <b>{value:,.0f}</b></span>'
        for text, value in counts.items()
    )
    return f'<p style="margin:10px 0 0">{badges}</p>' if badges else ""


def _arm_cells(arms: Mapping[str, Json], names: Sequence[str]) -> str:
    return "".join(
        (
            f"<td>{percent(arms[arm]['mean'])} <span"
            f' class="ci">{interval(arms[arm]["ci95"])}</span></td>'
            if arm in arms
            else "<td></td>"
        )
        for arm in names
    )


def _test_cells(test: Json | None, adjusted: float | None) -> str:
    if test is None:
        return "<td></td><td></td><td></td>"
    tone = " class='good'" if test["ci95"][0] > 0 else " class='bad'" if test["ci95"][1] < 0 else ""
    return (
        f"<td><span{tone}>{points(test['difference'])}</span> <span"
        f' class="ci">{interval(test["ci95"], signed=True)}</span></td>'
        f"<td>{escape(p_value(test['p']))}</td>"
        f"<td>{'' if adjusted is None else escape(p_value(adjusted))}</td>"
    )


def _training(run: RunData) -> str:
    if not run.metrics:
        return _section("Training", "No finished iteration yet.")
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
        "Mean reward of the candidate prompts in each iteration. Replayed games are those the"
        " reflector has just read about; fresh ones are other games of the same family. Dots:"
        " iterations; lines: exponential moving average.",
        f'<div class="figure">{curve}</div>',
        f'<div class="figure">{small}</div>' if small else "",
        _faults(run),
    )


def _faults(run: RunData) -> str:
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


def _prompts(evaluation: Evaluation) -> str:
    pairs = prompt_pairs(evaluation, 3)
    if not pairs:
        return ""
    blocks = []
    for pair in pairs:
        before, after = _marked(
            str(pair.before.get("system_prompt")), str(pair.after.get("system_prompt"))
        )
        blocks.append(
            f"<h3>{escape(pair.family)} {_split_badge(evaluation, pair.family)}</h3><div"
            f" class='pair'>{_prompt('untrained', pair.before, before)}"
            f"{_prompt('trained', pair.after, after)}</div>"
        )
    return _section(
        f"The prompt, before and after training{_on(evaluation)}",
        "What the reflector wrote for the actor after reading the same games: a typical loop of the"
        " family (the middle one by what its trained prompt won). Sentences that only one side has"
        " are marked.",
        *blocks,
    )


def _prompt(arm: str, row: Json, text: str) -> str:
    success = row.get("success")
    badge = (
        ""
        if not isinstance(success, (int, float))
        else f' <span class="badge">wins {percent(success)} %</span>'
    )
    analysis = (
        ""
        if not row.get("analysis")
        else (
            "<details><summary>its"
            f" analysis</summary><pre>{escape(str(row['analysis']))}</pre></details>"
        )
    )
    return (
        '<div><h3><span class="dot'
        f' arm-{arm}"></span>{_ARM_TEXTS[arm]}{badge}</h3><pre>{text}</pre>{analysis}</div>'
    )


def _marked(before: str, after: str) -> tuple[str, str]:
    """Both prompts as HTML, the sentences marked that the other lacks."""
    first, second = _sentences(before), _sentences(after)
    shown: tuple[list[str], list[str]] = ([], [])
    for tag, a, b, c, d in difflib.SequenceMatcher(
        a=[s.strip() for s in first], b=[s.strip() for s in second], autojunk=False
    ).get_opcodes():
        for out, part in ((shown[0], first[a:b]), (shown[1], second[c:d])):
            out += [
                (
                    escape(s)
                    if tag == "equal" or not s.strip()
                    else f"<mark>{escape(s.rstrip())}</mark>{s[len(s.rstrip()) :]}"
                )
                for s in part
            ]
    return "".join(shown[0]), "".join(shown[1])


def _sentences(text: str) -> list[str]:
    """Sentences and lines, each with the space behind it."""
    return [part for part in re.split(r"(?<=[.!?]\s)|(?<=\n)", text) if part]


def _games(evaluation: Evaluation) -> str:
    pairs = game_pairs(evaluation, 4)
    if not pairs:
        return ""
    blocks = [
        f"<details{' open' if index == 0 else ''}><summary>{escape(pair.family)}"
        f" {_split_badge(evaluation, pair.family)}</summary>"
        f"<div class='pair'>{_trajectory('initial', pair.before)}"
        f"{_trajectory('trained', pair.after)}</div></details>"
        for index, pair in enumerate(pairs)
    ]
    return _section(
        f"The same game, before and after{_on(evaluation)}",
        "Lost under the initial prompt, won under a prompt that the trained reflector wrote.",
        *blocks,
    )


def _action_shown(turn: Mapping[str, Any]) -> str:
    return turn["action"] or f"(no usable action: {turn.get('failure')})"


def _trajectory(arm: str, trajectory: Json) -> str:
    won = trajectory["outcome"] == "success"
    turns = "".join(
        f'<div class="turn"><div class="step">turn {number}</div><pre'
        f' class="map">{escape(turn["observation"])}</pre>'
        + (f'<div class="thought">{escape(turn["thought"])}</div>' if turn.get("thought") else "")
        + f'<div class="act">&rarr; {escape(_action_shown(turn))}</div></div>'
        for number, turn in enumerate(trajectory["turns"], start=1)
    )
    return (
        f'<div><h3><span class="dot arm-{arm}"></span>{_ARM_TEXTS[arm]} '
        '<span class="badge'
        f' {"good" if won else "bad"}">{escape(trajectory["outcome"].replace("_", " "))}, '
        f"{len(trajectory['turns'])} turns</span></h3>"
        "<details><summary>system"
        f" prompt</summary><pre>{escape(trajectory['system_prompt'])}</pre></details>{turns}"
        '<div class="turn"><div class="step">end</div><pre'
        f' class="map">{escape(trajectory["final_observation"])}</pre></div></div>'
    )


def _timings(run: RunData) -> str:
    seconds = phase_seconds(run.metrics)
    total = sum(seconds.values())
    if total <= 0:
        return ""
    shades = ("--trained", "--fresh", "--untrained", "--initial", "--muted", "--line")
    bar = "".join(
        f'<span style="flex:{value / total:.4f};background:var({shades[min(n, len(shades) - 1)]})"'
        f' title="{escape(name)}"></span>'
        for n, (name, value) in enumerate(seconds.items())
    )
    rows = "".join(
        '<tr><td><span class="dot"'
        f' style="background:var({shades[min(n, len(shades) - 1)]})"></span>'
        f"{escape(name.replace('_', ' '))}</td><td>{value:,.1f}</td>"
        f"<td>{value / len(run.metrics):,.2f}</td><td>{100 * value / total:.0f} %</td></tr>"
        for n, (name, value) in enumerate(seconds.items())
    )
    return _section(
        "Where the time went",
        f"{_duration(total)} of training in {len(run.metrics)} iterations.",
        f'<div class="stack">{bar}</div><div'
        ' class="scroll"><table><thead><tr><th>phase</th><th>seconds</th><th>per'
        f" iteration</th><th>share</th></tr></thead><tbody>{rows}</tbody></table></div>",
    )


def _manifest(run: RunData) -> str:
    if not run.manifest and not run.config:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{_value(value)}</td></tr>"
        for name, value in run.manifest.items()
    )
    table = (
        f'<div class="scroll"><table class="plain"><tbody>{rows}</tbody></table></div>'
        if rows
        else ""
    )
    config = (
        "<details><summary>config.json</summary>"
        f"<pre>{escape(json.dumps(run.config, indent=2, ensure_ascii=False))}</pre></details>"
        if run.config
        else ""
    )
    return _section("The run", "What is needed to run it again.", table, config)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return escape(", ".join(f"{name} {item}" for name, item in value.items()))
    if isinstance(value, (list, tuple)):
        return escape(" ".join(str(item) for item in value))
    return escape(str(value))


def _on(evaluation: Evaluation) -> str:
    """The end of a heading: which task, when it is not the one trained on."""
    return f", on {evaluation.label}" if evaluation.label else ""


def _split_badge(evaluation: Evaluation, family: str) -> str:
    return (
        '<span class="badge">held out</span>'
        if evaluation.families.get(family, {}).get("split") == "heldout"
        else ""
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _section(title: str, lead: str, *parts: str) -> str:
    """`lead` and `parts` are HTML."""
    return f'<section><h2>{escape(title)}</h2><p class="lead">{lead}</p>{_joined(parts)}</section>'


def _joined(parts: Iterable[str]) -> str:
    return "\n".join(part for part in parts if part)
