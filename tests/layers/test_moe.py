import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.comparing import assert_close, assert_gradients, redraw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.layers import BACKENDS, FeedForward, MoE, RoutedLayer, Routing, UniformRouter

DIM, HIDDEN = 8, 16


def build(num_experts: int = 4, **arguments: Any) -> MoE:
    arguments = {"dtype": torch.float64, **arguments}
    return redraw(MoE.build(DIM, HIDDEN, num_experts, **arguments))  # type: ignore[return-value]


def ffn(moe: MoE, e: int, x: Tensor) -> Tensor:
    gate, up = x @ moe.experts.gate_up_proj[e, :, :HIDDEN], x @ moe.experts.gate_up_proj[e, :, HIDDEN:]
    return (gate * torch.sigmoid(gate) * up) @ moe.experts.down_proj[e]


def by_token(moe: MoE, x: Tensor, top_k: int, score_function: str, normalize: bool, before: bool) -> Tensor:
    """The layer token by token and expert by expert, without bias."""
    outputs = []
    for token in x.reshape(-1, DIM):
        z = moe.router.weight @ token
        scores = torch.sigmoid(z) if score_function == "sigmoid" else torch.exp(z) / torch.exp(z).sum()
        chosen = sorted(range(z.size(0)), key=lambda e: -z[e].item())[:top_k]
        total = sum(scores[e] for e in chosen)
        y = torch.zeros(DIM, dtype=x.dtype)
        for e in chosen:
            score = scores[e] / total if normalize else scores[e]
            y = y + (ffn(moe, e, score * token) if before else score * ffn(moe, e, token))
        if moe.shared_expert is not None:
            shared = moe.shared_expert
            gate, up = shared.gate_proj.weight @ token, shared.up_proj.weight @ token
            y = y + shared.down_proj.weight @ (gate * torch.sigmoid(gate) * up)
        outputs.append(y)
    return torch.stack(outputs).view_as(x)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "score_function", "normalize", "shared"),
    [
        (4, 1, "sigmoid", False, None),
        (4, 2, "sigmoid", False, 5),
        (4, 2, "softmax", True, 0),
        (3, 3, "softmax", False, 0),
        (4, 3, "sigmoid", True, None),
        (1, 1, "sigmoid", False, 0),
    ],
)
def test_equals_token_by_token(
    num_experts: int, top_k: int, score_function: str, normalize: bool, shared: int | None, before: bool
) -> None:
    moe = build(
        num_experts,
        top_k=top_k,
        score_function=score_function,
        normalize_scores=normalize,
        shared_hidden_dim=shared,
        score_before_experts=before,
    )
    x = torch.randn(2, 4, DIM, dtype=torch.float64)
    results = []
    for run in (moe, lambda x: by_token(moe, x, top_k, score_function, normalize, before)):
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
        grads = {name: p.grad if p.grad is None else p.grad.clone() for name, p in moe.named_parameters()}
        results.append((y.detach(), {"x": leaf.grad, **grads}))
    assert_close(results[0][0], results[1][0], 1e-12, "output")
    assert_gradients(results[0][1], results[1][1], 1e-11)


def test_one_expert_with_softmax_is_the_dense_ffn() -> None:
    dense = FeedForward(DIM, HIDDEN, dtype=torch.float64)
    moe = build(1, shared_hidden_dim=0, score_function="softmax")
    with torch.no_grad():
        moe.experts.gate_up_proj[0] = torch.cat((dense.gate_proj.weight, dense.up_proj.weight)).T
        moe.experts.down_proj[0] = dense.down_proj.weight.T
    x = torch.randn(2, 3, DIM, dtype=torch.float64)
    assert_close(moe(x), dense(x), 1e-13, "output")


def test_the_side_of_the_score_matters() -> None:
    before, after = build(score_before_experts=True), build(score_before_experts=False)
    after.load_state_dict(before.state_dict())
    x = torch.randn(5, DIM, dtype=torch.float64)
    assert (before(x) - after(x)).abs().max() > 0.05


def test_the_shared_expert_is_neither_scored_nor_gated() -> None:
    moe = build()
    assert moe.shared_expert is not None
    with torch.no_grad():
        moe.experts.down_proj.zero_()
    x = torch.randn(5, DIM, dtype=torch.float64)
    assert_close(moe(x), moe.shared_expert(x), 0, "output")


def test_shared_width() -> None:
    assert build(shared_hidden_dim=0).shared_expert is None
    for given_width, width in ((None, HIDDEN), (5, 5)):
        shared = build(shared_hidden_dim=given_width).shared_expert
        assert shared is not None and shared.up_proj.out_features == width


@given(permutation=st.permutations(range(7)), top_k=st.integers(1, 4))
def test_permuting_tokens_permutes_outputs(permutation: list[int], top_k: int) -> None:
    moe = build(top_k=top_k)
    x = torch.randn(7, DIM, dtype=torch.float64)
    assert_close(moe(x[permutation]), moe(x)[permutation], 1e-12, "output")


