"""Directories in transformers' format: both ways bit-equal, strict, tensor by tensor, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llama4_samples import BAND, CASES, NO_BAND, SMALL, llama4, llama4_with_vision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_weights import assert_same_weights, edit_config, save, weights
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig

from moesaic.errors import InputError
from moesaic.interop import accelerate, check_hf, config_from_hf, from_hf, to_hf
from moesaic.layers import AttentionTemperature
from moesaic.models import Decoder, build_decoder, llama4_maverick, llama4_scout, llama4_toy
from moesaic.models.config import BaseShape


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with three shards."""
    return save(llama4(), tmp_path / "source")


# ---- both ways


@pytest.mark.slow_but_for("scout", "every expert", "tied head")
@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_equal_and_loads_in_transformers(name: str, tmp_path: Path) -> None:
    model = llama4(**CASES[name])
    directory = save(model, tmp_path / "source")
    check_hf(directory)
    to_hf(from_hf(directory), tmp_path / "copy")
    assert_same_weights(weights(tmp_path / "copy"), weights(directory))
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    strict = Llama4ForCausalLM(theirs.config)
    strict.load_state_dict({**model.state_dict(), **weights(tmp_path / "copy")}, strict=True)
    ours, original = theirs.config.to_dict(), model.config.to_dict()
    assert {key: ours[key] for key in original if key != "_name_or_path"} == {
        key: value for key, value in original.items() if key != "_name_or_path"
    }
    prompt = torch.randint(SMALL["vocab_size"], (1, 6))
    continued = [m.generate(prompt, max_new_tokens=8, do_sample=False) for m in (model, theirs)]
    assert torch.equal(*continued)


def test_a_decoder_of_ours_generates_the_same_tokens_there(tmp_path: Path) -> None:
    from moesaic.models import generate

    decoder = build_decoder(llama4_toy(vocab_size=50))
    to_hf(decoder, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    prompt = torch.randint(50, (2, 5))
    expected = generate(decoder, prompt, 12, temperature=0)
    assert torch.equal(theirs.generate(prompt, max_new_tokens=12, do_sample=False), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_or_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama4().to(dtype)
    directory = save(model, tmp_path / "source")
    decoder = from_hf(directory)
    assert {p.dtype for p in decoder.parameters()} == {dtype}
    to_hf(decoder, tmp_path / "kept")
    assert_same_weights(weights(tmp_path / "kept"), weights(directory))
    name = str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["dtype"] == name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "kept").dtype == dtype
    expected = {key: value.float() for key, value in weights(directory).items()}
    to_hf(decoder, tmp_path / "written", dtype=torch.float32)
    to_hf(from_hf(directory, dtype=torch.float32), tmp_path / "read")
    assert_same_weights(weights(tmp_path / "written"), expected)
    assert_same_weights(weights(tmp_path / "read"), expected)


@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
def test_shards_hold_what_the_index_says(limit: int, tmp_path: Path) -> None:
    decoder = from_hf(llama4())
    to_hf(decoder, tmp_path / "out", max_shard_bytes=limit)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    tensors = len(list(decoder.parameters()))
    assert len(files) == {1: tensors, 20_000: len(files), 10**9: 1}[limit] and (limit != 20_000 or len(files) > 2)
    if limit == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
        return
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in decoder.parameters())
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            assert {name for name, where in index["weight_map"].items() if where == file.name} == set(opened.keys())


def test_one_flipped_bit_of_a_weight_is_seen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    to_hf(from_hf(llama4()), tmp_path / "out", max_shard_bytes=20_000)
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    check_hf(tmp_path / "out")  # reads no weight
    with pytest.raises(InputError, match=rf"{shard.name}: damaged, its data have not the SHA-256 in its metadata"):
        from_hf(tmp_path / "out")


def test_vision_tensors_are_skipped_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama4_with_vision()
    directory = save(model, tmp_path / "source")
    vision = sum(not name.startswith("language_model.") for name in model.state_dict())
    assert check_hf(directory).skipped == vision
    decoder = from_hf(directory)
    assert f"{vision} vision tensors skipped" in caplog.text
    to_hf(decoder, tmp_path / "text")
    expected = {k.removeprefix("language_model."): v for k, v in weights(directory).items() if "language_model" in k}
    assert_same_weights(weights(tmp_path / "text"), expected)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "text")) is Llama4ForCausalLM


