"""An accelerated transformers model computes what it did before, and everything around it still works."""

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.comparing import OutputSizes, assert_close, assert_gradients, gradients, redraw, run_with_gradients
from torch import Tensor, nn
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moesaic.errors import InputError
from moesaic.interop.accelerate import BLOCKS, accelerate, accelerated_blocks, restore

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 40, "attention_chunk_size": 6, "no_rope_layer_interval": 2}


def llama4_config(**changes: Any) -> Llama4TextConfig:
    return Llama4TextConfig(**{**SIZES, **LLAMA4, "num_local_experts": 8, "interleave_moe_layer_step": 1, **changes})


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama4": lambda: Llama4ForCausalLM(llama4_config(num_experts_per_tok=1)),
    "llama4, top 2, dense layers": lambda: Llama4ForCausalLM(
        llama4_config(num_hidden_layers=4, interleave_moe_layer_step=2)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8, sliding_window=None)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=8)),
}
every_model = pytest.mark.parametrize("name", MODELS)
SPARSE = ("mixtral", "qwen3_moe", "olmoe")


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]()
    if name in SPARSE:
        model.set_experts_implementation("eager")  # the one they call the reference
    return redraw(model).to(dtype).eval()


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, tuple(BLOCKS))]


def classes_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# --- the same numbers


@every_model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_logits_and_every_gradient(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, x = make(name, dtype), tokens()
    expected, expected_gradients = run_with_gradients(lambda: model(x).logits, model)
    accelerate(model)
    logits, found = run_with_gradients(lambda: model(x).logits, model)
    assert_close(logits, expected, tolerance, "logits")
    assert_gradients(found, expected_gradients, tolerance)


@every_model
def test_one_token_and_experts_without_any(name: str) -> None:
    model, x = make(name), tokens(1, 1)  # 8 experts, 1 or 2 of them used
    expected, expected_gradients = run_with_gradients(lambda: model(x).logits, model)
    accelerate(model)
    logits, found = run_with_gradients(lambda: model(x).logits, model)
    assert_close(logits, expected, 2e-5, "logits")
    assert_gradients(found, expected_gradients, 2e-5)


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPARSE)
def test_half_precision_is_as_near_to_the_exact_result_as_theirs(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    experts = blocks_of(model)[0]
    x = torch.randn(64, 32, dtype=dtype)
    ids = torch.rand(64, 8).topk(2).indices
    # Mixtral's router hands out fp32 weights in a bf16 model, the others the model's dtype
    weights = torch.rand(64, 2, dtype=torch.float32 if name == "mixtral" else dtype)
    upstream = torch.randn(64, 32, dtype=torch.float64)

    def run(experts: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        experts.zero_grad()
        inputs = x.detach().to(dtype).requires_grad_()
        scores = weights.detach().to(dtype if dtype == torch.float64 else weights.dtype).requires_grad_()
        y = experts(inputs, ids, scores)
        y.backward(upstream.to(y.dtype))
        return {"output": y.detach(), "x": inputs.grad, "weights": scores.grad, **gradients(experts)}

    exact = run(copy.deepcopy(experts).double(), torch.float64)
    theirs = []
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        theirs.append(run(experts, dtype))
    ours = run(accelerate(experts), dtype)
    assert ours["output"].dtype == theirs[0]["output"].dtype == dtype
    for key, value in exact.items():
        worst = max(error(result[key], value) for result in theirs)
        assert error(ours[key], value) <= 1.2 * worst, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_llama4_block(dtype: torch.dtype) -> None:
    block = blocks_of(make("llama4, top 2, dense layers", dtype))[0]
    x = torch.randn(64, 32, dtype=dtype)
    wide = copy.deepcopy(block).double()
    exact, exact_gradients = run_with_gradients(lambda: wide(x.double())[0], wide)
    theirs, their_gradients = run_with_gradients(lambda: block(x)[0], block)
    ours, our_gradients = run_with_gradients(lambda: accelerate(block)(x)[0], block)
    assert ours.dtype == theirs.dtype
    assert error(ours, exact) <= 1.2 * error(theirs, exact)
    for key, value in exact_gradients.items():
        assert error(our_gradients[key], value) <= 1.2 * error(their_gradients[key], value), key


@every_model
def test_autocast(name: str) -> None:
    model, x = make(name), tokens()

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).logits

    expected, expected_gradients = run_with_gradients(forward, model)
    accelerate(model)
    logits, found = run_with_gradients(forward, model)
    assert logits.dtype == expected.dtype
    assert error(logits, expected.double()) < 0.02
    for key, value in expected_gradients.items():
        assert error(found[key], value.double()) < 0.05, key


def test_no_tokens() -> None:
    for name in ("llama4", "mixtral"):
        block = blocks_of(make(name))[0]
        nothing = torch.randn(0, 32)
        arguments = (nothing,) if name == "llama4" else (nothing, torch.zeros(0, 2, dtype=torch.long), nothing[:, :2])
        result = accelerate(block)(*arguments)
        assert (result[0] if name == "llama4" else result).shape == (0, 32)


# --- it does run on our layers


def test_llama4_no_longer_pushes_every_token_through_every_expert() -> None:
    block, x, every_pair = blocks_of(make("llama4"))[0], torch.randn(40, 32), (8 * 40, 32)
    with OutputSizes() as theirs:
        block(x)
    accelerate(block)
    with OutputSizes() as ours:
        block(x)
    assert every_pair in theirs.shapes
    assert every_pair not in ours.shapes


@pytest.mark.parametrize("name", SPARSE)
def test_their_experts_implementation_no_longer_runs(name: str) -> None:
    model, x = make(name), tokens()
    model.config._experts_implementation = "none such"
    with pytest.raises(KeyError, match="none such"):
        model(x)
    accelerate(model)(x)


# --- what callers ask of a model


@every_model
def test_router_logits_come_out_and_the_auxiliary_loss_is_theirs(name: str) -> None:
    model, x = make(name), tokens()
    model.train()

    def run() -> Any:
        model.zero_grad()
        outputs = model(x, labels=x, output_router_logits=True)
        outputs.loss.backward()
        return outputs

    expected, expected_gradients = run(), gradients(model)
    if not hasattr(expected, "router_logits"):
        pytest.skip("this version of transformers does not hand them out")
    accelerate(model)
    found = run()
    assert len(found.router_logits) == len(expected.router_logits) == len(blocks_of(model))
    for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        assert ours.shape == (18, 8)
        assert_close(ours, theirs, 2e-5, "router logits")
    assert_close(found.loss, expected.loss, 1e-5, "loss")
    if name in SPARSE:
        assert expected.aux_loss > 0
        assert_close(found.aux_loss, expected.aux_loss, 1e-6, "auxiliary loss")
    assert_gradients(gradients(model), expected_gradients, 5e-5)


@pytest.mark.slow_but_for("static-mixtral", "dynamic-olmoe")
@every_model
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(name: str, cache: str) -> None:
    model, x = make(name), tokens(3, 7)
    mask = torch.ones_like(x)
    for row, padding in enumerate((0, 2, 5)):  # left padding
        x[row, :padding], mask[row, :padding] = 0, 0

    def generate() -> Tensor:
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "disable_compile": True}
        return model.generate(x, attention_mask=mask, cache_implementation=cache, **options)

    expected = generate()
    accelerate(model)
    assert torch.equal(generate(), expected)
    assert expected.shape == (3, 19)


