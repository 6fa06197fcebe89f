"""Soft and hard targets in one loss: against an oracle, chunked against dense, and what must hold for any numbers."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference import codistillation as reference
from reference.comparing import OutputSizes, assert_close
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.losses import (
    DIVERGENCES,
    CodistillationOutput,
    DenseTargets,
    Gate,
    HeadTargets,
    SampledTargets,
    SoftWeight,
    SoftWeightConfig,
    Targets,
    TopKTargets,
    codistillation_loss,
    linear_codistillation_loss,
    linear_cross_entropy,
)

TOKENS, DIM, TEACHER_DIM, VOCAB = 23, 6, 8, 11
LABELS = (torch.arange(TOKENS) % VOCAB).masked_fill(torch.arange(TOKENS) % 3 == 0, -100)
SPARSE = ("top_k", "sampled")
GATES: dict[str, dict[str, Any]] = {
    "none": {},
    "entropy": {"gate_threshold": 1.5},
    "confidence": {"gate_power": 0.5},
    "agreement": {"gate_slope": 0.7, "gate_offset": 0.2},
    "student_uncertainty": {},
}
divergences = pytest.mark.parametrize("divergence", DIVERGENCES)
kinds = pytest.mark.parametrize("kind", ["dense", "head", *SPARSE])


def make_gate(name: str) -> Gate | None:
    return SoftWeight(SoftWeightConfig(gate=name, **GATES[name])).gate  # type: ignore[arg-type]


def networks(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of the student, then of the teacher, all with gradients."""
    shapes = ((TOKENS, DIM), (VOCAB, DIM), (TOKENS, TEACHER_DIM), (VOCAB, TEACHER_DIM))
    hidden, weight, t_hidden, t_weight = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    t_hidden = t_hidden * 0.5
    return tuple(x.to(dtype).requires_grad_() for x in (hidden, weight, t_hidden, t_weight))  # type: ignore[return-value]


def statistics_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    label = log_p.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return torch.special.entr(log_p.exp()).sum(-1), label.masked_fill(labels == -100, 0)


def top_k(logits: Tensor, labels: Tensor, k: int, temperature: float = 1.0) -> TopKTargets:
    log_probs, ids = (logits.detach() / temperature).log_softmax(-1).topk(k)
    return TopKTargets(ids, log_probs, temperature, *statistics_of(logits.detach(), labels))


def sampled(logits: Tensor, labels: Tensor, draws: int, omega: float = 1.0, temperature: float = 1.0) -> SampledTargets:
    p = (logits.detach() / temperature).softmax(-1)
    proposal = p**omega / (p**omega).sum(-1, keepdim=True)
    ids = proposal.multinomial(draws, replacement=True)
    weights = (p / proposal).gather(1, ids) / draws
    return SampledTargets(ids, weights, temperature, *statistics_of(logits.detach(), labels))


def make(kind: str, t_hidden: Tensor, t_weight: Tensor, temperature: float = 1.0, labels: Tensor = LABELS) -> Targets:
    logits = t_hidden @ t_weight.T
    if kind == "dense":
        return DenseTargets(logits)
    if kind == "head":
        return HeadTargets(t_hidden, t_weight)
    if kind == "top_k":
        return top_k(logits, labels, 4, temperature)
    return sampled(logits, labels, 5, 0.7, temperature)


def assert_same(
    found: CodistillationOutput, expected: CodistillationOutput | dict[str, Tensor], tolerance: float
) -> None:
    expected = expected if isinstance(expected, dict) else expected._asdict()
    for name, value in found._asdict().items():
        assert_close(value.detach(), expected[name].detach(), tolerance, name)


# ---- against the oracle


@divergences
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("gate", GATES)
def test_equals_the_oracle(divergence: str, temperature: float, gate: str) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    z = (hidden @ weight.T).detach().requires_grad_()
    teacher = (t_hidden @ t_weight.T).detach()
    found = codistillation_loss(
        z,
        LABELS,
        DenseTargets(teacher),
        soft_weight=0.6,
        divergence=divergence,
        coefficient=0.3,
        temperature=temperature,
        gate=make_gate(gate),
    )
    expected = reference.codistillation(
        z,
        teacher,
        LABELS,
        soft_weight=0.6,
        name=divergence,
        coefficient=0.3,
        temperature=temperature,
        gate_name=gate,
        gate_parameter=tuple(GATES[gate].values()),
    )
    assert_same(found, expected, 1e-12)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (found.loss, expected["loss"])]
    assert_close(*gradients, 1e-12, "gradient")


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 4, VOCAB])
def test_top_k_equals_the_oracle(k: int, temperature: float) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    z, teacher = (hidden @ weight.T).detach().requires_grad_(), t_hidden @ t_weight.T
    settings: dict[str, Any] = {"soft_weight": 0.6, "temperature": temperature}
    found = codistillation_loss(z, LABELS, top_k(teacher, LABELS, k, temperature), **settings)
    expected = reference.codistillation(z, teacher, LABELS, top_k=k, **settings)
    assert_same(found, expected, 1e-12)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (found.loss, expected["loss"])]
    assert_close(*gradients, 1e-12, "gradient")


