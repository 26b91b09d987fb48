"""Whether the games of an evaluation are new: counted from their initial states, not taken from
what the protocol promises.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.evaluation_results import read_object
from experiments.report_data import Evaluation, RunData, training_folders

_STATE = re.compile(rb'"state_hash": ?"(\w+)"')
_SETS = ("stream", "select", "test")


def disjointness(run: RunData, evaluation: Evaluation) -> str:
    """One sentence about STREAM, SELECT and TEST games and those of training; empty where this run
    does not hold which games were drawn.

    Raises ValueError, naming the file, for one that is damaged.
    """
    path = run.folder / evaluation.results["folder"] / "games.json"
    if not path.is_file():
        return ""
    states: dict[str, set[str]] = {name: set() for name in _SETS}
    for family, drawn in read_object(path, "remove it").items():
        if family in evaluation.families and isinstance(drawn, Mapping):
            known = drawn.get("states")
            for name in _SETS:
                states[name].update(
                    str(known[game])
                    for game in _names(drawn.get(name))
                    if isinstance(known, Mapping) and game in known
                )
    every = set().union(*states.values())
    twice = sum(map(len, states.values())) - len(every)
    folders, absent = training_folders(run)
    trained = set() if absent else set().union(*map(_states_of_training, folders))
    counts = ", ".join(f"{len(states[name])} {name.upper()}" for name in reversed(_SETS))
    of_training = (
        f"{len(every & trained)} of them among the {len(trained)} that training has played"
        if trained
        else "what training has played is not here to be counted"
    )
    return (
        f"Counted here: different initial states of games: {counts}; {twice} of them in two of"
        f" these sets; {of_training}."
    )


def _names(value: Any) -> Iterator[str]:
    """The names of games, however they are nested by run and meta-turn."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _names(item)


def _states_of_training(folder: Path) -> set[str]:
    # looked for in the text: a run of weeks has gigabytes of episodes
    states: set[bytes] = set()
    for pattern in ("episodes/iteration_*.jsonl", "contexts/*.jsonl"):
        for path in folder.glob(pattern):
            with path.open("rb") as file:
                states.update(found for line in file for found in _STATE.findall(line))
    return {state.decode() for state in states}
