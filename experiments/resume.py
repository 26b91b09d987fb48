"""How a run goes on: what may be different by then, from where, and what of its record is lost."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from envs.files import replacing
from experiments.manifest import now, program
from experiments.run_lock import RunLock
from ictjax.metrics import read_metrics
from ictjax.run_config import Difference, TrainConfig, differences, to_dict
from ictjax.run_files import gaps, newest_file, write_lines

# What decides neither which games are played nor what is learned from them: how long, where, how
# fast, what is kept, and what is measured afterwards. A name ending in a dot holds all below it.
# Another mesh or another split of the work sums in another order: equal up to rounding.
MAY_CHANGE = (
    "iterations",
    "checkpoint_every",
    "keep_last",
    "keep_every",
    "keep_best",
    "patience",
    "track",
    "track_project",
    "remat",
    "optimizer.memory",
    "evaluation.",
    "actor.mesh.",
    "reflector.mesh.",
    "actor.endpoint.key_variable",
    "actor.endpoint.concurrency",
    "actor.endpoint.timeout_s",
    "actor.endpoint.max_retries",
    "actor.endpoint.first_wait_s",
    "actor.endpoint.tokens_parameter",
    "actor.endpoint.input_price",
    "actor.endpoint.output_price",
    "task.environment.num_workers",
    "task.environment.max_live_games",
    "task.environment.deadline_s",
    "task.rollout.share_min_tokens",
    "task.rollout.gather_s",
    "learner.num_microbatches",
    "learner.positions_per_chunk",
    "learner.attention",
    "batch.num_rows",
    "batch.replies_per_row",
    *(
        f"{role}_sampler.{field}"
        for role in ("actor", "reflector")
        for field in (
            "num_slots",
            "extend_buckets",
            "row_buckets",
            "decode_steps",
            "extend_steps",
            "guessed_tokens",
            "max_in_flight",
            "attended_buckets",
            "page_size",
            "attention",
            "num_pages",
        )
    ),
)
_SHOWN = 4  # differences in one sentence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumed:
    """Where a run goes on, and what is to be said of it."""

    first: int  # iterations that its checkpoint holds
    again: int  # iterations after these whose files are dropped and made again
    changes: tuple[Difference, ...]
    lost: tuple[str, ...]  # of the record of the first iterations

    def lines(self, run_dir: pathlib.Path) -> list[str]:
        """For the terminal; nothing where nothing had been done."""
        if not self.first + self.again:
            return []
        again = ""
        if self.again:
            one = self.again == 1
            again = (
                f"; {self.again} iteration{'' if one else 's'} after it"
                f" {'is' if one else 'are'} made again"
            )
        said = [f"Going on with {run_dir} from iteration {self.first}{again}."]
        if self.changes:
            said.append(f"Different from now on: {shown(self.changes)}.")
        if self.lost:
            said.append(incomplete(run_dir, self.lost))
        return said


def incomplete(run_dir: pathlib.Path, lost: Sequence[str]) -> str:
    """What is to be said of a record that `ictjax.run_files.gaps` has found gaps in."""
    return (
        f"The record of {run_dir} is no longer whole: {'; '.join(lost)}. Training is not affected;"
        " restore it before an evaluation or a report."
    )


def check_changes(
    run_dir: pathlib.Path,
    before: TrainConfig,
    config: TrainConfig,
    hashed: Collection[str],
    remedy: str,
) -> None:
    """Compares the configuration that a run goes on with and its own.

    Args:
      before: of the run.
      config: that was asked for.
      hashed: what the run knows by content (see `contents.content_hashes`), so that its folder may
        move.
      remedy: what else can be done, for the end of a sentence.

    Raises:
      ValueError: something differs that changes the experiment, or the run has done more iterations
        than are asked for.
    """
    steps = before.whole_optimizer.total_steps
    same_course = before.whole_optimizer == config.whole_optimizer
    if (
        before.optimizer.schedule == config.optimizer.schedule == "cosine"
        and config.optimizer == before.optimizer
        and not same_course
    ):
        raise ValueError(
            f"The learning rate of {run_dir} is a cosine that reaches 0 at its end, update {steps};"
            f" with --iterations {config.iterations} every update would have another: keep it with"
            f" --optimizer.total-steps {steps}, or {remedy}."
        )
    found = [
        difference
        for difference in differences(to_dict(before), to_dict(config))
        if not _may_change(difference, before, config, hashed)
        and not (difference.field == "optimizer.total_steps" and same_course)
    ]
    if found:
        raise ValueError(f"{run_dir} is a run of another configuration ({shown(found)}): {remedy}.")
    done = newest_checkpoint(run_dir)
    if config.iterations < done:
        raise ValueError(
            f"{run_dir} has done {done} iterations, more than --iterations {config.iterations}:"
            f" give at least {done}, {remedy}."
        )


def _may_change(
    difference: Difference, before: TrainConfig, config: TrainConfig, hashed: Collection[str]
) -> bool:
    name = difference.field
    if name == "actor.endpoint.url":  # the server moved; a model in its place is another actor
        return bool(difference.before and difference.now)
    if name in ("actor.model", "reflector.model"):
        role = name.partition(".")[0]
        remote = role == "actor" and (before.actor.endpoint.url or config.actor.endpoint.url)
        return role in hashed and not remote
    if name in ("actor.adapter", "reflector.adapter"):
        there_both_times = bool(difference.before and difference.now)
        return there_both_times and name.replace(".", " ") in hashed
    return name in MAY_CHANGE or name.startswith(
        tuple(prefix for prefix in MAY_CHANGE if prefix.endswith("."))
    )


def shown(found: Sequence[Difference]) -> str:
    """The differences by their flags, with both values."""
    said = [
        f"--{difference.field.replace('_', '-')} was {_value(difference.before)}, is"
        f" {_value(difference.now)}"
        for difference in found[:_SHOWN]
    ]
    if len(found) > _SHOWN:
        said.append(f"and {len(found) - _SHOWN} more")
    return "; ".join(said)


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_models(
    run_dir: pathlib.Path,
    known: Mapping[str, str],
    config: TrainConfig,
    models: Mapping[str, str],
) -> None:
    """Raises ValueError for a model or an adapter that is no longer what the run was started with.

    Args:
      known: the hashes in the run's manifest, see `contents.content_hashes`.
      config: with models and adapters by their folders.
      models: their hashes now.
    """
    for name, content in models.items():
        if known.get(name, content) == content:
            continue
        role, _, adapter = name.partition(" ")
        field = adapter or "model"
        player = config.actor if role == "actor" else config.reflector
        raise ValueError(
            f"The {role}'s {field} in {player.adapter if adapter else player.model} is not the one"
            f" that {run_dir} was started with (its files differ): restore it, name the folder"
            f" where it is with --{role}.{field}, or choose another --run-dir."
        )


@contextlib.contextmanager
def going_on(
    run_dir: pathlib.Path,
    lock: RunLock,
    config: TrainConfig,
    before: TrainConfig,
    manifest: Mapping[str, Any],
    models: Mapping[str, str],
    attention: str,
    sampling: Mapping[str, str],
) -> Iterator[Resumed]:
    """Goes on with a run: writes the configuration that counts from now on, and
    into the manifest when, how and from where the run went on. When the body raises before anything
    is gained, both files are as they were.

    Args:
      lock: of the run's directory, held.
      config: of the run from now on.
      before: until now.
      manifest: of the run, see `run_dir.read_manifest`.
      models: see `contents.content_hashes`.
      attention: the implementation that the update uses from now on.
      sampling: that of every sampler, by role.

    Raises:
      ValueError: metrics.jsonl is damaged.
    """
    first, newest = newest_checkpoint(run_dir), newest_record(run_dir)
    resumed = Resumed(
        first=first,
        again=max(newest - first, 0),
        changes=tuple(differences(to_dict(before), to_dict(config))),
        lost=tuple(gaps(run_dir, first)),
    )
    entry = {
        "date": now(),
        "argv": program(),
        "attention": attention,
        "sampling_attention": dict(sampling),
        "from_iteration": first,
        "made_again": resumed.again,
        "changes": [change._asdict() for change in resumed.changes],
        "lost": resumed.lost,
    }
    history = {
        **{name: value for name, value in manifest.items() if name != "finished"},
        "models": {**manifest.get("models", {}), **models},
        "resumed": [*manifest.get("resumed", []), entry],
    }
    paths = (run_dir / "manifest.json", run_dir / "config.json")
    old = {path: path.read_bytes() for path in paths if path.is_file()}
    try:
        for path, data in zip(paths, (history, to_dict(config)), strict=True):
            write_lines(path, [json.dumps(data, indent=1)])
        yield resumed
    except BaseException:  # a signal that stops the program too
        gained = newest_checkpoint(run_dir) > first or newest_record(run_dir) > newest
        if lock.is_held and not gained:
            for path in paths:
                if path not in old:
                    path.unlink()
                    continue
                with replacing(path) as temporary:
                    temporary.write_bytes(old[path])
        raise


def newest_checkpoint(run_dir: pathlib.Path) -> int:
    """The iterations that a run's newest checkpoint holds; 0 where there is none. A folder without
    files, as an interrupted copy leaves, is none.
    """
    try:
        folders = [path for path in (run_dir / "checkpoints").iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return 0
    steps = {
        int(path.name): path for path in folders if path.name.isascii() and path.name.isdecimal()
    }
    return next((step for step in sorted(steps, reverse=True) if any(steps[step].iterdir())), 0)


def newest_record(run_dir: pathlib.Path) -> int:
    """The last iteration that left a line or a file; 0 where none did. Raises ValueError for a
    damaged metrics.jsonl.
    """
    records = read_metrics(run_dir)
    return max(records[-1]["iteration"] if records else 0, newest_file(run_dir))