@every_model
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed in 5.23
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    model, x = make(name), tokens()
    model.train()
    loss = model(x, labels=x, use_cache=False).loss
    loss.backward()
    expected = gradients(model)
    accelerate(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    blocks_of(model)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.zero_grad()
    model(x, labels=x, use_cache=False).loss.backward()
    assert len(calls) == 2, "forward, and again in backward"
    assert_gradients(gradients(model), expected, 5e-5)


@pytest.mark.slow_but_for("mixtral")
@every_model
def test_training_gives_the_same_losses(name: str) -> None:
    def losses(model: PreTrainedModel) -> Tensor:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        history = []
        for step in range(6):
            x = torch.randint(3, VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(step))
            loss = model(x, labels=x).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            history.append(loss.detach())
        return torch.stack(history)

    expected = losses(make(name, torch.float64))
    assert expected[-1] != expected[0]
    assert_close(losses(accelerate(make(name, torch.float64))), expected, 1e-9, "losses")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def train(model: PreTrainedModel, folder: Path) -> list[float]:
        rows = [{"input_ids": row, "labels": row} for row in tokens(16, 10)]
        arguments = TrainingArguments(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_steps=4,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    expected = train(make("mixtral"), tmp_path / "theirs")
    model = accelerate(make("mixtral"))
    found = train(model, tmp_path / "ours")
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=1e-3)  # logged with four digits
    saved = MixtralForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-4")
    assert accelerated_blocks(saved) == []
    for key, value in saved.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


# --- the state dict stays theirs


@every_model
def test_parameters_are_shared_and_names_unchanged(name: str) -> None:
    model = make(name)
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    accelerate(model)
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters())
    assert all(after[key] is before[key] for key in before)
    assert after.keys() == before.keys()
    assert all(isinstance(block, tuple(BLOCKS)) for block in blocks_of(model))


