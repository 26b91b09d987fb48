"""The episodes of a report, which its script shows on demand: chosen by filters, searched, opened
by link.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.html import Html, data, html
from experiments.report_data import Evaluation, Json, RunData, game_name
from experiments.report_figures import arm_lines
from experiments.report_loops import context_seeds, loops, shown_loops
from experiments.report_parts import Section, clipped, section
from experiments.visible import visible
from experiments.wording import counted

MAX_STEPS = 50_000  # turns of all episodes on a page
MAX_CHARACTERS = 100_000_000  # of their texts: 2,000 a turn

Parts = Mapping[tuple[str, str], list[Json]]  # by arm and family

FIELDS = ("evaluation", "family", "arm", "run", "turn", "use", "outcome", "failures", "game")


class Episodes:
    """What of a run's episodes goes into its page, as many as there is room for: of evaluations the
    TEST games under the last prompts of all arms, then what reflectors read: first for the prompts
    that the page shows, then for others, held-out families first; what the reflector read last in
    training.
    """

    def __init__(self, run: RunData):
        self._strings: dict[str, int] = {}
        self._rows: list[list[Any]] = []
        self._numbers: dict[int, int] = {}  # by id() of a trajectory
        self._played: list[Json] = []
        self._first: dict[tuple[Any, ...], int] = {}  # STREAM games of meta-turn 0
        self._characters = self.steps = self.left_out = 0
        for evaluation in run.evaluations:
            for about, played in (*_test(evaluation), *_stream(evaluation)):
                self._add(about, played)
        for context in run.contexts:
            for played in context["trajectories"]:
                where = {"evaluation": "training", "family": context["family"], "use": "training"}
                self._add({**where, **_read_by("in training", context)}, played)

    def __len__(self) -> int:
        return len(self._rows)

    def link(self, played: Json, text: str, beside: Json | None = None) -> Html:
        """A link that opens an episode, or two side by side; the text alone where the page does not
        hold it.
        """
        numbers = [self._numbers.get(id(one)) for one in (played, beside) if one is not None]
        if None in numbers:
            return html("{}", text)
        return html('<a href="#episode={}">{}</a>', ",".join(map(str, numbers)), text)

    def data(self) -> Html:
        """All of them, for the script."""
        return data("episodes-data", {"strings": list(self._strings), "episodes": self._rows})

    def _add(self, about: Mapping[str, Any], played: Json) -> None:
        turns = played["turns"]
        first = (*(about[name] for name in ("evaluation", "family", "run")), game_name(played))
        if about["use"] == "STREAM" and about["turn"] == 0:  # the first batch is the same for all
            number = self._first.setdefault(first, len(self._rows))
            if number < len(self._rows) and self._played[number] == played:
                self._numbers[id(played)] = number
                return
        texts = [played["system_prompt"], played["final_observation"], str(played.get("error", ""))]
        for turn in turns:
            failure = str(turn.get("failure") or "").replace("_", " ")
            texts += [turn["observation"], turn.get("reply", ""), turn["action"], failure]
        texts = [visible(clipped(text)) for text in texts]
        new = sum(len(text) for text in set(texts) if text not in self._strings)
        if self.steps + len(turns) > MAX_STEPS or self._characters + new > MAX_CHARACTERS:
            self.left_out += 1
            return
        self.steps += len(turns)
        self._characters += new
        self._numbers[id(played)] = len(self._rows)
        self._played.append(played)
        where = {
            **about,
            "outcome": str(played["outcome"]).replace("_", " "),
            "failures": sum(bool(turn.get("failure")) for turn in turns),
            "game": played["game"]["key"],
        }
        place = [self._known(visible(clipped(str(where[name])))) for name in FIELDS]
        self._rows.append([place, [self._known(text) for text in texts]])

    def _known(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))


def viewer(run: RunData, episodes: Episodes) -> Section | None:
    """What the script fills; None without episodes."""
    if not len(episodes):
        return None
    what = ["the TEST games under the last prompts of all loops"] * bool(run.evaluations)
    if any(evaluation.contexts for evaluation in run.evaluations):
        what.append("the STREAM games that reflectors read about")
    if run.contexts:
        what.append("what was read in the newest iteration of training")
    left_out = (
        f" {episodes.left_out:,} more did not fit into this page: TEST games come first, then what"
        " was read for the prompts above."
        if episodes.left_out
        else ""
    )
    folders = ["the run directory", *(str(one.results["folder"]) for one in run.evaluations)]
    return section(
        "episodes",
        "Episodes",
        html(
            "{} with {}: {}.{} All that were played are lines of JSON in"
            " episodes/ and contexts/ of {}.",
            counted(len(episodes), "episode"),
            counted(episodes.steps, "turn"),
            "; ".join(what),
            left_out,
            " and of ".join(folders),
        ),
        Html(
            "<noscript><p><b>Episodes are shown by this page's script, which is switched off here:"
            " read them in the files.</b></p></noscript>"
            '<form id="episode-filters" class="filters" role="search"'
            ' aria-label="Choose episodes"></form>'
            '<p id="episode-count" role="status"></p>'
            '<div id="episode-list"></div>'
            '<div id="episode-view" class="pair"></div>'
        ),
        episodes.data(),
    )


def _test(evaluation: Evaluation) -> Iterator[tuple[Mapping[str, Any], Json]]:
    protocol = evaluation.results["protocol"]
    runs, games = (protocol.get(name) for name in ("runs", "test_games"))
    for family in evaluation.families:
        for arm, played in _by_arm(evaluation.episodes, family):
            # run after run, seed after seed, as many games each
            whole = type(runs) is int and type(games) is int and runs * games > 0
            whole = whole and len(played) % (runs * games) == 0
            for number, episode in enumerate(played):
                run = number // games % runs + 1 if whole else "?"
                seeds = len(played) // (games * runs) if whole else 1
                seed = number // (games * runs) if seeds > 1 else 0
                yield (
                    {
                        "evaluation": evaluation.name,
                        "family": family,
                        "arm": _arm(evaluation, arm, seed, seeds),
                        "run": run,
                        "turn": protocol.get("meta_turns", "?"),
                        "use": "TEST",
                    },
                    episode,
                )


def _stream(evaluation: Evaluation) -> Iterator[tuple[Mapping[str, Any], Json]]:
    read = [
        (
            {
                "evaluation": evaluation.name,
                "family": family,
                "use": "STREAM",
                **_read_by(_arm(evaluation, arm, seed, max(of_seeds) + 1), context),
            },
            context,
        )
        for family in evaluation.families
        for arm, contexts in _by_arm(evaluation.contexts, family)
        for of_seeds in [context_seeds(contexts)]
        for context, seed in zip(contexts, of_seeds, strict=True)
    ]
    linked = {
        id(context)
        for several in shown_loops(loops(evaluation)).values()
        for shown in several
        for loop in (shown.loop, shown.beside)
        if loop is not None
        for context in loop.contexts.values()
    }
    for about, context in sorted(read, key=lambda item: id(item[1]) not in linked):
        for episode in context["trajectories"]:
            yield about, episode


def _by_arm(parts: Parts, family: str) -> list[tuple[str, list[Json]]]:
    """Of a family, in the order of legends."""
    of_arms = {arm: rows for (arm, of_family), rows in parts.items() if of_family == family}
    return [(arm, of_arms[arm]) for arm, *_ in arm_lines(list(of_arms))]


def _arm(evaluation: Evaluation, name: str, seed: int, seeds: int) -> str:
    """With the trained run, where there are several."""
    return f"{name} ({evaluation.run_label(seed, seeds)})" if seeds > 1 else name


def _read_by(arm: str, context: Json) -> dict[str, Any]:
    return {"arm": arm, "run": context["loop"] + 1, "turn": context["meta_turn"]}
