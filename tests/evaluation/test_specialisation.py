"""Rigged routings whose measures are known."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.errors import InputError
from moesaic.evaluation.language_modelling import evaluate_language_model
from moesaic.evaluation.specialisation import (
    BYTE_CLASSES,
    Drift,
    Specialisation,
    byte_class,
    explained_share,
    overlap,
    plot_specialisation,
)
from moesaic.layers import Routing, count_tokens
from moesaic.models import DecoderOutput, build_decoder, llama4_toy

STRINGS = [b"a", b"7", b" ", b"(", b"\xc3\xa9", b""]


def rigged(num_experts: int, **layers: Tensor) -> DecoderOutput:
    """Routing by layer from expert_ids (T, K)."""
    routing = {
        name: Routing(torch.zeros(ids.size(0), num_experts), torch.ones(ids.shape), ids, count_tokens(ids, num_experts))
        for name, ids in layers.items()
    }
    return DecoderOutput(torch.zeros(0), routing)


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (b"def", "letters"),
        (b" if", "letters"),
        (b" x", "letters"),
        (b"_x", "letters"),
        (b"__x", "punctuation"),
        (b"42", "digits"),
        (b" 7", "digits"),
        (b"\n    ", "whitespace"),
        (b"\t", "whitespace"),
        (b"):\n", "punctuation"),
        (b"~", "punctuation"),
        (b"\xc3\xa9", "other"),
        (b"\x00", "other"),
        (b"\x7f", "other"),
        (b"", "other"),
    ],
)
def test_byte_classes(token: bytes, expected: str) -> None:
    assert byte_class(token) == expected


def test_explained_share_is_1_0_or_in_between() -> None:
    decided = torch.tensor([[5, 0], [0, 3], [0, 2], [5, 0]])  # more tokens than experts
    assert explained_share(decided) == pytest.approx(1)
    assert explained_share(torch.tensor([[6, 3], [2, 1]])) == pytest.approx(0, abs=1e-12)
    assert explained_share(torch.tensor([[6, 0], [2, 0]])) == 0, "one expert takes all: there is nothing to explain"
    # H(expert) = log 2, H(expert | token) = the entropy of (3/4, 1/4)
    conditional = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert explained_share(torch.tensor([[3, 1], [1, 3]])) == pytest.approx(1 - conditional / math.log(2))


def test_overlap_by_hand() -> None:
    shared = overlap(torch.tensor([[2, 0, 1], [2, 0, 0], [0, 4, 3]]))  # columns: (.5 .5 0), (0 0 1), (.25 0 .75)
    expected = [[1, 0, 0.25], [0, 1, 0.75], [0.25, 0.75, 1]]
    assert torch.allclose(shared, torch.tensor(expected, dtype=torch.float64))


def test_routing_by_token_is_explained_by_the_token_alone() -> None:
    tokens = torch.randint(6, (8, 64))
    seen = Specialisation(6, STRINGS)
    output = rigged(3, first=tokens.flatten()[:, None] % 3, second=torch.randint(3, (512, 1)))
    seen.update(output, {"tokens": tokens})
    numbers = seen.numbers()
    assert numbers["router/first/token_expert_nmi"] == pytest.approx(1)
    assert numbers["router/first/expert_overlap"] == 0
    for key in ("router/first/position_expert_nmi", "router/first/next_layer_expert_nmi"):
        assert numbers[key] < 0.05, key
    assert numbers["router/second/token_expert_nmi"] < 0.05
    assert numbers["router/second/expert_overlap"] > 0.8
    assert "router/second/next_layer_expert_nmi" not in numbers
    by_class = seen.by_class("first")
    assert by_class is not None
    counts = torch.bincount(tokens.flatten(), minlength=6).tolist()
    letters, other = (by_class[BYTE_CLASSES.index(name)].tolist() for name in ("letters", "other"))
    assert letters == [counts[0], 0, 0]
    assert other == [0, counts[4], counts[5]]


def test_routing_by_position_and_by_the_layer_before() -> None:
    ids = torch.tensor([0, 1, 1, 2, 2, 2, 2])[:, None].repeat(4, 1)  # octaves of the position
    seen = Specialisation(5)
    seen.update(rigged(3, first=ids, second=2 - ids), {"tokens": torch.randint(5, (4, 7))})
    numbers = seen.numbers()
    assert numbers["router/first/position_expert_nmi"] == pytest.approx(1)
    assert numbers["router/first/next_layer_expert_nmi"] == pytest.approx(1)
    assert not any("byte_class" in key for key in numbers)
    assert seen.layers["first"].then is not None
    assert seen.layers["first"].then.tolist() == [[0, 0, 4], [0, 8, 0], [16, 0, 0]]


def test_coactivation_padding_and_batches_that_add_up() -> None:
    ids = torch.tensor([[0, 1], [0, 1], [0, 2], [2, 0]])
    tokens = torch.tensor([[0, 1], [2, 3]])
    valid = torch.tensor([[True, True], [True, False]])
    seen = Specialisation(5)
    seen.update(rigged(3, it=ids), {"tokens": tokens, "valid": valid})
    counts = seen.layers["it"]
    assert counts.together.tolist() == [[3, 2, 1], [2, 2, 0], [1, 0, 1]]
    assert counts.by_token.tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert counts.by_position.tolist() == [[2, 1, 1], [1, 1, 0]]
    seen.update(rigged(3, it=ids[:3]), {"tokens": torch.tensor([[4, 4, 4]])})
    added = seen.layers["it"]
    assert added.by_token[4].tolist() == [3, 2, 1]
    assert added.by_position.tolist() == [[3, 2, 1], [2, 2, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("strings", "top_k"), [(STRINGS, 1), ([b"$\\", *STRINGS[1:]], 2), (None, 1)], ids=["strings", "mathtext", "ids"]
)
def test_plot(tmp_path: Path, strings: list[bytes] | None, top_k: int) -> None:
    seen = Specialisation(6, strings)
    ids = torch.stack([torch.randperm(4)[:top_k] for _ in range(40)])
    seen.update(rigged(4, first=ids, second=ids), {"tokens": torch.randint(6, (2, 20))})
    assert plot_specialisation(seen, tmp_path / "plots" / "it.png")
    assert (tmp_path / "plots" / "it.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_specialisation(Specialisation(6), tmp_path / "none.png")


def test_drift() -> None:
    decoder, other = (build_decoder(llama4_toy(50, init_std=None)) for _ in range(2))
    batch = {"tokens": torch.randint(50, (2, 16)), "labels": torch.randint(50, (2, 16))}
    itself, another = Drift(decoder), Drift(other)
    seen: list[DecoderOutput] = []
    evaluate_language_model(decoder, [batch], watch=itself.update)
    evaluate_language_model(decoder, [batch], watch=another.update)
    evaluate_language_model(decoder, [batch], watch=lambda output, _: seen.append(output))
    assert set(itself.numbers()) == {f"router/{name}/drift" for name in seen[0].routing}
    assert set(itself.numbers().values()) == {0.0}
    _, theirs = other.eval().hidden_states(batch["tokens"])
    for name, routing in seen[0].routing.items():
        changed = (routing.expert_ids != theirs[name].expert_ids).float().mean().item()
        assert another.numbers()[f"router/{name}/drift"] == pytest.approx(changed)
    assert max(another.numbers().values()) > 0.3


def test_drift_by_hand_and_its_refusal() -> None:
    class Other(torch.nn.Module):
        def hidden_states(self, tokens: Tensor) -> tuple[Tensor, dict[str, Routing]]:
            return tokens, rigged(4, it=torch.tensor([[1, 0], [0, 3], [0, 1]])).routing

    tokens = {"tokens": torch.zeros(1, 3, dtype=torch.int64), "valid": torch.tensor([[True, True, False]])}
    drift = Drift(Other())  # type: ignore[arg-type]
    drift.update(rigged(4, it=torch.tensor([[0, 1], [0, 1], [2, 3]])), tokens)
    assert drift.numbers() == {"router/it/drift": 0.25}, "the order does not count, padding neither"
    with pytest.raises(InputError, match=r"other_checkpoint: its MoE layers .*'it': \(4, 2\)"):
        drift.update(rigged(4, it=torch.tensor([[0], [1], [2]])), tokens)
