"""The same update by TRL: its GRPO loss function and fused head in PyTorch, on transformers' Qwen2,
with PyTorch's AdamW.
"""

import collections
import contextlib
import importlib.util
import time
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.bench_run import Design, fastest_threads
from ictjax.config import GRPOConfig, OptimizerConfig

_INSTALL = "pip install trl==1.16.0 torch==2.13.0"


class Episodes(NamedTuple):
    """What is learned from; lengths are the same in all samples, so nothing is padded."""

    prompts: Sequence[Sequence[int]]  # of every sample
    replies: Sequence[Sequence[int]]
    advantages: Sequence[float]


def check_installed() -> None:
    """Raises ValueError where TRL or PyTorch is missing."""
    if any(importlib.util.find_spec(name) is None for name in ("trl", "torch")):
        raise ValueError(
            f"--against trl needs TRL and PyTorch: install them ({_INSTALL}), best beside ictjax in"
            " an environment of their own."
        )


def trl_design(
    policy: str,
    reference: str,
    episodes: Episodes,
    *,
    config: GRPOConfig,
    optimizer: OptimizerConfig,
    microbatches: int,
) -> tuple[Design, str]:
    """One optimizer step: log-probabilities of the reference, loss, gradients, clip, AdamW; without
    activation checkpointing. Rows hold one reply each, with a copy of its prompt.

    What TRL's trainer would hold is a stand-in with the attributes that its two functions read.

    Args:
      policy: a folder with a checkpoint of the weights that are trained.
      reference: the same of the frozen ones.
      config: token means, two-sided clip and KL by k3, which TRL calls "bnpo".

    Returns:
      The design, and a sentence on PyTorch's threads.
    """
    import torch  # optional packages, needed here only
    import transformers
    from trl import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    transformers.utils.logging.disable_progress_bar()

    def load(folder: str, outputs: tuple[str, ...]) -> Any:
        model = transformers.Qwen2ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
        add_fused_lm_head(model, temperature=config.temperature, outputs=outputs)
        return model.train()

    model = load(policy, ("log_probs", "entropy"))
    frozen = load(reference, ("log_probs",)).requires_grad_(False)
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=optimizer.learning_rate,
        betas=(optimizer.b1, optimizer.b2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    trainer = _trainer(config, microbatches, model)
    trainer._get_per_token_logps_and_entropies = types.MethodType(
        GRPOTrainer._get_per_token_logps_and_entropies, trainer
    )
    parts = _parts(episodes, microbatches)

    def reference_logps(part: dict[str, Any]) -> Any:
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
        with torch.no_grad():
            found = trainer._get_per_token_logps_and_entropies(
                frozen, ids, torch.ones_like(ids), part["completion_ids"].shape[1]
            )
        return found[0]

    def step() -> tuple[float, dict[str, float]]:
        start = time.perf_counter()
        total = 0.0
        for part in parts:
            inputs = part | {"ref_per_token_logps": reference_logps(part)}
            loss = GRPOTrainer._compute_loss(trainer, model, inputs)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
        return time.perf_counter() - start, {"loss": total, "grad_norm": float(norm)}

    first = {name: x[:1] for name, x in parts[0].items()}
    return step, f"TRL ran with {fastest_threads(lambda: reference_logps(first))}."


def _parts(episodes: Episodes, microbatches: int) -> list[dict[str, Any]]:
    import torch

    prompt_ids, completion_ids, advantages = map(torch.tensor, episodes)
    whole = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "advantages": advantages,
    }
    chunks = {name: x.chunk(microbatches) for name, x in whole.items()}
    return [{name: x[index] for name, x in chunks.items()} for index in range(microbatches)]


def _trainer(config: GRPOConfig, microbatches: int, model: Any) -> Any:
    """What TRL 1.16 reads of a GRPOTrainer while it computes a loss, on one process."""
    accelerator = types.SimpleNamespace(
        num_processes=1,
        is_main_process=True,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        sync_gradients=True,
        autocast=contextlib.nullcontext,
    )
    return types.SimpleNamespace(
        accelerator=accelerator,
        model=model,
        args=types.SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1
        ),
        beta=config.kl_coefficient,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        loss_type="bnpo",
        importance_sampling_level="token",
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=microbatches,
        _entropy_bonus_enabled=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
