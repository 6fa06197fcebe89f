"""Streaming equals the whole sequence, buckets and errors by hand, switches on shared weights, stop and go on."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.evaluation.long_context import (
    LossByPosition,
    LossByPositionConfig,
    choose_stretches,
    log_buckets,
    loss_by_position,
    stream_nats,
)
from moesaic.evaluation.long_context_plots import plot_variants_by_position
from moesaic.evaluation.results import ResultFile
from moesaic.evaluation.variants import Variant, build_variants, with_overrides
from moesaic.layers import AttentionTemperature, Llama3RopeScaling
from moesaic.models import Block, Decoder, build_decoder, llama4_toy
from moesaic.statistics import mean_and_error

VOCAB = 40


def toy(**attention: Any) -> Decoder:
    """Chunks of 8, a temperature that changes every 8 tokens, convolutions that do something, MoE."""
    config = llama4_toy(VOCAB)
    config = dataclasses.replace(
        config, init_std=None, attention=dataclasses.replace(config.attention, conv_width=3, **attention)
    )
    decoder = build_decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("conv.weight"):
                parameter.normal_(std=0.3)
    return decoder.eval()


def text(rows: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (rows, length + 1))


@torch.no_grad()
def whole_nats(decoder: Decoder, tokens: Tensor) -> Tensor:
    logits = decoder(tokens[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 8, 13, 16, 59, 61, 200])
def test_streaming_equals_the_whole_sequence(chunk_tokens: int) -> None:
    decoder, tokens = toy(), text(2, 61)
    pieces = list(stream_nats(decoder, tokens, chunk_tokens=chunk_tokens))
    assert max(piece.size(1) for piece in pieces) <= chunk_tokens
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole_nats(decoder, tokens), rtol=0, atol=1e-5)


def test_logits_exist_for_one_chunk_only_and_local_layers_cache_one_chunk() -> None:
    decoder, tokens = toy(), text(1, 61)
    seen: list[int] = []
    decoder.head.register_forward_hook(lambda module, arguments, output: seen.append(output.size(1)))
    cache = decoder.make_cache()
    assert cache is not None
    decoder.make_cache = lambda: cache  # type: ignore[method-assign]
    for _ in stream_nats(decoder, tokens, chunk_tokens=7):
        assert all(layer.held < 8 for layer in cache[:3])
    assert max(seen) == 7
    assert cache[3].held == 61


class CachelessMixer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(dim=1)


def test_a_mixer_without_cache_streams_its_logits() -> None:
    block = Block(mixer=CachelessMixer(), ffn=nn.Identity(), mixer_norm=nn.Identity(), ffn_norm=nn.Identity())
    decoder, tokens = Decoder(vocab_size=VOCAB, dim=8, blocks=[block]), text(2, 20)
    pieces = list(stream_nats(decoder, tokens, chunk_tokens=7))
    assert [piece.size(1) for piece in pieces] == [7, 7, 6]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole_nats(decoder, tokens))


@pytest.mark.parametrize("window", [2, 7, 16])
@pytest.mark.slow
def test_a_window_cuts_the_context_to_between_half_and_all_of_it(window: int) -> None:
    decoder, tokens = toy(), text(1, 45)
    found = torch.cat(list(stream_nats(decoder, tokens, chunk_tokens=5, window=window)), dim=1)
    assert found.shape == (1, 45)
    torch.testing.assert_close(found[:, :window], whole_nats(decoder, tokens[:, : window + 1]))
    for p in range(window, 45):
        sizes = range(window - window // 2 + 1, window + 1)
        candidates = [whole_nats(decoder, tokens[:, p + 1 - size : p + 2])[0, -1] for size in sizes]
        assert min(abs(found[0, p] - candidate) for candidate in candidates) < 1e-5, p


def test_a_window_as_long_as_the_text_changes_nothing() -> None:
    decoder, tokens = toy(), text(1, 20)
    found = torch.cat(list(stream_nats(decoder, tokens, window=20)), dim=1)
    torch.testing.assert_close(found, whole_nats(decoder, tokens), rtol=0, atol=1e-5)


@given(length=st.integers(1, 3000), train=st.integers(1, 600), per_octave=st.integers(1, 4))
def test_buckets_cover_all_positions_and_part_at_the_training_length(length: int, train: int, per_octave: int) -> None:
    edges = log_buckets(length, train, per_octave)
    assert edges[0] == 0 and edges[-1] == length
    assert list(edges) == sorted(set(edges))
    assert train in edges or train > length
    widest = 2 ** (1 / per_octave)
    assert all(b <= a * widest + 1 for a, b in itertools.pairwise(edges[1:]))


def test_buckets_at_two_per_octave() -> None:
    assert log_buckets(64, 16) == (0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64)


def test_numbers_by_hand() -> None:
    nats = torch.tensor([[2.0, 6.0, 12.0], [4.0, 10.0, 4.0]], dtype=torch.float64)
    result = LossByPosition((0, 1, 3, 7), nats, torch.tensor([[1, 4, 8], [3, 4, 8]]))
    assert result.per_stretch().tolist() == pytest.approx([20 / 7, 18 / 7])
    assert result.loss(1, 3) == pytest.approx((4.0, 1.0))  # means 3 and 5
    assert result.loss(0, 1) == pytest.approx((3.0, 1.0))
    assert result.bits_per_byte(3) == pytest.approx(16 / math.log(2) / 16)
    rows = result.rows()
    assert [(row["start"], row["end"]) for row in rows] == [(0, 1), (1, 3), (3, 7)]
    assert rows[1]["cumulative_loss"] == pytest.approx(22 / 6)
    assert rows[1]["cumulative_bits_per_byte"] == pytest.approx(22 / math.log(2) / 12)
    other = LossByPosition((0, 1, 3, 7), nats + torch.tensor([[0, 0, 4.0], [0, 0, 8.0]]), None)
    assert other.difference(result, 3) == pytest.approx((1.5, 0.5))  # 1 and 2
    assert other.bits_per_byte() is None
    assert math.isnan(mean_and_error(torch.tensor([1.0]))[1])


def test_buckets_hold_the_right_positions_and_bytes() -> None:
    decoder, tokens = toy(), text(3, 30)
    edges = (0, 1, 4, 9, 30)
    token_bytes = torch.arange(VOCAB)
    variants = [Variant("it", decoder)]
    found = loss_by_position(variants, tokens, edges, token_bytes=token_bytes, chunk_tokens=7, batch_size=2)["it"]
    expected = whole_nats(decoder, tokens)
    for k, (start, end) in enumerate(itertools.pairwise(edges)):
        torch.testing.assert_close(
            found.nats[:, k], expected[:, start:end].sum(dim=1).double(), rtol=1e-5, atol=1e-4, msg=str(k)
        )
        assert found.num_bytes is not None
        assert found.num_bytes[:, k].tolist() == tokens[:, start + 1 : end + 1].sum(dim=1).tolist()


def test_stretches_of_a_stream_predict_no_token_twice() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    stretches = choose_stretches(tokens, 11, limit=None, within="stream", end_of_text=None)
    assert stretches.shape == (9, 12)
    predicted = stretches[:, 1:].flatten().tolist()
    assert predicted == list(range(1, 100))
    few = choose_stretches(tokens, 11, limit=3, within="stream", end_of_text=None)
    assert few[:, 0].tolist() == [0, 44, 88]


def test_stretches_of_files_are_beginnings_of_long_enough_files() -> None:
    end = 0
    tokens = np.array([end, 1, 2, 3, end, 4, 5, end, 6, 7, 8, 9, end], dtype=np.uint16)
    stretches = choose_stretches(tokens, 3, limit=None, within="files", end_of_text=end)
    assert stretches.tolist() == [[end, 1, 2, 3], [end, 6, 7, 8]]
    with pytest.raises(InputError, match="a context of 5 tokens: longer than the data, the longest file has 4 tokens"):
        choose_stretches(tokens, 5, limit=None, within="files", end_of_text=end)
    with pytest.raises(InputError, match="no tokenizer, so file boundaries are unknown"):
        choose_stretches(tokens, 3, limit=None, within="files", end_of_text=None)
    with pytest.raises(InputError, match="a context of 13 tokens: longer than the data, the text has 13 tokens"):
        choose_stretches(tokens, 13, limit=None, within="stream", end_of_text=None)
    assert len(choose_stretches(tokens, 12, limit=None, within="stream", end_of_text=None)) == 1


def test_overrides_by_dotted_key() -> None:
    config = llama4_toy()
    changed = with_overrides(config, {"attention.attention_chunk_size": 5, "attention.temperature": None})
    attention = dataclasses.replace(config.attention, attention_chunk_size=5, temperature=None)
    assert changed == dataclasses.replace(config, attention=attention)
    assert with_overrides(config, {}) == config
    again = with_overrides(changed, {"attention.temperature.attn_scale": 0.3, "attention.temperature.floor_scale": 4})
    assert again.attention.temperature == AttentionTemperature(0.3, 4)
    scaling = {"factor": 4, "low_freq_factor": 1, "high_freq_factor": 2, "original_length": 8}
    one_by_one = {f"attention.rope_scaling.{key}": value for key, value in scaling.items()}
    assert with_overrides(config, one_by_one).attention.rope_scaling == Llama3RopeScaling(4, 1, 2, 8)
    assert with_overrides(config, {"attention.rope_scaling": scaling}) == with_overrides(config, one_by_one)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention.chunk": 4}, r"model\.attention\.chunk: the model has no such key"),
        (
            {"attention.temprature.attn_scale": 4},
            r"model\.attention\.temprature\.attn_scale: .* no such key \(did you mean attention\.temperature\.attn",
        ),
        ({"attention.temperature.scale": 4}, r"model\.attention\.temperature\.scale: the model has no such key"),
        ({"dim.x": 4}, r"model\.dim\.x: the model has no such key"),
        ({"attention.attention_chunk_size": 0}, r"attention_chunk_size=0: must be a number > 0"),
        ({"attention.temperature.attn_scale": "big"}, r"model\.attention\.temperature\.attn_scale: found 'big'"),
        ({"attention.rope_scaling.factor": 4}, r"model\.attention\.rope_scaling\.low_freq_factor: missing"),
    ],
)
def test_wrong_overrides_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_overrides(llama4_toy(), overrides)


def test_variants_share_weights_and_compute_what_their_config_says() -> None:
    decoder = toy()
    state = torch.get_rng_state()
    names = ["as_trained", "no_temperature", "attention.attention_chunk_size=5 attention.rope_theta=1e3", "window"]
    variants = build_variants(decoder, names, 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert [variant.window for variant in variants] == [None, None, None, 16]
    assert variants[0].decoder is decoder
    for variant in variants:
        mine, theirs = variant.decoder.state_dict(), decoder.state_dict()
        assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
        assert not variant.decoder.training
    assert decoder.config is not None
    tokens = text(1, 30)
    for variant, attention in (
        (variants[1], {"temperature": None}),
        (variants[2], {"attention_chunk_size": 5, "rope_theta": 1000.0}),
    ):
        alone = build_decoder(
            dataclasses.replace(decoder.config, attention=dataclasses.replace(decoder.config.attention, **attention))
        ).eval()
        alone.load_state_dict(decoder.state_dict())
        assert torch.equal(whole_nats(variant.decoder, tokens), whole_nats(alone, tokens))
        assert not torch.allclose(whole_nats(variant.decoder, tokens), whole_nats(decoder, tokens))


def test_scalable_softmax_leaves_the_training_length_alone() -> None:
    [variant] = build_variants(toy(), ["scalable_softmax"], 16)
    temperature = variant.decoder.layers[3].mixer.temperature  # type: ignore[union-attr]
    assert isinstance(temperature, AttentionTemperature)
    torch.testing.assert_close(temperature(torch.tensor([15, 255])), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["as_trained", "colder"],
            r"variants: colder: unknown variant colder; must be as_trained, temperature",
        ),
        (["window", "window"], r"one of them stands twice"),
        ([], r"variants: none given"),
        (["  "], r"must be as_trained"),
        (["window=1"], r"window=1: window=1: must be an integer >= 2"),
        (["window=many"], r"window='many': must be an integer >= 2"),
        (["attention.conv_width=2"], r"attention.conv_width=2: it needs weights of another shape"),
        (["attention.chunk=2"], r"attention.chunk=2: model\.attention\.chunk: the model has no such key"),
        (["window=8 window=3"], r"window=8 window=3: window stands twice"),
        (["temperature no_temperature"], r"attention\.temperature stands twice"),
        (["attention.rope_theta=nan"], r"attention.rope_theta=nan: must be a finite number"),
        (["attention.rope_theta=1e400"], r"1e400: must be a finite number"),
        ([" "], r"variants:  : must be as_trained"),
    ],
)
def test_bad_variants(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_variants(toy(), names, 16)


def test_a_decoder_without_config_has_no_variants() -> None:
    with pytest.raises(InputError, match="has no config"):
        build_variants(Decoder(vocab_size=4, dim=2, blocks=[]), ["as_trained"], 16)


class Stop(Exception):
    pass


@pytest.mark.slow_but_for("8-11")
@pytest.mark.parametrize("stop_after", [1, 9, 10, 11, 29, 35])
@pytest.mark.parametrize("window", [None, 8, 25, 61])
def test_a_stopped_evaluation_goes_on_after_its_last_batch(tmp_path: Path, stop_after: int, window: int | None) -> None:
    """Nine chunks a stretch, two stretches a batch, two batches, two variants."""
    decoder, tokens, edges = toy(), text(4, 61), (0, 16, 61)
    variants = [Variant("a", decoder, window), *build_variants(decoder, ["no_temperature"], 16)]
    expected = loss_by_position(variants, tokens, edges, chunk_tokens=7, batch_size=2)
    calls, scored = 0, 0

    def count(module: nn.Module, arguments: Any, output: Tensor) -> None:
        nonlocal calls, scored
        calls += 1
        scored += output.size(0) * output.size(1)
        if calls == stop_after:
            raise Stop

    hooks = [variant.decoder.head.register_forward_hook(count) for variant in variants]
    path = tmp_path / "out" / "it.json"
    with pytest.raises(Stop):
        results = ResultFile(path, {"task": "it"})
        loss_by_position(variants, tokens, edges, chunk_tokens=7, batch_size=2, results=results)
    stop_after = 0
    results = ResultFile(path, {"task": "it"})
    found = loss_by_position(variants, tokens, edges, chunk_tokens=7, batch_size=2, results=results)
    for hook in hooks:
        hook.remove()
    for name, result in expected.items():
        assert torch.equal(found[name].nats, result.nats)
    assert 0 < scored - 2 * 4 * 61 <= 2 * 61, "nothing ran twice but the batch in which it stopped"
    assert [file.name for file in path.parent.iterdir()] == ["it.json"]


def test_results_of_another_evaluation_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    results = ResultFile(path, {"checkpoint": "a", "edges": (0, 4)})
    results.done["x"] = [[1.0]]
    results.save()
    before = path.read_bytes()
    assert ResultFile(path, {"checkpoint": "a", "edges": [0, 4]}).done == {"x": [[1.0]]}
    with pytest.raises(InputError, match=r"results of another evaluation, .*: checkpoint: 'a' there, 'b' now"):
        ResultFile(path, {"checkpoint": "b", "edges": [0, 4]})
    assert path.read_bytes() == before
    path.write_text(json.dumps([1]))
    with pytest.raises(InputError, match="not a result file of this evaluation"):
        ResultFile(path, {"checkpoint": "a"})
    with pytest.raises(InputError, match="cannot be written"):
        ResultFile(path / "below" / "it.json", {})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["summary", "done"])
def test_what_could_not_be_written_again_is_refused_before_any_work(tmp_path: Path, place: str, value: float) -> None:
    path = tmp_path / "it.json"
    path.write_text(json.dumps({"identity": {}, "summary": {}, "done": {}, place: {"other": [[value]]}}))
    with pytest.raises(InputError, match=r"it\.json: not a result file of this evaluation"):
        ResultFile(path, {})


@pytest.mark.parametrize("value", [True, None, "1.0", 10**400])
def test_other_variants_count_only_if_they_are_whole(tmp_path: Path, value: Any) -> None:
    path, edges = tmp_path / "it.json", (0, 8)
    path.write_text(json.dumps({"identity": {}, "summary": {}, "done": {"other": [[value]], "good": [[2.0]]}}))
    found = loss_by_position([Variant("it", toy())], text(1, 8), edges, results=ResultFile(path, {}))
    assert sorted(found) == ["good", "it"]


def test_a_loss_that_is_not_finite_is_refused() -> None:
    decoder = toy()
    with torch.no_grad():
        decoder.head.weight.fill_(math.nan)
    with pytest.raises(InputError, match="variants: it: its loss is not finite"):
        loss_by_position([Variant("it", decoder)], text(1, 8), (0, 8))


@pytest.mark.parametrize("values", [{"multiple": 0.0}, {"stretches": 0}, {"chunk_tokens": -1}, {"multiple": math.inf}])
def test_bad_config(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be a number > 0"):
        LossByPositionConfig(**values)


@pytest.mark.slow_but_for("5-names0")
@pytest.mark.parametrize("names", [("a",), ("a", "b", "attention.temperature.attn_scale=0.8 " * 3)])
@pytest.mark.parametrize("stretches", [1, 5])
def test_pictures(tmp_path: Path, names: tuple[str, ...], stretches: int) -> None:
    edges = log_buckets(256, 16)
    found = {
        name: LossByPosition(edges, torch.rand(stretches, len(edges) - 1, dtype=torch.float64), None) for name in names
    }
    plot_variants_by_position(found, tmp_path / "it.png", 16)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
