"""`python -m moesaic.interop`: the one entry point to hold this package against transformers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama4_samples import SMALL, llama4
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.interop.__main__ import main

TOKENS = torch.randint(SMALL["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    llama4().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def write_inputs(path: Path, tokens: Tensor, mask: Tensor | None) -> None:
    values = {"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask})
    if path.suffix == ".safetensors":
        save_file(values, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in values.items()})
    elif path.suffix == ".npy":
        np.save(path, tokens.numpy())
    elif path.suffix == ".json":
        path.write_text(json.dumps({name: value.tolist() for name, value in values.items()}))
    else:
        torch.save(values, path)


def read_logits(path: Path) -> Tensor:
    if path.suffix == ".safetensors":
        return load_file(path)["logits"]
    if path.suffix == ".npz":
        return torch.from_numpy(np.load(path)["logits"])
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path))
    return torch.load(path, weights_only=True)["logits"]


def expected(directory: Path, mask: Tensor | None) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(TOKENS, attention_mask=mask, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("prefill", [None, 1, 5, 9])
@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ("in.safetensors", "out.safetensors"),
        ("in.npz", "out.npz"),
        ("in.json", "out.npy"),
        ("in.pt", "out.pt"),
        ("in.npy", "out.pt"),
    ],
)
def test_logits(directory: Path, tmp_path: Path, inputs: str, output: str, prefill: int | None) -> None:
    mask = None if inputs.endswith(".npy") else MASK
    write_inputs(tmp_path / inputs, TOKENS, mask)
    arguments = ["logits", str(directory), str(tmp_path / inputs), str(tmp_path / output)]
    main(arguments + ([] if prefill is None else ["--prefill", str(prefill)]))
    found = read_logits(tmp_path / output)
    assert found.dtype == torch.float32
    real = torch.ones_like(TOKENS, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[real], expected(directory, mask)[real], atol=2e-5, rtol=1e-5)


def test_logits_in_float64(directory: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path / "in.npz", TOKENS, None)
    main(["logits", str(directory), str(tmp_path / "in.npz"), str(tmp_path / "out.npz"), "--dtype", "float64"])
    found = read_logits(tmp_path / "out.npz")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected(directory, None), atol=2e-5, rtol=1e-5)


@pytest.mark.slow
def test_roundtrip_as_a_command(directory: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moesaic.interop", "roundtrip", str(directory), str(tmp_path / "copy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, original = (load_file(path / "model.safetensors") for path in (tmp_path / "copy", directory))
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ids": [[1]]}, "no input_ids in it"),
        ({"input_ids": [1, 2]}, "input_ids of shape (2,), torch.int64; must be integers (batch, length)"),
        ({"input_ids": [[0.5]]}, "input_ids of shape (1, 1), torch.float32; must be integers"),
        ({"input_ids": [[]]}, "input_ids of shape (1, 0)"),
        ({"input_ids": [[1, 99]]}, "found ids 1 to 99; must be 0 to 60"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask of shape (1, 1); must be that of"),
        ({"input_ids": [[1], [1, 2]]}, "cannot be read"),
        ([1], "no input_ids in it"),
    ],
    ids=str,
)
def test_bad_inputs(directory: Path, tmp_path: Path, values: Any, message: str, capsys: Any) -> None:
    (tmp_path / "in.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit) as end:
        main(["logits", str(directory), str(tmp_path / "in.json"), str(tmp_path / "out.npy")])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directory": "nowhere"}, "nowhere: no such directory"),
        ({"inputs": "nothing.npy"}, "nothing.npy: no such file"),
        ({"inputs": "hf/config.json"}, "no input_ids in it"),
        ({"inputs": "text.txt"}, "must be one of .safetensors, .npz, .npy, .pt, .json"),
        ({"output": "out.csv"}, "out.csv: must be one of .safetensors, .npz, .npy, .pt"),
        ({"output": "no/such/out.npy"}, "no such directory as no/such"),
        ({"prefill": "0"}, "--prefill 0: must be 1 to the number of tokens, 9"),
    ],
    ids=str,
)
def test_bad_arguments(
    directory: Path, tmp_path: Path, changes: dict[str, str], message: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path / "in.npy", TOKENS, None)
    Path("text.txt").write_text("1 2 3")
    given = {"directory": "hf", "inputs": "in.npy", "output": "out.npy", "prefill": "9", **changes}
    with pytest.raises(SystemExit) as end:
        main(["logits", given["directory"], given["inputs"], given["output"], "--prefill", given["prefill"]])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
