"""Where an evaluation keeps what it plays: a folder per setting, so that none takes the place of
another.

RUN/NAME/SETTING/ holds settings.json, games.json (what was drawn), ARM_FAMILY.json (the record of a
part), contexts/ARM_FAMILY.jsonl (what its loops read), episodes/ARM_FAMILY.jsonl (the last prompts
on TEST), deletions/trained_FAMILY.json (the same without each sentence), turns.jsonl (all prompts),
prompts.jsonl (the last ones), sft-best/ (`experiments.best_candidates`) and evaluation.json.
RUN/NAME.json is a copy of the last, of the setting that was evaluated last, and names its folder.

The record of a part, one arm on one family: "test" and "select", for every run and every meta-turn
0..T the outcome of each game (1 won, 0 lost, null: failed by the environment; a meta-turn that was
not scored has none); "games", the initial states behind these; "malformed", "actor_failures",
"failed_episodes"; "budget", what writing the prompts took; "prompts", a line for every run and
meta-turn.
"""

import contextlib
import hashlib
import itertools
import json
import pathlib
import shutil
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from envs.api import GameId
from envs.files import replacing
from experiments.arms import arm_named, is_of_a_run, is_played_by_each
from experiments.evaluation_games import FamilyGames
from experiments.evaluation_results import read_object, read_results
from experiments.protocol import LoopRecord, Scored, Start
from ictjax.json_lines import read_records, to_json_line, to_json_text
from ictjax.records import context_from_dict, to_json, trajectory_from_dict
from ictjax.run_files import write_lines

_OF_ARMS = ("candidates", "sft", "expert_prompt", "endpoint", "endpoint_model")
_CHOICE = ("arms", "families")  # which parts there are, and nothing of any
_DRAWS = "shared"  # where settings do not say: those of before there was a choice
_OF_CALLS = ("url", "seeded")  # what of an endpoint decides what it answers


