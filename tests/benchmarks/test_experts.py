"""The expert benchmark: loads are what they are called, every backend is in every cell, wrong results are not timed."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from benchmarks import experts
from benchmarks.experts import EXACT, LOADS, GivenLoad, Shape, SortedRows
from benchmarks.limit import PRECISIONS


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1024, 1000, 7])
def test_loads(rows: int) -> None:
    counts = {name: load(rows, 16) for name, load in LOADS.items()}
    for load in counts.values():
        assert load.sum() == rows and load.min() >= 0 and load.dtype == torch.int64 and load.shape == (16,)
    assert counts["even"].max() - counts["even"].min() <= 1
    assert counts["collapsed"].tolist() == [rows] + [0] * 15
    assert counts["one with 40%"][0].item() == pytest.approx(0.4 * rows, abs=1)
    if rows >= 1000:
        assert (counts["zipf"][0] / counts["zipf"][9]).item() == pytest.approx(10, rel=0.1)


def test_the_router_sends_what_it_was_told_to() -> None:
    counts = LOADS["zipf"](100, 8)
    router = GivenLoad(16, counts)
    routing = router(torch.randn(100, 16))
    assert torch.equal(routing.tokens_per_expert, counts)
    assert not torch.equal(routing.expert_ids.flatten(), routing.expert_ids.flatten().sort().values), "mixed up"
    routing.scores.sum().backward()
    assert router.weight.grad is not None


def test_backends_share_their_weights_and_a_wrong_one_is_not_timed() -> None:
    shape, precision = Shape("experts", 4, 64, 32, 48), PRECISIONS[0]
    layers, missing = experts.build(shape, precision, torch.device("cpu"))
    assert [*layers] == ["dense", *EXACT] and not missing
    weights = [layer.experts.gate_up_proj for layer in layers.values() if isinstance(layer, SortedRows)]
    assert len(weights) == len(EXACT) and len({id(weight) for weight in weights}) == 1
    x = torch.randn(64, 32)
    experts.require_agreement(layers, x, precision)
    wrong = layers["padded"]
    assert isinstance(wrong, SortedRows)
    wrong.rows_per_expert = nn.Buffer(torch.tensor([64, 0, 0, 0]))
    with pytest.raises(SystemExit, match="padded is off by"):
        experts.require_agreement(layers, x, precision)


@pytest.mark.slow
def test_every_backend_is_in_every_cell_and_uneven_loads_are_held_against_even_ones() -> None:
    rows = experts.main(["--smoke"])
    parts = {"experts": {"dense", *EXACT}, "layer": {"dense", "MoE"}}
    cells = {(*row.shape.values(), row.dtype, row.what) for row in rows}
    assert len(cells) == 10 * 3 * 2  # 2 + 1 numbers of experts, 3 uneven loads in 2 parts, one layer with more tokens
    for cell in cells:
        of = [row for row in rows if (*row.shape.values(), row.dtype, row.what) == cell]
        fp32 = {"dense in fp32"} if "mixed" in cell else set()
        assert {row.variant for row in of} == parts[of[0].shape["part"]] | fp32
    assert {row.shape["load"] for row in rows} == set(LOADS)
    for row in rows:
        uneven = row.shape["load"] != "even" and not row.variant.startswith("dense")
        assert ("its even load" in row.note) == uneven
        if uneven:
            even = next(
                x
                for x in rows
                if x.shape == {**row.shape, "load": "even"}
                and (x.variant, x.dtype, x.what) == (row.variant, row.dtype, row.what)
            )
            assert row.ratio and even.ratio
            stated = float(row.note.split("; ")[-1].removesuffix("x its even load"))
            assert stated == pytest.approx(row.ratio / even.ratio, abs=0.0051)


def test_what_a_backend_cannot_do_is_a_row() -> None:
    shape = Shape("experts", 4, 64, 30, 50)  # grouped_mm wants rows of a multiple of 16 bytes
    layers, missing = experts.build(shape, PRECISIONS[0], torch.device("cpu"))
    assert "grouped" not in layers and "multiple of 16 bytes" in missing["grouped"]
