"""Where the time of a rollout goes: the devices, the host, the workers; with the next dispatch
launched before the last is read, and one at a time.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from envs.api import GameId, PoolEvent, PoolStats
from envs.pool import WorkerPool
from experiments.bench_models import SHAPES
from experiments.bench_run import Design, Note, Result, interleave, ratio
from experiments.commands.bench import RolloutBench
from experiments.memory import check_fits, sampler_uses
from experiments.presets import in_folders, preset
from experiments.run_dir import open_environment, open_pool
from ictjax import keys
from ictjax.chat import ChatTokenizer
from ictjax.config import SamplerConfig
from ictjax.model_speaker import ModelSpeaker
from ictjax.models.hf import load_checkpoint
from ictjax.models.transformer import init_params
from ictjax.rollout import Episode, rollout
from ictjax.run_config import TrainConfig
from ictjax.sampler import Request, Sampler, sampling_weights
from ictjax.sampler.programs import Pending

_SWITCH_S = 2e-4  # how long a thread may keep the watching one from its clock
_PROMPT, _NEW_TOKENS, _VOCABULARY = 64, 64, 4096  # of the decode

Span = tuple[float, float]


class DeviceWatch:
    """Notes when dispatches ran: from the call that launches one until its result is there, as a
    thread sees it that does nothing but wait for it. A context manager.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.rows: list[int] = []  # of every dispatch
        self._launched: queue.SimpleQueue[tuple[float, Pending] | threading.Event | None]
        self._launched = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._launched.put(None)
        self._thread.join()

    def launched(self, start: float, num_rows: int, result: Pending) -> None:
        """Hears of a dispatch, for `Sampler(watch=...)`."""
        self.rows.append(num_rows)
        self._launched.put((start, result))

    def settle(self) -> None:
        """Waits until everything that was launched has run."""
        seen = threading.Event()
        self._launched.put(seen)
        seen.wait()

    def clear(self) -> None:
        """Forgets what was."""
        self.spans.clear()
        self.rows.clear()

    def _run(self) -> None:
        while (launched := self._launched.get()) is not None:
            if isinstance(launched, threading.Event):
                launched.set()
            else:
                start, result = launched
                result.block_until_ready()
                self.spans.append((start, time.perf_counter()))


class TimedPool:
    """A worker pool that notes when it was waited for."""

    def __init__(self, pool: WorkerPool):
        self._pool = pool
        self.spans: list[Span] = []

    def reset(self, game: GameId, *, max_steps: int) -> int:
        return self._pool.reset(game, max_steps=max_steps)

    def step(self, ticket: int, action: str) -> None:
        self._pool.step(ticket, action)

    def release(self, ticket: int) -> None:
        self._pool.release(ticket)

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        start = time.perf_counter()
        events = self._pool.poll(timeout_s)
        self.spans.append((start, time.perf_counter()))
        return events

    def close(self) -> None:
        self._pool.close()

    @property
    def stats(self) -> PoolStats:
        return self._pool.stats

    def cpu_s(self) -> float:
        """Processor seconds of the workers that run now."""
        ticks = 0
        for pid in self._pool.worker_pids:
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


class Account(NamedTuple):
    """Where the seconds of one run went."""

    seconds: float
    busy: float  # share in which a dispatch ran
    idle_host: float  # share in which none did, and the host was at work
    idle_workers: float  # share in which none did, and the host waited for games
    host_cpu_s: float  # processor time of the thread that plays
    device_cpu_s: float  # of the other threads of this process: on a CPU, the dispatches
    worker_cpu_s: float
    cores: float  # all that over the seconds
    rows: float  # conversations of a dispatch
    dispatches: int


def covered(spans: Sequence[Span], start: float, end: float) -> float:
    """Seconds of start..end that lie in at least one span."""
    total, reached = 0.0, start
    for first, last in sorted(spans):
        total += max(0.0, min(last, end) - max(first, reached))
        reached = max(reached, min(last, end))
    return total


@contextlib.contextmanager
def _switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _accounted(
    run: Callable[[], Any], watch: DeviceWatch, pool: TimedPool | None, accounts: list[Account]
) -> tuple[float, Any]:
    """Runs once, and writes the account."""
    waits: list[Span] = [] if pool is None else pool.spans

    def processors() -> np.ndarray:
        host, whole = time.thread_time(), time.process_time()
        return np.array([host, whole - host, 0.0 if pool is None else pool.cpu_s()])

    watch.clear()
    waits.clear()
    used = processors()
    with _switching():
        start = time.perf_counter()
        result = run()
        end = time.perf_counter()
    seconds = end - start
    used = processors() - used
    watch.settle()
    busy = covered(watch.spans, start, end)
    occupied = covered([*watch.spans, *waits], start, end)
    accounts.append(
        Account(
            seconds=seconds,
            busy=busy / seconds,
            idle_host=1 - occupied / seconds,
            idle_workers=(occupied - busy) / seconds,
            host_cpu_s=float(used[0]),
            device_cpu_s=float(used[1]),
            worker_cpu_s=float(used[2]),
            cores=float(used.sum()) / seconds,
            rows=statistics.mean(watch.rows),
            dispatches=len(watch.rows),
        )
    )
    return seconds, result


