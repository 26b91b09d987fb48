"""The episodes of an evaluation as logs of Inspect (inspect.aisi.org.uk): `inspect view` shows
them. Needs the package inspect-ai.
"""

import collections
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from inspect_ai.log import (
    EvalConfig,
    EvalDataset,
    EvalError,
    EvalLog,
    EvalMetric,
    EvalResults,
    EvalSample,
    EvalScore,
    EvalSpec,
    EvalStats,
    write_eval_log,
)
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ModelOutput,
)
from inspect_ai.scorer import CORRECT, INCORRECT, Score

from experiments.report_data import Evaluation, RunData, game_name

Json = Mapping[str, Any]

_SCORER = "success"
_UNDATED = "1970-01-01T00:00:00+00:00"  # of a run whose manifest is missing


def write_logs(run: RunData, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes a log for every arm of every evaluation; returns their paths.

    A sample is an episode under the last prompt of a loop on a TEST game: the actor's messages, and
    whether it won (C or I); an episode that the environment failed has an error instead. Games that
    are played more than once are epochs. Metrics are the means of evaluation.json, by family and
    split, and no others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for evaluation in run.evaluations:
        for arm in dict.fromkeys(arm for arm, _ in evaluation.episodes):
            name = re.sub(r"[^\w.@=,-]", "-", f"{evaluation.name}_{arm}")
            path = folder / f"{name}.eval"
            write_eval_log(_log(run, evaluation, arm), str(path))
            paths.append(path)
    return paths


def _log(run: RunData, evaluation: Evaluation, arm: str) -> EvalLog:
    samples = list(_samples(evaluation, arm))
    scored = sum(sample.scores is not None for sample in samples)
    created = str(run.manifest.get("finished") or run.manifest.get("started") or _UNDATED)
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=created,
            task=f"{evaluation.name} of {run.folder.resolve().name}",
            dataset=EvalDataset(
                name=str(evaluation.environment.get("name", "")),
                samples=len({sample.id for sample in samples}),
                sample_ids=list(dict.fromkeys(str(sample.id) for sample in samples)),
            ),
            model=f"ictjax/{arm}",
            config=EvalConfig(epochs=max((sample.epoch for sample in samples), default=1)),
            metadata={
                "arm": arm,
                "iteration": evaluation.checkpoint,
                "protocol": evaluation.results["protocol"].get("protocol"),
                "headline": (evaluation.results["headline"] or {}).get("text"),
            },
        ),
        results=EvalResults(
            total_samples=len(samples),
            completed_samples=scored,
            scores=[
                EvalScore(
                    name=_SCORER,
                    scorer=_SCORER,
                    scored_samples=scored,
                    unscored_samples=len(samples) - scored,
                    metrics=dict(_metrics(evaluation.results, arm)),
                )
            ],
        ),
        stats=EvalStats(started_at=created, completed_at=created),
        samples=samples,
    )


def _metrics(results: Json, arm: str) -> Iterator[tuple[str, EvalMetric]]:
    for numbers in (results["overall"], results["families"]):
        for name, part in numbers.items():
            if arm in part["arms"]:
                yield name, EvalMetric(name=name, value=part["arms"][arm]["mean"])


def _samples(evaluation: Evaluation, arm: str) -> Iterator[EvalSample]:
    epochs: collections.Counter[str] = collections.Counter()
    for (of_arm, family), episodes in evaluation.episodes.items():
        if of_arm != arm:
            continue
        for episode in episodes:
            name = game_name(episode)
            epochs[name] += 1
            messages = list(_messages(episode))
            failed = episode["outcome"] == "failed"
            won = CORRECT if episode["outcome"] == "success" else INCORRECT
            replies = [turn["reply"] for turn in episode["turns"] if "reply" in turn]
            error = str(episode.get("error") or "the environment failed")
            yield EvalSample(
                id=name,
                epoch=epochs[name],
                input=episode["turns"][0]["observation"] if episode["turns"] else "",
                target="win the game",
                messages=messages,
                output=ModelOutput.from_content(f"ictjax/{arm}", replies[-1] if replies else ""),
                scores=None if failed else {_SCORER: Score(value=won, answer=episode["outcome"])},
                error=EvalError(message=error, traceback="", traceback_ansi="") if failed else None,
                metadata={
                    "family": family,
                    "split": evaluation.families[family]["split"],
                    "arm": arm,
                    "outcome": episode["outcome"],
                    "state": episode.get("state_hash", ""),
                    "actions": [turn["action"] for turn in episode["turns"]],
                    "parse_failures": [turn.get("failure") for turn in episode["turns"]],
                },
            )


def _messages(episode: Json) -> Iterator[ChatMessage]:
    """What was said in an episode, with the last screen at its end. The words around observations
    and actions, which the record does not hold, are left out.
    """
    yield ChatMessageSystem(content=episode["system_prompt"])
    for turn in episode["turns"]:
        yield ChatMessageUser(content=turn["observation"])
        yield ChatMessageAssistant(content=turn.get("reply", ""))
    yield ChatMessageUser(content=episode["final_observation"])
