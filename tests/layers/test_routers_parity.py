"""Our routers against the routers of transformers: the same choice, scores and gradients within rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.layers import GroupLimitedRouter, HashRouter, MoE, Routing, TopKRouter

pytest.importorskip("transformers")

DIM, EXPERTS, TOKENS = 12, 16, 50

Oracle = tuple[nn.Module, nn.Parameter, TopKRouter]


def deepseek_v3(**changes: Any) -> Oracle:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    sizes = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 5, "norm_topk_prob": True} | changes
    config = DeepseekV3Config(hidden_size=DIM, n_routed_experts=EXPERTS, routed_scaling_factor=2.5, **sizes)
    oracle = DeepseekV3TopkRouter(config)
    oracle.e_score_correction_bias.copy_(torch.randn(EXPERTS) * 0.2)
    ours = GroupLimitedRouter(
        DIM,
        EXPERTS,
        top_k=sizes["num_experts_per_tok"],
        num_groups=sizes["n_group"],
        top_groups=sizes["topk_group"],
        normalize_scores=sizes["norm_topk_prob"],
        expert_bias=True,
        scale=2.5,
    )
    assert ours.expert_bias is not None
    ours.expert_bias.copy_(oracle.e_score_correction_bias)
    return oracle, oracle.weight, ours


def gpt_oss() -> Oracle:
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    oracle = GptOssTopKRouter(GptOssConfig(hidden_size=DIM, num_local_experts=EXPERTS, num_experts_per_tok=4))
    nn.init.normal_(oracle.bias)
    ours = TopKRouter(DIM, EXPERTS, top_k=4, score_function="softmax", normalize_scores=True, bias=True)
    assert ours.bias is not None
    with torch.no_grad():
        ours.bias.copy_(oracle.bias)
    return oracle, oracle.weight, ours


def mixtral() -> Oracle:
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    oracle = MixtralTopKRouter(MixtralConfig(hidden_size=DIM, num_local_experts=EXPERTS, num_experts_per_tok=2))
    return oracle, oracle.weight, TopKRouter(DIM, EXPERTS, top_k=2, score_function="softmax", normalize_scores=True)


def qwen3_moe(normalized: bool) -> Oracle:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    sizes = {"num_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 3}
    config = Qwen3MoeConfig(hidden_size=DIM, norm_topk_prob=normalized, **sizes)
    oracle = Qwen3MoeTopKRouter(config)
    ours = TopKRouter(DIM, EXPERTS, top_k=3, score_function="softmax", normalize_scores=normalized)
    return oracle, oracle.weight, ours


def olmoe() -> Oracle:
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    oracle = OlmoeTopKRouter(OlmoeConfig(hidden_size=DIM, num_experts=EXPERTS, num_experts_per_tok=3))
    return oracle, oracle.weight, TopKRouter(DIM, EXPERTS, top_k=3, score_function="softmax")


def deepseek_v4() -> Oracle:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

    oracle = DeepseekV4TopKRouter(v4_config())
    oracle.e_score_correction_bias.copy_(torch.randn(EXPERTS) * 0.2)
    ours = TopKRouter(
        DIM, EXPERTS, top_k=4, score_function="sqrt_softplus", normalize_scores=True, expert_bias=True, scale=1.5
    )
    assert ours.expert_bias is not None
    ours.expert_bias.copy_(oracle.e_score_correction_bias)
    return oracle, oracle.weight, ours


def v4_config() -> Any:
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    return DeepseekV4Config(
        hidden_size=DIM, n_routed_experts=EXPERTS, num_experts_per_tok=4, routed_scaling_factor=1.5, vocab_size=40
    )


ORACLES = {
    "DeepSeek-V3": deepseek_v3,
    "DeepSeek-V3, not normalized": lambda: deepseek_v3(norm_topk_prob=False),
    "DeepSeek-V3, one group": lambda: deepseek_v3(n_group=1, topk_group=1, num_experts_per_tok=8),
    "DeepSeek-V3, full groups": lambda: deepseek_v3(n_group=8, topk_group=2, num_experts_per_tok=4),
    "gpt-oss": gpt_oss,
    "Mixtral": mixtral,
    "Qwen3-MoE, normalized": lambda: qwen3_moe(True),
    "Qwen3-MoE": lambda: qwen3_moe(False),
    "OLMoE": olmoe,
    "DeepSeek-V4": deepseek_v4,
}


@pytest.mark.parametrize("tokens", [TOKENS, 1])
@pytest.mark.parametrize("name", ORACLES)
def test_choice_scores_and_gradients_are_those_of_the_source(name: str, tokens: int) -> None:
    oracle, weight, ours = ORACLES[name]()
    nn.init.normal_(weight, std=0.5)
    with torch.no_grad():
        ours.weight.copy_(weight)
    x = torch.randn(tokens, DIM)
    expected = with_gradients(oracle, x)
    found = with_gradients(ours, x)
    same(found, expected)


def with_gradients(router: nn.Module, x: Tensor, *arguments: Tensor) -> tuple[Routing, list[Tensor]]:
    """The routing with experts in order of their ids, and the gradients of x and the parameters."""
    x = x.clone().requires_grad_()
    logits, scores, ids = router(x, *arguments)[:3]
    ids, order = ids.sort(dim=1)
    scores = scores.gather(1, order)
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3))
    leaves = [x, *router.parameters()]
    leaves = sorted(leaves, key=lambda leaf: (leaf.dim(), tuple(leaf.shape)))
    gradients = torch.autograd.grad((scores * weights).sum() + logits.square().sum(), leaves)
    return Routing(logits, scores, ids), list(gradients)


def same(found: tuple[Routing, list[Tensor]], expected: tuple[Routing, list[Tensor]]) -> None:
    assert torch.equal(found[0].expert_ids, expected[0].expert_ids)
    torch.testing.assert_close(found[0].logits, expected[0].logits)
    torch.testing.assert_close(found[0].scores, expected[0].scores)
    assert len(found[1]) == len(expected[1])
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs)


def test_hash_router_is_that_of_deepseek_v4() -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

    oracle = DeepseekV4HashRouter(v4_config())
    ours = HashRouter(
        DIM, EXPERTS, top_k=4, vocab_size=40, score_function="sqrt_softplus", normalize_scores=True, scale=1.5
    )
    nn.init.normal_(oracle.weight, std=0.5)
    with torch.no_grad():
        ours.weight.copy_(oracle.weight)
    oracle.tid2eid.copy_(ours.token_experts)
    x, ids = torch.randn(TOKENS, DIM), torch.randint(0, 40, (TOKENS,))

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = ours

        def forward(self, x: Tensor, token_ids: Tensor) -> Routing:
            return self.router(x, token_ids=token_ids)

    same(with_gradients(Keyword(), x, ids), with_gradients(oracle, x, ids))


def test_the_whole_block_of_deepseek_v3() -> None:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=DIM,
        n_routed_experts=EXPERTS,
        moe_intermediate_size=10,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    config._experts_implementation = "eager"
    oracle = DeepseekV3MoE(config)
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.3)
    oracle = oracle.double()
    router = GroupLimitedRouter(
        DIM, EXPERTS, top_k=4, num_groups=4, top_groups=2, normalize_scores=True, expert_bias=True, scale=2.5
    )
    moe = MoE.build(DIM, 10, EXPERTS, shared_hidden_dim=10, router=router, score_before_experts=False).double()
    assert moe.shared_expert is not None
    with torch.no_grad():
        router.weight.copy_(oracle.gate.weight)
        moe.experts.gate_up_proj.copy_(oracle.experts.gate_up_proj.transpose(1, 2))
        moe.experts.down_proj.copy_(oracle.experts.down_proj.transpose(1, 2))
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(moe.shared_expert, name).weight.copy_(getattr(oracle.shared_experts, name).weight)
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    outputs = []
    for layer in (moe, oracle):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        outputs.append((y.detach(), leaf.grad))
    # the source computes its scores in fp32
    for mine, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(router.weight.grad, oracle.gate.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        moe.experts.gate_up_proj.grad, oracle.experts.gate_up_proj.grad.transpose(1, 2), rtol=1e-5, atol=1e-5
    )
