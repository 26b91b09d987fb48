"""What an evaluation plays: the loops of one arm on one family, and the record of their part.

Every arm plays the same games in the same order with the same keys, so differences are paired.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from envs.api import GameId, Outcome
from experiments import wishes
from experiments.arms.arm import Arm, MetaTurn, Place
from experiments.evaluation_games import FamilyGames
from experiments.wishes import Steps
from ictjax import keys
from ictjax.json_lines import to_json_line
from ictjax.records import Candidate, Context, Trajectory
from ictjax.rollout import Episode, parse_failures, success_rate
from ictjax.run_config import TrainConfig
from ictjax.run_files import prompt_line

Score = list[int | None]
"""Of every game 1 for won, 0 for lost, None where the environment failed it."""


class Scored(NamedTuple):
    """How one prompt of a loop did."""

    test: list[Trajectory]  # none where it was not scored on TEST
    select: Score


class Start(NamedTuple):
    """What all arms have in common, the first prompt in one loop: its score, and the first STREAM
    batch under it (None: to be played).
    """

    scored: Scored
    context: Context | None


class Read(NamedTuple):
    """One meta-turn: the context, what was written, and what of it all was played for it."""

    context: Context
    candidate: Candidate
    replays: list[Trajectory]  # beside the context
    replies: list[Candidate]  # of the reflector; `candidate` may be made of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopRecord:
    """One loop that has ended."""

    prompts: list[str]  # of meta-turns 0..T; 0 is the first prompt
    scored: dict[str, Scored]  # by prompt
    turns: list[Read]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One arm on one family, of one trained seed where that matters."""

    arm_name: str
    arm: Arm
    family: str
    other: str  # the family that a placebo reads about instead
    games: FamilyGames
    other_games: FamilyGames
    config: TrainConfig
    key: keys.Key  # of the evaluation
    draw: int | None = None  # whose keys the reflector is sampled with; None: those of all runs
    expert_prompt: str
    num_tokens: Callable[[str], int]  # of a text, for the actor

    def place(self, run: int, meta_turn: int) -> Place:
        """Where the arm writes."""
        # the same keys for every arm: what differs between arms is who writes alone
        key = keys.fold(self.key, "reflection", self.family, run, meta_turn)
        return Place(
            family=self.family,
            run=run,
            meta_turn=meta_turn,
            key=key if self.draw is None else keys.fold(key, "draw", self.draw),
            task=self.config.task,
            evaluation=self.config.evaluation,
            reflection=self.config.reflection,
            expert_prompt=self.expert_prompt,
            num_tokens=self.num_tokens,
        )

    def loops(self, starts: Sequence[Start] | None = None) -> list[Steps[LoopRecord]]:
        """All loops, one per run; `starts` as the arm initial has played them, where it has."""
        runs = range(self.config.evaluation.runs)
        return [self._loop(run, None if starts is None else starts[run]) for run in runs]

    def on_test(self, run: int, prompt: str) -> list[Episode]:
        """The TEST games of a loop under some prompt, with the keys that score its own."""
        return self._episodes("test", self.family, run, self.games.test[run], prompt)

    def _loop(self, run: int, start: Start | None) -> Steps[LoopRecord]:
        evaluation = self.config.evaluation
        turns_total = evaluation.meta_turns
        prompt = self.config.task.initial_prompt
        prompts, turns = [prompt], []
        scored: dict[str, Scored] = {} if start is None else {prompt: start.scored}
        for meta_turn in range(turns_total + 1):
            last = meta_turn == turns_total
            known = None
            if start is not None and meta_turn == 0 and self.arm.reads == "own":
                known = start.context
            stream = [] if last or known else self._stream(run, meta_turn, prompt)
            new = self._score(run, prompt, scored.get(prompt), last or meta_turn == 0)
            played = (yield from wishes.play([*stream, *new])) if stream or new else []
            _book(scored, prompt, played[len(stream) :], self.games.select[run])
            if last:
                break
            context = known or Context(
                loop=run,
                meta_turn=meta_turn,
                family=self.other if self.arm.reads == "other" else self.family,
                system_prompt=prompt,
                trajectories=tuple(played[: len(stream)]),
            )
            turn = yield from self._reflect(run, context, turns)
            turns.append(turn)
            prompt = turn.candidate.system_prompt or prompt
            prompts.append(prompt)
        chosen = prompts[chosen_turn([success_of(scored[prompt].select) for prompt in prompts])]
        if not scored[chosen].test:
            played = yield from wishes.play(self.on_test(run, chosen))
            scored[chosen] = scored[chosen]._replace(test=played)
        return LoopRecord(prompts=prompts, scored=scored, turns=turns)

    def _reflect(self, run: int, context: Context, turns: Sequence[Read]) -> Steps[Read]:
        """Runs the arm, and books what it plays and asks."""
        place = self.place(run, context.meta_turn)
        history = [MetaTurn(turn.context, turn.candidate) for turn in turns]
        steps = self.arm.reflect(context, history, place)
        replays: list[Trajectory] = []
        replies: list[Candidate] = []
        answer: Any = None
        with contextlib.closing(steps):
            while True:
                try:
                    wish = steps.send(answer)
                except StopIteration as ended:
                    return Read(context, ended.value, replays, replies)
                answer = yield wish
                if isinstance(wish, wishes.Play):
                    replays += answer
                else:
                    replies += answer

    def _stream(self, run: int, meta_turn: int, prompt: str) -> list[Episode]:
        if self.arm.reads == "nothing" or (self.arm.reads == "first" and meta_turn > 0):
            return []
        family, games = self.family, self.games
        if self.arm.reads == "other":
            family, games = self.other, self.other_games
        batch = games.stream[run][meta_turn]
        return self._episodes("stream", family, run, batch, prompt, meta_turn)

    def _score(self, run: int, prompt: str, known: Scored | None, at_end: bool) -> list[Episode]:
        """What is still to be played to score a prompt: SELECT, then TEST."""
        evaluation, episodes = self.config.evaluation, []
        if known is None:
            episodes += self._episodes("select", self.family, run, self.games.select[run], prompt)
        everywhere = evaluation.scored == "all" or evaluation.protocol == "paper"
        if (everywhere or at_end) and not (known and known.test):
            episodes += self.on_test(run, prompt)
        return episodes

    def _episodes(
        self,
        use: str,
        family: str,
        run: int,
        games: Sequence[GameId],
        prompt: str,
        *turn: int,
    ) -> list[Episode]:
        return [
            Episode(
                game=game,
                system_prompt=prompt,
                key=keys.fold(self.key, use, family, run, *turn, str(game)),
            )
            for game in games
        ]

    def record(self, loops: Sequence[LoopRecord]) -> dict[str, Any]:
        """The result of all loops, as JSON: see `experiments.evaluation_folder`.

        Args:
          loops: in the order of their runs.
        """
        scored = [[loop.scored[prompt] for prompt in loop.prompts] for loop in loops]
        strict = self.config.evaluation.protocol == "strict"
        played = [t for loop in loops for one in loop.scored.values() for t in one.test]
        written = [turn for loop in loops for turn in loop.turns]
        return {
            "test": [[outcomes(one.test) for one in run] for run in scored],
            "select": [[one.select for one in run] for run in scored] if strict else [],
            "games": {
                "test": self.games.hashes(self.games.test),
                "select": self.games.hashes(self.games.select) if strict else [],
            },
            "malformed": sum(turn.candidate.failure is not None for turn in written),
            "actor_failures": parse_failures(played),
            "failed_episodes": sum(t.outcome is Outcome.FAILED for t in played),
            "budget": self._budget(written),
            "prompts": [
                _prompt_line(self, run, turn, loop)
                for run, loop in enumerate(loops)
                for turn in range(len(loop.prompts))
            ],
        }

    def _budget(self, written: Sequence[Read]) -> dict[str, int]:
        """What it took to write the prompts; scoring them is the evaluation's own."""
        streamed = [t for turn in written for t in turn.context.trajectories]
        played = [t for turn in written for t in turn.replays]
        if self.arm.reads != "first":  # played for the others
            played += streamed
        replies = [reply for turn in written for reply in turn.replies]
        return {
            "actor_episodes": len(played),
            "actor_tokens": sum(self.num_tokens(turn.reply) for t in played for turn in t.turns),
            "reflector_calls": len(replies),
            "reflector_tokens": sum(
                len(reply.reply_ids) or self.num_tokens(reply.reply) for reply in replies
            ),
        }


