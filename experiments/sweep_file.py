"""The file of a sweep: which settings of training are compared, each a few flags of it."""

import dataclasses
import pathlib
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.commands import evaluate, train
from ictjax.run_config import SEED, TrainConfig, differences, to_dict

_NAME = re.compile(r"[\w][\w.=,+~-]{0,99}")  # of a folder
_RESULTS = ("sweep.json", "sweep.html")  # beside these folders
_KEYS = ("preset", "seeds", "train", "evaluate", "variants")
# what the sweep itself says to each command
_OWN = {
    "train": ("--preset", "--config", "--seed", "--run-dir", "--restart", "--check", "--hosts"),
    "evaluate": ("--run-dir", "--out", "--step", "--eval-env", "--eval-options", "--hosts"),
}
_MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A setting of training: its name, the flags of `ictjax train` that make it, and the run that
    they come to under the preset's seed.
    """

    name: str
    flags: tuple[str, ...]
    config: TrainConfig

    def settings(self, seed: int) -> TrainConfig:
        """The run of a seed."""
        return dataclasses.replace(self.config, seed=seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Variants, the first of which the others are compared with; each is trained with every seed,
    and evaluated with the same flags of `ictjax evaluate`.
    """

    preset: str
    train: tuple[str, ...]  # flags of all variants
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    evaluate: tuple[str, ...]


def run_dir_of(out: pathlib.Path, variant: Variant, seed: int) -> pathlib.Path:
    """Where a run of a sweep is."""
    return out / variant.name / f"seed{seed}"


def read_sweep(path: pathlib.Path) -> Sweep:
    """What a file asks for, with every flag checked.

        preset = "pocket-minihack"
        seeds = [0, 1, 2]
        train = "--iterations 20"                 # flags of all variants; may be left out
        evaluate = "--evaluation.runs 12"         # the same of `ictjax evaluate`

        [variants]
        preset = ""
        no-kl = "--grpo.kl-coefficient 0"

    Raises:
      ValueError: it is no such file, a flag that its command does not take or that the sweep sets
        itself, two variants that are one, or some that are evaluated on different families.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML ({error}): see docs/use.md.") from None
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(
            f"There is no file {str(path)!r}: name one that lists variants, for example"
            " experiments/pocket/ablations.toml."
        ) from None
    if unknown := [name for name in data if name not in _KEYS]:
        raise ValueError(f"{path} has {unknown[0]!r}, which is none of {', '.join(_KEYS)}.")
    preset = data.get("preset")
    if not isinstance(preset, str):
        raise ValueError(f'{path} names no preset: begin it with preset = "pocket-minihack".')
    common = _words(path, "train", data.get("train", ""), "train")
    variants = tuple(
        _variant(path, name, flags, (f"--preset={preset}", *common))
        for name, flags in _variants(path, data.get("variants")).items()
    )
    for number, variant in enumerate(variants):
        for earlier in variants[:number]:
            if not differences(to_dict(earlier.config), to_dict(variant.config)):
                raise ValueError(
                    f"{path}: the variants {earlier.name!r} and {variant.name!r} are the same"
                    " setting: give one of them other flags, or take it out."
                )
    chosen = _words(path, "evaluate", data.get("evaluate", ""), "evaluate")
    _check_evaluation(path, variants, chosen)
    return Sweep(
        preset=preset,
        train=common,
        variants=variants,
        seeds=_seeds(path, data.get("seeds", [0])),
        evaluate=chosen,
    )


def _variants(path: pathlib.Path, found: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(found, Mapping) or len(found) < 2:
        raise ValueError(
            f"{path} lists fewer than two variants: write each as a line NAME = 'FLAGS' below"
            " [variants], the first as the one that others are compared with."
        )
    for name in found:
        if not _NAME.fullmatch(name) or name in _RESULTS:
            raise ValueError(
                f"{path}: {name!r:.120} cannot be the name of a folder of the sweep: use letters,"
                " digits and . - _ =, at most 100."
            )
        alike = [other for other in found if other.casefold() == name.casefold()]
        if alike[0] != name:  # many disks do not tell them apart
            raise ValueError(
                f"{path}: the variants {alike[0]!r} and {name!r} differ in capitals alone: give one"
                " of them another name."
            )
    return {name: _words(path, name, flags, "train") for name, flags in found.items()}


def _check_evaluation(
    path: pathlib.Path, variants: Sequence[Variant], words: Sequence[str]
) -> None:
    """Raises ValueError for flags of `ictjax evaluate` that it would refuse of some variant, and
    for variants that are not evaluated on the same families, trained on or held out.
    """
    played: list[dict[str, bool]] = []
    for variant in variants:
        try:
            played.append(evaluate.check_flags(variant.config, words))
        except ValueError as error:
            raise ValueError(f"{path}, evaluate of {variant.name!r}: {error}") from None
        if played[-1] != played[0]:
            first, other = (
                ", ".join(f"{name}{' (trained on)' * trained}" for name, trained in of.items())
                for of in (played[0], played[-1])
            )
            raise ValueError(
                f"{path}: {variants[0].name!r} is evaluated on {first}, {variant.name!r} on"
                f" {other}: name families that both train on, or both hold out"
                " (--evaluation.families)."
            )


def _words(path: pathlib.Path, name: str, flags: Any, command: str) -> tuple[str, ...]:
    """The words of some flags of a command: of all variants, of one, or of the evaluation."""
    if not isinstance(flags, str):
        raise ValueError(f"{path}: {name!r} must be flags in quotes, got {flags!r}.")
    try:
        words = tuple(shlex.split(flags))
    except ValueError as error:
        raise ValueError(f"{path}: the flags of {name!r} cannot be read ({error}).") from None
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")  # either is taken
        if flag in ("-h", "--help") or any(
            flag == own or flag.startswith(f"{own}.") for own in _OWN[command]
        ):
            raise ValueError(
                f"{path}: {name!r} has {flag}, which the sweep says itself: leave it out (presets,"
                " seeds and folders have their own places)."
            )
    return words


def _variant(
    path: pathlib.Path, name: str, flags: tuple[str, ...], common: tuple[str, ...]
) -> Variant:
    try:
        args, _ = train.read_args((*common, *flags))
        return Variant(name=name, flags=flags, config=train.with_local_models(args.settings))
    except ValueError as error:
        raise ValueError(f"{path}, variant {name!r}: {error}") from None


def _seeds(path: pathlib.Path, found: Any) -> tuple[int, ...]:
    if (
        not isinstance(found, list)
        or not 1 <= len(found) <= _MOST_SEEDS
        or not all(type(seed) is int and seed in SEED for seed in found)
        or len(set(found)) < len(found)
    ):
        raise ValueError(
            f"{path}: seeds must be different whole numbers, got {found!r}: write"
            " seeds = [0, 1, 2]."
        )
    return tuple(found)
