"""Benchmark of the sampler: prefill, decode, episodes and groups, beside the same engine without
what it keeps, beside peers, and as shares of what this machine can do.
"""

import contextlib
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench_models import SHAPES, tokens_use
from experiments.bench_peers import (
    Design,
    Peer,
    Played,
    Spent,
    Workload,
    check_peers,
    choose_threads,
    open_peer,
    play,
)
from experiments.bench_run import Note, Result, interleave
from experiments.commands.bench import SamplerBench, SamplerTask
from experiments.memory import check_fits, sampler_uses
from experiments.roofline import Rates, least_seconds, probes, rates
from ictjax import keys
from ictjax.config import SamplerConfig
from ictjax.models import cpu_kernels
from ictjax.models.config import ModelConfig
from ictjax.models.hf import save_checkpoint
from ictjax.models.transformer import Params, init_params
from ictjax.sampler import Request, Sampler, sampling_weights

OURS, AGAIN, MIXED, XLA = "ictjax", "again", "mixed", "xla"
# the share of all tokens that is equal: its name, and what is to say of it
_SAME = {
    "float32": ("same", ""),
    "bfloat16": (
        "agreement",
        "; rounded to bfloat16 the likeliest ids are often equal, and each design goes on from the"
        " one that it took",
    ),
}


class Cell(NamedTuple):
    """What is measured: one line of the table, two for "generate"."""

    shape: str
    rows: int
    task: SamplerTask


def bench_sampler(bench: SamplerBench, note: Note) -> Result:
    """Seconds of every cell by every design."""
    check_peers(bench.against)
    cells = [
        Cell(shape, rows, task)
        for shape in bench.shape
        for rows in bench.rows
        for task in bench.tasks
    ]
    for cell in cells:
        _check(bench, cell)
    lines, notes, machines = [], [], []
    same, why = _SAME[bench.dtype]
    machine_probes = probes(bench.dtype)
    for shape in bench.shape:
        config = SHAPES[shape].with_dtype(bench.dtype)
        params, peers = init_params(config, jax.random.key(0)), {}
        if bench.against:
            with tempfile.TemporaryDirectory(prefix="ictjax-bench-") as folder:
                save_checkpoint(folder, config, params)
                peers = {
                    name: open_peer(name, pathlib.Path(folder), config) for name in bench.against
                }
        params = _unstacked(params)
        for cell in cells:
            if cell.shape == shape:
                where = f"{shape}, {cell.rows} rows, {cell.task}"
                found, machine, threads = _measure(
                    bench,
                    cell,
                    config,
                    params,
                    peers,
                    machine_probes,
                    lambda text, at=where: note(f"{at}: {text}"),
                )
                lines += found
                machines.append(machine)
                notes += threads
    notes = list(dict.fromkeys(notes))
    notes += [
        f"generate: prompts of {bench.prompt} tokens, none shared, replies of {bench.reply}:"
        " prefill until every row has its first token, decode the others. episode: a shared prompt,"
        f" {bench.turns} turns of {bench.observed} observed and {bench.said} generated tokens."
        " group: the first turn of it.",
        "seconds: medians; over: median of paired runs. again: this engine with nothing kept from"
        " turn to turn and no prompt shared. mixed: this engine with products of operands in"
        " bfloat16. xla: this engine without its kernels for CPUs. first: the first run, with"
        " compilation."
        f" {same}: of all tokens, by the design that differs most (mixed aside){why}.",
        "of roofline: what products or reading would need, whichever is more in each step, at"
        f" {max(m.flops for m in machines) / 1e9:.0f} GFLOP/s and"
        f" {max(m.bandwidth for m in machines) / 1e9:.0f} GB/s at best, as measured beside each"
        " cell. Weights that stay in the processor's own cache read faster.",
    ]
    paged = f", pages of {bench.page_size}" if bench.page_size else ""
    title = (
        f"Sampler, greedy, {bench.dtype}, random weights{paged}, against"
        f" {', '.join(bench.against) or AGAIN}"
    )
    return Result(title, None, lines, notes)


def _unstacked(params: Params) -> Params:
    """One dict per layer, as they sample. One kind of weight is taken after the other and deleted,
    so that there are never two copies of more than one.
    """
    kinds = {}
    for name, leaf in params["layers"].items():
        kinds[name] = jax.block_until_ready(jax.jit(jnp.unstack)(leaf))
        leaf.delete()
    layers = zip(*kinds.values(), strict=True)
    return params | {"layers": tuple(dict(zip(kinds, layer, strict=True)) for layer in layers)}


