"""Experts spread over ranks by transformers, and by us, in one model: the same logits and gradients.

Attention, norms, embedding and head are transformers' on both sides; the MoE layers are theirs, or ours with their
weights. transformers lays experts out by its own code, with all-to-alls and an all-reduce of its own.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.comparing import redraw
from torch import Tensor, distributed, nn

from moesaic.layers import MoE
from moesaic.layers.all_to_all import AllToAllDispatcher
from moesaic.layers.local import held
from moesaic.parallel.workers import Workers

pytest.importorskip("accelerate", reason="transformers lays models out with the accelerate package")
transformers = pytest.importorskip("transformers", minversion="5.23")  # the first whose native experts train rightly

VOCABULARY, DIM, HIDDEN, EXPERTS, LENGTH = 61, 32, 24, 8, 9
Learned = tuple[Tensor, dict[str, Tensor]]


def make(directory: Path, **changes: Any) -> None:
    """A Qwen3-MoE with weights at which mistakes show."""
    sizes = {
        **{"vocab_size": VOCABULARY, "hidden_size": DIM, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
        **{"num_experts": EXPERTS, "moe_intermediate_size": HIDDEN, "num_experts_per_tok": 2, "norm_topk_prob": True},
    }
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**sizes, **changes}))
    redraw(model).save_pretrained(directory)


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (4, LENGTH), generator=draw)
    return tokens, torch.randn(4, LENGTH, VOCABULARY, generator=draw)


def learn(model: nn.Module, tokens: Tensor, upstream: Tensor) -> Learned:
    logits = model(tokens, use_cache=False).logits
    logits.backward(upstream)
    return logits.detach().clone(), {
        name: each.grad for name, each in model.named_parameters() if each.grad is not None
    }


def theirs(directory: str, options: dict[str, Any] | None) -> Learned:
    """On one process, or with experts spread over all ranks."""
    from transformers.distributed import DistributedConfig

    how, rank, ranks = {}, 0, 1
    if options is not None:
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        how = {"distributed_config": DistributedConfig(**options)}
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32, **how).train()
    if options is not None:
        experts = [each for name, each in model.named_parameters() if ".experts." in name]
        assert [held(each).size(0) for each in experts] == [EXPERTS // ranks] * 4, (
            "two layers have their experts spread"
        )
    is_shared = options is not None and "fsdp_size" in options  # then the batch is, and gradients are means over ranks
    share = (rank, ranks) if is_shared else (0, 1)
    logits, gradients = learn(model, *(each.chunk(share[1])[share[0]] for each in batch()))
    return logits, {name: whole(each).clone() * share[1] for name, each in gradients.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def ours(directory: str) -> Learned:
    """With our layers in the place of theirs, each rank with its share of the batch and of the experts."""
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    for layer in model.model.layers:
        block = layer.mlp
        layer.mlp = MoE.build(
            *(DIM, HIDDEN, EXPERTS),
            **{"top_k": 2, "score_function": "softmax", "normalize_scores": block.gate.norm_topk_prob},
            **{"score_before_experts": False, "shared_hidden_dim": 0},
            dispatcher=AllToAllDispatcher(distributed.group.WORLD),  # type: ignore[arg-type]
        )
        layer.mlp.router.weight = nn.Parameter(block.gate.weight.detach())
        for name in ("gate_up_proj", "down_proj"):  # theirs are (out, in)
            own = getattr(block.experts, name).detach().transpose(1, 2).chunk(ranks)[rank]
            setattr(layer.mlp.experts, name, nn.Parameter(own.contiguous()))
    logits, gradients = learn(model, *(each.chunk(ranks)[rank] for each in batch()))
    return logits, {
        name.replace(".router.", ".gate."): each.transpose(1, 2) if ".experts." in name else each
        for name, each in gradients.items()
    }


def together(results: list[Learned]) -> Learned:
    logits = torch.cat([each[0] for each in results])
    gradients = {}
    for name in results[0][1]:
        parts = [each[1][name] for each in results]
        gradients[name] = torch.cat(parts) if ".experts." in name else torch.stack(parts).sum(0)
    return logits, gradients


def require_close(found: Learned, wanted: Learned, tolerance: float = 2e-5) -> None:
    assert wanted[0].std() > 0.5, "logits this small hide mistakes"
    assert found[1].keys() == wanted[1].keys()
    for name, one, other in [("logits", found[0], wanted[0]), *((n, found[1][n], g) for n, g in wanted[1].items())]:
        scale = float(other.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(one, other, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


LAYOUTS = {
    # each rank has its share of the batch, as with us
    "all-to-all": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    # both have all of it, and share the matrices of attention
    "all-reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
}


@pytest.mark.slow_but_for("True")
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_over_two_ranks_are_those_of_transformers(
    workers: Workers, tmp_path: Path, layout: str, normalized: bool
) -> None:
    make(tmp_path, norm_topk_prob=normalized)
    mine = together(workers.run(ours, 2, str(tmp_path)))
    results = workers.run(theirs, 2, str(tmp_path), LAYOUTS[layout])
    logits = torch.cat([each[0] for each in results]) if "fsdp_size" in LAYOUTS[layout] else results[0][0]
    require_close(mine, (logits, results[0][1]))
    require_close(mine, theirs(str(tmp_path), None))
