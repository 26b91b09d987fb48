"""Contexts that are collected before training: durable in pieces, and the same however often they
are interrupted.
"""

import collections
import dataclasses
import hashlib
import json

import pytest

from envs.api import CannotGoOn
from envs.pool import WorkerPool
from ictjax import keys, loops
from ictjax.model_speaker import ModelSpeaker
from ictjax.precollection import precollected
from ictjax.records import to_json
from ictjax.reflector import Reflector
from tests.test_loops import CHAT, END, META, REFLECTION, make_arena
from tests.tiny import ScriptedSampler

SMALL = dataclasses.replace(META, collection="precollected", precollected_loops=10)
TURNS = SMALL.meta_turns


@pytest.fixture(scope="module")
def pool():
    with WorkerPool("fake", num_workers=1) as pool:
        yield pool


class Killed(BaseException):
    pass


def arena_in_pieces(pool, *, live=2, dies_at=None):
    """Pieces of 4 or 5 loops of the 10, at two games at once; dies within a piece."""
    arena = make_arena(pool, meta=SMALL)
    environment = dataclasses.replace(arena.task.environment, num_workers=1, max_live_games=live)
    said = []

    def progress(phase, finished, total):
        said.append((phase, finished, total))
        if finished == dies_at:
            raise Killed

    task = dataclasses.replace(arena.task, environment=environment)
    return dataclasses.replace(arena, task=task, progress=progress), said


def test_precollected_contexts_cover_all_loops_and_turns_and_are_drawn_in_passes(pool, tmp_path):
    meta = dataclasses.replace(
        META, collection="precollected", precollected_loops=4, contexts_per_iteration=5
    )
    contexts = precollected(make_arena(pool, meta=meta), tmp_path, resumed=False)
    assert sorted((c.loop, c.meta_turn) for c in contexts) == [
        (loop, turn) for loop in range(4) for turn in range(3)
    ]
    assert {c.system_prompt for c in contexts if c.meta_turn == 0} == {"say nothing"}
    assert any(c.system_prompt != "say nothing" for c in contexts if c.meta_turn > 0)
    silent = dataclasses.replace(make_arena(pool, meta=meta), actor=None, reflector=None)
    # read, not played again
    assert precollected(silent, tmp_path, resumed=True) == contexts
    with pytest.raises(ValueError, match="precollected.jsonl is missing"):
        precollected(silent, tmp_path / "other", resumed=True)
    path = tmp_path / "contexts" / "precollected.jsonl"
    whole, seal = path.read_bytes(), path.with_suffix(".sha256")
    lines = whole.splitlines(keepends=True)
    for changed, named in (
        (b"".join(lines[:6]), "has 6 lines, 12 contexts were collected"),
        (whole[:-9], "has 11 lines"),
        (b"", "has 0 lines"),
        (b"".join(reversed(lines)), "is not what was collected"),
        (whole.replace(b"say nothing", b"say anything", 1), "is not what was collected"),
        (b"\xff" + whole[1:], "is not what was collected"),
    ):
        path.write_bytes(changed)
        for resumed in (True, False):
            with pytest.raises(ValueError, match=f"^{path} {named}.*restore"):
                precollected(silent, tmp_path, resumed=resumed)
    path.write_bytes(whole)
    digest = hashlib.sha256(whole).hexdigest()
    assert seal.read_text() == f"{digest}  precollected.jsonl\n"  # for sha256sum --check
    seal.unlink()  # older versions wrote none
    assert precollected(silent, tmp_path, resumed=True) == contexts
    drawn = [
        context
        for iteration in range(1, 13)
        for context in loops.draw_contexts(silent, contexts, iteration)
    ]
    assert len(drawn) == 60
    counts = collections.Counter((c.loop, c.meta_turn) for c in drawn)
    assert set(counts.values()) == {5}


def all_at_once(pool):
    """As the loops are defined: every meta-turn of all loops together."""
    arena = make_arena(pool, meta=SMALL)
    arena = dataclasses.replace(arena, key=keys.fold(arena.key, "precollect"))
    state = loops.initial_state(arena, SMALL.precollected_loops)
    whole = tuple(loop._replace(last_turn=TURNS - 1) for loop in state.loops)
    state, contexts = state._replace(loops=whole), []
    for turn in range(TURNS):
        new, state = loops.collect(arena, state, turn)
        contexts += new
        if turn + 1 < TURNS:
            state = loops.advance(arena, state, loops.propose(arena, new, 1, turn), turn)
    return "".join(f"{to_json(context)}\n" for context in contexts).encode()


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "contexts").iterdir()}


