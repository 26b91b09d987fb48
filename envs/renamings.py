"""Families that come again with other names for their verbs: what a verb does there is known by
nobody and can only be seen. `eat~0` and `eat~1` play the games of `eat`, each by names of its own.
"""

import random
from collections.abc import Sequence

MARK = "~"  # between the name of a family and the number of a renaming
MOST = 1000
LABELS: Sequence[str] = (
    "bend break burn carve clean climb count crush dig fold fill fix hang hide lift light mix paint"
    " peel play polish press pull roll shake sharpen sing sit smell spin squeeze stretch taste"
    " touch turn twist wash wave whistle wipe"
).split()
"""English verbs that other things may be called by."""


def parse_count(renamings: str, style: str) -> int:
    """The option of an environment. Raises ValueError for what is no number from 0 to 1000, and for
    renamings in another style than "short", which lists the verbs.
    """
    if not renamings.isdecimal() or int(renamings) > MOST:
        raise ValueError(f"renamings is a number from 0 to {MOST}, got {renamings!r}.")
    if int(renamings) and style != "short":
        raise ValueError(f"renamings={renamings} needs text=short, got text={style}.")
    return int(renamings)


def with_renamed(families: Sequence[str], renamings: int) -> tuple[str, ...]:
    """The families and their renamings, sorted."""
    if not renamings:
        return tuple(families)
    renamed = (f"{family}{MARK}{n}" for family in families for n in range(renamings))
    return tuple(sorted([*families, *renamed]))


def base_family(family: str, renamings: int) -> str:
    """The family whose games a renaming plays; a name that is none of so many stays as it is."""
    base, mark, number = family.partition(MARK)
    known = mark and number.isdecimal() and str(int(number)) == number
    return base if known and int(number) < renamings else family


def draw_names(words: Sequence[str], labels: Sequence[str], rng: random.Random) -> dict[str, str]:
    """A name of its own, of `labels`, for each word. ValueError for fewer labels than words."""
    return dict(zip(words, rng.sample(labels, len(words)), strict=True))
