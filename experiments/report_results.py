"""What an evaluation found: its protocol in words, games won by family and arm, verdicts, and
success from meta-turn to meta-turn.
"""

from collections.abc import Iterable, Iterator, Sequence

from experiments import report_figures
from experiments.evaluation_results import ARMS, is_number
from experiments.html import Html, html, joined
from experiments.report_data import (
    Evaluation,
    Json,
    RunData,
    SplitSummary,
    games_played,
    split_summaries,
)
from experiments.report_figures import Line, arm_colour, arm_lines
from experiments.report_games import disjointness
from experiments.report_loops import Loop, middle_half
from experiments.report_parts import (
    Section,
    arm_mark,
    badges,
    cell,
    comparison_cells,
    details,
    estimate,
    on,
    row,
    section,
    table,
)
from experiments.wording import counted, interval, p_is, p_value, percent, points

_MAIN = "trained_vs_untrained"


def results(run: RunData, evaluation: Evaluation, anchor: str) -> Section:
    """Held-out families first, families that were trained on as the context below."""
    splits = split_summaries(evaluation)
    arms = _arms(splits)
    return section(
        anchor,
        f"Results{on(evaluation)}",
        html("<ul>{}</ul>", joined(html("<li>{}</li>", s) for s in _protocol(run, evaluation))),
        report_figures.legend(arm_lines(arms)),
        *(_split(split, arms) for split in splits),
        html(
            '<p class="lead">Bars and brackets: 95 % intervals. p: two-sided, of the paired'
            " difference, by Holm's correction for the families of a split; that of all families is"
            " tested alone. n: trained seeds, or the runs of a single one, which are what the test"
            " counts. Verdicts come from p alone, never from an interval.</p>"
        ),
        _faults(evaluation),
    )


def curves(evaluation: Evaluation, loops: Sequence[Loop], anchor: str) -> Section | None:
    """Success by meta-turn of every arm; None where no arm has written twice."""
    splits = split_summaries(evaluation)
    arms = _arms(splits)
    if all(len(cells["curve"]) < 2 for split in splits for cells in split.overall["arms"].values()):
        return None
    blocks = []
    for split in splits:
        title = f"all {split.title}"
        panels = [_curve(title, split.overall, loops, list(split.families))]
        panels += [_curve(name, of, loops, [name]) for name, of in split.families.items()]
        blocks.append(
            html(
                '<h3>{}</h3><div class="charts">{}</div>{}',
                split.title.capitalize(),
                joined(panels),
                details(f"Numbers of {title}", _curve_table(split)),
            )
        )
    return section(
        anchor,
        f"Success by meta-turn{on(evaluation)}",
        html(
            "TEST games won, %, under the prompt of each meta-turn; 0 is the first prompt. Faint"
            " bars, or bands of many turns: where the middle half of the loops lies{}; thin bars at"
            " the end: 95 % intervals.",
            "" if evaluation.turns else " (not drawn: the prompts of single loops are not here)",
        ),
        report_figures.legend(arm_lines(arms)),
        *blocks,
    )


def _arms(splits: Sequence[SplitSummary]) -> list[str]:
    return _ordered(arm for split in splits for arm in split.overall["arms"])


