"""Entry points: what people run. They may print, read flags and write run directories."""

import ictjax  # noqa: F401 (quiets an advice of transformers, which some modules here import first)
