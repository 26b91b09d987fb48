"""docs/models.md says what the code does: families, commands."""

import pathlib
import re
import shlex

from experiments.command import parse
from experiments.commands.generate import GenerateArgs
from ictjax.models.hf.translate import FAMILIES

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")


def rows(text):
    """The cells of a table's rows, without its heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def test_every_family_is_on_the_page():
    table = PAGE.partition("## Families")[2].partition("### Parity")[0]
    assert [row[1].strip("`") for row in rows(table)] == [
        family.architecture for family in FAMILIES.values()
    ]


def test_the_commands_of_the_page_parse():
    commands = re.findall(r"^\.venv/bin/ictjax generate (.*?)(?:  +#.*)?$", PAGE, re.MULTILINE)
    assert len(commands) > 4
    for command in commands:
        parse(GenerateArgs, "generate", "", shlex.split(command))
