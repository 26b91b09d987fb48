"""What the pages for people say is true: every shell command of README.md, CONTRIBUTING.md and docs/
runs as it is written, links lead somewhere, and the tour names every file.

Commands run in a temporary copy of the checkout whose `.venv` is the environment of the tests.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from typing import NamedTuple

import pytest
import yaml

from experiments.commands.plan import PlanArgs
from experiments.commands.train import read_args, read_flags

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
ICTJAX = ".venv/bin/ictjax"
POCKET = "experiments/pocket/checkpoints/actor"

# Flags that are put behind a command, by how it begins; the first that fits counts.
SHORTENED = (
    (
        "make ",
        "--dry-run",
        "the targets are the demo, the tests and lint: minutes, and the network",
    ),
    (f"{ICTJAX} train --preset fake-tiny", "", "as it is: it takes seconds"),
    (f"{ICTJAX} train", "--help", "minutes, or an accelerator and downloaded weights"),
    (f"{ICTJAX} plan", "--help", "minutes, and the compiler for TPUs"),
    (f"{ICTJAX} evaluate --run-dir runs/house", "--help", "needs a run of a 7B model"),
    (f"{ICTJAX} evaluate --run-dir runs/paper", "--help", "needs runs of 7B models"),
    (f"{ICTJAX} evaluate --run-dir runs/qwen", "", "as it is: this has been evaluated"),
    (
        f"{ICTJAX} evaluate --run-dir runs/demo",
        "--help",
        "test_evaluate.py and test_protocol.py play arms",
    ),
    (
        f"{ICTJAX} evaluate --run-dir runs/seed0",
        "--help",
        "needs four demos; test_evaluate.py plays several seeds",
    ),
    (f"{ICTJAX} evaluate", "--evaluation.runs 1 --evaluation.test-games 1", "a minute"),
    (f"{ICTJAX} sweep", "--check", "an hour; test_sweep.py runs one"),
    (f"{ICTJAX} results runs/demo --format inspect", "--help", "needs the extra inspect"),
    (f"{ICTJAX} generate --model Qwen", "--help", "a download"),
    (f"{ICTJAX} generate --model {POCKET} --system", "--help", "a terminal to talk in"),
    (f"{ICTJAX} play --family eat --model", "--help", "compilation; test_play.py lets it play"),
    (f"{ICTJAX} serve --model Qwen", "--help", "a download"),
    (f"{ICTJAX} serve", "--check --port 0 --max-len 64", "a server would go on for ever"),
    (f"{ICTJAX} generate", "--max-new-tokens 8", "programs of one size, compiled once"),
    (f"{ICTJAX} sft", "--help", "a download, and minutes"),
    (f"{ICTJAX} adopt", "--help", "an adapter from elsewhere; test_adopt.py adopts one"),
    (f"{ICTJAX} pretrain", "--help", "an hour and a half"),
    (f"{ICTJAX} bench", "--help", "minutes"),
    (f"{ICTJAX} games generate", "--families look", "seconds for each family"),
    (f"{ICTJAX} games check", "--families look", "as above"),
    (
        ".venv/bin/python -m envs.contract examples",
        "--rules names",
        "the other rules: test_contract.py",
    ),
    (
        ".venv/bin/python -m experiments.smollm.named",
        "--help",
        "a run of half an hour; test_smollm.py counts prompts",
    ),
    (
        ".venv/bin/python -m experiments.smollm.write_chats",
        "--games-per-family 1 --actor-chats 5 --reflector-chats 5",
        "a minute",
    ),
    (".venv/bin/python -m envs.alfworld.differential", "--limit 1 --policies expert", "a minute"),
)
NOT_RUN = {
    ".venv/bin/pip install": "the network",
    ".venv/bin/ictjax models fetch": "the network",
    ".venv/bin/ictjax generate --model models/": "what models fetch has put there",
    ".venv/bin/ictjax play --family eat --model models/": "as above",
    ".venv/bin/python -m experiments.smollm.measure": "as above, and an hour",
    ".ci/run": "lint and the whole test suite",
    ".venv/bin/python -m experiments.scale_table": "hours, and the compiler for TPUs",
}
# Runs that pages go on with; here all are the run of the first block of docs/use.md.
FIRST = "runs/tiny"
PAPER = tuple(f"paper-{name}-k{k}" for name in ("alfworld", "minihack") for k in (3, 5))
RUNS = ("qwen", "demo", "second", "other", "house", *(f"seed{n}" for n in range(4)), *PAPER)


class Block(NamedTuple):
    """A fenced block that holds commands."""

    page: str
    line: int
    commands: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page):
    """Line number, language and text of every fenced block."""
    text = read(page)
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, match.start()) + 1, match[1], match[2]


def blocks():
    """Shell blocks: every line is a command. Blocks without a language: those behind a `$`."""
    for page in PAGES:
        for line, language, text in fences(page):
            joined = text.replace("\\\n", " ")
            if language == "sh":
                commands = joined.splitlines()
            elif language == "":
                commands = re.findall(r"^\$ (.*)$", joined, re.MULTILINE)
            else:
                commands = []
            if commands:
                yield Block(page, line, tuple(filter(None, commands)), text)


BLOCKS = tuple(blocks())
(FIRST_BLOCK,) = (block for block in BLOCKS if f"fake-tiny --run-dir {FIRST} " in block.text)


def as_run(command):
    """The command with what shortens it, comments left out; None for those that are not run."""
    words = shlex.split(command, comments=True)
    plain = shlex.join(words)
    if any(plain.startswith(start) for start in NOT_RUN):
        return None
    bare = shlex.join([word for word in words if not word.startswith("PYTHONPATH=")])
    for start, flags, _ in SHORTENED:
        if bare.startswith(start):
            return f"{plain} {flags}".rstrip()
    return plain


def run(command, place):
    """Runs a command as a reader would, in bash; returns exit code and output."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    } | {
        "PYTHONPATH": str(ROOT),  # this checkout, whichever one is installed
        "HF_HUB_OFFLINE": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling takes longer than running here
        "COLUMNS": "100",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkout as a reader has it after `make`, and the runs that pages go on with."""
    path = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv", "runs"):
            (path / entry.name).symlink_to(entry)
    (path / ".venv").symlink_to(sys.prefix)
    assert (path / ICTJAX).is_file(), (
        f"{sys.prefix} was installed before there was a command `ictjax`: install it again"
    )
    for command in FIRST_BLOCK.commands:
        code, output = run(as_run(command), path)
        assert code == 0, f"{command}\n{output}"
    for name in RUNS:
        (path / "runs" / name).symlink_to(path / FIRST)
    return path


def test_the_first_run_of_the_page_ends_with_a_report(place):
    assert {"metrics.jsonl", "evaluation.json", "report.html"} <= {
        entry.name for entry in (place / FIRST).iterdir()
    }


@pytest.mark.parametrize("block", [b for b in BLOCKS if b is not FIRST_BLOCK], ids=str)
def test_commands_work_as_written(block, place):
    for command in block.commands:
        shortened = as_run(command)
        if shortened is None:
            continue
        code, output = run(shortened, place)
        assert code == ("BROKEN" in block.text), f"{shortened}\n{output}"
        assert "Traceback" not in output
        if "-m envs.contract" in command:  # the page shows what it says
            assert output.splitlines()[0] in block.text


def test_the_flags_of_runs_that_are_not_begun_are_right():
    """What --help stands for above would refuse no flag."""
    for block in BLOCKS:
        for command in block.commands:
            words = shlex.split(command, comments=True)
            words = words[words[0].startswith("PYTHONPATH=") :]
            if words[:2] == [ICTJAX, "train"] and "--config" not in words:  # a run's own
                read_args(words[2:])
            elif words[:2] == [ICTJAX, "plan"]:
                read_flags(PlanArgs, "plan", "", words[2:])


def test_every_rule_of_this_test_is_used():
    commands = [command for block in BLOCKS for command in block.commands]
    bare = [re.sub(r"^PYTHONPATH=\S+ ", "", command) for command in commands]
    for start in (*NOT_RUN, *(start for start, _, _ in SHORTENED)):
        assert any(command.startswith(start) for command in bare), start
    for name in RUNS:
        assert any(f"runs/{name}" in command for command in commands), name


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = read(page)
    links = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
    for link in (markdown or image for markdown, image in links):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_readme_takes_two_minutes():
    assert len(read("README.md").splitlines()) <= 120


def test_the_tour_names_every_file():
    """Every module of the packages, and nothing that is not there."""
    tour = read("CONTRIBUTING.md").partition("<!-- files -->")[2].partition("<!-- end files -->")[0]
    named, folders = set(), []
    for line in tour.splitlines():
        match = re.match(r"( *)(\S+?)/?(?:  |$)", line)
        if match is None or line.startswith("```"):
            continue
        depth = len(match[1]) // 2
        folders = [*folders[:depth], match[2]]
        named.add("/".join(folders))
    shown_by_folder = ("tests/", "experiments/commands/")
    there = {
        str(path.relative_to(ROOT))
        for package in ("envs", "ictjax", "experiments", "examples")
        for path in ROOT.glob(f"{package}/**/*.py")
        if not path.name.startswith("__")
    }
    assert {name for name in there if not name.startswith(shown_by_folder)} <= named
    assert all((ROOT / name).exists() for name in named), named


def test_citation_and_changes_are_of_this_version():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "references"} <= citation.keys()
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert f"{project['version']}\n" in read("CHANGELOG.md")
