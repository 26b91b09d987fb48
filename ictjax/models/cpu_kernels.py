"""Products with packed weights, attention over cached rows, and what is sampled from, on CPUs:
`cpu_kernels.cc`, compiled for this machine when a sampler first wants it.

XLA multiplies few rows at a third to two thirds of a core's rate, since it brings the weights into
the order that its kernels read in every step; here they are brought into it once. That is a second
copy of them, which is why larger models do without.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from envs.cache_files import cache_file
from ictjax.models.cache import CachedLayer
from ictjax.models.config import ModelConfig

_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
_SECONDS = 120  # to compile it: about 4 on an idle core
_MOST_BYTES = 2 * 2**30  # of packed weights
_LARGE_PAGE = 2 * 2**20
_LEAST_GATHERED = 2**20
_MADV_COLLAPSE = 25  # of Linux's mman-common.h
_SWITCH = "ICTJAX_CPU_KERNELS"


class Kernels(NamedTuple):
    """What the compiled code is like."""

    columns: int  # of a panel of packed weights
    deep: int  # inputs that lie side by side in bfloat16
    lanes: int  # numbers of a vector


class Unavailable(Exception):
    """The code cannot be compiled or loaded here; says why."""


def load() -> Kernels:
    """Compiles the code unless this machine has done so before, and registers it with JAX; tried
    once.

    Raises:
      Unavailable: there is no compiler, or it failed.
    """
    loaded = _loaded()
    if isinstance(loaded, Unavailable):
        raise loaded
    return loaded


@functools.cache
def _loaded() -> Kernels | Unavailable:
    try:
        library = ctypes.CDLL(str(_compiled()))
        targets = {
            name: getattr(library, name)
            for name in ("ictjax_multiply", "ictjax_attend", "ictjax_summarise")
        }
    except Unavailable as error:
        return error
    except (OSError, AttributeError) as error:
        return Unavailable(f"{_SOURCE.name} cannot be loaded: {error}")
    for name, target in targets.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(target), platform="cpu")
    return Kernels(library.ictjax_columns(), library.ictjax_deep(), library.ictjax_lanes())


def why_not(config: ModelConfig, num_devices: int = 1) -> str:
    """Why a sampler of this model on CPUs does without; empty if nothing stands against it."""
    if os.environ.get(_SWITCH, "on") == "off":
        return f"{_SWITCH} is off"
    if num_devices > 1:
        return "its mesh has several devices"
    if config.dtype != "float32":
        return f"the model computes {config.dtype}"
    if config.weights != "float":
        return f"its weights are {config.weights}"
    held = config.num_params * jnp.dtype(config.products or config.dtype).itemsize
    if held > _MOST_BYTES:
        return f"a second copy of the weights would take {held / 2**30:.1f} GiB"
    try:
        load()
    except Unavailable as error:
        return str(error)
    return ""


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Samplers that are opened in it leave all to XLA, as with ICTJAX_CPU_KERNELS=off."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "off"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["panels"], meta_fields=["outputs"]
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """Matrices of the same inputs, side by side as one [K, N], in the order in which it is read:
    panels of C of its outputs (P of them, the last one filled up with zeros), in which E
    consecutive inputs of an output lie side by side.
    """

    panels: Float[Array, "P K/E C E"]
    outputs: tuple[tuple[int, ...], ...]  # the axes of what each gives; N counts them all

    def multiply(self, x: Float[Array, "..."], axes: int = 1) -> list[Float[Array, "..."]]:
        """Hidden states, float32, over their last `axes` axes (K inputs in all) times each of the
        matrices: the other axes of x, and then those of the matrix. For bfloat16 panels they are
        rounded to it; sums are float32.
        """
        rows = x.shape[: x.ndim - axes]
        flat_bk = x.reshape(math.prod(rows), math.prod(x.shape[x.ndim - axes :]))
        sizes = [math.prod(output) for output in self.outputs]
        result = jax.ShapeDtypeStruct((len(flat_bk), sum(sizes)), jnp.float32)
        y_bn = jax.ffi.ffi_call("ictjax_multiply", result)(flat_bk, self.panels)
        parts = jnp.split(y_bn, list(itertools.accumulate(sizes[:-1])), axis=1)
        return [
            part_bn.reshape(*rows, *output)
            for part_bn, output in zip(parts, self.outputs, strict=True)
        ]


def attend(
    q_btnh: Float[Array, "B T N H"],
    k_btkh: Float[Array, "B T K H"],
    v_btkh: Float[Array, "B T K H"],
    cos_sin: tuple[Float[Array, "B T 1 H/2"], ...],
    held: CachedLayer,
    positions_bt: Int[Array, "B T"],
    written_bt: Int[Array, "B T"],
    *,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], CachedLayer]:
    """Rotates queries and keys of new tokens, writes keys and values to their rows of a cache, then
    computes `attention.attend` over the positions up to each token's own: no other is read. Of up
    to 8 tokens a row, each gets the same bits as alone.

    Args:
      cos_sin: see `rotary.rotate`.
      held: without scales; updated in place if nobody else uses it.
      written_bt: where to. Tokens whose position no row has are padding: not written, their result
        is 0.
      window: positions back that a token sees, its own included; None for all.
      scale: H ** -0.5 unless given.
    """
    arrays = (q_btnh, held.k, held.v)
    results = [jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in arrays]
    call = jax.ffi.ffi_call("ictjax_attend", results, input_output_aliases={5: 1, 6: 2})
    mixed_btnh, k_bkhs, v_bksh = call(
        q_btnh,
        k_btkh,
        v_btkh,
        *cos_sin,
        held.k,
        held.v,
        positions_bt,
        written_bt,
        window=np.int32(window or 0),
        scale=np.float32(q_btnh.shape[-1] ** -0.5 if scale is None else scale),
    )
    return mixed_btnh, CachedLayer(k_bkhs, v_bksh)


def summarise(
    logits_bv: Float[Array, "B V"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The likeliest id of each row, the lowest of equals, and `jax.nn.logsumexp` of the row."""
    shape = logits_bv.shape[:1]
    results = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32))
    ids_b, normaliser_b = jax.ffi.ffi_call("ictjax_summarise", results)(logits_bv)
    return ids_b, normaliser_b