def test_pieces_hold_what_all_loops_together_do_and_nothing_of_them_stays(pool, tmp_path):
    arena, said = arena_in_pieces(pool)
    precollected(arena, tmp_path, resumed=False)
    assert set(files(tmp_path)) == {"precollected.jsonl", "precollected.sha256"}
    assert files(tmp_path)["precollected.jsonl"] == all_at_once(pool)
    games = [finished for phase, finished, total in said if (phase, total) == (said[0][0], 60)]
    assert len(games) == len(said) and games == sorted(games) and games[-1] == 60


@pytest.mark.parametrize("dies_at", [3, 15, 33, 47, 60])
def test_a_killed_collection_goes_on_behind_its_last_piece_with_the_same_bytes(
    pool, tmp_path, dies_at
):
    expected, partial = all_at_once(pool), tmp_path / "contexts" / "precollected.partial.jsonl"
    arena, _ = arena_in_pieces(pool, dies_at=dies_at)
    with pytest.raises(Killed):
        precollected(arena, tmp_path, resumed=False)
    kept = partial.read_text().splitlines() if partial.exists() else []
    assert len(kept) == (dies_at - 1) // 10  # of 5 loops with 2 games each
    if kept:
        with partial.open("a") as file:
            file.write(kept[-1][:50])  # a writer that was killed
    arena, said = arena_in_pieces(pool, live=3)  # and then other sizes
    precollected(arena, tmp_path, resumed=False)
    assert files(tmp_path)["precollected.jsonl"] == expected
    assert said[0][1] >= 10 * len(kept)  # what was played is not played again


def test_a_piece_that_was_whole_but_for_its_newline_counts(pool, tmp_path):
    partial = tmp_path / "contexts" / "precollected.partial.jsonl"
    with pytest.raises(Killed):
        precollected(arena_in_pieces(pool, dies_at=25)[0], tmp_path, resumed=False)
    partial.write_text(partial.read_text().rstrip("\n"))
    arena, said = arena_in_pieces(pool)
    precollected(arena, tmp_path, resumed=False)
    assert said[0][1] >= 20 and files(tmp_path)["precollected.jsonl"] == all_at_once(pool)


def test_whoever_sends_pieces_is_told_when_each_is_there_and_when_all_are(pool, tmp_path):
    arena, _ = arena_in_pieces(pool)
    folder, seen = tmp_path / "contexts", []

    def kept():
        names = {path.name: path.read_text().count("\n") for path in folder.iterdir()}
        seen.append((names.get("precollected.partial.jsonl"), names.get("precollected.jsonl")))

    precollected(arena, tmp_path, resumed=False, kept=kept)
    assert seen == [*((number, None) for number in range(1, 7)), (6, 30)]
    precollected(arena, tmp_path, resumed=True, kept=kept)
    assert len(seen) == 7  # nothing is new


def _other_text(lines):
    return [lines[0].replace("say nothing", "say anything", 1), *lines[1:]]


def _sealed_anew(changes):
    def damage(lines):
        record = {**json.loads(lines[-1]), **changes}
        del record["sha256"]
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        return [
            *lines[:-1],
            json.dumps({**record, "sha256": hashlib.sha256(line.encode()).hexdigest()}),
        ]

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _other_text,
        lambda lines: ["{}"],
        lambda lines: [lines[0], lines[0]],
        lambda lines: lines[1:] + lines[:1] + lines,
        _sealed_anew({"loops": [99]}),
        _sealed_anew({"meta_turn": 2}),
        _sealed_anew({"prompts": []}),
        _sealed_anew({"loops": None}),
    ],
)
def test_pieces_that_are_damaged_are_refused(pool, tmp_path, damage):
    partial = tmp_path / "contexts" / "precollected.partial.jsonl"
    with pytest.raises(Killed):
        precollected(arena_in_pieces(pool, dies_at=25)[0], tmp_path, resumed=False)
    partial.write_text("".join(f"{line}\n" for line in damage(partial.read_text().splitlines())))
    with pytest.raises(ValueError, match=f"^{partial} holds what is no finished piece.*remove it"):
        precollected(arena_in_pieces(pool)[0], tmp_path, resumed=False)


def test_when_every_game_fails_it_ends_with_the_first_piece_and_keeps_nothing(tmp_path):
    with WorkerPool("fake", num_workers=1, options={"raise_on": "nothing"}) as pool:
        arena, said = arena_in_pieces(pool)
        silent = ModelSpeaker(ScriptedSampler(lambda ids, request: [END]), CHAT)
        arena = dataclasses.replace(arena, reflector=Reflector(silent, REFLECTION, 1.0))
        with pytest.raises(CannotGoOn, match="Every game of the contexts"):
            precollected(arena, tmp_path, resumed=False)
    assert said[-1][1] == 10
    assert not list(tmp_path.rglob("*.jsonl"))