def _protocol(run: RunData, evaluation: Evaluation) -> Iterator[Html]:
    """How the evaluation was done, a sentence each; what its file does not say is left out."""
    protocol = evaluation.results["protocol"]
    games = games_played(evaluation.environment)
    if games:
        yield html("Measured on {}.", games)
    if evaluation.checkpoint not in (None, run.config.get("iterations")):
        yield html("Of iteration {}.", evaluation.checkpoint)
    for change in evaluation.changes:
        yield html("<b>Changed since training: {}.</b>", str(change))
    several = protocol.get("run_dirs")
    if isinstance(several, list) and len(several) > 1:
        yield html(
            "Of the runs {}: each keeps its training.",
            ", ".join(str(name).rstrip("/").rpartition("/")[2] for name in several),
        )
    if protocol.get("protocol") == "paper":
        yield Html(
            "<b>Protocol <i>paper</i>:</b> chosen prompts are chosen and reported on the same"
            " games, which reads too high; nothing is claimed of them. All loops have the same"
            " games."
        )
    elif protocol.get("protocol") == "strict":
        chooses = (
            "no SELECT games choose a prompt (chosen is the last one)"
            if protocol.get("select_games") == 0
            else "SELECT games choose a prompt"
        )
        yield html(
            "Protocol <i>strict</i>: reflectors read STREAM games, {}, TEST games score it.",
            chooses,
        )
    if states := disjointness(run, evaluation):
        yield html("{}", states)
    counts = [
        counted(value, *nouns)
        for name, nouns in (
            ("runs", ("loop (run) per arm and family", "loops (runs) per arm and family")),
            ("meta_turns", ("meta-turn each", "meta-turns each")),
            ("games_per_context", ("STREAM game per meta-turn", "STREAM games per meta-turn")),
            ("select_games", ("SELECT game",)),
            ("test_games", ("TEST game",)),
        )
        if isinstance(value := protocol.get(name), int)
    ]
    seeds = next(iter(evaluation.results["overall"].values())).get("seeds")
    yield html(
        "Trained seeds: {}{}. All arms play the same games in the same order, so their differences"
        " are paired.",
        seeds,
        "".join(f"; {count}" for count in counts),
    )
    if isinstance(protocol.get("pretraining"), str):
        yield html("Pretraining: {}.", protocol["pretraining"])
    if isinstance(protocol.get("training_budget"), str):
        budgets = protocol["training_budget"].replace(_NAMED, 'its rows end with "in training": ')
        yield html("Budgets: {}.", budgets)


def _split(split: SplitSummary, arms: Sequence[str]) -> Html:
    head = [
        "family",
        "trained - untrained",
        "verdict",
        "p",
        "n",
        *(arm_mark(arm) for arm in reversed(arms) if arm in ARMS),
        "games",
        "runs",
    ]
    families = {"all families": split.overall, **split.families}
    rows = [
        row(
            name,
            *comparison_cells(numbers["tests"].get(_MAIN)),
            *(
                cell(estimate(found["mean"], found["ci95"]) if found else "")
                for arm in reversed(arms)
                if arm in ARMS
                for found in [numbers["arms"].get(arm)]
            ),
            cell(numbers["games"]),
            cell(numbers["runs"]),
            kind="pooled" if numbers is split.overall else "",
        )
        for name, numbers in families.items()
    ]
    return html(
        '<div class="split"><h3>{}: games won, %</h3>{}{}{}{}</div>',
        split.title.capitalize(),
        joined(_bars(name, numbers["arms"], arms) for name, numbers in families.items()),
        table(f"Games won on the {split.title}, %", head, rows),
        _comparisons(split),
        _arm_tables(split, arms),
    )


def _bars(name: str, measured: Json, arms: Sequence[str]) -> Html:
    """One family: every arm's mean as a dot on its interval, from 0 to 100 %."""
    return html(
        '<div class="bars"><h4>{}</h4>{}</div>',
        name,
        joined(
            html(
                '<div class="lane" style="--c:var({})"><span>{}</span>'
                '<span class="track"><i style="left:{:.1f}%;width:{:.1f}%"></i>'
                '<b style="left:{:.1f}%"></b></span><span class="number">{}</span></div>',
                arm_colour(arm),
                arm,
                100 * found["ci95"][0],
                100 * (found["ci95"][1] - found["ci95"][0]),
                100 * found["mean"],
                estimate(found["mean"], found["ci95"]),
            )
            for arm in arms
            for found in [measured.get(arm)]
            if found
        ),
    )


