"""How prompts came to be, from one meta-turn to the next; and the same games under the prompts of
two arms.
"""

from collections.abc import Sequence

from experiments.html import Html, html, joined
from experiments.report_data import Evaluation, Json
from experiments.report_episodes import Episodes
from experiments.report_loops import RULE, Loop, Shown, paired_games, shown_loops
from experiments.report_parts import (
    Section,
    badge,
    cell,
    clipped,
    details,
    on,
    row,
    section,
    split_badge,
    table,
)
from experiments.word_diff import word_diff
from experiments.wording import percent, points

_MOST_LINKS = 5  # to games of one kind and family


def lineage(
    evaluation: Evaluation, loops: Sequence[Loop], episodes: Episodes, anchor: str
) -> Section | None:
    """The loops that `RULE` chooses; None where there are none."""
    chosen = shown_loops(loops)
    if not chosen:
        return None
    seeds = max(loop.seed for loop in loops) + 1
    blocks = [
        html(
            "<h3>{} {}</h3>{}",
            family,
            split_badge(evaluation, family),
            joined(
                _shown(shown, episodes, _whose(evaluation, shown.loop, seeds), opened=not number)
                for shown in several
            ),
        )
        for number, (family, several) in enumerate(chosen.items())
    ]
    return section(
        anchor,
        f"How prompts came to be{on(evaluation)}",
        html(
            "{} Of a prompt, <ins>what is new</ins> and <del>what is gone</del> against the one"
            " before is marked.",
            RULE,
        ),
        *blocks,
    )


def _whose(evaluation: Evaluation, loop: Loop, seeds: int) -> str:
    """Of which trained run a loop is, where there are several."""
    return f"{evaluation.run_label(loop.seed, seeds)}, " if seeds > 1 else ""


def _shown(shown: Shown, episodes: Episodes, whose: str, *, opened: bool) -> Html:
    loop = shown.loop
    summary = html(
        "{}: {}loop {}, {} points", shown.why, whose, loop.run + 1, points(loop.gain or 0.0)
    )
    beside = Html("") if shown.beside is None else _loop(shown.beside, episodes)
    return details(
        summary,
        html('<div class="pair">{}{}</div>', _loop(loop, episodes), beside),
        opened=opened and shown.why == "largest gain",
    )


def _loop(loop: Loop, episodes: Episodes) -> Html:
    before = ""
    turns = []
    for prompt in loop.prompts:
        turns.append(_turn(loop, prompt, before, episodes))
        before = prompt["system_prompt"]
    return html(
        '<div class="loop"><h4><span class="key" style="--c:var({})"></span>{}</h4>'
        "<ol>{}</ol></div>",
        "--trained" if loop.arm == "trained" else "--untrained",
        loop.arm,
        joined(turns),
    )


def _turn(loop: Loop, prompt: Json, before: str, episodes: Episodes) -> Html:
    turn = prompt["turn"]
    if not turn:
        written = html('<p class="text">{}</p>', clipped(prompt["system_prompt"]))
    elif prompt["system_prompt"] == before:
        written = Html('<p class="text muted">(the prompt stays as it was)</p>')
    else:
        written = html('<p class="text">{}</p>', _marked(before, prompt["system_prompt"]))
    return html(
        '<li value="{}"><p class="step">meta-turn {} {} {} {}</p>{}{}{}</li>',
        turn,
        turn,
        badge(f"TEST {_won(prompt.get('success'))}"),
        badge(f"SELECT {_won(prompt.get('select_success'))}")
        if prompt.get("select_success") is not None
        else Html(""),
        badge(f"malformed: {prompt['failure']}".replace("_", " "), "bad")
        if prompt.get("failure")
        else Html(""),
        _read(loop, turn, episodes) if turn else Html(""),
        html('<p class="text analysis"><b>Analysis.</b> {}</p>', clipped(prompt["analysis"]))
        if prompt.get("analysis")
        else Html(""),
        written,
    )


def _won(success: float | None) -> str:
    return "not scored" if success is None else f"{percent(success)} %"


def _read(loop: Loop, turn: int, episodes: Episodes) -> Html:
    """What was read for the prompt of a meta-turn: the episodes under the one before."""
    context = loop.contexts.get(turn - 1)
    if context is None:
        return Html("")
    links = (
        episodes.link(played, str(played["outcome"]).replace("_", " "))
        for played in context["trajectories"]
    )
    return html('<p class="read">Read: {}</p>', joined(links, ", "))


def _marked(before: str, after: str) -> Html:
    shown = []
    for kind, text in word_diff(clipped(before), clipped(after)):
        word = text.lstrip()
        space = text[: len(text) - len(word)]
        if kind == "new":
            shown.append(html("{}<ins>{}</ins>", space, word))
        elif kind == "gone":
            shown.append(html("{}<del>{}</del>", space, word))
        else:
            shown.append(html("{}", text))
    return joined(shown)


def same_games(evaluation: Evaluation, episodes: Episodes, anchor: str) -> Section | None:
    """Games under the last prompts of the untrained and the trained reflector: how many changed,
    in both directions, with links to some; None where there are none.
    """
    pairs = list(paired_games(evaluation, "untrained", "trained"))
    if not pairs:
        return None
    rows = [
        row(
            html("{} {}", pair.family, split_badge(evaluation, pair.family)),
            cell(_links(pair.gained, episodes)),
            cell(_links(pair.lost, episodes)),
            cell(pair.both),
            cell(pair.neither),
        )
        for pair in pairs
    ]
    head = ["family", "won by trained alone", "won by untrained alone", "both won", "both lost"]
    return section(
        anchor,
        f"The same games, untrained and trained{on(evaluation)}",
        html(
            "Every TEST game under the last prompts of both, as they were played{}. The first {} of"
            " each kind open side by side.",
            "; each counts once for every trained seed, and the untrained reflector's is the same"
            if len(evaluation.runs) > 1
            else "",
            _MOST_LINKS,
        ),
        table("Games by who won them", head, rows),
    )


def _links(changed: Sequence[tuple[Json, Json]], episodes: Episodes) -> Html:
    """How many games changed, and the first of them to open."""
    shown = (
        episodes.link(before, str(number), beside=after)
        for number, (before, after) in enumerate(changed[:_MOST_LINKS], start=1)
    )
    return html('{} <span class="ci">{}</span>', len(changed), joined(shown, " "))