# ---- chunked against dense


def compare(
    kind: str, chunk_tokens: int | None, temperature: float = 1.0, labels: Tensor = LABELS, **settings: Any
) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    targets = make(kind, t_hidden, t_weight, temperature, labels)
    settings = {"soft_weight": 0.6, "temperature": temperature, **settings}
    found = linear_codistillation_loss(hidden, weight, labels, targets, chunk_tokens=chunk_tokens, **settings)
    expected = codistillation_loss(hidden @ weight.T, labels, targets, **settings)
    assert_same(found, expected, 1e-12)
    upstream = torch.tensor(3.0, dtype=torch.float64)
    gradients = [torch.autograd.grad(out.loss, (hidden, weight), upstream) for out in (found, expected)]
    for name, f, e in zip(("hidden", "weight"), *gradients, strict=True):
        assert f.dtype == torch.float64
        assert_close(f, e, 1e-12, f"gradient of {name}")


@kinds
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("gate", GATES)
def test_chunked_is_dense(kind: str, chunk_tokens: int | None, temperature: float, gate: str) -> None:
    compare(kind, chunk_tokens, temperature, gate=make_gate(gate))


@divergences
@pytest.mark.parametrize("kind", ["dense", "head"])
@pytest.mark.parametrize("gate", ["none", "agreement"])
def test_chunked_is_dense_for_every_divergence(kind: str, divergence: str, gate: str) -> None:
    compare(kind, 7, divergence=divergence, coefficient=0.3, gate=make_gate(gate))


@pytest.mark.slow
@given(
    ignored=st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS),
    chunk_tokens=st.integers(1, TOKENS + 3),
    kind=st.sampled_from(["dense", "head", *SPARSE]),
    soft_weight=st.floats(0, 1),
)
def test_chunked_is_dense_whatever_is_ignored(
    ignored: list[bool], chunk_tokens: int, kind: str, soft_weight: float
) -> None:
    labels = (torch.arange(TOKENS) % VOCAB).masked_fill(torch.tensor(ignored), -100)
    compare(kind, chunk_tokens, labels=labels, soft_weight=soft_weight)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_one_side_frozen(frozen: str, divergence: str) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    trained = weight if frozen == "hidden" else hidden
    targets = HeadTargets(t_hidden, t_weight)
    losses = (
        linear_codistillation_loss(
            hidden, weight, LABELS, targets, soft_weight=0.6, divergence=divergence, chunk_tokens=7
        ).loss,
        codistillation_loss(hidden @ weight.T, LABELS, targets, soft_weight=0.6, divergence=divergence).loss,
    )
    assert_close(*(torch.autograd.grad(loss, trained)[0] for loss in losses), 1e-12, "gradient")


@kinds
def test_without_gradients(kind: str) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    targets = make(kind, t_hidden, t_weight)
    expected = linear_codistillation_loss(hidden, weight, LABELS, targets, soft_weight=0.6)
    with torch.no_grad(), OutputSizes() as sizes:
        found = linear_codistillation_loss(hidden, weight, LABELS, targets, soft_weight=0.6)
    assert not found.loss.requires_grad
    assert_same(found, expected, 1e-14)
    assert sizes.calls["aten::mm"] == (2 if kind == "head" else 1)
    assert "aten::addmm_" not in sizes.calls


def test_a_second_backward_is_refused() -> None:
    hidden, weight, t_hidden, t_weight = networks()
    loss = linear_codistillation_loss(hidden, weight, LABELS, HeadTargets(t_hidden, t_weight), soft_weight=0.6).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        loss.backward()


# ---- what must hold