def _comparisons(split: SplitSummary) -> Html:
    """All comparisons of a split and of its families, each with the reason of its verdict."""
    head = ["arms", "difference", "verdict", "p", "n", "would be found", "wins more"]
    head.append(Html('<span class="start">reason</span>'))
    whole = f"Comparisons on the {split.title}"
    single = f"{whole}, family by family"
    rows = [
        _comparison(f"{family}: {name}", test)
        for family, numbers in split.families.items()
        for name, test in numbers["tests"].items()
    ]
    return html(
        "{}{}",
        details(
            whole,
            html(
                "{}{}",
                table(whole, head, [_comparison(*item) for item in split.overall["tests"].items()]),
                _over_families(split),
            ),
            opened=split.name != "train",
        ),
        details(single, table(single, head, rows)),
    )


def _over_families(split: SplitSummary) -> Html:
    """The other claim, about families like these."""
    test = split.overall["tests"].get(_MAIN, {}).get("over_families")
    numbers = test if isinstance(test, dict) else {}
    count, p, smallest = (numbers.get(name) for name in ("num_families", "p", "smallest_p"))
    families = (
        f"With {counted(count, 'family', 'families')} as units, for a claim about others like"
        f" these, {p_is(p)} for trained - untrained; {count} cannot give less than"
        f" {p_value(smallest)}."
        if is_number(p) and is_number(smallest) and isinstance(count, int)
        else ""
    )
    return html(
        '<p class="lead">Would be found: points of difference, in four of five such evaluations.'
        " Wins more: of all pairs of loops, ties half. {}</p>",
        families,
    )


def _comparison(name: str, test: Json) -> Html:
    detectable = test.get("detectable")
    return row(
        name.replace("_vs_", " - "),
        *comparison_cells(test),
        cell(percent(detectable) if is_number(detectable) else ""),
        cell(f"{100 * test['improvement']:.0f} %"),
        html('<td class="reason">{}</td>', test["reason"]),
    )


def _arm_tables(split: SplitSummary, arms: Sequence[str]) -> Html:
    """Every arm of a split: what stands beside the headline's number, and what it took."""
    there = [arm for arm in arms if split.overall["arms"].get(arm)]
    return details(
        f"Arms on the {split.title}",
        html("{}{}", _won(split, there), _took(split, there)),
    )


def _won(split: SplitSummary, arms: Sequence[str]) -> Html:
    rows = [
        row(
            arm,
            cell(estimate(found["mean"], found["ci95"])),
            cell(estimate(found["chosen"]["mean"], found["chosen"]["ci95"])),
            cell(percent(found["area"])),
            cell("" if found.get("sd_runs") is None else percent(found["sd_runs"])),
            cell("not measured" if found.get("sd_seeds") is None else percent(found["sd_seeds"])),
        )
        for arm in arms
        for found in [split.overall["arms"][arm]]
    ]
    head = [
        "arm",
        "last prompt",
        "chosen prompt",
        "mean over meta-turns",
        "spread of runs",
        "spread of trained seeds",
    ]
    return table(f"Games won by every arm on the {split.title}, %", head, rows)


def _took(split: SplitSummary, arms: Sequence[str]) -> Html:
    """A column per arm: there are fewer of them than of numbers."""
    spent = {arm: _budget(split, arm) for arm in arms}
    rows = [
        row(
            text,
            *(
                # empty: what an arm does not take, or nobody knows
                cell("" if name in _TAUGHT and name not in spent[arm] else f"{took:,}")
                for arm in arms
                for took in [spent[arm].get(name, 0)]
            ),
        )
        for name, text in (_BUDGET | _TAUGHT).items()
        if name in _BUDGET or any(name in of_arm for of_arm in spent.values())
    ]
    return table(f"What every arm took on the {split.title}", ["", *arms], rows)


_BUDGET = {
    "actor_episodes": "games played to write",
    "actor_tokens": "tokens of the actor to write",
    "reflector_calls": "replies of the reflector to write",
    "reflector_tokens": "tokens of these replies",
}
# of an arm that trains, once for all families
_TAUGHT = {
    "training_steps": "steps of supervised training",
    "training_tokens": "tokens learned in supervised training",
    "training_actor_episodes": "games played in training",
    "training_actor_tokens": "tokens of the actor in training",
    "training_reflector_calls": "replies of the reflector in training",
    "training_reflector_tokens": "tokens of the reflector in training",
}
_NAMED = "training_*: "  # what training took, by its names in evaluation.json