@given(first=st.integers(1, 6), top_k=st.integers(1, 4))
def test_a_token_does_not_depend_on_its_batch(first: int, top_k: int) -> None:
    moe = build(top_k=top_k)
    x = torch.randn(7, DIM, dtype=torch.float64)
    assert_close(moe(x[:first]), moe(x)[:first], 1e-12, "output")


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
def test_nothing_is_dropped_when_all_tokens_choose_one_expert(backend: str) -> None:
    moe = build(shared_hidden_dim=0, backend=backend, dtype=torch.float32)
    with torch.no_grad():
        moe.router.weight[2] = 100
    x = torch.rand(33, DIM) + 0.1
    y, routing = moe.forward_with_routing(x)
    assert routing.tokens_per_expert.tolist() == [0, 0, 33, 0]
    assert (y.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("before", [True, False])
def test_gradient_reaches_the_router(before: bool) -> None:
    moe = build(score_before_experts=before)
    moe(torch.randn(9, DIM, dtype=torch.float64)).sum().backward()
    assert moe.router.weight.grad is not None and moe.router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
def test_no_tokens(backend: str, top_k: int) -> None:
    moe = build(backend=backend, top_k=top_k, dtype=torch.float32)
    x = torch.randn(2, 0, DIM, requires_grad=True)
    y, routing = moe.forward_with_routing(x)
    assert y.shape == (2, 0, DIM)
    assert routing.tokens_per_expert.tolist() == [0, 0, 0, 0]
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in moe.parameters())


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped", "auto"])
def test_every_parameter_has_a_gradient_when_experts_are_idle(backend: str) -> None:
    moe = build(backend=backend, dtype=torch.float32)
    moe(torch.randn(1, DIM)).sum().backward()
    assert [name for name, p in moe.named_parameters() if p.grad is None] == []
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize("expert_bias", [False, True])
def test_activation_checkpointing(expert_bias: bool) -> None:
    plain = build(top_k=2, expert_bias=expert_bias)
    recomputed = copy.deepcopy(plain)
    state = copy.deepcopy(recomputed.state_dict())
    x = torch.randn(6, DIM, dtype=torch.float64)
    results = []
    for moe, forward in (
        (plain, plain.forward_with_routing),
        (recomputed, lambda x: checkpoint(recomputed.forward_with_routing, x, use_reentrant=False)),
    ):
        leaf = x.clone().requires_grad_()
        y, routing = forward(leaf)
        (y.square().sum() + routing.logits.square().mean()).backward()
        results.append((y, routing, {"x": leaf.grad, **{n: p.grad for n, p in moe.named_parameters()}}))
    (y, routing, grads), (y_again, routing_again, grads_again) = results
    assert_close(y_again, y, 0, "output")
    assert_gradients(grads_again, grads, 0)
    assert torch.equal(routing_again.tokens_per_expert, routing.tokens_per_expert)
    assert routing_again.tokens_per_expert.sum() == 12, "counted once, though the forward pass ran twice"
    for name, tensor in recomputed.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name} was moved by a forward pass"


def test_routing_is_returned_and_not_kept() -> None:
    moe = build()
    before = set(vars(moe)) | set(vars(moe.router))
    y, routing = moe.forward_with_routing(torch.randn(2, 3, DIM, dtype=torch.float64))
    assert set(vars(moe)) | set(vars(moe.router)) == before
    assert routing.logits.shape == (6, 4) and y.shape == (2, 3, DIM)


def test_only_routed_layers_are_routed_layers() -> None:
    assert isinstance(build(), RoutedLayer)
    assert not isinstance(FeedForward(DIM, HIDDEN), RoutedLayer)


