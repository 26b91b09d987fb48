"""ALFWorld's games: index of a download, packed file, generator, splits, and their command line."""

import collections
import hashlib
import json
import lzma
import os
import pathlib
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tracemalloc
import zlib

import pytest

from envs.alfworld import ALFWorld, generate, index, pack, sources
from envs.alfworld import tree as trees
from envs.alfworld.engine import compile_game
from envs.alfworld.tables import FAMILIES, load_tables
from envs.api import GameId
from experiments import games as cli

ROOT = pathlib.Path(__file__).parents[1]
ARCHIVES = sorted((ROOT.parent / "shared" / "data" / "alfworld").glob("*.tar.xz"))


@pytest.fixture(autouse=True)
def no_download(monkeypatch, tmp_path):
    """Tests see neither the user's games nor the user's cache."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield
    forget()


def forget():
    trees._cached_index.cache_clear()
    pack._about.cache_clear()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tree in the official layout: two small games of each family in each split."""
    folder = tmp_path_factory.mktemp("games") / "alfworld"
    cli.main(["generate", "--out", str(folder), "--games", "2", "--rooms", "small"])
    return folder


@pytest.fixture
def tree(written, tmp_path):
    return shutil.copytree(written, tmp_path / "alfworld")


def trials(tree, split="train"):
    return sorted(path.parent for path in tree.glob(f"json_2.1.1/{split}/*/*/game.tw-pddl"))


def key_of(trial):
    return "/".join(trial.parts[-3:])


def rewrite(trial, **changes):
    content = json.loads((trial / "game.tw-pddl").read_text())
    content.update(changes)
    (trial / "game.tw-pddl").write_text(
        json.dumps({name: value for name, value in content.items() if value is not None})
    )


def play(content, commands):
    """Whether the engine admits every command and reports the win at the last one alone."""
    live = compile_game(content).start()
    answer = live.reset()
    for command in commands:
        if answer.won or command not in answer.commands:
            return False
        answer = live.step(command)
    return answer.won


# --- index ---


def test_index_applies_the_rule_of_the_stock_environment(tree):
    plain = trees.Tree(tree).index()
    assert {
        split: {family: len(keys) for family, keys in of.items()}
        for split, of in plain.games.items()
    } == {split: dict.fromkeys(FAMILIES, 2) for split in index.OFFICIAL_SPLITS}
    assert plain.left_out == {} and not plain.official
    first, second, third, fourth, fifth, sixth, *_ = trials(tree)
    task = tree / "json_2.1.1" / "train" / "pick_and_place_with_movable_recep-Apple-Bowl-Shelf-3"
    shutil.copytree(first, task / "trial_T1")
    shutil.copytree(
        first,
        tree
        / "json_2.1.1"
        / "train"
        / "pick_clean_then_place_in_recep-AppleSliced-None-Shelf-3"
        / "trial_T1",
    )
    (tree / "json_2.1.1" / "train" / "notes").mkdir()
    rewrite(second, solvable=False)
    rewrite(third, solvable=None)
    (fourth / "game.tw-pddl").unlink()
    (fifth / "traj_data.json").write_text('{"task_type": "pick_up_and_dance"}')
    (sixth / "traj_data.json").unlink()
    forget()
    found = trees.Tree(tree).index()
    assert found.left_out == {
        "movable receptacle or slicing": 2,
        "no game file": 1,
        "no solvable key": 1,
        "not solvable": 1,
        "other task type": 1,
    }
    assert found.count("train") == plain.count("train") - 5
    keys = [key for of in found.games.values() for family in of.values() for key in family]
    assert keys == [
        key
        for of in plain.games.values()
        for family in of.values()
        for key in family
        if key in keys
    ]
    assert not {key_of(trial) for trial in (second, third, fourth, fifth, sixth)} & set(keys)
    assert trees.Tree(tree / "json_2.1.1").index() == found


def test_index_is_cached_until_the_tree_changes(tree, monkeypatch):
    first = trees.Tree(tree).index()
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(trees, "_read_index", lambda *_: pytest.fail("the tree was read again"))
        assert trees.Tree(tree).index() == first
    trial = trials(tree)[0]
    rewrite(trial, walkthrough=["look"])
    forget()
    changed = trees.Tree(tree).index()
    assert changed.games == first.games and changed.manifest != first.manifest
    shutil.rmtree(trial)
    forget()
    assert trees.Tree(tree).index().count("train") == first.count("train") - 1
    next(
        (pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "ictjax").glob("alfworld-*.json")
    ).write_text("{not json")
    forget()
    assert trees.Tree(tree).index().count("train") == first.count("train") - 1


