"""What no layer accepts: sizes, numbers and inputs that would fail late, elsewhere, or not at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moesaic.errors import InputError
from moesaic.layers import (
    Attention,
    AttentionTemperature,
    Experts,
    FeedForward,
    Llama3RopeScaling,
    MoE,
    Parametrization,
    RMSNorm,
    RotaryEmbedding,
    ShortConvolution,
    TopKRouter,
)
from moesaic.models import Decoder, build_decoder, generate, llama4_toy

NAN, INF = float("nan"), float("inf")


def attention(**changes: Any) -> Attention:
    return Attention(**{"dim": 16, "num_heads": 4, **changes})


def moe(**changes: Any) -> MoE:
    return MoE.build(**{"dim": 16, "hidden_dim": 8, "num_experts": 4, **changes})


def router(**changes: Any) -> TopKRouter:
    return TopKRouter(**{"dim": 16, "num_experts": 4, **changes})


def feed_forward(**changes: Any) -> FeedForward:
    return FeedForward(**{"dim": 16, "hidden_dim": 8, **changes})


def scaling(**changes: Any) -> Llama3RopeScaling:
    given = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 64}
    return Llama3RopeScaling(**{**given, **changes})


SIZES: list[tuple[Callable[..., Any], str]] = [
    *((attention, name) for name in ("dim", "num_heads", "num_kv_heads", "head_dim", "attention_chunk_size")),
    *((moe, name) for name in ("dim", "hidden_dim", "num_experts", "top_k")),
    *((router, name) for name in ("dim", "num_experts", "top_k")),
    *((feed_forward, name) for name in ("dim", "hidden_dim")),
    (lambda **size: Experts(**{"num_experts": 2, "dim": 16, "hidden_dim": 8, **size}), "hidden_dim"),
    (lambda dim: RMSNorm(dim), "dim"),
    (lambda head_dim: RotaryEmbedding(head_dim), "head_dim"),
    (lambda width: ShortConvolution(4, width), "width"),
    (lambda floor_scale: AttentionTemperature(floor_scale=floor_scale), "floor_scale"),
    (scaling, "original_length"),
    (lambda vocab_size: Decoder(vocab_size=vocab_size, dim=4, blocks=[]), "vocab_size"),
]


@pytest.mark.parametrize(("make", "name"), SIZES)
@pytest.mark.parametrize("value", [0, -1, 16.0, 2.5, "16", True, NAN, [4]], ids=str)
def test_sizes(make: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        make(**{name: value})
    assert str(error.value).startswith(f"{name}={value!r}: must be ")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda theta: RotaryEmbedding(8, theta=theta), "theta"),
        (lambda attn_scale: AttentionTemperature(attn_scale=attn_scale), "attn_scale"),
        (lambda scalable_softmax: AttentionTemperature(scalable_softmax=scalable_softmax), "scalable_softmax"),
        (lambda eps: RMSNorm(8, eps=eps), "eps"),
        (attention, "norm_eps"),
        (scaling, "factor"),
        (scaling, "low_freq_factor"),
    ],
)
@pytest.mark.parametrize("value", [NAN, INF, -INF, -1.0, "1", True], ids=str)
def test_numbers(make: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name}=.*: must be "):
        make(**{name: value})


@pytest.mark.parametrize("make", [attention, moe, router, feed_forward, lambda dtype: RMSNorm(4, dtype=dtype)])
@pytest.mark.parametrize("dtype", ["float32", torch.int64, 32])
def test_dtypes(make: Callable[..., Any], dtype: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^dtype=.*: must be a floating-point torch.dtype"):
        make(dtype=dtype)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (moe, {"shared_hidden_dim": -1}, r"shared_hidden_dim=-1: must be a number >= 0"),
        (attention, {"conv_width": -1}, r"conv_width=-1: must be a number >= 0"),
        (attention, {"conv_width": 2.0}, r"conv_width=2.0: must be an integer >= 0"),
        (attention, {"bias": "no"}, r"bias='no': must be True or False"),
        (router, {"expert_bias": 1}, r"expert_bias=1: must be True or False"),
        (router, {"score_function": 3}, r"score_function=3: must be one of sigmoid, softmax"),
        (attention, {"temperature": 3}, r"temperature=3: must be of type AttentionTemperature, or None"),
        (attention, {"rotary": "x"}, r"rotary='x': must be of type RotaryEmbedding, or None"),
        (
            lambda **given: RotaryEmbedding(8, **given),
            {"scaling": 5},
            r"scaling=5: must be of type Llama3RopeScaling or YarnRopeScaling, or",
        ),
        (feed_forward, {"activation": None}, r"activation=None: must be one of silu, gelu"),
        (feed_forward, {"backend": ["loop"]}, r"backend=\['loop'\]: must be one of auto, loop"),
        (moe, {"activation": 1}, r"activation=1: must be one of silu, gelu"),
        (moe, {"backend": 1}, r"backend=1: must be one of auto, loop"),
        (Parametrization, {"init_std": NAN}, r"init_std=nan: must be a number > 0"),
    ],
)
def test_others(make: Callable[..., Any], arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (attention(), (2, 3, 8), r"Attention: x of shape \(2, 3, 8\); its last dimension must be 16"),
        (attention(), (3, 16), r"Attention: x of shape \(3, 16\); must be \(batch, tokens, dim\)"),
        (feed_forward(), (2, 3, 8), r"FeedForward: x of shape .* must be 16"),
        (moe(), (2, 3, 8), r"MoE: x of shape .* must be 16"),
        (moe(), (), r"MoE: x of shape \(\).* must be 16"),
        (router(), (3, 8), r"TopKRouter: x of shape .* must be 16"),
        (RMSNorm(16), (3, 1), r"RMSNorm: x of shape .* must be 16"),
    ],
)
def test_inputs_of_another_width(layer: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))


LAYERS: dict[str, Callable[[Any], Any]] = {
    "Attention": attention(),
    "FeedForward": feed_forward(),
    "MoE": moe(),
    "TopKRouter": router(),
    "RMSNorm": RMSNorm(16),
    "ShortConvolution": ShortConvolution(16, 2),
    "Experts": lambda x: Experts(2, 16, 8)(x, torch.tensor([1, 2])),
    "RotaryEmbedding": lambda x: RotaryEmbedding(16)(x, torch.arange(3)),
}


@pytest.mark.parametrize("owner", LAYERS)
@pytest.mark.parametrize(
    ("x", "found"),
    [
        (None, "type NoneType"),
        ([[1.0] * 16], "type list"),
        (torch.ones(1, 3, 16, dtype=torch.int64), "torch.int64"),
        (torch.ones(1, 3, 16, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(1, 3, 16, dtype=torch.bool), "torch.bool"),
    ],
    ids=["None", "list", "int64", "complex64", "bool"],
)
def test_inputs_that_are_no_floating_point_tensors(owner: str, x: Any, found: str) -> None:
    with pytest.raises(TypeError, match=f"^{owner}: x of {found}; must be a floating-point tensor"):
        LAYERS[owner](x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention()(torch.randn(1, 2, 16), None, torch.ones(1, 2)), r"attention_mask of torch.float32; must"),
        (lambda: attention()(torch.randn(1, 2, 16), None, "x"), r"attention_mask of type str; must be a tensor"),
        (lambda: RotaryEmbedding(4)(torch.randn(1, 3, 4), torch.arange(3)), r"x of shape \(1, 3, 4\); must be \(any"),
        (lambda: RotaryEmbedding(4)(torch.randn(1, 3, 1, 4), torch.arange(2)), r"positions of shape \(2,\); must be"),
        (lambda: RotaryEmbedding(4)(torch.randn(1, 3, 1, 4), None), r"positions of type NoneType; must be a tensor"),
        (lambda: ShortConvolution(4, 3)(torch.randn(1, 3, 4), torch.zeros(1, 1, 4)), r"tail of shape .*\(1, 2, 4\)"),
    ],
)
def test_other_inputs(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


DECODER = build_decoder(llama4_toy(vocab_size=32, num_layers=2))
TOKENS = torch.ones(1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DECODER(None), r"give either tokens or embeddings"),
        (lambda: DECODER([[1, 2]]), r"tokens of type list: must be a tensor"),
        (lambda: DECODER.hidden_states(TOKENS, embeddings=torch.ones(1)), r"give either tokens or embeddings"),
        (lambda: DECODER.hidden_states(embeddings=TOKENS), r"embeddings of torch.int64; must be a floating-point"),
        (lambda: DECODER.hidden_states(embeddings=torch.ones(3, 32)), r"embeddings of shape \(3, 32\); must be"),
        (lambda: DECODER.hidden_states(embeddings=torch.ones(1, 3, 4)), r"embeddings of .* \(any, any, 32\)"),
        (lambda: DECODER(TOKENS, []), r"cache of 0 entries: must be one for each of the 2 layers"),
        (
            lambda: DECODER(TOKENS, None, TOKENS[:, 1:]),
            r"attention_mask of shape \(1, 2\): must be \(1, 3 new tokens\)",
        ),
        (lambda: DECODER(TOKENS, None, [1, 1, 0]), r"attention_mask of type list: must be a tensor"),
        (lambda: DECODER(TOKENS, None, torch.tensor([[0, -INF, 0]])), r"attention_mask has -inf: must be 1 for tokens"),
        (lambda: DECODER(TOKENS, None, 2 * TOKENS), r"attention_mask has 2: must be 1 for tokens and 0 for padding"),
    ],
)
def test_inputs_of_a_decoder(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_rows_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"Experts: x of shape \(3, 8\); its last dimension must be 16"):
        Experts(2, 16, 8)(torch.randn(3, 8), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[1, 32]]), r"token id 32: the vocabulary has ids 0 to 31"),
        (torch.tensor([[-1, 3]]), r"token id -1: the vocabulary"),
        (torch.tensor([1, 2]), r"tokens of shape \(2,\) and torch.int64: must be \(batch, tokens\)"),
        (torch.tensor([[1.0, 2.0]]), r"tokens of shape \(1, 2\) and torch.float32: must be"),
    ],
)
def test_tokens(tokens: torch.Tensor, message: str) -> None:
    decoder = build_decoder(llama4_toy(vocab_size=32, num_layers=2))
    with pytest.raises(ValueError, match=message):
        decoder(tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, r"max_new_tokens=-1: must be an integer >= 0"),
        ({"max_new_tokens": 2.0}, r"max_new_tokens=2.0: must be an integer >= 0"),
        ({"temperature": NAN}, r"temperature=nan: must be a number >= 0"),
        ({"temperature": INF}, r"temperature=inf: must be a number >= 0"),
        ({"top_k": True}, r"top_k=True: must be an integer >= 1"),
        ({"top_p": NAN}, r"top_p=nan: must be 0 < top_p <= 1"),
    ],
)
def test_generation(options: Any, message: str) -> None:
    decoder = build_decoder(llama4_toy(vocab_size=32, num_layers=2))
    with pytest.raises(InputError, match=message):
        generate(decoder, torch.tensor([[1]]), **{"max_new_tokens": 0, **options})


@pytest.mark.parametrize(("owner", "build"), [("Attention", attention), ("MoE", moe), ("FeedForward", feed_forward)])
def test_an_input_of_another_dtype_than_the_weights(owner: str, build: Callable[..., torch.nn.Module]) -> None:
    layer, x = build(), torch.randn(2, 3, 16)
    for given in (x.bfloat16(), x.double()):
        with pytest.raises(TypeError, match=rf"{owner}: x of {given.dtype}; must be torch.float32 as its weights"):
            layer(given)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).shape == layer(x.bfloat16()).shape == x.shape
        with pytest.raises(TypeError, match=rf"{owner}: x of torch.float64; must be torch.float32 as its weights"):
            layer(x.double())
