"""torch.compile of blocks with built-in routers, as trainer.compile=true does, changes nothing."""

import copy
from typing import Any

import pytest
import torch

from moesaic.models import MoEConfig, build_decoder, llama4_toy

ARGUMENTS: dict[str, dict[str, Any]] = {"mlp": {"router_dim": 8, "depth_average": True}}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the tracer about itself
@pytest.mark.parametrize("name", ["capacity", "hash", "mlp", "relu", "sinkhorn"])  # one of each kind
def test_compiled_blocks_give_the_same_outputs_and_gradients(name: str) -> None:
    torch._dynamo.reset()
    moe = MoEConfig(num_experts=4, hidden_dim=8, top_k=2, router={"type": name, **ARGUMENTS.get(name, {})})
    plain = build_decoder(llama4_toy(num_layers=2, nope_layer_interval=0, moe=moe))
    compiled = copy.deepcopy(plain)
    compiled.layers[1].compile(backend="eager")
    tokens = torch.randint(0, 512, (2, 20))
    outputs = [decoder(tokens).logits for decoder in (plain, compiled)]
    torch.testing.assert_close(*outputs)
    for logits in outputs:
        logits.square().mean().backward()
    for (parameter, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=parameter)