def test_partial_download_is_reported_with_counts_and_the_command(tree):
    for trial in trials(tree):
        # as if they were official
        trial.rename(trial.with_name(trial.name.replace("generated_small", "T2019")))
    shutil.rmtree(tree / "json_2.1.1" / "valid_unseen")
    environment = ALFWorld(data=str(tree))
    said = environment.describe()["incomplete"]
    assert "train 12 of 3,553, valid_seen 12 of 140, valid_unseen 0 of 134" in said
    content = trials(tree)[0] / "game.tw-pddl"
    content.write_text(content.read_text()[:-100])
    forget()
    damaged = ALFWorld(data=str(tree)).describe()["incomplete"]
    assert (
        f"(1 damaged, the first is {key_of(content.parent)})" in damaged
        and f"`alfworld-download --data-dir {tree} -f`" in damaged
    )
    assert f"`alfworld-download --data-dir {tree}`" in said
    assert (
        environment.describe()["source"] == "official"
        and environment.describe()["test"] == "valid_seen"
    )
    with pytest.raises(ValueError, match="No put games for valid_unseen.*alfworld-download"):
        environment.games("put", "valid_unseen")
    with pytest.raises(ValueError, match="No ALFWorld games|There are no ALFWorld games"):
        ALFWorld(data=str(tree / "json_2.1.1" / "nothing"))


def test_damaged_game_is_named_and_the_others_go_on(tree):
    damaged, gone, sound, *_ = trials(tree)
    whole = (damaged / "game.tw-pddl").read_text()
    (damaged / "game.tw-pddl").write_text(whole[: len(whole) // 2])
    source = trees.Tree(tree)
    assert source.index().damaged == (key_of(damaged),)
    assert (
        f"1 games in {tree} are damaged, the first is {key_of(damaged)}"
        in index.what_is_missing(source.index(), tree)
    )
    with pytest.raises(ValueError, match=r"game\.tw-pddl is damaged .*alfworld-download.* -f"):
        source.load(key_of(damaged))
    rewrite(gone, grammar=None)
    with pytest.raises(ValueError, match="'grammar' is missing"):
        source.load(key_of(gone))
    shutil.rmtree(gone)
    with pytest.raises(ValueError, match="There is no game train/.*alfworld-download"):
        source.load(key_of(gone))
    assert source.load(key_of(sound))["solvable"] is True


@pytest.mark.parametrize(
    "key",
    [
        "",
        "train",
        "train/a/b/c",
        "train/../b",
        "/etc/passwd",
        "test/a/b",
        "generated/full/-1",
        "generated/huge/1",
    ],
)
def test_key_of_no_game_is_refused(key, tree):
    with pytest.raises(ValueError, match=r"ALFWorld game|rooms"):
        sources.load_game(key, data=str(tree))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("traj_data.json", b'[{"task_type": "pick_and_place_simple"}]'),
        ("traj_data.json", b"[]"),
        ("traj_data.json", b"7"),
        ("traj_data.json", b"null"),
        ("traj_data.json", b""),
        ("traj_data.json", b"\xff\xfe"),
        ("traj_data.json", b'{"a":' * 5000),
        ("game.tw-pddl", b"[]"),
        ("game.tw-pddl", b"7"),
        ("game.tw-pddl", b'["solvable"]'),
        ("game.tw-pddl", b"null"),
        ("game.tw-pddl", b""),
        ("game.tw-pddl", b"[" * 100_000),
        ("game.tw-pddl", None),
        ("traj_data.json", None),
    ],
    ids=range(15),
)
def test_a_damaged_file_costs_its_own_game_alone(tree, file, content):
    broken, *others = trials(tree)
    (broken / file).unlink()
    if content is None:
        os.mkfifo(broken / file)
    else:
        (broken / file).write_bytes(content)
    found = trees.Tree(tree).index()
    assert found.damaged == (key_of(broken),)
    assert found.count("train") == len(others)
    assert trees.Tree(tree).index().count("train") == len(others)
    if file.startswith("game"):
        with pytest.raises(ValueError, match="trial_generated_small_.* is damaged"):
            trees.Tree(tree).load(key_of(broken))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"pick_and_place_simple-a|b", "pick_and_place_simple-a|b"),
        (b"pick_and_place_simple-\xff", "pick_and_place_simple-\\xff"),
        (b"pick_and_place_simple-a\nb", "pick_and_place_simple-a\\nb"),
        (b"pick_and_place_simple-\x1b[2J", "pick_and_place_simple-\\x1b[2J"),
    ],
)
def test_a_name_that_no_game_can_have_costs_its_own_game_alone(tree, tmp_path, name, shown):
    broken, *_ = trials(tree)
    folder = os.fsencode(broken.parent.parent) + b"/" + name
    os.mkdir(folder)
    shutil.copytree(os.fsencode(broken), folder + b"/trial")
    environment = ALFWorld(data=str(tree))
    for family in environment.families:
        assert len(environment.games(family, "train")) == 2
    found = trees.Tree(tree).index()
    assert found.damaged == (f"train/{shown}/trial",)
    forget()
    assert trees.Tree(tree).index() == found  # from the cache
    pack.write_pack(trees.Tree(tree), tmp_path / "all.games")
    assert pack.Pack(tmp_path / "all.games").index() == found
    assert "1 games" in environment.describe()["incomplete"]


