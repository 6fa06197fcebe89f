"""What is kept of a teacher's logits: the top k exactly, the samples without bias."""

import pytest
import torch
from torch import Tensor

from moesaic.config import from_mapping
from moesaic.distillation import TargetFormat, kept_targets, sampled_targets, top_k_targets
from moesaic.errors import InputError
from moesaic.losses import codistillation_loss
from moesaic.losses.targets import DenseTargets, HeadTargets, SampledTargets, TopKTargets

N, V = 6, 11


def logits(n: int = N, vocab_size: int = V) -> Tensor:
    return 2 * torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def labels(n: int = N) -> Tensor:
    chosen = torch.arange(n) % V
    chosen[1] = -100
    return chosen


def dense(targets: SampledTargets, vocab_size: int = V) -> Tensor:
    found = torch.zeros(len(targets.ids), vocab_size, dtype=targets.weights.dtype)
    return found.scatter_add_(1, targets.ids, targets.weights)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_are_the_most_probable(temperature: float) -> None:
    found = top_k_targets(logits(), labels(), 4, temperature)
    p = (logits() / temperature).softmax(dim=-1)
    assert found.temperature == temperature
    assert found.ids.shape == (N, 4)
    torch.testing.assert_close(found.log_probs.exp(), p.sort(dim=-1, descending=True).values[:, :4])
    torch.testing.assert_close(found.log_probs.exp(), p.gather(1, found.ids))


def test_without_a_tail_the_k_sum_to_one_and_the_loss_is_their_divergence() -> None:
    """The student's mass outside the k counts against it in full, where the bucket would allow the teacher's."""
    found = top_k_targets(logits(), labels(), 4, tail="none")
    with_bucket = top_k_targets(logits(), labels(), 4)
    assert torch.equal(found.ids, with_bucket.ids)
    p = logits().softmax(dim=-1).gather(1, found.ids)
    p = p / p.sum(dim=1, keepdim=True)
    torch.testing.assert_close(found.log_probs.exp(), p)

    student = torch.randn(N, V, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    out = codistillation_loss(student, labels(), found, soft_weight=1.0)
    q = student.softmax(dim=-1).gather(1, found.ids)
    kl = (p * (p / q).log()).sum(dim=1)
    torch.testing.assert_close(out.soft, kl[labels() != -100].mean())

    knowing = codistillation_loss(logits(), labels(), with_bucket, soft_weight=1.0)
    torch.testing.assert_close(knowing.soft, torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    assert codistillation_loss(logits(), labels(), found, soft_weight=1.0).soft > 0.01  # it moves the optimum


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_statistics_are_those_of_temperature_one(kind: str) -> None:
    if kind == "top_k":
        found: TopKTargets | SampledTargets = top_k_targets(logits(), labels(), 2, 3.0)
    else:
        found = sampled_targets(logits(), labels(), 5, temperature=3.0)
    teacher = torch.distributions.Categorical(logits=logits())
    torch.testing.assert_close(found.entropy, teacher.entropy())
    valid = labels() != -100
    torch.testing.assert_close(found.label_log_prob[valid], teacher.log_prob(labels().where(valid, 0))[valid])
    assert found.label_log_prob[1] == 0


def test_zero_probabilities_stay_finite() -> None:
    some = logits()
    some[:, 4:] = -torch.inf
    for found in (top_k_targets(some, labels().clamp(max=3), 3), sampled_targets(some, labels().clamp(max=3), 20)):
        assert bool(found.entropy.isfinite().all())
        assert bool(found[1].isfinite().all())
        assert int(found.ids.max()) < 4


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_numbers_do_not_reach_what_is_impossible(
    extreme: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = logits()
    some[:, :2] = some[:, -2:] = -torch.inf
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full_like(rand(*size, **options), extreme))
    found = sampled_targets(some, torch.full((N,), -100), 3)
    assert found.ids.tolist() == [[2 if extreme == 0 else V - 3]] * N
    assert bool(found.weights.isfinite().all())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("exponent", [1.0, 0.7])
def test_sampling_is_unbiased(exponent: float, temperature: float) -> None:
    """Each entry's mean over many draws is p, within 5 of its own standard errors; self-normalized it is not."""
    repeats, draws = 20_000, 4
    row = logits(1)
    p = (row / temperature).softmax(dim=-1)[0]
    generator = torch.Generator().manual_seed(0)
    many, no_labels = row.expand(repeats, V), torch.full((repeats,), -100)
    found = dense(sampled_targets(many, no_labels, draws, exponent, temperature, generator=generator))
    z = (found.mean(dim=0) - p) / (found.std(dim=0) / repeats**0.5)
    assert float(z.abs().max()) < 5
    if exponent != 1:  # with exponent 1 every draw weighs the same, and dividing by the sum changes nothing
        normalized = found / found.sum(dim=1, keepdim=True)
        z = (normalized.mean(dim=0) - p) / (normalized.std(dim=0) / repeats**0.5)
        assert float(z.abs().max()) > 5


def test_samples_are_merged_and_filled_up() -> None:
    generator = torch.Generator().manual_seed(1)
    found = sampled_targets(logits(200), labels(200), 30, generator=generator)
    for ids, weights in zip(found.ids, found.weights, strict=True):
        kept = ids[weights > 0]
        assert len(kept.unique()) == len(kept)
        assert not ids[weights == 0].any()
    distinct = (found.weights > 0).sum(dim=1)
    assert found.ids.size(1) == int(distinct.max()) < 30
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(200, dtype=torch.float64))  # exponent 1
    counts = found.weights * 30
    torch.testing.assert_close(counts, counts.round())


def test_the_generator_decides_the_samples() -> None:
    def draw(seed: int) -> SampledTargets:
        return sampled_targets(logits(), labels(), 5, 0.7, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(dense(draw(1)), dense(draw(1)))
    assert not torch.equal(dense(draw(1)), dense(draw(2)))


@pytest.mark.parametrize("kind", ["top_k", "sampled", "dense"])
def test_targets_in_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks change nothing but the draws, and those only where the chunk size changes."""
    hidden, weight = torch.randn(50, 8), torch.randn(V, 8)
    form = from_mapping(TargetFormat, {"kind": kind, "k": 4, "num_samples": 6})
    monkeypatch.setattr("moesaic.distillation.sparsify.CHUNK_ELEMENTS", 20 * V)
    found = kept_targets(HeadTargets(hidden, weight), labels(50), form, torch.Generator().manual_seed(0))
    full = hidden @ weight.T
    if isinstance(found, DenseTargets):
        torch.testing.assert_close(found.logits, full)
    elif isinstance(found, TopKTargets):
        expected = top_k_targets(full, labels(50), 4)
        torch.testing.assert_close(found.log_probs, expected.log_probs)
        torch.testing.assert_close(found.label_log_prob, expected.label_log_prob)
    else:
        assert found.ids.shape == found.weights.shape
        torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(50))
        torch.testing.assert_close(found.entropy, top_k_targets(full, labels(50), 1).entropy)


@pytest.mark.parametrize("name", ["temperature", "k", "num_samples", "exponent"])
def test_impossible_settings_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}=0(\.0)?: must be"):
        from_mapping(TargetFormat, {name: 0})
    with pytest.raises(ValueError, match=rf"k=12: must be 1 to the vocabulary size, {V}"):
        top_k_targets(logits(), labels(), V + 1)
