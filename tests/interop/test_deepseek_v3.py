"""Our decoder with the weights of a DeepSeek-V3 is that model, and writes it back bit-equal."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import require_bf16_as_near, require_same_gradients, require_same_logits
from deepseek_v3_samples import CASES, RANDOM, SMALL, sample
from reference.comparing import assert_close, assert_gradients
from safetensors.torch import save_file
from saved_weights import assert_same_weights, save, weights
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moesaic.checkpoints import load_model
from moesaic.cli import convert
from moesaic.errors import InputError
from moesaic.interop import accelerate, check_hf, config_from_hf, config_to_hf, from_hf, restore, to_hf
from moesaic.models import build_decoder, deepseek_v3, generate, tiny_twin
from moesaic.models.decoder import Decoder

LENGTH = 11
MASK = torch.stack([(torch.arange(LENGTH) >= amount).long() for amount in (0, 3, 8)])
QUICK = ("as given", "halves, biases", "YaRN 2")
every_model = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES | RANDOM]
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def model_of(name: str) -> DeepseekV3ForCausalLM:
    return sample(**(CASES | RANDOM)[name])


def tokens_of(model: DeepseekV3ForCausalLM) -> Tensor:
    return torch.randint(model.config.vocab_size, (3, LENGTH))


def load(directory: Path, **options: Any) -> Any:
    return DeepseekV3ForCausalLM.from_pretrained(directory, experts_implementation="eager", **options)


# ---- the same function


@every_model
@pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
def test_logits_gradients_and_cached_decoding_agree(name: str, padded: bool) -> None:
    model = model_of(name)
    decoder, tokens, mask = from_hf(model), tokens_of(model), MASK if padded else None
    expected, found = require_same_logits(model, decoder, tokens, mask, 3e-5)
    cached = decoded_in_pieces(decoder, tokens, mask) * (1 if mask is None else mask[:, :, None])
    assert_close(cached, expected, 3e-5, "logits with a cache")
    require_same_gradients(model, decoder, expected, found, 2e-4)


@torch.no_grad()
def decoded_in_pieces(decoder: Decoder, tokens: Tensor, mask: Tensor | None) -> Tensor:
    cache, end, found = decoder.make_cache(), 0, []
    for new in (4, 1, 1, LENGTH - 6):
        start, end = end, end + new
        found.append(decoder(tokens[:, start:end], cache, None if mask is None else mask[:, :end]).logits)
    return torch.cat(found, dim=1)


@every_model
def test_round_trip_is_bit_equal_and_loads_in_transformers(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    source = save(model, tmp_path / "source")
    decoder, report = from_hf(source), check_hf(source)
    assert report.tensors == len(weights(source)) and report.config == decoder.config and not report.skipped
    to_hf(decoder, tmp_path / "copy", max_shard_bytes=20_000)
    assert_same_weights(weights(tmp_path / "copy"), weights(source))
    assert from_hf(tmp_path / "copy").config == decoder.config
    theirs, loading = load(tmp_path / "copy", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(theirs.state_dict(), model.state_dict())
    tokens = tokens_of(model)
    with torch.no_grad():
        assert_close(theirs(tokens).logits, model(tokens).logits, 1e-6, "logits")
    prompt = tokens[:, :4]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)  # 0 is a token here
    assert torch.equal(torch.as_tensor(generate(decoder, prompt, 5, temperature=0)), continued)


@every_model
def test_accelerated_models_agree(name: str) -> None:
    model = model_of(name)
    tokens = tokens_of(model)
    expected = model(tokens, attention_mask=MASK).logits * MASK[:, :, None]
    upstream = torch.randn_like(expected)
    (expected * upstream).sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    if not any(key.endswith("experts.gate_up_proj") for key in gradients):
        with pytest.raises(InputError, match="has no MoE block"):
            accelerate(model)
        return
    model.zero_grad()
    accelerate(model)
    found = model(tokens, attention_mask=MASK).logits * MASK[:, :, None]
    assert_close(found, expected, 3e-5, "logits")
    (found * upstream).sum().backward()
    assert_gradients({key: p.grad for key, p in model.named_parameters() if key in gradients}, gradients, 2e-4)
    assert type(restore(model).model.layers[-1].mlp.experts).__name__ == "DeepseekV3Experts"


@pytest.mark.slow
def test_bf16_is_as_near_to_the_exact_result_as_theirs() -> None:
    model = sample().to(torch.bfloat16)
    require_bf16_as_near(model, torch.randint(model.config.vocab_size, (16, 16)))


# ---- files


def published(directory: Path, **changes: Any) -> Path:
    """Of our sample, with the further fields and tensors that published files have."""
    model = sample(**changes)
    source = save(model, directory / "source")
    tensors = weights(source)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    further = {f"model.layers.{model.config.num_hidden_layers}.{name}.weight": torch.ones(2) for name in ("enorm", "x")}
    save_file(tensors | further, source / "model.safetensors", {"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    own = {"aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "pretraining_tp": 1, "scoring_func": "sigmoid"}
    own |= {"seq_aux": True, "topk_method": "noaux_tc", "auto_map": {"AutoConfig": "a.B"}, "rope_theta": 10000}
    (source / "config.json").write_text(json.dumps(fields | own))
    return source


@pytest.mark.slow
def test_layers_for_multi_token_prediction_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published(tmp_path)
    with caplog.at_level(logging.WARNING, "moesaic.interop"):
        decoder = from_hf(source)
    assert "2 multi-token prediction tensors skipped" in caplog.text
    assert (check_hf(source).skipped, check_hf(source).skipped_kind) == (2, "multi-token prediction")
    convert.main([str(source), "dry_run=true"])
    assert "2, would be skipped" in capsys.readouterr().out
    to_hf(decoder, tmp_path / "copy")
    assert not any(name.startswith("model.layers.3.") for name in weights(tmp_path / "copy"))
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"num_nextn_predict_layers": 0}))
    with pytest.raises(InputError, match=r"unexpected tensors model\.layers\.3\.enorm\.weight"):
        from_hf(source)


def test_fields_that_other_engines_read_are_written(tmp_path: Path) -> None:
    to_hf(from_hf(published(tmp_path)), tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (written["topk_method"], written["scoring_func"], written["moe_layer_freq"]) == ("noaux_tc", "sigmoid", 1)
    assert written["auto_map"] == {"AutoConfig": "a.B"} and written["aux_loss_alpha"] == 0.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_selection_biases_stay_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = sample()
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    decoder = from_hf(model, dtype=dtype)
    router: Any = decoder.get_submodule("layers.1.ffn.router")
    assert router.weight.dtype == dtype and torch.equal(router.expert_bias, bias)
    to_hf(decoder, tmp_path / "copy", dtype=torch.bfloat16)
    found = weights(tmp_path / "copy")
    assert torch.equal(found.pop("model.layers.1.mlp.gate.e_score_correction_bias"), bias)
    assert found.pop("model.layers.2.mlp.gate.e_score_correction_bias").dtype == torch.float32
    assert {x.dtype for x in found.values()} == {torch.bfloat16}


def test_a_model_all_in_bf16_comes_back_as_it_was(tmp_path: Path) -> None:
    source = save(sample().to(torch.bfloat16), tmp_path / "source")
    to_hf(from_hf(source), tmp_path / "copy")
    assert_same_weights(weights(tmp_path / "copy"), weights(source))


def test_stacked_tensors_in_files_are_read_and_become_published_ones(tmp_path: Path) -> None:
    model = sample()
    expected = save(model, tmp_path / "published")
    stacked = save(model, tmp_path / "stacked", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in weights(stacked))
    to_hf(from_hf(stacked), tmp_path / "copy")
    assert_same_weights(weights(tmp_path / "copy"), weights(expected))


@pytest.mark.parametrize("lost", ["mlp.gate.e_score_correction_bias", "self_attn.kv_a_proj_with_mqa.weight"])
def test_damaged_tensors_are_named(lost: str) -> None:
    model = sample()
    state, name = model.state_dict(), f"model.layers.1.{lost}"
    model.state_dict = lambda: {key: x for key, x in state.items() if key != name}  # type: ignore[method-assign]
    with pytest.raises(InputError, match=f"missing tensor {name}"):
        from_hf(model)
    model.state_dict = lambda: state | {name: state[name][1:]}  # type: ignore[method-assign]
    with pytest.raises(InputError, match=rf"{name}: found shape .*config.json says"):
        from_hf(model)


@pytest.mark.slow
def test_convert_to_a_checkpoint_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(sample(), tmp_path / "source")
    convert.main([str(source), str(tmp_path / "model.ckpt")])
    printed = capsys.readouterr().out
    assert "8, top 3, and a shared one" in printed and "3, 2 of them MoE" in printed
    convert.main([str(tmp_path / "model.ckpt"), "dry_run=true"])
    assert "DeepseekV3ForCausalLM" in capsys.readouterr().out
    convert.main([str(tmp_path / "model.ckpt"), str(tmp_path / "back")])
    assert_same_weights(weights(tmp_path / "back"), weights(source))
    assert load_model(tmp_path / "model.ckpt").config == from_hf(source).config


# ---- what a config can say


@pytest.mark.slow
def test_the_preset_is_the_published_model() -> None:
    config = deepseek_v3()
    written = config_to_hf(config, {}, "bfloat16")
    assert written["model_type"] == "deepseek_v3"
    theirs = DeepseekV3Config(**{key: value for key, value in written.items() if key != "model_type"})
    with torch.device("meta"):
        count = sum(p.numel() for p in DeepseekV3ForCausalLM(theirs).parameters())
    assert count == sum(p.numel() for p in build_decoder(config, device="meta").parameters())
    assert config_from_hf(theirs.to_dict()) == config
    defaults = DeepseekV3Config().to_dict()
    differing = {key for key, value in theirs.to_dict().items() if value != defaults.get(key)}
    own = {"num_nextn_predict_layers", "topk_method", "scoring_func", "moe_layer_freq"}
    scaled = {"rope_parameters", "max_position_embeddings"}
    assert differing <= {"architectures", "dtype", "bos_token_id", "eos_token_id"} | own | scaled
    assert written["rope_parameters"]["mscale"] == 1.0


PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""config.json as DeepSeek published it, without quantization_config and auto_map."""


