"""`trainer.precision=auto`: what is faster is taken, and said."""

import pytest
import torch

from moesaic.models import AttentionConfig, DecoderConfig
from moesaic.training.config import TrainingConfig
from moesaic.training.precision import choose_precision

MODEL = DecoderConfig(
    vocab_size=17,
    dim=8,
    num_layers=1,
    hidden_dim=16,
    attention=AttentionConfig(num_heads=2, head_dim=4),
    interleave_moe_layer_step=0,
    nope_layer_interval=0,
)


class Clock:
    """Lets the calls in fp32 take `second` each and those in bf16 `share` of it."""

    def __init__(self, share: float, second: float = 1.0) -> None:
        self.now, self.calls, self.share, self.second = 0.0, 0, share, second

    def __call__(self) -> float:
        if self.calls % 2:
            self.now += self.second * (self.share if self.calls % 4 == 3 else 1.0)
        self.calls += 1
        return self.now


@pytest.mark.parametrize(("share", "expected"), [(0.5, "bf16-mixed"), (0.9, "32-true"), (2.0, "32-true")])
def test_the_faster_one_is_chosen(monkeypatch: pytest.MonkeyPatch, share: float, expected: str) -> None:
    monkeypatch.setattr("moesaic.training.precision.time.perf_counter", Clock(share))
    random_state = torch.get_rng_state()
    chosen, reason = choose_precision(MODEL, TrainingConfig(steps=1, batch_size=2, seq_len=4), "cpu")
    assert chosen == expected
    assert f"here bf16-mixed takes {share:.2f} times as long as 32-true" in reason
    assert torch.equal(random_state, torch.get_rng_state())


def test_what_is_too_short_to_tell_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.training.precision.time.perf_counter", Clock(0.5, second=0.01))
    chosen, reason = choose_precision(MODEL, TrainingConfig(steps=1, batch_size=2, seq_len=4), "cpu")
    assert chosen == "32-true" and "takes less than 0.05 s" in reason