def test_parts_are_injected() -> None:
    router = UniformRouter(DIM, 4, dtype=torch.float64)
    parts = build()
    moe = MoE(router=router, experts=parts.experts)
    _, routing = moe.forward_with_routing(torch.randn(8, DIM, dtype=torch.float64))
    assert routing.tokens_per_expert.tolist() == [2, 2, 2, 2]
    assert moe.shared_expert is None


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("backend", ["loop", "padded", "grouped", "auto"])
def test_autocast(backend: str, before: bool) -> None:
    """bf16 reaches the experts; the router decides in fp32."""
    moe = build(backend=backend, top_k=2, score_before_experts=before, dtype=torch.float32)
    x = torch.randn(6, DIM)
    seen: list[torch.dtype] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output.dtype)

    moe.experts.register_forward_hook(record)
    expected, expected_routing = moe.forward_with_routing(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe.forward_with_routing(x)
    assert seen == [torch.float32, torch.bfloat16]
    assert routing.logits.dtype == torch.float32
    assert torch.equal(routing.logits, expected_routing.logits)
    assert torch.equal(routing.expert_ids, expected_routing.expert_ids)
    assert_close(y, expected, 0.03, "output")
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


@pytest.mark.parametrize("backend", ["sliced", "sliced_recompute"])
def test_the_shared_expert_keeps_less_and_computes_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.layers import feed_forward as module

    layer = redraw(MoE.build(dim=8, hidden_dim=16, num_experts=2, backend=backend))
    x = torch.randn(3, 20, 8, requires_grad=True)
    wanted = [x, *layer.parameters()]
    results, kept = [], []
    for limit in (2**20, 0):
        monkeypatch.setattr(module, "LEAN_ELEMENTS", limit)
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
        kept.append(sum(sizes.values()))
    for eager, lean in zip(*results, strict=True):
        torch.testing.assert_close(lean, eager)
    gate_and_up, tokens_by_width = 2 * 16 * 8, 60 * 16
    spared = 2 if backend == "sliced" else 4
    assert kept[0] - kept[1] >= 4 * (spared * tokens_by_width - gate_and_up)


@pytest.mark.parametrize("how", ["hook", "replaced", "bf16"])
def test_a_shared_expert_whose_parts_are_somebody_elses_is_called(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.layers import feed_forward as module

    monkeypatch.setattr(module, "LEAN_ELEMENTS", 0)
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    layer = MoE.build(dim=8, hidden_dim=16, num_experts=2, dtype=dtype)
    calls = []
    if how == "hook":
        layer.shared_expert.down_proj.register_forward_hook(lambda *_: calls.append(1))
    elif how == "replaced":

        class Counting(torch.nn.Linear):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                calls.append(1)
                return super().forward(input)

        layer.shared_expert.down_proj = Counting(16, 8, bias=False)
    else:
        forward = layer.shared_expert.forward
        layer.shared_expert.forward = lambda x: calls.append(1) or forward(x)
    layer(torch.randn(5, 8, dtype=dtype))
    assert calls == [1]


def test_a_router_that_skips_though_it_says_it_never_does_is_named() -> None:
    """Its counts would leave rows that no expert writes."""

    class Skipping(nn.Module):
        may_skip = False

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scores, expert_ids = x[:, :4].sigmoid().topk(2)
            expert_ids = expert_ids.clone()
            expert_ids[::3, 1] = 4
            return x[:, :4], scores, expert_ids

    for backend in sorted(BACKENDS.keys() - {"fp8"}):
        moe = MoE.build(16, 32, 4, router=Skipping(), backend=backend, shared_hidden_dim=0)
        with pytest.raises(ValueError, match=r"Skipping chose expert_ids from 0 to 4; .* with may_skip=False"):
            moe(torch.randn(33, 16))


@pytest.mark.parametrize(
    ("decide", "message"),
    [
        (lambda x: (x[:, :4], x[:, :1]), r"Deciding returned 2 values; must be logits, scores and expert_ids"),
        (lambda x: x[:, :4], r"Deciding returned a Tensor; must be logits, scores and expert_ids"),
        (lambda x: (x[:, :4], x[:, :1], x[:, :1] * 0), r"Deciding returned expert_ids of torch.float32"),
        (lambda x: (x[:, :4], x[:, :4], x[:, :4] > 0), r"Deciding returned expert_ids of torch.bool; .* integers"),
        (lambda x: (None, x[:, :1], x[:, :1].long()), r"Deciding returned logits of type NoneType; .* a tensor"),
        (
            lambda x: (x[:, :4], x[:, :1].double(), x[:, :1].long() * 0),
            r"Deciding returned scores of torch.float64; they must be of torch.float32, as x is",
        ),
    ],
    ids=["two values", "a tensor", "float ids", "a mask for ids", "no logits", "wider scores"],
)
def test_what_a_router_returns_wrongly_is_named(decide: Any, message: str) -> None:
    class Deciding(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return decide(x)

    with pytest.raises(ValueError, match=message):
        MoE.build(16, 32, 4, router=Deciding())(torch.randn(33, 16))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.full((3, 1), 5), ValueError, "expert_ids has 5; must be 0 to 3, or 4 for none"),
        (torch.full((3, 1), -1), ValueError, "expert_ids has -1; must be 0 to 3, or 4 for none"),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"expert_ids of shape \(2, 1\); must be \(3, any\)"),
        (torch.zeros(3, 1), TypeError, r"expert_ids of torch.float32; must be torch.int64 or"),
    ],
    ids=["too high", "negative", "other tokens", "no integers"],
)
def test_a_replayed_choice_that_fits_nothing_is_named(ids: torch.Tensor, error: type[Exception], message: str) -> None:
    given = Routing(torch.zeros(3, 4), torch.zeros(3, 1), ids)
    with pytest.raises(error, match=f"MoE: routing.{message}"):
        MoE.build(16, 32, 4).forward_with_routing(torch.randn(3, 16), routing=given)


def test_a_replayed_choice_may_be_kept_in_few_bytes() -> None:
    moe, x = MoE.build(16, 32, 4), torch.randn(3, 16)
    y, routing = moe.forward_with_routing(x)
    few = routing._replace(expert_ids=routing.expert_ids.to(torch.uint8))
    assert torch.equal(moe.forward_with_routing(x, routing=few)[0], y)


def test_a_replay_of_something_else_is_named() -> None:
    with pytest.raises(TypeError, match="MoE: routing: found Tensor; must be a Routing"):
        MoE.build(16, 32, 4).forward_with_routing(torch.randn(3, 16), torch.zeros(3, 1))  # type: ignore[arg-type]
