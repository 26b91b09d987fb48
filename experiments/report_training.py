"""How training went: rewards, what they were made of, what was lost, and what it cost."""

import statistics
import sys
from collections.abc import Mapping, Sequence

from experiments import report_figures
from experiments.html import Html, html, joined
from experiments.report_data import (
    Json,
    RunData,
    counter_total,
    nested,
    phase_seconds,
    series,
)
from experiments.report_figures import Line, Style, smooth
from experiments.report_parts import Section, badges, cell, row, section, table
from experiments.reward_signal import reward_signal, signal_of_run
from experiments.wording import correlation, counted

Series = Sequence[float | None]

_SIGNAL = {
    "reliability": "reward, and the same from other games (split halves)",
    "replay_and_fresh": "games won on replayed and on fresh games",
    "reward_and_next": "reward, and games won at the next meta-turn",
    "reward_and_words": "reward, and words of the prompt",
}

_KINDS: dict[str, tuple[str, str, Style]] = {
    "replay_reward": ("replayed games", "--trained", "solid"),
    "fresh_reward": ("fresh games", "--fresh", "dashed"),
}


def rewards(run: RunData) -> Section | None:
    """Rewards over the iterations, over all families and by family; None for what several runs
    show together.
    """
    if not run.metrics and not run.config and run.evaluations:
        return None
    if not run.metrics:
        return section("training", "Training", Html("No finished iteration yet."))
    overall = report_figures.line_chart(
        "all families",
        [
            _smoothed(run, *_KINDS["replay_reward"], series(run.metrics, "reward_replay")),
            _smoothed(run, *_KINDS["fresh_reward"], series(run.metrics, "reward_fresh")),
        ],
        x_label="iteration",
    )
    baselines = _baselines(run)
    families = sorted({candidate["family"] for candidate in run.candidates})
    panels = (_family(run, family, baselines.get(family)) for family in families)
    key = list(_KINDS.values())
    if baselines:
        key.append(("initial prompt, as evaluated", "--initial", "dotted"))
    return section(
        "training",
        "Training",
        Html(
            "Mean reward of the candidate prompts in each iteration. Replayed games are those the"
            " reflector has just read about; fresh ones are other games of the same family. Dots:"
            " iterations; lines: exponential moving average; bands: the middle half of the"
            " candidates."
        ),
        report_figures.legend(key),
        html('<div class="charts">{}{}</div>', overall, joined(panels)),
        _faults(run),
    )


def signal(run: RunData) -> Section | None:
    """What the learner had to learn from, and what it did with it; None before the first iteration.
    Of what several runs show together, what rewards were worth.
    """
    worth = _worth(_measured(run))
    if not run.metrics:
        return section("signal", "The signal", worth) if worth.markup else None
    per_iteration = run.config.get("meta", {}).get("contexts_per_iteration")
    replay, fresh = (series(run.metrics, name) for name in ("reward_replay", "reward_fresh"))
    gap = [
        None if seen is None or new is None else seen - new
        for seen, new in zip(replay, fresh, strict=True)
    ]
    panels = {
        f"groups without signal{f' (of {per_iteration})' if per_iteration else ''}": series(
            run.metrics, "dead_groups"
        ),
        "groups thrown away for refills": series(run.metrics, "refill_thrown_away"),
        "reward, replayed over fresh games": gap,
        "different prompts": series(run.metrics, "distinct_prompts"),
        "tokens of a prompt": series(run.metrics, "prompt_tokens"),
        "malformed replies": series(run.metrics, "malformed_candidates"),
        "replies of the reflector cut off": nested(run.metrics, "reflector_failures", "truncated"),
        "replies of the actor cut off": nested(run.metrics, "actor_failures", "truncated"),
        "replies of the actor without action": nested(run.metrics, "actor_failures", "no_action"),
        "KL to the reference": series(run.metrics, "kl"),
        "entropy, nats per token": series(run.metrics, "entropy"),
        "clipped tokens, fraction": series(run.metrics, "clip_fraction"),
        "gradient norm": series(run.metrics, "grad_norm"),
        "sampler against learner, largest gap": nested(run.metrics, "time", "sampler_gap_max"),
    }
    rewarded = [c["reward"] for c in run.candidates if c.get("reward") is not None]
    return section(
        "signal",
        "The signal and what was lost",
        Html(
            "A group whose candidates all have the same reward teaches nothing. The last panel is"
            " how far log-probabilities of sampler and learner are apart at most."
        ),
        html(
            '<div class="charts">{}{}</div>',
            report_figures.histogram("rewards of all candidates", rewarded, x_label="reward"),
            joined(_panel(run, title, values) for title, values in panels.items()),
        ),
        worth,
    )


def _measured(run: RunData) -> Json | None:
    """What rewards were worth: as evaluation.json has it, else of what training has kept so far."""
    for evaluation in run.evaluations:
        if found := evaluation.results.get("analyses", {}).get("reward_signal"):
            return found
    meta = run.config.get("meta", {})
    return reward_signal([signal_of_run(run.folder, meta, last=sys.maxsize)])


