"""Trains the pocket models from scripted play, and measures them.

Everything is made here: the episodes (scripted players in real MiniHack and ALFWorld games), the
tokenizer, the actor, the reflector. The actor learns to search its prompt on MiniHack alone, then
goes on with both benchmarks in equal shares. The same seed on the same machine gives the same
weights. On two CPU cores the actor takes about 40 minutes for each of the two parts, the reflector
10.
"""

import collections
import contextlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import tasks
from experiments.commands.pretrain import PretrainArgs, main
from experiments.console import Terminal, counting_bar
from experiments.pocket import lessons, measure, play
from experiments.pocket.data import ActorRows, PlayedGame, ReflectorRows, WordTable, target_texts
from experiments.pocket.fit import FitConfig, fit
from experiments.pocket.tokenizer import build_tokenizer
from experiments.presets import POCKET_MINIHACK
from experiments.pretraining import entry, write_record
from ictjax.chat import load_tokenizer
from ictjax.manners import write_manners
from ictjax.models.config import ModelConfig
from ictjax.models.hf import load_checkpoint, save_checkpoint
from ictjax.models.transformer import init_params
from ictjax.run_files import write_lines

_PLAY_STEPS = {"minihack": 14, "alfworld": 16}  # of a scripted episode
_MAX_LEVEL = 6
_LEVEL_WINDOW = 25  # steps over which accuracy decides whether the drills get harder
_LEVEL_ACCURACY = 0.94
_KEEP_EVERY = 500  # steps after which the weights are written, so that a crash loses little
_SAY_EVERY = 100  # steps after which a line says how they went


def pretrain(config: PretrainArgs) -> None:
    """Plays, trains, measures; prints where things are."""
    console = Terminal()
    if config.stage != "measure":
        games = collect(config, console)
        tokenizer = build_tokenizer(*vocabulary(games))
        words = WordTable(tokenizer)
        shape = ModelConfig(
            vocab_size=len(tokenizer),
            num_layers=4,
            d_model=128,
            d_ff=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            rope_theta=10_000.0,
            tie_embeddings=True,
            max_positions=2048,
        )
        for name, train in (("actor", train_actor), ("reflector", train_reflector)):
            if config.stage in ("all", name):
                folder = config.out / name
                tokenizer.save_pretrained(folder)
                save_checkpoint(
                    folder, shape, train(config, shape, games, words, tokenizer, console)
                )
                write_manners(folder, tasks.manners(tasks.POCKET_MINIHACK, tasks.POCKET_ALFWORLD))
        write_record(config.out, taught_with(config))
    report = measure.measure(
        config.out,
        test_games=config.test_games,
        console=console,
        actor_only=config.stage == "actor",
    )
    path = config.out / "measurements.json"
    write_lines(path, [json.dumps(report, indent=1)])
    show(report, console)
    console.print(f"The models and {path.name} are in {config.out}.", soft_wrap=True)


def collect(config: PretrainArgs, console: Console) -> list[PlayedGame]:
    """The scripted episodes of all families of both benchmarks."""
    counts = (
        len(lessons.MINIHACK_LESSONS) * config.minihack_games,
        len(lessons.ALFWORLD_LESSONS) * config.alfworld_games,
    )
    played = itertools.chain(
        play.play_minihack(
            games_per_family=config.minihack_games,
            max_steps=_PLAY_STEPS["minihack"],
            seed=config.seed,
        ),
        play.play_alfworld(
            games_per_family=config.alfworld_games,
            max_steps=_PLAY_STEPS["alfworld"],
            seed=config.seed,
        ),
    )
    games = []
    with counting_bar("scripted play", console) as advance:
        for game in played:
            games.append(game)
            advance(len(games), 4 * sum(counts))
    return games


def taught_with(config: PretrainArgs) -> dict[str, dict[str, Any]]:
    """The games of `collect`, for the record of the pair."""
    minihack, alfworld = list(lessons.MINIHACK_LESSONS), list(lessons.ALFWORLD_LESSONS)
    rooms = {"data": "generated", "rooms": "small"}
    return {
        "minihack": entry({}, minihack, "train", config.minihack_games),
        "alfworld": entry(rooms, alfworld, "train", config.alfworld_games),
    }


def vocabulary(games: list[PlayedGame]) -> tuple[list[str], list[str]]:
    """The texts and the single words that the pocket models must know: what the scripted players
    saw and said, and the lessons.
    """
    texts = [
        text for game in games for turn in game.turns for text in (turn.observation, turn.reply)
    ]
    texts += [game.final_observation for game in games] + lessons.training_texts() + target_texts()
    texts += ["reflect", "prompt : episode : success yes no . ... action : none"]
    named = (
        lessons.THINGS,
        lessons.VERBS,
        lessons.TASK_THINGS,
        lessons.TASK_VERBS,
        lessons.STATIONS,
        lessons.OTHER_NOUNS,
    )
    words = [*itertools.chain(*named), *map(str, range(10))]
    return texts, words


