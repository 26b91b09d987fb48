"""`ictjax COMMAND ...`, which is also `python -m experiments COMMAND ...`: finds the command by its
first word and imports nothing of the others.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from experiments.command import HELP, overview, run_main, unknown

# Each is the module of that name in experiments.commands.
COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "train": "Train a reflector, or go on where a run was stopped",
        "plan": "Say what a run needs of a machine, before it runs",
        "watch": "Show how a training goes, beside it or afterwards",
        "evaluate": "Measure a trained reflector on games never seen",
        "report": "Make the page of a run, and its table of results",
        "compare": "One table of several runs' evaluations",
        "sweep": "Train variants of a preset, and compare what they win",
        "results": "Give results to other programs: CSV, LaTeX, Markdown, Inspect",
        "bundle": "Pack a run's results for others, without weights",
        "export": "Write the trained reflector for other programs",
        "adopt": "Make a run of an adapter that was trained elsewhere",
        "play": "Play a game in the terminal, or watch a model play it",
        "games": "List, pack, generate and check games",
        "models": "Fetch models that a package index has",
        "generate": "Ask a model, or talk to it",
        "serve": "Answer programs that speak OpenAI's API",
        "parity": "Compare the decoder with PyTorch, family by family",
        "bench": "Measure sampler, update and environments",
        "sft": "Train a model on chats, for a start",
        "pretrain": "Make the pocket models from scripted play",
    }
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        importlib.import_module(f"experiments.commands.{words[0]}").main(words[1:])
    else:
        run_main(lambda: _overview(words), "")


def _overview(words: Sequence[str]) -> None:
    if words and words[0] not in HELP:
        raise unknown(f"Unknown command {words[0]!r}", words[0], list(COMMANDS))
    overview("ictjax", "Trains a reflector to write better system prompts for an actor.", COMMANDS)
