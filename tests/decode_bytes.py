"""Bytes that one decode step moves between a chip's memory and its cores, in the program of the
compiler for TPUs: python -m tests.decode_bytes TOPOLOGY prints those of two layers with embedding,
head and sampling.

The shape is that of Qwen2.5-7B, split over all chips of the topology, with 64 rows of 2,048
positions in pages. In a process of its own: the compiler reads the environment once.

The compiler's own sum ("bytes accessed") is no measure: it counts what is prefetched twice, and of
a kernel all that it could read. Counted here is every instruction of the step, what it reads of
arrays in the chip's memory and what it writes there (others lie in the cores' own, S(1) and more
in the text). A kernel moves what it tells the compiler (`cost_estimate`): of attention the pages of
full rows, of writing the page that each row adds to, read and written.
"""

import math
import re
import sys
from collections.abc import Iterator

from experiments.commands.plan import prepare
from experiments.machines import machine

ROWS, POSITIONS = 64, 2048

_BYTES = {"pred": 1, "bf16": 2}
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_ESTIMATE = re.compile(r'cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
_NAMES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}  # of what is there
_PARTS = {"gather", "dynamic-slice"}  # they read as much as they give


def bytes_of_step(text: str) -> int:
    """Of one turn of a program's longest loop."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if found := _HEAD.match(line):
            name = found[1]
            computations[name] = []
        elif name and not line.startswith("}"):
            computations[name].append(re.sub(r"/\*.*?\*/", "", line))
    bodies = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    step = max(bodies, key=lambda body: len(computations[body]))
    return sum(_moved(computations, step))


def _moved(computations: dict[str, list[str]], name: str) -> Iterator[int]:
    results: dict[str, str] = {}
    for line in computations[name]:
        if (found := _INSTRUCTION.match(line)) is None:  # blank
            continue
        results[found[1]] = found[2]
        if found[3] in _NAMES or found[3].endswith("-done"):  # what began was counted
            continue
        if estimate := _ESTIMATE.search(line):
            yield int(estimate[1])
            continue
        operands = re.findall(r"%([\w.\-]+)", found[4].split("), ")[0])
        if found[3].endswith("-start"):  # what it reads stands beside what it gives
            source = results[operands[0]]
            yield _size(found[2]) - _size(source) if _in_memory(source) else 0
            yield _in_memory(found[2]) - _in_memory(source)
            continue
        called = re.search(r"calls=%?([\w.\-]+)", line)
        inside = {} if called is None else _read_in_parts(computations[called[1]])
        for number, operand in enumerate(operands):
            whole = _in_memory(results[operand])
            yield min(whole, inside.get(number, whole))
        yield _in_memory(found[2])


def _read_in_parts(fused: list[str]) -> dict[int, int]:
    """Bytes read of those operands of a fusion that are only looked up in, by their number."""
    found = [match for line in fused if (match := _INSTRUCTION.match(line))]
    read: dict[int, int] = {}
    for parameter in found:
        if parameter[3] != "parameter":
            continue
        users = [match for match in found if re.search(rf"%{re.escape(parameter[1])}\b", match[4])]
        if users and all(user[3] in _PARTS for user in users):
            read[int(parameter[4].split(")")[0])] = sum(_size(user[2]) for user in users)
    return read


def _in_memory(shape: str) -> int:
    return sum(_size(array[0]) for array in _ARRAY.finditer(shape) if "S(" not in (array[3] or ""))


def _size(shape: str) -> int:
    return sum(
        math.prod(int(size) for size in array[2].split(",") if size)
        * _BYTES.get(array[1], int(re.sub(r"\D", "", array[1]) or 8) // 8)
        for array in _ARRAY.finditer(shape)
    )


def main(topology: str) -> None:
    """Compiles them, and prints their bytes."""
    wanted = machine(topology)
    prepare(wanted)
    # JAX reads what is prepared above
    from experiments.places import place_of
    from experiments.plan_programs import mesh_on, sampling_shapes
    from ictjax.config import MeshConfig, SamplerConfig
    from ictjax.models.config import ModelConfig
    from ictjax.sampler.blueprint import Blueprint, TurnShape

    sizes = SamplerConfig(
        num_slots=ROWS,
        max_len=POSITIONS,
        extend_buckets=(64,),
        row_buckets=(ROWS,),
        decode_steps=8,
        max_top_k=1,
        page_size=128,
        num_pages=ROWS * POSITIONS // 128,
        attention="pallas_tpu",
    )
    mesh = mesh_on(place_of(wanted).devices, MeshConfig(tensor=wanted.count))
    model = ModelConfig(
        vocab_size=152_064,
        num_layers=2,
        d_model=3584,
        d_ff=18_944,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        tie_embeddings=False,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
    made = Blueprint(config=model, sizes=sizes, pad_id=0, mesh=mesh)
    program = made.turn(
        sampling_shapes(model, mesh, None), made.cache_shapes(), TurnShape(ROWS, 1, POSITIONS)
    )
    print(bytes_of_step(program.compile().as_text()))


if __name__ == "__main__":
    main(sys.argv[1])