@kinds
def test_weight_0_is_cross_entropy(kind: str) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    found = linear_codistillation_loss(hidden, weight, LABELS, make(kind, t_hidden, t_weight), soft_weight=0.0)
    expected = F.cross_entropy(hidden @ weight.T, LABELS)
    assert_close(found.loss.detach(), expected.detach(), 1e-14, "loss")
    assert_close(found.hard, expected.detach(), 1e-14, "hard")
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (found.loss, expected)]
    for f, e in zip(*gradients, strict=True):
        assert_close(f, e, 1e-14, "gradient")


@divergences
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_a_student_like_its_teacher_has_nothing_to_learn(divergence: str, temperature: float) -> None:
    hidden, weight, _, _ = networks()
    found = linear_codistillation_loss(
        hidden,
        weight,
        LABELS,
        HeadTargets(hidden, weight),
        soft_weight=1.0,
        divergence=divergence,
        temperature=temperature,
    )
    assert found.loss.abs() < 1e-13 and found.soft.abs() < 1e-13 and found.agreement == 1
    torch.testing.assert_close(found.hard, found.teacher_loss)
    for gradient in torch.autograd.grad(found.loss, (hidden, weight)):
        assert gradient.abs().max() < 1e-13


@pytest.mark.slow_but_for("1.0-reverse_kl", "2.0-forward_kl")
@divergences
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_by_differences(divergence: str, temperature: float) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    z, targets = (hidden @ weight.T).detach()[:6].requires_grad_(), DenseTargets((t_hidden @ t_weight.T).detach()[:6])

    def loss(z: Tensor) -> Tensor:
        return codistillation_loss(
            z, LABELS[:6], targets, soft_weight=0.6, divergence=divergence, temperature=temperature
        ).loss

    assert torch.autograd.gradcheck(loss, z)


@pytest.mark.slow_but_for("2.0-dense")
@kinds
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_by_differences_for_every_target(kind: str, temperature: float) -> None:
    """Of logits; the chunked loss hands its gradients out once, and is compared with this one."""
    hidden, weight, t_hidden, t_weight = networks()
    targets = make(kind, t_hidden.detach(), t_weight.detach(), temperature)

    def loss(z: Tensor) -> Tensor:
        return codistillation_loss(z, LABELS, targets, soft_weight=0.6, temperature=temperature).loss

    assert torch.autograd.gradcheck(loss, (hidden @ weight.T).detach().requires_grad_())


def test_the_mix_is_cross_entropy_to_the_mixed_target() -> None:
    hidden, weight, t_hidden, t_weight = networks()
    labels, a = torch.arange(TOKENS) % VOCAB, 0.7
    p = (t_hidden @ t_weight.T).detach().softmax(-1)
    mixed = (1 - a) * F.one_hot(labels, VOCAB).double() + a * p
    expected = F.cross_entropy(hidden @ weight.T, mixed) - a * torch.special.entr(p).sum(-1).mean()
    found = linear_codistillation_loss(hidden, weight, labels, HeadTargets(t_hidden, t_weight), soft_weight=a).loss
    assert_close(found.detach(), expected.detach(), 1e-13, "loss")
    assert_close(*(torch.autograd.grad(x, weight)[0] for x in (found, expected)), 1e-13, "gradient")


def test_a_high_temperature_matches_logits() -> None:
    """Hinton et al. 2015, section 2.1: the gradient tends to the difference of centred logits over V."""
    hidden, weight, t_hidden, t_weight = networks()
    z, t = (hidden @ weight.T).detach().requires_grad_(), (t_hidden @ t_weight.T).detach()
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    found = codistillation_loss(z, labels, DenseTargets(t), soft_weight=1.0, temperature=1e4, num_valid=1).loss
    expected = (z - z.mean(1, keepdim=True) - t + t.mean(1, keepdim=True)) / VOCAB
    assert_close(torch.autograd.grad(found, z)[0], expected.detach(), 1e-3, "gradient")


@kinds
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ignored_tokens_count_nowhere(kind: str, temperature: float) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    kept = LABELS != -100
    targets = make(kind, t_hidden, t_weight, temperature)
    rows = {k: v[kept] if isinstance(v, Tensor) and v.size(0) == TOKENS else v for k, v in targets._asdict().items()}
    settings: dict[str, Any] = {"soft_weight": 0.6, "temperature": temperature, "gate": make_gate("agreement")}
    found = linear_codistillation_loss(hidden, weight, LABELS, targets, chunk_tokens=7, **settings)
    expected = linear_codistillation_loss(hidden[kept], weight, LABELS[kept], type(targets)(**rows), **settings)
    assert_same(found, expected, 1e-13)
    gradient = torch.autograd.grad(found.loss, hidden)[0]
    assert not gradient[~kept].any() and gradient[kept].any(dim=1).all()
    assert_close(gradient, torch.autograd.grad(expected.loss, hidden)[0], 1e-13, "gradient")