def outcomes(trajectories: Sequence[Trajectory]) -> Score:
    """Of every episode 1, 0 or None."""
    return [None if t.outcome is Outcome.FAILED else int(t.success) for t in trajectories]


def success_of(score: Sequence[int | None]) -> float | None:
    """The share of won games among those that the environment did not fail; None without any."""
    known = [won for won in score if won is not None]
    return sum(known) / len(known) if known else None


def chosen_turn(select: Sequence[float | None]) -> int:
    """The meta-turn with the best rate on SELECT; the earliest of equally good ones, the last one
    where no rate is known.
    """
    rates = [-1.0 if rate is None else rate for rate in select]
    return rates.index(max(rates)) if max(rates) >= 0 else len(rates) - 1


def last_prompts(part: Mapping[str, Any]) -> list[str]:
    """The lines of a part that tell of the last prompt of each loop."""
    runs = part["test"]
    return part["prompts"][len(runs[0]) - 1 :: len(runs[0])]


def last_success(part: Mapping[str, Any]) -> list[float | None]:
    """How the last prompt of each loop did on TEST."""
    return [success_of(turns[-1]) for turns in part["test"]]


def _book(
    scored: dict[str, Scored],
    prompt: str,
    played: Sequence[Trajectory],
    select: Sequence[GameId],
) -> None:
    """Adds what was played to score a prompt: as `Part._score` orders it."""
    known = scored.get(prompt)
    if known is None:
        known = Scored([], outcomes(played[: len(select)]))
        played = played[len(select) :]
    scored[prompt] = known._replace(test=list(played) or known.test)


def _prompt_line(part: Part, run: int, turn: int, loop: LoopRecord) -> str:
    """A prompt, its score, and what the reflector read and wrote for it."""
    scored = loop.scored[loop.prompts[turn]]
    where = {
        "arm": part.arm_name,
        "family": part.family,
        "run": run,
        "turn": turn,
        "success": success_rate(scored.test),
        "select_success": success_of(scored.select),
    }
    wrote = {}
    if turn > 0:
        read = loop.turns[turn - 1]
        wrote = json.loads(prompt_line(read.context, read.candidate))
    return to_json_line({**wrote, **where, "system_prompt": loop.prompts[turn]})
