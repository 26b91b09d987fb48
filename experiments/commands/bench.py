"""`ictjax bench WORD`."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Literal

import tyro

from experiments.command import HELP, Flags, parse_subcommand, run_main
from experiments.console import Terminal
from experiments.run_dir import check_families, open_environment
from ictjax.ranges import Range

_DESCRIPTION = (
    "Measures the sampler, the update and the environments on this machine, each against a peer in"
    " the same run; where a rollout's time goes, what conversations hold of a cache, what an update"
    " multiplies, what guessed tokens and 8 bits bring, or how often an evaluation claims too much."
    " Without a word: the first three."
)
_PLAIN_WIDTH = 140  # of tables that go to a file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common(Flags):
    """What every benchmark takes."""

    repetitions: Annotated[int, Range(1, 100_000)] = 5
    """Timed rounds; results are medians over them."""
    json: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = (
        None
    )
    """Also write the results, with machine and versions, to this file."""


_Shape = Literal["pocket", "4x256", "8x512", "medium", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"]
SamplerTask = Literal["generate", "episode", "group"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerBench(Common):
    """Prefill, decode, episodes of many turns, and groups that share a prompt: beside the same
    engine with nothing kept, beside peers, and as shares of what this machine can do.
    """

    against: Annotated[
        tuple[Literal["transformers", "tunix"], ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(help_behavior_hint="(none; give it once for each)"),
    ] = ()
    """A library with the same weights, on the same tokens."""
    mixed: bool = False
    """Also this engine with products of operands in bfloat16 (dtype mixed)."""
    xla: bool = False
    """Also this engine without its kernels for CPUs, as with ICTJAX_CPU_KERNELS=off."""
    shape: tuple[_Shape, ...] = ("pocket",)
    """Of the models (4x256: layers x width); weights are random."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights, activations and cache, the peers' too."""
    rows: Annotated[tuple[int, ...], Range(1, 65_536)] = (8,)
    """Conversations at the same time."""
    tasks: tuple[SamplerTask, ...] = ("generate", "episode", "group")
    """What is measured."""
    prompt: Annotated[int, Range(1, 16_777_216)] = 256
    """Tokens of each prompt."""
    reply: Annotated[int, Range(2, 16_777_216)] = 64
    """Tokens generated after it by generate."""
    turns: Annotated[int, Range(1, 10_000)] = 8
    """Turns of an episode."""
    observed: Annotated[int, Range(1, 16_777_216)] = 32
    """Tokens of each observation. One length for all is the peers' best case: nothing to pad."""
    said: Annotated[int, Range(1, 16_777_216)] = 16
    """Tokens generated in each turn."""
    decode_steps: Annotated[int, Range(1, 65_536)] = 16
    """Tokens sampled per dispatch of the sampler."""
    page_size: Annotated[int, Range(1, 16_777_216, also=0)] = 0
    """Positions of a page of the sampler's cache; 0: slots."""
    piece: Annotated[int, Range(2, 16_777_216, also=0)] = 0
    """Tokens of a row that one dispatch of the sampler appends at most; 0: all of a prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixed and self.dtype != "float32":
            raise ValueError(
                f"--mixed is beside float32, and --dtype is {self.dtype}: leave one of them out."
            )
        for name in ("shape", "rows", "tasks"):
            if not getattr(self, name):
                raise ValueError(f"--{name} holds nothing: give one or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateBench(Common):
    """One GRPO update of groups of replies that share a prompt: one copy of the prompt, a copy for
    every reply, and the latter in the way of a peer.
    """

    # The peer: our model with the logits of all positions at once, which need much memory at long
    # prompts; TRL's loss function on the same weights in PyTorch, both beside this machine's matrix
    # products; or none.
    against: Literal["all-positions", "trl", "nothing"] = "all-positions"
    shape: _Shape | None = None
    """Of the model; weights are random. Unless given, pocket; against TRL medium."""
    vocab_size: Annotated[
        int | None, Range(1, 16_777_216), tyro.conf.arg(metavar="INT", help_behavior_hint="")
    ] = None
    """Instead of the shape's own (512 for pocket, where the head hardly matters; try 16384)."""
    groups: Annotated[int, Range(1, 65_536)] = 1
    """Prompts in the batch."""
    group_size: Annotated[int, Range(1, 65_536)] = 8
    """Replies to each prompt."""
    prompt: Annotated[
        int | None, Range(1, 16_777_216), tyro.conf.arg(metavar="INT", help_behavior_hint="")
    ] = None
    """Tokens of each prompt. Unless given, 320; against TRL 896."""
    reply: Annotated[
        int | None, Range(1, 16_777_216), tyro.conf.arg(metavar="INT", help_behavior_hint="")
    ] = None
    """Tokens of each reply. Unless given, 64; against TRL 128."""
    microbatches: Annotated[int, Range(1, 65_536)] = 1
    """Parts of the batch whose gradients are accumulated; all positions take the batch whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvsBench(Common):
    """Games in this process and in pools of workers, beside stock TextWorld, and beside a fresh
    MiniHack environment for every episode.
    """

    repetitions: Annotated[int, Range(1, 100_000)] = 3
    """Timed rounds; results are medians over them."""
    alfworld: tuple[str, ...] = ("clean", "cool", "heat", "look", "pick_two", "put")
    """ALFWorld families (none: leave ALFWorld out)."""
    minihack: tuple[str, ...] = ("eat", "keyroom", "mazewalk", "room_monster")
    """MiniHack families (none: leave MiniHack out)."""
    data: str = "auto"
    """Of ALFWorld: official games where a download is found, else generated ones; or a path."""
    workers: Annotated[tuple[int, ...], Range(1, 1024)] = (1, 2)
    """Sizes of the pools."""
    episodes: Annotated[int, Range(1, 1_000_000)] = 64
    """Games per family; a pool plays them at the same time."""
    steps: Annotated[int, Range(1, 1_000_000)] = 20
    """Random actions per game, unless it ends earlier."""
    stock: bool = True
    """Also measure the original engines."""
    stock_games: Annotated[int, Range(1, 1_000_000)] = 1
    """Of each ALFWorld family that stock TextWorld plays: a reset takes it seconds."""
    stock_steps: Annotated[int, Range(1, 1_000_000)] = 8
    """Actions of each of these."""
    published_games: Annotated[int, Range(1, 1_000_000)] = 16
    """Of each MiniHack family that the published way plays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, families in (("alfworld", self.alfworld), ("minihack", self.minihack)):
            if families:
                check_families(open_environment(name, {}), families)
        if not self.workers:
            raise ValueError("--workers holds no number: give one or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheBench(Flags):
    """What games of recorded lengths hold of the actor's cache, in slots and in pages of the same
    memory: the books of the sampler alone, in seconds on any machine.
    """

    preset: str = "qwen2.5-7b-minihack"
    """Whose actor and whose limits."""
    page_size: Annotated[int, Range(1, 16_777_216)] = 128
    """Positions of a page."""
    slots: Annotated[int, Range(1, 65_536, also=0)] = 0
    """The memory is that of so many slots of full length; 0: as many as the preset has."""
    rounds: Annotated[int, Range(1, 10_000)] = 4
    """How often the recorded games are played, one round after the other."""
    # Take the episodes of this run instead of 320 of the demo's. Their turns and words are scaled
    # to the preset's limits and to the lengths that a plan assumes.
    run: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    json: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = (
        None
    )
    """Also write the results, with machine and versions, to this file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalseAlarmsBench(Flags):
    """How often an evaluation says "better" or "worse" of a reflector that is neither, by
    evaluations of outcomes drawn at random: no machine is measured, only the statistics.
    """

    evaluations: Annotated[int, Range(1, 1_000_000)] = 500
    """Of every number of trained seeds."""
    seeds: Annotated[tuple[int, ...], Range(1, 1000)] = (1, 4, 6, 8)
    """Trained seeds of an evaluation."""
    runs: Annotated[int, Range(1, 10_000)] = 12
    """Loops of reflection of every reflector on every family."""
    games: Annotated[int, Range(1, 1_000_000)] = 10
    """TEST games of a loop."""
    families: Annotated[int, Range(1, 1000)] = 2
    """Held-out families."""
    rate: Annotated[float, Range(0, 1)] = 0.4
    """Of games won by the untrained reflector."""
    effect: Annotated[float, Range(-1, 1)] = 0.0
    """What training adds to it: with another one than 0 the table shows the power."""
    seed_sd: Annotated[float, Range(0, 1)] = 0.08
    """Standard deviation of what training gave to this seed or that."""
    loop_sd: Annotated[float, Range(0, 1)] = 0.12
    """Of the prompts that one reflector writes."""
    game_sd: Annotated[float, Range(0, 1)] = 0.2
    """Of how hard games are."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Of the outcomes."""
    json: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = (
        None
    )
    """Also write the results, with machine and versions, to this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds:
            raise ValueError("--seeds holds no number: give one or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductsBench(Flags):
    """Matrix products of an update beside those that it needs, by its traced program: nothing is
    compiled and nothing runs, in a minute for a model of any size.
    """

    preset: tuple[str, ...] = ("qwen2.5-7b-lora", "qwen2.5-7b-minihack")
    """Whose reflectors are trained."""
    tokens: Annotated[tuple[int, ...], Range(2, 16_777_216)] = (16_384, 32_768)
    """Of a row, a prompt and its replies."""
    rows: Annotated[int, Range(1, 65_536)] = 2
    """Rows of the batch."""
    replies: Annotated[int, Range(1, 65_536)] = 8
    """Replies in a row."""
    reply: Annotated[int, Range(1, 16_777_216)] = 256
    """Tokens of each."""
    json: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = (
        None
    )
    """Also write the results, with machine and versions, to this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("preset", "tokens"):
            if not getattr(self, name):
                raise ValueError(f"--{name} holds nothing: give one or more.")
        if short := [tokens for tokens in self.tokens if tokens <= self.replies * self.reply]:
            raise ValueError(
                f"--tokens {short[0]} has no room for a prompt beside {self.replies} replies of"
                f" {self.reply}: give more than {self.replies * self.reply}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorBench(Common):
    """What benchmarks on recorded games take."""

    run: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR", help_behavior_hint="")]
    """Whose games are said to its actor again, with its sizes."""
    games: Annotated[int, Range(1, 1_000_000)] = 128
    """So many different ones, from the start."""
    rows: Annotated[int, Range(1, 65_536, also=0)] = 0
    """Games at once; 0: as many as the run had slots for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationBench(ActorBench):
    """The greedy actor of a run on its games: with tokens of its replies guessed from what was said
    before, and without.
    """

    guessed: Annotated[tuple[int, ...], Range(1, 64)] = (2, 4)
    """Tokens that a step guesses at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Bench(ActorBench):
    """The greedy actor of a run on its games, which it also plays: with weights, cache or both in 8
    bits, and in its own type.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutBench(Common):
    """Where the seconds of a rollout go: devices, host, workers. The next dispatch is launched
    before the last is read, or each is read first; the same replies either way.
    """

    repetitions: Annotated[int, Range(1, 100_000)] = 3
    """Timed rounds; results are medians over them."""
    preset: str = "pocket-minihack"
    """Whose actor plays, and what."""
    games: Annotated[int, Range(1, 1_000_000)] = 20
    """Of each family that the preset trains on."""
    decode_rows: Annotated[int, Range(1, 65_536, also=0)] = 32
    """Conversations of a decode by 8 layers x 512, without games; 0: leave it out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllBenches(Common):
    """The first three at their default sizes."""


_BENCHES: Mapping[str, type[Common]] = MappingProxyType(
    {"sampler": SamplerBench, "update": UpdateBench, "envs": EnvsBench}
)
_WORDS: Mapping[str, type[Common | CacheBench | FalseAlarmsBench | ProductsBench]] = (
    MappingProxyType(
        {
            **_BENCHES,
            "rollout": RolloutBench,
            "cache": CacheBench,
            "products": ProductsBench,
            "speculation": SpeculationBench,
            "int8": Int8Bench,
            "false-alarms": FalseAlarmsBench,
            "all": AllBenches,
        }
    )
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "nothing was written; start it again to measure.")


def _main(argv: list[str]) -> None:
    if not argv or (argv[0].startswith("-") and argv[0] not in HELP):
        argv = ["all", *argv]
    args = parse_subcommand(_WORDS, "bench", _DESCRIPTION, argv)
    _check_target(args.json)
    if isinstance(args, AllBenches):
        chosen = {name: kind(repetitions=args.repetitions) for name, kind in _BENCHES.items()}
    else:
        chosen = {argv[0]: args}
    console = Terminal(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    # what is measured is JAX; flags are right when it is loaded
    from experiments import bench

    bench.run(chosen, args.json, argv, console)


def _check_target(path: pathlib.Path | None) -> None:
    """Raises ValueError, before anything is measured, for a file that could not be written."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--json {path} is a folder: name a file.")
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"The folder of --json {path} does not exist: make it, or name a file elsewhere."
        )
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(
            f"The folder of --json {path} cannot be written to: name a file elsewhere."
        )
