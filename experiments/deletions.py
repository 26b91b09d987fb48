"""What the sentences of a prompt are worth: how much less is won without each of them. Pure
functions; who plays is `experiments.evaluation_parts`.

A record of a loop: "run"; "prompt", its last one; "whole", the outcomes of its TEST games under
that; and "sentences", each with its "text" and the "outcomes" of the same games under the prompt
without it. Nothing is chosen by them.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.intervals import interval, resampled_means
from experiments.outcomes import mean

Json = dict[str, Any]

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
    ("drop", with its interval, as of other paired differences: not corrected for their number). The
    largest drop first. Games that the environment failed either way count for neither.
    """
    found: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for loop in loops:
        whole_g = _array(loop["whole"])
        for sentence in loop["sentences"]:
            drop_g = whole_g - _array(sentence["outcomes"])
            if not np.isnan(drop_g).all():
                found.setdefault(sentence["text"], []).append((loop["run"], whole_g, drop_g))
    rows = [_sentence(text, played) for text, played in found.items()]
    return {
        "prompts": len(loops),
        "games": sum(len(s["outcomes"]) for loop in loops for s in loop["sentences"]),
        "sentences": sorted(rows, key=lambda row: -row["drop"]),  # equals as they were found
    }


def _sentence(text: str, played: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> Json:
    whole_rg, drop_rg = (_rows([of[n] for of in played]) for n in (1, 2))
    drop_srg = drop_rg[None]
    loops_sr = mean(drop_srg, axis=2)
    centre = float(loops_sr.mean())
    (resampled,) = resampled_means([{("drop",): drop_srg}])
    return {
        "text": text,
        "prompts": len({run for run, _, _ in played}),
        "whole": float(mean(np.where(np.isnan(drop_rg), np.nan, whole_rg), axis=1).mean()),
        "drop": centre,
        "ci95": list(interval([drop_srg], centre, loops_sr, resampled[("drop",)], -1.0)),
    }


def _rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    filled = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        filled[number, : len(row)] = row
    return filled


def _array(score: Sequence[int | None]) -> np.ndarray:
    return np.array([np.nan if won is None else won for won in score], dtype=float)
