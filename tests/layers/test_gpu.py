"""On a CUDA device: the same numbers as on the CPU, by the backend that `auto` takes there."""

import pytest
import torch

from moesaic.layers import Attention, AttentionTemperature, Experts, MoE, RotaryEmbedding
from moesaic.models import build_decoder, generate, llama4_toy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    moe = MoE.build(64, 128, 8, top_k=2)
    x, target = torch.randn(2, 50, 64), torch.randn(2, 50, 64)
    twin = MoE.build(64, 128, 8, top_k=2, device="cuda")
    twin.load_state_dict(moe.state_dict())
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    (moe(x) * target).sum().backward()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        y = twin(x.cuda())
    (y.float() * target.cuda()).sum().backward()
    torch.testing.assert_close(y.float().cpu(), moe(x), **tolerance)
    for (name, a), b in zip(moe.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        error = (a.grad - b.grad.cpu()).norm() / a.grad.norm()
        assert error < (1e-3 if dtype == torch.float32 else 0.05), name


def test_attention_agrees_with_the_cpu() -> None:
    options = {"num_heads": 4, "num_kv_heads": 2, "conv_width": 3}
    for attention in (
        Attention(64, rotary=RotaryEmbedding(16), qk_norm=True, attention_chunk_size=16, **options),
        Attention(64, temperature=AttentionTemperature(0.4, 8), **options),
    ):
        x = torch.randn(2, 50, 64)
        torch.testing.assert_close(attention.cuda()(x.cuda()).cpu(), attention.cpu()(x), rtol=1e-3, atol=1e-3)


def test_generation_with_and_without_cache() -> None:
    decoder = build_decoder(llama4_toy(), device="cuda")
    prompt = torch.randint(0, 512, (1, 5), device="cuda")
    cached, uncached = (generate(decoder, prompt, 20, temperature=0, use_cache=c) for c in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU with FP8"
)
@pytest.mark.parametrize("counts", [[7, 1, 0, 40], [0, 0, 64, 0]])
def test_experts_in_fp8_agree_with_the_emulation(counts: list[int]) -> None:
    results = []
    for backend in ("fp8", "fp8_emulated"):
        torch.manual_seed(0)
        experts = Experts(4, 64, 128, backend=backend, device="cuda", dtype=torch.bfloat16)
        rows = torch.randn(sum(counts), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = experts(rows, torch.tensor(counts, device="cuda"))
        y.backward(torch.randn_like(y))
        gradients = [rows.grad, *(p.grad for p in experts.parameters())]
        results.append([y, *gradients])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() / expected.norm() < 0.02
