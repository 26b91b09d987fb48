"""The paper's contexts: loops of the base reflector, collected once, before the first update.

RUN/contexts/precollected.jsonl holds them and precollected.sha256 their checksum. While they are
collected, precollected.partial.jsonl holds the pieces that are finished: a line each, one meta-turn
of some loops, with a checksum of its own. A killed run goes on behind the last of them, and ends
with the same bytes: games, keys and tokens of a loop depend on its number and meta-turn alone.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from envs.api import CannotGoOn, GameId, Outcome
from envs.files import append
from ictjax import keys, loops
from ictjax.health import most_frequent_error
from ictjax.json_lines import read_records, to_json_line
from ictjax.loops import Arena, Loop
from ictjax.records import Context, context_from_dict, context_from_json, to_json
from ictjax.run_files import write_lines

FILE_NAME = "precollected.jsonl"
# A piece plays at least so many games for each that can be under way at once: while its last games
# end, slots are idle, which costs no more than one of these rounds. A kill loses one piece.
_ROUNDS = 4


def precollected(
    arena: Arena,
    run_dir: pathlib.Path,
    *,
    resumed: bool,
    kept: Callable[[], None] | None = None,
) -> list[Context]:
    """The contexts of the base reflector: collected once, before the first update, and read from
    the run directory ever after.

    Their checksum is kept beside them, as `sha256sum --check` reads it.

    Args:
      arena: where they are played, with the reflector before training.
      run_dir: of the run.
      resumed: whether the run has been trained already.
      kept: is called on the first host when a piece is on disk, and when all contexts are.

    Raises:
      ValueError: a resumed run has lost them, or they are others now: training would go on with
        other contexts, and its reflector is no longer the one they are of. Or a finished piece of
        them is damaged.
      CannotGoOn: every game failed.
    """
    path = run_dir / "contexts" / FILE_NAME
    seal, partial = path.with_suffix(".sha256"), path.with_suffix(".partial.jsonl")
    if not arena.hosts.agree(path.exists()):
        if resumed:
            raise ValueError(f"{path} is missing: restore it, or start another run.")
        lines = precollect(arena, partial, kept)
        if arena.hosts.first:
            with arena.hosts.told():
                data = "".join(f"{line}\n" for line in lines).encode()
                # first: whoever finds contexts finds their checksum, but for older runs
                write_lines(seal, [_seal(data, path.name)])
                write_lines(path, lines)
                if kept is not None:
                    kept()
        arena.hosts.meet()
    if arena.hosts.first:
        partial.unlink(missing_ok=True)
    data = path.read_bytes()
    expected = arena.meta.precollected_loops * arena.meta.meta_turns
    if data.count(b"\n") != expected:
        raise ValueError(
            f"{path} has {data.count(10)} lines, {expected} contexts were collected: restore it, or"
            " start another run."
        )
    if seal.exists() and seal.read_text(encoding="utf-8", errors="replace").strip() != _seal(
        data, path.name
    ):
        raise ValueError(
            f"{path} is not what was collected (its checksum is not that in {seal.name}): restore"
            " both, or start another run."
        )
    contexts = []
    for number, record in enumerate(read_records(path).values, start=1):
        try:
            contexts.append(context_from_dict(record))
        except ValueError as error:
            raise ValueError(
                f"Line {number} of {path} is no context ({error}): restore it, or start another"
                " run."
            ) from error
    return contexts


class _Piece(NamedTuple):
    """One meta-turn of some loops, which have finished those before."""

    meta_turn: int
    loops: list[int]
    contexts: list[str]  # as JSON lines, one per loop
    prompts: list[str]  # that the loops go on with


def precollect(
    arena: Arena, partial: pathlib.Path, kept: Callable[[], None] | None = None
) -> list[str]:
    """`precollected_loops` loops x `meta_turns` meta-turns of the reflector as it is now.

    Args:
      arena: where they are played.
      partial: the file of finished pieces; goes on behind those that are there.
      kept: is called on the first host when a piece is in that file.

    Returns:
      The contexts as JSON lines, by meta-turn, then by loop.

    Raises:
      ValueError: a piece in the file is damaged.
      CannotGoOn: every game failed.
    """
    arena = dataclasses.replace(arena, key=keys.fold(arena.key, "precollect"))
    under_way, batches = _begin(arena)
    lines: dict[tuple[int, int], str] = {}
    pieces = _read(partial)
    for piece in pieces:
        try:
            _book(piece, under_way, lines)
        except (LookupError, TypeError, ValueError):
            raise _damaged(partial) from None
    if pieces and arena.hosts.first:  # anew: a stopped writer may have left half a line
        write_lines(partial, map(_sealed, pieces))
    games = arena.meta.games_per_context
    whole = math.ceil(_ROUNDS * arena.task.environment.max_live_games / games)  # loops of a piece
    while len(lines) < len(batches):
        done, total = len(lines) * games, len(batches) * games
        watched = dataclasses.replace(arena, progress=_behind(arena.progress, done, total))
        group = [under_way[number] for number in _next(under_way, whole)]
        piece, contexts = _play(watched, group, batches)
        _book(piece, under_way, lines)
        if len(group) >= whole or len(lines) == len(batches):
            _check_played(contexts, lines.values(), partial)
        if arena.hosts.first:
            with arena.hosts.told():
                partial.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("ab", buffering=0) as file:
                    append(file, f"{_sealed(piece)}\n".encode())
                if kept is not None:
                    kept()
    return [lines[place] for place in sorted(lines)]


def _begin(
    arena: Arena,
) -> tuple[list[Loop], dict[tuple[int, int], tuple[GameId, ...]]]:
    """All loops before their first meta-turn, and the games of each (meta-turn, loop): these do not
    depend on what is played.
    """
    turns = arena.meta.meta_turns
    state = loops.initial_state(arena, arena.meta.precollected_loops)
    batches = {}
    for turn in range(turns):
        for loop in state.loops:
            batches[turn, loop.number], state = loops.draw_games(
                arena, state, loop.family, arena.meta.games_per_context
            )
    return [loop._replace(last_turn=turns - 1) for loop in state.loops], batches


def _next(under_way: Sequence[Loop], whole: int) -> list[int]:
    """The loops of the next piece: of those that are furthest behind, the first, in groups of
    about equal size.
    """
    turn = min(loop.meta_turn for loop in under_way)
    behind = [loop.number for loop in under_way if loop.meta_turn == turn]
    return behind[: math.ceil(len(behind) / max(len(behind) // whole, 1))]


def _play(
    arena: Arena, group: Sequence[Loop], batches: Mapping[tuple[int, int], Sequence[GameId]]
) -> tuple[_Piece, list[Context]]:
    turn = group[0].meta_turn
    contexts = loops.play_contexts(
        arena, [(loop.number, loop, batches[turn, loop.number]) for loop in group], turn
    )
    prompts = [loop.system_prompt for loop in group]
    if turn < group[0].last_turn:
        candidates = arena.ask(
            contexts, [[loops.candidate_key(arena, turn, loop.number, 0)] for loop in group]
        )
        prompts = [
            loops.following_prompt(arena, loop, answers, turn, loop.number)
            for loop, answers in zip(group, candidates, strict=True)
        ]
    numbers = [loop.number for loop in group]
    return _Piece(turn, numbers, list(map(to_json, contexts)), prompts), contexts


def _book(piece: _Piece, under_way: list[Loop], lines: dict[tuple[int, int], str]) -> None:
    """Moves the loops of a piece on. Raises LookupError, TypeError or ValueError for one that does
    not come next.
    """
    for number, context, prompt in zip(piece.loops, piece.contexts, piece.prompts, strict=True):
        loop = under_way[number]
        if loop.meta_turn != piece.meta_turn or loop.number != number:
            raise ValueError(f"meta-turn {piece.meta_turn} of loop {number} does not come next")
        lines[piece.meta_turn, number] = context
        under_way[number] = loop._replace(meta_turn=piece.meta_turn + 1, system_prompt=prompt)


def _behind(
    progress: loops.PhaseProgress | None, done: int, total: int
) -> loops.PhaseProgress | None:
    """Tells of the games of a piece as a part of all."""
    if progress is None:
        return None
    return lambda _, finished, __: progress("games before training", done + finished, total)


def _check_played(contexts: Sequence[Context], lines: Iterable[str], partial: pathlib.Path) -> None:
    """Raises CannotGoOn where every game has failed, these and all before; nothing is kept then."""
    if all(map(_failed, contexts)) and all(map(_failed, map(context_from_json, lines))):
        partial.unlink(missing_ok=True)
        played = [trajectory for context in contexts for trajectory in context.trajectories]
        raise CannotGoOn(
            "Every game of the contexts that are collected before training failed"
            f" ({most_frequent_error(played)}): repair that and start it again with the same flags."
        )


def _failed(context: Context) -> bool:
    return all(trajectory.outcome is Outcome.FAILED for trajectory in context.trajectories)


def _read(partial: pathlib.Path) -> list[_Piece]:
    """The finished pieces. Raises ValueError for what is none."""
    pieces = []
    for record in read_records(partial).values:
        try:
            piece = _Piece(**{name: record[name] for name in _Piece._fields})
        except KeyError:
            raise _damaged(partial) from None
        if record != json.loads(_sealed(piece)):
            raise _damaged(partial)
        pieces.append(piece)
    return pieces


def _damaged(partial: pathlib.Path) -> ValueError:
    return ValueError(
        f"{partial} holds what is no finished piece of the contexts: remove it, and all are"
        " collected anew."
    )


def _sealed(piece: _Piece) -> str:
    record = piece._asdict()
    digest = hashlib.sha256(to_json_line(record).encode()).hexdigest()
    return to_json_line({**record, "sha256": digest})


def _seal(data: bytes, name: str) -> str:
    return f"{hashlib.sha256(data).hexdigest()}  {name}"
