"""Named configurations. Every number of a run is here or on the command line."""

import dataclasses
import pathlib
from collections.abc import Mapping
from types import MappingProxyType

from experiments import tasks
from experiments.command import unknown
from experiments.smollm import task as smollm
from ictjax.algorithms import ALGORITHMS, with_algorithm
from ictjax.config import (
    MESHES,
    PAPER,
    PAPER_OPTIMIZER,
    BatchConfig,
    GRPOConfig,
    LearnerConfig,
    LoraConfig,
    MetaConfig,
    OptimizerConfig,
    ReflectorConfig,
    SamplerConfig,
)
from ictjax.models.hf.hub import is_gguf, is_hub_id, local_folder
from ictjax.run_config import (
    ActorConfig,
    EvaluationConfig,
    TaskConfig,
    TrainConfig,
    TrainedRoleConfig,
)

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# Fake games in seconds: a check of the whole pipeline, with the pair that fake_pair.py makes.
FAKE_TINY = TrainConfig(
    actor=ActorConfig(model="experiments/pocket/checkpoints/fake/actor", dtype="float32"),
    reflector=TrainedRoleConfig(
        model="experiments/pocket/checkpoints/fake/reflector", dtype="float32"
    ),
    task=tasks.FAKE,
    iterations=3,
    seed=0,
    meta=MetaConfig(
        contexts_per_iteration=2,
        games_per_context=2,
        fresh_games=2,
        replay_weight=0.5,
        meta_turns=2,
        collection="online",
        precollected_loops=0,
        reward="success",
        malformed_reward=-0.5,
    ),
    reflection=ReflectorConfig(
        style="compact", max_context_tokens=112, max_reply_tokens=8, max_prompt_tokens=4
    ),
    actor_sampler=SamplerConfig(
        num_slots=4,
        max_len=160,
        extend_buckets=(64,),
        row_buckets=(4,),
        decode_steps=8,
        max_top_k=1,
        attended_buckets=(160,),
    ),
    reflector_sampler=SamplerConfig(
        num_slots=4,
        max_len=120,
        extend_buckets=(64,),
        row_buckets=(4,),
        decode_steps=8,
        max_top_k=1,
        attended_buckets=(120,),
    ),
    grpo=dataclasses.replace(PAPER, group_size=4, kl_coefficient=0.01),
    optimizer=OptimizerConfig(learning_rate=0.03),
    learner=LearnerConfig(positions_per_chunk=8),
    batch=BatchConfig(num_rows=8, token_buckets=(120,), response_buckets=(8,)),
    evaluation=EvaluationConfig(runs=2, meta_turns=1, test_games=2),
)

# The demo: real MiniHack games and the pocket pair that ships with the repository: a stand-in that
# shows the system, never evidence about language models.
POCKET_MINIHACK = TrainConfig(
    actor=ActorConfig(model="experiments/pocket/checkpoints/actor", dtype="float32"),
    reflector=TrainedRoleConfig(model="experiments/pocket/checkpoints/reflector", dtype="float32"),
    task=tasks.POCKET_MINIHACK,
    iterations=20,
    seed=0,
    meta=MetaConfig(
        contexts_per_iteration=8,
        games_per_context=3,
        fresh_games=2,
        replay_weight=0.5,
        meta_turns=3,
        collection="online",
        precollected_loops=0,
        reward="success",
        malformed_reward=0.0,
    ),
    reflection=ReflectorConfig(
        style="compact",
        max_context_tokens=384,
        max_reply_tokens=64,
        max_prompt_tokens=48,
        head_turns=1,
        tail_turns=1,
    ),
    # One dispatch appends an observation and samples the whole reply to it.
    actor_sampler=SamplerConfig(
        num_slots=32,
        max_len=512,
        extend_buckets=(32, 64),
        row_buckets=(8, 32),
        decode_steps=8,
        extend_steps=8,
        max_top_k=1,
        attended_buckets=(192, 352, 512),
    ),
    reflector_sampler=SamplerConfig(
        num_slots=64,
        max_len=448,
        extend_buckets=(256,),
        row_buckets=(8, 64),
        decode_steps=16,
        max_top_k=1,
        attended_buckets=(320, 448),
    ),
    grpo=GRPOConfig(
        group_size=8,
        advantage="mean_std",
        std_eps=1e-4,
        dead_groups="drop",
        refill_rounds=0,
        overlong_penalty=0.0,
        overlong_buffer=0.2,
        loss_normalisation="token_mean",
        constant_length=64,
        importance="token",
        clip_low=0.2,
        clip_high=0.2,
        correction="none",
        correction_level="token",
        correction_cap=2.0,
        kl="k3_in_loss",
        kl_coefficient=0.01,
        temperature=1.0,
    ),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2),
    learner=LearnerConfig(num_microbatches=4, positions_per_chunk=256),
    batch=BatchConfig(
        num_rows=8, replies_per_row=8, token_buckets=(512, 896), response_buckets=(64,)
    ),
    evaluation=EvaluationConfig(runs=12, meta_turns=1, test_games=5),
    checkpoint_every=1,
)

