"""An exported model that trains on in transformers' Trainer, on one process or on several; to copy from.

    moesaic convert RUN/checkpoints/last.ckpt exported
    moesaic tokenize TEXTS ids checkpoint=RUN/checkpoints/last.ckpt
    torchrun --nproc-per-node=2 -m moesaic.examples.continue_in_transformers exported ids continued
    moesaic convert continued/model back.ckpt

transformers lays the model out itself, by `DistributedConfig`: FSDP2 shards all weights over all processes, and experts
are spread over `--expert-parallel` of them. The windows and their order are those of `moesaic train` with that seed.

The optimizer is AdamW without weight decay at a constant rate, and its moments begin at zero. Not in it: balance losses
and selection biases.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]  # in no __all__ of theirs

from moesaic.data import DataConfig, load_data, training_loader
from moesaic.errors import InputError

__all__ = ["Windows", "continue_training", "layout", "main"]

# a block at a time is gathered, by transformers' own rules; for Llama 4 those lack the prefix and match nothing
BLOCKS = {
    "model.embed_tokens": "free_full_weight",
    "model.layers.*": "free_full_weight",
    "model.norm": "keep_full_weight",
}


class Windows(Dataset[dict[str, Tensor]]):
    """The windows (L,) of `num_examples` examples, in the order in which `moesaic train` takes them."""

    def __init__(self, ids: Path, vocab_size: int, *, seq_len: int, num_examples: int, seed: int) -> None:
        data = load_data(DataConfig(source="memmap", path=str(ids)))
        if data.vocab_size > vocab_size:
            raise InputError(f"{ids}: it has {data.vocab_size} ids; must be at most the model's {vocab_size}")
        self.loader = training_loader(data, seq_len=seq_len, batch_size=1, num_batches=num_examples, seed=seed)

    def __len__(self) -> int:
        return len(self.loader)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        batch = self.loader.batch(i)
        tokens, labels = batch["tokens"][0], batch["labels"][0]
        # ours are the next tokens already: under the name `labels` alone transformers would shift them again
        return {"input_ids": tokens, "labels": labels, "shift_labels": labels}


def layout(config: Any, processes: int, expert_parallel: int | None = None) -> DistributedConfig | None:
    """How transformers lays out a model on so many processes; None on one.

    Args:
        config: the model's.
        expert_parallel: processes that the experts are spread over; None for all, where transformers can.

    Raises:
        InputError: a number that does not divide, or an architecture whose experts transformers does not spread.
    """
    can_spread = bool(getattr(config, "base_model_ep_plan", None))
    spread = (processes if can_spread else 1) if expert_parallel is None else expert_parallel
    experts = int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1)
    if spread < 1 or processes % spread or experts % spread:
        raise InputError(
            f"--expert-parallel {spread}: must divide the number of processes, {processes}, and of experts, {experts}"
        )
    if spread > 1 and not can_spread:
        raise InputError(f"--expert-parallel {spread}: must be 1, transformers has no plan for {config.model_type}")
    if processes == 1:
        return None
    return DistributedConfig(fsdp_size=processes, fsdp_plan=BLOCKS, ep_size=spread, ep_implementation="all_to_all")


def continue_training(
    exported: Path,
    ids: Path,
    output: Path,
    *,
    steps: int = 100,
    batch_size: int = 8,
    seq_len: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
    expert_parallel: int | None = None,
) -> list[dict[str, float]]:
    """Train on each process of a launcher, and write the whole model to `output`/model.

    Args:
        batch_size: windows of a step on each process.

    Returns:
        `loss` and `grad_norm` of each step, which the first process also prints, a JSON object in a line.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    config = AutoConfig.from_pretrained(exported)
    config.use_cache = False
    laid_out = layout(config, processes, expert_parallel)
    windows = Windows(ids, config.vocab_size, seq_len=seq_len, num_examples=steps * batch_size * processes, seed=seed)
    arguments = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    model = AutoModelForCausalLM.from_pretrained(
        exported, config=config, dtype=torch.float32, **({} if laid_out is None else {"distributed_config": laid_out})
    )
    trainer = Trainer(model, arguments, train_dataset=windows)
    trainer.remove_callback(PrinterCallback)  # the losses are printed at the end
    trainer.train()
    trainer.save_model(str(output / "model"))
    rows = [{key: row[key] for key in ("loss", "grad_norm")} for row in trainer.state.log_history if "loss" in row]
    if trainer.is_world_process_zero():
        print(*map(json.dumps, rows), sep="\n")
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moesaic.examples.continue_in_transformers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, meaning in (
        ("exported", "a directory that moesaic convert wrote"),
        ("ids", "a directory that moesaic tokenize wrote"),
        ("output", "a directory for what the Trainer writes"),
    ):
        parser.add_argument(name, type=Path, help=meaning)
    for name, number, meaning in (
        ("steps", 100, "optimizer steps"),
        ("batch-size", 8, "windows of a step on each process"),
        ("seq-len", 128, "tokens of a window"),
        ("seed", 0, "of the order of windows"),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"{meaning}; {number}")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="constant; 0.001")
    parser.add_argument("--expert-parallel", type=int, help="processes that the experts are spread over; all")
    try:
        continue_training(**vars(parser.parse_args(given)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
