"""The example that trains an exported model on in transformers' Trainer: step by step as our own decoder goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.data import DataConfig, load_data, training_loader
from moesaic.errors import InputError
from moesaic.examples.continue_in_transformers import Windows, continue_training, layout, main
from moesaic.interop import config_to_hf, from_hf, to_hf
from moesaic.models import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig, build_decoder
from moesaic.parallel.workers import Workers

pytest.importorskip("accelerate", reason="transformers' Trainer needs the accelerate package")

VOCABULARY, LENGTH, WINDOWS, STEPS, RATE, SEED = 61, 16, 4, 5, 1e-3, 7

HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_theta": 10000.0}
SOFTMAX: dict[str, Any] = {
    **{"num_experts": 8, "top_k": 2, "hidden_dim": 24, "shared_hidden_dim": 0},
    **{"score_function": "softmax", "score_before_experts": False},
}
WINNERS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {
        "attention": AttentionConfig(**HEADS, qk_norm="per_head"),
        "moe": MoEConfig(**SOFTMAX, normalize_scores=True),
    },
    "MixtralForCausalLM": {
        "attention": AttentionConfig(**HEADS, qk_norm=False),
        "moe": MoEConfig(**SOFTMAX | {"hidden_dim": 48}, normalize_scores=True),
    },
    "OlmoeForCausalLM": {
        "attention": AttentionConfig(**HEADS, qk_norm="full_width"),
        "moe": MoEConfig(**SOFTMAX | {"hidden_dim": 48}, normalize_scores=False),
    },
}
LLAMA4 = "Llama4ForCausalLM"
# ranks, experts over how many of them
LAYOUTS = {"one": (1, 1), "FSDP2": (2, 1), "EP x FSDP2": (2, 2), "EP x FSDP2 x sharded experts": (4, 2)}
CASES = [
    *(("Qwen3MoeForCausalLM", layout) for layout in LAYOUTS),
    ("MixtralForCausalLM", "EP x FSDP2"),
    ("OlmoeForCausalLM", "EP x FSDP2"),
    (LLAMA4, "FSDP2"),
]


def winner(name: str) -> DecoderConfig:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "num_layers": 2, "init_std": 0.1}
    if name == LLAMA4:
        return DecoderConfig(
            **sizes,
            attention=AttentionConfig(**HEADS, attention_chunk_size=8),
            moe=MoEConfig(num_experts=8, hidden_dim=48),
            pattern=(LayerConfig(mixer="chunked_rope", ffn="moe"), LayerConfig(mixer="nope", ffn="dense")),
        )
    return DecoderConfig(**sizes, pattern=(LayerConfig(mixer="rope", ffn="moe"),), **WINNERS[name])


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder with the ids to train on."""
    (tmp_path / "ids").mkdir()
    ids = (np.arange(3000) * 7 % VOCABULARY).astype(np.uint16)  # each says what the next is
    for split in ("train", "validation"):
        ids.tofile(tmp_path / "ids" / f"{split}.bin")
    (tmp_path / "ids" / "manifest.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": VOCABULARY}))
    return tmp_path


@pytest.fixture
def fresh() -> Iterator[Workers]:
    """Processes of this test alone: accelerate keeps its first process group for as long as a process lives."""
    workers = Workers(4)
    yield workers
    workers.close()


