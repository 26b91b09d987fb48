"""The reflector, asked as in training."""

import dataclasses

from experiments import wishes
from experiments.arms.arm import Asks, History, Place, Reads
from experiments.wishes import Steps
from ictjax.records import Candidate, Context


@dataclasses.dataclass(frozen=True)
class Reflecting:
    """One reply of the reflector to every context, as in training. Told of another family's games
    (`reads="other"`) it is a placebo: what helps then is not what the episodes tell.
    """

    asks: Asks
    reads: Reads = "own"
    settings: tuple[str, ...] = ()

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        (candidate,) = yield from wishes.reflect(context, [place.key])
        return candidate