def test_a_folder_that_cannot_be_listed_is_damaged(tree, monkeypatch):
    broken = trials(tree)[0].parent
    closed, listdir = broken, os.listdir

    def guarded(path):
        if pathlib.Path(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(trees.os, "listdir", guarded)
    assert trees.Tree(tree).index().damaged == ("/".join(broken.parts[-2:]),)
    forget()
    closed = broken.parent
    with pytest.raises(ValueError, match=r"/train cannot be listed \(Permission denied\): check"):
        trees.Tree(tree).index()


@pytest.mark.parametrize(
    "change",
    [
        {"games": {}},
        {"games": []},
        {"games": {"train": {"put": ["train/a|b/c"]}}},
        {"manifest": 7},
        {"left_out": []},
        {"left_out": {"x": "many"}},
        {"damaged": [7]},
        {"damaged": None},
    ],
)
def test_an_index_that_was_not_written_is_refused(tree, change):
    data = trees.Tree(tree).index().to_json()
    assert index.Index.from_json(json.loads(json.dumps(data))).to_json() == data
    with pytest.raises((KeyError, TypeError, AttributeError, ValueError)):
        index.Index.from_json(data | change)


@pytest.mark.parametrize("data", ["auto", "official"])
def test_a_mistyped_alfworld_data_stops(tree, tmp_path, monkeypatch, data):
    for wrong in (tmp_path / "alfwrold", tmp_path):
        monkeypatch.setenv("ALFWORLD_DATA", str(wrong))
        with pytest.raises(ValueError, match=f"no ALFWorld games at ALFWORLD_DATA='{wrong}'"):
            ALFWorld(data=data)
    assert ALFWorld(data="generated").describe()["source"] == "generated"
    assert ALFWorld(data=str(tree)).games("put", "train")
    monkeypatch.setenv("ALFWORLD_DATA", "~nobody-of-this-name/x")
    with pytest.raises(ValueError, match="ALFWORLD_DATA='~nobody-of-this-name/x'"):
        ALFWorld(data=data)


def test_alfworld_data_that_says_nothing_more_than_the_package_does_is_no_mistake(
    tmp_path, monkeypatch
):
    for empty in ("", "~/.cache/alfworld", str(tmp_path / ".cache" / "alfworld")):
        monkeypatch.setenv("ALFWORLD_DATA", empty)
        assert ALFWorld().describe()["source"] == "generated"


# --- packed file ---


def test_pack_gives_back_every_game_and_the_same_index(tree, tmp_path):
    source, path, calls = trees.Tree(tree), tmp_path / "all.games", []
    keys = [key_of(trial) for split in index.OFFICIAL_SPLITS for trial in trials(tree, split)]
    assert (
        pack.write_pack(source, path, lambda done, total: calls.append((done, total)))
        == len(keys)
        == 36
    )
    assert calls == [(done, 36) for done in range(1, 37)]
    packed = pack.Pack(path)
    assert packed.index() == source.index()
    assert [packed.load(key) for key in keys] == [source.load(key) for key in keys]
    assert sorted(path.parent.glob("all.games*")) == [path]
    from_pack, from_tree = ALFWorld(data=str(path)), ALFWorld(data=str(tree))
    assert from_pack.describe() == from_tree.describe()
    assert from_pack.games("heat", "test") == from_tree.games("heat", "test")
    with pytest.raises(ValueError, match="There is no game train/a/b"):
        packed.load("train/a/b")


def load_all(path, folders):
    for trial in folders:
        pack.Pack(path).load(key_of(trial))


def test_pack_that_is_corrupt_is_named(tree, tmp_path, monkeypatch):
    path = tmp_path / "all.games"
    pack.write_pack(trees.Tree(tree), path)
    whole, key = path.read_bytes(), key_of(trials(tree)[0])
    with sqlite3.connect(path) as database:
        other = database.execute("SELECT body FROM games WHERE key != ?", (key,)).fetchone()[0]
        database.execute("UPDATE games SET body = ? WHERE key = ?", (other, key))
    database.close()
    with pytest.raises(ValueError, match=rf"{key} in .*all\.games is damaged"):
        pack.Pack(path).load(key)
    assert pack.Pack(path).load(key_of(trials(tree)[1]))["solvable"] is True
    for size in (0, 100, len(whole) // 2, len(whole) - 2000):
        forget()
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"all\.games"):
            load_all(path, trials(tree) + trials(tree, "valid_unseen"))
    forget()
    path.write_bytes(whole)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE about SET value = 'another' WHERE name = 'format'")
    database.close()
    with pytest.raises(ValueError, match="another format"):
        ALFWorld(data=str(path)).games("put", "train")
    monkeypatch.setenv("ALFWORLD_DATA", str(path))
    forget()
    with pytest.raises(ValueError, match="another format"):
        ALFWorld().games("put", "train")


def changed(path, statement, *values):
    """Changes a packed file as SQLite writes it."""
    with sqlite3.connect(path) as database:
        database.execute(statement, values)
    database.close()
    forget()


def test_one_changed_byte_in_the_index_of_keys_gives_no_other_game(tree, tmp_path):
    path = tmp_path / "all.games"
    pack.write_pack(trees.Tree(tree), path)
    key = key_of(trials(tree)[7])
    whole, expected = path.read_bytes(), pack.Pack(path).load(key)
    refused, place = 0, -1
    # SQLite's index holds each key and, behind it, the number of its row
    while (place := whole.find(key.encode(), place + 1)) >= 0:
        for bit in range(8):
            broken = bytearray(whole)
            broken[place + len(key)] ^= 1 << bit
            path.write_bytes(broken)
            try:
                assert pack.Pack(path).load(key) == expected
            except ValueError:
                refused += 1
    assert refused >= 8


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE games SET key = 'train/x/y' WHERE key = ?",
        "UPDATE games SET body = (SELECT body FROM games WHERE key != ?)",
        "UPDATE about SET value = replace(value, '\"put\"', '\"cool\"') WHERE ? != ''",
        "UPDATE about SET value = replace(value, ?, 'train/x/y')",
        "UPDATE about SET value = '[]' WHERE name = 'index' AND ? != ''",
        "UPDATE about SET value = x'ff' WHERE name = 'index' AND ? != ''",
        "UPDATE about SET value = '0' WHERE name = 'sha256' AND ? != ''",
        "UPDATE shared SET body = body || x'20' WHERE ? != ''",
        "UPDATE shared SET body = 7 WHERE id = 1 AND ? != ''",
        "DELETE FROM shared WHERE ? != ''",
        "DELETE FROM about WHERE ? != ''",
        "DELETE FROM games WHERE key = ?",
    ],
)
def test_a_pack_that_was_changed_is_refused(tree, tmp_path, statement):
    path, key = tmp_path / "all.games", key_of(trials(tree)[0])
    pack.write_pack(trees.Tree(tree), path)
    changed(path, statement, key)
    with pytest.raises(ValueError, match=r"all\.games"):
        pack.Pack(path).load(key)


