"""Environments of other packages: entry points, import paths, and one sentence for each way to get
them wrong.
"""

import pathlib
import sys
import textwrap

import pytest

from envs import prompts
from envs.api import GameId, Outcome
from envs.fake import FakeEnvironment
from envs.pool import WorkerPool
from envs.registry import (
    describe,
    import_path,
    initial_prompt,
    known_names,
    load_environment,
    nearest,
)

GOOD = """
from envs.fake import FakeEnvironment

class Doors(FakeEnvironment):
    def __init__(self, sign=""):
        super().__init__()
        self.sign = sign
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package: modules and entry points in a folder on the search path, as pip would lay
    them out.
    """

    def build(package, modules, entries):
        folder = tmp_path / package
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[ictjax.environments]", *lines, ""]))
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(folder))
        return folder

    return build


def test_an_entry_point_is_a_short_name_and_is_not_imported_until_used(install):
    install("lovely_doors", {"lovely_doors": GOOD}, {"doors": "lovely_doors:Doors"})
    assert "doors" in known_names()
    assert import_path("doors") == "lovely_doors:Doors"
    assert "lovely_doors" not in sys.modules
    environment = load_environment("doors", {"sign": "open me"})
    assert environment.sign == "open me"
    assert isinstance(environment, FakeEnvironment)


def test_workers_find_the_environment_of_an_entry_point(install):
    install("worker_doors", {"worker_doors": GOOD}, {"worker-doors": "worker_doors:Doors"})
    with WorkerPool("worker-doors", num_workers=1) as pool:
        ticket = pool.reset(GameId(env="fake", family="door", key="3"), max_steps=2)
        (event,) = pool.poll(60.0)
    assert event.ticket == ticket
    assert event.step.observation.text.startswith("You are in room 3.")
    assert event.step.outcome is not Outcome.FAILED


def test_a_clash_of_names_is_refused_with_both_packages_and_only_when_the_name_is_used(install):
    install("first_maze", {"first_maze": GOOD}, {"maze": "first_maze:Doors"})
    install("second_maze", {"second_maze": GOOD}, {"maze": "second_maze:Doors"})
    assert load_environment("fake").name == load_environment("first_maze:Doors").name == "fake"
    with pytest.raises(
        ValueError,
        match=(
            r"'maze' is claimed by package .* and package .*: uninstall one, or use an import path"
        ),
    ) as caught:
        import_path("maze")
    assert "package first_maze 1.0" in str(caught.value) and "package second_maze 1.0" in str(
        caught.value
    )


def test_a_package_that_claims_a_built_in_name_is_named(install):
    install("impostor", {"impostor": GOOD}, {"fake": "impostor:Doors"})
    with pytest.raises(ValueError, match="'fake' is claimed by ictjax and package impostor 1.0"):
        load_environment("fake")


def test_the_same_entry_point_found_twice_is_no_clash(install, monkeypatch):
    folder = install("twice", {"twice_doors": GOOD}, {"twice": "twice_doors:Doors"})
    other = folder.parent / "copy"
    other.mkdir()
    (other / "twice_editable-1.0.dist-info").mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (other / "twice_editable-1.0.dist-info" / name).write_text(
            (folder / "twice-1.0.dist-info" / name).read_text()
        )
    monkeypatch.syspath_prepend(str(other))
    assert import_path("twice") == "twice_doors:Doors"


def test_a_broken_entry_point_is_named(install):
    install(
        "broken",
        {"broken_raises": "raise RuntimeError('no display')"},
        {"nowhere": "no:where:at all", "raises": "broken_raises:Thing"},
    )
    with pytest.raises(
        ValueError,
        match=(
            "entry point 'nowhere' of package broken 1.0 reads 'no:where:at all', which is no"
            " import path"
        ),
    ):
        import_path("nowhere")
    with pytest.raises(
        ValueError,
        match=r"'raises' \(broken_raises:Thing\) cannot be imported: RuntimeError: no display",
    ):
        load_environment("raises")


def test_an_unknown_name_is_refused_with_all_known_ones(install):
    install("listed", {}, {"aardvark": "listed:X"})
    with pytest.raises(
        ValueError,
        match="'alfword': use one of aardvark, alfworld, fake, minihack, or an import path",
    ):
        import_path("alfword")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("families = ('a',)", "Broken lacks name, games, open"),
        (
            "name = 'x|y'\n    families = ('a',)\n    games = open = print",
            r"Broken.name must be a non-empty string without '\|', got 'x\|y'",
        ),
        (
            "name = 'x'\n    families = 'ab'\n    games = open = print",
            "Broken.families must be a tuple of non-empty strings .* got 'ab'",
        ),
        (
            "name = 'x'\n    families = ()\n    games = open = print",
            r"Broken.families must be a tuple of non-empty strings .* got \(\)",
        ),
        (
            "name = 'x'\n    families = ('b', 'a')\n    games = open = print",
            "Broken.families must be sorted and hold each name once",
        ),
        (
            "name = 'x'\n    families = ('a',)\n    games = open = 3",
            "Broken.games must be a method",
        ),
        (
            "name = 'x'\n    families = ('a',)\n    games = open = print\n    initial_prompt = ' '",
            "Broken.initial_prompt must be",
        ),
    ],
)
def test_a_class_that_breaks_the_contract_gets_one_sentence(install, monkeypatch, body, sentence):
    monkeypatch.delitem(sys.modules, "breaks_it", raising=False)
    install("breaks_it_package", {"breaks_it": f"class Broken:\n    {body}\n"}, {})
    with pytest.raises(ValueError, match=sentence) as caught:
        load_environment("breaks_it:Broken")
    assert str(caught.value).startswith("'breaks_it:Broken' is not an environment: ")
    assert "\n" not in str(caught.value)


def test_what_raises_while_it_is_built_is_said_in_one_sentence(install):
    modules = {"built": "class Late:\n    def __init__(self):\n        {}['key']\n\nTHREE = 3\n"}
    install("built_package", modules, {})
    with pytest.raises(ValueError, match="'built:Late' cannot be built: KeyError: 'key'"):
        load_environment("built:Late")
    with pytest.raises(
        ValueError, match="'built:THREE' is not an environment: a int cannot be called"
    ):
        load_environment("built:THREE")
    with pytest.raises(
        ValueError,
        match=("'built:Late' does not take the options size=3: got an unexpected keyword argument"),
    ):
        load_environment("built:Late", {"size": "3"})


def test_a_description_is_optional_and_comes_back_as_json_reads_it():
    class Described(FakeEnvironment):
        initial_prompt = "Play."

        def describe(self):
            return {"source": "made up", "counts": {"train": (1, 2)}}

    class Garbled(FakeEnvironment):
        def describe(self):
            return {"path": pathlib.Path("here")}

    assert describe(Described()) == {"source": "made up", "counts": {"train": [1, 2]}}
    assert describe(FakeEnvironment()) == {}
    assert initial_prompt(Described()) == "Play."
    assert initial_prompt(FakeEnvironment()) == prompts.ANY_GAME
    with pytest.raises(
        ValueError, match="description of environment 'fake' cannot be written as a JSON object"
    ):
        describe(Garbled())


def test_of_many_names_a_message_has_the_nearest_few():
    assert nearest("bel", ["bell", "door"]) == "bell, door"
    many = [f"room_{size}" for size in range(98)]
    assert nearest("rom_7", many).startswith("room_7, ") and nearest("?", many).endswith("(of 98)")
    assert len(nearest("room", many)) < 120
