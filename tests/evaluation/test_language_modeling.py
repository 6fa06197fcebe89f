"""Scores by hand on a rigged model."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moesaic.data import Data, TokenStream
from moesaic.evaluation.language_modeling import (
    LanguageModelScore,
    evaluate_language_model,
    evaluate_split,
    on_windows,
    sampled_windows,
)
from moesaic.models import build_decoder, llama4_toy


def test_by_hand() -> None:
    score = LanguageModelScore(token_bytes=torch.tensor([0, 1, 3]))
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [[0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]]]))
    labels = torch.tensor([[0, 2], [1, -100]])
    score.update(F.cross_entropy(logits.mT, labels, reduction="none"), labels)
    assert score.num_tokens == 3
    assert score.num_bytes == 0 + 3 + 1
    nats = -math.log(0.5) - math.log(0.8) - math.log(0.2)
    assert score.loss == pytest.approx(nats / 3)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 4)
    assert score.loss_by_position == pytest.approx([(-math.log(0.5) - math.log(0.2)) / 2, -math.log(0.8)])


def test_unknown_bytes_give_no_bits_per_byte() -> None:
    score = LanguageModelScore()
    score.update(torch.full((1, 2), math.log(4)), torch.tensor([[0, 1]]))
    assert score.bits_per_byte is None
    assert score.loss == pytest.approx(math.log(4))


def test_batches_of_any_size_add_up_and_padding_is_invisible() -> None:
    decoder = build_decoder(llama4_toy())
    tokens = torch.randint(0, 512, (6, 17))
    whole = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 4), slice(4, 6))]
    padding = torch.zeros(6, 5, dtype=torch.int64)
    padded = {
        "tokens": torch.cat((whole["tokens"], padding), 1),
        "labels": torch.cat((whole["labels"], padding - 100), 1),
        "valid": torch.arange(21).expand(6, 21) < 16,
    }
    decoder.train()
    scores = [evaluate_language_model(decoder, batches) for batches in ([whole], parts, [padded])]
    assert decoder.training, "the mode is given back"
    for score in scores[1:]:
        assert score.loss == pytest.approx(scores[0].loss, rel=1e-6)
        assert score.num_tokens == scores[0].num_tokens
        for layer, counts in scores[0].tokens_per_expert.items():
            assert torch.equal(counts, score.tokens_per_expert[layer])


def test_all_logits_at_once_are_never_built_and_the_loss_is_the_same_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = build_decoder(llama4_toy()).eval()
    tokens = torch.randint(0, 512, (4, 301))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:].clone()}
    batch["labels"][1, 7:90] = -100
    with torch.no_grad():
        logits = decoder(batch["tokens"]).logits
    whole = LanguageModelScore()
    whole.update(
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none").view(4, 300), batch["labels"]
    )

    def refuse(*_: object) -> None:
        raise AssertionError("the head ran over all tokens")

    monkeypatch.setattr(decoder.head, "forward", refuse)
    score = evaluate_language_model(decoder, [batch])
    assert torch.equal(score.nats_by_position, whole.nats_by_position)
    assert score.num_tokens == whole.num_tokens


def test_sampled_windows_are_different_and_at_the_same_places_of_the_text() -> None:
    found = sampled_windows(10_001, 100, 20)
    assert len(set(found.tolist())) == 20
    assert found.tolist() == sorted(found.tolist())
    assert set(found.tolist()) < set(range(100))
    assert np.array_equal(found, sampled_windows(10_001, 100, 20)), "a fixed seed"
    assert set(sampled_windows(10_001, 100, 10)) < set(found), "a smaller sample is part of a larger one"
    longer = sampled_windows(10_001, 400, 10)
    assert set(longer) <= set(sampled_windows(10_001, 100, 25) // 4), "longer windows hold the same places"
    for count in (100, 101, 10**6):
        assert sampled_windows(10_001, 100, count).tolist() == list(range(100)), "the whole split"
    assert sampled_windows(10_002, 100, 101).tolist() == list(range(101)), "the last one is short"
    assert sampled_windows(50, 100, 3).tolist() == [0]
    assert len(set(sampled_windows(10_001, 100, 99).tolist())) == 99


def test_the_standard_error_is_that_of_many_samples() -> None:
    """Of windows of unlike bytes: the spread of the scores of random samples is what one sample says on average."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200, 8), generator=draw)
    nats = torch.rand(200, 8, generator=draw) * (1 + torch.arange(200).view(-1, 1) / 50)

    def score_of(rows: torch.Tensor) -> LanguageModelScore:
        score = LanguageModelScore(token_bytes=torch.tensor([1, 2, 5]), windows_in_split=200)
        for part in rows.split(7):
            score.update(nats[part], labels[part])
        return score

    whole = score_of(torch.arange(200)).numbers()
    assert (whole["validation/windows"], whole["validation/windows_in_split"]) == (200, 200)
    assert "validation/loss_standard_error" not in whole
    assert on_windows(whole) == on_windows({}) == ""
    samples = [score_of(torch.randperm(200, generator=draw)[:50]).numbers() for _ in range(300)]
    assert on_windows(samples[0]) == "on 50 of 200 windows"
    for name in ("validation/loss", "validation/bits_per_byte"):
        found = np.array([sample[name] for sample in samples])
        said = np.array([sample[f"{name}_standard_error"] for sample in samples])
        assert found.mean() == pytest.approx(whole[name], rel=0.01)
        assert said.mean() == pytest.approx(found.std(), rel=0.1)


def test_a_sample_of_the_split_is_scored_and_a_large_one_is_all_of_it() -> None:
    decoder = build_decoder(llama4_toy())
    stream = TokenStream(np.random.default_rng(0).integers(0, 512, 330, dtype=np.uint16), None, ())
    data = Data(stream, stream, None, 512, {})
    sizes = {"seq_len": 16, "batch_size": 3}
    whole, large, sample = (evaluate_split(decoder, data, **sizes, windows=n) for n in (None, 21, 5))
    assert whole.num_windows == whole.windows_in_split == 21
    assert (large.loss, large.num_tokens) == (whole.loss, 329)
    assert (sample.num_windows, sample.windows_in_split) == (5, 21)
    chosen = sampled_windows(330, 16, 5)
    parts = torch.cat(whole.sums_of_windows, dim=1)[:, chosen]
    assert sample.loss == pytest.approx(float(parts[0].sum() / parts[1].sum()), rel=1e-6)
