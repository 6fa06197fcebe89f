"""Collecting the routings of MoE layers inside a model that does not return them."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.layers import MoE, Routing, collect_routings
from moesaic.losses import load_balance_loss, router_z_loss


class Foreign(nn.Module):
    """A model of somebody else: it drops the routings, and may recompute its layers."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)
        self.layers = nn.ModuleList([MoE.build(8, 8, 4, top_k=k, shared_hidden_dim=0, backend="loop") for k in (1, 2)])
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for layer in self.layers:
            once: Callable[[Tensor], Tensor] = layer
            x = once(x) if self.use_reentrant is None else checkpoint(once, x, use_reentrant=self.use_reentrant)
        return x


def balance(routings: dict[str, list[Routing]]) -> Tensor:
    every = [routing for calls in routings.values() for routing in calls]
    return torch.stack([load_balance_loss(r.logits, r.expert_ids) + router_z_loss(r.logits) for r in every]).sum()


def state(model: nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


def inputs() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def test_every_layer_hands_out_what_it_decided() -> None:
    model, x = Foreign(), inputs()
    before, plain = state(model), model(x)
    with collect_routings(model) as routings:
        y = model(x)
    assert torch.equal(y, plain)
    assert list(routings) == ["layers.0", "layers.1"]
    hidden = model.inner(x)
    for layer, calls in zip(model.layers, routings.values(), strict=True):
        hidden, expected = layer.forward_with_routing(hidden)
        (found,) = calls
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.expert_ids, expected.expert_ids)
    assert state(model) == before
    model(x)
    assert [len(calls) for calls in routings.values()] == [1, 1]


def test_repeated_calls_and_layers_that_did_not_run() -> None:
    model = Foreign()
    with collect_routings(model) as routings:
        for tokens in (3, 4):
            model.layers[1](torch.randn(tokens, 8))
    assert {name: [r.logits.size(0) for r in calls] for name, calls in routings.items()} == {"layers.1": [3, 4]}


def test_contexts_in_each_other_that_end_in_any_order() -> None:
    model, x = Foreign(), inputs()
    before = state(model)
    outer, inner = ExitStack(), ExitStack()
    of_all = outer.enter_context(collect_routings(model))
    model(x)
    of_one = inner.enter_context(collect_routings(model.layers[0]))
    model(x)
    outer.close()
    model(x)
    inner.close()
    model(x)
    assert {name: len(calls) for name, calls in of_all.items()} == {"layers.0": 2, "layers.1": 2}
    assert {name: len(calls) for name, calls in of_one.items()} == {"": 2}
    assert of_one[""][0] is of_all["layers.0"][1]
    assert state(model) == before


class Wrapped(nn.Module):
    """Hands on what the layer inside decided."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward_with_routing(self, x: Tensor) -> tuple[Tensor, Routing]:
        y, routing = self.layer.forward_with_routing(x)
        return 2 * y, routing


def test_a_routing_that_is_handed_on_counts_once_and_one_of_a_layer_inside_counts_too() -> None:
    wrapped = Wrapped(MoE.build(8, 8, 4, shared_hidden_dim=0))
    with collect_routings(wrapped) as routings:
        wrapped.forward_with_routing(inputs())
    assert list(routings) == ["layer"]
    outer = MoE.build(8, 8, 4, shared_hidden_dim=0)
    outer.shared_expert = MoE.build(8, 8, 2, shared_hidden_dim=0)
    with collect_routings(outer) as routings:
        outer(inputs())
    assert {name: calls[0].logits.size(1) for name, calls in routings.items()} == {"shared_expert": 2, "": 4}


def test_recomputation_gives_each_routing_once_and_the_same_gradients() -> None:
    gradients = []
    for model in (Foreign(), Foreign(use_reentrant=False)):
        with collect_routings(model) as routings:
            (model(inputs()).square().mean() + balance(routings)).backward()
            assert [len(calls) for calls in routings.values()] == [1, 1]
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_recomputation_is_refused_where_a_balance_loss_would_have_no_gradient() -> None:
    model = Foreign(use_reentrant=True)
    before = state(model)
    with pytest.raises(RuntimeError, match=r"layers.0 .* must be use_reentrant=False"), collect_routings(model):
        model(inputs())
    assert state(model) == before
    with torch.no_grad(), collect_routings(model) as routings:
        model(inputs())
    assert len(routings) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], torch.no_grad]) -> None:
    model = Foreign().eval()
    with collect_routings(model) as routings, mode():
        model(inputs())
    assert [calls[0].logits.requires_grad for calls in routings.values()] == [False, False]


def test_an_exception_leaves_nothing_behind() -> None:
    model = Foreign()
    before = state(model)
    with pytest.raises(ValueError, match="last dimension"), collect_routings(model) as routings:
        model.layers[0](torch.randn(2, 9))
    assert (routings, state(model)) == ({}, before)


def test_a_model_without_such_layers_gives_nothing() -> None:
    model = nn.Linear(8, 8)
    with collect_routings(model) as routings:
        model(inputs())
    assert routings == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile asks for it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*")  # the tracer does, with every Function
def test_a_compiled_model_compiles_once_and_a_whole_graph_is_refused_by_name() -> None:
    torch.compiler.reset()
    model, x, graphs = Foreign(), inputs(), []
    model.layers = model.layers[:1]

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    expected, compiled_graphs = compiled(x), []
    for _ in range(3):
        with collect_routings(compiled) as routings:
            torch.testing.assert_close(compiled(x), expected)
        assert [(name, len(calls)) for name, calls in routings.items()] == [("_orig_mod.layers.0", 1)]
        balance(routings).backward()
        compiled_graphs.append(len(graphs))
    assert compiled_graphs[0] == compiled_graphs[2] > 0
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="leave fullgraph=True away"), collect_routings(model):
        whole(x)
    torch.compiler.reset()
