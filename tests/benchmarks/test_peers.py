"""The peers benchmark: everybody is in every cell, on the same routing, checked; and it takes anybody's layer."""

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.layer import benchmark_layer
from benchmarks.limit import PRECISIONS
from benchmarks.peers import OURS, CannotRun, Case, Peer
from moesaic.layers import MoE
from moesaic.testing import MoEUnderTest
from moesaic.testing.recognize import describe

SHARED = Case(4, 1, True, tokens=64, length=32, dim=32, hidden_dim=24)
TOP2 = Case(4, 2, False, tokens=64, length=32, dim=32, hidden_dim=24)
FP32, BF16, MIXED = PRECISIONS


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tokens(case: Case) -> Tensor:
    return peers.draw(case)[1].clone().requires_grad_()


class Copies(nn.Module):
    """Maps tokens to themselves times a weight."""

    def __init__(self, **asked: Any) -> None:
        super().__init__()
        self.asked = asked
        self.weight = nn.Parameter(torch.ones(asked["d_model"], dtype=asked["dtype"]))

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x * self.weight, "more"


# ---- our factory


@pytest.mark.parametrize("shared", [True, False])
def test_our_factory_makes_the_layer_that_was_asked_for(shared: bool) -> None:
    layer = benchmark_layer(d_model=32, d_ff=24, n_experts=4, top_k=2, shared=shared, dtype=torch.bfloat16)
    assert isinstance(layer, MoE)
    assert layer.experts.gate_up_proj.shape == (4, 32, 48)
    assert (layer.shared_expert is not None) == shared
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    case = Case(4, 2, shared, 64, 32, 32, 24)
    assert sum(parameter.numel() for parameter in layer.parameters()) == case.parameters
    y, routing = layer.forward_with_routing(torch.randn(2, 5, 32, dtype=torch.bfloat16))
    assert y.shape == (2, 5, 32) and routing.expert_ids.shape == (10, 2)
    with pytest.raises(ValueError, match="top_k=5"):
        benchmark_layer(32, 24, 4, top_k=5)


# ---- anybody's layer


