"""What routers beyond top-k promise: against slow references, and by what must hold for any input."""

import math
import re
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.layers import (
    ROUTERS,
    CapacityRouter,
    ExpertChoiceRouter,
    GroupLimitedRouter,
    HashRouter,
    MoE,
    NoisyTopKRouter,
    QuantileRouter,
    ReluRouter,
    Routing,
    SinkhornRouter,
    ThresholdRouter,
    TopKRouter,
    TopPRouter,
    count_tokens,
)
from moesaic.layers.routers import RouterName

VOCABULARY = 30
EXTRA: dict[str, dict[str, Any]] = {
    "group_limited": {"num_groups": 2, "top_groups": 1},
    "hash": {"vocab_size": VOCABULARY},
    "top_p": {"score_function": "softmax"},
    "capacity": {"capacity_factor": 1.0},
    "mlp": {"router_dim": 5},
}


def make(name: str, dim: int = 6, num_experts: int = 4, top_k: int = 2, **arguments: Any) -> TopKRouter:
    arguments = {"num_experts": num_experts, "top_k": top_k} | EXTRA.get(name, {}) | arguments
    router = ROUTERS[name](dim, **arguments)  # type: ignore[index]
    if isinstance(router, ThresholdRouter):
        router.thresholds.copy_(torch.linspace(0.4, 0.7, num_experts))
        router.steps += 1
    if isinstance(router, QuantileRouter):
        router.expert_bias.copy_(torch.linspace(-0.1, 0.1, num_experts))
    return router


def make_anew(name: str) -> TopKRouter:
    return ROUTERS[name](6, 4, top_k=2, **EXTRA.get(name, {}))  # type: ignore[index]


def ids_for(x: Tensor) -> Tensor:
    return torch.arange(x.size(0)) % VOCABULARY


def with_identity(router: TopKRouter) -> TopKRouter:
    """The router whose logits are its input (T, E)."""
    with torch.no_grad():
        router.weight.copy_(torch.eye(router.num_experts))
    return router


def mask_of(routing: Routing) -> Tensor:
    """(T, E) bool: which experts a token has."""
    experts = routing.logits.size(1)
    mask = torch.zeros(routing.logits.size(0), experts + 1, dtype=torch.int64)
    mask.scatter_add_(1, routing.expert_ids, torch.ones_like(routing.expert_ids))
    assert (mask[:, :experts] <= 1).all(), "an expert twice"
    return mask[:, :experts].bool()


def test_names_are_those_of_the_type() -> None:
    assert tuple(ROUTERS) == get_args(RouterName)


def tables_of_the_docs() -> list[dict[str, dict[str, str]]]:
    """The tables of docs/routers.md: router -> column -> what stands there."""
    page = (Path(__file__).parents[2] / "docs" / "routers.md").read_text(encoding="utf-8")
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
        found.append({row[0].strip(" |`"): dict(zip(map(str.strip, head), row, strict=True)) for row in rows})
    return found


def arguments_of(router: type[TopKRouter]) -> set[str]:
    """Names of the arguments that it has and `TopKRouter` has not."""
    shared = {"self", "dim", "num_experts", "others", *signature(TopKRouter).parameters}
    return set(signature(router).parameters) - shared


def test_the_tables_in_the_docs_say_what_the_classes_say() -> None:
    gets, takes = tables_of_the_docs()
    words = {True: "yes", False: "no"}
    stated = {
        name: (row["class"], set(re.findall(r"`(\w+)`", row["arguments of its own"])), row["causal"], row["batch"])
        for name, row in gets.items()
    }
    assert stated == {
        name: (f"`{cls.__name__}`", arguments_of(cls), words[cls.causal], words[cls.depends_on_batch])
        for name, cls in ROUTERS.items()
    }
    numbers = {name: row["experts of a token"].startswith(("any number", "up to K")) for name, row in gets.items()}
    assert numbers == {name: make(name).may_skip for name in ROUTERS}
    states = {name: re.findall(r"`(\w+)`", row["state"].partition(";")[0]) for name, row in takes.items()}
    assert states == {name: [key for key, _ in make(name).named_buffers()] for name in ROUTERS}


