"""Actor and reflector of a run, opened once, for training and evaluation alike: each checkpoint is
read once, and frozen weights that both use are the same arrays.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ictjax.chat import ChatTokenizer
from ictjax.checkpoint import CheckpointReader
from ictjax.config import EndpointConfig, LoraConfig, OptimizerConfig, SamplerConfig
from ictjax.endpoint_speaker import EndpointSpeaker
from ictjax.function_speaker import Function, FunctionSpeaker
from ictjax.health import check_loaded
from ictjax.hosts import ALONE, Hosts
from ictjax.learner import LearnerState, make_optimizer, state_shapes
from ictjax.manners import check_style, check_words, manners_folder, manners_for
from ictjax.mesh import (
    TRAINED_RULES,
    on_own_part,
    open_mesh,
    own_part,
    param_shardings,
    place,
)
from ictjax.model_speaker import ModelSpeaker
from ictjax.models.config import ModelConfig, frozen_dtype
from ictjax.models.hf import load_checkpoint
from ictjax.models.hf.hub import local_folder
from ictjax.models.hf.reader import check_checkpoint, read_config
from ictjax.models.int8 import int8_weights
from ictjax.models.lora import adapter_axes, init_adapter, with_adapter
from ictjax.models.peft import load_adapter
from ictjax.models.transformer import Params, abstract_params, param_axes
from ictjax.reflector import Reflector
from ictjax.run_config import ActorConfig, RoleConfig, TrainConfig, TrainedRoleConfig
from ictjax.sampler import Sampler, sampling_weights
from ictjax.speaker import Speaker, is_speaker

ReadProgress = Callable[[int, int], None]  # bytes of a checkpoint read, and to be read

_MAX_LEN = 8192  # of a conversation with a model that a user opens, unless sizes say otherwise
_SHARE_MIN_TOKENS = 256


class SetTrained(Protocol):
    """Lets the reflector speak with other trained weights: all, or an adapter on the base, of which
    no copy is made. Raises ValueError while a conversation with it is open.
    """

    def __call__(self, weights: Params, step: int | None = None) -> None:
        """Takes the weights, and the learner's step that made them, which replies then carry."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Players:
    """Actor, reflector and reference policy. What is frozen is never donated."""

    actor: Speaker
    reflector: Reflector
    model: ModelConfig  # of the reflector
    # the reflector before training, with the adapter on that it starts from: the reference policy,
    # and an adapter's trunk; None where neither is used and the actor has other weights
    base: Params | None
    mesh: Mesh | None  # of the reflector, and of the update
    lora: LoraConfig
    pad_id: int  # of the reflector's tokenizer
    programs: tuple[Callable[[], object], ...]
    """One call for every program that the speakers here can need, which compiles it."""
    set_trained: SetTrained


@contextlib.contextmanager
def open_players(
    config: TrainConfig,
    trained: Params,
    progress: ReadProgress | None = None,
    *,
    step: int | None = None,
    hosts: Hosts = ALONE,
) -> Iterator[Players]:
    """Reads the frozen weights and opens both speakers.

    Actor and reflector share weights if model, dtype and mesh are the same; each has its own
    adapter on them, where it has one.

    Args:
      config: of the run, with its models by folder, hub id or endpoint.
      trained: what the reflector speaks with at first, see `initial_weights`, `restore_trained`.
      progress: is told how far the reading is.
      step: of the learner, which made `trained`.
      hosts: that all open them; they wait for each other when all is read.

    Raises:
      ValueError: a folder that does not hold a model, a limit that does not fit one, or a mesh that
        does not fit the devices.
      HostFailed: what is wrong on another host.
    """
    role, lora = config.reflector, config.reflector.lora
    with contextlib.ExitStack() as stack:
        with hosts.told():
            check_language(config)
            mesh = open_mesh(role.mesh)
            local = not config.actor.endpoint.url
            same = local and config.actor.frozen_key == role.frozen_key
            needed = lora.rank > 0 or config.grpo.kl != "none"
            frozen = frozen_weights(role, mesh, progress) if needed or same else None
            model = _shape(role) if frozen is None else frozen[0]
            base = None if frozen is None else _with_own_adapter(role, *frozen, mesh)
            if not local:
                actor: Speaker = EndpointSpeaker(config.actor.endpoint, config.actor.model)
            elif same and frozen is not None:
                actor = actor_speaker(config, *frozen, mesh)
            else:
                actor_mesh = open_mesh(config.actor.mesh)
                weights = frozen_weights(config.actor, actor_mesh, progress)
                actor = actor_speaker(config, *weights, actor_mesh)
            stack.enter_context(actor)
            chat = ChatTokenizer(role.model, thinking=role.thinking)

        def reflecting(weights: Params) -> Params:
            return weights if base is None or not lora.rank else with_adapter(lora, base, weights)

        def speaking(weights: Params) -> Params:
            """As they sample on this host; of several, each sends the others what it holds."""
            if own_part(mesh) is mesh:
                return reflecting(weights)
            return on_own_part(sampling_weights(model, reflecting(weights), mesh), mesh)

        hosts.agree(None)
        first = speaking(trained)
        with hosts.told():
            own = own_part(mesh)
            sizes = _own_sizes("reflector", config.reflector_sampler)
            sampler = _sampler(model, first, sizes, chat, own, step)
            del first
            speaker = stack.enter_context(ModelSpeaker(sampler, chat))

        def set_trained(weights: Params, step: int | None = None) -> None:
            speaker.set_params(speaking(weights), step)

        yield Players(
            actor=actor,
            reflector=Reflector(speaker, config.reflection, config.grpo.temperature),
            model=model,
            base=base,
            mesh=mesh,
            lora=lora,
            pad_id=chat.pad_id,
            programs=(
                *(actor.programs() if isinstance(actor, ModelSpeaker) else ()),
                *speaker.programs(),
            ),
            set_trained=set_trained,
        )


