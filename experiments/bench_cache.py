"""What conversations of recorded lengths hold of a cache, in slots and in pages: the books of the
sampler alone, without a model or a device.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.assumptions import Assumptions
from experiments.bench_run import Note, Result
from experiments.commands.bench import CacheBench
from experiments.presets import preset
from experiments.shapes import model_shape
from ictjax.config import SamplerConfig
from ictjax.models.config import ModelConfig
from ictjax.run_config import TrainConfig
from ictjax.sampler.page_store import PageStore
from ictjax.sampler.row_store import RowStore

# 320 games of the demo's tenth iteration, as `recorded` reads them.
_SHIPPED = pathlib.Path(__file__).parent / "pocket" / "turns.json"
_MOST_PER_SLOT = 32  # conversations in pages in the memory of a slot

Words = tuple[tuple[int, int], ...]  # of the observation and the reply of every turn of a game


class Game(NamedTuple):
    """A conversation as tokens; those of a turn are there up to its reply, which is sampled."""

    tokens: np.ndarray
    turns: tuple[tuple[int, int], ...]  # positions where observation and reply end


def recorded(folder: pathlib.Path) -> list[Words]:
    """The games of a run directory. Raises ValueError where it holds none."""
    found = [
        tuple(
            (len(turn["observation"].split()), len(turn["reply"].split()))
            for turn in episode["turns"]
        )
        for path in sorted((folder / "episodes").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if (episode := json.loads(line))["turns"]
    ]
    if not found:
        raise ValueError(f"--run {folder} holds no episodes: name the directory of a run.")
    return found


def shipped() -> list[Words]:
    """Those that come with the repository."""
    return [
        tuple(zip(words[::2], words[1::2], strict=True))
        for words in json.loads(_SHIPPED.read_text(encoding="ascii"))
    ]


def scaled(games: Sequence[Words], config: TrainConfig, assumed: Assumptions) -> Iterator[Game]:
    """The games as long as those of another model: the longest has as many turns as the
    configuration allows, the mean observation and reply the assumed tokens. As many as a context
    has share a candidate's system prompt, and all of them half of it.
    """
    rng = np.random.default_rng(0)
    factor = config.task.rollout.max_steps / max(map(len, games))
    means = np.mean([turn for game in games for turn in game], axis=0)
    scale = np.array([assumed.observation_tokens, assumed.reply_tokens]) / means
    header, own = np.zeros(assumed.prompt_tokens // 2, np.int32), np.zeros(0, np.int32)
    for number, game in enumerate(games):
        if number % config.meta.games_per_context == 0:
            own = rng.integers(0, 2**15, assumed.prompt_tokens - len(header), np.int32)
        count = max(round(len(game) * factor), 1)
        words = np.array([game[min(int(turn / factor), len(game) - 1)] for turn in range(count)])
        ends = assumed.prompt_tokens + np.maximum(words * scale, 1).astype(int).cumsum()
        turns = ends[: (ends <= config.actor_sampler.max_len).sum() // 2 * 2].reshape(-1, 2)
        if not len(turns):
            raise ValueError(
                f"The first turn of a game ends at {ends[1]} tokens, and a conversation has"
                f" {config.actor_sampler.max_len}: take another --preset."
            )
        new = rng.integers(0, 2**15, turns[-1, -1] - assumed.prompt_tokens, np.int32)
        yield Game(np.concatenate([header, own, new]), tuple((int(a), int(b)) for a, b in turns))


class _Books:
    """Rows of a cache that is nowhere."""

    num_shards = 1

    def __init__(self, sizes: SamplerConfig, model: ModelConfig) -> None:
        self.slots_per_shard = sizes.num_slots
        self.rows_per_shard, positions = sizes.cache_rows()
        self.row_bytes = positions * token_bytes(model)

    def copy_row(self, source: int, target: int) -> None: ...
    def take_row(self, row: int) -> None: ...
    def put_row(self, row: int, content: Any) -> None: ...


def token_bytes(model: ModelConfig) -> int:
    """Keys and values of one token in all layers."""
    width = jnp.dtype(model.dtype).itemsize
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * width


@dataclasses.dataclass(eq=False, slots=True)
class _Playing:
    game: Game
    turn: int = 0
    waits: bool = False  # for the environment, which answers before the next dispatch but one


class Usage(NamedTuple):
    """Of a cache while games wait for their turn."""

    in_flight: float  # conversations whose tokens are in the cache
    held_bytes: float
    overhead: float  # held_bytes over those of the tokens; what several share counts once
    computed: int  # tokens
    counts: collections.Counter[str]


def replay(games: Sequence[Game], sizes: SamplerConfig, model: ModelConfig) -> Usage:
    """Plays all games with as many in flight as the cache has room for; every round is a dispatch
    of all that have something to compute.
    """
    books = _Books(sizes, model)
    store = (
        PageStore(books, sizes.page_size)
        if sizes.page_size
        else RowStore(books, sizes.num_slots, sizes.max_len)
    )
    waiting = collections.deque(games)
    free, playing = list(range(sizes.num_slots)), dict[int, _Playing]()
    seen: list[tuple[int, int, int]] = []
    computed = 0
    while waiting or playing:
        while waiting and free:
            game = waiting.popleft()
            slot = store.place(free, game.tokens, game.turns[0][0])
            free.remove(slot)
            playing[slot] = _Playing(game)
        working = {
            slot: max(one.game.turns[one.turn][0], store.cached(slot) + 1)
            for slot, one in playing.items()
            if not one.waits
        }
        ends = {
            slot: _end(playing[slot].game.turns[playing[slot].turn], store.cached(slot), sizes)
            for slot in store.admit(working)
        }
        for slot in store.reserve(ends, working):
            computed += ends[slot] - store.cached(slot)
            store.write(slot, ends[slot])
        if waiting:
            tokens, held = store.held
            there = sum(not sizes.page_size or bool(store.pages(slot)) for slot in playing)
            seen.append((there, held, tokens))
        for slot, one in list(playing.items()):
            if one.waits:
                one.waits = False
            elif store.cached(slot) >= one.game.turns[one.turn][1] - 1:
                one.turn, one.waits = one.turn + 1, True
                if one.turn == len(one.game.turns):
                    store.release(slot)
                    del playing[slot]
                    free.append(slot)
    # The first half fills an empty cache.
    in_flight, held, tokens = np.mean(seen[len(seen) // 2 :], axis=0)
    return Usage(in_flight, held, held / (tokens * token_bytes(model)), computed, store.counts)


def _end(turn: tuple[int, int], cached: int, sizes: SamplerConfig) -> int:
    """Tokens in the cache after one more dispatch. The last one of a reply is computed with what
    follows it.
    """
    observed, replied = turn
    if cached < observed:
        return min(cached + sizes.extend_buckets[-1], observed)
    return min(cached + sizes.decode_steps, max(replied - 1, cached))


def bench_cache(bench: CacheBench, note: Note) -> Result:
    """Conversations in flight, and what they hold, in the memory of today's slots."""
    config = preset(bench.preset)
    model, sizes = model_shape(config.actor), config.actor_sampler
    slots = bench.slots or sizes.num_slots
    words = shipped() if bench.run is None else recorded(bench.run)
    if len(words) * bench.rounds <= (most := _MOST_PER_SLOT * slots):
        raise ValueError(
            f"{len(words) * bench.rounds} games do not fill the memory of {slots} slots: give"
            f" --rounds {most // len(words) + 1} or more, or fewer --slots."
        )
    games = list(scaled(words * bench.rounds, config, Assumptions()))
    rows = dataclasses.replace(sizes.with_slots(slots), page_size=0, num_pages=0)
    pages = dataclasses.replace(
        sizes,
        num_slots=most,
        page_size=bench.page_size,
        num_pages=-(-slots * sizes.max_len // bench.page_size),
    )
    found = {}
    for name, used in (("slots", rows), ("pages", pages)):
        note(name)
        found[name] = replay(games, used, model)
    lengths = np.array([len(game.tokens) for game in games])
    table = [
        {
            "design": name,
            "in_flight": usage.in_flight,
            "times_slots": usage.in_flight / found["slots"].in_flight,
            "gib_held": usage.held_bytes / 2**30,
            "bytes_over_tokens": usage.overhead,
            "computed_tokens": usage.computed,
            "evicted": usage.counts["evictions"],
            "suspended": usage.counts["suspensions"],
        }
        for name, usage in found.items()
    ]
    title = (
        f"Cache, {bench.preset}: {slots} slots x {sizes.max_len} tokens, or as many in pages of"
        f" {bench.page_size}; {len(games)} games"
    )
    notes = [
        f"Games hold {lengths.mean():,.0f} tokens at their end, the longest {lengths.max():,}:"
        " recorded numbers of turns and words, scaled. Means while games wait, after the cache"
        " filled. bytes over tokens: of slots or pages in use over those of the tokens in them,"
        " shared ones counted once.",
    ]
    return Result(title, None, table, notes)