def _play(
    speaker: ModelSpeaker, pool: TimedPool, episodes: Sequence[Episode], config: TrainConfig
) -> list[list[str]]:
    """The replies of every game."""
    played = rollout(speaker, pool, episodes, config.task.rollout)
    return [[turn.reply for turn in trajectory.turns] for trajectory in played]


def _decode(sampler: Sampler, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """One greedy reply to every prompt."""
    request = Request(
        max_new_tokens=_NEW_TOKENS,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        stop_ids=(),
        key=keys.as_array(keys.root_key(0)),
    )
    opened = [sampler.open(prompt) for prompt in prompts]
    for conversation in opened:
        sampler.generate(conversation, request)
    replies = {generation.conversation: generation.ids for generation in sampler.run()}
    for conversation in opened:
        sampler.close(conversation)
    return [replies[conversation] for conversation in opened]


_OVERLAP = {"one at a time": 1, "launched ahead": 2}  # dispatches in flight


def bench_rollout(bench: RolloutBench, note: Note) -> Result:
    """Games of a preset's actor, and the decode of a larger model."""
    config = in_folders(preset(bench.preset))
    model, params = load_checkpoint(config.actor.model)
    weights = sampling_weights(model, params)
    chat = ChatTokenizer(config.actor.model, thinking=config.actor.thinking)
    environment = open_environment(config.task.environment.name, config.task.environment.options)
    games = [
        game
        for family in config.task.environment.train_families
        for game in environment.games(family, "train")[: bench.games]
    ]
    episodes = [Episode(game=game, system_prompt=config.task.initial_prompt) for game in games]
    sizes = dataclasses.replace(
        config.actor_sampler,
        max_stop_ids=max(config.actor_sampler.max_stop_ids, len(chat.stop_ids)),
    )
    designs: dict[str, Design] = {}
    accounts: dict[str, list[Account]] = {}
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(DeviceWatch())
        pool = TimedPool(stack.enter_context(open_pool(config.task.environment)))

        def add(name: str, run: Callable[[], Any], waited: TimedPool | None) -> None:
            accounts[name] = []
            designs[name] = functools.partial(_accounted, run, watch, waited, accounts[name])

        for name, in_flight in _OVERLAP.items():
            sampler = Sampler(
                model,
                weights,
                dataclasses.replace(sizes, max_in_flight=in_flight),
                chat.pad_id,
                unused=chat.unused(model.vocab_size),
                watch=watch.launched,
            )
            speaker = stack.enter_context(
                ModelSpeaker(sampler, chat, share_min_tokens=config.task.rollout.share_min_tokens)
            )
            add(
                f"games, {name}",
                functools.partial(_play, speaker, pool, episodes, config),
                pool,
            )
        if bench.decode_rows:
            _add_decode(bench, stack, watch, add)
        seconds, results = interleave(designs, bench.repetitions, note)
    rows = []
    for name in designs:
        kind = name.partition(",")[0]
        peer = f"{kind}, one at a time"
        # the first run is not timed
        of_runs = [list(account) for account in accounts[name][1:]]
        medians = Account(*(statistics.median(values) for values in zip(*of_runs, strict=True)))
        rows.append(
            {
                "design": name,
                **medians._asdict(),
                "same_replies": results[name] == results[peer],
                "speedup": ratio(seconds, name, peer),
            }
        )
    return Result(
        f"Rollout, {bench.preset}: {len(games)} games",
        "the same, one at a time",
        rows,
        _NOTES,
    )


_NOTES = [
    "busy: share of the seconds in which at least one dispatch was under way, from the call that"
    " launched it until a thread that waits for nothing else saw its result. idle host, idle"
    " workers: none was, and the host worked, or waited for games. cpu: processor seconds of the"
    " host's thread (scheduling, text, tokens, games' messages), of the other threads of this"
    " process (on a CPU, the dispatches), and of the workers; cores: all of them over the seconds.",
    f"decode: random weights of 8 layers x 512, vocabulary {_VOCABULARY}, prompts of {_PROMPT}"
    f" tokens, {_NEW_TOKENS} new ones in dispatches of 16.",
]


def _add_decode(
    bench: RolloutBench,
    stack: contextlib.ExitStack,
    watch: DeviceWatch,
    add: Callable[[str, Callable[[], Any], TimedPool | None], None],
) -> None:
    """The designs of a decode without games."""
    model = dataclasses.replace(SHAPES["medium"], vocab_size=_VOCABULARY)
    sizes = SamplerConfig(
        num_slots=bench.decode_rows,
        max_len=_PROMPT + _NEW_TOKENS,
        extend_buckets=(_PROMPT,),
        row_buckets=(bench.decode_rows,),
        decode_steps=16,
        max_top_k=1,
    )
    check_fits(
        "Weights and caches of the decode",
        [*sampler_uses("sampler", model, sizes)] * len(_OVERLAP),
        "Give fewer --decode-rows.",
    )
    weights = sampling_weights(model, init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, _VOCABULARY, (bench.decode_rows, _PROMPT)).tolist()
    for name, in_flight in _OVERLAP.items():
        sampler = stack.enter_context(
            Sampler(
                model,
                weights,
                dataclasses.replace(sizes, max_in_flight=in_flight),
                0,
                watch=watch.launched,
            )
        )
        add(f"decode, {name}", functools.partial(_decode, sampler, prompts), None)
