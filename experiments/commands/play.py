"""`ictjax play --family eat`."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import tyro

from envs.api import Environment, GameId
from experiments.command import Flags, parse, run_main, unknown
from experiments.commands.games import DEFAULT
from experiments.console import Terminal
from experiments.local_path import local_path
from experiments.presets import adapter_folder, check_model, shipped_folder
from experiments.remote_run import readable
from experiments.run_dir import check_families, open_environment, read_run, run_prompt
from experiments.trust import check_names
from ictjax.config import TEMPERATURE, EndpointConfig, RolloutConfig
from ictjax.manners import check_style, manners_folder, manners_for
from ictjax.ranges import Range
from ictjax.run_config import ActorConfig

_DESCRIPTION = (
    "Plays one game in the terminal: you, a scripted expert, chance, or a model. The text is the"
    " very text that an actor is shown. --record keeps the episode as one line of JSON, an"
    " ictjax.records.Trajectory."
)

_URL = ("http://", "https://")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlayArgs(Flags):
    """All flags."""

    env: Annotated[
        str,
        tyro.conf.arg(
            metavar="NAME", help_behavior_hint=f"(default: that of --game, else {DEFAULT})"
        ),
    ] = ""
    """Environment: a short name or an import path."""
    family: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Family of games; `ictjax games list` lists them."""
    split: str = "train"
    """Where the game is taken from."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Which game of the split, counted from 0; experts and chance draw from it too."""
    game: Annotated[str, tyro.conf.arg(metavar="KEY", help_behavior_hint="")] = ""
    """Instead of --split: a game's key, or its whole id 'env|family|key'."""
    # Of the environment, NAME VALUE ..., for example: text compact. This, the first prompt and the
    # limits are by default what a model expects (its ictjax.json) or what its run says.
    options: Annotated[
        dict[str, str], tyro.conf.arg(metavar="[NAME VALUE ...]", help_behavior_hint="")
    ] = dataclasses.field(default_factory=dict)
    policy: Literal["human", "expert", "random"] = "human"
    """Who plays."""
    # The actor that plays: a folder in Hugging Face layout, an id on the hub, or the base URL of
    # an OpenAI-compatible endpoint.
    model: Annotated[str, tyro.conf.arg(metavar="MODEL", help_behavior_hint="")] = ""
    adapter: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = ""
    """Folder with a LoRA adapter in PEFT's format, put on the model."""
    run_dir: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = (
        None
    )
    """The actor of a run plays, under a prompt of that run."""
    trust: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Import and call what the run names: an environment by its import path, an endpoint."""
    # Whose prompt, with --run-dir: the first one, or one that the reflector wrote before or after
    # training, as the evaluation has it (else the best of the last iteration).
    arm: Literal["initial", "untrained", "trained"] = "trained"
    prompt: Annotated[
        str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: the environment's own)")
    ] = ""
    """System prompt of the model, or a file that holds it."""
    max_steps: Annotated[
        int | None,
        Range(1, 1_000_000),
        tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 50)"),
    ] = None
    """Actions until the episode ends."""
    max_turn_tokens: Annotated[
        int | None,
        Range(1, 16_777_216),
        tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 500)"),
    ] = None
    """Tokens of one reply of the model."""
    temperature: Annotated[float, TEMPERATURE] = 0.0
    """Of the model; 0 is greedy."""
    show_actions: bool = False
    """Show the available actions below every observation."""
    record: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = (
        None
    )
    """Write the episode to this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        players = {
            "--model": bool(self.model),
            "--run-dir": self.run_dir is not None,
            f"--policy {self.policy}": self.policy != "human",
        }
        if self.model or self.run_dir is not None:
            if self.prompt and self.arm != "trained":
                raise ValueError(f"--prompt and --arm {self.arm} exclude each other: drop one.")
        elif deaf := [
            flag
            for flag, is_given in {
                "--prompt": bool(self.prompt),
                "--temperature": self.temperature != 0,
                "--max-turn-tokens": self.max_turn_tokens is not None,
            }.items()
            if is_given
        ]:
            raise ValueError(
                f"{' and '.join(deaf)} {'are' if len(deaf) > 1 else 'is'} for a model that plays:"
                " name one with --model or --run-dir, or drop it."
            )
        if self.adapter and (not self.model or self.model.startswith(_URL)):
            raise ValueError(
                f"--adapter {self.adapter} is for a model of a folder or of the hub: name one with"
                " --model, or drop it."
            )
        if self.arm != "trained" and self.run_dir is None:
            raise ValueError(f"--arm {self.arm} is of a run: name one with --run-dir, or drop it.")
        if self.game and self.split != "train":
            raise ValueError(
                f"--game and --split {self.split} exclude each other: a key names its game alone."
            )
        given = [flag for flag, is_given in players.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one of them.")
        if self.record is not None and (
            self.record.is_dir() or not self.record.absolute().parent.is_dir()
        ):
            raise ValueError(
                f"--record {self.record} cannot be written: name a file in a folder that exists."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaySetting:
    """What is played, after flags, a model's manners and a run have had their say."""

    environment: str
    options: Mapping[str, str]
    prompt: str | None  # None: the environment's own
    rollout: RolloutConfig
    actor: ActorConfig | None = None  # None: no model plays


def settle(args: PlayArgs) -> PlaySetting:
    """The setting that the flags ask for. Raises ValueError for a model or a run that is not
    there, or that does not know the environment.
    """
    name = args.env or (args.game.partition("|")[0] if "|" in args.game else "")
    actor, task, options = None, None, args.options
    if args.run_dir is not None:
        config = read_run(args.run_dir)
        if name not in ("", config.task.environment.name):
            raise ValueError(
                f"{args.run_dir} plays {config.task.environment.name}, not {name}: drop --env, or"
                " name the model with --model."
            )
        if not args.trust:
            check_names(
                args.run_dir / "config.json",
                environment="" if name else config.task.environment.name,
                endpoint=config.actor.endpoint,
            )
        actor, task = config.actor, config.task
        name = task.environment.name
        options = {**task.environment.options, **options}
    elif args.model.startswith(_URL):
        actor = ActorConfig(model="", endpoint=EndpointConfig(url=args.model))
    elif args.model:
        model = local_path(args.model, "--model")
        check_model(model, "--model")
        adapter = adapter_folder(local_path(args.adapter, "--adapter"), "--adapter")
        actor = ActorConfig(model=model, adapter=adapter)
    name = name or DEFAULT
    prompt, limits = (None, RolloutConfig(max_steps=50, max_turn_tokens=500))
    if task is not None:
        limits = task.rollout
    elif actor is not None and actor.model:
        # a model of the hub is a language model, or says nothing before it is downloaded; a GGUF
        # file says nothing
        taught = manners_folder(shipped_folder(actor.model) or "", actor.adapter)
        manners = manners_for(taught, name) if taught else None
        if manners is not None:
            prompt, options = manners.initial_prompt, {**manners.options, **options}
            check_style(taught, manners, options)
            limits = RolloutConfig(
                max_steps=manners.max_steps,
                max_turn_tokens=manners.max_turn_tokens,
                show_actions=manners.show_actions,
            )
    asked = {
        field: value
        for field in ("max_steps", "max_turn_tokens", "show_actions")
        if (value := getattr(args, field)) not in (None, False)
    }
    return PlaySetting(
        environment=name,
        options=options,
        prompt=prompt,
        rollout=dataclasses.replace(limits, temperature=args.temperature, **asked),
        actor=actor,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "what was played is in the file of --record, if you named one.")


def choose(args: PlayArgs, environment: Environment) -> GameId:
    """The game that the flags name. Raises ValueError for an unknown family, split or id."""
    if "|" in args.game:
        game = GameId.parse(args.game)
        if game.env != environment.name or args.family not in ("", game.family):
            raise ValueError(
                f"--game {args.game} is not of --env {environment.name} --family"
                f" {args.family or game.family}: drop one of them."
            )
        check_families(environment, [game.family])
        return game
    if not args.family:
        raise unknown(
            "--family is missing",
            "",
            environment.families,
            f"ictjax games list --env {environment.name}",
        )
    check_families(environment, [args.family])
    if args.game:
        return GameId(env=environment.name, family=args.family, key=args.game)
    games = environment.games(args.family, args.split)
    if args.seed >= len(games):
        raise ValueError(
            f"Split {args.split!r} of {args.family} has {len(games)} games, counted from 0: --seed"
            f" {args.seed} is none."
        )
    return games[args.seed]


def _main(argv: list[str]) -> None:
    args = parse(PlayArgs, "play", _DESCRIPTION, argv)
    if args.run_dir is None:
        _play(args)
        return
    with readable(args.run_dir) as run_dir:
        _play(dataclasses.replace(args, run_dir=run_dir))


def _play(args: PlayArgs) -> None:
    setting = settle(args)
    environment = open_environment(setting.environment, setting.options)
    game_id = choose(args, environment)
    if args.run_dir is not None:
        written = run_prompt(args.run_dir, game_id.family, args.arm)
        setting = dataclasses.replace(setting, prompt=written)
    # a model that plays is JAX; flags are right when it is loaded
    from experiments.play import show_game

    show_game(args, setting, environment, game_id, Terminal())
