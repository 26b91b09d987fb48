"""The line files of a run directory: written whole or not at all, one file per iteration."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

from envs.files import replacing
from ictjax.json_lines import to_json_line
from ictjax.metrics import FILE_NAME, read_metrics
from ictjax.records import Candidate, Context, Trajectory, to_json

FOLDERS = ("episodes", "contexts", "prompts")
_ITERATION = re.compile(r"iteration_(\d+)\.jsonl")


def write_lines(path: pathlib.Path, lines: Iterable[str]) -> None:
    """Writes a text file of lines; a process killed meanwhile leaves the old file, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def write_iteration(
    run_dir: pathlib.Path,
    iteration: int,
    contexts: Sequence[Context],
    groups: Sequence[Sequence[Candidate]],
    trajectories: Sequence[Trajectory],
) -> None:
    """Writes what one iteration played and wrote: contexts with their episodes, the reward
    episodes, and one line per candidate prompt.

    A prompt line holds iteration, context (the line number in the contexts file), candidate (its
    number in the group), loop, family, meta_turn, old_prompt, reply, analysis, system_prompt,
    failure, num_reply_tokens, replay_reward, fresh_reward and reward.
    """
    name = f"iteration_{iteration:05d}.jsonl"
    write_lines(run_dir / "contexts" / name, map(to_json, contexts))
    write_lines(run_dir / "episodes" / name, map(to_json, trajectories))
    write_lines(
        run_dir / "prompts" / name,
        (
            prompt_line(context, candidate, iteration=iteration, context=q, candidate=g)
            for q, (context, group) in enumerate(zip(contexts, groups, strict=True))
            for g, candidate in enumerate(group)
        ),
    )


def prompt_line(asked: Context, written: Candidate, **where: int | str) -> str:
    """One line of a prompts file: where it belongs, the context it answers, and the candidate
    without its token ids and the step of its weights.
    """
    fields = dataclasses.asdict(written)
    del fields["prompt_ids"], fields["logprobs"], fields["weights_step"]
    fields["num_reply_tokens"] = len(fields.pop("reply_ids"))
    about = {
        "loop": asked.loop,
        "family": asked.family,
        "meta_turn": asked.meta_turn,
        "old_prompt": asked.system_prompt,
    }
    return to_json_line({**where, **about, **fields})


def newest_file(run_dir: pathlib.Path) -> int:
    """The last iteration that has a file; 0 where none has."""
    found = [
        int(match.group(1))
        for folder in FOLDERS
        for path in (run_dir / folder).glob("*")
        if (match := _ITERATION.fullmatch(path.name))
    ]
    return max(found, default=0)


def gaps(run_dir: pathlib.Path, last: int) -> list[str]:
    """What is no longer there of the record of iterations 1 to `last`: lines of metrics.jsonl,
    files that are missing, empty or cut within a line. For each kind a few words.

    Raises:
      ValueError: metrics.jsonl is damaged.
    """
    records = {record["iteration"]: record for record in read_metrics(run_dir)}
    expected = range(1, last + 1)
    missing = {FILE_NAME: [number for number in expected if number not in records]}
    for folder in FOLDERS:
        missing[f"{folder}/"] = [
            number
            for number in expected
            if not _whole(
                run_dir / folder / f"iteration_{number:05d}.jsonl",
                # without a usable prompt nothing was played for rewards
                empty=folder == "episodes" and records.get(number, {}).get("distinct_prompts") == 0,
            )
        ]
    return [f"{name} lacks {_ranges(lost)}" for name, lost in missing.items() if lost]


def _whole(path: pathlib.Path, *, empty: bool) -> bool:
    try:
        with path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return empty
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
    except OSError:
        return False


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as people write them: 1-3, 7."""
    parts: list[str] = []
    first = numbers[0]
    for number, following in zip(numbers, [*numbers[1:], None], strict=True):
        if following != number + 1:
            parts.append(str(number) if first == number else f"{first}-{number}")
            first = following or 0
    return f"iteration{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"


def drop_after(run_dir: pathlib.Path, iteration: int) -> None:
    """Removes the files of later iterations, which a resumed run writes again, and what a killed
    process left half-written.
    """
    for folder in FOLDERS:
        for path in (run_dir / folder).glob("*"):
            match = _ITERATION.fullmatch(path.name)
            if path.suffix == ".tmp" or (match and int(match.group(1)) > iteration):
                path.unlink()
