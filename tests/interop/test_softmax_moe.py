"""Our decoder with the weights of a Mixtral, Qwen3-MoE, OLMoE or gpt-oss is that model, and writes it bit-equal."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import require_bf16_as_near, require_same_gradients, require_same_logits
from reference.comparing import assert_close, assert_gradients
from saved_weights import assert_same_weights, save, weights
from softmax_moe_samples import CASES, CLASSES, EXPERTS, RANDOM, SMALL, sample
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesaic.checkpoints import load_model
from moesaic.cli import convert
from moesaic.errors import InputError
from moesaic.interop import accelerate, check_hf, config_from_hf, config_to_hf, from_hf, to_hf
from moesaic.interop.__main__ import main
from moesaic.models import build_decoder, generate, gpt_oss_120b, mixtral_8x7b, olmoe_1b_7b, qwen3_30b_a3b, tiny_twin

LENGTH = 13
MASK = torch.stack([(torch.arange(LENGTH) >= amount).long() for amount in (0, 3, 9)])
every_kind = pytest.mark.parametrize("kind", CLASSES)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tokens_of(model: PreTrainedModel, batch: int = 3) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, LENGTH))


def load(directory: Path, **options: Any) -> Any:
    """With the experts that they call the reference: others have demands on widths."""
    return AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager", **options)


# ---- the same function


@pytest.mark.slow_but_for("as given", "both", "clipped", ", 0", "windows last", "another gate", "loud YaRN")
@pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
@pytest.mark.parametrize("name", CASES | RANDOM)
def test_logits_and_gradients_agree(name: str, padded: bool) -> None:
    kind, changes = (CASES | RANDOM)[name]
    model = sample(kind, **changes)
    decoder, tokens, mask = from_hf(model), tokens_of(model), MASK if padded else None
    expected, found = require_same_logits(model, decoder, tokens, mask, 3e-5)
    require_same_gradients(model, decoder, expected, found, 2e-4)


@pytest.mark.slow_but_for("[5, 1, 1, 6]")
@pytest.mark.parametrize("mask", [None, MASK], ids=["", "padded"])
@pytest.mark.parametrize("pieces", [[5, 1, 1, 6], [1] * 13, [12, 1]], ids=str)
@every_kind
def test_cached_decoding_agrees(kind: str, pieces: list[int], mask: Tensor | None) -> None:
    model = sample(kind, **({"clip_qkv": 0.7} if kind == "olmoe" else {}))
    decoder, tokens = from_hf(model), tokens_of(model)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        cache, start, found = decoder.make_cache(), 0, []
        for length in pieces:
            end = start + length
            found.append(decoder(tokens[:, start:end], cache, None if mask is None else mask[:, :end]).logits)
            start = end
    real = torch.ones_like(tokens) if mask is None else mask
    assert_close(torch.cat(found, dim=1) * real[:, :, None], expected * real[:, :, None], 2e-5, "logits")


@every_kind
def test_bf16_is_as_near_to_the_exact_result_as_theirs(kind: str) -> None:
    model = sample(kind).to(torch.bfloat16)
    require_bf16_as_near(model, torch.randint(model.config.vocab_size, (16, 16)))


@pytest.mark.slow_but_for(", 0")
@pytest.mark.parametrize("name", RANDOM)
def test_accelerated_models_agree(name: str) -> None:
    kind, changes = RANDOM[name]
    model = sample(kind, **changes)
    tokens = tokens_of(model)
    expected = model(tokens, attention_mask=MASK).logits * MASK[:, :, None]
    upstream = torch.randn_like(expected)
    (expected * upstream).sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    continued = model.generate(tokens, **options)
    has_experts = any(name.endswith("experts.gate_up_proj") for name in gradients)
    if not has_experts:
        with pytest.raises(InputError, match="has no MoE block"):
            accelerate(model)
        return
    accelerate(model)
    found = model(tokens, attention_mask=MASK).logits * MASK[:, :, None]
    assert_close(found, expected, 3e-5, "logits")
    (found * upstream).sum().backward()
    assert_gradients({key: p.grad for key, p in model.named_parameters() if key in gradients}, gradients, 2e-4)
    assert torch.equal(model.generate(tokens, **options), continued)


# ---- both ways


@pytest.mark.slow_but_for("as given", "tied head")
@pytest.mark.parametrize("name", CASES | RANDOM)
def test_round_trip_is_bit_equal_and_loads_in_transformers(name: str, tmp_path: Path) -> None:
    kind, changes = (CASES | RANDOM)[name]
    model = sample(kind, **changes)
    source = save(model, tmp_path / "source")
    report = check_hf(source)
    decoder = from_hf(source)
    assert report.tensors == len(weights(source)) and report.config == decoder.config
    to_hf(decoder, tmp_path / "copy", max_shard_bytes=20_000)
    assert_same_weights(weights(tmp_path / "copy"), weights(source))
    theirs, loading = load(tmp_path / "copy", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs) is type(model)
    assert_same_weights(theirs.state_dict(), model.state_dict())
    assert from_hf(tmp_path / "copy").config == decoder.config
    tokens = tokens_of(model)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, load(source)(tokens).logits)


@every_kind
def test_stacked_tensors_in_files_are_read_and_become_published_ones(kind: str, tmp_path: Path) -> None:
    model = sample(kind)
    published = save(model, tmp_path / "published")
    stacked = save(model, tmp_path / "stacked", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in weights(stacked))
    to_hf(from_hf(stacked), tmp_path / "copy")
    assert_same_weights(weights(tmp_path / "copy"), weights(published))


@every_kind
def test_a_dtype_is_cast_on_the_way(kind: str, tmp_path: Path) -> None:
    decoder = from_hf(sample(kind))
    to_hf(decoder, tmp_path / "half", dtype=torch.bfloat16)
    again = from_hf(tmp_path / "half", dtype=torch.float32)
    for name, p in decoder.named_parameters():
        assert torch.equal(again.get_parameter(name), p.bfloat16().float()), name


@every_kind
def test_a_decoder_of_ours_becomes_the_architecture_that_holds_it(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = from_hf(sample(kind)).config
    assert config is not None
    decoder = build_decoder(config).eval()
    with torch.no_grad():
        for p in decoder.parameters():
            p.normal_(std=0.3)
    to_hf(decoder, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == kind
    theirs = load(tmp_path / "hf")
    prompt = torch.randint(SMALL["vocab_size"], (2, 5))
    with torch.no_grad():
        assert_close(theirs(prompt).logits, decoder(prompt).logits, 2e-5, "logits")
    continued = generate(decoder, prompt, 6, temperature=0)
    expected = theirs.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(torch.as_tensor(continued), expected)


@every_kind
def test_progress_counts_their_tensors(kind: str, tmp_path: Path) -> None:
    source, told = save(sample(kind), tmp_path / "source"), []
    decoder = from_hf(source, progress=lambda done, total, name: told.append((done, total, name)))
    count = len(weights(source))
    assert [(done, total) for done, total, _ in told] == [(i + 1, count) for i in range(count)]
    assert {name for *_, name in told} == set(weights(source))
    told.clear()
    to_hf(decoder, tmp_path / "copy", progress=lambda done, total, name: told.append((done, total, name)))
    assert told[-1][:2] == (count, count)


# ---- commands


@pytest.mark.slow_but_for("gpt_oss")
@every_kind
def test_convert_to_a_checkpoint_and_back(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(sample(kind), tmp_path / "source")
    convert.main([str(source), "dry_run=true"])
    assert "all accounted for" in capsys.readouterr().out
    convert.main([str(source), str(tmp_path / "model.ckpt")])
    printed = capsys.readouterr().out
    assert "4, top 2" in printed and "shared" not in printed
    convert.main([str(tmp_path / "model.ckpt"), "dry_run=true"])
    assert CLASSES[kind][1].__name__ in capsys.readouterr().out
    convert.main([str(tmp_path / "model.ckpt"), str(tmp_path / "back")])
    assert_same_weights(weights(tmp_path / "back"), weights(source))
    assert load_model(tmp_path / "model.ckpt").config == from_hf(source).config


@pytest.mark.slow_but_for("olmoe")
@every_kind
def test_logits_as_a_command(kind: str, tmp_path: Path) -> None:
    model = sample(kind)
    source, tokens = save(model, tmp_path / "source"), tokens_of(model)
    torch.save({"input_ids": tokens, "attention_mask": MASK}, tmp_path / "in.pt")
    main(["logits", str(source), str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--prefill", "4"])
    found = torch.load(tmp_path / "out.pt")["logits"]
    with torch.no_grad():
        expected = model(tokens, attention_mask=MASK, use_cache=False).logits
    assert_close(found * MASK[:, :, None], expected * MASK[:, :, None], 2e-5, "logits")


# ---- what a config can say


PRESETS = {
    "mixtral": mixtral_8x7b(),
    "qwen3_moe": qwen3_30b_a3b(),
    "olmoe": olmoe_1b_7b(),
    "gpt_oss": gpt_oss_120b(),
}


@every_kind
def test_presets_and_their_tiny_twins_are_of_their_architecture(kind: str, tmp_path: Path) -> None:
    config_class, model_class = CLASSES[kind]
    written = config_to_hf(PRESETS[kind], {}, "bfloat16")
    assert written["model_type"] == kind
    theirs = config_class(**{key: value for key, value in written.items() if key != "model_type"})
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(theirs).parameters())
    assert count == sum(p.numel() for p in build_decoder(PRESETS[kind], device="meta").parameters())
    assert config_from_hf(theirs.to_dict()) == PRESETS[kind]
    to_hf(build_decoder(tiny_twin(PRESETS[kind])), tmp_path / "tiny")
    assert type(load(tmp_path / "tiny")) is model_class


SCALED = {"rope_type": "linear", "factor": 2.0}
BAD: list[tuple[str, dict[str, Any], str]] = [
    *(
        (kind, {"rope_parameters": SCALED}, "rope_type='linear'; must be one of default, llama3, yarn")
        for kind in CLASSES
    ),
    *((kind, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'") for kind in CLASSES),
    *((kind, {"attention_dropout": 0.1}, "attention_dropout=0.1: must be 0") for kind in CLASSES),
    *((kind, {"num_attention_heads": 3}, "num_attention_heads=3: must be a multiple") for kind in CLASSES),
    *((kind, {"num_experts_per_tok": 5}, "num_experts_per_tok=5: must be 1 to the number of exp") for kind in CLASSES),
    *((kind, {"hidden_act": "tanh"}, "hidden_act='tanh'") for kind in CLASSES),
    *((kind, {"quantization_config": {"bits": 4}}, "quantization_config=") for kind in CLASSES),
    *((kind, {"num_shared_experts": 1}, "num_shared_experts=1: not a field of") for kind in CLASSES),
    *((kind, {"num_experts": 4, "num_local_experts": 8}, "must be equal") for kind in CLASSES),
    *((kind, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5") for kind in CLASSES),
    *((kind, {"rope_parameters": {"rope_type": "yarn"}}, "factor: missing") for kind in CLASSES),
    ("gpt_oss", {"num_experts_per_tok": 1}, "num_experts_per_tok=1: must be 2 or more"),
    ("gpt_oss", {"sliding_window": None}, "sliding_window=None: must be a number with layers of sliding"),
    ("gpt_oss", {"sliding_window": 0}, "sliding_window=0: must be a number >= 1"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types: found 1 of them; must be num_hidden_layers=3"),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "layer_types.0.='chunked_attention': must be one of"),
    ("gpt_oss", {"swiglu_limit": 0.0}, "swiglu_limit=0.0: must be a number > 0"),
    ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "'mxfp4'.: must be absent"),
    ("gpt_oss", {"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, "factor=0.5: must be a number >= 1"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1: must be 2 or more"),
    ("mixtral", {"sliding_window": 8}, "sliding_window=8: must be null"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1: must be 0"),
    ("mixtral", {"attention_bias": True}, "attention_bias=True: not a field of Mixtral"),
    ("mixtral", {"head_dim": 7}, "head_dim=7: must be even"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True: must be false"),
    ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok=1: must be 2 or more"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0: must be a number >= 1"),
    ("qwen3_moe", {"clip_qkv": 8.0}, "clip_qkv=8.0: not a field of Qwen3-MoE"),
    ("olmoe", {"clip_qkv": 0.0}, "clip_qkv=0.0: must be a number > 0"),
    ("olmoe", {"head_dim": 8}, "hidden_size=24: must be num_attention_heads=4 times head_dim=8"),
    ("olmoe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2: not a field of OLMoE"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), BAD, ids=lambda x: x if isinstance(x, str) else ";".join(x))
def test_what_a_config_says_and_we_do_not_have_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    good = {**SMALL, "model_type": kind, EXPERTS[kind]: 4}
    config_from_hf(good)
    with pytest.raises(InputError, match=message):
        config_from_hf(good | changes)


@every_kind
def test_missing_fields_have_their_defaults(kind: str) -> None:
    config_class, _ = CLASSES[kind]
    written = config_class().to_dict()
    assert config_from_hf({"model_type": kind}) == config_from_hf(written)
    assert config_from_hf(written).vocab_size == written["vocab_size"]


@every_kind
def test_spellings_of_transformers_4_are_understood(kind: str) -> None:
    """rope_theta and rope_scaling at the top, num_experts by the name in published files."""
    modern = {**SMALL, "model_type": kind, EXPERTS[kind]: 6}
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    older = modern | {"rope_theta": 50.0, "rope_scaling": {"type": "llama3", **scaling}}
    newer = modern | {"rope_parameters": {"rope_theta": 50.0, "rope_type": "llama3", **scaling}}
    assert config_from_hf(older) == config_from_hf(newer)
    config_class, _ = CLASSES[kind]
    assert config_from_hf(config_class(**older).to_dict()) == config_from_hf(newer)


@every_kind
def test_unsupported_architectures_are_refused_with_a_list(kind: str, tmp_path: Path) -> None:
    source = save(sample(kind), tmp_path / "source")
    path = source / "config.json"
    changed = json.loads(path.read_text()) | {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}
    path.write_text(json.dumps(changed))
    supported = r"MixtralForCausalLM \(mixtral\), Qwen3MoeForCausalLM \(qwen3_moe\), OlmoeForCausalLM \(olmoe\)"
    with pytest.raises(InputError, match=rf"architectures=\['Qwen2MoeForCausalLM'\].*{supported}"):
        from_hf(source)


@every_kind
def test_what_an_architecture_does_not_hold_is_named(kind: str) -> None:
    config = from_hf(sample(kind)).config
    assert config is not None and config.moe is not None
    shared = dataclasses.replace(config, moe=dataclasses.replace(config.moe, shared_hidden_dim=5))
    with pytest.raises(InputError, match=r"moe\.shared_hidden_dim: found 5, must be 0"):
        config_to_hf(shared, {}, "float32")
    convolved = dataclasses.replace(config, attention=dataclasses.replace(config.attention, conv_width=3))
    with pytest.raises(InputError, match=r"attention\.conv_width: found 3, must be 0"):
        config_to_hf(convolved, {"model_type": kind}, "float32")


@every_kind
def test_damaged_tensors_are_named(kind: str, tmp_path: Path) -> None:
    model = sample(kind)
    state = model.state_dict()
    lost = next(name for name in state if name.endswith(("mlp.gate.weight", "mlp.router.weight")))
    model.state_dict = lambda: {name: x for name, x in state.items() if name != lost}  # type: ignore[method-assign]
    with pytest.raises(InputError, match=f"missing tensor {lost}"):
        from_hf(model)
    model.state_dict = lambda: state | {lost: state[lost][:, 1:]}  # type: ignore[method-assign]
    with pytest.raises(InputError, match=rf"{lost}: found shape \[4, 23\], config.json says \[4, 24\]"):
        from_hf(model)