def test_another_ignore_index() -> None:
    hidden, weight, t_hidden, t_weight = networks()
    targets = HeadTargets(t_hidden, t_weight)
    other = LABELS.masked_fill(LABELS == -100, VOCAB - 1).masked_fill(LABELS == 4, -1)
    for labels, ignore_index in ((other, -1), (LABELS.clamp(min=0), 0)):
        same = labels.masked_fill(labels == ignore_index, -100)
        for function in (linear_codistillation_loss, lambda h, w, *a, **k: codistillation_loss(h @ w.T, *a, **k)):
            found = function(hidden, weight, labels, targets, soft_weight=0.6, ignore_index=ignore_index)
            assert_same(found, function(hidden, weight, same, targets, soft_weight=0.6), 0)


@kinds
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_valid(kind: str, divergence: str, tokens: int) -> None:
    if kind in SPARSE and divergence != "forward_kl":
        return
    hidden, weight, t_hidden, t_weight = networks()
    hidden, labels = hidden.detach()[:tokens].requires_grad_(), torch.full((tokens,), -100)
    targets = make(kind, t_hidden[:tokens], t_weight, labels=labels)
    for found in (
        linear_codistillation_loss(hidden, weight, labels, targets, soft_weight=0.6, divergence=divergence),
        codistillation_loss(hidden @ weight.T, labels, targets, soft_weight=0.6, divergence=divergence),
    ):
        assert not any(value.item() for value in found)
        assert not any(gradient.any() for gradient in torch.autograd.grad(found.loss, (hidden, weight)))


