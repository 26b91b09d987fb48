"""How a training goes, in a terminal of 80 columns, from the files of its run alone: for whoever
watches it, and in fewer rows for its own terminal.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from envs.stopping import check
from experiments.console import Draw, mishaps, phase_seconds, seconds_left
from experiments.evaluation_results import next_command
from experiments.local_path import as_written, command_line, typed
from experiments.run_dir import read_run
from experiments.run_lock import check_free
from experiments.visible import visible
from experiments.wording import counted
from ictjax.json_lines import read_records
from ictjax.metrics import read_metrics
from ictjax.run_config import TrainConfig

_BLOCKS, _PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.,:;+*#"
_WIDEST, _SMALLEST = 40, 12  # columns of a curve
_NAMES, _GAP = 17, 2  # columns of what numbers are called, and behind them
_FEWEST = 2  # rows of a text with its title
_STAYS = "Ctrl-C ends watching, not the training."
_NOTHING_YET = "No iteration has ended yet: programs are compiled and the first games played."
_MAX_TURNS = 6  # of the game that is shown: its last ones
_MAX_CHARS = 240  # of a text in it
_MAX_PROMPT = 800
_SPENT_S, _SPENT_SHARE = 0.5, 0.01  # that a training may spend on looks at its own files
_SPARE = (  # rows of numbers that go first where there is no room
    "before reflection",
    "  fresh games",
    "  replayed games",
    "by family",
    "seconds",
    "left",
)


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


def watch(
    run_dir: pathlib.Path, console: Console, *, every: float, once: bool, named: pathlib.Path
) -> None:
    """Shows a run, on a terminal anew every few seconds until nobody trains it any more.

    Args:
      run_dir: of the run.
      console: where.
      every: seconds between two looks.
      once: one look is enough, as it is where the console is no terminal.
      named: what people call the run, where `run_dir` is a copy of it.

    Raises:
      ValueError: there is no run, or its files are damaged.
    """
    seen = look(run_dir)
    if once or not console.is_terminal or not seen.running:
        console.print(page(seen, console, named))
    else:
        with Live(_fitted(seen, console, named), console=console, auto_refresh=False) as live:
            while seen.running:
                until = time.monotonic() + every
                while time.monotonic() < until:
                    check()
                    time.sleep(min(0.1, every))
                seen = look(run_dir, seen)
                live.update(_fitted(seen, console, named), refresh=True)
    if not seen.running:
        console.print(_next(seen, named), soft_wrap=True)  # in one piece, to be copied


class OwnScreen:
    """What a training shows of itself on its own terminal, an `experiments.console.Screen`: the
    page of `watch`, in the rows that there are. Its looks at the files take a hundredth of the
    time at most: where each takes long, the page stays as it is for a while.

    Args:
      run_dir: of the run, with its config.json.
    """

    def __init__(self, run_dir: pathlib.Path):
        self._run_dir = run_dir
        self._seen: Look | None = None
        self._begun, self._spent_s = time.monotonic(), 0.0

    def __call__(self, number: int, metrics: Mapping[str, Any]) -> Draw:
        now, seen = time.monotonic(), self._seen
        in_time = self._spent_s <= _SPENT_S + _SPENT_SHARE * (now - self._begun)
        if seen is None or in_time or number == seen.config.iterations:
            seen = self._seen = look(self._run_dir, seen, last=number)
            self._spent_s += time.monotonic() - now
        return functools.partial(brief_page, seen, metrics.get("error", ""))


def look(run_dir: pathlib.Path, before: Look | None = None, last: int | None = None) -> Look:
    """Reads the files; of prompts and games again only where an iteration has ended since, and
    nothing of iterations behind the last one, if that is given.
    """
    config = read_run(run_dir) if before is None else before.config
    metrics = read_metrics(run_dir)
    if last is not None:
        metrics = [record for record in metrics if record["iteration"] <= last]
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


def page(seen: Look, console: Console, named: pathlib.Path) -> RenderableType:
    """What is shown of it to whoever watches."""
    parts: list[RenderableType] = [_state(seen, named)]
    if seen.metrics:
        parts += [_table(_numbers(seen, console)), *_texts(seen)]
    else:
        parts.append(_NOTHING_YET)
    if seen.running:
        parts.append(_STAYS)
    return Group(*parts)


def _fitted(seen: Look, console: Console, named: pathlib.Path) -> RenderableType:
    """The page, in fewer rows where it is longer than the terminal."""
    whole = page(seen, console, named)
    if _lines(whole, console) < console.height:
        return whole
    state = _state(seen, named)
    rows = console.height - 2 - _lines(state, console)
    stays = [_STAYS] if seen.running else []
    return Group(state, brief_page(seen, "", console, rows), *stays)


def brief_page(seen: Look, error: str, console: Console, rows: int) -> RenderableType:
    """What is shown of it above the bars of its training.

    Args:
      seen: the run.
      error: of most games that failed in the last iteration, if any did.
      console: where.
      rows: at most so many; the numbers come before prompt and game.
    """
    if not seen.metrics:
        return _NOTHING_YET
    numbers: dict[str, RenderableType] = dict(_numbers(seen, console))
    numbers["by family"] = _clipped(str(numbers["by family"]))
    if error:
        numbers["why games failed"] = _cut(visible(error), 2 * (console.width - _NAMES - _GAP) - 8)
    for name in _SPARE:
        if _lines(_table(numbers), console) > rows:
            numbers.pop(name, None)
    table = _table(numbers)
    return Group(table, *_brief_texts(seen, console, rows - _lines(table, console)))


def _state(seen: Look, named: pathlib.Path) -> str:
    if seen.running:
        how = "training"
    elif seen.finished:
        how = "finished"
    else:
        how = "stopped"
    return f"Iteration {seen.done} of {seen.config.iterations}, {how}: {as_written(named)}"


def _numbers(seen: Look, console: Console) -> dict[str, str]:
    """What is said of all iterations and of the last one, by what it is called."""
    last, groups = seen.metrics[-1], seen.config.meta.contexts_per_iteration
    rows: dict[str, str] = {}
    blocks = _BLOCKS if "utf" in console.encoding.lower() else _PLAIN_BLOCKS
    room = console.width - _NAMES - _GAP
    for name, key in (
        ("reward", "reward"),
        ("  replayed games", "reward_replay"),
        ("  fresh games", "reward_fresh"),
        ("before reflection", "context_success"),
    ):
        values = [record.get(key) for record in seen.metrics]
        if any(value is not None for value in values):
            rows[name] = _history(values, blocks, room)
    families = last.get("reward_family") or {}
    rows["by family"] = (
        ", ".join(f"{family} {_rate(value)}" for family, value in sorted(families.items())) or "-"
    )
    candidates, turns = last.get("candidates"), last.get("turns")
    failures = last.get("reflector_failures") or {}
    rows["last iteration"] = ", ".join(
        [
            f"dead groups {last.get('dead_groups', 0)} of {groups}",
            f"malformed {_share(last.get('malformed_candidates'), candidates)}",
            f"truncated {_share(failures.get('truncated'), candidates)}",
            f"replies of the actor without an action"
            f" {_share(sum((last.get('actor_failures') or {}).values()), turns)}",
            f"KL {_rate(last.get('kl'))}",
            *mishaps(last),
        ]
    )
    phases = phase_seconds(last)
    rows["seconds"] = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases) or "-"
    left = None
    if not seen.finished:
        left = seconds_left(seen.metrics, seen.config.iterations - seen.done)
    if left is not None:
        until = time.strftime("%H:%M", time.localtime(time.time() + left))
        rows["left"] = f"about {_duration(left)}, until {until}"
    return rows


def _table(rows: Mapping[str, RenderableType]) -> Table:
    table = Table.grid(padding=(0, _GAP))
    table.add_column(no_wrap=True, min_width=_NAMES)
    table.add_column(overflow="fold")
    for name, shown in rows.items():
        table.add_row(name, shown)
    return table


def _history(values: Sequence[float | None], blocks: str, room: int) -> str:
    """A curve and its numbers in so many characters; where they are few, without the best value."""
    known = [value for value in values if value is not None]
    first, last, best = known[0], known[-1], max(known)
    where = next(i for i, value in enumerate(values, start=1) if value == best)
    text = _rate(first)
    if len(known) > 1:
        text += f" to {_rate(last)}"
        more = f"{text}, best {_rate(best)} (iteration {where})"
        if room - len(more) - _GAP >= min(_SMALLEST, len(values)):
            text = more
    widest = max(min(_WIDEST, room - len(text) - _GAP), 1)
    return f"{curve(values, blocks, widest)}{' ' * _GAP}{text}"


def curve(values: Sequence[float | None], blocks: str = _BLOCKS, widest: int = _WIDEST) -> str:
    """A curve of one character a value, between the lowest and the highest one; of more than so
    many values, means of neighbours.
    """
    if len(values) > widest:
        bounds = [len(values) * part // widest for part in range(widest + 1)]
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
        text = _cut(seen.prompt["system_prompt"], _MAX_PROMPT)
        shown.append(_box(_prompt_title(seen.prompt), text))
    if seen.episode is not None:
        turns = seen.episode["turns"]
        lines = ["..."] if len(turns) > _MAX_TURNS else []
        for turn in turns[-_MAX_TURNS:]:
            lines.append(_cut(str(turn.get("observation", "")), _MAX_CHARS))
            lines.append(f"  > {_cut(_said(turn), _MAX_CHARS)}")
        if result := _result(seen.episode):
            lines.append(_cut(result, _MAX_CHARS))
        shown.append(_box(_episode_title(seen.episode), "\n".join(lines)))
    return shown


def _brief_texts(seen: Look, console: Console, rows: int) -> list[RenderableType]:
    """The same in so many rows: the beginning of the prompt and the end of the game, each below
    its title.
    """
    shown: list[RenderableType] = []
    written, played = [], []
    if seen.prompt is not None and rows >= _FEWEST:
        text = visible(seen.prompt["system_prompt"][: rows * console.width]).strip()
        written = [line.plain for line in Text(text).wrap(console, console.width)]
    if seen.episode is not None and rows >= 2 * _FEWEST:
        for turn in seen.episode["turns"]:
            played += [_first_line(str(turn.get("observation", "")))]
            played += [f"  > {_first_line(_said(turn))}"]
        if result := _result(seen.episode):
            played += [_first_line(result)]
    room = rows - bool(written) - bool(played)
    of_game = min(len(played), max(room // 2, room - len(written)))
    if written:
        first = written[: room - of_game]
        if len(written) > len(first):
            first[-1] = f"{first[-1][: console.width - 4]} ..."
        shown += [_brief_title(_prompt_title(seen.prompt)), *map(_clipped, first)]
    if played:
        shown += [
            _brief_title(_episode_title(seen.episode)),
            *map(_clipped, _last(played, of_game)),
        ]
    return shown


def _prompt_title(prompt: Mapping[str, Any]) -> str:
    return f"Best new prompt: {prompt['family']}, reward {_rate(prompt['reward'])}"


def _episode_title(episode: Mapping[str, Any]) -> str:
    turns = counted(len(episode["turns"]), "turn")
    outcome = str(episode.get("outcome", "?")).replace("_", " ")
    return f"A game under it: {outcome}, {turns}"


def _result(episode: Mapping[str, Any]) -> str:
    """What was seen behind the last action."""
    return str(episode.get("final_observation", "")).strip()


def _last(lines: Sequence[str], rows: int) -> list[str]:
    """The last lines; where some are left out, the first row says so."""
    if len(lines) > rows > 1:
        return ["...", *lines[len(lines) - rows + 1 :]]
    return list(lines[max(len(lines) - rows, 0) :])


def _said(turn: Mapping[str, Any]) -> str:
    return str(turn.get("action") or turn.get("reply", ""))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _clipped(line: str, style: str = "") -> Text:
    return Text(visible(line), style, no_wrap=True, overflow="ellipsis")


def _brief_title(title: str) -> Text:
    return _clipped(title, "bold")


def _lines(shown: RenderableType, console: Console) -> int:
    return len(console.render_lines(shown, pad=False))


def _box(title: str, text: str) -> Panel:
    return Panel(Text(visible(text)), title=Text(visible(title)), title_align="left")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


def _next(seen: Look, named: pathlib.Path) -> str:
    run_dir = typed(named)
    if seen.finished:
        word = next_command(seen.run_dir, seen.config.iterations)
        return f"Next: {command_line(f'{word} --run-dir {run_dir}')}"
    if named != seen.run_dir:  # its config.json is no file of this machine
        command = command_line(f"train --run-dir {run_dir}")
        return f"To go on: {command}, with its other flags as they were"
    config = typed(named / "config.json")
    return f"To go on: {command_line(f'train --config {config} --run-dir {run_dir}')}"


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
