"""Scores by hand on a rigged model."""

import math

import pytest
import torch
import torch.nn.functional as F

from moesaic.evaluation.language_modeling import LanguageModelScore, evaluate_language_model
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
