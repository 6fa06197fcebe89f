"""What parts say of themselves, and what is assumed of modules that say nothing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers import Attention, MoE, Parametrization, Routing, TopKRouter, parameter_kinds
from moesaic.layers.mixture import experts_per_token
from moesaic.layers.part import active_parameters, cache_bytes, flops_per_token, initialize


class Mamba(nn.Module):
    """The parameters of a selective scan, as its own implementation marks them."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(8, 16, bias=False)
        self.conv1d = nn.Conv1d(16, 16, 4, groups=16)
        self.A_log = nn.Parameter(torch.zeros(16, 4))
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.D = nn.Parameter(torch.ones(16))


class Unsaid(nn.Module):
    """A router that says nothing of itself."""

    def __init__(self, dim: int = 8, num_experts: int = 4, top_k: int = 1) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.keys = nn.Parameter(torch.randn(num_experts, dim))
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.temperature * (x @ self.keys.T)
        scores, ids = logits.sigmoid().topk(self.top_k)
        return logits, scores, ids


class Threshold(Unsaid):
    """Every expert above a threshold: tokens have different numbers of experts, some none."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.keys.T
        chosen = logits > 1.0
        ids = torch.arange(self.num_experts).expand_as(logits).masked_fill(~chosen, self.num_experts)
        return logits, logits.sigmoid(), ids


class Asking(Unsaid):
    """A router that must be given ids, and what the one before it left."""

    def forward(self, x: Tensor, token_ids: Tensor, router_state: Tensor | None) -> Routing:  # type: ignore[override]
        logits, scores, ids = super().forward(x)
        before = torch.zeros_like(logits) if router_state is None else router_state
        return Routing(logits + before, scores, (ids + token_ids[:, None]) % self.num_experts, state=logits)


def with_router(router: nn.Module, **options: Any) -> MoE:
    return MoE.build(8, 6, 4, router=router, backend="loop", **options)


def test_kinds_by_default() -> None:
    kinds = parameter_kinds(Mamba())
    assert kinds == {
        "A_log": "vector",
        "D": "vector",
        "in_proj.weight": "matrix",
        "conv1d.weight": "vector",
        "conv1d.bias": "vector",
    }
    assert list(kinds) == [name for name, _ in Mamba().named_parameters()]
    assert parameter_kinds(nn.Embedding(3, 2)) == {"weight": "embedding"}


def test_a_router_is_output_like_whatever_its_class() -> None:
    for router in (TopKRouter(8, 4), Unsaid()):
        kinds = parameter_kinds(with_router(router))
        assert kinds["experts.gate_up_proj"] == kinds["shared_expert.up_proj.weight"] == "matrix"
        found = {name: kind for name, kind in kinds.items() if name.startswith("router.")}
        assert set(found.values()) <= {"output", "vector"} and "output" in found.values()


def test_what_a_router_declares_is_respected() -> None:
    class Deep(Unsaid):
        def parameter_kinds(self) -> dict[str, str]:
            return {"keys": "matrix"}

    assert parameter_kinds(with_router(Deep()))["router.keys"] == "matrix"


@pytest.mark.parametrize("declared", [{"absent": "matrix"}, {"keys": "tensor"}])
def test_a_wrong_declaration_is_refused(declared: dict[str, str]) -> None:
    router = Unsaid()
    router.parameter_kinds = lambda: declared  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"Unsaid\.parameter_kinds.*must be one of its parameters \(keys, temp"):
        parameter_kinds(router)


def test_flops_of_a_quadratic_mixer_are_measured() -> None:
    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            return torch.tril(q @ q.mT) @ x

    for length in (16, 64):
        flops = flops_per_token(Quadratic(), length, 1, length, 8)
        assert flops.source == "measured"
        assert flops.per_token == 2 * 8 * 8 + 2 * (2 * length * 8)


def test_flops_of_our_attention_grow_as_torch_counts_them() -> None:
    """The declared form is over visible keys; without a chunk torch counts twice as many, those under the mask too."""
    layer = Attention(8, num_heads=2)
    matrices = 2 * 4 * 8 * 8
    assert layer.flops_per_token(1) == matrices + 4 * 8
    assert layer.flops_per_token(9) == matrices + 4 * 8 * 5


def test_parts_that_look_at_numbers_are_run_on_real_ones() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y, which = torch.zeros_like(x), torch.arange(x.size(0)) % 4
            for e, expert in enumerate(self.experts):
                rows = (which == e).nonzero().flatten().tolist()
                y[rows] = expert(x[rows])
            return y

    part = Sparse()
    flops = flops_per_token(part, 16, 16, 8)
    assert flops == (2 * 8 * 8, "measured")
    assert active_parameters(part, flops) == 8 * 8, "one of four experts"


def test_what_cannot_be_run_is_assumed_and_says_so() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(8, 8, device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            return x * float(self.weight.sum())

    assert flops_per_token(Broken(), 16, 1, 16, 8) == (2 * 8 * 8, "assumed")


def test_experts_per_token() -> None:
    assert experts_per_token(TopKRouter(8, 4, top_k=3), 4, 8, 1) == 3
    assert experts_per_token(Unsaid(top_k=2), 4, 8, 1) == 2
    assert experts_per_token(Asking(top_k=2), 4, 8, 1) == 2
    said, asking = (with_router(router).flops_per_token(16) for router in (Unsaid(), Asking()))
    assert said == asking > 0
    mean = experts_per_token(Threshold(), 4, 8, 1)
    assert 0 < mean < 4 and mean != round(mean)
    assert experts_per_token(Threshold().to("meta"), 4, 8, 2.5) == 2.5
    router, state = Threshold(), torch.get_rng_state()
    experts_per_token(router, 4, 8, 1)
    assert torch.equal(state, torch.get_rng_state())


def test_flops_and_active_parameters_follow_the_router() -> None:
    expert, shared, router = 3 * 8 * 6, 3 * 8 * 6, 4 * 8
    one = with_router(TopKRouter(8, 4))
    all_four = with_router(Unsaid(top_k=4))
    assert one.flops_per_token(16) == 2 * (router + shared + expert)
    assert all_four.flops_per_token(16) == 2 * (router + shared + 4 * expert)
    assert one.active_parameters() == router + shared + expert
    assert all_four.active_parameters() == sum(p.numel() for p in all_four.parameters())


def test_cache_bytes() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def make_cache(self) -> dict[str, Tensor]:
            return {}

        def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
            cache["state"] = self.proj(x).sum(dim=1)
            return x

    assert cache_bytes(Recurrent(), 100, torch.float32, 8) == 8 * 4
    assert cache_bytes(Attention(8, num_heads=2, attention_chunk_size=16), 100, torch.bfloat16, 8) == 16 * 2 * 8 * 2
    assert cache_bytes(nn.Linear(8, 8), 100, torch.float32, 8) == 0


def test_initialize_reaches_our_parts_and_leaves_custom_ones_alone() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            nn.init.ones_(self.inner.weight)

    class Asks(Own):
        def initialize(self, parametrization: Parametrization) -> None:
            nn.init.constant_(self.inner.weight, parametrization.std("matrix", 4))

    own, asks, moe = Own(), Asks(), MoE.build(64, 64, 8)
    for part in (own, asks, moe):
        initialize(part, Parametrization(0.5))
    assert (own.inner.weight == 1).all()
    assert (asks.inner.weight == 0.5).all()
    assert 0.4 < moe.experts.gate_up_proj.std().item() < 0.6
    initialize(moe, Parametrization(None))
    assert 0.1 < moe.experts.gate_up_proj.std().item() < 0.15, "1 / sqrt(64)"


# ---- an id of E means "no expert"


def dense_reference(moe: MoE, x: Tensor) -> Tensor:
    """Every expert on every token, weighted by the scores of the slots that chose it."""
    _, scores, ids = moe.router(x)[:3]
    y = torch.zeros_like(x)
    for e in range(4):
        weight = (scores * (ids == e)).sum(dim=1, keepdim=True)
        gate, up = (x @ moe.experts.gate_up_proj[e]).chunk(2, dim=-1)
        y = y + weight * ((F.silu(gate) * up) @ moe.experts.down_proj[e])
    return y


@pytest.mark.parametrize("backend", ["loop", "padded", "sliced", "sliced_recompute", "grouped"])
def test_tokens_have_as_many_experts_as_the_router_says(backend: str) -> None:
    dtype = torch.float32 if backend == "grouped" else torch.float64
    moe = MoE.build(8, 8, 4, router=Threshold(), backend=backend, shared_hidden_dim=0, score_before_experts=False).to(
        dtype
    )
    x = torch.randn(40, 8, dtype=dtype, requires_grad=True)
    y, routing = moe.forward_with_routing(x)
    chosen = int((routing.expert_ids < 4).sum())
    assert 0 < chosen < 160 and routing.num_rows == chosen
    assert routing.tokens_per_expert.sum() == chosen
    assert (routing.scores[routing.expert_ids == 4] == 0).all()
    assert (routing.expert_ids == 4).all(dim=1).any(), "some token has no expert"
    expected = dense_reference(moe, x)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    names = [name for name, p in moe.named_parameters() if name != "router.temperature"]
    leaves = [x, *(moe.get_parameter(name) for name in names)]
    for name, ours, theirs in zip(
        ["x", *names],
        torch.autograd.grad(y, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_no_token_has_an_expert() -> None:
    moe = with_router(Threshold())
    x = torch.zeros(5, 8, requires_grad=True)
    y, routing = moe.forward_with_routing(x)
    assert routing.num_rows == 0 and routing.tokens_per_expert.tolist() == [0] * 4
    torch.testing.assert_close(y, moe.shared_expert(x))  # type: ignore[misc]
    y.sum().backward()


@pytest.mark.parametrize("backend", ["loop", "padded", "sliced", "grouped"])
def test_a_routers_own_counts_do_not_matter(backend: str) -> None:
    class Miscounts(Unsaid):
        def forward(self, x: Tensor) -> Routing:  # type: ignore[override]
            return Routing(*super().forward(x), torch.tensor([1, 0, 0, 0]))

    torch.manual_seed(1)
    wrong = MoE.build(8, 8, 4, router=Miscounts(), backend=backend)
    x = torch.randn(9, 8)
    y, routing = wrong.forward_with_routing(x)
    assert routing.tokens_per_expert.sum() == 9
    right = MoE.build(8, 8, 4, router=Unsaid(), backend="loop")
    right.load_state_dict(wrong.state_dict())
    torch.testing.assert_close(y, right(x))


@pytest.mark.parametrize("bad", [-1, 5])
def test_an_id_out_of_range_is_an_error(bad: int) -> None:
    class Wild(Unsaid):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, scores, ids = super().forward(x)
            return logits, scores, torch.full_like(ids, bad)

    with pytest.raises(ValueError, match=r"Wild chose expert_ids .* must be 0 to 3, or 4 for no expert"):
        with_router(Wild())(torch.randn(3, 8))


def test_a_router_with_other_shapes_is_named() -> None:
    class Flat(Unsaid):
        def forward(self, x: Tensor) -> Routing:  # type: ignore[override]
            return Routing(*super().forward(x), state=x[:, 0])

    with pytest.raises(ValueError, match=r"Flat: state of shape \(3,\); must be \(3, any\)"):
        with_router(Flat())(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"Unsaid returned logits \(3, 5\).*for 3 tokens and 4 experts"):
        with_router(Unsaid(num_experts=5))(torch.randn(3, 8))


# ---- replay


@pytest.mark.parametrize("normalize", [False, True])
def test_replaying_its_own_choice_changes_nothing(normalize: bool) -> None:
    moe = MoE.build(8, 6, 4, top_k=2, normalize_scores=normalize, score_function="softmax").double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    y, routing = moe.forward_with_routing(x)
    again, replayed = moe.forward_with_routing(x, routing=routing)
    assert torch.equal(y, again)
    assert replayed.replayed and not routing.replayed
    live = torch.autograd.grad(y.square().sum(), list(moe.parameters()))
    replay = torch.autograd.grad(again.square().sum(), list(moe.parameters()))
    for (name, _), a, b in zip(moe.named_parameters(), live, replay, strict=True):
        assert torch.equal(a, b), name


def test_replay_of_a_foreign_choice_has_the_gradient_of_a_live_one() -> None:
    """The scores come from all logits, so ids outside of today's top-k teach the router too."""

    class Forced(TopKRouter):
        ids: Tensor

        def select(self, logits: Tensor, probabilities: Tensor) -> Tensor:
            return self.ids

    moe = MoE.build(8, 6, 4, top_k=2).double()
    forced = MoE.build(8, 6, 4, router=Forced(8, 4, top_k=2)).double()
    forced.load_state_dict(moe.state_dict())
    x = torch.randn(6, 8, dtype=torch.float64)
    ids = torch.tensor([[0, 1], [3, 2], [1, 1], [2, 4], [4, 4], [0, 3]])  # 4: no expert
    forced.router.ids = ids  # type: ignore[assignment]
    given = Routing(torch.zeros(6, 4), torch.zeros(6, 2), ids)
    y, routing = moe.forward_with_routing(x, routing=given)
    expected = forced(x)
    torch.testing.assert_close(y, expected)
    assert routing.tokens_per_expert.tolist() == [2, 3, 2, 2]
    ours = torch.autograd.grad(y.square().sum(), list(moe.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), list(forced.parameters()))
    for (name, _), a, b in zip(moe.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    assert ours[0].abs().sum() > 0


def test_a_router_that_cannot_replay_says_what_it_must_take() -> None:
    moe = with_router(Unsaid())
    _, routing = moe.forward_with_routing(torch.randn(3, 8))
    with pytest.raises(ValueError, match="Unsaid cannot replay a choice; its forward must take expert_ids"):
        moe.forward_with_routing(torch.randn(3, 8), routing=routing)


def test_a_backend_that_gives_way_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    moe = MoE.build(10, 6, 4, backend="grouped")
    for _ in range(3):
        moe(torch.randn(3, 10))
    said = [record.getMessage() for record in caplog.records if "dim=10" in record.getMessage()]
    assert len(said) == 1
    assert "backend='grouped' gives way to 'sliced': grouped_mm needs rows of a multiple of 16 bytes" in said[0]


# ---- custom classes that are more than what they inherit


class Noisy(TopKRouter):
    """Two matrices, and a choice of its own that leaves slots without an expert."""

    def __init__(self) -> None:
        super().__init__(8, 4, top_k=2)
        self.noise = nn.Linear(8, 4, bias=False)

    def select(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        ids = logits.topk(2).indices
        return torch.stack((ids[:, 0], torch.full_like(ids[:, 0], 4)), dim=1)

    def forward(self, x: Tensor, expert_ids: Tensor | None = None) -> Routing:
        decided = super().forward(x, expert_ids)
        return decided._replace(scores=decided.scores + 0 * self.noise(x).sum(dim=1, keepdim=True))


def test_a_subclass_is_measured_not_believed() -> None:
    moe = with_router(Noisy())
    kinds = parameter_kinds(moe)
    assert kinds["router.noise.weight"] == kinds["router.weight"] == "output"
    assert experts_per_token(moe.router, 4, 8, 2) == 1
    assert flops_per_token(moe.router, 16, 16, 8) == (2 * 2 * 8 * 4, "measured")


def test_a_router_that_declares_one_kind_has_defaults_for_the_others() -> None:
    class Partly(Unsaid):
        def parameter_kinds(self) -> dict[str, str]:
            return {"temperature": "vector"}

    assert parameter_kinds(with_router(Partly()))["router.keys"] == "output"


def test_grouped_products_and_attention_on_a_cpu_are_counted() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            half = int(x.abs().sum() >= 0) * x.size(0) // 2  # looks at numbers, so it runs on real ones
            offsets = torch.tensor([half, x.size(0)], dtype=torch.int32)
            x = F.grouped_mm(x, self.weight, offs=offsets)
            q = x.view(1, 1, *x.shape)
            return F.scaled_dot_product_attention(q, q, q).view_as(x)

    flops = flops_per_token(Grouped(), 16, 16, 8)
    assert flops == (2 * 8 * 8 + 2 * 2 * 16 * 8, "measured")


def test_a_cache_made_from_the_parameters_is_filled() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def make_cache(self) -> dict[str, Tensor]:
            return {"state": torch.zeros(1, 8, device=self.q.weight.device, dtype=self.q.weight.dtype)}

        def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
            cache["state"] = cache["state"] + self.q(x).sum(dim=1)
            return x

    assert cache_bytes(Keeps(), 10, torch.bfloat16, 8) == 8 * 2


def test_tied_parameters_have_one_kind() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 5, bias=False)
            self.embedding = nn.Embedding(5, 8)
            self.embedding.weight = self.head.weight

    assert parameter_kinds(Tied()) == {"head.weight": "embedding", "embedding.weight": "embedding"}
    assert parameter_kinds(nn.EmbeddingBag(3, 2)) == {"weight": "embedding"}


def test_a_router_that_ignores_the_replayed_choice_is_refused() -> None:
    class Ignores(Unsaid):
        def forward(self, x: Tensor, expert_ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
            return super().forward(x)

    moe, x = with_router(Ignores()), torch.randn(6, 8)
    _, routing = moe.forward_with_routing(x)
    with pytest.raises(ValueError, match=r"must take expert_ids \(T, K\), score these experts and return them"):
        moe.forward_with_routing(x, routing=routing._replace(expert_ids=(routing.expert_ids + 1) % 4))


def test_unmarked_parameters_of_a_state_space_mixer_are_no_matrices() -> None:
    mixer = nn.Module()
    mixer.A_log, mixer.filter = nn.Parameter(torch.zeros(16, 4)), nn.Parameter(torch.zeros(16, 1, 4))
    mixer.mix = nn.Parameter(torch.zeros(16, 4))
    assert parameter_kinds(mixer) == {"A_log": "vector", "filter": "vector", "mix": "matrix"}
