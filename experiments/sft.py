"""Trains a model on chats, in a folder that it can go on from."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

from envs.api import CannotGoOn
from envs.stopping import check, held
from experiments.commands.sft import SftArgs
from experiments.console import LiveProgress, counting_bar, reading_bar
from experiments.limits import check_split
from experiments.manifest import package_versions
from experiments.presets import adapter_folder, model_folder
from experiments.run_lock import RunLock
from ictjax import keys
from ictjax.batch import Batch
from ictjax.chat import ChatTokenizer
from ictjax.checkpoint import Checkpointer, check_space
from ictjax.config import (
    BatchConfig,
    LearnerConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
)
from ictjax.json_lines import read_records
from ictjax.learner import (
    LearnerState,
    ModelFunctions,
    init_state,
    make_optimizer,
    make_update,
    state_shardings,
    token_logprobs,
    transformer_functions,
)
from ictjax.mesh import open_mesh, split_rows
from ictjax.metrics import Clock, MetricsWriter
from ictjax.models.attention_choice import attention_of, platform_of, resolve
from ictjax.models.config import ModelConfig, frozen_dtype
from ictjax.models.hf import content_hash, save_checkpoint
from ictjax.models.hf.content import file_sha256
from ictjax.models.hf.json_file import read_json
from ictjax.models.hf.reader import read_config
from ictjax.models.peft import read_lora, save_adapter
from ictjax.models.transformer import Params
from ictjax.players import frozen_weights, learner_shapes, start_weights
from ictjax.ranges import shown
from ictjax.records import Message
from ictjax.run_config import TrainedRoleConfig
from ictjax.run_files import write_lines
from ictjax.sft import LIKELIHOOD, LOSS, Chat, cut, encode_chat, in_rows, pack_chats

_RECORD = "sft.json"
_MAX_EXAMPLES = 3  # that a refusal names
# Flags that change nothing of what is learned. Another mesh or another split of the work sums in
# another order: equal up to rounding.
_FREE = ("out", "every", "save_dtype", "microbatches", "remat", "data_parallel", "fsdp", "tensor")
# flags whose files are known by their content, wherever they lie
_BY_CONTENT = ("model", "data", "adapter", "held_out")


class Data(NamedTuple):
    """What is trained on, and what is not."""

    train: list[Chat]
    held_out: list[Chat]
    counts: dict[str, int]


def train_on_chats(
    args: SftArgs,
    console: Console,
    *,
    thinking: bool | None = None,
    remedy: str = "give the same, or name another folder with --out",
) -> None:
    """Trains, or goes on, and writes the adapter or the model.

    Where the rows of a step do not divide over microbatches and devices, rows of padding are added:
    what is learned in a step is the same on every mesh.

    Args:
      thinking: the chat template's switch; None leaves it as it is.
      remedy: what to do where the folder is of another training.

    Raises:
      ValueError: a model, chats or a folder that do not fit; nothing is overwritten then.
      CannotGoOn: the loss is no longer finite.
    """
    folder = pathlib.Path(model_folder(args.model, "--model"))
    tokenizer = ChatTokenizer(folder, thinking=thinking)
    model = read_config(folder).with_dtype(args.dtype)
    role = TrainedRoleConfig(
        model=str(folder),
        adapter=_start(args),
        dtype=args.dtype,
        mesh=MeshConfig(data=args.data_parallel, fsdp=args.fsdp, tensor=args.tensor),
        lora=LoraConfig(rank=args.rank, alpha=args.alpha, targets=args.targets),
    )
    _check_fit(args, model, role.mesh)
    data = read_data(args, tokenizer, console)
    plan = _batches(args, data.train)
    record = _record(args, role, data, len(plan))
    with contextlib.ExitStack() as stack:
        args.out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(RunLock(args.out))
        written = _check_same(args, record, remedy)
        checkpointer = stack.enter_context(Checkpointer(args.out / "checkpoints"))
        done = checkpointer.latest_step or 0
        if done == len(plan) and written:
            console.print(
                f"{args.out} is finished: {done} steps. Another --out starts anew.", soft_wrap=True
            )
            return
        write_lines(args.out / _RECORD, [json.dumps(record, indent=1)])
        added = args.padded_rows - args.rows
        padding = f" and {added} row{'' if added == 1 else 's'} of padding" if added else ""
        console.print(
            f"{len(data.train)} chats in {len(plan)} steps of {args.rows} x {args.row_tokens}"
            f" tokens{padding}, {len(data.held_out)} held out.",
            soft_wrap=True,
        )
        most = max(_most_targets(args, data.train, plan), _most_targets(args, data.held_out))
        run = _open(args, role, model, len(plan), most)
        check_space(args.out / "checkpoints", run.shapes, 2)
        if done:
            state, _ = checkpointer.restore(done, run.shapes)
            console.print(f"Going on after step {done}.", soft_wrap=True)
        else:
            state = init_state(start_weights(role, args.seed), run.optimizer)
        writer = stack.enter_context(MetricsWriter(args.out, last_iteration=done))
        progress = stack.enter_context(
            LiveProgress("steps", done=done, total=len(plan), console=console)
        )
        held_out_loss = run.held_out(data.held_out, tokenizer.pad_id)
        # of a training that ended between its last step and what it writes
        measured = held_out_loss(state.params) if done == len(plan) else None
        for step, rows in enumerate(plan[done:], start=done + 1):
            check()
            clock = Clock()
            batch = pack_chats(
                run.sizes,
                [[data.train[number] for number in row] for row in rows],
                tokenizer.pad_id,
            )
            state, learned = run.update(state, run.base, split_rows(batch, run.mesh))
            found = {name: float(value) for name, value in jax.device_get(learned).items()}
            if not np.isfinite(found[LOSS]) or found["bad_leaves"]:
                raise CannotGoOn(
                    f"The loss of step {step} is not finite: lower --learning-rate, and start again"
                    " in another --out."
                )
            values = {
                "loss": found[LOSS],
                "tokens": found["tokens"],
                "grad_norm": found["grad_norm"],
                "skipped": found["skipped"],
            }
            last = step == len(plan)
            if step % args.every == 0 or last:
                measured = values["held_out_loss"] = held_out_loss(state.params)
            clock.lap("step_s")
            with held():
                writer.write(step, values, clock.times)
                if step % args.every == 0 or last:
                    checkpointer.save(step, state, {"iteration": step})
            progress.advance(step, _line(values))
        checkpointer.wait()
        _write(args, role, model, state.params)
        record["result"] = {
            "steps": len(plan),
            "held_out_loss": measured,
            "dtype": _save_dtype(args),
        }
        write_lines(args.out / _RECORD, [json.dumps(record, indent=1)])


def _check_fit(args: SftArgs, model: ModelConfig, mesh: MeshConfig) -> None:
    """Raises ValueError for what a model or this machine has no room for, before anything is
    written.
    """
    if args.row_tokens > model.max_positions:
        raise ValueError(
            f"--row-tokens {args.row_tokens} exceeds the model's {model.max_positions} positions:"
            " lower it."
        )
    if args.rank > model.d_model:
        raise ValueError(
            f"--rank {args.rank} exceeds the width of {args.model}, {model.d_model}: lower it, or"
            " give 0 to train all weights."
        )
    check_split(args.model, model, mesh)
    try:
        open_mesh(mesh)
    except ValueError as error:
        raise ValueError(f"{error} (--data-parallel, --fsdp, --tensor).") from error


def read_data(args: SftArgs, tokenizer: ChatTokenizer, console: Console) -> Data:
    """Reads and encodes all chats.

    Raises:
      ValueError: a line that is no chat, or chats that are too long, naming the first of them.
    """
    chats, counts = _read(args, args.data, "--data", tokenizer, console)
    if args.held_out is not None:
        held_out, more = _read(args, args.held_out, "--held-out", tokenizer, console)
        counts |= {f"held_out_{name}": count for name, count in more.items()}
        train = chats
    else:
        # at least one is trained on
        number = min(round(args.held_out_share * len(chats)), len(chats) - 1)
        order = keys.generator(keys.fold(keys.root_key(args.seed), "held out")).permutation(
            len(chats)
        )
        chosen = set(order[:number].tolist())
        held_out = [chat for index, chat in enumerate(chats) if index in chosen]
        train = [chat for index, chat in enumerate(chats) if index not in chosen]
    return Data(train, held_out, counts | {"trained_on": len(train), "held_out": len(held_out)})


def _read(
    args: SftArgs, path: pathlib.Path, flag: str, tokenizer: ChatTokenizer, console: Console
) -> tuple[list[Chat], dict[str, int]]:
    records = read_records(path).values
    if not records:
        raise ValueError(f"{flag} {path} holds no chats: give one JSON object a line.")
    chats, long = [], []
    with counting_bar(f"encoding {path.name}", console) as advance:
        for line, record in enumerate(records, start=1):
            try:
                chat = encode_chat(tokenizer, _messages(record))
            except ValueError as error:
                raise ValueError(
                    f"Line {line} of {path} is no chat to learn from: {error}."
                ) from error
            if len(chat.ids) > args.row_tokens:
                long.append((line, len(chat.ids)))
                chat = cut(chat, args.row_tokens)
                if args.overlong == "drop" or not chat.num_targets:
                    continue
            chats.append(chat)
            advance(line, len(records))
    if long and args.overlong == "refuse":
        some = ", ".join(f"{length} in line {line}" for line, length in long[:_MAX_EXAMPLES])
        raise ValueError(
            f"{len(long)} of {len(records)} chats of {path} are longer than --row-tokens"
            f" {args.row_tokens} ({some}): raise it, or say --overlong drop or cut."
        )
    if not chats:
        raise ValueError(f"All chats of {path} are too long: raise --row-tokens.")
    return chats, {"chats": len(records), "overlong": len(long)}


def _messages(record: dict[str, Any]) -> list[Message]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise ValueError('it has no "messages", each with a role and a content that are text')
    return [Message(role=message["role"], content=message["content"]) for message in messages]


def _batches(args: SftArgs, chats: Sequence[Chat]) -> list[list[list[int]]]:
    """The rows of every step, as numbers of chats; every epoch in an order of its own."""
    lengths = [len(chat.ids) for chat in chats]
    plan: list[list[list[int]]] = []
    for epoch in range(args.epochs):
        key = keys.fold(keys.root_key(args.seed), "order", epoch)
        order = keys.generator(key).permutation(len(chats)).tolist()
        plan += in_rows(lengths, order, args.rows, args.row_tokens)
    return plan


class _Run(NamedTuple):
    """What a step needs."""

    update: Callable[..., Any]
    functions: ModelFunctions
    optimizer: optax.GradientTransformation
    sizes: BatchConfig
    shapes: LearnerState
    base: Params | None
    mesh: Mesh | None
    rows: int  # of a step; `sizes` has more of them where padding is added

    def held_out(self, chats: Sequence[Chat], pad_id: int) -> Callable[[Params], float | None]:
        """A function of what is trained: the mean loss per token of the held-out replies; None
        where there are none.
        """

        @jax.jit
        def total(trained: Params, base: Params | None, batch: Batch) -> jax.Array:
            logp_br, _ = token_logprobs(
                self.functions,
                self.functions.combine(trained, base),
                batch,
                temperature=1.0,
                positions_per_chunk=LearnerConfig().positions_per_chunk,
            )
            return logp_br.sum()

        lengths = [len(chat.ids) for chat in chats]
        (row_tokens,) = self.sizes.token_buckets
        rows = in_rows(lengths, range(len(chats)), self.rows, row_tokens)
        batches = [
            pack_chats(self.sizes, [[chats[n] for n in row] for row in part], pad_id)
            for part in rows
        ]
        tokens = sum(chat.num_targets for chat in chats)

        def loss(trained: Params) -> float | None:
            if not chats:
                return None
            sums = [total(trained, self.base, split_rows(batch, self.mesh)) for batch in batches]
            return -sum(map(float, sums)) / tokens

        return loss


def _most_targets(
    args: SftArgs, chats: Sequence[Chat], plan: Sequence[Sequence[Sequence[int]]] | None = None
) -> int:
    """The most tokens of replies that a row holds, of a plan or of all chats in order, rounded up
    to a multiple of 64. Logits are computed for as many positions of every row.
    """
    if plan is None:
        lengths = [len(chat.ids) for chat in chats]
        plan = list(in_rows(lengths, range(len(chats)), args.rows, args.row_tokens))
    rows = (sum(chats[number].num_targets for number in row) for part in plan for row in part)
    return min(-(-max(rows, default=0) // 64) * 64, args.row_tokens)


def _open(
    args: SftArgs, role: TrainedRoleConfig, model: ModelConfig, steps: int, most_targets: int
) -> _Run:
    """Reads the frozen weights, and builds the update.

    Args:
      most_targets: tokens of replies in a row.
    """
    mesh = open_mesh(role.mesh)
    optimizer = OptimizerConfig(
        learning_rate=args.learning_rate,
        warmup_steps=min(args.warmup_steps, steps - 1),
        schedule="cosine",
        total_steps=steps,
        weight_decay=args.weight_decay,
    )
    base = None
    if args.rank:
        with reading_bar("reading weights") as reading:
            model, base = frozen_weights(role, mesh, reading)
    functions = transformer_functions(
        model,
        remat=args.remat,
        lora=role.lora,
        mesh=mesh,
        attention=attention_of(resolve("auto", model, platform_of(mesh)), model, mesh),
    )
    shapes = learner_shapes(role, optimizer)
    made = make_optimizer(optimizer)
    return _Run(
        update=make_update(
            functions,
            LIKELIHOOD,
            made,
            LearnerConfig(num_microbatches=args.microbatches),
            shardings=state_shardings(shapes),
        ),
        functions=functions,
        optimizer=made,
        sizes=BatchConfig(
            num_rows=args.padded_rows,
            token_buckets=(args.row_tokens,),
            response_buckets=(most_targets,),
        ),
        shapes=shapes,
        base=base,
        mesh=mesh,
        rows=args.rows,
    )


def _start(args: SftArgs) -> str:
    """The folder of the adapter to start from; empty where a new one is trained. Raises ValueError
    for one that is not what is to be trained.
    """
    if not args.adapter:
        return ""
    folder = adapter_folder(args.adapter, "--adapter")
    lora = read_lora(folder)
    if lora != LoraConfig(rank=args.rank, alpha=args.alpha, targets=args.targets):
        raise ValueError(
            f"The adapter in {args.adapter} is of another form: give --rank {lora.rank} --alpha"
            f" {lora.alpha:g} --targets {' '.join(lora.targets)}."
        )
    return folder


def _record(args: SftArgs, role: TrainedRoleConfig, data: Data, steps: int) -> dict[str, Any]:
    """What the result depends on, and what it was made from and with."""
    settings = {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in dataclasses.asdict(args).items()
        if name not in _FREE
    }
    hashes = {"model": content_hash(pathlib.Path(role.model)), "data": file_sha256(args.data)}
    if role.adapter:
        hashes["adapter"] = content_hash(pathlib.Path(role.adapter))
    if args.held_out is not None:
        hashes["held_out"] = file_sha256(args.held_out)
    return {
        "settings": json.loads(json.dumps(settings)),
        "sha256": hashes,
        "counts": data.counts,
        "targets": sum(chat.num_targets for chat in data.train),
        "steps": steps,
        "packages": package_versions(("ictjax", "jax", "flax", "optax")),
    }


def _save_dtype(args: SftArgs) -> Literal["float32", "bfloat16"]:
    return args.save_dtype or ("float32" if args.rank else frozen_dtype(args.dtype))


def _check_same(args: SftArgs, record: dict[str, Any], remedy: str) -> bool:
    """Whether the folder holds the result already, in the dtype asked for. Raises ValueError
    where it is of another training, naming the first difference.
    """
    out, path = args.out, args.out / _RECORD
    if not path.is_file():
        if (out / "checkpoints").is_dir() or (out / "config.json").is_file():
            raise ValueError(f"{out} is the folder of something else: name another with --out.")
        return False
    before = read_json(path)
    for part in ("settings", "sha256"):
        there, now = before.get(part), record[part]
        there = there if isinstance(there, dict) else {}
        # older folders hold settings that are free by now
        names = now if part == "settings" else {**now, **there}
        for name in names:
            if part == "settings" and name in _BY_CONTENT:
                continue
            if there.get(name) != now.get(name):
                what = f"--{name.replace('_', '-')}" if part == "settings" else f"the {name}"
                raise ValueError(
                    f"{out} was begun with another value of {what} ({shown(there.get(name))}, now"
                    f" {shown(now.get(name))}): {remedy}."
                )
    result = before.get("result")
    return isinstance(result, dict) and result.get("dtype") == _save_dtype(args)


def _write(args: SftArgs, role: TrainedRoleConfig, model: ModelConfig, params: Params) -> None:
    if args.rank:
        save_adapter(args.out, model, role.lora, params, base=args.model, dtype=_save_dtype(args))
    else:
        whole = model.with_param_dtype(_save_dtype(args))
        save_checkpoint(args.out, whole, params, source=role.model)


def _line(values: dict[str, Any]) -> str:
    held_out = values.get("held_out_loss")
    return f"loss {values['loss']:.3f}" + ("" if held_out is None else f"  held out {held_out:.3f}")