def test_two_games_that_change_places_are_refused(tree, tmp_path):
    path, (one, other) = tmp_path / "all.games", map(key_of, trials(tree)[:2])
    pack.write_pack(trees.Tree(tree), path)
    for old, new in ((one, "a/b/c"), (other, one), ("a/b/c", other)):
        changed(path, "UPDATE games SET key = ? WHERE key = ?", new, old)
    for key in (one, other):
        with pytest.raises(ValueError, match=f"{key} in .* is damaged .its sha256 does not match"):
            pack.Pack(path).load(key)


def test_whatever_bytes_change_in_a_pack_it_gives_its_games_or_is_refused(tree, tmp_path):
    path, source, rng = tmp_path / "all.games", trees.Tree(tree), random.Random(0)
    pack.write_pack(source, path)
    whole, key, gave, refused = path.read_bytes(), key_of(trials(tree)[5]), 0, 0
    expected = source.index(), source.load(key)
    for _ in range(200):
        broken = bytearray(whole)
        for _ in range(rng.choice((1, 1, 5, 50))):
            broken[rng.choice((rng.randrange(len(whole)), rng.randrange(5000)))] = rng.randrange(
                256
            )
        path.write_bytes(broken[: rng.choice((len(whole), len(whole), rng.randrange(len(whole))))])
        forget()
        try:
            assert (pack.Pack(path).index(), pack.Pack(path).load(key)) == expected
            gave += 1
        except ValueError:
            refused += 1
    assert gave > 20
    assert refused > 20


