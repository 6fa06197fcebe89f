"""torch.compile of blocks with every built-in router, as trainer.compile=true does, changes nothing."""

import copy
from typing import Any

import pytest
import torch

from moesaic.layers import ROUTERS
from moesaic.models import MoEConfig, build_decoder, llama4_toy

ARGUMENTS: dict[str, dict[str, Any]] = {
    "group_limited": {"num_groups": 2, "top_groups": 1},
    "mlp": {"router_dim": 8},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the tracer about itself
@pytest.mark.parametrize("name", ROUTERS)
def test_compiled_blocks_give_the_same_outputs_and_gradients(name: str) -> None:
    torch._dynamo.reset()
    scores: Any = {"score_function": "softmax"} if name == "top_p" else {}
    moe = MoEConfig(num_experts=4, hidden_dim=8, top_k=2, router={"type": name, **ARGUMENTS.get(name, {})}, **scores)
    plain = build_decoder(llama4_toy(num_layers=2, nope_layer_interval=0, moe=moe))
    plain.train(name != "noisy_top_k")  # a compiler draws other noise
    compiled = copy.deepcopy(plain)
    compiled.layers[1].compile(backend="aot_eager")
    tokens = torch.randint(0, 512, (2, 20))
    outputs = [decoder(tokens).logits for decoder in (plain, compiled)]
    torch.testing.assert_close(*outputs)
    for logits in outputs:
        logits.square().mean().backward()
    for (parameter, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None and parameter.endswith("noise_weight")
        else:
            torch.testing.assert_close(a.grad, b.grad, msg=parameter)
