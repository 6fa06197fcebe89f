"""Parts in which nothing is wrong pass every check of parts; each rigged one fails the check that is meant for it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import rigged_parts as parts
from torch import nn

from moesaic.errors import InputError
from moesaic.imports import trusting
from moesaic.layers import Attention, MoE, RotaryEmbedding
from moesaic.models.config import AttentionConfig, CustomModule, DecoderConfig, LayerConfig, Mixer, MoEConfig
from moesaic.models.seams import Seam
from moesaic.testing import check_decoder_parts, check_named_part, check_part

ORDER = [
    "repeatability",
    "causality",
    "batch independence",
    "length independence",
    "gradients",
    "finite numbers",
    "state in the checkpoint",
    "padding",
    "cached decoding",
]
REPEATS, CAUSAL, BATCH, LENGTH, GRADIENTS, FINITE, STATE, PADDING, CACHE = ORDER


@pytest.mark.slow_but_for("LinearRouter", "Average", "Stacked", "ffn")
@pytest.mark.parametrize(
    ("seam", "make", "applies"),
    [
        ("router", parts.LinearRouter, 7),
        ("router", parts.NoisyRouter, 7),
        ("router", parts.Chained, 7),
        ("router", parts.ByTokenId, 7),
        ("router", partial(parts.RunningLoad, persistent=True), 7),
        ("router", parts.Moved, 7),
        ("mixer", parts.Average, 9),
        ("mixer", parts.OnlySingle, 9),
        ("mixer", partial(parts.Counts, "saved"), 9),
        ("mixer", parts.DrawsFromPython, 6),
        ("expert", parts.Stacked, 7),
        ("mixer", lambda: Attention(32, num_heads=4, rotary=RotaryEmbedding(8), attention_chunk_size=8), 9),
        ("ffn", lambda: MoE.build(32, 16, 4, top_k=2, expert_bias=True), 7),
    ],
)
def test_nothing_is_wrong(seam: Seam, make: Callable[[], nn.Module], applies: int) -> None:
    report = check_part(make, seam, dim=32)
    assert [row.check for row in report.rows] == ORDER
    assert not report.failures, str(report)
    assert sum(row.status == "pass" for row in report.rows) == applies
    for row in report.rows:
        assert row.detail and row.statement and "#" in row.bug


@pytest.mark.slow_but_for(
    "router-LeavesTheMean",
    "mixer-BeginsAnew-fails22-the output two steps after loading",
    "mixer-ForgetsTheCount-fails29-tokens one by one and at once",
)
@pytest.mark.parametrize(
    ("seam", "make", "fails", "said"),
    [
        ("router", parts.ExpertChoice, {CAUSAL, BATCH, LENGTH}, "when the tokens from there on are"),
        ("router", parts.LeavesTheMean, {CAUSAL, BATCH, LENGTH}, "the output of token 0 depends on later tokens"),
        ("router", parts.ReadsTheMean, {CAUSAL, BATCH, LENGTH}, "the output of token 0 depends on later tokens"),
        ("router", parts.LeavesTheMeanLater, {CAUSAL, BATCH, LENGTH}, "depends on later tokens"),
        ("router", parts.CountsLayers, {CAUSAL, BATCH, LENGTH}, "depends on later tokens"),
        ("router", parts.ChangesTheState, set(ORDER[:7]), "it changes router_state in place, which others read too"),
        ("router", partial(parts.Moved, "attribute"), {STATE}, "not in the state dict: router.bias"),
        ("router", partial(parts.Moved, observes=False), {STATE}, "Moved: observe returned NoneType; must be a tensor"),
        ("router", parts.LimitedCapacity, {BATCH, LENGTH}, "when the others of its batch are"),
        ("router", parts.UnusedParameter, {GRADIENTS}, "bias get none"),
        ("router", parts.NormalizedTop1, {GRADIENTS}, "weight only zeros"),
        ("router", parts.RunningLoad, {STATE}, "not in the state dict: router.load"),
        ("mixer", parts.Centered, {CAUSAL, LENGTH, PADDING, CACHE}, "the output of token 0 depends on later tokens"),
        ("mixer", parts.ByLength, {LENGTH, PADDING, CACHE}, "the first 1 outputs when no token follows"),
        ("mixer", parts.SeesOneBeyondItsChunk, {CAUSAL, LENGTH}, "the output of token 7 depends on later tokens"),
        ("mixer", parts.BatchNorm, {CAUSAL, BATCH, LENGTH}, "depends on other sequences"),
        ("ffn", parts.BatchMean, {BATCH}, "depends on other sequences"),
        ("mixer", parts.TimesZero, {GRADIENTS}, "gate only zeros"),
        ("mixer", parts.Exponential, {FINITE}, "inputs of scale 1000: not finite: output"),
        ("mixer", parts.ByDeviation, {FINITE}, "inputs that are all 0: not finite"),
        ("mixer", partial(parts.Counts, "number"), {STATE}, "not in the state dict: steps"),
        ("mixer", partial(parts.Counts, "buffer"), {STATE}, "not in the state dict: steps"),
        ("mixer", parts.BeginsAnew, {CAUSAL, BATCH, STATE}, "the output two steps after loading"),
        ("mixer", parts.RandomProjection, {STATE}, "not in the state dict: projection"),
        ("mixer", parts.DrawsBeyondSeeds, {REPEATS, STATE}, "two calls with one input and one seed differ"),
        ("mixer", parts.DrawsFromItsOwn, {STATE}, "not in the state dict: generator"),
        ("mixer", parts.DrawsFromNumpy, {STATE}, "which no checkpoint keeps"),
        ("mixer", parts.Remembers, {BATCH}, "a batch in evaluation when another one came before it"),
        ("mixer", parts.ForgetsTheMask, {PADDING}, "real tokens with padding on the left and alone"),
        ("mixer", parts.ForgetsTheCount, {CACHE}, "tokens one by one and at once"),
        ("expert", parts.CenteredExperts, {CAUSAL, BATCH, LENGTH}, "depends on later tokens"),
    ],
)
def test_each_check_catches_its_own(seam: Seam, make: Callable[[], nn.Module], fails: set[str], said: str) -> None:
    report = check_part(make, seam, dim=32)
    assert {row.check for row in report.failures} == fails, str(report)
    assert any(said in row.detail for row in report.failures), str(report)


def test_a_leak_in_later_layers_alone_shows_in_a_model() -> None:
    assert not check_part(lambda: parts.LeaksInLaterLayers(32, parts.EXPERTS, 0), "router", dim=32).failures
    with trusting(["rigged_parts"]):
        named = check_named_part("router", "rigged_parts:LeaksInLaterLayers")
        router = {"type": "rigged_parts:LeaksInLaterLayers"}
        whole = dataclasses.replace(with_parts(router=router), pattern=(LayerConfig(mixer="rope", ffn="moe"),))
        rows = check_decoder_parts(whole)
    for failed in (named.failures, [row for row in rows if row.status == "fail"]):
        assert [row.check for row in failed] == [CAUSAL, BATCH]
        assert all("in a model with all its layers" in row.detail for row in failed)


def test_what_can_be_made_again_is_no_state() -> None:
    report = check_part(parts.KeepsATable, "mixer", dim=32)
    assert report[STATE].status == "pass", report[STATE].detail


def test_a_module_is_copied_and_its_width_found() -> None:
    part = parts.Average(24)
    before = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    assert check_part(part, "mixer").ok
    assert all(bool((tensor == before[name]).all()) for name, tensor in part.state_dict().items())
    with pytest.raises(InputError, match=r"Broken: inputs of the widths \[\] fit; dim must be given"):
        check_part(parts.Broken(), "mixer")


def test_a_part_that_cannot_run_fails_in_words() -> None:
    report = check_part(parts.Broken, "mixer", dim=32)
    assert len(report.failures) == 7
    assert "found shape (2, 24, 64) for an input of shape (2, 24, 32); must be a tensor" in report[CAUSAL].detail


def with_parts(**moe: Any) -> DecoderConfig:
    """A model with two mixers of a user's own, each on two layers."""
    mixers: list[Mixer | CustomModule] = [{"type": "rigged_parts.Average"}, "chunked_rope"]
    mixers += [{"type": "rigged_parts.Centered", "dim": 48}, {"type": "rigged_parts.Average"}]
    return DecoderConfig(
        vocab_size=64,
        dim=48,
        num_layers=8,
        attention=AttentionConfig(num_heads=6, num_kv_heads=3, attention_chunk_size=8),
        hidden_dim=96,
        moe=MoEConfig(num_experts=parts.EXPERTS, hidden_dim=24, **moe),
        pattern=tuple(LayerConfig(mixer=mixer, ffn="moe") for mixer in mixers),
    )


