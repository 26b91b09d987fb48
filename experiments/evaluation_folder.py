"""Where an evaluation keeps what it plays: a folder per setting, so that none takes the place of
another.

RUN/NAME/SETTING/ holds settings.json, games.json (drawn once), ARM_FAMILY.json (the result of a
part), episodes/ARM_FAMILY.jsonl, prompts.jsonl and evaluation.json. RUN/NAME.json is a copy of the
last, of the setting that was evaluated last, and names its folder.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from envs.api import GameId
from envs.files import replacing
from experiments.evaluation_results import is_number, read_object, read_results
from experiments.protocol import FamilyGames
from ictjax.json_lines import to_json_text
from ictjax.records import Trajectory, to_json
from ictjax.run_files import write_lines


class EvaluationFolder:
    """The files of one setting of an evaluation; nothing is made before there is something to keep.

    Args:
      run_dir: of the run.
      name: "evaluation", or that of an evaluation on another task.
      settings: whatever decides what is played and by whom; JSON. "step" is the checkpoint's.
    """

    def __init__(self, run_dir: pathlib.Path, name: str, settings: Mapping[str, Any]):
        self._run_dir, self._name = run_dir, name
        self._settings = json.loads(json.dumps(settings))
        setting = f"step{settings['step']}-{_digest(self._settings)[:10]}"
        self.name = f"{name}/{setting}"
        self._path = run_dir / name / setting

    def games(self, families: Sequence[str], runs: int) -> dict[str, FamilyGames] | None:
        """The games of every family as they were drawn when the evaluation began; None before.

        Training that goes on meanwhile would let the same draw leave out other games. Raises
        ValueError, naming the file, for one that is damaged.
        """
        path = self._path / "games.json"
        if not path.is_file():
            return None
        data = read_object(path, self._remedy())
        try:
            return {family: _games(data[family], runs) for family in families}
        except (TypeError, KeyError, AttributeError, ValueError):
            raise ValueError(
                f"{path} does not hold the games of an evaluation: {self._remedy()}."
            ) from None

    def keep_games(self, games: Mapping[str, FamilyGames]) -> None:
        """Writes the games that were drawn, and the settings."""
        _write(self._path / "settings.json", self._settings)
        _write(
            self._path / "games.json",
            {
                family: {
                    "stream": [[list(map(str, batch)) for batch in run] for run in drawn.stream],
                    "test": [list(map(str, run)) for run in drawn.test],
                }
                for family, drawn in games.items()
            },
        )

    def part(self, arm: str, family: str, runs: int) -> dict[str, Any] | None:
        """The result of one arm on one family in so many runs; None where it is still to be played.

        Raises ValueError, naming the file, for one that is damaged.
        """
        path = self._file(arm, family, ".json")
        if not path.is_file():
            return None
        result = read_object(path, self._remedy())
        if not _is_part(result, runs):
            raise ValueError(f"{path} does not hold the result of a part: {self._remedy()}.")
        # of games that were drawn at another time: as good as missing
        return result if result["games"] == self._drawn() else None

    def keep_part(
        self,
        arm: str,
        family: str,
        result: Mapping[str, Any],
        trajectories: Iterable[Trajectory],
    ) -> None:
        """Writes what was played, then its result. Raises ValueError when the environment failed
        all of it: the episodes are kept, and the part stays to be played.
        """
        episodes = self._path / "episodes" / f"{_file_name(arm, family)}.jsonl"
        write_lines(episodes, map(to_json, trajectories))
        if all(rate is None for rate in result["success"]):
            raise ValueError(
                f"The environment failed every test game of family {family!r} (arm {arm}): see the"
                f" errors in {episodes}, then start it again."
            )
        _write(self._file(arm, family, ".json"), {"games": self._drawn(), **result})

    def finish(self, report: Mapping[str, Any], prompts: Iterable[str]) -> None:
        """Writes the results, and makes them those that the run shows."""
        write_lines(self._path / "prompts.jsonl", prompts)
        _write(self._path / "evaluation.json", report)
        shown = self._run_dir / f"{self._name}.json"
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

    def _file(self, arm: str, family: str, ending: str) -> pathlib.Path:
        return self._path / (_file_name(arm, family) + ending)

    def _drawn(self) -> str:
        path = self._path / "games.json"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    def _remedy(self) -> str:
        return f"remove {self._path} to play this evaluation again"


def _file_name(arm: str, family: str) -> str:
    """A family may hold what no file name can."""
    return f"{arm}_{urllib.parse.quote(family, safe=' ')}"


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _games(drawn: Mapping[str, Any], runs: int) -> FamilyGames:
    games = FamilyGames(
        stream=tuple(
            tuple(tuple(map(GameId.parse, batch)) for batch in run) for run in drawn["stream"]
        ),
        test=tuple(tuple(map(GameId.parse, run)) for run in drawn["test"]),
    )
    if len(games.stream) != runs or len(games.test) != runs or not all(games.test):
        raise ValueError(f"the games of {len(games.test)} runs, not of {runs}")
    return games


def _is_part(result: Mapping[str, Any], runs: int) -> bool:
    rates, prompts = result.get("success"), result.get("prompts")
    counts = ("num_games", "malformed", "failed_episodes")
    return (
        isinstance(result.get("games"), str)
        and isinstance(rates, list)
        and all(rate is None or (is_number(rate) and 0 <= rate <= 1) for rate in rates)
        and isinstance(prompts, list)
        and len(prompts) == len(rates) == runs
        and all(isinstance(line, str) and _is_line(line) for line in prompts)
        and all(isinstance(result.get(name), int) for name in counts)
        and isinstance(result.get("actor_failures"), dict)
    )


def _is_line(text: str) -> bool:
    """Whether this is a JSON object in one line, as prompts.jsonl holds it."""
    try:
        return "\n" not in text and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _write(path: pathlib.Path, data: Mapping[str, Any]) -> None:
    write_lines(path, [to_json_text(data, indent=1)])
