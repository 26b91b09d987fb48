"""Plays a game in the terminal: a person, an expert, chance or a model.

The text is the very text that an actor is shown. `--record FILE` keeps the episode as one line of
JSON, an `ictjax.records.Trajectory`.
"""

import contextlib
import pathlib
import random
import readline
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console

from envs.api import Environment, Game, GameId, Observation, Outcome
from envs.experts import make_player, random_player
from envs.pool import WorkerPool
from envs.registry import initial_prompt
from envs.stopping import check, unwinding, waiting_for_key
from experiments.commands.play import PlayArgs, PlaySetting, main
from experiments.memory import check_fits, weights_use
from experiments.presets import adapter_folder, model_folder
from ictjax import keys
from ictjax.endpoint_speaker import EndpointSpeaker
from ictjax.manners import check_words
from ictjax.model_speaker import ModelSpeaker
from ictjax.models.hf.reader import read_config
from ictjax.players import open_model
from ictjax.records import Trajectory, Turn, to_json
from ictjax.rollout import Episode, rollout, user_message
from ictjax.run_config import ActorConfig
from ictjax.run_files import write_lines
from ictjax.speaker import Speaker

_HELP = """\
Type an action as the game's actor would. Three words are for this program instead:
  help      this text
  actions   the actions that the game offers now (Tab completes them on a terminal)
  quit      stop here (so does the end of input)
To give one of these words to the game, put ! before it: !help."""


class Move(NamedTuple):
    """What a player says in one turn."""

    action: str
    thought: str = ""


Mover = Callable[[Game, Observation], Move | None]  # None: the player leaves


class Screen:
    """Shows an episode, turn by turn."""

    def __init__(self, console: Console, max_steps: int, show_actions: bool):
        self._console, self._max_steps, self._show_actions = console, max_steps, show_actions
        self._num_turns = 0

    def text(self, text: str, style: str = "") -> None:
        """Prints text as it is, nothing wrapped away."""
        self._console.print(text, style=style, soft_wrap=True)

    def observation(self, text: str, actions: Sequence[str]) -> None:
        """What the actor is shown."""
        if self._num_turns < self._max_steps:
            self._console.rule(
                f"step {self._num_turns + 1} of {self._max_steps}", align="left", characters="-"
            )
        self._num_turns += 1
        self.text(user_message(text, actions, self._show_actions).content)

    def move(self, action: str, thought: str) -> None:
        """What a player who is no person says."""
        if thought:
            self.text(f"Thought: {thought}", style="dim")
        self.text(f"Action: {action}", style="bold")

    def end(self, text: str, outcome: Outcome, num_steps: int, stopped: bool) -> None:
        """The last observation and the result."""
        if text and not stopped:
            self.text(text)
        how = "stopped" if stopped else str(outcome).replace("_", " ")
        self.text(
            f"{how} after {num_steps} action{'s' if num_steps != 1 else ''}",
            style="green" if outcome is Outcome.SUCCESS else "yellow",
        )


class Person:
    """Reads actions from standard input: with line editing, history and completion on a
    terminal.
    """

    def __init__(self, screen: Screen):
        self._screen = screen
        self._actions: tuple[str, ...] = ()
        readline.set_completer_delims("\n")
        readline.set_completer(self._complete)
        readline.parse_and_bind("tab: complete")

    def __call__(self, _game: Game, observation: Observation) -> Move | None:
        self._actions = observation.actions
        while True:
            try:
                with waiting_for_key():
                    line = input("> ").strip()
            except EOFError:
                print()
                return None
            if not sys.stdin.isatty():  # nobody has seen it typed
                self._screen.text(line)
            if line == "quit":
                return None
            if line == "help":
                self._screen.text(_HELP)
            elif line == "actions":
                listed = ", ".join(observation.actions)
                self._screen.text(
                    f"Actions: {listed}" if listed else "The game does not list its actions."
                )
            elif line:
                return Move(line.removeprefix("!"))

    def _complete(self, text: str, state: int) -> str | None:
        found = [action for action in self._actions if action.startswith(text)]
        return found[state] if state < len(found) else None


def expert(environment: str, family: str, seed: int) -> Mover:
    """The scripted expert of a family."""
    act = make_player(environment, family, random.Random(seed))
    return lambda game, _observation: Move(act(game))


def chance(environment: str, seed: int) -> Mover:
    """Picks among the actions that the game lists; MiniHack lists patterns only, so there among the
    actions that make sense.
    """
    rng = random.Random(seed)
    if environment == "minihack":
        player = random_player(rng)
        return lambda game, _observation: Move(player(game))

    def act(_game: Game, observation: Observation) -> Move:
        if not observation.actions:
            raise ValueError(
                f"{environment} does not list its actions, so chance cannot choose one: use"
                " --policy human."
            )
        return Move(rng.choice(observation.actions))

    return act


class Record:
    """Collects an episode, so that what was played is kept however it ends."""

    def __init__(self, game: GameId, system_prompt: str):
        self._game, self.system_prompt = game, system_prompt
        self.turns: list[Turn] = []
        self.observation, self.state_hash, self.error = "", "", ""
        self.outcome: Outcome | None = None

    def trajectory(self) -> Trajectory:
        """The episode so far; one that was left counts as one that ran out of steps."""
        return Trajectory(
            game=self._game,
            system_prompt=self.system_prompt,
            turns=tuple(self.turns),
            outcome=self.outcome or Outcome.STEP_LIMIT,
            final_observation=self.observation,
            state_hash=self.state_hash,
            error=self.error,
        )


