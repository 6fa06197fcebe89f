"""What no loss accepts: labels, shapes, dtypes and numbers that would fail in torch, or not at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.losses import (
    DenseTargets,
    HeadTargets,
    SampledTargets,
    TopKTargets,
    codistillation_loss,
    linear_codistillation_loss,
    linear_cross_entropy,
    load_balance_loss,
    router_z_loss,
    token_cross_entropy,
    update_expert_bias,
)

T, D, V = 5, 4, 7
HIDDEN, WEIGHT, LOGITS = torch.randn(T, D), torch.randn(V, D), torch.randn(T, V)
LABELS = torch.tensor([0, 1, -100, 6, 3])
ROWS = torch.zeros(T)


def top_k(**changes: Any) -> TopKTargets:
    given = {"ids": torch.zeros(T, 1, dtype=torch.int64), "log_probs": ROWS[:, None], "temperature": 1.0}
    return TopKTargets(**{**given, "entropy": ROWS, "label_log_prob": ROWS, **changes})  # type: ignore[arg-type]


def sampled(**changes: Any) -> SampledTargets:
    given = {"ids": torch.zeros(T, 1, dtype=torch.int64), "weights": ROWS[:, None], "temperature": 1.0}
    return SampledTargets(**{**given, "entropy": ROWS, "label_log_prob": ROWS, **changes})  # type: ignore[arg-type]


def hard(hidden: Any = HIDDEN, weight: Any = WEIGHT, labels: Any = LABELS, **options: Any) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, **options)


def per_token(hidden: Any = HIDDEN, weight: Any = WEIGHT, labels: Any = LABELS, **options: Any) -> Tensor:
    return token_cross_entropy(hidden, weight, labels, **options)


def soft(hidden: Any = HIDDEN, weight: Any = WEIGHT, labels: Any = LABELS, **options: Any) -> Tensor:
    options = {"targets": DenseTargets(LOGITS), "soft_weight": 0.5, **options}
    return linear_codistillation_loss(hidden, weight, labels, **options).loss


def soft_of_logits(logits: Any = LOGITS, labels: Any = LABELS, **options: Any) -> Tensor:
    options = {"targets": DenseTargets(LOGITS), "soft_weight": 0.5, **options}
    return codistillation_loss(logits, labels, **options).loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "linear_cross_entropy": hard,
    "token_cross_entropy": per_token,
    "linear_codistillation_loss": soft,
    "codistillation_loss": soft_of_logits,
}
every_loss = pytest.mark.parametrize("owner", LOSSES)


def refused(match: str, call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        call()


@every_loss
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"labels of type NoneType; must be a tensor"),
        ([0] * T, r"labels of type list; must be a tensor"),
        (LABELS.float(), r"labels of torch.float32; must be torch.int64"),
        (LABELS.int(), r"labels of torch.int32; must be torch.int64"),
        (LABELS[1:], r"labels of shape \(4,\); must be \(5\)"),
        (LABELS[None], r"labels of shape \(1, 5\); must be \(5\)"),
        (LABELS + 1, r"labels has -99; must be 0 to 6, or -100 for none"),
        (torch.full((T,), V), r"labels has 7; must be 0 to 6"),
        (torch.full((T,), -1), r"labels has -1; must be 0 to 6"),
    ],
)
def test_labels(owner: str, labels: Any, message: str) -> None:
    refused(f"^{owner}: {message}", lambda: LOSSES[owner](labels=labels))


@pytest.mark.parametrize("owner", ["linear_cross_entropy", "token_cross_entropy", "linear_codistillation_loss"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden": None}, r"hidden of type NoneType; must be a floating-point tensor"),
        ({"hidden": HIDDEN.long()}, r"hidden of torch.int64; must be a floating-point tensor"),
        ({"hidden": HIDDEN[None]}, r"hidden of shape \(1, 5, 4\); must be \(any, any\)"),
        ({"weight": None}, r"weight of type NoneType; must be a floating-point tensor"),
        ({"weight": WEIGHT[:, 1:]}, r"weight of shape \(7, 3\); must be \(any, 4\)"),
        ({"weight": WEIGHT.T}, r"weight of shape \(4, 7\); must be \(any, 4\)"),
    ],
)
def test_a_head(owner: str, given: dict[str, Any], message: str) -> None:
    refused(f"^{owner}: {message}", lambda: LOSSES[owner](**given))


@pytest.mark.parametrize("owner", ["linear_cross_entropy", "linear_codistillation_loss", "codistillation_loss"])
@pytest.mark.parametrize("num_valid", [-1, 2.5, float("nan"), "4", True, torch.ones(2)], ids=str)
def test_num_valid(owner: str, num_valid: Any) -> None:
    refused(r"num_valid.*must be ", lambda: LOSSES[owner](num_valid=num_valid))


@pytest.mark.parametrize("owner", ["linear_cross_entropy", "token_cross_entropy", "linear_codistillation_loss"])
@pytest.mark.parametrize("chunk_tokens", [0, -1, 2.5, "4", True])
def test_chunk_tokens(owner: str, chunk_tokens: Any) -> None:
    refused(rf"chunk_tokens={chunk_tokens!r}: must be ", lambda: LOSSES[owner](chunk_tokens=chunk_tokens))


@pytest.mark.parametrize("loss", [soft, soft_of_logits])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": None}, r"targets of type NoneType; must be DenseTargets, HeadTargets"),
        ({"targets": LOGITS}, r"targets of type Tensor; must be DenseTargets"),
        ({"targets": DenseTargets(None)}, r"targets.logits of type NoneType; must be"),  # type: ignore[arg-type]
        ({"targets": DenseTargets(LOGITS[0])}, r"targets.logits of shape \(7,\); must be"),
        ({"targets": HeadTargets(HIDDEN, WEIGHT.T)}, r"targets.weight of shape \(4, 7\); must be \(any, 4\)"),
        ({"targets": HeadTargets(HIDDEN.long(), WEIGHT)}, r"targets.hidden of torch.int64; must be"),
        ({"targets": top_k(ids=torch.full((T, 1), V))}, r"TopKTargets: ids has 7; must be 0 to 6"),
        ({"targets": top_k(ids=torch.full((T, 1), -100))}, r"TopKTargets: ids has -100; must be 0 to 6"),
        ({"targets": top_k(ids=ROWS[:, None])}, r"targets.ids of torch.float32; must be torch.int64"),
        ({"targets": top_k(log_probs=ROWS)}, r"targets.log_probs of shape \(5,\); must be \(5, 1\)"),
        ({"targets": sampled(weights=None)}, r"targets.weights of type NoneType"),
        ({"targets": sampled(entropy=ROWS[1:])}, r"targets.entropy of shape \(4,\); must be \(5\)"),
        ({"soft_weight": "0.5"}, r"soft_weight='0.5': must be"),
        ({"soft_weight": None}, r"soft_weight=None: must be"),
        ({"soft_weight": torch.tensor(float("nan"))}, r"soft_weight=nan: must be"),
        ({"soft_weight": torch.tensor(1.5)}, r"soft_weight=1.5: must be"),
        ({"temperature": "1"}, r"temperature='1': must be"),
        ({"temperature": float("inf")}, r"temperature=inf: must be"),
        ({"divergence": ["jsd"]}, r"divergence=\['jsd'\]: must be one of"),
        ({"divergence": "jsd", "coefficient": float("nan")}, r"coefficient=nan: jsd allows"),
        ({"divergence": "jsd", "coefficient": None}, r"coefficient=None: jsd allows"),
        ({"gate": 3}, r"gate=3: must be a function"),
        ({"ignore_index": None}, r"ignore_index=None: must be an integer"),
    ],
)
def test_codistillation(loss: Callable[..., Tensor], options: dict[str, Any], message: str) -> None:
    refused(message, lambda: loss(**options))


@pytest.mark.parametrize("logits", [None, LOGITS[0], LOGITS.long()])
def test_logits(logits: Any) -> None:
    refused(r"^codistillation_loss: student_logits of ", lambda: soft_of_logits(logits))


IDS = torch.zeros(T, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_balance_loss(None, IDS), r"load_balance_loss: logits of type NoneType"),  # type: ignore[arg-type]
        (lambda: load_balance_loss(LOGITS, IDS[1:]), r"expert_ids of shape \(4, 1\); must be \(5, any\)"),
        (lambda: load_balance_loss(LOGITS, ROWS[:, None]), r"expert_ids of torch.float32; must be torch.int64"),
        (lambda: load_balance_loss(LOGITS, IDS, ROWS), r"valid of torch.float32; must be torch.bool"),
        (lambda: load_balance_loss(LOGITS, IDS, load=ROWS), r"load of shape \(5,\); must be \(7\)"),
        (lambda: router_z_loss(LOGITS, ROWS[1:] == 0), r"router_z_loss: valid of shape \(4,\); must be \(5\)"),
        (lambda: router_z_loss(LOGITS.long()), r"router_z_loss: logits of torch.int64"),
        (lambda: update_expert_bias(ROWS, LABELS, float("nan")), r"rate=nan: must be a number >= 0"),
        (lambda: update_expert_bias(ROWS, LABELS[1:], 0.1), r"tokens_per_expert of shape \(4,\); must be \(5\)"),
        (lambda: update_expert_bias(LABELS, LABELS, 0.1), r"expert_bias of torch.int64"),
    ],
)
def test_balance(call: Callable[[], Any], message: str) -> None:
    refused(message, call)


def test_values_are_not_looked_at_where_that_would_wait_for_a_device() -> None:
    """The meta device has none; a GPU is treated alike."""
    assert soft_of_logits(LOGITS.to("meta"), LABELS.to("meta"), targets=DenseTargets(LOGITS.to("meta"))).is_meta