def check_language(config: TrainConfig) -> None:
    """Reads the models' small files and the headers of their weights, and compares how they are
    spoken to in the task with what they expect.

    Raises:
      ValueError: a folder that does not hold a model; a model that says which environments it
        knows is not made for this one or for this style of text, or has no words for the first
        prompt.
    """
    task = config.task
    roles = {} if config.actor.endpoint.url else {"actor": config.actor}
    for name, role in (roles | {"reflector": config.reflector}).items():
        with in_role(name):
            folder = local_folder(role.model, weights=False)
            taught = manners_folder(folder, role.adapter)
            manners = manners_for(taught, task.environment.name)
            if manners is not None:
                check_style(taught, manners, task.environment.options)
            chat = ChatTokenizer(folder, thinking=role.thinking)
            check_words(folder, task.initial_prompt, chat.unknown(task.initial_prompt))
            if os.path.isdir(role.model):  # of an id, weights may still have to be fetched
                check_checkpoint(folder)
        _own_adapter(role, _shape(role))


@contextlib.contextmanager
def in_role(name: str, field: str = "model") -> Iterator[None]:
    """What is wrong with a model, or with its adapter, is said with the role that it plays."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}.{field}: {error}") from error


def initial_weights(config: TrainConfig, hosts: Hosts = ALONE) -> Params:
    """What a run trains, before training: see `start_weights`."""
    return start_weights(config.reflector, config.seed, hosts)


def start_weights(role: TrainedRoleConfig, seed: int, hosts: Hosts = ALONE) -> Params:
    """What is trained, before training: the adapter of the role, a new one, or all weights;
    float32, split over all devices of the mesh.

    At small learning rates bfloat16 would round updates away. Several hosts wait for each other
    when all is read. Raises ValueError and HostFailed as `open_players`.
    """
    with hosts.told():
        mesh = open_mesh(role.mesh)
        if role.lora.rank:
            model, axes = _shape(role), adapter_axes(role.lora)
            given = _own_adapter(role, model)
            params = (
                init_adapter(model, role.lora, jax.random.key(seed)) if given is None else given[1]
            )
        else:
            model, params = load_checkpoint(role.model, mesh=mesh, dtype="float32")
            check_loaded(params, role.model)
            axes = param_axes(model)
    hosts.agree(None)
    if mesh is None:
        return jax.tree.map(jnp.asarray, params)
    return place(params, param_shardings(axes, params, mesh, TRAINED_RULES))


def trained_shapes(config: TrainConfig) -> LearnerState:
    """The state of a run's learner on shapes alone: see `learner_shapes`."""
    return learner_shapes(config.reflector, config.whole_optimizer)


def learner_shapes(role: TrainedRoleConfig, optimizer: OptimizerConfig) -> LearnerState:
    """The state of a learner on shapes alone, with the places of its arrays; no weight is read."""
    mesh = open_mesh(role.mesh)
    model = _shape(role).with_param_dtype("float32")
    if role.lora.rank:
        shapes = jax.eval_shape(lambda: init_adapter(model, role.lora, jax.random.key(0)))
        axes = adapter_axes(role.lora)
    else:
        shapes, axes = abstract_params(model), param_axes(model)
    if mesh is None:
        here: Any = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: here, shapes)
    else:
        places = param_shardings(axes, shapes, mesh, TRAINED_RULES)
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
    return state_shapes(shapes, make_optimizer(optimizer), optimizer.memory)


