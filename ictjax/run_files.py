"""The line files of a run directory: written whole or not at all, one file per iteration."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Sequence

from envs.files import replacing
from ictjax.json_lines import to_json_line
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
    without its token ids.
    """
    fields = dataclasses.asdict(written)
    del fields["prompt_ids"], fields["logprobs"]
    fields["num_reply_tokens"] = len(fields.pop("reply_ids"))
    about = {
        "loop": asked.loop,
        "family": asked.family,
        "meta_turn": asked.meta_turn,
        "old_prompt": asked.system_prompt,
    }
    return to_json_line({**where, **about, **fields})


def drop_after(run_dir: pathlib.Path, iteration: int) -> None:
    """Removes the files of later iterations, which a resumed run writes again, and what a killed
    process left half-written.
    """
    for folder in FOLDERS:
        for path in (run_dir / folder).glob("*"):
            match = _ITERATION.fullmatch(path.name)
            if path.suffix == ".tmp" or (match and int(match.group(1)) > iteration):
                path.unlink()
