"""How a training goes, in a terminal of 80 columns, from the files of its run alone."""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from envs.stopping import check
from experiments.run_dir import read_run
from experiments.run_lock import check_free
from experiments.visible import visible
from experiments.wording import counted
from ictjax.json_lines import read_records
from ictjax.metrics import read_metrics
from ictjax.run_config import TrainConfig

_BLOCKS, _PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.,:;+*#"
_WIDEST = 40  # columns of a curve
_RECENT = 5  # iterations that the time left is told by
_MAX_TURNS = 6  # of the game that is shown: its last ones
_MAX_CHARS = 240  # of a text in it
_MAX_PROMPT = 800
_PHASES = ("contexts", "candidates", "rewards", "refill", "update", "checkpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What a run's files say now."""

    run_dir: pathlib.Path
    config: TrainConfig
    metrics: list[dict[str, Any]]
    running: bool
    prompt: dict[str, Any] | None  # the best of the newest iteration, as prompts/ has it
    episode: dict[str, Any] | None  # a game under it, as episodes/ has it

    @property
    def done(self) -> int:
        return self.metrics[-1]["iteration"] if self.metrics else 0

    @property
    def finished(self) -> bool:
        return self.done >= self.config.iterations


def watch(run_dir: pathlib.Path, console: Console, *, every: float, once: bool) -> None:
    """Shows a run, on a terminal anew every few seconds until nobody trains it any more.

    Args:
      run_dir: of the run.
      console: where.
      every: seconds between two looks.
      once: one look is enough, as it is where the console is no terminal.

    Raises:
      ValueError: there is no run, or its files are damaged.
    """
    seen = look(run_dir)
    if once or not console.is_terminal or not seen.running:
        console.print(page(seen, console))
        return
    with Live(page(seen, console), console=console, auto_refresh=False) as live:
        while seen.running:
            until = time.monotonic() + every
            while time.monotonic() < until:
                check()
                time.sleep(min(0.1, every))
            seen = look(run_dir, seen)
            live.update(page(seen, console), refresh=True)


def look(run_dir: pathlib.Path, before: Look | None = None) -> Look:
    """Reads the files; of prompts and games again only where an iteration has ended since."""
    config = read_run(run_dir) if before is None else before.config
    metrics = read_metrics(run_dir)
    running = not _is_free(run_dir)
    done = metrics[-1]["iteration"] if metrics else 0
    if before is not None and before.done == done:
        prompt, episode = before.prompt, before.episode
    else:
        prompt, episode = _newest(run_dir, done)
    return Look(
        run_dir=run_dir,
        config=config,
        metrics=metrics,
        running=running,
        prompt=prompt,
        episode=episode,
    )


def _is_free(run_dir: pathlib.Path) -> bool:
    try:
        check_free(run_dir)
    except ValueError:
        return False
    return True


def _newest(
    run_dir: pathlib.Path, iteration: int
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    name = f"iteration_{iteration:05d}.jsonl"
    written = [
        record
        for record in read_records(run_dir / "prompts" / name).values
        if record.get("system_prompt") and record.get("reward") is not None
    ]
    if not written:
        return None, None
    best = max(written, key=lambda record: record["reward"])
    played = [
        record
        for record in read_records(run_dir / "episodes" / name).values
        if record.get("system_prompt") == best["system_prompt"] and record.get("turns")
    ]
    return best, played[0] if played else None


def page(seen: Look, console: Console) -> RenderableType:
    """What is shown of it."""
    parts: list[RenderableType] = [_state(seen)]
    if seen.metrics:
        parts += [_numbers(seen, console), *_texts(seen)]
    else:
        parts.append(
            "No iteration has ended yet: programs are compiled and the first games played."
        )
    parts.append(_next(seen))
    return Group(*parts)


def _state(seen: Look) -> str:
    if seen.running:
        how = "training"
    elif seen.finished:
        how = "finished"
    else:
        how = "stopped"
    return f"Iteration {seen.done} of {seen.config.iterations}, {how}: {seen.run_dir}"


def _numbers(seen: Look, console: Console) -> Table:
    last, groups = seen.metrics[-1], seen.config.meta.contexts_per_iteration
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    blocks = _BLOCKS if "utf" in console.encoding.lower() else _PLAIN_BLOCKS
    for name, key in (
        ("reward", "reward"),
        ("  replayed games", "reward_replay"),
        ("  fresh games", "reward_fresh"),
        ("before reflection", "context_success"),
    ):
        values = [record.get(key) for record in seen.metrics]
        if any(value is not None for value in values):
            table.add_row(name, _history(values, blocks))
    families = last.get("reward_family") or {}
    table.add_row(
        "by family",
        ", ".join(f"{family} {_rate(value)}" for family, value in sorted(families.items())) or "-",
    )
    candidates, turns = last.get("candidates"), last.get("turns")
    failures = last.get("reflector_failures") or {}
    table.add_row(
        "last iteration",
        ", ".join(
            [
                f"dead groups {last.get('dead_groups', 0)} of {groups}",
                f"malformed {_share(last.get('malformed_candidates'), candidates)}",
                f"truncated {_share(failures.get('truncated'), candidates)}",
                f"replies of the actor without an action"
                f" {_share(sum((last.get('actor_failures') or {}).values()), turns)}",
                f"KL {_rate(last.get('kl'))}",
            ]
        ),
    )
    times = last.get("time") or {}
    phases = [(name, times[f"{name}_s"]) for name in _PHASES if f"{name}_s" in times]
    table.add_row("seconds", ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases) or "-")
    left = _left_s(seen)
    if left is not None:
        until = time.strftime("%H:%M", time.localtime(time.time() + left))
        table.add_row("left", f"about {_duration(left)}, until {until}")
    return table


def _history(values: Sequence[float | None], blocks: str) -> str:
    known = [value for value in values if value is not None]
    first, last, best = known[0], known[-1], max(known)
    where = next(i for i, value in enumerate(values, start=1) if value == best)
    text = f"{curve(values, blocks)}  {_rate(first)}"
    if len(known) > 1:
        text += f" to {_rate(last)}, best {_rate(best)} (iteration {where})"
    return text


def curve(values: Sequence[float | None], blocks: str = _BLOCKS) -> str:
    """A curve of one character a value, between the lowest and the highest one; of many values,
    means of neighbours.
    """
    if len(values) > _WIDEST:
        bounds = [len(values) * part // _WIDEST for part in range(_WIDEST + 1)]
        parts = [values[low:high] for low, high in itertools.pairwise(bounds)]
        values = [_mean(part) for part in parts]
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    steps = len(blocks) - 1
    return "".join(
        " "
        if value is None
        else blocks[steps // 2 if high == low else round(steps * (value - low) / (high - low))]
        for value in values
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _texts(seen: Look) -> list[RenderableType]:
    shown: list[RenderableType] = []
    if seen.prompt is not None:
        title = f"Best new prompt: {seen.prompt['family']}, reward {_rate(seen.prompt['reward'])}"
        shown.append(_box(title, _cut(seen.prompt["system_prompt"], _MAX_PROMPT)))
    if seen.episode is not None:
        turns: list[Mapping[str, Any]] = seen.episode["turns"]
        lines = []
        for turn in turns[-_MAX_TURNS:]:
            lines.append(_cut(str(turn.get("observation", "")), _MAX_CHARS))
            said = turn.get("action") or turn.get("reply", "")
            lines.append(f"  > {_cut(str(said), _MAX_CHARS)}")
        title = (
            f"A game under it: {seen.episode.get('outcome', '?')}, {counted(len(turns), 'turn')}"
        )
        shown.append(_box(title, "\n".join(lines)))
    return shown


def _box(title: str, text: str) -> Panel:
    return Panel(visible(text), title=visible(title), title_align="left")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


def _next(seen: Look) -> str:
    if seen.running:
        return "Ctrl-C ends watching, not the training."
    if seen.finished:
        return f"Next: ictjax evaluate --run-dir {seen.run_dir}"
    return f"To go on: ictjax train --run-dir {seen.run_dir}"


def _left_s(seen: Look) -> float | None:
    if seen.finished:
        return None
    recent = [
        sum(seconds for name, seconds in (record.get("time") or {}).items() if name.endswith("_s"))
        for record in seen.metrics[-_RECENT:]
    ]
    return sum(recent) / len(recent) * (seen.config.iterations - seen.done)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(count: float | None, total: float | None) -> str:
    return f"{100 * (count or 0) / total:.1f} %" if total else "-"
