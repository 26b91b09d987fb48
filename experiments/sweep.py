"""What settings of training do: every variant of a sweep is trained with every seed and evaluated,
and compared with the first one on the same TEST games.

Everything is kept in one folder, a folder for each variant with a run for each seed in it, and is
made by `ictjax train` and `ictjax evaluate`, each a process of its own. So a sweep that was stopped
goes on where it was, and a run that cannot be trained costs its variant alone.
"""

import contextlib
import itertools
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from rich.console import Console

from envs.api import CannotGoOn
from envs.files import replacing
from envs.stopping import at_end, check, held, unwinding
from experiments.commands.sweep import main
from experiments.console import LiveProgress
from experiments.resume import newest_checkpoint
from experiments.run_dir import read_config
from experiments.sweep_file import Sweep, Variant, run_dir_of
from experiments.sweep_page import render
from experiments.sweep_results import compared, on_other_games, table, to_json
from experiments.wording import counted
from ictjax.json_lines import to_json_text
from ictjax.run_config import differences, from_dict, to_dict

_POLL_S = 0.5


def run_sweep(sweep: Sweep, out: pathlib.Path, console: Console) -> None:
    """Trains and evaluates whatever is missing, then writes sweep.json and sweep.html and prints
    the table.

    Raises:
      CannotGoOn: at the end, for variants that could not be trained or evaluated, with the last
        line of each log, or played other games; the table is made of the others, if the first is
        among them.
    """
    failed = _train(sweep, out, console)
    failed |= _evaluate(sweep, [v for v in sweep.variants if v.name not in failed], out, console)
    whole = [variant for variant in sweep.variants if variant.name not in failed]
    if sweep.variants[0] in whole:
        others = on_other_games(sweep, whole, out)
        failed |= others
        whole = [variant for variant in whole if variant.name not in others]
        results = compared(sweep, whole, out)
        with replacing(out / "sweep.json") as temporary:
            text = to_json_text(to_json(sweep, results), indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        with replacing(out / "sweep.html") as temporary:
            temporary.write_text(render(sweep, results, out.name), encoding="utf-8")
        console.print(table(sweep, results), "")
        console.print(f"Results: {out / 'sweep.json'}; page: {out / 'sweep.html'}", soft_wrap=True)
    if failed:
        raise CannotGoOn(
            f"{counted(len(failed), 'variant')} of the sweep failed: {'; '.join(failed.values())}."
            " Mend what is wrong, then start the sweep again: what is there stays."
        )


def _train(sweep: Sweep, out: pathlib.Path, console: Console) -> dict[str, str]:
    """Every variant with the first seed, then with the next one; returns what failed, by variant,
    which is then not trained with other seeds.
    """
    jobs = list(itertools.product(sweep.seeds, sweep.variants))
    missing = [(seed, variant) for seed, variant in jobs if not _is_trained(out, variant, seed)]
    failed: dict[str, str] = {}
    done = len(jobs) - len(missing)
    with LiveProgress("training", done=done, total=len(jobs), console=console) as progress:
        for seed, variant in missing:
            if variant.name in failed:
                progress.one_more(f"{variant.name}, seed {seed} is left out")
                continue
            run_dir, what = run_dir_of(out, variant, seed), f"{variant.name}, seed {seed}"

            def follow(
                run_dir: pathlib.Path = run_dir,
                what: str = what,
                total: int = variant.config.iterations,
            ) -> None:
                progress.phase(what, newest_checkpoint(run_dir), total)

            flags = (f"--preset={sweep.preset}", *sweep.train, *variant.flags)
            failure = _call(
                ["train", *flags, f"--seed={seed}", f"--run-dir={run_dir}"],
                run_dir.with_name(f"{run_dir.name}.log"),
                follow,
            )
            if failure:
                failed[variant.name] = f"{what}: {failure}{_of_other_flags(out, variant, seed)}"
            progress.one_more(f"{what} {'failed' if failure else 'is trained'}")
    return failed


def _evaluate(
    sweep: Sweep, variants: Sequence[Variant], out: pathlib.Path, console: Console
) -> dict[str, str]:
    """All seeds of a variant together; what was played stays, and is found again."""
    failed: dict[str, str] = {}
    with LiveProgress("evaluation", total=len(variants), console=console) as progress:
        for variant in variants:
            run_dirs = [str(run_dir_of(out, variant, seed)) for seed in sweep.seeds]
            folder = out / variant.name
            failure = _call(
                ["evaluate", *sweep.evaluate, "--run-dir", *run_dirs, f"--out={folder}"],
                folder / "evaluation.log",
            )
            if failure:
                failed[variant.name] = f"evaluation of {variant.name}: {failure}"
            progress.one_more(f"{variant.name} {'failed' if failure else 'is evaluated'}")
    return failed


def _is_trained(out: pathlib.Path, variant: Variant, seed: int) -> bool:
    """Whether the run is there to its last iteration; a run of another setting is not, which
    `ictjax train` then refuses.
    """
    run_dir, config = run_dir_of(out, variant, seed), variant.settings(seed)
    if newest_checkpoint(run_dir) < config.iterations:
        return False
    with contextlib.suppress(ValueError):
        return not differences(to_dict(from_dict(read_config(run_dir))), to_dict(config))
    return False


def _of_other_flags(out: pathlib.Path, variant: Variant, seed: int) -> str:
    """What to do about a run of other flags, as `ictjax train` cannot know it; nothing where the
    run is of these.
    """
    with contextlib.suppress(OSError, ValueError):
        before = to_dict(from_dict(read_config(run_dir_of(out, variant, seed))))
        if differences(before, to_dict(variant.settings(seed))):
            folder = out / variant.name
            return f", here: give the variant another name in the file, or remove {folder}"
    return ""


def _call(words: Sequence[str], log: pathlib.Path, follow: Callable[[], None] | None = None) -> str:
    """Runs one command to its end, its output appended to a log. Returns why it failed, its last
    line and where the others are; nothing where it did not.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments", *words]
    with (
        log.open("ab") as output,
        # of a process group of its own: Ctrl-C comes to it once, from here
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        ) as child,
    ):
        forget = at_end(child.terminate)
        try:
            with unwinding():
                while child.poll() is None:
                    check()
                    if follow is not None:
                        follow()
                    time.sleep(_POLL_S)
        finally:
            if child.poll() is None:
                child.terminate()
                with held():  # it may be writing a checkpoint
                    child.wait()
            forget()
    if not child.returncode:
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    said = last.removeprefix("ictjax: ").rstrip(".") or f"exit code {child.returncode}"
    return f"{said} ({log})"


if __name__ == "__main__":
    main()
