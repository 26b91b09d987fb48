"""What a terminal can do, by the name that it gives itself."""

import os
from collections.abc import Mapping


def draws_anew(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a terminal obeys escape sequences and goes back in a line, as bars need; one that
    says TERM=dumb shows both as text.
    """
    return environ.get("TERM", "").lower() not in ("dumb", "unknown")