def train_actor(
    config: PretrainArgs,
    shape: ModelConfig,
    games: list[PlayedGame],
    words: WordTable,
    tokenizer,
    console: Console,
):
    """First MiniHack alone (or weights that know it), then both benchmarks."""
    params = init_params(shape, jax.random.key(config.seed))

    def part(name: str, params, chosen: list[PlayedGame], steps: int, *, fresh: bool):
        rows = ActorRows(chosen, words, max_tokens=512, seed=config.seed)
        return teach_routing(config, shape, params, rows, name, steps, fresh, tokenizer, console)

    if config.start is not None:
        params = with_known_words(params, config.start, tokenizer)
    else:
        minihack = [game for game in games if game.family in lessons.MINIHACK_LESSONS]
        params = part("actor, MiniHack", params, minihack, config.minihack_steps, fresh=True)
    return part("actor, both", params, games, config.joint_steps, fresh=False)


def with_known_words(params, start: pathlib.Path, tokenizer):
    """The weights of the checkpoint `start`, its embeddings moved to the ids of `tokenizer`; words
    it lacks keep their row of `params`.
    """
    known = load_tokenizer(start).get_vocab()
    _, old = load_checkpoint(start)
    moved = [(index, known[word]) for word, index in tokenizer.get_vocab().items() if word in known]
    rows, old_rows = map(np.array, zip(*moved, strict=True))
    return {**old, "embed": params["embed"].at[rows].set(old["embed"][old_rows])}


def teach_routing(
    config: PretrainArgs,
    shape: ModelConfig,
    params,
    rows: ActorRows,
    name: str,
    steps: int,
    fresh: bool,
    tokenizer,
    console: Console,
):
    """Drills with more and more lessons, then whole episodes among them; a `fresh` model copies
    random words first. Consumes `params`.
    """
    recent: collections.deque[float] = collections.deque(maxlen=_LEVEL_WINDOW)
    state = {"level": 1}

    def draw(step: int):
        warm = max(1, steps // 80) if fresh else 0
        copy = 1.0 if step < warm else 0.1 if step < 3 * warm else 0.0
        episodes = 0.0 if state["level"] < 3 else 0.25 if step < 0.6 * steps else 0.5
        return rows.draw(level=state["level"], copy_share=copy, episode_share=episodes)

    def note(loss: float, accuracy: float) -> str:
        recent.append(accuracy)
        full = len(recent) == _LEVEL_WINDOW
        if full and sum(recent) / len(recent) > _LEVEL_ACCURACY and state["level"] < _MAX_LEVEL:
            state["level"] += 1
            recent.clear()
        mean = sum(recent) / max(len(recent), 1)
        return f"level {state['level']}  loss {loss:.3f}  accuracy {mean:.3f}"

    def keep(params) -> None:
        save_checkpoint(config.out / "actor", shape, params)

    fitting = FitConfig(
        steps=steps,
        tokens_per_step=2048,
        learning_rate=config.learning_rate,
        keep_every=_KEEP_EVERY,
    )
    with _steps(name, steps, note, console) as report:
        return fit(
            shape, params, draw, fitting, pad_id=tokenizer.pad_token_id, report=report, keep=keep
        )


@contextlib.contextmanager
def _steps(
    name: str, total: int, note: Callable[[float, float], str], console: Console
) -> Iterator[Callable[[int, float, float], None]]:
    """The `report` of `fit`: a bar, and a line every hundred steps with what `note` says of the
    loss and accuracy of each.
    """
    with counting_bar(name, console) as advance:

        def report(step: int, loss: float, accuracy: float) -> None:
            said = note(loss, accuracy)
            advance(step + 1, total)
            if (step + 1) % _SAY_EVERY == 0:
                console.print(f"{name}, step {step + 1:,}: {said}", soft_wrap=True)

        yield report


def train_reflector(
    config: PretrainArgs,
    shape: ModelConfig,
    games: list[PlayedGame],
    words: WordTable,
    tokenizer,
    console: Console,
):
    """From the actor's weights: contexts of scripted play and the replies of a mediocre coach,
    until what is named decides the lesson.
    """
    shares = {"right_share": config.right_share, "vague_share": config.vague_share}
    rows = ReflectorRows(games, words, POCKET_MINIHACK.reflection, **shares, seed=config.seed)

    def note(loss: float, accuracy: float) -> str:
        return f"loss {loss:.3f}  accuracy {accuracy:.3f}"

    fitting = FitConfig(steps=config.reflector_steps, tokens_per_step=4096, learning_rate=1.5e-3)
    # The actor's look-up of the prompt is what naming a thing and repeating it takes: from random
    # weights it would be learned a second time.
    _, params = load_checkpoint(config.out / "actor")

    def draw(step: int):
        return rows.draw(
            1 if step < config.reflector_steps // 4 else POCKET_MINIHACK.meta.games_per_context
        )

    with _steps("reflector", config.reflector_steps, note, console) as report:
        return fit(shape, params, draw, fitting, pad_id=tokenizer.pad_token_id, report=report)


def show(report: dict, console: Console) -> None:
    """The measurements as one table per benchmark, in percent."""
    columns = [*measure.ACTOR_PROMPTS, "reflector right"]
    for name, part in report.items():
        table = Table(
            title=(
                f"Pocket models on test games of {name}: success of the actor by prompt, right"
                " lessons of the reflector (%)"
            )
        )
        table.add_column("family")
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right")
        for family, row in [*part["families"].items(), ("mean", part["mean"])]:
            table.add_row(
                family, *(f"{100 * row[column]:.0f}" if column in row else "" for column in columns)
            )
        console.print(table)


if __name__ == "__main__":
    main()
