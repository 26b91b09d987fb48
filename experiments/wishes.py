"""What loops wish for while they run (episodes, reflections), and how the wishes of many loops are
met together, so that the slots of the samplers are full.

A loop is a generator: it yields wishes, is sent what came of them, and returns its result. What it
is sent depends on its own wishes alone, never on the loops beside it.
"""

import collections
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from envs.stopping import check
from ictjax import keys
from ictjax.records import Candidate, Context, Trajectory
from ictjax.reflector import Question
from ictjax.rollout import Episode

if TYPE_CHECKING:  # it brings JAX, and arms are listed without
    from experiments.played_games import PlayedGames
    from ictjax.loops import Arena

_Name = TypeVar("_Name")
_Result = TypeVar("_Result")


class Play(NamedTuple):
    """Episodes to be played; met by their trajectories, in order."""

    episodes: Sequence[Episode]


class Reflect(NamedTuple):
    """Replies of the reflector to a context, or to a question of another kind, one for each key;
    met by as many candidates.
    """

    asked: Context | Question
    keys: Sequence[keys.Key]


Wish = Play | Reflect
Steps = Generator[Wish, Any, _Result]
"""What yields wishes and returns a result: another generator gets it by `yield from`."""


def play(episodes: Sequence[Episode]) -> Steps[list[Trajectory]]:
    """The trajectories of some episodes."""
    return (yield Play(episodes))


def reflect(asked: Context | Question, group_keys: Sequence[keys.Key]) -> Steps[list[Candidate]]:
    """Candidates of the reflector."""
    return (yield Reflect(asked, group_keys))


class Together(NamedTuple, Generic[_Name, _Result]):
    """Loops that belong together; `results` are theirs, in order, when all have ended."""

    name: _Name
    loops: Sequence[Steps[_Result]]


class _Running(Generic[_Name, _Result]):
    """One of those under way."""

    def __init__(self, together: Together[_Name, _Result]):
        self.name = together.name
        self.loops = list(together.loops)
        self.results: dict[int, _Result] = {}
        self.wishes: dict[int, Wish] = {}
        for number in range(len(self.loops)):
            self.send(number, None)

    def send(self, number: int, answer: Any) -> None:
        """Lets a loop go on until its next wish, or its end."""
        self.wishes.pop(number, None)
        try:
            self.wishes[number] = self.loops[number].send(answer)
        except StopIteration as ended:
            self.results[number] = ended.value

    def close(self) -> None:
        for loop in self.loops:
            loop.close()


def run_together(
    arena: "Arena",
    groups: Iterable[Together[_Name, _Result]],
    *,
    room: int,
    played: "PlayedGames | None" = None,
) -> Iterator[tuple[_Name, list[_Result]]]:
    """Runs groups of loops side by side, and yields each as soon as all its loops have ended.

    In every round all episodes that are wished for are played in one rollout, then all reflections
    asked for at once. A group begins as soon as there is room.

    Args:
      arena: who plays and reflects.
      groups: in the order in which they begin; built when they do.
      played: is asked for episodes first, where they may have been played before.
      room: so many episodes of a round are enough: with more, no further group begins.
    """
    waiting = iter(groups)
    running: collections.deque[_Running[_Name, _Result]] = collections.deque()
    more = True
    try:
        while more or running:
            check()
            yield from _ended(running)
            while more and _num_episodes(running) < room:
                together = next(waiting, None)
                if together is None:
                    more = False
                else:
                    running.append(_Running(together))
            _play(arena, running, played)
            yield from _ended(running)  # before others reflect, which may take minutes
            _reflect(arena, running)
    finally:
        for group in running:
            group.close()


def _ended(
    running: collections.deque[_Running[_Name, _Result]],
) -> Iterator[tuple[_Name, list[_Result]]]:
    """Takes out the groups all of whose loops have ended."""
    for group in [group for group in running if not group.wishes]:
        running.remove(group)
        yield group.name, [group.results[n] for n in range(len(group.loops))]


def _num_episodes(running: Iterable[_Running[Any, Any]]) -> int:
    return sum(_size(wish) for group in running for wish in group.wishes.values())


def _size(wish: Wish) -> int:
    if isinstance(wish, Play):
        return len(wish.episodes)
    return len(wish.asked.trajectories) if isinstance(wish.asked, Context) else 1


def _play(
    arena: "Arena", running: Iterable[_Running[Any, Any]], known: "PlayedGames | None"
) -> None:
    wished = [
        (group, number, wish.episodes)
        for group in running
        for number, wish in group.wishes.items()
        if isinstance(wish, Play)
    ]
    if not wished:
        return
    episodes = [episode for _, _, some in wished for episode in some]
    phase = f"games of {len(wished)} loops"
    played = iter(
        arena.play(episodes, phase) if known is None else known.play(arena, episodes, phase)
    )
    for group, number, some in wished:
        group.send(number, [next(played) for _ in some])


def _reflect(arena: "Arena", running: Iterable[_Running[Any, Any]]) -> None:
    wished = [
        (group, number, wish)
        for group in running
        for number, wish in group.wishes.items()
        if isinstance(wish, Reflect)
    ]
    if not wished:
        return
    # whoever reads the same, as runs with draws of their own do, has it prefilled once
    same: dict[Context | int, list[tuple[_Running[Any, Any], int, Reflect]]] = {}
    for one in wished:
        asked = one[2].asked
        same.setdefault(asked if isinstance(asked, Context) else id(asked), []).append(one)
    candidates = arena.ask(
        [some[0][2].asked for some in same.values()],
        [[key for _, _, wish in some for key in wish.keys] for some in same.values()],
        f"reflections of {len(wished)} loops",
    )
    for some, replies in zip(same.values(), candidates, strict=True):
        answers = iter(replies)
        for group, number, wish in some:
            group.send(number, [next(answers) for _ in wish.keys])