@pytest.mark.slow
def test_the_parts_of_a_model_are_checked_each_once_where_they_stand() -> None:
    rows = check_decoder_parts(with_parts(router={"type": "rigged_parts:ExpertChoice"}))
    assert [row.check for row in rows] == 3 * ORDER
    failed = [(row.detail.split(":")[0], row.check) for row in rows if row.status == "fail"]
    assert failed == [
        *(("layers.2.mixer", check) for check in (CAUSAL, LENGTH, PADDING, CACHE)),
        *(("moe.router", check) for check in (CAUSAL, BATCH, LENGTH)),
    ]


@pytest.mark.slow
def test_experts_and_a_dispatcher_of_a_model_are_checked() -> None:
    config = with_parts(
        experts={"type": "rigged_parts.CenteredExperts"}, dispatcher={"type": "moesaic.layers.LocalDispatcher"}
    )
    config = dataclasses.replace(config, pattern=(LayerConfig(mixer="rope", ffn="moe"),))
    rows = check_decoder_parts(config)
    failed = [(row.detail.split(":")[0], row.check) for row in rows if row.status == "fail"]
    assert failed == [("moe.experts", check) for check in (CAUSAL, BATCH, LENGTH)]
    assert check_decoder_parts(dataclasses.replace(config, moe=MoEConfig(4, 8))) == []


def in_a_model(name: str) -> DecoderConfig:
    mixer = {"type": f"rigged_parts.{name}", "dim": 32}
    return DecoderConfig(
        vocab_size=64,
        dim=32,
        num_layers=1,
        attention=AttentionConfig(num_heads=2),
        hidden_dim=64,
        pattern=(LayerConfig(mixer=mixer, ffn="dense"),),
    )


@pytest.mark.parametrize(
    ("name", "fails", "raised"),
    [
        ("Ahead", {CAUSAL}, set()),
        ("WholeChunks", {LENGTH}, {LENGTH}),
        ("DropsSequences", set(), set()),
        ("NotANumber", {CAUSAL, BATCH, LENGTH}, {CAUSAL, BATCH}),
    ],
)
def test_leaks_are_looked_for_at_the_length_of_training_and_told_from_errors(
    name: str, fails: set[str], raised: set[str]
) -> None:
    rows = check_decoder_parts(in_a_model(name), 64)[:4]
    assert {row.check for row in rows if row.status == "fail"} == fails, rows
    assert {row.check for row in rows if row.raised} == raised
