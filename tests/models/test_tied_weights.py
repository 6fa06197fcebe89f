"""A tied head is the embedding, whatever torch does to the parameters."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from moesaic.errors import InputError
from moesaic.interop import from_hf, to_hf
from moesaic.models import Decoder, DecoderConfig, account, build_decoder, llama4_toy

CONFIG: DecoderConfig = llama4_toy(vocab_size=32, tie_embeddings=True, num_layers=2)


def build(**arguments: object) -> Decoder:
    torch.manual_seed(0)
    return build_decoder(CONFIG, **arguments)  # type: ignore[arg-type]


def on_meta() -> Decoder:
    return build(device="meta")


def saved(decoder: nn.Module) -> dict[str, torch.Tensor]:
    file = io.BytesIO()
    torch.save(decoder.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(decoder: Decoder, state: dict[str, torch.Tensor], **options: bool) -> Decoder:
    decoder.load_state_dict(state, **options)
    return decoder


def within_a_module() -> Decoder:
    outer, other = nn.Sequential(on_meta()), nn.Sequential(build())
    outer.load_state_dict(other.state_dict(), assign=True)
    return outer.half().float()[0]  # type: ignore[return-value]


def one_of_both(name: str) -> dict[str, torch.Tensor]:
    state = saved(build())
    del state[name]
    return state


WAYS: dict[str, Callable[[], Decoder]] = {
    "built": build,
    "meta, to_empty": lambda: loaded(on_meta().to_empty(device="cpu"), saved(build())),
    "load": lambda: loaded(build(), saved(build())),
    "load, assign": lambda: loaded(build(), saved(build()), assign=True),
    "load, assign, of live tensors": lambda: loaded(build(), build().state_dict(), assign=True),
    "load into meta, assign": lambda: loaded(on_meta(), saved(build()), assign=True),
    "load, not strict": lambda: loaded(build(), saved(build()), strict=False),
    "load without the head": lambda: loaded(build(), one_of_both("head.weight")),
    "load without the embedding": lambda: loaded(on_meta(), one_of_both("embedding.weight"), assign=True),
    "within a module": within_a_module,
    "deepcopy": lambda: copy.deepcopy(build()),
    "deepcopy of loaded": lambda: copy.deepcopy(loaded(build(), saved(build()), assign=True)),
    "pickle": lambda: pickle.loads(pickle.dumps(build())),
    "to": lambda: build().to(torch.bfloat16).to(torch.float32),
    "half": lambda: build().half().float(),
    "double": lambda: build().double(),
    "built as bf16": lambda: build(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_tied_head_is_the_embedding(way: str) -> None:
    decoder = WAYS[way]()
    assert decoder.head.weight is decoder.embedding.weight
    assert not decoder.embedding.weight.is_meta
    assert sum(p.numel() for p in decoder.parameters()) == account(CONFIG, 8).parameters
    tokens = torch.randint(32, (2, 8))
    decoder(tokens).logits.sum().backward()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.01
    assert torch.equal(decoder.head.weight, decoder.embedding.weight)


def test_functional_call_with_one_of_both() -> None:
    decoder, tokens = build(), torch.randint(32, (1, 5))
    changed = {name: 2 * p.detach() for name, p in decoder.named_parameters()}
    found = torch.func.functional_call(decoder, changed, (tokens,)).logits
    other = loaded(build(), {**saved(decoder), **changed, "head.weight": changed["embedding.weight"]})
    torch.testing.assert_close(found, other(tokens).logits)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_came_apart_are_refused(assign: bool) -> None:
    state = saved(build())
    state["head.weight"] = state["head.weight"] + 1
    with pytest.raises(InputError, match=r"embedding.weight and head.weight differ"):
        build().load_state_dict(state, assign=assign)


APART: dict[str, Callable[[Decoder], object]] = {
    "load, assign": lambda d: d.embedding.load_state_dict({"weight": torch.ones(32, d.norm.dim)}, assign=True),
    "load of the head, assign": lambda d: d.head.load_state_dict({"weight": torch.ones(32, d.norm.dim)}, assign=True),
    "another parameter": lambda d: setattr(d.embedding, "weight", nn.Parameter(torch.ones(32, d.norm.dim))),
    "another head": lambda d: setattr(d, "head", nn.Linear(d.norm.dim, 32, bias=False)),
    "to_empty": lambda d: d.embedding.to_empty(device="cpu"),
}


@pytest.mark.parametrize("way", APART)
def test_what_parts_them_below_the_decoder_is_said_and_mended_above(way: str) -> None:
    decoder, tokens = on_meta() if way == "to_empty" else build(), torch.randint(32, (1, 5))
    APART[way](decoder)
    for call in (decoder, decoder.hidden_states):
        with pytest.raises(ValueError, match=r"embedding.weight and head.weight are no longer one parameter"):
            call(tokens)
    decoder = loaded(decoder, saved(build()), assign=True)
    assert decoder(tokens).logits.isfinite().all()
    assert decoder.head.weight is decoder.embedding.weight


@pytest.mark.parametrize("way", ["built", "load into meta, assign", "deepcopy"])
def test_to_hf_writes_what_from_hf_reads(way: str, tmp_path: Path) -> None:
    decoder = WAYS[way]()
    to_hf(decoder, tmp_path / "model")
    back = from_hf(tmp_path / "model")
    assert back.head.weight is back.embedding.weight
    tokens = torch.randint(32, (1, 8))
    assert torch.equal(back(tokens).logits, decoder(tokens).logits)
    to_hf(back, tmp_path / "again")


def test_to_hf_of_heads_against_their_config(tmp_path: Path) -> None:
    apart = build()
    apart.head.weight = nn.Parameter(apart.embedding.weight.detach() + 1)
    with pytest.raises(InputError, match=r"head.weight differs from embedding.weight"):
        to_hf(apart, tmp_path / "apart")
    assert not (tmp_path / "apart").exists()
    untied = build_decoder(llama4_toy(vocab_size=32, num_layers=2))
    untied.head.weight = untied.embedding.weight
    to_hf(untied, tmp_path / "untied")
    assert torch.equal(from_hf(tmp_path / "untied").head.weight, untied.embedding.weight)