def test_the_preset_is_the_published_file() -> None:
    assert config_from_hf(PUBLISHED) == deepseek_v3()
    assert config_to_hf(deepseek_v3(), {}, "bfloat16")["max_position_embeddings"] == 163840


def test_the_tiny_twin_becomes_a_model_of_transformers(tmp_path: Path) -> None:
    decoder = build_decoder(tiny_twin(deepseek_v3(), vocab_size=60)).eval()
    to_hf(decoder, tmp_path / "tiny")
    theirs, tokens = load(tmp_path / "tiny"), torch.randint(60, (2, 9))
    assert type(theirs) is DeepseekV3ForCausalLM
    with torch.no_grad():
        assert_close(theirs(tokens).logits, decoder(tokens).logits, 2e-5, "logits")


def test_missing_fields_have_their_defaults() -> None:
    assert config_from_hf({"model_type": "deepseek_v3"}) == config_from_hf(DeepseekV3Config().to_dict())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config=.*must be absent"),
    ({"moe_layer_freq": 2}, "moe_layer_freq=2: must be 1"),
    ({"topk_method": "greedy"}, "topk_method='greedy': must be 'noaux_tc'"),
    ({"scoring_func": "softmax"}, "scoring_func='softmax': must be 'sigmoid'"),
    ({"num_key_value_heads": 1}, "num_key_value_heads=1: must be num_attention_heads=3"),
    ({"head_dim": 8}, "head_dim=8: must be qk_rope_head_dim=4"),
    ({"qk_head_dim": 4}, "qk_head_dim=4: must be qk_nope_head_dim . qk_rope_head_dim=10"),
    ({"qk_rope_head_dim": 5}, "must be even"),
    ({"v_head_dim": None}, "v_head_dim: found None"),
    ({"kv_lora_rank": 0}, "kv_lora_rank=0: must be a number > 0"),
    ({"q_lora_rank": 0}, "q_lora_rank=0: must be a number > 0"),
    ({"n_shared_experts": 0}, "n_shared_experts=0: must be a number > 0"),
    ({"n_shared_experts": None}, "n_shared_experts: found None"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1: must be a number >= 0"),
    ({"n_group": 3}, "n_group=3: must divide n_routed_experts=8"),
    ({"n_group": 8, "topk_group": 8}, "n_group=8: must divide n_routed_experts=8 into groups of 2 or more"),
    ({"topk_group": 5}, "topk_group=5: must be 1 to n_group=4"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok=5: must be 1 to 4, the experts of topk_group groups"),
    ({"num_experts_per_tok": 1}, "num_experts_per_tok=1: must be 2 or more"),
    ({"routed_scaling_factor": 0.0}, "routed_scaling_factor=0.0: must be a number > 0"),
    ({"num_local_experts": 4}, "num_local_experts=4 and n_routed_experts=8: must be equal"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1: must be 0"),
    ({"hidden_act": "tanh"}, "hidden_act='tanh'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ({"index_topk": 64}, "index_topk=64: not a field of DeepSeek-V3"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda x: x if isinstance(x, str) else ";".join(x))
def test_what_a_config_says_and_we_do_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    good = {**SMALL, "model_type": "deepseek_v3"}
    config_from_hf(good)
    with pytest.raises(InputError, match=message):
        config_from_hf(good | changes)


def test_what_a_deepseek_v3_does_not_hold_is_named() -> None:
    config = from_hf(sample()).config
    assert config is not None and config.moe is not None and config.attention.mla is not None
    for section, changes, message in (
        ("moe", {"shared_hidden_dim": 5}, r"moe\.shared_hidden_dim: found 5, must be 12"),
        ("moe", {"expert_bias": False}, r"moe\.expert_bias: found False, must be True"),
        ("moe", {"score_before_experts": True}, r"moe\.score_before_experts: found True, must be False"),
        ("attention", {"mla": dataclasses.replace(config.attention.mla, norm_eps=1e-5)}, r"attention\.mla\.norm_eps"),
    ):
        changed = dataclasses.replace(getattr(config, section), **changes)
        with pytest.raises(InputError, match=rf"not a DeepSeek-V3: {message}"):
            config_to_hf(dataclasses.replace(config, **{section: changed}), {}, "float32")


def test_the_words_for_the_same_layers_do_not_matter() -> None:
    config = from_hf(sample()).config
    assert config is not None and config.moe is not None and isinstance(config.moe.router, dict)
    as_list = dataclasses.replace(
        config, pattern=config.layers, interleave_moe_layer_step=None, nope_layer_interval=None, first_dense_layers=0
    )
    assert config_to_hf(as_list, {}, "float32") == config_to_hf(config, {}, "float32")
    router = {**config.moe.router, "scale": 1.0, "scored_by": 2}
    spelled_out = dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=router))
    assert config_to_hf(spelled_out, {}, "float32")["routed_scaling_factor"] == 1.0
