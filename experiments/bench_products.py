"""What an update multiplies, beside what it needs, by its traced program: nothing is compiled, and
nothing runs, so that models of any size can be counted on any machine.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from experiments.bench_run import Note, Result
from experiments.commands.bench import ProductsBench
from experiments.estimate import matrix_weights
from experiments.plan_programs import mesh_on, trace_update
from experiments.presets import preset
from experiments.shapes import model_shape
from ictjax.batch import blank
from ictjax.config import BatchConfig, MeshConfig
from ictjax.models.config import ModelConfig
from ictjax.run_config import TrainConfig

_ALONE = MeshConfig(data=1, fsdp=1, tensor=1)


class Products(NamedTuple):
    """FLOPs of matrix products, 2 for each multiplication."""

    weights: float = 0.0
    attention: float = 0.0

    def plus(self, other: "Products", times: float = 1.0) -> "Products":
        """These, and others so many times."""
        return Products(*(a + times * b for a, b in zip(self, other, strict=True)))


def products(program: Jaxpr, blocks: int | None = None) -> Products:
    """What a traced program multiplies, loops as often as they turn.

    Products with batch dimensions are attention's, all others are with weights. Of the branches of
    a condition the one that multiplies most counts. A loop whose bounds are not known is one over
    the blocks of keys that a block of queries may see, or the other way round: half of the
    surrounding loop over all blocks, the diagonal included. What nothing reads is left out, as
    compilers do: gradients of frozen weights, where they are written down beside those of inputs.

    Args:
      program: traced, for example by `plan_programs.trace_update`.
      blocks: turns of the loop around it; None outside of loops.
    """
    total = Products()
    for equation in _read(program):
        inner = list(_inner(equation.params))
        match equation.primitive.name:
            case "dot_general":
                total = total.plus(_product(equation))
            case "cond":
                total = total.plus(max((products(one, blocks) for one in inner), key=sum))
            case "scan":
                turns = equation.params["length"]
                for one in inner:
                    total = total.plus(products(one, turns), turns)
            case "while":
                found = Products()
                for one in inner:
                    found = found.plus(products(one, blocks))
                assert blocks is not None or not any(found), "a loop of unknown bounds in no other"
                total = total.plus(found, ((blocks or 1) + 1) / 2)
            case _:
                for one in inner:
                    total = total.plus(products(one, blocks))
    return total


def _read(program: Jaxpr) -> list[Any]:
    """The equations whose results count."""
    wanted = {one for one in program.outvars if isinstance(one, Var)}
    kept = []
    for equation in reversed(program.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            kept.append(equation)
            wanted.update(one for one in equation.invars if isinstance(one, Var))
    return kept


def _inner(parameters: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs within an equation."""
    for value in parameters.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


def _product(equation: Any) -> Products:
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    size = math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    return Products(attention=2.0 * size) if batched else Products(weights=2.0 * size)


def needed(model: ModelConfig, *, rows: int, tokens: int, replies: int, reply: int) -> Products:
    """6 x weights x tokens, a table that is only looked up in left out, and three times attention
    over the pairs of tokens of which one sees the other.

    Args:
      model: that is trained.
      rows: each a prompt and its replies.
      tokens: of a row.
      replies: of a row.
      reply: tokens of each in the row.
    """
    prompt = tokens - replies * reply
    pairs = rows * (
        prompt * (prompt + 1) / 2 + replies * (reply * prompt + reply * (reply + 1) / 2)
    )
    return Products(
        weights=6.0 * matrix_weights(model) * rows * tokens,
        attention=3 * 4.0 * model.num_layers * model.num_heads * model.head_dim * pairs,
    )


def bench_products(bench: ProductsBench, note: Note) -> Result:
    """Matrix products of the update of every preset at every length."""
    lines = []
    for name in bench.preset:
        config = preset(name)
        model = model_shape(config.reflector)
        adapter = config.reflector.lora.rank
        for tokens in bench.tokens:
            note(f"{name}, {tokens} tokens")
            multiplied = _traced(config, bench, tokens)
            own = _traced(_without_reference(config), bench, tokens)
            least = needed(
                model, rows=bench.rows, tokens=tokens, replies=bench.replies, reply=bench.reply
            )
            lines.append(
                {
                    "preset": name,
                    "trained": f"rank {adapter}" if adapter else "all weights",
                    "tokens_of_a_row": tokens,
                    "weights_tflop": multiplied.weights / 1e12,
                    "attention_tflop": multiplied.attention / 1e12,
                    "needed_weights": least.weights / 1e12,
                    "needed_attention": least.attention / 1e12,
                    "ratio": sum(multiplied) / sum(least),
                    "without_reference": sum(own) / sum(least),
                }
            )
    return Result(
        f"Matrix products of an update: {bench.rows} rows, each of a prompt and {bench.replies}"
        f" replies of {bench.reply} tokens",
        None,
        lines,
        [
            "Of the traced program, loops as often as they turn; nothing has run. Needed: 6 x"
            " weights x tokens, a table that is only looked up in left out, and three times"
            " attention over the pairs that are seen."
        ],
    )


def _traced(config: TrainConfig, bench: ProductsBench, tokens: int) -> Products:
    sizes = BatchConfig(
        num_rows=bench.rows,
        replies_per_row=bench.replies,
        token_buckets=(tokens,),
        response_buckets=(bench.reply,),
    )
    config = dataclasses.replace(
        config, learner=dataclasses.replace(config.learner, num_microbatches=1)
    )
    # kernels of other devices are called as often as their grid is large, which is not counted
    devices = jax.devices("cpu")
    traced = trace_update(
        config, mesh_on(devices, _ALONE), blank(sizes, tokens, bench.reply, pad_id=0)
    )
    return products(traced.jaxpr.jaxpr)


def _without_reference(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, kl="none"))
