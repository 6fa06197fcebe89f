"""How many choices of experts a run's precision changes: the same weights and tokens, in it and in fp32."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoints import load_model
from moesaic.config import from_mapping
from moesaic.data import DataConfig, evaluation_loader, load_data
from moesaic.evaluation.drift import changed_choices
from moesaic.layers import Fp8Recipe, emulating_fp8
from moesaic.models import Decoder

__all__ = ["flipped_choices_evaluation"]

MOST_TOKENS = 8192


@torch.inference_mode()
def flipped_choices_evaluation(
    checkpoint: Path, run_config: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, float]:
    """Share of choices of experts that are others than in fp32, on 8192 tokens of the validation split at most.

    Args:
        run_config: of which the data, the size of a micro-batch and the precision are used; fp8 is emulated.
        options: not used.

    Returns:
        "flipped/LAYER" of every MoE layer, and "flipped", the mean over them; nothing of a model without any.
    """
    model = load_model(checkpoint)
    decoder = model.decoder.eval()
    seq_len, batch_size = (run_config["training"][key] for key in ("seq_len", "batch_size"))
    max_batches = max(1, MOST_TOKENS // (seq_len * batch_size))
    data = load_data(from_mapping(DataConfig, run_config["data"], "data"), model.tokenizer)
    changed: dict[str, list[Tensor]] = {}
    for batch in evaluation_loader(data, seq_len=seq_len, batch_size=batch_size, max_batches=max_batches):
        exact = decoder.hidden_states(batch["tokens"])[1]
        with _precision(decoder, run_config["trainer"]):
            rounded = decoder.hidden_states(batch["tokens"])[1]
        for name, decided in rounded.items():
            flags = changed_choices(exact[name].expert_ids, decided.expert_ids)
            changed.setdefault(name, []).append(flags[batch["valid"].flatten()] if "valid" in batch else flags)
    shares = {f"flipped/{name}": torch.cat(flags).double().mean().item() for name, flags in changed.items()}
    return {**shares, "flipped": sum(shares.values()) / len(shares)} if shares else {}


def _precision(decoder: Decoder, trainer: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    if trainer["precision"] == "fp8":
        return emulating_fp8(decoder, from_mapping(Fp8Recipe, trainer.get("fp8") or {}, "trainer.fp8"))
    is_bf16 = trainer["precision"].startswith("bf16")
    return torch.autocast("cpu", torch.bfloat16, enabled=is_bf16)