def test_a_pack_takes_no_more_memory_than_is_stated(tree, tmp_path, monkeypatch):
    path, key = tmp_path / "all.games", key_of(trials(tree)[0])
    pack.write_pack(trees.Tree(tree), path)
    monkeypatch.setattr(pack, "MAX_GAME_BYTES", 1 << 20)
    monkeypatch.setattr(pack, "_MAX_SHARED_BYTES", 1 << 20)
    bomb = zlib.compress(bytes(50 << 20), 9)
    assert len(bomb) < 1 << 16
    changed(path, "UPDATE games SET body = ?", bomb)
    tracemalloc.start()
    with pytest.raises(ValueError, match="damaged .*unpacks to more than 1,048,576 bytes"):
        pack.Pack(path).load(key)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20
    changed(path, "INSERT INTO shared VALUES (99, zeroblob(500000)), (98, zeroblob(600000))")
    with pytest.raises(ValueError, match=r"claims 1,\d+,\d+ .* more than the 1,048,576 that are"):
        pack.Pack(path).index()
    changed(path, "INSERT INTO shared VALUES (97, zeroblob(2000000))")
    with pytest.raises(ValueError, match="no packed file of ALFWorld games, or is damaged"):
        pack.Pack(path).index()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW more AS SELECT 1",
        "CREATE TRIGGER t AFTER INSERT ON games BEGIN SELECT 1; END",
        "ALTER TABLE games ADD COLUMN more",
        "CREATE INDEX i ON games (sha256)",
    ],
)
def test_a_database_with_other_tables_is_no_pack(tree, tmp_path, statement):
    path = tmp_path / "all.games"
    pack.write_pack(trees.Tree(tree), path)
    changed(path, statement)
    with pytest.raises(ValueError, match=r"all\.games is no packed file .*has other tables"):
        pack.Pack(path).index()