def _check(bench: SamplerBench, cell: Cell) -> None:
    config = SHAPES[cell.shape].with_dtype(bench.dtype)
    sizes = sizes_of(bench, cell)
    if sizes.max_len > config.max_positions:
        raise ValueError(
            f"A conversation has {sizes.max_len} tokens, the model {config.max_positions}"
            " positions: lower --prompt or --turns."
        )
    check_fits(
        f"Weights, cache and tokens of {cell.shape}",
        [
            *sampler_uses("sampler", config, sizes),
            *(sampler_uses("mixed", config.with_dtype("mixed"), sizes) if bench.mixed else ()),
            tokens_use(cell.rows * sizes.max_len),
        ],
        "Give fewer --rows, a shorter --prompt, or a smaller --shape.",
    )


def workload(bench: SamplerBench, cell: Cell, vocab_size: int) -> tuple[Workload, int]:
    """The same tokens for every design and repetition, and how many of them all rows share."""
    rng = np.random.default_rng(0)

    def draw(*sizes: int) -> list[Any]:
        return rng.integers(0, vocab_size, sizes).tolist()

    if cell.task == "generate":
        return Workload(draw(cell.rows, bench.prompt), [], bench.reply), 0
    shared = draw(bench.prompt)
    turns = bench.turns if cell.task == "episode" else 1
    first, *later = draw(turns, cell.rows, bench.observed)
    return Workload([[*shared, *observed] for observed in first], later, bench.said), len(shared)