# The paper's setting (arXiv 2605.20477): k = 5 games, 25 steps, greedy actor, replay reward,
# contexts of the base reflector, groups of 8, all weights trained. With --reflector.lora.rank 64 an
# adapter of the actor's own weights is trained instead; it wants a learning rate about ten times
# higher.
QWEN_7B_MINIHACK = TrainConfig(
    actor=ActorConfig(model="Qwen/Qwen2.5-7B-Instruct"),
    reflector=TrainedRoleConfig(model="Qwen/Qwen2.5-7B-Instruct"),
    task=tasks.QWEN_MINIHACK,
    iterations=64,
    seed=0,
    meta=MetaConfig(
        contexts_per_iteration=8,
        games_per_context=5,
        fresh_games=0,
        replay_weight=1.0,
        meta_turns=4,
        collection="precollected",
        precollected_loops=128,
        reward="success",
        malformed_reward=0.0,
    ),
    reflection=ReflectorConfig(
        style="full", max_context_tokens=30_720, max_reply_tokens=2048, max_prompt_tokens=1024
    ),
    # One size of each program: a dispatch of fewer rows costs about as much where weights are read
    # from memory. Conversations are mostly far shorter than the longest: pages for a quarter of it
    # hold them.
    actor_sampler=SamplerConfig(
        num_slots=32,
        max_len=32_768,
        extend_buckets=(128,),
        row_buckets=(32,),
        decode_steps=32,
        max_top_k=64,
        page_size=128,
    ),
    reflector_sampler=SamplerConfig(
        num_slots=16,
        max_len=32_768,
        extend_buckets=(256,),
        row_buckets=(16,),
        decode_steps=32,
        max_top_k=64,
        page_size=128,
    ),
    grpo=PAPER,
    optimizer=PAPER_OPTIMIZER,
    learner=LearnerConfig(num_microbatches=8, positions_per_chunk=256),
    batch=BatchConfig(
        num_rows=8,
        replies_per_row=8,
        token_buckets=(24_576, 47_104),
        response_buckets=(2048,),
    ),
    # the same games for all loops, as the paper has them: few families have 10 x 25
    # the empty room of 5 x 5 begins in 12 ways that training does not see: too few to be measured
    evaluation=EvaluationConfig(
        runs=10,
        meta_turns=10,
        test_games=25,
        select_games=25,
        games="shared",
        families=tuple(
            family
            for family in (
                *tasks.QWEN_MINIHACK.environment.train_families,
                *tasks.QWEN_MINIHACK.environment.heldout_families,
            )
            if family != "room"
        ),
    ),
    remat="full",
)


def _adapter(
    model: str, *, rank: int, slots: tuple[int, int], context: int, replies_per_row: int
) -> TrainConfig:
    """The paper's setting with an adapter of a model that is actor, reference and trunk at once."""
    config = QWEN_7B_MINIHACK.with_models(model, model)
    reply = config.reflection.max_reply_tokens
    rows = config.meta.contexts_per_iteration * config.grpo.group_size // replies_per_row
    row = context - reply + replies_per_row * reply
    return dataclasses.replace(
        config,
        reflection=dataclasses.replace(config.reflection, max_context_tokens=context - reply),
        actor_sampler=config.actor_sampler.with_slots(slots[0]).with_max_len(context),
        reflector_sampler=config.reflector_sampler.with_slots(slots[1]).with_max_len(context),
        reflector=dataclasses.replace(
            config.reflector, lora=LoraConfig(rank=rank, alpha=2.0 * rank)
        ),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-5),
        batch=dataclasses.replace(
            config.batch,
            num_rows=rows,
            replies_per_row=replies_per_row,
            token_buckets=(row // 2, row),
        ),
        learner=dataclasses.replace(config.learner, num_microbatches=rows),
    )