@every_model
def test_save_and_reload(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "before")
    accelerate(model).save_pretrained(tmp_path / "after")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    reloaded = type(model).from_pretrained(tmp_path / "after")
    assert accelerated_blocks(reloaded) == []
    assert_close(accelerate(reloaded)(tokens()).logits, model(tokens()).logits, 0, "logits")


@every_model
def test_copies_and_pickles_stay_accelerated(name: str) -> None:
    model, x = accelerate(make(name)), tokens()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert classes_of(twin) == classes_of(model)
        assert torch.equal(twin(x).logits, model(x).logits)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        restore(twin)
        assert accelerated_blocks(model)
        assert not accelerated_blocks(twin)


# --- in place, reversible, as often as one likes


@every_model
def test_restore_brings_everything_back(name: str) -> None:
    model, x = make(name), tokens()
    classes, logits = classes_of(model), model(x).logits
    assert restore(model) is model
    assert classes_of(model) == classes, "never accelerated"
    assert accelerate(model) is model
    accelerated = classes_of(model)
    assert accelerated != classes
    assert classes_of(accelerate(model)) == accelerated, "twice is once"
    assert classes_of(restore(restore(model))) == classes
    assert torch.equal(model(x).logits, logits)


def test_it_says_which_blocks(caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama4, top 2, dense layers")
    assert accelerated_blocks(model) == []
    with caplog.at_level("INFO", "moesaic"):
        accelerate(model)
    assert "Llama4ForCausalLM: 2 MoE blocks accelerated" in caplog.text
    assert accelerated_blocks(model) == ["model.layers.1.feed_forward", "model.layers.3.feed_forward"]
    assert accelerated_blocks(accelerate(make("mixtral"))) == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]


def test_parts_of_a_model() -> None:
    model, x = make("llama4"), torch.randn(5, 32)
    first = blocks_of(model)[0]
    expected = first(x)[0]
    assert accelerate(first) is first
    assert accelerated_blocks(model) == ["model.layers.0.feed_forward"]
    assert_close(first(x)[0], expected, 2e-5, "a single block")
    accelerate(model.model.layers[1])
    assert len(accelerated_blocks(model)) == 2
    restore(first)
    assert accelerated_blocks(model) == ["model.layers.1.feed_forward"]
    accelerate(model)
    assert len(accelerated_blocks(model)) == 2


def test_base_model_and_multimodal_model() -> None:
    text = redraw(Llama4TextModel(llama4_config())).eval()
    expected = text(tokens()).last_hidden_state
    assert_close(accelerate(text)(tokens()).last_hidden_state, expected, 2e-5, "base model")

    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    config = Llama4Config(text_config=llama4_config().to_dict(), vision_config=vision)
    both = redraw(Llama4ForConditionalGeneration(config)).eval()
    expected = both(tokens()).logits
    assert_close(accelerate(both)(tokens()).logits, expected, 2e-5, "multimodal model")
    assert all(name.startswith("language_model.") for name in accelerated_blocks(both))


@pytest.mark.parametrize("name", ["llama4", "mixtral"])
def test_hooks_of_block_router_and_experts_fire_once(name: str) -> None:
    model = make(name)
    fired: list[int] = []
    block = model.model.layers[0].feed_forward if name == "llama4" else model.model.layers[0].mlp
    parts = [block, block.experts, block.router if name == "llama4" else block.gate]
    for part in parts:
        part.register_forward_hook(lambda module, *_: fired.append(id(module)))
    accelerate(model)(tokens())
    assert sorted(fired) == sorted(id(part) for part in parts)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the tracer about itself