def saved_steps(run_dir: pathlib.Path) -> tuple[int, ...]:
    """The steps of a run's checkpoints, ascending. Raises ValueError where there is none."""
    with CheckpointReader(run_dir / "checkpoints") as reader:
        steps = reader.steps
    if not steps:
        raise ValueError(f"{run_dir} holds no checkpoint: train first (ictjax train).")
    return steps


def check_saved(run_dir: pathlib.Path, step: int, saved: Sequence[int]) -> None:
    """Raises ValueError where a step is not among those of a run's checkpoints."""
    if step not in saved:
        raise ValueError(
            f"{run_dir} has no checkpoint of iteration {step}: --step can be"
            f" {', '.join(map(str, saved))}."
        )


def restore_trained(
    run_dir: pathlib.Path, config: TrainConfig, step: int | None = None, *, hosts: Hosts = ALONE
) -> tuple[int, Params]:
    """What a run trained (all weights, or an adapter), without the state of its optimizer, on the
    devices that the configuration names.

    Args:
      run_dir: of the run.
      config: of the run; its mesh may be another than that of training.
      step: which checkpoint; None for the newest.
      hosts: that all restore it, of the same step; they wait for each other when it is read.

    Returns:
      The step, and the weights.

    Raises:
      ValueError: there is no such checkpoint, or it does not fit the configuration.
      HostFailed: another host cannot read it.
    """
    with hosts.told_until() as read:
        saved = saved_steps(run_dir)
        if step is not None:
            check_saved(run_dir, step, saved)
        with CheckpointReader(run_dir / "checkpoints") as reader:
            wanted = {"params": trained_shapes(config).params}
            part, host = reader.restore_part(step, wanted, read)
    return host["iteration"], part["params"]


@contextlib.contextmanager
def open_speaker(
    source: str | os.PathLike[str] | Function | Speaker,
    *,
    model: str = "",
    adapter: str | os.PathLike[str] = "",
    replies: Literal["text", "action"] = "text",
    num_conversations: int = 8,
    sizes: SamplerConfig | None = None,
) -> Iterator[Speaker]:
    """Whoever is named, as a speaker.

    Args:
      source: a folder with a model in Hugging Face layout or an id on its hub; the base URL of an
        OpenAI-compatible endpoint; a function (`ictjax.function_speaker.Function`); or a speaker,
        which stays the caller's to close.
      model: the name of the model at an endpoint; may be left out where it has one only.
      adapter: a folder with a LoRA adapter in PEFT's format, which is put on the model of a folder.
      replies: what a function returns, see `ictjax.function_speaker.FunctionSpeaker`.
      num_conversations: with a model, that are computed at the same time.
      sizes: of a model's sampler; by default fit for conversations of at most 8,192 tokens.

    Raises:
      ValueError: there is nothing of that name, or it is no speaker.
    """
    named = isinstance(source, str | os.PathLike) and not is_url(source)
    if os.fspath(adapter) and not named:
        raise ValueError(
            f"adapter is {os.fspath(adapter)!r}, and the speaker is no model of a folder or of the"
            " hub: leave one out."
        )
    if is_url(source):
        with EndpointSpeaker(EndpointConfig(url=str(source)), model) as endpoint:
            yield endpoint
    elif isinstance(source, str | os.PathLike):
        with open_model(
            source, num_conversations=num_conversations, adapter=adapter, sizes=sizes
        ) as speaker:
            yield speaker
    elif isinstance(source, type):
        raise ValueError(f"A speaker is an object, got the class {source.__name__}: call it first.")
    elif is_speaker(source):
        yield source
    else:
        with FunctionSpeaker(source, replies=replies) as function:
            yield function