QWEN_7B_LORA = _adapter(
    "Qwen/Qwen2.5-7B-Instruct", rank=64, slots=(16, 8), context=16_384, replies_per_row=4
)
QWEN_14B_LORA = _adapter(
    "Qwen/Qwen2.5-14B-Instruct", rank=64, slots=(16, 8), context=16_384, replies_per_row=4
)
# For one small device.
QWEN_HALF_B_LORA, QWEN_1_5B_LORA, QWEN3_4B_LORA = (
    _adapter(model, rank=32, slots=(16, 8), context=8192, replies_per_row=4)
    for model in ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen3-4B")
)

# On ALFWorld: official games where a download is found, else generated ones (the run's manifest
# says which). The pocket pair here reads both benchmarks, so that `--train-env minihack` measures
# what a reflector carries over; rooms are small, and so always generated.
POCKET_ALFWORLD = POCKET_MINIHACK.on(tasks.POCKET_ALFWORLD).with_models(
    "experiments/pocket/checkpoints/both/actor", "experiments/pocket/checkpoints/both/reflector"
)
# Official test games of a family are 17 at least.
QWEN_7B_ALFWORLD = dataclasses.replace(
    QWEN_7B_MINIHACK.on(tasks.QWEN_ALFWORLD),
    evaluation=dataclasses.replace(
        QWEN_7B_MINIHACK.evaluation, families=(), test_games=17, select_games=17
    ),
)

# A real language model on two cores: one frozen base, an adapter that plays, and one that reflects.
SMOLLM2 = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
_ADAPTERS = "experiments/smollm/adapters"
SMOLLM2_MINIHACK = dataclasses.replace(
    POCKET_MINIHACK,
    actor=ActorConfig(model=SMOLLM2, adapter=f"{_ADAPTERS}/actor", dtype="float32"),
    reflector=TrainedRoleConfig(
        model=SMOLLM2,
        adapter=f"{_ADAPTERS}/reflector",
        dtype="float32",
        lora=LoraConfig(rank=4, alpha=8.0),
    ),
    task=smollm.MINIHACK,
    iterations=16,
    meta=dataclasses.replace(
        POCKET_MINIHACK.meta,
        contexts_per_iteration=8,
        games_per_context=2,
        # Under a wrong prompt the actor obeys, and its games show nothing: there is more to learn
        # from those of an actor that explores.
        meta_turns=1,
        # Of games that were just read about a greedy actor wins again what it won, whatever it is
        # told that leaves it as it was: replays would pay for saying nothing.
        fresh_games=2,
        replay_weight=0.0,
    ),
    # Divided by their deviation and with less KL, the rewards of contexts without a win take over:
    # what is right there, to go on trying, is soon said everywhere (docs/smollm2.md).
    grpo=dataclasses.replace(POCKET_MINIHACK.grpo, advantage="mean", kl_coefficient=0.15),
    reflection=smollm.REFLECTION,
    actor_sampler=SamplerConfig(
        num_slots=64,
        max_len=640,
        extend_buckets=(32, 72),
        row_buckets=(8, 16, 32, 64),
        decode_steps=10,
        # A whole reply, which is read before the next: games stay in step, and dispatches full.
        extend_steps=24,
        max_in_flight=1,
        max_top_k=1,
        attended_buckets=(320, 640),
    ),
    reflector_sampler=SamplerConfig(
        num_slots=64,
        max_len=640,
        extend_buckets=(256,),
        row_buckets=(8, 64),
        decode_steps=16,
        max_top_k=1,
        attended_buckets=(640,),
    ),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=1),
    learner=LearnerConfig(num_microbatches=8, positions_per_chunk=256),
    batch=BatchConfig(
        num_rows=8, replies_per_row=8, token_buckets=(896, 1152), response_buckets=(72,)
    ),
    evaluation=EvaluationConfig(
        runs=8,
        meta_turns=1,
        test_games=2,
        select_games=1,
        families=smollm.MINIHACK.environment.heldout_families,
    ),
)
SMOLLM2_ALFWORLD = dataclasses.replace(
    SMOLLM2_MINIHACK,
    actor=dataclasses.replace(SMOLLM2_MINIHACK.actor, adapter=f"{_ADAPTERS}/alfworld/actor"),
    reflector=dataclasses.replace(
        SMOLLM2_MINIHACK.reflector, adapter=f"{_ADAPTERS}/alfworld/reflector"
    ),
    task=smollm.ALFWORLD,
    iterations=12,
    evaluation=dataclasses.replace(
        SMOLLM2_MINIHACK.evaluation,
        runs=16,
        families=smollm.ALFWORLD.environment.heldout_families,
    ),
)