def export(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    config = winner(name)
    assert config_to_hf(config, {}, "float32")["architectures"] == [name], "the layout that holds it exactly"
    to_hf(build_decoder(config), folder / "exported")


def ours(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """What our decoder does from the same weights with AdamW, on one process."""
    decoder = from_hf(folder / "exported", dtype=torch.float32).train()
    data = load_data(DataConfig(source="memmap", path=str(folder / "ids")))
    loader = training_loader(data, seq_len=LENGTH, batch_size=WINDOWS, num_batches=STEPS, seed=SEED)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    rows = []
    for batch in loader:
        logits = decoder(batch["tokens"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        rows.append({"loss": loss.item(), "grad_norm": norm.item()})
    return rows, {name: each.detach() for name, each in decoder.named_parameters()}


def meet() -> int:
    """Tell transformers and accelerate what a launcher would; returns the number of ranks."""
    if not distributed.is_initialized():
        return 1
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, but the ranks have met already
    return ranks


def units(folder: str) -> list[str]:
    """Names of the modules whose weights are gathered together."""
    exported = Path(folder) / "exported"
    laid_out = layout(AutoConfig.from_pretrained(exported), meet())
    model = AutoModelForCausalLM.from_pretrained(exported, distributed_config=laid_out)
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


def theirs(folder: str, expert_parallel: int) -> list[dict[str, float]]:
    ranks, there = meet(), Path(folder)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or accelerate warns that it sets it
    return continue_training(
        there / "exported",
        there / "ids",
        there / "continued",
        steps=STEPS,
        batch_size=WINDOWS // ranks,
        seq_len=LENGTH,
        learning_rate=RATE,
        seed=SEED,
        expert_parallel=expert_parallel,
    )


def require_equal(rows: list[dict[str, float]], folder: Path) -> None:
    """Losses and gradient norms of every step, and the weights that were written."""
    wanted, weights = ours(folder)
    assert wanted[-1]["loss"] < wanted[0]["loss"], "it learns"
    assert wanted[0]["grad_norm"] > 1, "clipping has an effect"
    for found, expected in zip(rows, wanted, strict=True):
        assert found == pytest.approx(expected, rel=5e-6)
    back = from_hf(folder / "continued" / "model")
    for name, each in back.named_parameters():
        # AdamW makes whole steps of gradients that are rounding alone, so the mean says more than the largest
        difference = (each.detach() - weights[name]).abs()
        assert difference.max() < RATE and difference.mean() < 1e-7, (name, difference.max(), difference.mean())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout_name"), CASES)
def test_it_goes_on_as_our_own_decoder_does(name: str, layout_name: str, given: Path, fresh: Workers) -> None:
    export(name, given)
    ranks, spread = LAYOUTS[layout_name]
    results = fresh.run(theirs, ranks, str(given), spread)
    require_equal(results[0], given)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", LLAMA4])
def test_each_block_is_gathered_alone(name: str, given: Path, fresh: Workers) -> None:
    export(name, given)
    found = fresh.run(units, 2, str(given))[0]
    assert {"model.embed_tokens", "model.layers.0", "model.layers.1"} <= set(found)


@pytest.mark.slow
def test_the_command_on_two_processes_goes_on_as_our_decoder_does_on_one(given: Path) -> None:
    """By the defaults: experts over both processes, all other weights sharded."""
    export("Qwen3MoeForCausalLM", given)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = {"steps": STEPS, "batch-size": WINDOWS // 2, "seq-len": LENGTH, "learning-rate": RATE, "seed": SEED}
    typed = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [*launcher, "-m", "moesaic.examples.continue_in_transformers", "exported", "ids", "continued", *typed],
        cwd=given,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"loss"')]
    require_equal(printed, given)


def test_windows_are_those_of_our_loader_in_its_order(given: Path) -> None:
    windows = Windows(given / "ids", VOCABULARY, seq_len=LENGTH, num_examples=2 * WINDOWS, seed=SEED)
    data = load_data(DataConfig(source="memmap", path=str(given / "ids")))
    batches = list(training_loader(data, seq_len=LENGTH, batch_size=WINDOWS, num_batches=2, seed=SEED))
    assert len(windows) == 2 * WINDOWS
    for name, ours_too in (("input_ids", "tokens"), ("shift_labels", "labels")):
        wanted = torch.cat([batch[ours_too] for batch in batches])
        assert torch.equal(torch.stack([windows[i][name] for i in range(len(windows))]), wanted)


@pytest.mark.parametrize(
    ("config", "processes", "spread", "message"),
    [
        ({"num_experts": 6}, 4, None, r"--expert-parallel 4: must divide .* processes, 4, and of experts, 6"),
        ({"num_local_experts": 8}, 4, 3, r"--expert-parallel 3: must divide"),
        ({"num_experts": 8}, 2, 0, r"--expert-parallel 0: must divide"),
        ({"num_local_experts": 8, "base_model_ep_plan": None}, 2, 2, r"must be 1, transformers has no plan for it"),
    ],
)
def test_layouts_that_cannot_be_are_refused(
    config: dict[str, Any], processes: int, spread: int | None, message: str
) -> None:
    told = SimpleNamespace(**{"base_model_ep_plan": {"layers.*": "rule"}, "model_type": "it", **config})
    with pytest.raises(InputError, match=message):
        layout(told, processes, spread)


def test_ids_of_a_larger_vocabulary_are_refused(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export("Qwen3MoeForCausalLM", given)
    manifest = given / "ids" / "manifest.json"
    manifest.write_text(json.dumps({"dtype": "uint16", "vocab_size": VOCABULARY + 1}))
    with pytest.raises(SystemExit) as end:
        main([str(given / name) for name in ("exported", "ids", "continued")])
    assert end.value.code == 2
    assert "it has 62 ids; must be at most the model's 61" in capsys.readouterr().err
