"""What stands beside the results, as evaluation.json has it: what actors did and prompts held, and
where games were won.
"""

from collections.abc import Sequence

from experiments import report_figures
from experiments.analyses import analyse
from experiments.html import Html, html, joined
from experiments.report_data import Evaluation, Json
from experiments.report_figures import Line, arm_lines
from experiments.report_loops import Loop
from experiments.report_parts import (
    Section,
    cell,
    clipped,
    details,
    on,
    row,
    section,
    split_badge,
    table,
)
from experiments.wording import interval, number, points, share


def analyses(evaluation: Evaluation, loops: Sequence[Loop], anchor: str) -> Section | None:
    """A row per arm, over all families, and the tables beside it; None without episodes. Results of
    before are analysed here, without what training has kept.
    """
    found = evaluation.results.get("analyses") or analyse(evaluation, loops, [])
    if not found.get("arms"):
        return None
    return section(
        anchor,
        f"What actors did and prompts held{on(evaluation)}",
        Html(
            "Of the TEST games under the last prompts, all families together: how many sequences of"
            " observations and actions are different ones, of all and of as many episodes as every"
            " arm has; how evenly verbs are used, in bits (the first word of an action); turns that"
            " repeat an observation and action of the same game; turns without a usable action;"
            " actions that were not among those listed. Of the loops: games won that reflectors"
            " read about (STREAM) and that prompts are chosen by (SELECT), all meta-turns together;"
            " words of the last prompt; words that a meta-turn changes; and last prompts that name"
            " something of a single game they were written from, such as <i>drawer 3</i>."
        ),
        _arms(found["arms"]),
        _by_turn(found["arms"]),
        _success(evaluation, found.get("success", {})),
        _deletions(evaluation, found.get("deletions", {})),
    )


def _arms(arms: Json) -> Html:
    draws = max(numbers["draws"] or 0 for numbers in arms.values())
    columns = [
        "arm",
        "different sequences",
        f"of {draws} episodes",
        "verbs, bits",
        "repeated turns",
        "turns without action",
        "actions not listed",
        "STREAM won",
        "SELECT won",
        "words",
        "words changed",
        "prompts with names",
    ]
    ordered = [arm for arm in ("trained", "untrained", "initial") if arm in arms]
    rows = [
        row(
            arm,
            cell(share(numbers["sequences"])),
            cell(number(numbers["different_of_draws"], 1)),
            cell(number(numbers["verb_bits"], 2)),
            cell(share(numbers["repeated_turns"])),
            cell(share(numbers["turns_without_action"])),
            cell(share(numbers["unavailable_actions"])),
            cell(share(numbers["stream"])),
            cell(share(numbers["select"])),
            cell(number(numbers["words"], 0)),
            cell(number(numbers["words_changed"], 0)),
            cell(share(numbers["names"])),
        )
        for arm in [*ordered, *(arm for arm in arms if arm not in ordered)]
        for numbers in [arms[arm]]
    ]
    return table("By arm", columns, rows)


def _by_turn(arms: Json) -> Html:
    """How prompts grew and changed; nothing where no arm has written twice."""
    if all(len(numbers["words_by_turn"]) < 3 for numbers in arms.values()):
        return Html("")
    lines = [line for line in arm_lines(list(arms)) if len(arms[line[0]]["words_by_turn"]) > 1]
    charts = (
        report_figures.line_chart(
            title,
            [
                Line(
                    name=arm,
                    colour=colour,
                    style=style,
                    points=[
                        (turn, count)
                        for turn, count in enumerate(arms[arm][name], start=first)
                        if count is not None
                    ],
                )
                for arm, colour, style in lines
            ],
            x_label="meta-turn",
        )
        for name, title, first in (
            ("words_by_turn", "words of the prompt", 0),
            ("changed_by_turn", "words changed by a meta-turn", 1),
        )
    )
    return html(
        '<h3>Prompts from one meta-turn to the next</h3><p class="lead">Means over the loops of an'
        " arm, all families together; 0 is the first prompt. Changed: words that are new, and words"
        ' that are gone.</p>{}<div class="charts">{}</div>',
        report_figures.legend(lines),
        joined(charts),
    )