def test_a_game_that_is_too_large_is_damaged_and_never_packed(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(trees, "MAX_GAME_BYTES", 10)
    with pytest.raises(ValueError, match=r"game.tw-pddl is damaged \(it has .* than the 10 that"):
        trees.Tree(tree).load(key_of(trials(tree)[0]))
    monkeypatch.undo()
    monkeypatch.setattr(pack, "MAX_GAME_BYTES", 10)
    with pytest.raises(ValueError, match="more than the 10 that are played"):
        pack.write_pack(trees.Tree(tree), tmp_path / "all.games")


@pytest.mark.parametrize(
    "name", ["a b", "a?b#c%20", "q'q\"", "[1]", "b\\c", "\u00e9\u2603", "$HOME", "\udcff"]
)
def test_trees_and_packs_lie_in_folders_of_any_name(tree, tmp_path, monkeypatch, name):
    folder = tmp_path / name
    shutil.move(tree, folder)
    key = key_of(trials(folder)[0])
    content = ALFWorld(data=str(folder)).walkthrough(
        GameId(env="alfworld", family=index.key_family(key), key=key)
    )
    path = tmp_path / f"pack {name}" / name
    pack.write_pack(trees.Tree(folder), path)
    monkeypatch.setenv("ALFWORLD_DATA", str(path))
    environment = ALFWorld(data="official")
    assert (
        environment.walkthrough(GameId(env="alfworld", family=index.key_family(key), key=key))
        == content
    )
    assert environment.describe() == ALFWorld(data=str(folder)).describe()


def test_pack_is_whole_or_not_there(tree, tmp_path):
    trial = trials(tree)[3]
    source = trees.Tree(tree)
    source.index()
    (trial / "game.tw-pddl").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        pack.write_pack(source, tmp_path / "all.games")
    assert not list(tmp_path.glob("all.games*"))


# --- generator ---


def test_generated_games_are_equal_in_every_process():
    program = (
        "import hashlib, json; from envs.alfworld import generate as g\n"
        "games = [g.generate(s, r) for r in g.ROOMS.values() for s in range(12)]\n"
        "print(hashlib.sha256(json.dumps(games).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    games = [
        generate.generate(seed, rooms) for rooms in generate.ROOMS.values() for seed in range(12)
    ]
    assert digests == {hashlib.sha256(json.dumps(games).encode()).hexdigest()}


@pytest.mark.parametrize("rooms", generate.ROOMS.values(), ids=list(generate.ROOMS))
def test_walkthroughs_win_in_every_family_and_type_of_room(rooms):
    tables = load_tables()
    wanted = {(family, room) for family in FAMILIES for room in tables.rooms[family]}
    seen = collections.Counter()
    for seed in range(120):
        draft, content = generate.draw(seed, rooms), generate.generate(seed, rooms)
        assert play(content, content["walkthrough"]), seed
        seen[draft.family, tables.plans[draft.plan].room] += 1
    assert set(seen) == wanted and len(wanted) == 14


def test_small_rooms_are_won_within_ten_actions_by_searching_every_surface():
    """Worst case: the thing lies on the last open receptacle that could hold it."""
    tables = load_tables()
    for seed in range(180):
        draft = generate.draw(seed, generate.SMALL)
        low, high = generate.SMALL.receptacles
        # one more where a lamp's place holds nothing else
        assert low <= len(draft.places) <= high + 1, seed
        lie = {thing.place for thing in draft.things}
        assert None not in lie and all(
            draft.places[place].type not in tables.openable for place in lie
        )
        searched = [
            place
            for place in draft.places
            if draft.sought in tables.contains[place.type]
            and place.type not in tables.openable | {draft.goal, generate._TOOLS.get(draft.family)}
        ]
        assert 1 <= len(searched) <= generate.SMALL.surfaces[1] + 1
        assert len(generate.walkthrough(draft)) + len(searched) - 1 <= 10, seed
        assert len({place.pose for place in draft.places} | {draft.start}) == len(draft.places) + 1


def test_generated_text_is_worded_and_numbered_as_the_official_one():
    for seed, rooms in ((0, generate.FULL), (9, generate.FULL), (4, generate.SMALL)):
        draft, content = generate.draw(seed, rooms), generate.generate(seed, rooms)
        text = compile_game(content).start().reset().text
        listed, task = re.fullmatch(
            r"-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room\. Looking"
            r" quickly around you, you see (.*)\.\n\n"
            r"Your task is to: (.*)\.\n*",
            text,
        ).groups()
        named = generate.names(draft)
        assert sorted(re.findall(r"an? (\w+ \d+)", listed)) == sorted(
            named[place.thor] for place in draft.places
        )
        assert task == draft.sentence


def test_generated_problem_keeps_the_rules_that_the_stock_engine_needs():
    tables = load_tables()
    for seed in range(36):
        draft = generate.draw(seed)
        problem = generate.generate(seed)["pddl_problem"]
        assert problem.count("(") == problem.count(")")
        for movable in tables.movable:
            assert f"{movable}Type - otype" in problem and f"{movable}Type - rtype" not in problem
        assert draft.start not in {place.pose for place in draft.places}
        lamps = [thing for thing in draft.things if thing.type == "DeskLamp"]
        assert draft.family != "look" or (lamps and all(lamp.place is not None for lamp in lamps))
        ids = re.findall(r"^ +(\S+_bar_\S+) - (?:object|receptacle)$", problem, re.MULTILINE)
        assert (
            len(ids)
            == len({thor_id.lower() for thor_id in ids})
            == len(draft.places) + len(draft.things)
        )
        held = re.findall(r"\(inReceptacle (\S+) (\S+)\)", problem)
        assert len({thing for thing, _ in held}) == len(held)


def test_generated_splits_are_disjoint_by_initial_state():
    for rooms in generate.ROOMS.values():
        states = {}
        for family in FAMILIES:
            for split in generate.SPLITS:
                seeds = generate.seeds(family, split)
                assert len(seeds) == generate.WANTED[split]
                for seed in (*seeds[:5], seeds[-1]):
                    assert (generate.family_of(seed), generate.split_of(seed)) == (family, split)
                    states.setdefault(
                        compile_game(generate.generate(seed, rooms)).state_hash, set()
                    ).add(split)
        assert len(states) == 6 * 3 * 6 and all(len(splits) == 1 for splits in states.values())


def test_a_replayed_game_is_read_once_and_plays_alike(monkeypatch):
    generated = []
    real = generate.generate
    monkeypatch.setattr(
        generate, "generate", lambda seed, rooms: generated.append(seed) or real(seed, rooms)
    )
    kept, forgetful = (
        ALFWorld(data="generated", rooms="small"),
        ALFWorld(data="generated", rooms="small", keep="0"),
    )
    first, second = kept.games("put", "train")[:2]
    for environment, reads in ((kept, 2), (forgetful, 4)):
        generated.clear()
        one, other = environment.open("put"), environment.open("put")
        start = one.reset(first)
        one.step(start.actions[0])
        other.reset(second)
        assert other.reset(first) == start == one.reset(first)
        assert len(generated) == reads
    with pytest.raises(ValueError, match="keep of ALFWorld is a number of games, got 'all'"):
        ALFWorld(data="generated", keep="all")


def test_tables_of_another_version_are_refused(monkeypatch):
    monkeypatch.setattr("envs.alfworld.tables.package_text", lambda name: "X = 1")
    with pytest.raises(ValueError, match=r"not those of version 0\.4\.2"):
        load_tables.__wrapped__()


# --- environment ---


def test_more_generated_games_are_of_the_split_and_new():
    environment = ALFWorld(rooms="small")
    there, more = environment.games("put", "test"), environment.more_games("put", "test", 230)
    assert more[:200] == there and len({*more}) == 230
    assert {*more}.isdisjoint(environment.more_games("put", "select", 230))
    game = environment.open("put")
    game.reset(more[-1])
    seed = generate.parse_key(more[-1].key)[1]
    assert (generate.family_of(seed), generate.split_of(seed)) == ("put", "test")
    assert environment.more_games("put", "test", 7) == there[:7]


def test_environment_offers_disjoint_splits_and_plays_them():
    environment = ALFWorld(rooms="small")
    assert environment.describe()["source"] == "generated" and environment.families == tuple(
        sorted(FAMILIES)
    )
    for family in environment.families:
        splits = {split: environment.games(family, split) for split in ("train", "select", "test")}
        assert {split: len(games) for split, games in splits.items()} == {
            "train": 3000,
            "select": 200,
            "test": 200,
        }
        assert len(set().union(*splits.values())) == 3400
    game, won = environment.games("put", "test")[3], None
    live = environment.open("put")
    live.reset(game)
    for command in environment.walkthrough(game):
        assert won is None
        won = live.step(command).outcome
    assert won == "success"
    other = environment.games("look", "test")[0]
    with pytest.raises(ValueError, match="family 'look', not 'put'"):
        live.reset(GameId(env="alfworld", family="put", key=other.key))


def test_official_splits_hold_out_whole_task_folders(tree):
    for trial in {trial.parent.name.partition("-")[0]: trial for trial in trials(tree)}.values():
        for number in range(60):  # more task folders, so that some are held out in every family
            target = trial.parent.with_name(f"{trial.parent.name}{number}") / f"trial_T{number}"
            shutil.copytree(trial, target)
    environment = ALFWorld(data=str(tree))
    for family in environment.families:
        train, select = (
            {game.key.split("/")[1] for game in environment.games(family, split)}
            for split in ("train", "select")
        )
        assert train and select and not train & select
        assert (
            len(environment.games(family, "train")) + len(environment.games(family, "select")) == 62
        )
    assert environment.games("put", "test") == environment.games("put", "valid_unseen")
    assert ALFWorld(data=str(tree), test="valid_seen").games("put", "test") == environment.games(
        "put", "valid_seen"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "official"}, "No official ALFWorld games.*alfworld-download"),
        ({"data": "/nowhere"}, "no ALFWorld games at '/nowhere'"),
        ({"rooms": "huge"}, "Unknown rooms 'huge'.*full, small"),
        ({"text": "long"}, "Unknown text 'long'"),
        ({"engine": "c"}, "Unknown engine 'c'"),
        ({"test": "train"}, "Unknown test 'train'"),
        ({"data": "official", "rooms": "small"}, "no small rooms"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ALFWorld(**options)


def test_unknown_family_and_split_are_named():
    environment = ALFWorld(data="generated")
    with pytest.raises(ValueError, match="Unknown family 'fry'.*pick_two"):
        environment.games("fry", "train")
    with pytest.raises(ValueError, match="Unknown family 'fry'"):
        environment.open("fry")
    with pytest.raises(ValueError, match="no split 'valid_seen'"):
        environment.games("put", "valid_seen")
    with pytest.raises(ValueError, match="is no generated one"):
        environment.walkthrough(
            GameId(
                env="alfworld", family="put", key="train/pick_and_place_simple-A-None-B-1/trial_T1"
            )
        )


def test_environment_is_light_until_a_game_is_opened():
    program = (
        "import sys; from envs.alfworld import ALFWorld; ALFWorld(data='generated').games('put',"
        " 'train')\nprint(sorted({'numpy', 'alfworld', 'textworld', 'jax', 'envs.alfworld.engine',"
        " 'envs.alfworld.pack'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- the official games ---


def test_official_counts(monkeypatch, tmp_path):
    """All of the games where a download is at hand, else the archive: train by its paths,
    valid_seen through the index.
    """
    data = pathlib.Path(os.environ.get("ICTJAX_TEST_ALFWORLD", ""))
    if str(data) == ".":
        if not ARCHIVES:
            pytest.skip(
                "no official games: neither $ICTJAX_TEST_ALFWORLD nor"
                " ../shared/data/alfworld/*.tar.xz"
            )
        data, train = tmp_path / "official", collections.Counter()
        # 3 s of CPU, 1 GB of stream
        with lzma.open(ARCHIVES[0]) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                split, task = (*pathlib.PurePosixPath(member.name).parts[-4:-2], "", "")[:2]
                if (
                    split == "train"
                    and member.name.endswith("game.tw-pddl")
                    and "movable" not in task
                    and "Sliced" not in task
                ):
                    train[task.partition("-")[0]] += 1
                if split == "valid_seen" and member.isfile():
                    archive.extract(member, data, filter="data")
        assert train == {
            FAMILIES[family]: number for family, number in index.COUNTS["train"].items()
        }
    environment = ALFWorld(data=str(data))
    found = environment._source.index()
    for split in index.OFFICIAL_SPLITS:
        if found.count(split):
            assert {
                family: len(keys) for family, keys in found.games[split].items()
            } == index.COUNTS[split]
    for family in FAMILIES:
        game = environment.games(family, "valid_seen")[0]
        assert play(sources.load_game(game.key, str(data)), environment.walkthrough(game))


# --- command line ---


def test_commands_list_pack_and_check(tree, tmp_path, capsys):
    cli.main(["list", "--env", "alfworld", "--options", f"data={tree}"])
    assert re.search(r"put +│ +2 │ +2 │ +2 │ +2 │ +2", capsys.readouterr().out)
    cli.main(["pack", "--data", str(tree), "--out", str(tmp_path / "all.games")])
    assert "36 games in" in capsys.readouterr().out
    cli.main(
        ["check", "--env", "alfworld", "--options", f"data={tmp_path / 'all.games'}", "--solve"]
    )
    assert "Every game is won" in capsys.readouterr().out
    cli.main(["list", "--env", "fake"])
    assert "door" in capsys.readouterr().out


def test_generating_that_was_cut_off_can_be_repeated(tmp_path, monkeypatch, capsys):
    command = ["generate", "--out", str(tmp_path / "g"), "--games", "1", "--rooms", "small"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cli.generate, "trajectory", full)
        with pytest.raises(SystemExit):
            cli.main(command)
    assert "No space left on device): choose another --out" in capsys.readouterr().err
    assert list((tmp_path / "g").iterdir()) == []
    cli.main(command)
    assert "18 games below" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == ["json_2.1.1", "logic"]


def test_check_finds_shared_states_and_unwinnable_games(tree, capsys):
    trial = trials(tree)[0]
    copy = tree / "json_2.1.1" / "valid_unseen" / trial.parent.name / trial.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(trial, copy)
    rewrite(trials(tree, "valid_seen")[0], walkthrough=["dance"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "--env", "alfworld", "--options", f"data={tree}", "--solve"])
    said = capsys.readouterr().out
    assert ended.value.code == 1 and "2 faults" in said
    assert "of test starts in a state of train" in said and "is not won by its walkthrough" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fetch"], "Unknown word 'fetch'"),
        (["list", "--env", "chess"], "chess"),
        (["list", "--options", "data"], "KEY=VALUE"),
        (["list", "--families", "fry"], "Unknown family 'fry'"),
        (
            ["list", "--env", "alfworld", "--options", "data=/nowhere"],
            "no ALFWorld games at '/nowhere'",
        ),
        (["pack", "--out", "x"], "No official ALFWorld games"),
        (["pack", "--out", "/", "--data", "/"], "is a folder"),
        (["generate", "--out", "/dev/null/x"], "choose another --out"),
        (["generate", "--out", "x", "--games", "0"], "--games must be a whole number from 1 to"),
        (["generate", "--out", "x", "--families", "fry"], "Unknown family 'fry'"),
        (["check", "--env", "fake", "--solve"], "fake has none"),
    ],
)
def test_bad_command_lines_end_with_one_sentence(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and said.startswith("ictjax: ")
        and message in said
        and said.count("\n") == 1
    )
