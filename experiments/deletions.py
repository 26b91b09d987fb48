"""What the sentences of a prompt are worth: how much less is won without each of them. Pure
functions; who plays is `experiments.evaluation_parts`.

A record of a loop: "run"; "seed", which trained run it is of (0 where there is one); "prompt", its
last one; "whole", the outcomes of its TEST games under
that; and "sentences", each with its "text" and the "outcomes" of the same games under the prompt
without it. Nothing is chosen by them.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.intervals import interval, resampled_means
from experiments.outcomes import mean
from experiments.visible import visible
from experiments.wording import counted, points

Json = dict[str, Any]
_LONGEST = 100  # of a sentence that is named in a line
_Place = tuple[int, int]  # trained seed and run

# behind a full stop, not that of "1.", and at the end of a line
_END = re.compile(r"(?<=[^\d][.!?])\s+|\s*\n\s*")


def sentences(prompt: str) -> list[str]:
    """A prompt in pieces that make it up again, each a sentence or a line with what separates it
    from the next.
    """
    ends = [found.end() for found in _END.finditer(prompt)]
    bounds = [0, *ends, len(prompt)]
    return [piece for start, end in itertools.pairwise(bounds) if (piece := prompt[start:end])]


def shortened(prompt: str) -> list[tuple[str, str]]:
    """Every sentence of a prompt, and the prompt without it; none where nothing would be left."""
    pieces = sentences(prompt)
    found = [
        (piece.strip(), "".join(pieces[:number] + pieces[number + 1 :]).strip())
        for number, piece in enumerate(pieces)
    ]
    return [(text, rest) for text, rest in found if text and rest]


def summarise_deletions(loops: Sequence[Mapping[str, Any]]) -> Json:
    """Of the records of one family what evaluation.json says: every sentence with the share of
    games won under the prompts that hold it ("whole"), and by how much less is won without it
    ("drop", with its interval, as of other paired differences, over the trained seeds, runs and
    games of these prompts: not corrected for their number). Every prompt counts the same. The
    largest drop first. Games that the environment failed either way count for neither.
    """
    found: dict[str, dict[_Place, list[_Paired]]] = {}
    for loop in loops:
        whole_g, place = _array(loop["whole"]), (loop.get("seed", 0), loop["run"])
        for sentence in loop["sentences"]:
            drop_g = whole_g - _array(sentence["outcomes"])
            if not np.isnan(drop_g).all():
                whole = np.where(np.isnan(drop_g), np.nan, whole_g)
                held = found.setdefault(sentence["text"], {})
                held.setdefault(place, []).append(_Paired(whole, drop_g))
    rows = [_sentence(text, held) for text, held in found.items()]
    return {
        "prompts": len(loops),
        "seeds": len({loop.get("seed", 0) for loop in loops}),
        "games": sum(len(s["outcomes"]) for loop in loops for s in loop["sentences"]),
        "sentences": sorted(rows, key=lambda row: -row["drop"]),  # equals as they were found
    }


def largest_drop(deletions: Mapping[str, Json]) -> str:
    """The sentence that is worth most in any family, in one sentence; of equals the one whose
    interval begins highest, then the one that most prompts hold.

    Args:
      deletions: what `summarise_deletions` says, by family.
    """
    found = [
        (sentence, family)
        for family, of_family in deletions.items()
        for sentence in of_family["sentences"]
    ]
    if not found:
        return "Nothing could be left out of the last prompts: no sentence stands beside others."
    sentence, family = max(
        found, key=lambda one: (one[0]["drop"], one[0]["ci95"][0], one[0]["prompts"])
    )
    text = visible(" ".join(sentence["text"].split()))
    return (
        f"Of {counted(len(found), 'sentence')} left out, the one worth most: {family}:"
        f" {text[:_LONGEST]!r}, {points(-sentence['drop'])} points without it (95 % interval"
        f" {points(-sentence['ci95'][1])} to {points(-sentence['ci95'][0])};"
        f" {counted(sentence['prompts'], 'prompt')}). The report has all."
    )


class _Paired(NamedTuple):
    """The games of a prompt that holds a sentence: 1 where it won and what goes without it, nan
    where one of the two is not known.
    """

    whole_g: np.ndarray
    drop_g: np.ndarray


def _sentence(text: str, held: Mapping[_Place, Sequence[_Paired]]) -> Json:
    """Of a sentence that stands in these prompts; where it stands twice in one, the mean of both
    deletions.
    """
    seeds, runs = (sorted({place[n] for place in held}) for n in (0, 1))
    num_games = max(len(paired.drop_g) for games in held.values() for paired in games)
    # nan: a seed's prompt that does not hold it
    whole_srg, drop_srg = (np.full((len(seeds), len(runs), num_games), np.nan) for _ in range(2))
    for (seed, run), games in held.items():
        at = seeds.index(seed), runs.index(run)
        whole_srg[at][: len(games[0].whole_g)] = mean(np.stack([g.whole_g for g in games]), axis=0)
        drop_srg[at][: len(games[0].drop_g)] = mean(np.stack([g.drop_g for g in games]), axis=0)
    loops_sr = mean(drop_srg, axis=2)
    centre = float(np.nanmean(loops_sr))
    (resampled,) = resampled_means([{("drop",): drop_srg}])
    return {
        "text": text,
        "prompts": len(held),
        "seeds": len(seeds),
        "whole": float(np.nanmean(mean(whole_srg, axis=2))),
        "drop": centre,
        "ci95": list(interval([drop_srg], centre, loops_sr, resampled[("drop",)], -1.0)),
    }


def _array(score: Sequence[int | None]) -> np.ndarray:
    return np.array([np.nan if won is None else won for won in score], dtype=float)