def test_what_stands_beside_the_weights_comes_back(source: Path, tmp_path: Path) -> None:
    edit_config(source, eos_token_id=[7, 9], pad_token_id=5, for_llm_compressor=False)
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.6,  "do_sample": true}')
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "X"}')
    to_hf(from_hf(source), tmp_path / "copy")
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_text() == (source / name).read_text()
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == ([7, 9], 5, 1)


def test_what_a_killed_conversion_left_does_not_come_along(source: Path, tmp_path: Path) -> None:
    left = tmp_path / ".written.partial"
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    to_hf(from_hf(source), tmp_path / "written")
    assert not left.exists()
    assert not (tmp_path / "written" / "model-00001-of-00002.safetensors").exists()
    from_hf(tmp_path / "written")


def test_nothing_is_shared_with_the_source(source: Path) -> None:
    model = llama4()
    decoder = from_hf(model)
    with torch.no_grad():
        decoder.embedding.weight.zero_()
    assert model.model.embed_tokens.weight.any()
    from_file = from_hf(source)
    before = weights(source)
    with torch.no_grad():
        for p in from_file.parameters():
            p.zero_()
    assert_same_weights(weights(source), before)


def test_progress_counts_every_tensor(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    decoder = from_hf(source, progress=lambda *step: seen.append(step))
    expected = len(weights(source))
    assert [step[:2] for step in seen] == [(i + 1, expected) for i in range(expected)]
    seen.clear()
    to_hf(decoder, tmp_path / "out", max_shard_bytes=20_000, progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(i + 1, expected) for i in range(expected)]
    assert {name for _, _, name in seen} == set(weights(source))


MEMORY = """
import json, sys
from pathlib import Path
import torch
from moesaic.interop import from_hf, to_hf

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

source, out = map(Path, sys.argv[1:])
from_hf(source / "tiny")  # what is loaded on first use
peaks = {}
def measure(name, action):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    result = action()
    peaks[name] = resident("VmHWM") - before
    return result

decoder = measure("read", lambda: from_hf(source / "large"))
measure("write", lambda: to_hf(decoder, out / "same"))
measure("write another dtype", lambda: to_hf(decoder, out / "cast", dtype=torch.bfloat16))
del decoder
measure("read another dtype", lambda: from_hf(source / "large", dtype=torch.bfloat16))
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark of memory")
def test_memory_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    large = {**SMALL, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_local_experts": 8}
    sizes = {"tiny": SMALL, "large": {**large, "interleave_moe_layer_step": 1}}
    for name, size in sizes.items():
        Llama4ForCausalLM(Llama4TextConfig(**size)).save_pretrained(tmp_path / "source" / name)
    file = tmp_path / "source" / "large" / "model.safetensors"
    total, tensor = file.stat().st_size, 8 * 256 * 1024 * 4
    assert total > 8 * tensor, "too small to tell one tensor from a second copy"
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "source"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    slack = tensor // 2 + 4_000_000
    assert total < peaks["read"] < total + tensor + slack
    assert peaks["write"] < tensor + slack
    assert peaks["write another dtype"] < tensor + slack
    assert peaks["read another dtype"] < total / 2 + tensor + slack


# ---- configs


def test_the_spellings_of_2025_are_understood() -> None:
    legacy = {
        **SMALL,
        "attn_temperature_tuning": 4,
        "floor_scale": 8192.0,
        "no_rope_layers": [],
        "rope_theta": 10000.0,
        "rope_scaling": {k: v for k, v in NO_BAND.items() if k != "rope_theta"},
        "torch_dtype": "bfloat16",
        "_attn_implementation_autoset": True,
    }
    modern = {**SMALL, "attn_temperature_tuning": True, "floor_scale": 8192, "rope_parameters": NO_BAND}
    assert config_from_hf(legacy) == config_from_hf(modern)
    older = {**legacy, "rope_scaling": {**legacy["rope_scaling"], "type": "llama3"}}
    del older["rope_scaling"]["rope_type"]
    assert config_from_hf(older) == config_from_hf(modern)


def test_no_field_means_the_default_of_transformers() -> None:
    named = {key: value for key, value in Llama4TextConfig().to_dict().items() if key != "_name_or_path"}
    assert config_from_hf({}) == config_from_hf(named)


def test_the_presets_are_the_published_files() -> None:
    """Field values of the two models, as in docs of the release; Scout's RoPE scaling is that of 2025-04-08."""
    scaling = {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }
    scout = {"rope_theta": 500000.0, "rope_scaling": scaling, "attn_temperature_tuning": 4, "pad_token_id": None}
    assert config_from_hf(scout) == llama4_scout()
    maverick = {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False}
    assert config_from_hf(maverick) == llama4_maverick()


def test_layers_are_read_as_intervals_where_these_give_them() -> None:
    written = Llama4TextConfig(**{**SMALL, "no_rope_layer_interval": 2}).to_dict()
    config = config_from_hf({key: value for key, value in written.items() if key != "_name_or_path"})
    assert (config.pattern, config.interleave_moe_layer_step, config.nope_layer_interval) == (None, 2, 2)
    assert config_from_hf({**SMALL, "moe_layers": [0, 3]}).pattern is not None


BAD_CONFIGS = [
    ({"sliding_window": 4096}, r"sliding_window=4096: not a field of Llama 4"),
    ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config=.*: must be absent"),
    ({"hidden_act": "xielu"}, r"hidden_act='xielu': must be one of silu"),
    ({"attention_dropout": 0.1}, r"attention_dropout=0\.1: must be 0"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope_scaling: found rope_type='linear'; must be"),
    ({"rope_parameters": {**BAND, "beta": 1}}, r"rope_parameters\.beta: unknown key"),
    ({"rope_parameters": {**BAND, "factor": "x"}}, r"rope_parameters\.factor: found 'x' \(str\)"),
    ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, r"found \['factor'\] with rope_type default"),
    ({"rope_parameters": {**BAND, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor; must be 1\.0"),
    ({"num_hidden_layers": "four"}, r"config\.json\.num_hidden_layers: found 'four' \(str\); must be an integer"),
    ({"num_experts_per_tok": 9}, r"top_k=9: must be 1 to num_experts=4"),
    ({"moe_layers": [1, 9]}, r"moe_layers: found layer 9; must be 0 to 3"),
    ({"no_rope_layers": [1, 0]}, r"no_rope_layers: found 2 entries; must be num_hidden_layers=4"),
    ({"no_rope_layers": [1, 0, 2, 1]}, r"no_rope_layers: found 2; must be 1"),
    ({"layer_types": ["sliding_attention"] * 4}, r"layer_types\[0\]: found 'sliding_attention'"),
    ({"no_rope_layer_interval": 0}, r"no_rope_layer_interval=0: must be a number >= 1"),
    ({"interleave_moe_layer_step": 0}, r"interleave_moe_layer_step=0: must be a number >= 1"),
    ({"num_key_value_heads": 3}, r"num_heads=4: must be a multiple of num_kv_heads=3"),
    ({"attn_scale": 1e308}, r"config\.json\.attn_scale=1e\+308: must be a number that is at most 1000000"),
    ({"rms_norm_eps": 1e-300}, r"config\.json\.rms_norm_eps=1e-300: must be a number from 1e-20 to 1"),
    ({"rope_theta": 1e300}, r"config\.json: rope_theta=1e\+300: must be a number from 1 to 1e15"),
    ({"rope_parameters": {**BAND, "rope_theta": "x"}}, r"config\.json: rope_theta='x': must be a number"),
    (
        {"rope_parameters": {**BAND, "factor": 1e308}},
        r"rope_parameters\.factor=1e\+308: must be a number that is at most",
    ),
    ({"initializer_range": 0}, r"config\.json\.initializer_range=0\.0: must be a number > 0"),
    ({"head_dim": 7}, r"head_dim=7: RoPE rotates pairs"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=[";".join(changes) for changes, _ in BAD_CONFIGS])
def test_what_a_config_says_and_we_do_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_from_hf({**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, r"architectures=\['Qwen2ForCausalLM'\]"),
        ({"architectures": ["MixtralForCausalLM"], "model_type": "qwen2"}, "model_type='qwen2'; must be one of Llama4"),
        ({"architectures": ["Llama4ForConditionalGeneration"]}, "with a text_config"),
        ({"architectures": None, "model_type": ...}, r"architectures=\[\], model_type=None"),
    ],
)
def test_other_architectures_are_refused(source: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(source, **changes)
    with pytest.raises(InputError, match=message):
        from_hf(source)


def test_models_that_are_no_llama4_are_not_written(tmp_path: Path) -> None:
    toy = llama4_toy()
    assert toy.moe is not None
    from dataclasses import replace

    other = replace(
        toy,
        attention=replace(toy.attention, conv_width=3, temperature=AttentionTemperature(scalable_softmax=0.5)),
        moe=replace(toy.moe, score_function="softmax", shared_hidden_dim=0),
        parametrization="transfer",
        base=BaseShape(dim=16, num_layers=2),
    )
    with pytest.raises(InputError) as error:
        to_hf(build_decoder(other), tmp_path / "out")
    for part in (
        "attention.conv_width: found 3, must be 0",
        "attention.temperature.scalable_softmax: found 0.5, must be null",
        "base.num_layers: found 2, must be num_layers=4",
        "moe.score_function: found 'softmax', must be sigmoid",
        "moe.shared_hidden_dim: found 0, must be moe.hidden_dim=32",
    ):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_dense_twins_and_full_rope_are_written(tmp_path: Path) -> None:
    from dataclasses import replace

    toy = llama4_toy(interleave_moe_layer_step=1, dense_twin=True)
    toy = replace(toy, attention=replace(toy.attention, attention_chunk_size=None))
    decoder = build_decoder(toy)
    to_hf(decoder, tmp_path / "out")
    tokens = torch.randint(512, (2, 20))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


# ---- damaged or foreign directories


def rewrite(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop_a_tensor(directory: Path) -> None:
    rewrite(directory / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))


def add_a_tensor(directory: Path) -> None:
    rewrite(directory / "model.safetensors", lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(2)}))


def wrong_shape(directory: Path) -> None:
    rewrite(directory / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.zeros(5)}))


def scalar_shape(directory: Path) -> None:
    rewrite(directory / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.tensor(1.0)}))


