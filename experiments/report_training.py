"""How training went: rewards, what they were made of, what was lost, and what it cost. Of several
trained seeds each has its own line or panel.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from experiments import report_figures
from experiments.html import Html, html, joined
from experiments.report_data import (
    Json,
    RunData,
    Training,
    counter_total,
    nested,
    phase_seconds,
    series,
)
from experiments.report_figures import Line, Point, Style, common_ends, smooth
from experiments.report_parts import Section, badges, cell, details, row, section, table
from experiments.reward_signal import histogram, reward_signal, signal_of_run
from experiments.wording import correlation, counted, number

Series = Sequence[float | None]
Values = list[tuple[int, list[float]]]  # by iteration

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

_SEEDS = ("--trained", "--untrained", "--fresh", "--other-1", "--other-2", "--other-3", "--initial")
_STYLES: tuple[Style, ...] = ("solid", "dashed", "dotted")  # when colours are used up

_PHASES = ("--trained", "--fresh", "--untrained", "--initial", "--other-1", "--other-2")

_SPEEDS = {
    "turns": "turns per second",
    "episodes": "episodes per second",
    "reflector_tokens": "tokens of the reflector per second",
}


def rewards(run: RunData, trainings: Sequence[Training], absent: Sequence[str]) -> Section | None:
    """Rewards over the iterations, over all families and by family, of each training; None where
    there is nothing to be said of any.

    Args:
      run: of the page.
      trainings: see `report_data.trainings`.
      absent: directories of those that are not here.
    """
    missing = _not_here(absent)
    if not trainings:
        if missing:
            return section("training", "Training", missing)
        if run.evaluations and not run.config:
            return None
        return section("training", "Training", Html("No finished iteration yet."))
    baselines = _baselines(run)
    key = list(_KINDS.values())
    if baselines:
        key.append(("initial prompt, as evaluated", "--initial", "dotted"))
    overall = [_overall(training, baselines) for training in trainings]
    alone = _alone(trainings)
    ends = None if alone else common_ends(overall)
    charts = [
        report_figures.line_chart(
            "all families" if alone else training.label, lines, x_label="iteration", y_ends=ends
        )
        for training, lines in zip(trainings, overall, strict=True)
    ]
    lines = [_families(training, baselines) for training in trainings]
    ends = None if alone else common_ends(one for of in lines for one in of.values())
    of_families = [
        [_family(training, *item, ends) for item in of.items()]
        for training, of in zip(trainings, lines, strict=True)
    ]
    faults = list(map(_faults, trainings))
    if alone:
        parts = [_charts([*charts, *of_families[0]]), faults[0]]
    else:
        parts = [
            _charts(charts),
            *(
                details(f"Families of {training.label}", html("{}{}", _charts(shown), counts))
                for training, shown, counts in zip(trainings, of_families, faults, strict=True)
            ),
        ]
    return section(
        "training",
        "Training",
        html(
            "Mean reward of the candidate prompts in each iteration{}. Replayed games are those the"
            " reflector has just read about; fresh ones are other games of the same family. Dots:"
            " iterations; lines: exponential moving average; bands: the middle half of the"
            " candidates.{}",
            "" if alone else ", a panel for each trained seed, all families together",
            missing,
        ),
        report_figures.legend(key),
        *parts,
    )


def _not_here(absent: Sequence[str]) -> Html:
    if not absent:
        return Html("")
    return html(
        "<p>Not here: what the {} of {} written (or there is no finished iteration).</p>",
        "training" if len(absent) == 1 else "trainings",
        f"{', '.join(absent)} {'has' if len(absent) == 1 else 'have'}",
    )


def signal(run: RunData, trainings: Sequence[Training]) -> Section | None:
    """What the learner had to learn from, and what it did with it, and what rewards were worth;
    None before the first iteration.
    """
    measured = _measured(run)
    worth = _worth(measured)
    of_rewards = _histogram(measured, trainings)
    if not trainings:
        if not worth and not of_rewards:
            return None
        return section("signal", "The signal", Html(""), _charts([of_rewards]), worth)
    group_count = trainings[0].config.get("meta", {}).get("contexts_per_iteration")
    panels: dict[str, Callable[[Sequence[Json]], Series]] = {
        f"groups without signal{f' (of {group_count})' if group_count else ''}": _of("dead_groups"),
        "groups thrown away for refills": _of("refill_thrown_away"),
        "reward, replayed over fresh games": _gap,
        "different prompts": _of("distinct_prompts"),
        "tokens of a prompt": _of("prompt_tokens"),
        "malformed replies": _of("malformed_candidates"),
        "replies of the reflector cut off": _of("reflector_failures", "truncated"),
        "replies of the actor cut off": _of("actor_failures", "truncated"),
        "replies of the actor without action": _of("actor_failures", "no_action"),
        "KL to the reference": _of("kl"),
        "entropy, nats per token": _of("entropy"),
        "clipped tokens, fraction": _of("clip_fraction"),
        "gradient norm": _of("grad_norm"),
        "sampler against learner, largest gap": _of("time", "sampler_gap_max"),
    }
    return section(
        "signal",
        "The signal and what was lost",
        Html(
            "A group whose candidates all have the same reward teaches nothing. The last panel is"
            " how far log-probabilities of sampler and learner are apart at most."
        ),
        _legend(trainings),
        _charts([of_rewards, *(_panel(trainings, *panel) for panel in panels.items())]),
        worth,
    )


def _histogram(measured: Json | None, trainings: Sequence[Training]) -> Html:
    """As evaluation.json has it; where it has none, of all candidates there are."""
    found = (measured or {}).get("histogram") or histogram(
        [
            row["reward"]
            for training in trainings
            for row in training.candidates
            if row.get("reward") is not None
        ]
    )
    return report_figures.histogram(
        "rewards of candidates", found["edges"], found["counts"], x_label="reward"
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
    dead = (
        f" (in {signal['dead_groups']:,} of these all rewards are equal)"
        if "dead_groups" in signal
        else ""
    )
    return html(
        '<h3>What rewards were worth</h3><p class="lead">Of {:,} candidates in {:,} groups{},'
        " iterations {} to {} of training. Everything is compared within groups, the candidates of"
        " one context; those in which nothing differs say nothing. Split halves: the correlation of"
        " games won in two random halves of the reward's games, taken to all of them (Spearman and"
        " Brown); the others are rank correlations, that with the next meta-turn within families."
        " {}</p>{}",
        signal["candidates"],
        signal["groups"],
        dead,
        signal["first_iteration"],
        signal["last_iteration"],
        enough,
        table("Correlations", ["of", "r", "95 % interval", "groups", "note"], rows),
    )


def cost(trainings: Sequence[Training]) -> Section | None:
    """Where the time went, and how fast it was; None where no times were kept."""
    timed = [
        training for training in trainings if sum(phase_seconds(training.metrics).values()) > 0
    ]
    if not timed:
        return None
    alone = _alone(timed)
    total = sum(sum(phase_seconds(training.metrics).values()) for training in timed)
    done = sum(len(training.metrics) for training in timed)
    panels: dict[str, Callable[[Sequence[Json]], Series]] = {"seconds per iteration": _seconds}
    panels |= {text: _per_second(name) for name, text in _SPEEDS.items()}
    return section(
        "cost",
        "Cost and speed",
        html(
            "{}{} of training in {}.",
            "" if alone else f"{counted(len(timed), 'trained seed')} together: ",
            _duration(total),
            counted(done, "iteration"),
        ),
        _phases(timed[0]) if alone else _by_seed(timed),
        *([] if alone else [_legend(timed)]),
        _charts([_panel(timed, *panel) for panel in panels.items()]),
    )


def _phases(training: Training) -> Html:
    """Of one training: a bar, and its phases in numbers."""
    seconds = phase_seconds(training.metrics)
    total = sum(seconds.values())
    colours = _phase_colours([training])
    rows = [
        row(
            html('<span class="key" style="--c:var({})"></span>{}', colours[name], _phase(name)),
            cell(f"{value:,.1f}"),
            cell(f"{value / len(training.metrics):,.2f}"),
            cell(f"{100 * value / total:.0f} %"),
        )
        for name, value in seconds.items()
    ]
    return html(
        "{}{}",
        _bar(seconds, colours),
        table("Time by phase", ["phase", "seconds", "per iteration", "share"], rows),
    )


def _by_seed(trainings: Sequence[Training]) -> Html:
    """Of several: cost and speed of each, and its phases."""
    colours = _phase_colours(trainings)
    seconds = [phase_seconds(training.metrics) for training in trainings]
    totals = [sum(phases.values()) for phases in seconds]
    counts = [len(training.metrics) for training in trainings]
    speeds = [
        row(
            training.label,
            cell(f"{done:,}"),
            cell(f"{total:,.0f}"),
            cell(f"{total / done:,.2f}"),
            *(
                cell(number(sum(known) / total if known else None, 1))
                for name in _SPEEDS
                for known in [[v for v in series(training.metrics, name) if v is not None]]
            ),
        )
        for training, total, done in zip(trainings, totals, counts, strict=True)
    ]
    phases = [
        row(
            html('<span class="key" style="--c:var({})"></span>{}', shade, _phase(name)),
            *(
                cell(f"{of.get(name, 0.0) / done:,.2f}")
                for of, done in zip(seconds, counts, strict=True)
            ),
        )
        for name, shade in colours.items()
    ]
    labels = [training.label for training in trainings]
    head = ["trained run", "iterations", "seconds", "seconds per iteration", *_SPEEDS.values()]
    return html(
        "{}{}{}",
        table("Cost and speed by trained run", head, speeds),
        table("Seconds per iteration by phase", ["phase", *labels], phases),
        joined(
            html("<h4>{}</h4>{}", label, _bar(of, colours))
            for label, of in zip(labels, seconds, strict=True)
        ),
    )


def _phase(name: str) -> str:
    return name.replace("_", " ")


def _phase_colours(trainings: Sequence[Training]) -> dict[str, str]:
    names = dict.fromkeys(name for one in trainings for name in phase_seconds(one.metrics))
    return {name: _PHASES[n % len(_PHASES)] for n, name in enumerate(names)}


def _bar(seconds: Mapping[str, float], colours: Mapping[str, str]) -> Html:
    """How long the phases are beside each other."""
    total = sum(seconds.values())
    parts = joined(
        html('<span style="flex:{:.4f};--c:var({})"></span>', value / total, colours[name])
        for name in colours  # the same order in all bars
        for value in [seconds.get(name, 0.0)]
        if value
    )
    return html('<div class="stack" aria-hidden="true">{}</div>', parts)


def _charts(charts: Sequence[Html]) -> Html:
    shown = joined(charts)
    return html('<div class="charts">{}</div>', shown) if shown else shown


def _of(*names: str) -> Callable[[Sequence[Json]], Series]:
    """One number of the metrics, which may lie within records."""
    return lambda metrics: nested(metrics, *names)


def _gap(metrics: Sequence[Json]) -> Series:
    replay, fresh = (series(metrics, name) for name in ("reward_replay", "reward_fresh"))
    return [
        None if seen is None or new is None else seen - new
        for seen, new in zip(replay, fresh, strict=True)
    ]


def _seconds(metrics: Sequence[Json]) -> list[float]:
    """Of every iteration, all phases together."""
    return [
        sum(value for name, value in record.get("time", {}).items() if name.endswith("_s"))
        for record in metrics
    ]


def _per_second(name: str) -> Callable[[Sequence[Json]], Series]:
    return lambda metrics: [
        value / taken if value is not None and taken > 0 else None
        for value, taken in zip(series(metrics, name), _seconds(metrics), strict=True)
    ]


def _iterations(training: Training) -> list[int]:
    return [record["iteration"] for record in training.metrics]


def _smoothed(
    training: Training, name: str, colour: str, style: Style, values: Series, *, dots: bool = True
) -> Line:
    points = [(x, y) for x, y in zip(_iterations(training), values, strict=True) if y is not None]
    smoothed = smooth([y for _, y in points])
    return Line(
        name=name,
        colour=colour,
        points=[(x, y) for (x, _), y in zip(points, smoothed, strict=True)],
        dots=points if dots else (),
        style=style,
    )


def _overall(training: Training, baselines: Mapping[str, float]) -> list[Line]:
    """Rewards of the candidates of all families; the first prompt's mean over these, where it is
    known of all.
    """
    lines = [
        dataclasses.replace(
            _smoothed(training, *_KINDS[kind], series(training.metrics, name)),
            band=_band(_by_iteration(training.candidates, kind)),
        )
        for kind, name in (("replay_reward", "reward_replay"), ("fresh_reward", "reward_fresh"))
    ]
    families = {candidate["family"] for candidate in training.candidates}
    known = [baselines[family] for family in families if family in baselines]
    if known and len(known) == len(families):
        lines += _first_prompt(training, statistics.fmean(known))
    return lines


def _alone(trainings: Sequence[Training]) -> bool:
    """Whether this is the training of one run, not of one of several."""
    return not any(training.label for training in trainings)


def _legend(trainings: Sequence[Training]) -> Html:
    """Whose line is whose, where there are several."""
    if _alone(trainings):
        return Html("")
    return report_figures.legend(
        [(one.label, *look) for one, look in zip(trainings, _looks(trainings), strict=True)]
    )


def _looks(trainings: Sequence[Training]) -> Iterator[tuple[str, Style]]:
    """How the lines of trainings are drawn."""
    if _alone(trainings):
        yield "--ink", "solid"
        return
    for n, _ in enumerate(trainings):
        yield _SEEDS[n % len(_SEEDS)], _STYLES[n // len(_SEEDS) % len(_STYLES)]


def _panel(
    trainings: Sequence[Training], title: str, values: Callable[[Sequence[Json]], Series]
) -> Html:
    alone = _alone(trainings)
    lines = [
        _smoothed(
            training,
            title if alone else training.label,
            *look,
            values(training.metrics),
            dots=alone,  # of several they would be a cloud
        )
        for training, look in zip(trainings, _looks(trainings), strict=True)
    ]
    return report_figures.line_chart(title, lines, x_label="iteration")


def _families(training: Training, baselines: Mapping[str, float]) -> dict[str, list[Line]]:
    return {
        family: _of_family(training, family, baselines.get(family))
        for family in sorted({candidate["family"] for candidate in training.candidates})
    }


def _family(training: Training, family: str, lines: list[Line], y_ends: Point | None) -> Html:
    iterations = _iterations(training)
    return report_figures.line_chart(
        family,
        lines,
        x_label="iteration",
        x_ends=(iterations[0], iterations[-1]),
        y_ends=y_ends,
    )


def _of_family(training: Training, family: str, baseline: float | None) -> list[Line]:
    """Rewards of the candidates of one family."""
    lines = []
    for field, (name, colour, style) in _KINDS.items():
        found = _by_iteration(
            [one for one in training.candidates if one["family"] == family], field
        )
        means = [statistics.fmean(values) for _, values in found]
        lines.append(
            Line(
                name=name,
                colour=colour,
                style=style,
                points=list(zip([n for n, _ in found], smooth(means), strict=True)),
                dots=[(n, mean) for (n, _), mean in zip(found, means, strict=True)],
                band=_band(found),
            )
        )
    if baseline is not None and any(line.points for line in lines):
        lines += _first_prompt(training, baseline)
    return lines


def _by_iteration(candidates: Sequence[Json], field: str) -> Values:
    found: dict[int, list[float]] = {}
    for candidate in candidates:
        if candidate.get(field) is not None:
            found.setdefault(candidate["iteration"], []).append(candidate[field])
    return sorted(found.items())


def _band(found: Values) -> list[tuple[float, float, float]]:
    """The middle half of the candidates."""
    return [
        (n, quartiles[0], quartiles[2])
        for n, values in found
        if len(values) > 1
        for quartiles in [statistics.quantiles(values, n=4, method="inclusive")]
    ]


def _first_prompt(training: Training, won: float) -> list[Line]:
    iterations = _iterations(training)
    ends = [(n, won) for n in (iterations[0], iterations[-1])]
    return [Line(name="initial prompt", colour="--initial", points=ends, style="dotted")]


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


def _faults(training: Training) -> Html:
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
        text: sum(value or 0 for value in series(training.metrics, name))
        for name, text in labels.items()
        if any(name in r for r in training.metrics)
    }
    times = [record.get("time", {}) for record in training.metrics]
    for name, text in (
        ("crashes", "worker crashes"),
        ("timeouts", "worker timeouts"),
        ("replays", "episodes replayed"),
    ):
        if any(f"worker_{name}" in time for time in times):
            counts[text] = counter_total(training.metrics, f"worker_{name}")
    return badges(counts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