def play_on_screen(
    environment: Environment,
    game_id: GameId,
    mover: Mover,
    screen: Screen,
    record: Record,
    *,
    max_steps: int,
    echo: bool,
) -> None:
    """Plays one episode in this process into `record`. `echo`: show the moves (a person has seen
    hers).
    """
    with contextlib.closing(environment.open(game_id.family)) as game:
        observation = game.reset(game_id)
        record.observation, record.state_hash = observation.text, game.state_hash()
        while record.outcome is None and len(record.turns) < max_steps:
            check()
            screen.observation(observation.text, observation.actions)
            move = mover(game, observation)
            if move is None:
                return
            if echo:
                screen.move(move.action, move.thought)
            step = game.step(move.action)
            turn = Turn(
                observation=observation.text,
                actions=observation.actions,
                reply=move.action,
                thought=move.thought,
                action=move.action,
                reward=step.reward,
            )
            record.turns.append(turn)
            observation = step.observation
            record.observation, record.outcome, record.error = (
                observation.text,
                step.outcome,
                step.error,
            )
        record.outcome = record.outcome or Outcome.STEP_LIMIT


def watch(
    actor: ActorConfig,
    setting: PlaySetting,
    game_id: GameId,
    screen: Screen,
    record: Record,
    seed: int,
) -> None:
    """Lets a model play one episode into `record`, by the same rollout, pool and speakers as in
    training; shows each turn when it is played.
    """

    def show(_episode: Episode, turn: Turn) -> None:
        record.turns.append(turn)
        screen.observation(turn.observation, turn.actions)
        if turn.failure is not None:
            screen.text(f"{turn.reply}\n(no usable action: {turn.failure})", style="red")
        else:
            screen.move(turn.action, turn.thought)

    episode = Episode(
        game=game_id,
        system_prompt=record.system_prompt,
        key=keys.fold(keys.root_key(seed), "play", str(game_id)),
    )
    with (
        _speaker(actor) as speaker,
        WorkerPool(
            setting.environment, num_workers=1, max_live_games=1, options=setting.options
        ) as pool,
    ):
        if isinstance(speaker, ModelSpeaker):
            check_words(
                actor.model, record.system_prompt, speaker.chat.unknown(record.system_prompt)
            )
        played = rollout(speaker, pool, [episode], setting.rollout, watch=show)[0]
    if played.outcome is Outcome.FAILED and not played.turns:
        raise ValueError(played.error)
    record.observation, record.state_hash, record.outcome, record.error = (
        played.final_observation,
        played.state_hash,
        played.outcome,
        played.error,
    )


def _speaker(actor: ActorConfig) -> Speaker:
    if actor.endpoint.url:
        return EndpointSpeaker(actor.endpoint, actor.model)
    folder = pathlib.Path(model_folder(actor.model, "--model"))
    if (folder / "config.json").is_file():  # `open_model` says what is wrong
        check_fits(
            "The weights",
            [weights_use("weights", read_config(folder))],
            "Name a smaller model, or free memory.",
        )
    adapter = adapter_folder(actor.adapter, "--adapter")
    return open_model(folder, num_conversations=1, adapter=adapter)


def read_prompt(text: str, otherwise: str) -> str:
    """The system prompt: of a file, as given, or another one where none is given."""
    with contextlib.suppress(OSError):  # a long prompt is no file name
        if text and pathlib.Path(text).is_file():
            try:
                return pathlib.Path(text).read_text(encoding="utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"The prompt in {text} is not text in UTF-8 ({error.reason} at byte"
                    f" {error.start}): save it in that encoding."
                ) from error
    return text or otherwise


def show_game(
    args: PlayArgs,
    setting: PlaySetting,
    environment: Environment,
    game_id: GameId,
    console: Console,
) -> None:
    """Plays the chosen game as the flags say, on the console."""
    limits = setting.rollout
    screen = Screen(console, limits.max_steps, limits.show_actions)
    prompt = ""
    if setting.actor is not None:
        prompt = read_prompt(args.prompt, setting.prompt or initial_prompt(environment))
    mover: Mover = Person(screen)
    if args.policy == "expert":
        mover = expert(environment.name, game_id.family, args.seed)
    elif args.policy == "random":
        mover = chance(environment.name, args.seed)
    screen.text(
        str(game_id)
        + ("" if setting.actor or args.policy != "human" else " (help: how to play, quit: stop)"),
        style="dim",
    )
    if prompt:
        screen.text(f"System prompt: {prompt}", style="dim")
    record = Record(game_id, prompt)
    try:
        with unwinding():  # for the record
            if setting.actor is not None:
                watch(setting.actor, setting, game_id, screen, record, args.seed)
            else:
                play_on_screen(
                    environment,
                    game_id,
                    mover,
                    screen,
                    record,
                    max_steps=limits.max_steps,
                    echo=args.policy != "human",
                )
        screen.end(
            record.observation,
            record.outcome or Outcome.STEP_LIMIT,
            len(record.turns),
            record.outcome is None,
        )
    finally:
        if args.record is not None and (record.turns or record.state_hash):
            write_lines(args.record, [to_json(record.trajectory())])
            screen.text(f"Recorded in {args.record}", style="dim")


if __name__ == "__main__":
    main()