def wrong_dtype(directory: Path) -> None:
    rewrite(directory / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.zeros(24).long()}))


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def damage_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": ')


def list_as_config(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def garbage(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"not a model")


DAMAGES = [
    (drop_a_tensor, "missing tensor model.norm.weight"),
    (add_a_tensor, r"unexpected tensor model.layers.0.extra.weight"),
    (wrong_shape, r"model.norm.weight: found shape \[5\], config.json says \[24\]"),
    (scalar_shape, r"model.norm.weight: found shape \[\], config.json says \[24\]"),
    (wrong_dtype, "model.norm.weight: found dtype I64; must be one of F64, F32, F16, BF16"),
    (truncate, "model.safetensors: truncated or not a safetensors file"),
    (garbage, "model.safetensors: truncated or not a safetensors file"),
    (remove_weights, r"found \['pytorch_model.bin'\]; must be model.safetensors"),
    (remove_config, "no config.json in this directory"),
    (damage_config, "config.json: damaged"),
    (list_as_config, "config.json: found a list; must be a mapping"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
@pytest.mark.parametrize("read", [from_hf, check_hf])
def test_a_damaged_directory_is_refused(damage: Any, message: str, read: Any, tmp_path: Path) -> None:
    llama4().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def test_damaged_shards_are_refused(source: Path) -> None:
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))
    assert len(names) >= 3
    kept = (source / names[1]).read_bytes()

    (source / names[1]).write_bytes(kept[: len(kept) // 2])
    with pytest.raises(InputError, match=f"{names[1]}: truncated"):
        from_hf(source)
    (source / names[1]).unlink()
    with pytest.raises(InputError, match=f"{names[1]}: missing; .* expects"):
        from_hf(source)
    report = check_hf(source)  # the index alone can be checked
    assert report.absent_shards == (names[1],)
    (source / names[1]).write_bytes(kept)

    moved = next(name for name, file in content["weight_map"].items() if file == names[0])
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], moved: names[1]}}))
    with pytest.raises(InputError, match=f"{names[0]}: does not hold what .* says: unexpected tensor {moved}"):
        from_hf(source)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(InputError, match="damaged, it has no weight_map"):
        from_hf(source)


