"""`ictjax parity`."""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence

from experiments.command import parse, run_main
from ictjax.extras import install

_DESCRIPTION = (
    "How far the decoder is from Hugging Face's PyTorch models, on tiny random checkpoints of every"
    " family."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityArgs:
    """It has no flags."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again.")


def _main(argv: list[str]) -> None:
    parse(ParityArgs, "parity", _DESCRIPTION, argv)
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            "PyTorch is not installed, and the comparison needs it: in the clone, run"
            f" `{install('parity')}`, which takes the version pinned there."
        )
    # PyTorch, JAX and transformers at once
    from experiments.parity import compare_all

    compare_all()