class EvaluationFolder:
    """The files of one setting of an evaluation; nothing is made before there is something to keep.

    Args:
      run_dir: of the run.
      name: "evaluation", or that of an evaluation on another task.
      settings: whatever decides what is played and by whom; JSON. "step" is the checkpoint's,
        "evaluation" holds the fields of `EvaluationConfig`.
    """

    def __init__(self, run_dir: pathlib.Path, name: str, settings: Mapping[str, Any]):
        self.run_dir, self._name = run_dir, name
        self._settings = _deciding(json.loads(json.dumps(settings)))
        setting = f"step{settings['step']}-{_digest(self._settings)[:10]}"
        self.name = f"{name}/{setting}"
        self._path = run_dir / name / setting

    def games(self, families: Sequence[str], runs: int) -> dict[str, FamilyGames]:
        """The games of families as they were drawn when they were first played; of those that are
        still to be drawn nothing.

        Training that goes on meanwhile would let the same draw leave out other games. Raises
        ValueError, naming the file, for one that is damaged.
        """
        path = self._path / "games.json"
        if not path.is_file():
            return {}
        data = read_object(path, self._remedy())
        try:
            drawn = {family: _games(of_family, runs) for family, of_family in data.items()}
            if not drawn:
                raise ValueError("the games of no family")
        except (TypeError, KeyError, AttributeError, ValueError):
            raise ValueError(
                f"{path} does not hold the games of an evaluation: {self._remedy()}."
            ) from None
        return {family: drawn[family] for family in families if family in drawn}

    def keep_games(self, games: Mapping[str, FamilyGames]) -> None:
        """Writes games that were drawn, beside those that are there, and the settings."""
        path = self._path / "games.json"
        there = read_object(path, self._remedy()) if path.is_file() else {}
        drawn = {family: _games_to_json(of_family) for family, of_family in games.items()}
        if {**there, **drawn} != there:
            _write(self._path / "settings.json", self._settings)
            _write(path, {**there, **drawn})

    def part(self, arm: str, family: str, games: FamilyGames) -> dict[str, Any] | None:
        """The record of one arm on one family on these games; None where it is still to be played.

        Raises ValueError, naming the file, for one that is damaged.
        """
        path = self._file(arm, family, ".json")
        if not path.is_file():
            return None
        record = read_object(path, self._remedy())
        if not is_part(record, len(games.test)):
            raise ValueError(f"{path} does not hold the record of a part: {self._remedy()}.")
        # of games that were drawn at another time: as good as missing
        return record if record["drawn"] == _drawn(games) else None

    def keep_part(
        self,
        arm: str,
        family: str,
        games: FamilyGames,
        record: Mapping[str, Any],
        loops: Sequence[LoopRecord],
    ) -> None:
        """Writes what the loops of a part read and the episodes of their last prompts, then its
        record. When the environment failed all of the latter, the part stays to be played
        (`failure`).
        """
        episodes = self._file(arm, family, ".jsonl", "episodes")
        last = [t for loop in loops for t in loop.scored[loop.prompts[-1]].test]
        write_lines(episodes, map(to_json, last))
        contexts = [turn.context for loop in loops for turn in loop.turns]
        write_lines(self._file(arm, family, ".jsonl", "contexts"), map(to_json, contexts))
        if any(won is not None for run in record["test"] for won in run[-1]):
            _write(self._file(arm, family, ".json"), {"drawn": _drawn(games), **record})

    def failure(self, arm: str, family: str) -> str:
        """What is said of a part of which the environment failed all test games."""
        episodes = self._file(arm, family, ".jsonl", "episodes")
        return (
            f"The environment failed every test game of family {family!r} (arm {arm}): see the"
            f" errors in {episodes}, then start it again."
        )

    def adopt(
        self, arm: str, family: str, games: FamilyGames, run_dirs: Iterable[pathlib.Path]
    ) -> None:
        """Copies a part that another setting of one of these runs holds, or another step, where all
        that decides it is equal. What is played for every run is of one run, and what asks the
        trained reflector of one step.
        """
        if is_played_by_each(arm, self._settings["evaluation"].get("draws", _DRAWS)):
            run_dirs = [self.run_dir]
        for path in itertools.chain.from_iterable(
            sorted((run_dir / self._name).glob("step*/settings.json")) for run_dir in run_dirs
        ):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged, or of before
                settings = read_object(path, "")
                other = EvaluationFolder(path.parents[2], self._name, settings)
                same = _of_arm(arm, settings) == _of_arm(arm, self._settings)
                if same and other._path != self._path and other.part(arm, family, games):
                    other._copy(arm, family, self)
                    return

    def _copy(self, arm: str, family: str, to: "EvaluationFolder") -> None:
        files = ((".jsonl", "episodes"), (".jsonl", "contexts"), (".json", "deletions"), (".json",))
        for ending, *folder in files:
            source = self._file(arm, family, ending, *folder)
            if folder == ["deletions"] and not source.exists():
                continue
            target = to._file(arm, family, ending, *folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)

    def starts(self, family: str, games: FamilyGames) -> list[Start]:
        """What the loops of all other arms begin with, from the part of the arm "initial". Raises
        ValueError, naming the file, for one that is damaged.
        """
        record = self.part("initial", family, games)
        assert record is not None, f"initial on {family} was played"
        episodes, contexts = (
            self._file("initial", family, ".jsonl", folder) for folder in ("episodes", "contexts")
        )
        try:
            played = iter([trajectory_from_dict(row) for row in read_records(episodes).values])
            tests = [[next(played) for _ in run] for run in games.test]
            read = [context_from_dict(row) for row in read_records(contexts).values]
        except (ValueError, StopIteration):
            raise ValueError(f"{episodes} or {contexts} is damaged: {self._remedy()}.") from None
        first = {context.loop: context for context in read if context.meta_turn == 0}
        select = record["select"] or [[[]]] * len(tests)
        return [
            Start(Scored(test, select[run][0]), first.get(run)) for run, test in enumerate(tests)
        ]

    def deletions(self, family: str, games: FamilyGames) -> list[dict[str, Any]]:
        """The loops of this run's reflector that were played without sentences on these games: see
        `experiments.deletions`. Raises ValueError, naming the file, for one that is damaged.
        """
        path = self._file("trained", family, ".json", "deletions")
        if not path.is_file():
            return []
        record = read_object(path, self._remedy())
        loops = record.get("loops")
        if not (isinstance(loops, list) and all(map(is_deletion, loops))):
            raise ValueError(f"{path} does not hold prompts without sentences: {self._remedy()}.")
        return loops if record.get("drawn") == _drawn(games) else []

    def keep_deletions(
        self, family: str, games: FamilyGames, loops: Sequence[Mapping[str, Any]]
    ) -> None:
        """Writes loops that were played, beside those of other runs that are there."""
        of_run = {loop["run"]: loop for loop in (*self.deletions(family, games), *loops)}
        path = self._file("trained", family, ".json", "deletions")
        together = [of_run[run] for run in sorted(of_run)]
        _write(path, {"drawn": _drawn(games), "loops": together})

    @property
    def taught(self) -> pathlib.Path:
        """Where the reflector of the arm sft-best is kept."""
        return self._path / "sft-best"

    def moved(self, to: pathlib.Path) -> "EvaluationFolder":
        """The folder of the same setting elsewhere, for results of several runs."""
        return EvaluationFolder(to, self._name, self._settings)

    def gather(
        self, parts: Iterable[tuple[str, str, int]], folders: Sequence["EvaluationFolder"]
    ) -> None:
        """Writes what readers of results look for: what was played in all parts, run after run."""
        files: dict[pathlib.Path, list[pathlib.Path]] = {}
        for (arm, family, number), kind in itertools.product(parts, ("episodes", "contexts")):
            place = self._file(arm, family, ".jsonl", kind)
            files.setdefault(place, []).append(folders[number]._file(arm, family, ".jsonl", kind))
        for place, sources in files.items():
            rows = [row for source in sources for row in read_records(source).values]
            if rows:
                write_lines(place, map(to_json_line, rows))

    def keep_prompts(self, prompts: Iterable[str], turns: Iterable[str]) -> None:
        """Writes the lines of the last prompts, and of all."""
        write_lines(self._path / "prompts.jsonl", prompts)
        write_lines(self._path / "turns.jsonl", turns)

    def finish(self, report: Mapping[str, Any]) -> None:
        """Writes the results, and makes them those that the run shows."""
        _write(self._path / "evaluation.json", report)
        shown = self.run_dir / f"{self._name}.json"
        self._keep_older(shown)
        _write(shown, report)

    def _keep_older(self, shown: pathlib.Path) -> None:
        """An earlier version kept its results nowhere else."""
        older = self._path.parent / "older.json"
        if not shown.is_file() or older.exists():
            return
        with contextlib.suppress(ValueError):  # damaged: kept as well
            if "folder" in read_results(shown):
                return
        with replacing(older) as temporary:
            shutil.copyfile(shown, temporary)

    def _file(self, arm: str, family: str, ending: str, folder: str = "") -> pathlib.Path:
        return self._path / folder / (_file_name(arm, family) + ending)

    def _remedy(self) -> str:
        return f"remove {self._path} to play this evaluation again"