@pytest.mark.slow_but_for("relu")
@pytest.mark.parametrize("name", ROUTERS)
def test_each_states_causality_and_dependence_on_the_batch(name: str) -> None:
    """By what replacing later tokens, and other sequences, does to the outputs of a layer in training."""
    torch.manual_seed(3)
    router = make(name, capacity_factor=0.5) if name == "capacity" else make(name)
    moe = MoE.build(6, 8, 4, router=router).double()
    moe.router.register_forward_pre_hook(lambda *_: torch.default_generator.manual_seed(1) and None)
    length, sequences = 16, 5
    x = torch.randn(sequences, length, 6, dtype=torch.float64)
    ids = torch.arange(length).repeat(sequences, 1)

    def run(x: Tensor) -> Tensor:
        return moe(x, token_ids=ids[: x.size(0)]).detach()

    y, changed_later, changed_batch = run(x), 0, 0
    alone = run(x[:1])
    for seed in range(12):
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other[seed % 2 :: 2] *= 3
        for t in (1, 5, 11, 15):
            found = run(torch.cat((x[:1, :t], other[:1, t:]), dim=1))
            changed_later += not torch.allclose(found[:, :t], alone[:, :t])
        found = run(torch.cat((other[:1], x[1:])))
        changed_batch += not torch.allclose(found[1:], y[1:])
    assert (changed_later == 0) == router.causal, changed_later
    moved = changed_batch > 0 or (name == "uniform")  # its place in the batch counts, not what is there
    assert moved == router.depends_on_batch, changed_batch


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 4)])
def test_edge_shapes(name: str, tokens: int, experts: int, top_k: int) -> None:
    sizes = {"num_groups": 1, "top_groups": 1, "scored_by": 1} if name == "group_limited" else {}
    if name == "capacity":
        sizes = {"capacity_factor": float(experts)}
    router = make(name, num_experts=experts, top_k=top_k, **sizes)
    moe = MoE.build(6, 8, experts, router=router)
    x = torch.randn(tokens, 6, requires_grad=True)
    y, routing = moe.forward_with_routing(x, token_ids=ids_for(x))
    assert y.shape == x.shape and routing.logits.shape == (tokens, experts)
    assert routing.scores.shape == routing.expert_ids.shape
    assert int(routing.tokens_per_expert.sum()) == int(mask_of(routing).sum())
    y.sum().backward()
    assert router.weight.grad is not None and router.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("backend", ["padded", "grouped", "sliced"])
def test_every_backend_gives_what_the_loop_gives(name: str, backend: Any) -> None:
    router = make(name, dim=8, dtype=torch.float32)
    reference = MoE.build(8, 8, 4, router=router, backend="loop")
    moe = MoE.build(8, 8, 4, router=router, experts=reference.experts, shared_hidden_dim=8)
    moe.shared_expert = reference.shared_expert
    x = torch.randn(33, 8)
    results = []
    for layer, chosen in ((reference, "loop"), (moe, backend)):
        layer.experts.backend = chosen  # type: ignore[assignment]
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        y = layer(leaf, token_ids=ids_for(x))
        gradients = torch.autograd.grad((y * torch.linspace(0, 1, 8)).sum(), [leaf, *layer.experts.parameters()])
        results.append((y.detach(), *gradients))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_replayed_choice_is_the_same_and_moves_nothing(name: str) -> None:
    router = make(name)
    moe = MoE.build(6, 8, 4, router=router)
    x = torch.randn(20, 6)
    torch.manual_seed(2)
    y, routing = moe.forward_with_routing(x, token_ids=ids_for(x))
    state = {key: value.clone() for key, value in router.state_dict().items()}
    torch.manual_seed(2)
    again, replayed = moe.forward_with_routing(x, routing=routing)
    torch.testing.assert_close(again, y)
    assert replayed.replayed and torch.equal(replayed.expert_ids, routing.expert_ids)
    assert all(torch.equal(value, state[key]) for key, value in router.state_dict().items())