def _paper(config: TrainConfig, games: int) -> TrainConfig:
    """The reproduction of one of the paper's four reflectors: so many games a batch, and its own
    protocol of evaluation.
    """
    return dataclasses.replace(
        config,
        meta=dataclasses.replace(config.meta, games_per_context=games),
        evaluation=dataclasses.replace(config.evaluation, protocol="paper"),
    )


PAPER_ALFWORLD_K3, PAPER_ALFWORLD_K5 = (_paper(QWEN_7B_ALFWORLD, games) for games in (3, 5))
PAPER_MINIHACK_K3, PAPER_MINIHACK_K5 = (_paper(QWEN_7B_MINIHACK, games) for games in (3, 5))


PRESETS: Mapping[str, TrainConfig] = MappingProxyType(
    {
        "fake-tiny": FAKE_TINY,
        "pocket-minihack": POCKET_MINIHACK,
        "pocket-alfworld": POCKET_ALFWORLD,
        "smollm2-minihack": SMOLLM2_MINIHACK,
        "smollm2-alfworld": SMOLLM2_ALFWORLD,
        "qwen2.5-7b-minihack": QWEN_7B_MINIHACK,
        "qwen2.5-7b-alfworld": QWEN_7B_ALFWORLD,
        "paper-alfworld-k3": PAPER_ALFWORLD_K3,
        "paper-alfworld-k5": PAPER_ALFWORLD_K5,
        "paper-minihack-k3": PAPER_MINIHACK_K3,
        "paper-minihack-k5": PAPER_MINIHACK_K5,
        "qwen2.5-7b-lora": QWEN_7B_LORA,
        "qwen2.5-14b-lora": QWEN_14B_LORA,
        "qwen2.5-0.5b-lora": QWEN_HALF_B_LORA,
        "qwen2.5-1.5b-lora": QWEN_1_5B_LORA,
        "qwen3-4b-lora": QWEN3_4B_LORA,
    }
)

# The tasks that suit the models of a preset.
PRESET_TASKS: Mapping[str, Mapping[str, TaskConfig]] = MappingProxyType(
    {
        "fake-tiny": tasks.FAKE_TASKS,
        "pocket-minihack": tasks.POCKET_TASKS,
        "pocket-alfworld": tasks.POCKET_TASKS,
        "smollm2-minihack": tasks.SMOLLM_TASKS,
        "smollm2-alfworld": tasks.SMOLLM_TASKS,
        "qwen2.5-7b-minihack": tasks.QWEN_TASKS,
        "qwen2.5-7b-alfworld": tasks.QWEN_TASKS,
        "paper-alfworld-k3": tasks.QWEN_TASKS,
        "paper-alfworld-k5": tasks.QWEN_TASKS,
        "paper-minihack-k3": tasks.QWEN_TASKS,
        "paper-minihack-k5": tasks.QWEN_TASKS,
        "qwen2.5-7b-lora": tasks.QWEN_TASKS,
        "qwen2.5-14b-lora": tasks.QWEN_TASKS,
        "qwen2.5-0.5b-lora": tasks.QWEN_TASKS,
        "qwen2.5-1.5b-lora": tasks.QWEN_TASKS,
        "qwen3-4b-lora": tasks.QWEN_TASKS,
    }
)