def _file_name(arm: str, family: str) -> str:
    """A family may hold what no file name can."""
    return f"{arm}_{urllib.parse.quote(family, safe=' ')}"


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without what decides nothing of any part."""
    evaluation = settings.get("evaluation", {})
    kept = {name: value for name, value in evaluation.items() if name not in _CHOICE}
    if kept.get("draws") == _DRAWS:
        del kept["draws"]
    if "endpoint" in kept:
        kept["endpoint"] = {name: kept["endpoint"][name] for name in _OF_CALLS}
    return {**settings, "evaluation": kept}


def _of_arm(arm: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of the settings decides the parts of an arm."""
    needed = (*arm_named(arm).settings, *(("endpoint", "endpoint_model") if "@" in arm else ()))
    evaluation = {
        name: value
        for name, value in settings["evaluation"].items()
        if name not in _OF_ARMS or name in needed
    }
    if arm_named(arm).asks == "nobody":
        evaluation.pop("draws", None)
    step = settings["step"] if is_of_a_run(arm) else 0
    return {**settings, "evaluation": evaluation, "step": step}


def _drawn(games: FamilyGames) -> str:
    return _digest(_games_to_json(games))


def _games_to_json(games: FamilyGames) -> dict[str, Any]:
    return {
        "stream": [[list(map(str, batch)) for batch in run] for run in games.stream],
        "select": [list(map(str, run)) for run in games.select],
        "test": [list(map(str, run)) for run in games.test],
        "states": {str(game): digest for game, digest in games.states.items()},
    }


