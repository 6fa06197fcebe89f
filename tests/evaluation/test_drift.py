"""How many choices change: between two decoders, and from check to check of a run."""

import io
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from moesaic.errors import InputError
from moesaic.evaluation.drift import Drift, RunningDrift, changed_choices
from moesaic.evaluation.language_modeling import evaluate_language_model
from moesaic.layers import Routing, count_tokens
from moesaic.models import build_decoder, llama4_toy


def rigged(num_experts: int, ids: Tensor) -> dict[str, Routing]:
    """One layer, `it`, with expert_ids (T, K)."""
    logits = torch.zeros(ids.size(0), num_experts)
    return {"it": Routing(logits, torch.ones(ids.shape), ids, count_tokens(ids, num_experts))}


def test_changed_choices_by_hand() -> None:
    before = torch.tensor([[0, 1], [0, 1], [0, 1], [2, 3]])
    now = torch.tensor([[0, 1], [1, 0], [0, 3], [0, 1]])
    expected = [[False, False], [False, False], [False, True], [True, True]]
    assert changed_choices(before, now).tolist() == expected


def test_drift() -> None:
    decoder, other = (build_decoder(llama4_toy(50, init_std=None)) for _ in range(2))
    batch = {"tokens": torch.randint(50, (2, 16)), "labels": torch.randint(50, (2, 16))}
    itself, another = Drift(decoder), Drift(other)
    seen: list[Mapping[str, Routing]] = []
    evaluate_language_model(decoder, [batch], watch=itself.update)
    evaluate_language_model(decoder, [batch], watch=another.update)
    evaluate_language_model(decoder, [batch], watch=lambda routing, _: seen.append(routing))
    assert set(itself.numbers()) == {f"router/{name}/drift" for name in seen[0]}
    assert set(itself.numbers().values()) == {0.0}
    _, theirs = other.eval().hidden_states(batch["tokens"])
    for name, routing in seen[0].items():
        changed = (routing.expert_ids != theirs[name].expert_ids).float().mean().item()
        assert another.numbers()[f"router/{name}/drift"] == pytest.approx(changed)
    assert max(another.numbers().values()) > 0.3


def test_drift_by_hand_and_its_refusal() -> None:
    class Other(torch.nn.Module):
        def hidden_states(self, tokens: Tensor) -> tuple[Tensor, dict[str, Routing]]:
            return tokens, rigged(4, torch.tensor([[1, 0], [0, 3], [0, 1]]))

    tokens = {"tokens": torch.zeros(1, 3, dtype=torch.int64), "valid": torch.tensor([[True, True, False]])}
    drift = Drift(Other())  # type: ignore[arg-type]
    drift.update(rigged(4, torch.tensor([[0, 1], [0, 1], [2, 3]])), tokens)
    assert drift.numbers() == {"router/it/drift": 0.25}, "the order does not count, padding neither"
    with pytest.raises(InputError, match=r"other_checkpoint: its MoE layers .*'it': \(4, 2\)"):
        drift.update(rigged(4, torch.tensor([[0], [1], [2]])), tokens)


def check(drift: RunningDrift, ids: list[list[int]], tokens: list[int], num_experts: int = 4) -> dict[str, float]:
    """A check that sees one batch."""
    drift.update(rigged(num_experts, torch.tensor(ids)), {"tokens": torch.tensor([tokens])})
    return drift.finish()


def test_running_drift_by_hand() -> None:
    drift = RunningDrift()
    assert check(drift, [[0, 1], [2, 3]], [5, 6]) == {}, "nothing to compare with"
    assert check(drift, [[1, 0], [2, 0]], [5, 6]) == {"router/it/drift": 0.25}
    assert check(drift, [[1, 0], [2, 0]], [5, 6]) == {"router/it/drift": 0.0}
    assert check(drift, [[2, 3], [1, 3]], [5, 6]) == {"router/it/drift": 1.0}
    assert check(drift, [[2, 3], [1, 3]], [5, 7]) == {}, "other tokens"
    assert check(drift, [[2, 0], [1, 3]], [5, 7]) == {"router/it/drift": 0.25}


def test_running_drift_watches_the_first_valid_tokens_of_several_batches() -> None:
    drift = RunningDrift(max_tokens=3)
    batch = {"tokens": torch.tensor([[1, 2, 3]]), "valid": torch.tensor([[True, False, True]])}
    found = []
    for first, second in (([0, 0, 0], [0, 0, 0]), ([0, 1, 1], [0, 1, 1])):
        drift.update(rigged(2, torch.tensor(first)[:, None]), batch)
        drift.update(rigged(2, torch.tensor(second)[:, None]), batch)
        found.append(drift.finish())
    assert found == [{}, {"router/it/drift": pytest.approx(1 / 3)}]
    assert drift.state_dict()["choices"]["it"].shape == (3, 1)


@pytest.mark.parametrize(("num_experts", "dtype"), [(255, torch.uint8), (256, torch.int16), (40_000, torch.int32)])
def test_running_drift_continues_from_a_file(num_experts: int, dtype: torch.dtype) -> None:
    drift = RunningDrift()
    check(drift, [[num_experts - 1], [0]], [5, 6], num_experts)
    assert drift.state_dict()["choices"]["it"].dtype == dtype
    file = io.BytesIO()
    torch.save(drift.state_dict(), file)
    file.seek(0)
    resumed = RunningDrift()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert check(resumed, [[num_experts - 1], [1]], [5, 6], num_experts) == {"router/it/drift": 0.5}


def test_running_drift_of_a_dense_model_is_nothing() -> None:
    drift = RunningDrift()
    for _ in range(2):
        drift.update({}, {"tokens": torch.tensor([[1]])})
        assert drift.finish() == {}
    assert drift.state_dict() == {}