def _budget(split: SplitSummary, arm: str) -> dict[str, int]:
    """What writing the prompts of an arm took, over the families of a split."""
    total: dict[str, int] = {}
    for family in split.families.values():
        of_arms = family.get("budget")
        of_arm = of_arms.get(arm) if isinstance(of_arms, dict) else None
        for name, value in of_arm.items() if isinstance(of_arm, dict) else ():
            if isinstance(value, int):
                before = total.get(name, 0)
                total[name] = max(before, value) if name in _TAUGHT else before + value
    return total


def _faults(evaluation: Evaluation) -> Html:
    """What went wrong in the evaluation, by arm; zeros included."""
    texts = {
        "malformed_replies": "malformed replies of the reflector",
        "failed_episodes": "episodes failed by the environment",
    }
    families = evaluation.families.values()
    splits = split_summaries(evaluation)
    asked = {
        f"{texts['malformed_replies']}, {arm}": sum(
            _budget(split, arm).get("reflector_calls", 0) for split in splits
        )
        for arm in _arms(splits)
    }
    return badges(
        {
            f"{text}, {arm}": sum(family.get(key, {}).get(arm, 0) for family in families)
            for key, text in texts.items()
            for arm in _arms(splits)
            if any(arm in family.get(key, {}) for family in families)
            and (key, arm) != ("malformed_replies", "initial")
        },
        of=asked,
    )


def _curve(title: str, numbers: Json, loops: Sequence[Loop], families: list[str]) -> Html:
    lines = []
    arms = _ordered(numbers["arms"])
    last = max(len(of["curve"]) for of in numbers["arms"].values()) - 1
    # bars of all arms side by side on the left of a turn, if they do not reach the one before
    taken = (len(arms) + 1) * report_figures.BOX_WIDTH / report_figures.PLOT_WIDTH
    apart = (last + 1) * taken < 1
    for arm, colour, style in arm_lines(arms):
        found = numbers["arms"][arm]
        points = [(turn, won) for turn, won in enumerate(found["curve"]) if won is not None]
        middle = [(b["turn"], b["low"], b["high"]) for b in middle_half(loops, families, arm)]
        lines.append(
            Line(
                name=arm,
                colour=colour,
                points=points,
                boxes=middle if apart else (),
                band=() if apart else middle,
                bars=[(points[-1][0], *found["ci95"])] if points else [],
                style=style,
            )
        )
    return report_figures.line_chart(
        title,
        lines,
        x_label="meta-turn",
        x_ends=(-last * taken / (1 - taken), last) if apart else None,
        y_ends=(0.0, 1.0),
        percent=True,
    )


def _ordered(arms: Iterable[str]) -> list[str]:
    """Those of the headline first."""
    there = list(dict.fromkeys(arms))
    return [arm for arm in ARMS if arm in there] + [arm for arm in there if arm not in ARMS]


def _rise(rise: Json | None) -> Html | str:
    """What came with the meta-turns behind the first."""
    if rise is None:
        return ""
    ends = interval(rise["ci95"], signed=True)
    return html(
        '{} <span class="ci">{}</span>, {}', points(rise["difference"]), ends, p_is(rise["p"])
    )


def _curve_table(split: SplitSummary) -> Html:
    arms = split.overall["arms"]
    turns = max(len(found["curve"]) for found in arms.values())
    risen = any(found.get("rise") for found in arms.values())
    rows = [
        row(
            arm,
            *(
                cell("" if won is None else percent(won))
                for won in [*found["curve"], *[None] * (turns - len(found["curve"]))]
            ),
            cell(interval(found["ci95"])),
            *([cell(_rise(found.get("rise")))] if risen else []),
        )
        for arm, found in arms.items()
    ]
    head = ["arm", *map(str, range(turns)), "interval of the last"]
    head += ["last less 1 [95 %], p"] * risen
    return table(f"Games won by meta-turn on all {split.title}, %", head, rows)