def _success(evaluation: Evaluation, success: Json) -> Html:
    """From the games of training to those of the test."""
    families = {name: numbers for name, numbers in success.items() if name in evaluation.families}
    shown = [
        arm
        for arm in ("trained", "untrained", "initial")
        if any(arm in numbers["arms"] for numbers in families.values())
    ]
    if not shown:
        return Html("")
    rows = [
        row(
            html("{} {}", family, split_badge(evaluation, family)),
            cell(share((numbers["training"] or {}).get("replay"))),
            cell(share((numbers["training"] or {}).get("fresh"))),
            *(
                cell(share(numbers["arms"].get(arm, {}).get(games)))
                for arm in shown
                for games in ("select", "test")
            ),
        )
        for family, numbers in families.items()
    ]
    trained = [of["training"] for of in families.values() if of["training"] is not None]
    when = (
        f"In training: candidates of {_iterations(trained)}, the last quarter, on games that they"
        " were written from (replayed) and on others (fresh). "
        if trained
        else ""
    )
    return html(
        '<h3>Where games are won</h3><p class="lead">{}SELECT and TEST: under the last prompts,'
        " after all meta-turns.</p>{}",
        when,
        table(
            "Games won, from training to TEST",
            [
                "family",
                "training, replayed",
                "training, fresh",
                *(f"{arm}, {games}" for arm in shown for games in ("SELECT", "TEST")),
            ],
            rows,
        ),
    )


def _iterations(trained: Sequence[Json]) -> str:
    first, last = (
        choose(of[f"{name}_iteration"] for of in trained)
        for choose, name in ((min, "first"), (max, "last"))
    )
    return f"iteration {last}" if first == last else f"iterations {first} to {last}"


def _deletions(evaluation: Evaluation, deletions: Json) -> Html:
    """What single sentences are worth."""
    # held-out families first
    ordered = {family: deletions[family] for family in evaluation.families if family in deletions}
    deletions = ordered | deletions
    cut = {family: found for family, found in deletions.items() if found["sentences"]}
    tables = [
        details(
            html(
                "{}{}: {} sentences of {} last prompts, {:,} games",
                family,
                html(" {}", held) if (held := split_badge(evaluation, family)) else "",
                len(found["sentences"]),
                found["prompts"],
                found["games"],
            ),
            table(
                f"{family}: TEST games lost without a sentence",
                [
                    "sentence",
                    "points lost",
                    "games won with it",
                    "prompts that hold it",
                    "trained seeds",
                ],
                [
                    row(
                        clipped(sentence["text"]),
                        html(
                            '<td>{} <span class="ci">{}</span></td>',
                            points(sentence["drop"]),
                            interval(sentence["ci95"], signed=True),
                        ),
                        cell(share(sentence["whole"])),
                        cell(sentence["prompts"]),
                        cell(sentence.get("seeds", 1)),
                    )
                    for sentence in found["sentences"]
                ],
            ),
            opened=not number,
        )
        for number, (family, found) in enumerate(cut.items())
    ]
    if not deletions:
        return Html("")
    single = [family for family, found in deletions.items() if not found["sentences"]]
    if single:
        tables.append(
            html(
                '<p class="lead">Nothing could be left out of the last prompts on {}: they are'
                " single sentences, or the environment failed.</p>",
                ", ".join(single),
            )
        )
    return html(
        '<h3>What single sentences are worth</h3><p class="lead">Last prompts of all trained'
        " reflectors without one sentence, on the same TEST games with the same keys: by how many"
        " points less is won. Intervals, over trained seeds, runs and games, are of each sentence"
        " alone, of many some miss 0 by chance; nothing is chosen by them.</p>{}",
        joined(tables),
    )