@given(
    tokens=st.integers(1, 9),
    groups=st.integers(1, 4),
    size=st.integers(1, 4),
    biased=st.booleans(),
    data=st.data(),
)
def test_group_limited_choice_by_enumeration(
    tokens: int, groups: int, size: int, biased: bool, data: st.DataObject
) -> None:
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    scored_by = data.draw(st.integers(1, size))
    router = GroupLimitedRouter(
        groups * size,
        groups * size,
        top_k=top_k,
        num_groups=groups,
        top_groups=top_groups,
        scored_by=scored_by,
        expert_bias=biased,
    )
    with_identity(router)
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.randn(groups * size))
    x = torch.randn(tokens, groups * size)
    routing = router(x)
    bias = [0.0] * (groups * size) if router.expert_bias is None else router.expert_bias.tolist()
    for t in range(tokens):
        score = [1 / (1 + math.exp(-value)) + b for value, b in zip(x[t].tolist(), bias, strict=True)]
        members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
        worth = [sum(sorted((score[e] for e in group), reverse=True)[:scored_by]) for group in members]
        best = sorted(range(groups), key=lambda g: -worth[g])[:top_groups]
        expected = sorted((e for g in best for e in members[g]), key=lambda e: -score[e])[:top_k]
        assert routing.expert_ids[t].tolist() == expected


def test_one_solve_of_the_quantile_gives_each_expert_its_quota() -> None:
    """At the cutoffs that were seen, to the width of a bin: those that are their own token's cutoff are ties."""
    router = with_identity(QuantileRouter(8, 8, top_k=3))
    router.expert_bias.copy_(torch.randn(8) * 0.05)
    x = torch.randn(4000, 8) + torch.linspace(-2, 2, 8)
    routing = router(x)
    scores = routing.logits.sigmoid()
    cutoff = (scores + router.expert_bias).sort(dim=1, descending=True).values[:, 3]
    width = float(router.expert_bias.max() - router.expert_bias.min() + 2) / 1000
    router.end_step(router.observe(routing, None))
    assert abs(router.expert_bias.mean().item()) < 1e-6
    needed = cutoff[:, None] - scores
    solved = router.expert_bias + (needed.quantile(3 / 8, dim=0) - router.expert_bias).mean()  # before it was centered
    surely, perhaps = ((needed < solved + slack).sum(dim=0) for slack in (-2 * width, 2 * width))
    assert (surely <= 1500).all() and (perhaps >= 1500).all(), (surely, perhaps)
    assert ((perhaps - surely)[solved.argsort()[::7]] < 200).all(), "the extremes are no cutoffs"


@pytest.mark.parametrize(("top_k", "score_function"), [(1, "sigmoid"), (3, "sigmoid"), (2, "softmax")])
def test_repeated_solves_of_the_quantile_balance_the_load(top_k: int, score_function: Any) -> None:
    router = with_identity(QuantileRouter(8, 8, top_k=top_k, score_function=score_function))
    x = torch.randn(4000, 8) + torch.linspace(-1, 1, 8)

    def variation() -> float:
        load = router(x).tokens_per_expert.double()
        return float(load.std() / load.mean())

    before = variation()
    for _ in range(12):
        router.end_step(router.observe(router(x), None))
    assert before > 0.4
    assert variation() < 0.03


@pytest.mark.parametrize("name", ["quantile", "threshold", "relu"])
def test_what_is_observed_adds_up_and_leaves_padding_out(name: str) -> None:
    router: Any = make(name)
    x = torch.randn(40, 6)
    whole = router.observe(router(x), None)
    parts = [router.observe(router(part), None) for part in x.split(13)]
    assert torch.equal(whole, sum(parts))
    valid = torch.arange(40) < 25
    assert torch.equal(router.observe(router(x), valid), router.observe(router(x[:25]), None))