def is_url(source: object) -> bool:
    """Whether this names an endpoint."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def open_model(
    source: str | os.PathLike[str],
    *,
    num_conversations: int,
    adapter: str | os.PathLike[str] = "",
    sizes: SamplerConfig | None = None,
    progress: ReadProgress | None = None,
) -> ModelSpeaker:
    """A model of a folder or of the hub, with an adapter on it where one is named, as a speaker of
    its own, on one device.

    Raises:
      ValueError: there is no such model or adapter, or the sizes do not fit it.
    """
    folder = local_folder(source)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"No model in {str(source)!r} (config.json is missing): name a folder in Hugging Face"
            " layout or an id on its hub."
        )
    chat = ChatTokenizer(folder)
    model, params = load_checkpoint(folder, progress=progress)
    check_loaded(params, str(source))
    if os.fspath(adapter):
        lora, factors = load_adapter(adapter, model)
        params = with_adapter(lora, params, factors)
    if sizes is None:
        max_len = min(model.max_positions, _MAX_LEN)
        sizes = SamplerConfig(
            num_slots=num_conversations,
            max_len=max_len,
            extend_buckets=tuple(size for size in (64, 512) if size < max_len) or (max_len,),
            row_buckets=(num_conversations,),
            decode_steps=8,
            max_top_k=1,
        )
    sampler = _sampler(model, params, sizes, chat)
    return ModelSpeaker(
        sampler,
        chat,
        share_min_tokens=_SHARE_MIN_TOKENS,
        folder=os.fspath(manners_folder(folder, adapter)),
    )


def actor_speaker(
    config: TrainConfig, model: ModelConfig, params: Params, mesh: Mesh | None
) -> ModelSpeaker:
    """The actor of a run, of the weights that `frozen_weights` read, with its adapter on them."""
    chat = ChatTokenizer(config.actor.model, thinking=config.actor.thinking)
    weights = on_own_part(_with_own_adapter(config.actor, model, params, mesh), mesh)
    sizes = _own_sizes("actor", config.actor_sampler)
    sampler = _sampler(model, weights, sizes, chat, own_part(mesh))
    return ModelSpeaker(sampler, chat, share_min_tokens=config.task.rollout.share_min_tokens)


def _own_sizes(name: str, sizes: SamplerConfig) -> SamplerConfig:
    """This host's share of a role's sampler, see `SamplerConfig.of_host`."""
    try:
        return sizes.of_host(jax.process_count())
    except ValueError as error:
        raise ValueError(f"{name}_sampler.{error}") from error


def _sampler(
    model: ModelConfig,
    params: Params,
    sizes: SamplerConfig,
    chat: ChatTokenizer,
    mesh: Mesh | None = None,
    step: int | None = None,
) -> Sampler:
    """A sampler that has room for a model's stop ids, and leaves out ids that no text has."""
    room = max(sizes.max_stop_ids, len(chat.stop_ids))
    return Sampler(
        model,
        params,
        dataclasses.replace(sizes, max_stop_ids=room),
        chat.pad_id,
        mesh=mesh,
        unused=chat.unused(model.vocab_size),
        weights_step=step,
    )


def frozen_weights(
    role: RoleConfig, mesh: Mesh | None, progress: ReadProgress | None = None
) -> tuple[ModelConfig, Params]:
    """A model that is not trained, in the form that samplers and updates share (see
    `ictjax.sampler.weights.sampling_weights`). Raises ValueError as `open_players`.
    """
    model, params = load_checkpoint(
        role.model, mesh=mesh, dtype=frozen_dtype(role.dtype), progress=progress
    )
    check_loaded(params, role.model)
    model = model.with_dtype(role.dtype)
    if isinstance(role, ActorConfig) and role.weights == "int8":
        model, params = int8_weights(model, params)
    return model, sampling_weights(model, params, mesh, consume=True)


def _with_own_adapter(
    role: RoleConfig, model: ModelConfig, base: Params, mesh: Mesh | None
) -> Params:
    """The weights that `frozen_weights` read with the role's adapter on, as they sample: the arrays
    of the base themselves; without an adapter the base.
    """
    given = _own_adapter(role, model)
    if given is None:
        return base
    lora, factors = given
    return sampling_weights(model, with_adapter(lora, base, factors), mesh)


def _own_adapter(role: RoleConfig, model: ModelConfig) -> tuple[LoraConfig, Params] | None:
    """The adapter that a role plays with or starts from; None where it has none.

    Raises:
      ValueError: a folder that does not hold one for this model; or one of another form than is
        trained.
    """
    if not role.adapter:
        return None
    trained = isinstance(role, TrainedRoleConfig)
    with in_role("reflector" if trained else "actor", "adapter"):
        lora, factors = load_adapter(role.adapter, model)
        if trained:
            _check_form(role.adapter, lora, role.lora)
    return lora, factors


def _check_form(folder: str, there: LoraConfig, trained: LoraConfig) -> None:
    """Raises ValueError where what an adapter is differs from what is trained."""
    flags = {
        "rank": (there.rank, trained.rank),
        "alpha": (there.alpha, trained.alpha),
        "targets": (" ".join(sorted(there.targets)), " ".join(sorted(trained.targets))),
    }
    wrong = {name: value for name, (value, other) in flags.items() if value != other}
    if wrong:
        set_to = ", ".join(f"--reflector.lora.{name} {value}" for name, value in wrong.items())
        raise ValueError(
            f"the adapter in {folder} is of another form than is trained from it: set {set_to}"
        )


def _shape(role: RoleConfig) -> ModelConfig:
    folder = local_folder(role.model, weights=False)
    return read_config(folder).with_dtype(role.dtype)