def use_large_pages(arrays: Iterable[Array]) -> None:
    """Asks Linux (6.1 or later) to gather the memory of arrays of 1 MiB and more, on CPUs, into
    pages of 2 MiB: whoever reads a lot of it looks up fewer addresses. Where it does not, they stay
    as they are.
    """
    if sys.platform != "linux":
        return
    gather = ctypes.CDLL(None).madvise
    gather.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for array in arrays:
        if array.nbytes >= _LEAST_GATHERED:
            begin = array.unsafe_buffer_pointer()
            first, last = begin // _LARGE_PAGE, -(-(begin + array.nbytes) // _LARGE_PAGE)
            gather(first * _LARGE_PAGE, (last - first) * _LARGE_PAGE, _MADV_COLLAPSE)


def attends(kernels: Kernels, head_dim: int) -> bool:
    """Whether `attend` takes heads of this width."""
    return head_dim % kernels.lanes == 0


@functools.partial(jax.jit, static_argnums=1, static_argnames="transposed")
def _pack(weights: Sequence[Array], num_inputs: int, *, transposed: bool) -> Packed:
    kernels = load()

    def matrix(weight: Array) -> Array:
        if transposed:
            return weight.reshape(-1, weight.shape[-1]).T
        return weight.reshape(math.prod(weight.shape[:num_inputs]), -1)

    matrix_kn = jnp.concatenate([matrix(weight) for weight in weights], axis=1)
    deep = kernels.deep if matrix_kn.dtype == jnp.bfloat16 else 1
    depth, wide = matrix_kn.shape
    matrix_kn = jnp.pad(matrix_kn, ((0, -depth % deep), (0, -wide % kernels.columns)))
    panels = matrix_kn.reshape(-1, deep, matrix_kn.shape[1] // kernels.columns, kernels.columns)
    outputs = (one.shape[:-1] if transposed else one.shape[num_inputs:] for one in weights)
    return Packed(panels.transpose(2, 0, 3, 1), tuple(outputs))


# What was packed of which arrays, for as long as somebody holds both.
_MADE: dict[
    tuple[tuple[int, ...], int, bool], tuple[list[weakref.ref[Array]], weakref.ref[Packed]]
] = {}


def pack(weights: Sequence[Array], num_inputs: int, *, transposed: bool = False) -> Packed:
    """Weights, whose first `num_inputs` axes they are summed over (the last one, where they are
    transposed); of the same arrays once for everybody who holds them.

    Args:
      weights: float32 or bfloat16, all of one type and of the same inputs.

    Raises:
      Unavailable: see `load`.
    """
    key = tuple(map(id, weights)), num_inputs, transposed
    if key in _MADE:
        sources, made = _MADE[key]
        same = all(source() is one for source, one in zip(sources, weights, strict=True))
        if same and (packed := made()) is not None:
            return packed
    packed = _pack(list(weights), num_inputs, transposed=transposed)
    use_large_pages([packed.panels])
    forget = functools.partial(_MADE.pop, key, None)
    sources = [weakref.ref(one, lambda _: forget()) for one in weights]
    _MADE[key] = sources, weakref.ref(packed)
    return packed


def _compiled() -> pathlib.Path:
    """The library of this source, compiler, processor and JAX; compiled if it is not there."""
    try:
        program, *flags = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        if (found := shutil.which(program)) is None:
            raise Unavailable(f"there is no C++ compiler {program} (c++, or what CXX names)")
        compiler = [found, *flags]
        command = [*compiler, *_FLAGS, "-isystem", jax.ffi.include_dir()]
        # what -march=native stands for belongs to the processor, and is in what this prints
        native = _run([*compiler, "-march=native", "-E", "-dM", "-x", "c++", os.devnull])
        made_of = (_SOURCE.read_text(), native, jax.__version__, platform.machine(), *command[1:])
        digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
        target = cache_file(f"cpu_kernels-{digest}.so")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as beside:
                made = pathlib.Path(beside) / target.name
                _run([*command, str(_SOURCE), "-o", str(made)])
                made.replace(target)
    except (OSError, ValueError) as error:
        raise Unavailable(f"{_SOURCE.name} cannot be compiled: {error}") from error
    return target


def _run(command: list[str]) -> str:
    """What a command printed; Unavailable with its last complaint if it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took longer than {_SECONDS} s") from error
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise Unavailable(f"{command[0]} cannot compile {_SOURCE.name}: {complaint}")
    return done.stdout
