"""Everything a training run is configured by: one frozen record, saved as config.json and compared
on resume.
"""

import dataclasses
import inspect
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from ictjax.config import (
    TEMPERATURE,
    BatchConfig,
    Dtype,
    EndpointConfig,
    GRPOConfig,
    LearnerConfig,
    LoraConfig,
    MeshConfig,
    MetaConfig,
    OptimizerConfig,
    ReflectorConfig,
    Remat,
    RoleMeshes,
    RolloutConfig,
    SamplerConfig,
)
from ictjax.ranges import Range, Ranged, shown

_LONGEST = 60  # characters of a field that is not known
SEED = Range(-(2**63), 2**63 - 1)

_Record = TypeVar("_Record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvironmentConfig(Ranged):
    """The benchmark, its families, and the workers that play it."""

    place = "task.environment."

    name: str  # "minihack", "fake", or "package.module:attribute"
    train_families: tuple[str, ...]  # trained on
    heldout_families: tuple[str, ...]  # never trained on; evaluated
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the environment
    num_workers: Annotated[int, Range(1, 1024)] = 2  # processes
    max_live_games: Annotated[int, Range(1, 1_048_576)] = 64  # at once, over all workers
    # of one reset or step; a worker that misses it is restarted
    deadline_s: Annotated[float, Range(0.001, 86_400)] = 20.0

    def __post_init__(self):
        super().__post_init__()
        if self.max_live_games < self.num_workers:
            raise ValueError(
                f"task.environment.max_live_games = {self.max_live_games} is less than one game for"
                f" each of task.environment.num_workers = {self.num_workers}: raise one or lower"
                " the other."
            )
        for field in ("train_families", "heldout_families"):
            families = getattr(self, field)
            if twice := sorted({name for name in families if families.count(name) > 1}):
                raise ValueError(
                    f"task.environment.{field} holds {', '.join(twice)} twice: list each once."
                )
        if not self.train_families:
            raise ValueError("task.environment.train_families is empty: name at least one family.")
        both = sorted(set(self.train_families) & set(self.heldout_families))
        if both:
            raise ValueError(
                f"Families {', '.join(both)} are both trained on and held out: list each once."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A benchmark as one actor plays it: what changes when a model trained on one benchmark is
    trained or evaluated on another.
    """

    environment: EnvironmentConfig
    initial_prompt: str  # the actor's system prompt at meta-turn 0
    rollout: RolloutConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImitationConfig(Ranged):
    """How the arm sft-best learns from the best candidates of a training."""

    place = "evaluation.sft."

    examples: Annotated[int, Range(1, 1_000_000)] = 256  # candidates, at most
    epochs: Annotated[int, Range(1, 1000)] = 2  # how often each is seen
    rows: Annotated[int, Range(1, 65_536)] = 4  # of a step, into which examples are packed
    learning_rate: Annotated[float, Range(1e-9, 10)] = 2e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Ranged):
    """Independent loops of reflection on STREAM games, whose prompts are scored on games that no
    reflector has read about.
    """

    place = "evaluation."

    # loops per family and arm
    runs: Annotated[int, Range(1, 10_000)]
    meta_turns: Annotated[int, Range(1, 1000)]  # reflections per loop
    # games that score a prompt of a loop; with "paper" those that it is chosen by as well
    test_games: Annotated[int, Range(1, 1_000_000)]
    # "strict": STREAM, SELECT and TEST games of a family share no initial state with each other,
    # with training, and with pretraining where that is known. "paper" (arXiv 2605.20477): a prompt
    # is chosen and reported on the same games, which flatters it
    protocol: Literal["strict", "paper"] = "strict"
    # games that choose among the prompts of a loop; read by "strict" only; 0: none is chosen
    select_games: Annotated[int, Range(0, 1_000_000)] = 3
    # k: games that the reflector reads about; 0: as many as in training
    games_per_context: Annotated[int, Range(0, 10_000)] = 0
    # "own": no two loops of an arm and a family share a game; "shared": all have the same SELECT
    # and TEST games, and STREAM games in an order of their own; "paper" shares
    games: Literal["own", "shared"] = "own"
    # keys of replies. "shared": the same for all trained runs, and arms that ask the untrained
    # reflector are played once. "own": each run has its own, and those arms are played again beside
    # each, so that no single draw of the untrained one moves all differences alike
    draws: Literal["shared", "own"] = "shared"
    # prompts that are scored on TEST: of all meta-turns; or the first, the chosen and the last one
    scored: Literal["all", "ends"] = "all"
    # who writes the prompts, see experiments.arms; NAME@endpoint asks evaluation.endpoint
    arms: tuple[str, ...] = ("initial", "untrained", "trained")
    families: tuple[str, ...] = ()  # to play; none: all of the task
    # prompts of a meta-turn among which the arm best-of-n takes the best
    candidates: Annotated[int, Range(2, 65_536)] = 8
    # how the arm sft-best learns from the best candidates of the training
    sft: ImitationConfig = dataclasses.field(default_factory=ImitationConfig)
    # the prompt of the arm expert; empty: the environment's
    expert_prompt: str = ""
    # whom arms named NAME@endpoint ask
    endpoint: EndpointConfig = dataclasses.field(default_factory=EndpointConfig)
    endpoint_model: str = ""  # its name there; may be left out where it has one only
    temperature: Annotated[float, TEMPERATURE] = 1.0  # of the reflector; 0 is greedy
    # of the games and keys; independent of the training seed
    seed: Annotated[int, SEED] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("arms", "families"):
            names = getattr(self, field)
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(
                    f"evaluation.{field} holds {', '.join(twice)} twice: name each once."
                )
        if not self.arms:
            raise ValueError("evaluation.arms is empty: name at least one, initial for example.")
        if self.draws == "own" and self.temperature == 0:
            raise ValueError(
                "evaluation.draws is 'own', and at evaluation.temperature 0 nothing is drawn: leave"
                " one out."
            )

    @property
    def shares_games(self) -> bool:
        """Whether all loops of a family are scored on the same games."""
        return self.protocol == "paper" or self.games == "shared"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleConfig(Ranged):
    """A model in a role, and where it is."""

    # folder in Hugging Face layout (config.json, safetensors, tokenizer with chat template), or id
    # on the hub
    model: str
    # of frozen weights, activations and caches; trained weights are float32. "mixed": bfloat16
    # weights, float32 activations and caches, products of operands in bfloat16; for some CPUs
    dtype: Dtype = "bfloat16"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # devices of this role
    # the chat template's thinking switch (Qwen3); None: as the template does without being told
    thinking: bool | None = None
    # folder of a LoRA adapter in PEFT's format, put on the model: the actor's plays, the
    # reflector's is what training starts from, and the reference; weights stay shared
    adapter: str = ""

    @property
    def frozen_key(self) -> tuple[str | MeshConfig, ...]:
        """Roles with the same key hold the same frozen weights."""
        return self.model, self.dtype, self.mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorConfig(RoleConfig):
    """A frozen model that plays; or, with an endpoint's URL, one that is called instead of
    computed: `model` is then its name there.
    """

    endpoint: EndpointConfig = dataclasses.field(default_factory=EndpointConfig)
    # "int8": its matrices in 8 bits, a scale for every output; never shared with the reflector
    weights: Literal["float", "int8"] = "float"

    def __post_init__(self):
        super().__post_init__()
        for field, is_given in (("weights", self.weights != "float"), ("adapter", self.adapter)):
            if self.endpoint.url and is_given:
                raise ValueError(
                    f"actor.{field} is {getattr(self, field)!r}, and the actor is at"
                    " actor.endpoint.url, where its weights are not ours: leave one out."
                )

    @property
    def frozen_key(self) -> tuple[str | MeshConfig, ...]:
        """In 8 bits its weights are its own."""
        return (*super().frozen_key, *([self.weights] if self.weights != "float" else []))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRoleConfig(RoleConfig):
    """A model that is trained: all weights, or an adapter."""

    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.adapter and not self.lora.rank:
            raise ValueError(
                f"reflector.adapter is {self.adapter!r}, and reflector.lora.rank = 0 trains all"
                " weights: set reflector.lora.rank, alpha and targets to the adapter's, or leave it"
                " out."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Ranged):
    """One training run."""

    actor: ActorConfig
    reflector: TrainedRoleConfig  # before training it is also the reference
    task: TaskConfig  # what is played
    iterations: Annotated[int, Range(1, 1_000_000_000)]  # updates
    seed: Annotated[int, SEED]  # of everything drawn in training
    meta: MetaConfig
    reflection: ReflectorConfig
    actor_sampler: SamplerConfig
    reflector_sampler: SamplerConfig
    grpo: GRPOConfig
    optimizer: OptimizerConfig
    learner: LearnerConfig
    batch: BatchConfig
    evaluation: EvaluationConfig
    # what the backward pass computes again; "full" takes the least memory and a third more time
    remat: Remat = "none"
    checkpoint_every: Annotated[int, Range(1, 1_000_000_000)] = 1  # iterations
    # how many of the newest checkpoints stay
    keep_last: Annotated[int, Range(1, 1_000_000_000)] = 2
    # checkpoints of the multiples of so many iterations stay as well; 0: of none
    keep_every: Annotated[int, Range(0, 1_000_000_000)] = 0
    # so many checkpoints with the highest training reward stay as well (the mean of the last five
    # iterations up to each; never an evaluation, whose games must not select); 0: none
    keep_best: Annotated[int, Range(0, 1_000_000_000)] = 0
    # iterations in a row without anything to learn from (every game failed, every reply malformed,
    # every gradient not finite) until the run ends with the reason; all of them, where it has fewer
    patience: Annotated[int, Range(1, 1_000_000_000)] = 3
    # who gets the metrics beside metrics.jsonl and TensorBoard; each needs the extra of its name
    track: tuple[Literal["wandb", "trackio"], ...] = ()
    track_project: str = "ictjax"  # that the run belongs to there

    def __post_init__(self):
        super().__post_init__()
        rows, replies = self.batch.num_rows, self.batch.replies_per_row
        group = self.grpo.group_size
        candidates = self.meta.contexts_per_iteration * group
        if rows * replies < candidates or rows % self.learner.num_microbatches:
            raise ValueError(
                "batch.num_rows x batch.replies_per_row must be at least contexts x candidates ="
                f" {candidates}, and batch.num_rows a multiple of learner.num_microbatches ="
                f" {self.learner.num_microbatches}, got {rows} x {replies}."
            )
        if replies % group and group % replies:
            raise ValueError(
                f"batch.replies_per_row = {replies} neither divides grpo.group_size = {group} nor"
                " is a multiple of it: candidates of one context belong together."
            )
        part, shares = (
            self.batch.num_rows // self.learner.num_microbatches,
            self.reflector.mesh.data * self.reflector.mesh.fsdp,
        )
        if part % shares:
            raise ValueError(
                f"A microbatch of batch.num_rows / learner.num_microbatches = {part} rows does not"
                f" divide over reflector.mesh data x fsdp = {shares}: lower"
                " learner.num_microbatches."
            )
        steps = self.optimizer.total_steps or self.iterations * self.learner.epochs
        warmup = self.optimizer.warmup_steps
        if self.optimizer.schedule == "cosine" and steps <= warmup:
            raise ValueError(
                f"The cosine of optimizer.schedule ends with the run, after iterations x"
                f" learner.epochs = {steps} steps, and does not begin before"
                f" optimizer.warmup_steps = {warmup}: lower the latter."
            )
        prompt, reply = self.reflection.max_context_tokens, self.reflection.max_reply_tokens
        if self.reflector_sampler.max_len < prompt + reply:
            raise ValueError(
                "reflection.max_context_tokens + reflection.max_reply_tokens ="
                f" {prompt + reply} exceeds reflector_sampler.max_len ="
                f" {self.reflector_sampler.max_len}: lower the former or raise the latter."
            )
        longest = max(replies // group, 1) * prompt + replies * reply
        if self.batch.token_buckets[-1] < longest:
            raise ValueError(
                f"A row of batch.replies_per_row = {replies} candidates with"
                f" reflection.max_context_tokens = {prompt} and reflection.max_reply_tokens ="
                f" {reply} holds up to {longest} tokens, more than batch.token_buckets ="
                f" {self.batch.token_buckets[-1]}: lower one of the former or raise the latter."
            )
        if self.batch.response_buckets[-1] < self.reflection.max_reply_tokens:
            raise ValueError(
                f"reflection.max_reply_tokens = {self.reflection.max_reply_tokens} exceeds the"
                f" largest of batch.response_buckets {self.batch.response_buckets}: raise one or"
                " lower the other."
            )
        if self.reflector_sampler.cache != "float":
            raise ValueError(
                f"reflector_sampler.cache is {self.reflector_sampler.cache!r}, and the update"
                " computes with keys and values that are not rounded: leave it to actor_sampler."
            )
        if self.actor_sampler.max_len <= self.task.rollout.max_turn_tokens:
            raise ValueError(
                f"actor_sampler.max_len = {self.actor_sampler.max_len} leaves no room beside"
                f" task.rollout.max_turn_tokens = {self.task.rollout.max_turn_tokens}: raise it."
            )

    @property
    def num_kept_checkpoints(self) -> int:
        """How many checkpoints the run holds at most at the same time: one that is being written
        included.
        """
        kept = self.keep_every and math.lcm(self.keep_every, self.checkpoint_every)
        return self.keep_last + self.keep_best + 1 + (self.iterations // kept if kept else 0)

    @property
    def whole_optimizer(self) -> OptimizerConfig:
        """The optimizer with the length of its schedule: the run's, where none is given."""
        steps = self.optimizer.total_steps or self.iterations * self.learner.epochs
        return dataclasses.replace(self.optimizer, total_steps=steps)

    def on_mesh(self, meshes: RoleMeshes) -> "TrainConfig":
        """The same run on other devices, with so few microbatches that every device has a row of
        each; where there are fewer rows than devices, rows of padding are added.
        """
        shares = meshes.reflector.data * meshes.reflector.fsdp
        rows = -(-self.batch.num_rows // shares) * shares
        most = rows // shares
        parts = max(
            part
            for part in range(1, min(self.learner.num_microbatches, most) + 1)
            if most % part == 0
        )
        return dataclasses.replace(
            self,
            actor=dataclasses.replace(self.actor, mesh=meshes.actor),
            reflector=dataclasses.replace(self.reflector, mesh=meshes.reflector),
            learner=dataclasses.replace(self.learner, num_microbatches=parts),
            batch=dataclasses.replace(self.batch, num_rows=rows),
        )

    def with_slots(self, actor: int, reflector: int) -> "TrainConfig":
        """The same run with fewer conversations at a time, and no dispatch of more rows."""
        return dataclasses.replace(
            self,
            actor_sampler=self.actor_sampler.with_slots(actor),
            reflector_sampler=self.reflector_sampler.with_slots(reflector),
        )

    def with_context(self, num_tokens: int) -> "TrainConfig":
        """The same run with conversations of at most so many tokens: the samplers' longest, what
        the reflector reads beside its reply, and the rows of the update. Raises ValueError where
        the reply leaves no room.
        """
        reply = self.reflection.max_reply_tokens
        prompt = num_tokens - reply
        if prompt < 1:
            raise ValueError(
                f"A context of {num_tokens} tokens leaves no room beside"
                f" reflection.max_reply_tokens = {reply}: give more, or lower the latter."
            )
        per_row = self.batch.replies_per_row
        row = max(per_row // self.grpo.group_size, 1) * prompt + per_row * reply
        shorter = tuple(size for size in self.batch.token_buckets[:-1] if size < row)
        return dataclasses.replace(
            self,
            reflection=dataclasses.replace(self.reflection, max_context_tokens=prompt),
            actor_sampler=self.actor_sampler.with_max_len(
                min(self.actor_sampler.max_len, num_tokens)
            ),
            reflector_sampler=self.reflector_sampler.with_max_len(num_tokens),
            batch=dataclasses.replace(self.batch, token_buckets=(*shorter, row)),
        )

    def with_models(self, actor: str, reflector: str) -> "TrainConfig":
        """The same run with models from other folders."""
        return dataclasses.replace(
            self,
            actor=dataclasses.replace(self.actor, model=actor),
            reflector=dataclasses.replace(self.reflector, model=reflector),
        )

    def with_adapters(self, actor: str, reflector: str) -> "TrainConfig":
        """The same run with adapters from other folders."""
        return dataclasses.replace(
            self,
            actor=dataclasses.replace(self.actor, adapter=actor),
            reflector=dataclasses.replace(self.reflector, adapter=reflector),
        )

    def on(self, task: TaskConfig) -> "TrainConfig":
        """The same models and settings on another task, of which all families are evaluated where
        it does not have those that are named.
        """
        settings, evaluation = task.environment, self.evaluation
        if not {*settings.train_families, *settings.heldout_families} >= {*evaluation.families}:
            evaluation = dataclasses.replace(evaluation, families=())
        return dataclasses.replace(self, task=task, evaluation=evaluation)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON reads it back: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


class Difference(NamedTuple):
    """A field in which two configurations differ, by its dotted name; None where one lacks it."""

    field: str
    before: Any
    now: Any


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> list[Difference]:
    """The fields in which two configurations differ."""
    found: list[Difference] = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif (name in before) != (name in now) or not _same(old, new):
            found.append(Difference(f"{prefix}{name}", old, new))
    return found


def _same(one: Any, other: Any) -> bool:
    not_numbers = [isinstance(value, float) and math.isnan(value) for value in (one, other)]
    return all(not_numbers) or one == other


def from_dict(data: Mapping[str, Any]) -> TrainConfig:
    """Reads what `to_dict` wrote. Raises ValueError for a field that is missing or not known, by
    its dotted name. What configurations of older versions lack is as it was then.
    """
    if isinstance(data, Mapping):
        old = {
            record: values | data[record]
            for record, values in _BEFORE.items()
            if isinstance(data.get(record), Mapping)
        }
        if isinstance(data.get("remat"), bool):
            old["remat"] = "full" if data["remat"] else "none"
        data = {**data, **old}
    return _build(TrainConfig, data, "")


# Fields that have no default, since each changes the experiment, and that came later.
_BEFORE: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "meta": {"reward": "success"},
        "grpo": {
            "refill_rounds": 0,
            "overlong_penalty": 0.0,
            "overlong_buffer": 0.2,
            "correction": "none",
            "correction_level": "token",
            "correction_cap": 2.0,
        },
    }
)


def _build(kind: type[_Record], data: Mapping[str, Any], place: str) -> _Record:
    if not isinstance(data, Mapping):
        raise ValueError(f"{_other_version(place)} holds {shown(data)} where several fields are.")
    hints = typing.get_type_hints(kind)
    for name in data:
        if name not in hints:
            named = name if name.isidentifier() else repr(name)
            raise ValueError(f"{_other_version(place + named[:_LONGEST])} is not known here.")
    parameters = inspect.signature(kind).parameters.values()
    for name in (
        parameter.name for parameter in parameters if parameter.default is parameter.empty
    ):
        if name not in data:
            raise ValueError(f"{_other_version(place + name)} is missing.")
    values = {name: _value(hints[name], data[name], f"{place}{name}.") for name in data}
    return kind(**values)


def _other_version(field: str) -> str:
    return f"the configuration is of another version: its field {field.rstrip('.') or '(all)'}"


def _value(hint: Any, value: Any, place: str) -> Any:
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
    if kinds and value is not None:
        return _build(kinds[0], value, place)
    value = tuple(value) if isinstance(value, list) else value
    if not _fits(hint, value):
        raise ValueError(f"{_other_version(place)} holds {shown(value)}, which it cannot hold.")
    return value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value read from JSON can be that of a field: scalars, choices, tuples, texts by
    name, unions of these.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(part, value) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(parts[0], item) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(parts[1], item) for item in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)
