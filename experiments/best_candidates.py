"""A reflector that is taught the best candidates of a training, by supervised training on them:
that of the arm sft-best.

Kept in the folder of the evaluation's setting, SETTING/sft-best/ of the run: chats.jsonl, the
weights, and what they were made from and with (sft.json). A stopped training goes on, a finished
one is read, on the same devices or others.
"""

import math
import pathlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.console import Console

from experiments.commands.sft import SftArgs
from experiments.sft import train_on_chats
from experiments.training_records import Group, iterations, read_groups
from ictjax.chat import ChatTokenizer
from ictjax.checkpoint import CheckpointReader
from ictjax.json_lines import to_json_line
from ictjax.models.hf.json_file import read_json
from ictjax.models.hf.reader import read_config
from ictjax.models.transformer import Params
from ictjax.players import trained_shapes
from ictjax.records import Message, context_from_dict
from ictjax.reflector import reflector_messages
from ictjax.run_config import TrainConfig
from ictjax.run_files import write_lines
from ictjax.sft import encode_chat

Json = dict[str, Any]

_ROUND = 64  # tokens, to which the length of rows is rounded up


def best_candidates(
    groups: Iterable[Group], families: Collection[str], number: int
) -> list[tuple[Group, Json]]:
    """Of every context the candidate with the highest reward (of equals the first), where another
    one got less; of these the `number` with the highest, earlier ones first among equals, in the
    order of training. Groups of other families, which were not to be trained on, never count.
    """
    found = []
    for group in groups:
        usable = [
            row
            for row in group.candidates
            if row["system_prompt"] is not None and row["reward"] is not None
        ]
        rewards = [row["reward"] for row in group.candidates if row["reward"] is not None]
        if group.family not in families or not usable:
            continue
        best = max(usable, key=lambda row: row["reward"])
        if best["reward"] > min(rewards):
            found.append((group, best))
    ranked = sorted(range(len(found)), key=lambda place: -found[place][1]["reward"])
    return [found[place] for place in sorted(ranked[:number])]


class BestCandidates:
    """The teaching of one run's reflector.

    Args:
      run_dir: of the run; its records up to iteration `step` are learned from.
      config: of the run, its models by their folders; `evaluation.sft` says how much is learned.
      folder: where chats and weights are kept.
    """

    def __init__(self, run_dir: pathlib.Path, config: TrainConfig, step: int, folder: pathlib.Path):
        self._run_dir, self._config, self._step, self.folder = run_dir, config, step, folder

    def teach(self, console: Console) -> None:
        """Trains the reflector of before training, or goes on, or does nothing where that is done.

        Raises:
          ValueError: the run has kept no candidate that is better than another one.
        """
        config, sft = self._config, self._config.evaluation.sft
        groups = (
            group
            for number in iterations(self._run_dir, self._step)
            for group in read_groups(self._run_dir, number)
        )
        chosen = best_candidates(
            groups, config.task.environment.train_families, config.evaluation.sft.examples
        )
        if not chosen:
            raise ValueError(
                f"{self._run_dir} has kept no candidate with a higher reward than another one of"
                " its context: leave out the arm sft-best."
            )
        tokenizer = ChatTokenizer(config.reflector.model, thinking=config.reflector.thinking)
        chats = [self._chat(tokenizer, *one) for one in chosen]
        longest = max(len(encode_chat(tokenizer, chat).ids) for chat in chats)
        most = read_config(pathlib.Path(config.reflector.model)).max_positions
        data = self.folder / "chats.jsonl"
        write_lines(data, map(_line, chats))
        mesh, lora = config.reflector.mesh, config.reflector.lora
        args = SftArgs(
            model=config.reflector.model,
            adapter=config.reflector.adapter,
            data=data,
            out=self.folder,
            held_out_share=0.0,
            epochs=sft.epochs,
            rows=self._rows_before() or sft.rows,
            row_tokens=min(math.ceil(longest / _ROUND) * _ROUND, most),
            learning_rate=sft.learning_rate,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            dtype=config.reflector.dtype,
            remat=config.remat,
            data_parallel=mesh.data,
            fsdp=mesh.fsdp,
            tensor=mesh.tensor,
            seed=config.seed % 2**31,
        )
        train_on_chats(
            args,
            console,
            thinking=config.reflector.thinking,
            remedy=f"remove {self.folder.parent} to play this evaluation again",
        )

    def weights(self) -> Params:
        """What was trained, as `ictjax.players.restore_trained` has it of a run."""
        with CheckpointReader(self.folder / "checkpoints") as reader:
            shapes = {"params": trained_shapes(self._config).params}
            part, _ = reader.restore_part(reader.steps[-1], shapes)
        return part["params"]

    def budget(self) -> dict[str, int]:
        """What teaching took, once for all families: steps, and tokens of replies that were
        learned. What the run took that wrote these is `experiments.training_cost`.
        """
        record = read_json(self.folder / "sft.json")
        return {
            "training_steps": record["steps"],
            "training_tokens": record["targets"] * self._config.evaluation.sft.epochs,
        }

    def _rows_before(self) -> int:
        """Rows of a step that a teaching here was begun with, which older versions rounded up to
        the devices; 0 where none was. The number asked for is the same: the folder is of it.
        """
        path = self.folder / "sft.json"
        settings = read_json(path).get("settings") if path.is_file() else None
        rows = settings.get("rows") if isinstance(settings, dict) else None
        return rows if isinstance(rows, int) else 0

    def _chat(self, tokenizer: ChatTokenizer, group: Group, candidate: Json) -> list[Message]:
        """What the reflector was asked, and what it answered."""
        asked = reflector_messages(
            context_from_dict(group.context),
            self._config.reflection,
            lambda messages: len(tokenizer.encode_start(messages)),
        )
        return [*asked, Message(role="assistant", content=candidate["reply"])]


def _line(chat: Sequence[Message]) -> str:
    messages = [{"role": message.role, "content": message.content} for message in chat]
    return to_json_line({"messages": messages})