def test_no_such_directory() -> None:
    with pytest.raises(InputError, match="/nowhere: no such directory"):
        from_hf("/nowhere")


def test_another_head_than_the_tied_one_is_refused(tmp_path: Path) -> None:
    llama4(tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    embedding = load_file(file)["model.embed_tokens.weight"]
    rewrite(file, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    from_hf(tmp_path)
    rewrite(file, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(InputError, match=r"lm_head\.weight differs from the embedding"):
        from_hf(tmp_path)


def test_tied_models_stay_tied_on_every_way(tmp_path: Path) -> None:
    model = accelerate(llama4(tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "theirs")
    decoder = from_hf(model)
    to_hf(decoder, tmp_path / "ours")
    assert_same_weights(weights(tmp_path / "ours"), weights(tmp_path / "theirs"))
    back = accelerate(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))
    for each in (model, back):
        assert each.lm_head.weight is each.model.embed_tokens.weight
    for each in (decoder, from_hf(tmp_path / "theirs"), from_hf(back)):
        assert each.head.weight is each.embedding.weight


def test_models_without_data_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Llama4ForCausalLM(Llama4TextConfig(**SMALL))
    with pytest.raises(InputError, match="on the meta device, it has no data to read"):
        from_hf(model)
    with pytest.raises(InputError, match="on the meta device, it has no data to write"):
        to_hf(build_decoder(llama4_toy(), device="meta"), tmp_path / "out")
    with pytest.raises(InputError, match="Linear: no transformers model"):
        from_hf(torch.nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_a_decoder_put_together_by_hand_is_refused(tmp_path: Path) -> None:
    decoder = Decoder(vocab_size=5, dim=4, blocks=[])
    with pytest.raises(InputError, match="this decoder has no config"):
        to_hf(decoder, tmp_path / "out")


def test_a_directory_with_a_model_is_not_overwritten(source: Path) -> None:
    before = weights(source)
    decoder = from_hf(source)
    with pytest.raises(InputError, match="there is already a model in this directory"):
        to_hf(decoder, source)
    assert_same_weights(weights(source), before)


def test_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    class Full(Exception):
        pass

    def full(done: int, total: int, name: str) -> None:
        if done == 5:
            raise Full

    with pytest.raises(Full):
        to_hf(from_hf(llama4()), tmp_path / "out", progress=full)
    assert not list(tmp_path.iterdir())


def test_a_model_too_large_to_load_is_checked(tmp_path: Path) -> None:
    """Scout's config, its index and the headers of its shards: 216 GB of tensors, none of which exists."""
    with torch.device("meta"):
        model = Llama4ForCausalLM(Llama4TextConfig(dtype="bfloat16"))
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    edit_config(tmp_path, architectures=["Llama4ForCausalLM"])
    groups: dict[str, list[str]] = {}
    for name in model.state_dict():
        groups.setdefault(f"model-{name.split('.')[2] if 'layers' in name else 'rest'}.safetensors", []).append(name)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for file_name, names in groups.items():
        header, end = {}, 0
        for name in names:
            begin, end = end, end + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        with (tmp_path / file_name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + end)  # a sparse file: no disk is used
    weight_map = {name: file_name for file_name, names in groups.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    report = check_hf(tmp_path)
    assert report.tensors == len(shapes) == 579
    assert report.bytes == 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) > 200e9
    assert report.absent_shards == ()

    edit_config(tmp_path, num_local_experts=128)
    with pytest.raises(InputError, match=r"found shape .*, config\.json says"):
        check_hf(tmp_path)