@pytest.mark.slow
def test_layers_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys.py").write_text(
        "from benchmarks.layer import benchmark_layer\n"
        "calls = []\n"
        "def good(**asked):\n"
        "    calls.append(asked)\n"
        "    return benchmark_layer(**asked)\n"
        "def choosy(*, d_model, d_ff, n_experts, top_k, shared, dtype):\n"
        "    if shared:\n"
        "        raise ValueError('no shared expert here')\n"
        "    return benchmark_layer(d_model, d_ff, n_experts, top_k, shared, dtype)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = ["somebodys:good", "somebodys:choosy"]
    rows = peers.main(["--smoke", "--layer", names[0], "--layer", names[1]])
    of = {name: [row for row in rows if row.variant == name] for name in (*names, OURS)}
    cells = {name: {(*row.shape.values(), row.dtype, row.what) for row in of[name]} for name in of}
    assert len(cells[OURS]) == 12 and cells[names[0]] == cells[names[1]] == cells[OURS]
    for row in of[names[0]]:
        assert row.seconds and row.ratio and row.peak_bytes and "of a float64 reference" in row.note
    for row in of[names[1]]:
        assert (row.note == "not run: no shared expert here") == row.shape["shared"] == (row.seconds is None)
    asked = sys.modules["somebodys"].calls
    assert {frozenset(call) for call in asked} == {
        frozenset({"d_model", "d_ff", "n_experts", "top_k", "shared", "dtype"})
    }
    assert {call["dtype"] for call in asked} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:layer", "No module named 'nowhere'"),
        ("moesaic.layers:no_such_thing", "no_such_thing"),
        ("moesaic.layers", "package.module:factory"),
        ("moesaic.layers:BACKENDS", "is dict: must be a function"),
    ],
)
def test_layers_that_do_not_exist_are_refused(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--smoke", "--layer", name])
    assert message in capsys.readouterr().err


def prepared(make: Any, case: Case = TOP2) -> str:
    return peers.prepare(Peer(partial(peers.made_by, make)), case, FP32, tokens(case))[1]


def test_a_layer_of_which_nothing_is_known_has_to_be_finite() -> None:
    class Nan(Copies):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return super().forward(x)[0] / 0, ""

    note = prepared(Copies)
    assert "output finite (no reference known)" in note and "0.00x the parameters of the case" in note
    with pytest.raises(CannotRun, match="not finite"):
        prepared(Nan)


def test_wrong_outputs_are_not_timed() -> None:
    def off(**asked: Any) -> MoEUnderTest:
        return MoEUnderTest(Copies(**asked), reference=lambda weights, x: 1.01 * x * weights["weight"])

    def narrow(**asked: Any) -> nn.Module:
        return nn.Linear(asked["d_model"], 7)

    with pytest.raises(CannotRun, match=r"off by 9.9e-03"):
        prepared(off)
    with pytest.raises(CannotRun, match=r"output of shape \(2, 32, 7\)"):
        prepared(narrow)


def test_a_layer_that_ignores_autocast_is_told_apart() -> None:
    class Stubborn(nn.Module):
        def __init__(self, **asked: Any) -> None:
            super().__init__()
            self.linear = nn.Linear(asked["d_model"], asked["d_model"], bias=False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.linear(x)

    def described(cls: type[nn.Module], **asked: Any) -> MoEUnderTest:
        return MoEUnderTest(cls(**asked), reference=lambda weights, x: x @ next(iter(weights.values())).T)

    def plain(**asked: Any) -> nn.Module:
        return nn.Linear(asked["d_model"], asked["d_model"], bias=False)

    for make, stays in ((Stubborn, True), (plain, False)):
        peer = Peer(partial(peers.made_by, partial(described, make)))  # type: ignore[arg-type]
        assert ("stays in fp32" in peers.prepare(peer, TOP2, MIXED, tokens(TOP2))[1]) == stays


# ---- everybody else


@pytest.mark.slow
def test_everybody_is_in_every_cell() -> None:
    rows = peers.main(["--smoke"])
    expected = {"dense", *peers.peers(torch.device("cpu"))}
    assert {OURS, "llama4", "mixtral grouped_mm", "qwen3_moe eager", "torchtitan", "st-moe-pytorch"} <= expected
    assert {"mixture-of-experts", "pytorch-mixtures"} <= expected
    cells = {(*row.shape.values(), row.dtype, row.what) for row in rows}
    assert len(cells) == 2 * 3 * 2
    for cell in cells:
        of = {row.variant: row for row in rows if (*row.shape.values(), row.dtype, row.what) == cell}
        assert set(of) == expected | ({"dense in fp32"} if "mixed" in cell else set())
        assert of[OURS].seconds and "of a float64 reference" in of[OURS].note
        blocks = ["llama4"] if of[OURS].shape["shared"] else ["mixtral grouped_mm", "qwen3_moe eager"]
        for name in blocks:
            assert of[name].seconds and "of a float64 reference" in of[name].note
    assert "scattermoe" in peers.peers(torch.device("cuda"))


def test_what_is_not_installed_is_a_row_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"transformers", "torchtitan", "st_moe_pytorch", "mixture_of_experts", "pytorch_mixtures"}
    for name in packages | {name for name in sys.modules if name.split(".")[0] in packages}:
        monkeypatch.setitem(sys.modules, name, None)
    found = {}
    for name, peer in peers.peers(torch.device("cpu")).items():
        case = SHARED if name == "llama4" else TOP2
        try:
            peers.prepare(peer, case, MIXED, tokens(case))
        except Exception as error:
            found[name] = peers.why(error)
    assert "mixtral eager" in found and "mixtral grouped_mm" not in found, "nobody knows what it offers"
    assert OURS not in found
    assert len(found) == 7
    assert all("pip install" in said for said in found.values()), found


def test_all_route_alike_and_rounding_does_not_matter() -> None:
    router, x = peers.draw(TOP2)
    assert x.shape == (2, 32, 32) and router.shape == (4, 32)
    exact = (x.double() @ router.double().T).topk(2).indices
    rounded = (x.bfloat16() @ router.bfloat16().T).topk(2).indices
    assert torch.equal(exact, rounded)
    module, _ = peers.prepare(peers.peers(torch.device("cpu"))["mixtral eager"], TOP2, FP32, x)
    ours, _ = peers.prepare(peers.peers(torch.device("cpu"))[OURS], TOP2, FP32, x)
    assert torch.equal(module.gate.weight, router)
    assert isinstance(ours, MoE) and torch.equal(ours.router.weight, router)


def test_the_capacity_is_just_enough() -> None:
    router, x = peers.draw(TOP2)
    chosen = (x @ router.T).topk(2).indices
    fullest = max(int((sequence == expert).sum()) for sequence in chosen for expert in range(4))
    assert int(32 * peers.full_capacity(TOP2) / 4) == fullest  # as both packages compute it


def test_batched_mm_is_left_out_above_the_allowed_memory() -> None:
    big = Case(4, 2, False, tokens=1000, length=1000, dim=100, hidden_dim=100, memory_gb=0.1)
    with pytest.raises(CannotRun, match=r"about 1 GB, allowed 0\.1"):
        peers.transformers_gated("mixtral", "batched_mm", big, torch.float32)
    assert peers.transformers_gated("mixtral", "grouped_mm", big, torch.float32).reference is not None


@pytest.mark.filterwarnings("ignore")  # of theirs
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("torchtitan", "torchtitan"),
        ("st-moe-pytorch", "st_moe_pytorch"),
        ("mixture-of-experts", "mixture_of_experts"),
        ("pytorch-mixtures", "pytorch_mixtures"),
    ],
)
def test_other_packages_compute_what_their_reference_says(name: str, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    layer, note = peers.prepare(peers.peers(torch.device("cpu"))[name], TOP2, MIXED, tokens(TOP2))
    assert "of a float64 reference" in note
    if name == "torchtitan":
        note = peers.prepare(peers.peers(torch.device("cpu"))[name], SHARED, MIXED, tokens(SHARED))[1]
        assert "of a float64 reference" in note
        with pytest.raises(CannotRun, match="whatever the parameters are"):
            peers.prepare(peers.peers(torch.device("cpu"))[name], TOP2, FP32, tokens(TOP2))
    assert describe(layer).module is layer