def _games(drawn: Mapping[str, Any], runs: int) -> FamilyGames:
    games = FamilyGames(
        stream=tuple(
            tuple(tuple(map(GameId.parse, batch)) for batch in run) for run in drawn["stream"]
        ),
        select=tuple(tuple(map(GameId.parse, run)) for run in drawn["select"]),
        test=tuple(tuple(map(GameId.parse, run)) for run in drawn["test"]),
        states={GameId.parse(name): str(digest) for name, digest in drawn["states"].items()},
    )
    if {len(games.stream), len(games.select), len(games.test)} != {runs} or not all(games.test):
        raise ValueError(f"the games of {len(games.test)} runs, not of {runs}")
    games.hashes(games.test + games.select)
    return games


def read_part(run_dir: pathlib.Path, folder: str, arm: str, family: str) -> dict[str, Any]:
    """The record of one arm on one family that a run keeps for results.

    Args:
      run_dir: of the run.
      folder: of the results, as they name it.
      arm: who wrote the prompts.
      family: that was played.

    Raises:
      ValueError: it is not there, or damaged; names the file.
    """
    path = run_dir / folder / f"{_file_name(arm, family)}.json"
    remedy = f"remove {path.parent} and evaluate again"
    try:
        record = read_object(path, remedy)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {remedy}.") from None
    test = record.get("test")
    if not (isinstance(test, list) and is_part(record, len(test))):
        raise ValueError(f"{path} does not hold the record of a part: {remedy}.")
    return record


def is_part(record: Mapping[str, Any], runs: int) -> bool:
    """Whether this is the record of a part of so many runs."""
    games, budget, prompts = (record.get(name) for name in ("games", "budget", "prompts"))
    counts = (record.get("malformed"), record.get("failed_episodes"))
    return (
        isinstance(record.get("drawn"), str)
        and isinstance(games, dict)
        and (turns := _turns(record.get("test"), games.get("test"), runs)) > 0
        and all(run[-1] for run in record["test"])
        and (
            record.get("select") == games.get("select") == []
            or _turns(record.get("select"), games.get("select"), runs) == turns
        )
        and isinstance(prompts, list)
        and len(prompts) == runs * turns
        and all(isinstance(line, str) and _is_line(line) for line in prompts)
        and all(type(count) is int for count in counts)
        and isinstance(record.get("actor_failures"), dict)
        and isinstance(budget, dict)
        and all(type(count) is int for count in budget.values())
    )


def is_deletion(loop: Any) -> bool:
    """Whether this is the record of a loop that was played without sentences."""
    return (
        isinstance(loop, dict)
        and type(loop.get("run")) is int
        and isinstance(loop.get("prompt"), str)
        and _is_score(loop.get("whole"))
        and isinstance(loop.get("sentences"), list)
        and all(
            isinstance(sentence, dict)
            and isinstance(sentence.get("text"), str)
            and _is_score(sentence.get("outcomes"))
            and len(sentence["outcomes"]) == len(loop["whole"])
            for sentence in loop["sentences"]
        )
    )


def _turns(scores: Any, games: Any, runs: int) -> int:
    """How many meta-turns each of so many runs has; 0 where these are no scores of these games."""
    if not (_is_table(scores) and _is_table(games) and len(scores) == len(games) == runs):
        return 0
    fine = all(
        _is_score(turn) and len(turn) in (0, len(of_run))
        for run, of_run in zip(scores, games, strict=True)
        for turn in run
    ) and all(isinstance(digest, str) for of_run in games for digest in of_run)
    lengths = {len(run) for run in scores}
    return lengths.pop() if fine and len(lengths) == 1 else 0


def _is_score(turn: Any) -> bool:
    return isinstance(turn, list) and all(
        won is None or (type(won) is int and won in (0, 1)) for won in turn
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) for row in value)


def _is_line(text: str) -> bool:
    """Whether this is a JSON object in one line, as prompts.jsonl holds it."""
    try:
        return "\n" not in text and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _write(path: pathlib.Path, data: Mapping[str, Any]) -> None:
    write_lines(path, [to_json_text(data, indent=1)])