def sizes_of(bench: SamplerBench, cell: Cell) -> SamplerConfig:
    """A bucket for every length that a design asks for: nobody pads. Pages for all of it, and one
    more for each conversation, without which a sampler does not begin with the last of them.
    """
    turns = {"generate": 0, "group": 1, "episode": bench.turns}[cell.task]
    turn = bench.observed + bench.said
    lengths = {bench.prompt}
    if turns:
        lengths = {bench.prompt + bench.observed + index * turn for index in range(turns)}
        lengths.add(bench.observed + 1)
    piece = bench.piece or max(lengths)
    buckets = {size for length in lengths for size in (min(length, piece), length % piece) if size}
    max_len, pages = bench.prompt + (turns * turn or bench.reply), 0
    if bench.page_size:
        pages = cell.rows * (-(-max_len // bench.page_size) + 1)
    return SamplerConfig(
        num_slots=cell.rows,
        max_len=max_len,
        extend_buckets=tuple(sorted({max(size, 2) for size in buckets})),
        row_buckets=tuple(sorted({1, cell.rows})),
        decode_steps=bench.decode_steps,
        max_top_k=1,
        page_size=bench.page_size,
        num_pages=pages,
    )


def _measure(
    bench: SamplerBench,
    cell: Cell,
    config: ModelConfig,
    params: Params,
    peers: Mapping[str, Peer],
    machine_probes: Mapping[str, Callable[[], float]],
    note: Note,
) -> tuple[list[dict[str, Any]], Rates, list[str]]:
    """The lines of a cell, the machine's rates meanwhile, and what is to say of threads."""
    work, shared = workload(bench, cell, config.vocab_size)
    threads = []
    if "transformers" in peers:
        note("transformers: threads")
        chosen = choose_threads(peers["transformers"], work)
        threads = [f"transformers, {cell.shape}, {cell.rows} rows: {chosen}."]
    with contextlib.ExitStack() as stack:
        sampler, flush = _open(stack, bench, cell, config, params)
        designs: dict[str, Design] = {
            OURS: lambda: keep_cache(sampler, flush, work, share=bool(shared))
        }
        if shared:
            designs[AGAIN] = lambda: prefill_again(sampler, flush, work)
        if bench.mixed:
            opened = _open(stack, bench, cell, config.with_dtype("mixed"), params)
            designs[MIXED] = lambda: keep_cache(*opened, work, share=bool(shared))
        if bench.xla:
            with cpu_kernels.switched_off():
                plain = _open(stack, bench, cell, config, params)
            designs[XLA] = lambda: keep_cache(*plain, work, share=bool(shared))
        designs |= {name: functools.partial(play, peer, work) for name, peer in peers.items()}
        spent: dict[str, list[Spent]] = {name: [] for name in designs}

        def timed(name: str) -> tuple[float, list[list[int]]]:
            played = designs[name]()
            spent[name].append(played.spent)
            return played.spent.total, played.replies

        seconds, replies = interleave(
            {name: functools.partial(timed, name) for name in designs}
            | {name: functools.partial(_probe, run) for name, run in machine_probes.items()},
            bench.repetitions,
            note,
        )
    machine = rates(min(seconds["products"]), min(seconds["reading"]))
    least_first, least_rest = least_seconds(config, work, shared, machine)
    parts: list[tuple[str, Callable[[Spent], float], int, float]] = [
        (
            cell.task,
            lambda s: s.total,
            cell.rows * work.reply * (1 + len(work.observations)),
            least_first + least_rest,
        )
    ]
    if cell.task == "generate":
        parts = [
            ("prefill", lambda s: s.first, cell.rows * bench.prompt, least_first),
            ("decode", lambda s: s.rest, cell.rows * (bench.reply - 1), least_rest),
        ]
    same = min(
        float((np.asarray(replies[name]) == np.asarray(replies[OURS])).mean())
        for name in designs
        if name != MIXED  # rounds, and says other things
    )
    lines = []
    for name, part, tokens, least in parts:
        by_design = {design: [part(one) for one in spent[design][1:]] for design in designs}
        ours = statistics.median(by_design[OURS])
        lines.append(
            {
                "cell": f"{cell.shape} x {cell.rows} {name}",
                "seconds": ours,
                "tokens_per_s": tokens / ours,
                "of_roofline": least / ours,
                **{
                    f"over_{peer}": (
                        statistics.median(
                            theirs / mine
                            for mine, theirs in zip(by_design[OURS], by_design[peer], strict=True)
                        )
                        if peer in designs
                        else None
                    )
                    for peer in (AGAIN, MIXED, XLA, *bench.against)
                },
                **{f"first_{design}": spent[design][0].total for design in (OURS, *bench.against)},
                _SAME[bench.dtype][0]: same,
            }
        )
    return lines, machine, threads


def _open(
    stack: contextlib.ExitStack,
    bench: SamplerBench,
    cell: Cell,
    config: ModelConfig,
    params: Params,
) -> tuple[Sampler, Callable[[], None]]:
    """A sampler, and what forgets all its cached prefixes, which the next run would find again."""
    held = sampling_weights(config, params)
    sampler = stack.enter_context(Sampler(config, held, sizes_of(bench, cell), pad_id=0))
    return sampler, functools.partial(sampler.set_params, held)


def _probe(run: Callable[[], float]) -> tuple[float, None]:
    return run(), None


def keep_cache(
    sampler: Sampler, flush: Callable[[], None], work: Workload, *, share: bool
) -> Played:
    """Each conversation stays open: only new tokens are computed. With `share` what all begin with
    is computed for the first one only.
    """
    flush()
    start = time.perf_counter()
    conversations = []
    for row, opening in enumerate(work.openings):
        conversations.append(sampler.open(opening))
        if share and not row:
            sampler.run()
    replies: list[list[int]] = [[] for _ in conversations]
    first = _generate(sampler, conversations, work.reply, replies)
    for observations in work.observations:
        for conversation, observed in zip(conversations, observations, strict=True):
            sampler.extend(conversation, observed)
        _generate(sampler, conversations, work.reply, replies)
    for conversation in conversations:
        sampler.close(conversation)
    return Played(Spent(first - start, time.perf_counter() - start), replies)


def prefill_again(sampler: Sampler, flush: Callable[[], None], work: Workload) -> Played:
    """A fresh conversation per turn, and nothing left of the last one: the design of a rollout that
    calls `generate` on the whole text.
    """
    texts = [list(opening) for opening in work.openings]
    replies: list[list[int]] = [[] for _ in texts]
    nothing: list[list[int]] = [[] for _ in texts]
    start = time.perf_counter()
    firsts = []
    for observations in (nothing, *work.observations):
        flush()
        for text, observed in zip(texts, observations, strict=True):
            text += observed
        conversations = [sampler.open(text) for text in texts]
        before = [len(reply) for reply in replies]
        firsts.append(_generate(sampler, conversations, work.reply, replies))
        for conversation, text, reply, known in zip(
            conversations, texts, replies, before, strict=True
        ):
            text += reply[known:]
            sampler.close(conversation)
    return Played(Spent(firsts[0] - start, time.perf_counter() - start), replies)


def _generate(
    sampler: Sampler, conversations: list[int], num_tokens: int, replies: list[list[int]]
) -> float:
    """Adds to the replies; returns when every conversation had its first token."""
    request = Request(
        max_new_tokens=num_tokens,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        stop_ids=(),
        key=keys.as_array(keys.root_key(0)),
    )
    rows = {conversation: row for row, conversation in enumerate(conversations)}
    for conversation in conversations:
        sampler.generate(conversation, request)
    waiting, done = set(conversations), []
    while waiting:
        done += sampler.step()
        waiting -= {generation.conversation for generation in done}
        waiting -= {conversation for conversation in waiting if sampler.sampled(conversation)}
    first = time.perf_counter()
    for generation in (*done, *sampler.run()):
        replies[rows[generation.conversation]] += generation.ids
    return first