@pytest.mark.parametrize("name", ["quantile", "threshold", "relu"])
def test_a_step_without_tokens_moves_nothing(name: str) -> None:
    router: Any = make(name)
    state = {key: value.clone() for key, value in router.state_dict().items()}
    router.end_step(router.observe(router(torch.randn(5, 6)), torch.zeros(5, dtype=torch.bool)))
    assert all(torch.equal(value, state[key]) for key, value in router.state_dict().items())


def test_thresholds_give_every_expert_its_quota_in_the_mean() -> None:
    router = with_identity(ThresholdRouter(8, 8, top_k=2, decay=0.5))
    draw = torch.Generator().manual_seed(1)
    shift = torch.linspace(-1, 1, 8)
    first = torch.randn(50, 8, generator=draw) + shift
    assert torch.equal(router(first).expert_ids, TopKRouter.select(router, first, first.sigmoid())), "at first top-k"
    for _ in range(20):
        x = torch.randn(2000, 8, generator=draw) + shift
        router.end_step(router.observe(router(x), None))
    fresh = torch.randn(20_000, 8, generator=draw) + shift
    routing = router(fresh)
    load = routing.tokens_per_expert / (20_000 * 2 / 8)
    torch.testing.assert_close(load, torch.ones(8), rtol=0, atol=0.05)
    assert torch.equal(mask_of(routing), fresh.sigmoid() > router.thresholds)
    assert 0 < (~mask_of(routing).any(dim=1)).float().mean() < 0.3, "some tokens have no expert"


def test_the_first_step_sets_the_thresholds_and_later_ones_average() -> None:
    router = with_identity(ThresholdRouter(4, 4, top_k=1, decay=0.75))
    x, later = torch.randn(999, 4), torch.randn(999, 4) + 1
    router.end_step(router.observe(router(x), None))
    first = router.thresholds.clone()
    torch.testing.assert_close(first, x.sigmoid().quantile(0.75, dim=0), rtol=0, atol=2e-3)
    router.end_step(router.observe(router(later), None))
    expected = 0.75 * first + 0.25 * later.sigmoid().quantile(0.75, dim=0)
    torch.testing.assert_close(router.thresholds, expected, rtol=0, atol=2e-3)


