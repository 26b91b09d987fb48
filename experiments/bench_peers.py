"""Other libraries that sample from the weights of this one, for `experiments.bench_sampler`.

Each gets its best case: rows of one length, nothing to pad, and caches as long as each text needs.
"""

import importlib.util
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench_run import fastest_threads
from ictjax.models.config import ModelConfig

PEERS = ("transformers", "tunix")
_NEEDED = {
    "transformers": ("torch", "pip install torch==2.13.0"),
    "tunix": ("tunix", "pip install google-tunix==0.1.7, best beside ictjax in an environment"),
}


class Workload(NamedTuple):
    """Random tokens of conversations, all of one length at a time."""

    openings: list[list[int]]  # [row]: what comes before the first reply
    observations: list[list[list[int]]]  # [later turn][row]
    reply: int  # tokens of each

    @property
    def longest(self) -> int:
        """Tokens of a conversation at its end."""
        later = sum(len(turn[0]) + self.reply for turn in self.observations)
        return len(self.openings[0]) + self.reply + later


class Spent(NamedTuple):
    """Seconds of one run."""

    first: float  # until every conversation has its first token
    total: float

    @property
    def rest(self) -> float:
        return self.total - self.first


class Played(NamedTuple):
    spent: Spent
    replies: list[list[int]]  # of each conversation, one after the other


Design = Callable[[], Played]
Generated = tuple[np.ndarray, float]  # [B, reply] ids; when the first of them were there
Peer = Callable[[np.ndarray, int], Generated]  # whole texts [B, T] -> so many tokens more


def check_peers(names: Sequence[str]) -> None:
    """Raises ValueError for a peer that is not installed."""
    for name in names:
        module, remedy = _NEEDED[name]
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"--against {name} needs the package {module}: install it ({remedy}), or leave it"
                " out."
            )


def open_peer(name: str, folder: pathlib.Path, config: ModelConfig) -> Peer:
    """A peer with the weights of a checkpoint."""
    return (_transformers if name == "transformers" else _tunix)(folder, config)


def play(peer: Peer, work: Workload) -> Played:
    """Greedy, whole texts again in every turn: neither keeps what it computed in the last one."""
    texts = np.array(work.openings)
    replies = []
    start = time.perf_counter()
    ids, first = peer(texts, work.reply)
    replies.append(ids)
    for observed in work.observations:
        texts = np.concatenate([texts, ids, np.array(observed)], axis=1)
        ids, _ = peer(texts, work.reply)
        replies.append(ids)
    end = time.perf_counter()
    return Played(Spent(first - start, end - start), np.concatenate(replies, axis=1).tolist())


def choose_threads(peer: Peer, work: Workload) -> str:
    """Of PyTorch: see `fastest_threads`; on a part of the work that shows it. Says where it runs
    instead, where that is not on these threads.
    """
    if _torch_device() != "cpu":
        return f"on {_torch_device()}"
    return fastest_threads(lambda: peer(np.array(work.openings), min(work.reply, 8)))


def _torch_device() -> str:
    """Where PyTorch computes: beside JAX, if it can."""
    import torch  # an optional package, needed here only

    return "cuda" if jax.default_backend() != "cpu" and torch.cuda.is_available() else "cpu"


class _FirstToken:
    """What `generate` calls with the prompt, and then with the tokens of every step."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0.0

    def put(self, _: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """There is nothing to finish."""


def _transformers(folder: pathlib.Path, config: ModelConfig) -> Peer:
    """`generate` with its KV cache inside a turn."""
    import torch  # an optional package, needed here only
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device = _torch_device()
    model = (
        transformers.Qwen2ForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, config.dtype), trust_remote_code=False
        )
        .to(device)
        .eval()
    )

    def generate(texts: np.ndarray, count: int) -> Generated:
        tokens, streamer = torch.from_numpy(texts).to(device), _FirstToken()
        settings = transformers.GenerationConfig(
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        with torch.inference_mode():
            found = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=settings,
                streamer=streamer,
            )
        return found[:, texts.shape[1] :].cpu().numpy(), streamer.at

    return generate


class _Ids:
    """A tokenizer of Tunix for texts that are ids already; none of them pads or ends."""

    def encode(self, text: np.ndarray) -> list[int]:
        return text.tolist()

    def decode(self, _: Sequence[int]) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # Tunix puts none before a text

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return -1


def _tunix(folder: pathlib.Path, config: ModelConfig) -> Peer:
    """Its own sampler and model, a cache of exactly the length that is needed."""
    from tunix.generate import sampler as tunix_sampler  # an optional package, needed here only
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2 import params as qwen2_params

    model = qwen2_params.create_model_from_safe_tensors(
        str(folder),
        qwen2.ModelConfig(
            num_layers=config.num_layers,
            vocab_size=config.vocab_size,
            embed_dim=config.d_model,
            hidden_dim=config.d_ff,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            rope_theta=int(config.rope_theta),
            norm_eps=config.norm_eps,
        ),
        dtype=jnp.dtype(config.dtype),
    )
    engines: dict[int, tuple[Any, list[float]]] = {}  # by cache size

    def engine(size: int) -> tuple[Any, list[float]]:
        if size not in engines:
            sizes = tunix_sampler.CacheConfig(
                cache_size=size,
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
            )
            made, times = tunix_sampler.Sampler(model, _Ids(), sizes), []
            made._compiled_prefill_fn = _stamped(made._compiled_prefill_fn, times)
            engines[size] = made, times
        return engines[size]

    def generate(texts: np.ndarray, count: int) -> Generated:
        length = texts.shape[1]
        made, times = engine(length + count)
        times.clear()
        found = made(
            list(texts), max_generation_steps=count, max_prompt_length=length, eos_tokens=[-1]
        )
        return np.array([np.asarray(ids) for ids in found.tokens]), times[0]

    return generate


def _stamped(prefill: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    """Notes when the first tokens are there, which is when a prefill of Tunix is done."""

    def run(*args: Any, **kwargs: Any) -> Any:
        state = jax.block_until_ready(prefill(*args, **kwargs))
        times.append(time.perf_counter())
        return state

    return run