def _worth(signal: Json | None) -> Html:
    if signal is None:
        return Html("")
    games = signal["reliability"]["games"]
    needed = signal["reliability"]["games_needed"]
    rows = [
        row(
            text,
            cell(correlation(found["value"])),
            cell(" to ".join(map(correlation, found["ci95"] or ()))),
            cell(f"{found['groups']:,}"),
            cell(found["note"]),
        )
        for name, text in _SIGNAL.items()
        for found in [signal[name]]
    ]
    enough = (
        f"A reward comes from {games} games; a reliability of 0.8 takes {needed:,}."
        if needed is not None
        else f"A reward comes from {games} games; how many would do is not to be told."
    )
    return html(
        '<h3>What rewards were worth</h3><p class="lead">Of {:,} candidates in {:,} groups,'
        " iterations {} to {} of training. Everything is compared within groups, the candidates of"
        " one context; those in which nothing differs say nothing. Split halves: the correlation of"
        " games won in two random halves of the reward's games, taken to all of them (Spearman and"
        " Brown); the others are rank correlations, that with the next meta-turn within families."
        " {}</p>{}",
        signal["candidates"],
        signal["groups"],
        signal["first_iteration"],
        signal["last_iteration"],
        enough,
        table("Correlations", ["of", "r", "95 % interval", "groups", ""], rows),
    )


def cost(run: RunData) -> Section | None:
    """Where the time went, and how fast it was; None where no times were kept."""
    seconds = phase_seconds(run.metrics)
    total = sum(seconds.values())
    if total <= 0:
        return None
    shades = ("--trained", "--fresh", "--untrained", "--initial", "--other-1", "--other-2")
    coloured = [
        (name, value, shades[number % len(shades)])
        for number, (name, value) in enumerate(seconds.items())
    ]
    bar = joined(
        html('<span style="flex:{:.4f};--c:var({})"></span>', value / total, shade)
        for _, value, shade in coloured
    )
    rows = [
        row(
            html('<span class="key" style="--c:var({})"></span>{}', shade, name.replace("_", " ")),
            cell(f"{value:,.1f}"),
            cell(f"{value / len(run.metrics):,.2f}"),
            cell(f"{100 * value / total:.0f} %"),
        )
        for name, value, shade in coloured
    ]
    each = [sum(v for n, v in r.get("time", {}).items() if n.endswith("_s")) for r in run.metrics]

    def per_second(values: Series) -> Series:
        return [
            value / taken if value is not None and taken > 0 else None
            for value, taken in zip(values, each, strict=True)
        ]

    panels = {
        "seconds per iteration": each,
        "turns per second": per_second(series(run.metrics, "turns")),
        "episodes per second": per_second(series(run.metrics, "episodes")),
        "tokens of the reflector per second": per_second(series(run.metrics, "reflector_tokens")),
    }
    return section(
        "cost",
        "Cost and speed",
        html("{} of training in {}.", _duration(total), counted(len(run.metrics), "iteration")),
        html('<div class="stack" aria-hidden="true">{}</div>', bar),
        table("Time by phase", ["phase", "seconds", "per iteration", "share"], rows),
        html(
            '<div class="charts">{}</div>',
            joined(_panel(run, title, values) for title, values in panels.items()),
        ),
    )


def _iterations(run: RunData) -> list[int]:
    return [record["iteration"] for record in run.metrics]


def _smoothed(run: RunData, name: str, colour: str, style: Style, values: Series) -> Line:
    points = [(x, y) for x, y in zip(_iterations(run), values, strict=True) if y is not None]
    smoothed = smooth([y for _, y in points])
    return Line(
        name=name,
        colour=colour,
        points=[(x, y) for (x, _), y in zip(points, smoothed, strict=True)],
        dots=points,
        style=style,
    )


def _panel(run: RunData, title: str, values: Series) -> Html:
    line = _smoothed(run, title, "--ink", "solid", values)
    return report_figures.line_chart(title, [line], x_label="iteration")


def _family(run: RunData, family: str, baseline: float | None) -> Html:
    """Rewards of the candidates of one family."""
    lines = []
    for field, (name, colour, style) in _KINDS.items():
        by_iteration: dict[int, list[float]] = {}
        for candidate in run.candidates:
            if candidate["family"] == family and candidate.get(field) is not None:
                by_iteration.setdefault(candidate["iteration"], []).append(candidate[field])
        found = sorted(by_iteration.items())
        means = [statistics.fmean(values) for _, values in found]
        lines.append(
            Line(
                name=name,
                colour=colour,
                style=style,
                points=list(zip([n for n, _ in found], smooth(means), strict=True)),
                dots=[(n, mean) for (n, _), mean in zip(found, means, strict=True)],
                band=[
                    (n, quartiles[0], quartiles[2])
                    for n, values in found
                    if len(values) > 1
                    for quartiles in [statistics.quantiles(values, n=4, method="inclusive")]
                ],
            )
        )
    if baseline is not None and any(line.points for line in lines):
        ends = [(n, baseline) for n in (_iterations(run)[0], _iterations(run)[-1])]
        lines.append(Line(name="initial prompt", colour="--initial", points=ends, style="dotted"))
    iterations = _iterations(run)
    return report_figures.line_chart(
        family, lines, x_label="iteration", x_ends=(iterations[0], iterations[-1])
    )


def _baselines(run: RunData) -> Mapping[str, float]:
    """What the initial prompt won of the TEST games, by family."""
    families: dict[str, Json] = {}
    for evaluation in run.evaluations:
        if not evaluation.label:
            families |= evaluation.families
    return {
        name: numbers["arms"]["initial"]["mean"]
        for name, numbers in families.items()
        if "initial" in numbers["arms"]
    }


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
    return badges(counts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