def preset(name: str) -> TrainConfig:
    """A configuration by name; ValueError lists the names there are."""
    if name not in PRESETS:
        raise unknown(f"Unknown preset {name!r}", name, list(PRESETS))
    return PRESETS[name]


def task(preset_name: str, name: str) -> TaskConfig:
    """A task for the models of a preset; ValueError lists the names there are."""
    known = PRESET_TASKS.get(preset_name, {})
    if name not in known:
        raise unknown(f"Preset {preset_name!r} has no task {name!r}", name, list(known))
    return known[name]


def shipped_folder(name: str) -> pathlib.Path | None:
    """The folder of a model that is on this machine: the path as given, or below the repository;
    None where neither holds a config.json.
    """
    return _shipped(name, "config.json")


def _shipped(name: str, file: str) -> pathlib.Path | None:
    folders = (pathlib.Path(name), _ROOT / name)
    return next((folder for folder in folders if (folder / file).is_file()), None)


def check_model(name: str, flag: str = "") -> None:
    """Raises ValueError for a model that can be nowhere: no folder holds it, and it is no hub id.

    Args:
      flag: what names it on the command line, where the command has one.
    """
    if is_gguf(name) and not pathlib.Path(name).is_file():
        remedy = (
            "fetch it with `ictjax models fetch smollm2`"
            if name == SMOLLM2
            else "name one that is there"
        )
        raise ValueError(f"There is no file {name!r}: {remedy}.")
    if shipped_folder(name) is None and not is_hub_id(name) and not is_gguf(name):
        other = f", or name its folder or hub id with {flag}" if flag else ""
        raise ValueError(
            f"No model in {name!r} (config.json is missing): put a checkpoint in Hugging Face"
            f" layout there{other}."
        )


def model_folder(name: str, flag: str = "") -> str:
    """Where a model is: the path as given, below the repository for the models that ship with it,
    or where the hub's files of that id are.

    Raises ValueError as `check_model`, and where the hub does not give it.
    """
    check_model(name, flag)
    folder = shipped_folder(name)
    return str(local_folder(name) if folder is None else folder)


def adapter_folder(name: str, flag: str) -> str:
    """Where an adapter is: the path as given, or below the repository for those that ship with it;
    nothing for nothing.

    Args:
      flag: what names it on the command line.

    Raises:
      ValueError: neither holds an adapter.
    """
    folder = _shipped(name, "adapter_config.json") if name else None
    if name and folder is None:
        raise ValueError(
            f"No adapter in {name!r} (adapter_config.json is missing): name a folder with a LoRA"
            f" adapter in PEFT's format with {flag}."
        )
    return str(folder or "")


def in_folders(config: TrainConfig) -> TrainConfig:
    """The same run with its models and adapters by their folders; an actor at an endpoint keeps its
    name. Raises ValueError as `model_folder` and `adapter_folder`.
    """
    actor = config.actor.model if config.actor.endpoint.url else model_folder(config.actor.model)
    with_models = config.with_models(actor, model_folder(config.reflector.model))
    return with_adapters_in_folders(with_models)


def with_adapters_in_folders(config: TrainConfig) -> TrainConfig:
    """The same run with its adapters by their folders. Raises ValueError as `adapter_folder`."""
    return config.with_adapters(
        adapter_folder(config.actor.adapter, "--actor.adapter"),
        adapter_folder(config.reflector.adapter, "--reflector.adapter"),
    )


def by_algorithm(config: TrainConfig, name: str) -> TrainConfig:
    """The same run by an algorithm of a name; ValueError lists the names there are."""
    if name not in ALGORITHMS:
        raise unknown(f"Unknown algorithm {name!r}", name, list(ALGORITHMS))
    return with_algorithm(config, name)


def on_named_mesh(config: TrainConfig, name: str) -> TrainConfig:
    """The same run on the devices of a name; ValueError lists the names there are."""
    if name not in MESHES:
        raise unknown(
            f"Unknown mesh {name!r} (sizes are given by --reflector.mesh.tensor 4, for example)",
            name,
            list(MESHES),
        )
    return config.on_mesh(MESHES[name])
