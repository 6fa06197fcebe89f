"""torch.compile of every block, as trainer.compile=true does, changes nothing; traced without a C++ compiler here."""

import copy

import pytest
import torch

from moesaic.models import build_decoder, llama4_toy


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the tracer about itself
def test_compiled_blocks_give_the_same_outputs_and_gradients() -> None:
    torch._dynamo.reset()
    plain = build_decoder(llama4_toy(num_layers=2, nope_layer_interval=2))  # RoPE and dense, NoPE and MoE
    compiled = copy.deepcopy(plain)
    for block in compiled.layers:
        block.compile(backend="aot_eager")
    assert plain.state_dict().keys() == compiled.state_dict().keys(), "no prefix on the names of a checkpoint"
    tokens = torch.randint(0, 512, (2, 20))
    outputs = [decoder(tokens).logits for decoder in (plain, compiled)]
    torch.testing.assert_close(*outputs)
    for logits in outputs:
        logits.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