@given(tokens=st.integers(1, 20), experts=st.integers(1, 6), data=st.data())
def test_expert_choice_by_enumeration(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    router = with_identity(ExpertChoiceRouter(experts, experts, top_k=top_k, score_function="softmax"))
    x = torch.randn(tokens, experts)
    mask = mask_of(router(x))
    quota = min(tokens, max(1, tokens * top_k // experts))
    for e in range(experts):
        best = sorted(range(tokens), key=lambda t: -float(x.softmax(dim=1)[t, e]))[:quota]
        assert sorted(best) == mask[:, e].nonzero().flatten().tolist()


def test_scores_come_best_first_and_none_last() -> None:
    for name in ("expert_choice", "relu", "threshold"):
        routing = make(name)(torch.randn(50, 6))
        assert (routing.scores.diff(dim=1) <= 0).all(), name
        is_none = routing.expert_ids == 4
        assert (is_none.long().diff(dim=1) >= 0).all() and not routing.scores[is_none].any(), name


def test_sinkhorn_scales_rows_and_columns() -> None:
    router = with_identity(SinkhornRouter(6, 6, top_k=2, iterations=30))
    x = 2 * torch.randn(90, 6) + torch.linspace(-2, 2, 6)
    plan = x.double().exp()
    for _ in range(30):
        plan = plan / plan.sum(dim=1, keepdim=True)
        plan = plan * (90 / 6) / plan.sum(dim=0, keepdim=True)
    routing = router(x)
    assert torch.equal(routing.expert_ids, plan.topk(2, dim=1).indices)
    torch.testing.assert_close(routing.scores, x.sigmoid().gather(1, routing.expert_ids))
    plain = with_identity(TopKRouter(6, 6, top_k=2))
    balanced, unbalanced = (each.tokens_per_expert.float().std() for each in (routing, plain(x)))
    assert balanced < unbalanced / 2
    assert torch.equal(router.eval()(x).expert_ids, plain(x).expert_ids), "in evaluation top-k"


def test_noise_is_drawn_in_training_and_scored() -> None:
    router = with_identity(NoisyTopKRouter(4, 4, top_k=2, score_function="softmax", normalize_scores=True))
    with torch.no_grad():
        router.noise_weight.copy_(torch.randn(4, 4))
    x = torch.randn(30, 4)
    torch.manual_seed(7)
    noisy = x + torch.randn(30, 4) * torch.nn.functional.softplus(x @ router.noise_weight.T)
    torch.manual_seed(7)
    routing = router(x)
    values, ids = noisy.topk(2, dim=1)
    assert torch.equal(routing.expert_ids, ids) and torch.equal(routing.logits, x)
    torch.testing.assert_close(routing.scores, values.softmax(dim=1))
    (gradient,) = torch.autograd.grad(routing.scores[:, 0].sum(), router.noise_weight)
    assert gradient.abs().sum() > 0
    plain = with_identity(TopKRouter(4, 4, top_k=2, score_function="softmax", normalize_scores=True))
    for mine, expected in zip(router.eval()(x)[:3], plain(x)[:3], strict=True):
        assert torch.equal(mine, expected), "no noise in evaluation"


@given(tokens=st.integers(1, 30), experts=st.integers(1, 5), factor=st.floats(0.3, 3), data=st.data())
def test_capacity_keeps_the_first_rows(tokens: int, experts: int, factor: float, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    router = with_identity(CapacityRouter(experts, experts, top_k=top_k, capacity_factor=factor))
    x = torch.randn(tokens, experts)
    wanted = x.topk(top_k, dim=1).indices.tolist()
    capacity = int(factor * tokens * top_k / experts)
    if capacity < 1:
        with pytest.raises(ValueError, match=r"capacity_factor=.*leaves no row to an expert"):
            router(x)
        return
    rows, expected = [0] * experts, []
    for t in range(tokens):
        expected.append([])
        for e in wanted[t]:
            rows[e] += 1
            expected[-1].append(e if rows[e] <= capacity else experts)
    assert router(x).expert_ids.tolist() == expected
    assert router.eval()(x).expert_ids.tolist() == wanted, "nothing is dropped in evaluation"


def test_relu_routing_and_its_loss() -> None:
    router = with_identity(ReluRouter(4, 4, top_k=1, initial_weight=0.5))
    x = torch.randn(30, 4)
    routing = router(x)
    assert torch.equal(mask_of(routing), x > 0)
    dense = torch.zeros(30, 5).scatter(1, routing.expert_ids, routing.scores)[:, :4]
    torch.testing.assert_close(dense, x.relu())

    valid = torch.arange(30) < 20
    loss = router.auxiliary_loss(routing, valid, 20)
    load = count_tokens(routing.expert_ids, 4, valid) * 4 / (1 * 20)
    torch.testing.assert_close(loss, 0.5 * (x[:20].relu() * load).sum(dim=1).mean())
    (gradient,) = torch.autograd.grad(loss, router.weight)
    assert gradient.abs().sum() > 0

    for chosen, growth in ((31, 1.2), (30, 1.0), (29, 1 / 1.2)):
        before = router.sparsity_weight.clone()
        router.end_step(torch.tensor([chosen, 30]))
        torch.testing.assert_close(router.sparsity_weight, before * growth)


@given(tokens=st.integers(1, 12), experts=st.integers(1, 6), p=st.floats(0.05, 1), data=st.data())
def test_top_p_by_enumeration(tokens: int, experts: int, p: float, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    router = with_identity(TopPRouter(experts, experts, top_k=top_k, p=p, score_function="softmax"))
    x = torch.randn(tokens, experts)
    ids = router(x).expert_ids.tolist()
    for t in range(tokens):
        probabilities = x[t].softmax(dim=0).tolist()
        order = sorted(range(experts), key=lambda e: -probabilities[e])
        fewest = next(
            (n for n in range(1, experts + 1) if sum(probabilities[e] for e in order[:n]) >= p - 1e-6), experts
        )
        expected = order[: min(top_k, fewest)]
        assert [e for e in ids[t] if e < experts] == expected


def test_hash_table_has_different_experts_and_needs_ids() -> None:
    router = HashRouter(6, 5, top_k=3, vocab_size=200)
    assert all(len(set(row)) == 3 for row in router.token_experts.tolist())
    assert torch.bincount(router.token_experts.flatten(), minlength=5).min() > 80
    assert "token_experts" in router.state_dict()
    x, ids = torch.randn(7, 6), torch.randint(0, 200, (7,))
    assert torch.equal(router(x, token_ids=ids).expert_ids, router.token_experts[ids])
    with pytest.raises(ValueError, match=r"HashRouter: token_ids=None: must be the ids \(T,\)"):
        MoE.build(6, 8, 5, router=router)(x)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("group_limited", {"num_groups": 3}, "num_groups=3: must divide num_experts=4"),
        ("group_limited", {"top_groups": 3}, "top_groups=3: must be 1 to num_groups=2"),
        ("group_limited", {"top_k": 3}, "top_k=3: must be at most 2, the experts of 1 groups"),
        ("group_limited", {"scored_by": 3}, "scored_by=3: must be 1 to 2, the experts of a group"),
        ("capacity", {"capacity_factor": 0.0}, "capacity_factor=0.0: must be a number > 0"),
        ("top_p", {"p": 1.5}, "p=1.5: must be a number > 0 and <= 1"),
        ("top_p", {"p": 0.0}, "p=0.0: must be a number > 0"),
        ("top_p", {"score_function": "sigmoid"}, "score_function='sigmoid': must be softmax"),
        ("threshold", {"decay": 1.0}, "decay=1.0: must be a number >= 0 and < 1"),
        ("quantile", {"score_function": "sqrt_softplus"}, "score_function='sqrt_softplus': must be one of sigmoid"),
        ("relu", {"growth": 0.5}, "growth=0.5: must be a number >= 1"),
        ("sinkhorn", {"iterations": 0}, "iterations=0: must be a number >= 1"),
        ("hash", {"vocab_size": 0}, "vocab_size=0: must be a number >= 1"),
        ("top_k", {"scale": 0.0}, "scale=0.0: must be a number > 0"),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **arguments)


@pytest.mark.parametrize("name", ROUTERS)
def test_state_stays_in_fp32_and_shapes_need_no_numbers(name: str) -> None:
    router = make(name).to(torch.bfloat16)
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in router.buffers())
    with torch.device("meta"):
        assert all(x.is_meta for x in make_anew(name).state_dict().values())
    with FakeTensorMode():
        fake, x = make_anew(name), torch.empty(10, 6)
        routing = fake(x, token_ids=torch.empty(10, dtype=torch.int64)) if name == "hash" else fake(x)
    assert routing.scores.shape == routing.expert_ids.shape == (10, 2)


@pytest.mark.parametrize("name", ROUTERS)
def test_flops_count_the_router_and_top_k_experts(name: str) -> None:
    moe = MoE.build(6, 8, 4, router=make(name), shared_hidden_dim=0)
    in_router = {"noisy_top_k": 2 * 6 * 4, "mlp": 6 * 5 + 2 * 5 * 5 + 5 * 4}.get(name, 6 * 4)
    assert moe.flops_per_token(10) == 2 * in_router + 2 * 2 * (3 * 6 * 8)