@divergences
def test_a_shift_of_logits_changes_nothing(divergence: str) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    z, t = hidden @ weight.T, t_hidden @ t_weight.T
    shift = 50 * torch.randn(TOKENS, 1, dtype=torch.float64)
    settings: dict[str, Any] = {"soft_weight": 0.6, "divergence": divergence, "temperature": 2.0}
    found = codistillation_loss(z + shift, LABELS, DenseTargets(t - 3 * shift), **settings)
    assert_same(found, codistillation_loss(z, LABELS, DenseTargets(t), **settings), 1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_micro_batches_add_up(divergence: str) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    num_valid = (LABELS != -100).sum()
    settings: dict[str, Any] = {"soft_weight": 0.6, "divergence": divergence, "gate": make_gate("agreement")}
    whole = linear_codistillation_loss(hidden, weight, LABELS, HeadTargets(t_hidden, t_weight), **settings)
    for count in (num_valid, int(num_valid)):
        parts = [
            linear_codistillation_loss(
                hidden[rows], weight, LABELS[rows], HeadTargets(t_hidden[rows], t_weight), num_valid=count, **settings
            )
            for rows in (slice(0, 4), slice(4, 5), slice(5, TOKENS))
        ]
        total = CodistillationOutput(*(sum(values) for values in zip(*parts, strict=True)))  # type: ignore[arg-type]
        assert_same(total, whole, 1e-13)
        found = torch.autograd.grad(total.loss, (hidden, weight))
    for f, e in zip(found, torch.autograd.grad(whole.loss, (hidden, weight)), strict=True):
        assert_close(f, e, 1e-13, "gradient")


def test_the_outputs_explain_the_loss() -> None:
    hidden, weight, t_hidden, t_weight = networks()
    found = linear_codistillation_loss(
        hidden, weight, LABELS, HeadTargets(t_hidden, t_weight), soft_weight=torch.tensor(0.6)
    )
    torch.testing.assert_close(found.loss.detach(), 0.4 * found.hard + 0.6 * found.soft, rtol=1e-6, atol=0)
    assert found.soft_weight.item() == pytest.approx(0.6)
    assert 0 < found.agreement < 1
    assert [value.requires_grad for value in found] == [True, *5 * [False]]


# ---- sparse targets


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_k_most_probable_of_all_are_dense(temperature: float) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    t = t_hidden @ t_weight.T
    settings: dict[str, Any] = {"soft_weight": 0.6, "temperature": temperature, "gate": make_gate("agreement")}
    found = linear_codistillation_loss(hidden, weight, LABELS, top_k(t, LABELS, VOCAB, temperature), **settings)
    expected = linear_codistillation_loss(hidden, weight, LABELS, DenseTargets(t), **settings)
    assert_same(found, expected, 1e-12)
    gradients = (torch.autograd.grad(out.loss, weight)[0] for out in (found, expected))
    assert_close(*gradients, 1e-12, "gradient")


def test_top_k_is_a_lower_bound_that_grows_with_k() -> None:
    hidden, weight, t_hidden, t_weight = networks()
    z, t = hidden @ weight.T, t_hidden @ t_weight.T
    values = [codistillation_loss(z, LABELS, top_k(t, LABELS, k), soft_weight=1.0).soft for k in range(1, VOCAB)]
    assert all(a < b for a, b in itertools.pairwise(values))  # with k = V - 1 the tail is one token
    dense = codistillation_loss(z, LABELS, DenseTargets(t), soft_weight=1.0).soft
    torch.testing.assert_close(values[-1], dense)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_does_not_move_the_optimum(temperature: float) -> None:
    """Without the tail, or renormalized, the gradient at the teacher itself is not 0."""
    z = (networks()[0] @ networks()[1].T).detach().requires_grad_()
    targets = top_k(z, LABELS, 4, temperature)
    found = codistillation_loss(z, LABELS, targets, soft_weight=1.0, temperature=temperature)
    assert found.loss.abs() < 1e-13
    assert torch.autograd.grad(found.loss, z)[0].abs().max() < 1e-13

    renormalized = targets.log_probs.log_softmax(-1)
    log_q = (z / temperature).log_softmax(-1).gather(1, targets.ids)
    assert torch.autograd.grad((renormalized.exp() * (renormalized - log_q)).sum(), z)[0].abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_that_holds_all_mass_stays_finite(dtype: torch.dtype) -> None:
    teacher = torch.zeros(TOKENS, VOCAB, dtype=dtype)
    teacher[:, 2] = 500.0
    labels = torch.arange(TOKENS) % VOCAB
    rounded_up = top_k(teacher, labels, 3)
    rounded_up = rounded_up._replace(log_probs=rounded_up.log_probs + 1e-6)  # as after storing in few bits
    for targets in (top_k(teacher, labels, 1), top_k(teacher, labels, 3), rounded_up):
        for student in (teacher, -teacher, torch.randn_like(teacher), teacher.roll(1, dims=1)):
            z = student.clone().requires_grad_()
            found = codistillation_loss(z, labels, targets, soft_weight=1.0)
            assert all(value.isfinite() for value in found)
            assert torch.autograd.grad(found.loss, z)[0].isfinite().all()


def z_scores(estimates: Tensor, truth: Tensor) -> Tensor:
    """(runs, ...) estimates; how many standard errors their mean is off."""
    error = estimates.std(dim=0) / math.sqrt(estimates.size(0))
    return (estimates.mean(dim=0) - truth).abs() / error.clamp(min=1e-12)


def self_normalized(targets: SampledTargets) -> SampledTargets:
    return targets._replace(weights=targets.weights / targets.weights.sum(1, keepdim=True))


@pytest.mark.slow_but_for("1.0-0.5-self_normalized-False")
@pytest.mark.parametrize(
    ("omega", "change", "unbiased"),
    [
        (1.0, lambda targets: targets, True),
        (0.7, lambda targets: targets, True),
        (0.5, lambda targets: targets, True),
        (0.5, self_normalized, False),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_targets_are_unbiased(
    omega: float, change: Callable[[SampledTargets], SampledTargets], unbiased: bool, temperature: float
) -> None:
    batches, batch, draws = 100, 200, 3
    z, t = torch.randn(2, 1, VOCAB, dtype=torch.float64) * 1.5
    settings: dict[str, Any] = {"soft_weight": 1.0, "temperature": temperature}

    def value_and_gradient(make_targets: Callable[[Tensor, Tensor], Targets], tokens: int) -> Tensor:
        student, labels = z.expand(tokens, -1).clone().requires_grad_(), torch.full((tokens,), 3)
        loss = codistillation_loss(student, labels, make_targets(t.expand(tokens, -1), labels), **settings).loss
        return torch.cat([loss.detach()[None], torch.autograd.grad(loss, student)[0].sum(0)])

    exact = value_and_gradient(lambda t, labels: DenseTargets(t), 1)
    if temperature != 1:  # the entropy at this temperature is not known, and left out
        exact[0] += temperature**2 * reference.entropy(reference.softmax(t[0], temperature))
    estimates = [
        value_and_gradient(lambda t, labels: change(sampled(t, labels, draws, omega, temperature)), batch)
        for _ in range(batches)
    ]
    scores = z_scores(torch.stack(estimates), exact)
    assert scores.max() < 4 if unbiased else (scores[0] > 10 and scores[1:].max() > 10)


def test_filling_up_a_row_changes_nothing() -> None:
    hidden, weight, t_hidden, t_weight = networks()
    targets = sampled(t_hidden @ t_weight.T, LABELS, 5)
    filled = targets._replace(ids=F.pad(targets.ids, (0, 2)), weights=F.pad(targets.weights, (0, 2)))
    outs = [linear_codistillation_loss(hidden, weight, LABELS, t, soft_weight=0.6) for t in (targets, filled)]
    assert_same(outs[0], outs[1], 1e-14)


def test_agreement_of_sampled_targets_sums_equal_ids() -> None:
    """Id 1 was drawn once with .4, id 2 twice with .3: the teacher's most likely token is taken to be 2."""
    targets = SampledTargets(
        torch.tensor([[1, 2, 2]]), torch.tensor([[0.4, 0.3, 0.3]]), 1.0, torch.ones(1), torch.tensor([-1.0])
    )
    for favorite, expected in ((1, 0.0), (2, 1.0)):
        z = F.one_hot(torch.tensor([favorite]), 5).float()
        found = codistillation_loss(z, torch.tensor([0]), targets, soft_weight=0.5)
        assert found.agreement == expected and found.teacher_loss == 1


# ---- the teacher


@kinds
@pytest.mark.parametrize("function", ["dense", "linear"])
def test_the_student_loss_does_not_reach_the_teacher(kind: str, function: str) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    targets = make(kind, t_hidden, t_weight)
    if function == "dense":
        found = codistillation_loss(hidden @ weight.T, LABELS, targets, soft_weight=0.6)
    else:
        found = linear_codistillation_loss(hidden, weight, LABELS, targets, soft_weight=0.6)
    found.loss.backward()
    assert t_hidden.grad is None and t_weight.grad is None and not found.teacher_loss.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16", "autocast"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("labels", [LABELS, torch.arange(TOKENS) % VOCAB])
def test_the_teacher_loss_is_bit_equal_to_its_own(precision: str, divergence: str, labels: Tensor) -> None:
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(precision, torch.float32)
    hidden, weight, t_hidden, t_weight = networks(dtype)
    upstream = torch.tensor(0.3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        found = linear_codistillation_loss(
            hidden,
            weight,
            labels,
            HeadTargets(t_hidden, t_weight),
            soft_weight=0.6,
            divergence=divergence,
            train_teacher=True,
            chunk_tokens=7,
        )
        alone = linear_cross_entropy(t_hidden, t_weight, labels, chunk_tokens=7)
        frozen = linear_codistillation_loss(
            hidden,
            weight,
            labels,
            HeadTargets(t_hidden, t_weight),
            soft_weight=0.6,
            divergence=divergence,
            chunk_tokens=7,
        )
    assert torch.equal(found.teacher_loss, alone)
    trained = (t_hidden, t_weight)
    together = torch.autograd.grad(found.loss * 5 + found.teacher_loss * upstream, (*trained, hidden, weight))
    for f, e in zip(together[:2], torch.autograd.grad(alone * upstream, trained), strict=True):
        assert torch.equal(f, e)
    for f, e in zip(together[2:], torch.autograd.grad(frozen.loss * 5, (hidden, weight)), strict=True):
        assert torch.equal(f, e)


def test_both_losses_may_go_backward_apart() -> None:
    hidden, weight, t_hidden, t_weight = networks()
    found = linear_codistillation_loss(
        hidden, weight, LABELS, HeadTargets(t_hidden, t_weight), soft_weight=0.6, train_teacher=True
    )
    found.loss.backward(retain_graph=True)
    assert weight.grad is not None and t_weight.grad is None
    student_grad = weight.grad.clone()
    found.teacher_loss.backward()
    assert torch.equal(weight.grad, student_grad)
    expected = torch.autograd.grad(linear_cross_entropy(t_hidden, t_weight, LABELS), t_weight)[0]
    assert t_weight.grad is not None and torch.equal(t_weight.grad, expected)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_teacher_that_trains_along_ends_as_if_alone(divergence: str) -> None:
    def train(with_student: bool) -> list[Tensor]:
        torch.manual_seed(1)
        teacher = nn.Sequential(nn.Embedding(VOCAB, TEACHER_DIM), nn.GELU(), nn.Linear(TEACHER_DIM, TEACHER_DIM))
        head = nn.Parameter(torch.randn(VOCAB, TEACHER_DIM))
        student = nn.Embedding(VOCAB, DIM)
        student_head = nn.Parameter(torch.randn(VOCAB, DIM))
        before = student_head.detach().clone()
        optimizers = [
            torch.optim.AdamW([*teacher.parameters(), head], lr=1e-2),
            torch.optim.AdamW([*student.parameters(), student_head], lr=1e-2),
        ]
        generator = torch.Generator().manual_seed(2)
        for _ in range(8):
            tokens = torch.randint(VOCAB, (40,), generator=generator)
            labels = torch.randint(VOCAB, (40,), generator=generator).masked_fill(tokens == 0, -100)
            hidden = teacher(tokens)
            if with_student:
                out = linear_codistillation_loss(
                    student(tokens),
                    student_head,
                    labels,
                    HeadTargets(hidden, head),
                    soft_weight=0.5,
                    divergence=divergence,
                    train_teacher=True,
                )
                (out.loss + out.teacher_loss).backward()
            else:
                linear_cross_entropy(hidden, head, labels).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert with_student != torch.equal(student_head, before)
        return [parameter.detach().clone() for parameter in (*teacher.parameters(), head)]

    for together, alone in zip(train(True), train(False), strict=True):
        assert torch.equal(together, alone)


# ---- precision and memory


@kinds
@pytest.mark.parametrize("precision", ["bf16", "fp16", "autocast"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_low_precision(kind: str, precision: str, temperature: float) -> None:
    """Products in the low precision, softmax and losses in fp32, gradients in the dtype of what they belong to."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    hidden, weight, t_hidden, t_weight = networks(dtype)
    targets = make(kind, t_hidden.detach(), t_weight.detach(), temperature)
    settings: dict[str, Any] = {"soft_weight": 0.6, "temperature": temperature, "gate": make_gate("agreement")}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        found = linear_codistillation_loss(hidden, weight, LABELS, targets, chunk_tokens=7, **settings)
        dense = codistillation_loss(hidden @ weight.T, LABELS, targets, **settings)
    assert {value.dtype for value in (*found, *dense)} == {torch.float32}
    assert_same(found, dense, 1e-5)
    gradients = [torch.autograd.grad(out.loss, (hidden, weight)) for out in (found, dense)]
    for f, e in zip(*gradients, strict=True):
        assert f.dtype == dtype
        assert_close(f, e, 0.02, "gradient")


@divergences
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(divergence: str, dtype: torch.dtype) -> None:
    hidden, weight, t_hidden, t_weight = (x.detach() for x in networks(dtype))
    hidden = (hidden * 1e3).requires_grad_()
    found = linear_codistillation_loss(
        hidden, weight, LABELS, HeadTargets(t_hidden * -1e3, t_weight), soft_weight=0.6, divergence=divergence
    )
    assert all(value.isfinite() for value in found)
    assert torch.autograd.grad(found.loss, hidden)[0].isfinite().all()


def test_a_teacher_without_mass_on_a_token() -> None:
    """Logits of -inf (a token that cannot come) are no NaN."""
    hidden, weight, t_hidden, t_weight = networks()
    t = (t_hidden @ t_weight.T).detach()
    t[:, VOCAB - 1] = -torch.inf
    labels = LABELS.clamp(max=VOCAB - 2)
    found = linear_codistillation_loss(hidden, weight, labels, DenseTargets(t), soft_weight=0.6)
    dense = codistillation_loss(hidden @ weight.T, labels, DenseTargets(t), soft_weight=0.6)
    assert dense.loss.isfinite()
    assert_same(found, dense, 1e-12)


@pytest.mark.slow_but_for("top_k")
@kinds
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("gate", ["none", "agreement"])
@pytest.mark.parametrize("train_teacher", [False, True])
def test_no_tensor_of_all_tokens_and_the_vocabulary(kind: str, divergence: str, gate: str, train_teacher: bool) -> None:
    if (kind in SPARSE and divergence != "forward_kl") or (train_teacher and kind != "head"):
        return
    tokens, vocab, chunk = 512, 64, 8
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    t_hidden, t_weight = torch.randn(tokens, 5, requires_grad=True), torch.randn(vocab, 5, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    targets = make(kind, t_hidden, t_weight, labels=labels)
    settings: dict[str, Any] = {"soft_weight": 0.6, "divergence": divergence, "gate": make_gate(gate)}
    with OutputSizes() as sizes:
        out = linear_codistillation_loss(
            hidden, weight, labels, targets, chunk_tokens=chunk, train_teacher=train_teacher, **settings
        )
        (out.loss + out.teacher_loss).backward()
    # in between: hidden states (tokens, 5), and targets of dense logits, which the caller made, sliced
    assert sizes.largest <= tokens * 5 < tokens * vocab / 8
    with OutputSizes() as sizes:  # the recorder would see them
        codistillation_loss(hidden @ weight.T, labels, targets, **settings).loss.backward()
    assert sizes.largest == tokens * vocab


# ---- refusals


def refuse(match: str, targets: Targets | None = None, **settings: Any) -> None:
    hidden, weight, t_hidden, t_weight = networks()
    targets = HeadTargets(t_hidden, t_weight) if targets is None else targets
    settings = {"soft_weight": 0.5, **settings}
    with pytest.raises(InputError, match=match):
        linear_codistillation_loss(hidden, weight, LABELS, targets, **settings)
    settings.pop("train_teacher", None)
    if "train_teacher" not in match:
        with pytest.raises(InputError, match=match):
            codistillation_loss(hidden @ weight.T, LABELS, targets, **settings)


@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("coefficient", [0.0, 1.0, -0.1, math.nan])
def test_a_coefficient_at_the_ends_is_refused(divergence: str, coefficient: float) -> None:
    """Where others silently switch to a whole KL."""
    refuse(rf"coefficient=.*{divergence}", divergence=divergence, coefficient=coefficient)


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("divergence", sorted(set(DIVERGENCES) - {"forward_kl"}))
def test_sparse_targets_allow_forward_kl_only(kind: str, divergence: str) -> None:
    targets = make(kind, *networks()[2:])
    refuse(f"divergence='{divergence}'.*allow forward_kl only", targets, divergence=divergence)


@pytest.mark.parametrize("kind", SPARSE)
def test_another_temperature_than_that_of_the_targets_is_refused(kind: str) -> None:
    refuse(r"temperature=1\.0.*made at temperature 2\.0", make(kind, *networks()[2:], temperature=2.0))


def test_another_vocabulary_is_refused() -> None:
    _, _, t_hidden, t_weight = networks()
    refuse("HeadTargets: a vocabulary of 10; the student's is 11", HeadTargets(t_hidden, t_weight[:-1]))
    refuse("DenseTargets: a vocabulary of 13; the student's is 11", DenseTargets(torch.randn(TOKENS, 13)))
    wide = top_k(torch.randn(TOKENS, 13), LABELS, 12)
    refuse("TopKTargets: 12 tokens; must be at most 11, the vocabulary", wide)


@kinds
def test_targets_of_other_tokens_are_refused(kind: str) -> None:
    _, _, t_hidden, t_weight = networks()
    refuse(f"{TOKENS - 1} rows for {TOKENS} tokens", make(kind, t_hidden[1:], t_weight, labels=LABELS[1:]))


@pytest.mark.parametrize(
    ("match", "settings"),
    [
        ("divergence='kl': must be one of forward_kl, ", {"divergence": "kl"}),
        (r"temperature=0\.0", {"temperature": 0.0}),
        ("temperature=nan", {"temperature": math.nan}),
        (r"soft_weight=1\.1", {"soft_weight": 1.1}),
        (r"soft_weight=-0\.1", {"soft_weight": -0.1}),
        ("soft_weight=nan", {"soft_weight": math.nan}),
        (r"soft_weight: found shape \(23,\)", {"soft_weight": torch.full((TOKENS,), 0.5)}),
    ],
)
def test_bad_settings_are_refused(match: str, settings: dict[str, Any]) -> None:
    refuse(match, **settings)


def test_only_a_teacher_with_a_head_can_train() -> None:
    refuse("train_teacher=True: found DenseTargets", DenseTargets(torch.randn(TOKENS, VOCAB)), train_teacher=True)