@pytest.mark.parametrize("name", ["llama4", "mixtral"])
def test_compiled_model(name: str) -> None:
    torch._dynamo.reset()
    model, x = make(name), tokens()
    expected, expected_gradients = run_with_gradients(lambda: model(x, use_cache=False).logits, model)
    accelerate(model)
    model.model.layers[0].compile(backend="aot_eager", fullgraph=True)
    logits, found = run_with_gradients(lambda: model(x, use_cache=False).logits, model)
    assert_close(logits, expected, 2e-5, "logits")
    assert_gradients(found, expected_gradients, 5e-5)


# --- what cannot be done is refused, and nothing has changed then


def test_other_architectures_are_refused_by_name() -> None:
    config = LlamaConfig(**{key: value for key, value in SIZES.items() if key != "num_experts_per_tok"})
    for model in (LlamaForCausalLM(config), nn.Linear(2, 2)):
        with pytest.raises(InputError) as refusal:
            accelerate(model)
        assert type(model).__name__ in str(refusal.value)
        for supported in ("Llama4TextMoe", "MixtralExperts", "Qwen3MoeExperts", "OlmoeExperts"):
            assert supported in str(refusal.value)


class Quantized(nn.Parameter):
    pass


def replace_weight(experts: nn.Module, weight: Callable[[Tensor], nn.Parameter]) -> None:
    experts.down_proj = weight(experts.down_proj.detach())


def parametrize(experts: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())


def frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


SPOILT: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "meta": (lambda e: replace_weight(e, lambda w: nn.Parameter(w.to("meta"))), "down_proj is on the meta device"),
    "int8": (lambda e: replace_weight(e, lambda w: frozen(w.to(torch.int8))), "down_proj is torch.int8: must be"),
    "float8": (lambda e: replace_weight(e, lambda w: frozen(w.to(torch.float8_e4m3fn))), "float8_e4m3fn: must be"),
    "quantized": (lambda e: replace_weight(e, Quantized), "down_proj is a Quantized"),
    "two dtypes": (lambda e: replace_weight(e, lambda w: nn.Parameter(w.double())), "one dtype and one device"),
    "parametrised": (parametrize, "is a Parametrized"),
    "forward replaced": (lambda e: setattr(e, "forward", e.forward), "has a forward of its own"),
    "expert parallel": (lambda e: setattr(e, "_is_expert_parallel", True), "sharded by expert parallelism"),
}


@pytest.mark.parametrize("name", ["llama4", "qwen3_moe"])
@pytest.mark.parametrize("how", SPOILT)
def test_a_block_that_cannot_run_is_refused_and_nothing_changes(name: str, how: str) -> None:
    model = make(name)
    spoil, message = SPOILT[how]
    last = blocks_of(model)[-1]
    spoil(last.experts if name == "llama4" else last)  # all blocks before it are fine
    classes, parameters = classes_of(model), dict(model.named_parameters())
    with pytest.raises(InputError, match=message) as refusal:
        accelerate(model)
    assert "layers.1." in str(refusal.value), "it says which"
    assert classes_of(model) == classes
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = MODELS["olmoe"]()
    with pytest.raises(InputError, match="meta"):
        accelerate(model)
    assert accelerated_blocks(model) == []


def test_what_was_wrapped_after_acceleration_is_not_torn_apart() -> None:
    model, x = accelerate(make("mixtral")), tokens()
    expected = model(x).logits
    parametrize(blocks_of(model)[-1])
    assert torch.equal(accelerate(model)(x).logits, expected), "it is accelerated still"
    classes = classes_of(model)
    with pytest.raises(InputError, match=r"layers\.1\..* is a Parametrized"):
        restore(model)
    assert classes_of(model) == classes


# --- the plugin with which transformers' own tests run over accelerated models

THEIR_TEST = """
from transformers import MixtralConfig, MixtralForCausalLM
from moesaic.interop.accelerate import accelerated_blocks

CONFIG = MixtralConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                       num_key_value_heads=1, num_local_experts=2)

def test_made_and_loaded(tmp_path):
    model = MixtralForCausalLM(CONFIG)
    assert len(accelerated_blocks(model)) == 1
    model.save_pretrained(tmp_path)
    assert len(accelerated_blocks(MixtralForCausalLM.from_pretrained(tmp_path))) == 1
    loaded, info = MixtralForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(accelerated_blocks(loaded)) == 1
"""


@pytest.mark.slow
def test_plugin_accelerates_what_a_test_makes(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(THEIR_TEST, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "accelerated_transformers"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    # the base model counts as well: it is made on its own, inside the other
    assert "accelerated by moesaic in this process: 3 MixtralForCausalLM, 1 MixtralModel" in report
