"""Bytes of a training step and of a KV cache: by formula, and counted on tensors without memory.

`estimate_memory` is closed forms over the config: it builds nothing. `trace_memory` runs the real step on fake tensors
(shapes, no memory) and counts the storages that are alive, so it knows custom modules as well. Both describe one
process on a CPU. The tests hold both against the peak that torch's profiler sees in a real step.
"""

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic.errors import InputError
from moesaic.layers import (
    ACTIVATIONS,
    Attention,
    AttentionCache,
    BackendName,
    ClampedExperts,
    Experts,
    MoE,
    MultiHeadLatentAttention,
    choose_backend,
)
from moesaic.layers.feed_forward import runs_lean
from moesaic.layers.sliced import tiles_of
from moesaic.layers.windowed_attention import LEAST_QUERIES
from moesaic.losses.cross_entropy import VOCABULARY_BLOCK, linear_cross_entropy, rows_per_chunk
from moesaic.models.config import WITH_ROPE, DecoderConfig, LayerConfig, Mixer, MLAConfig, MoEConfig
from moesaic.models.decoder import Block, Decoder, build_decoder
from moesaic.models.routers import router_parameters
from moesaic.models.shapes import Shape, attention_shapes, decoder_shapes, feed_forward_shapes, uncounted

__all__ = [
    "ActivationEstimate",
    "LiveBytes",
    "MemoryEstimate",
    "estimate_activations",
    "estimate_memory",
    "optimizer_bytes",
    "trace_memory",
]


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. What is alive at different times does not add up: `step`, `optimizer_step` and `total` are peaks."""

    weights: int
    gradients: int
    """Gradients of all weights, as they stand after the backward."""
    optimizer: int
    """The optimizer's state; 0 without one."""
    activations: int
    """What the forward pass keeps for the backward, up to the hidden states that the loss sees."""
    loss: int
    """Most that `linear_cross_entropy` holds on top: a chunk of logits, and the gradients of head and hidden states."""
    step: int
    """Peak of forward, loss and backward above weights and optimizer state. Gradients appear on the way."""
    optimizer_step: int
    """Most that the optimizer holds while it steps, above weights and state: the gradients, and Muon's matrices."""
    kv_cache: int
    """Keys and values that decoding token number seq_len of every sequence reads, see `kv_cache_bytes`."""
    uncounted: tuple[str, ...] = ()
    """Dotted paths of custom modules, which have no formula: they are in none of the numbers."""

    @property
    def total(self) -> int:
        """Peak of training."""
        return self.weights + self.optimizer + max(self.step, self.optimizer_step)

    @property
    def decoding(self) -> int:
        """Weights and KV cache; the activations of one token are small beside them."""
        return self.weights + self.kv_cache


def _check_sizes(batch_size: int, seq_len: int, dtype: torch.dtype) -> None:
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise InputError(f"{name}={value}: must be a number >= 1")
    if not dtype.is_floating_point:
        raise InputError(f"dtype={dtype}: must be a floating-point type")


# ---- by formula


@dataclasses.dataclass(frozen=True)
class _Part:
    """One stretch of the forward pass, and its backward. Bytes."""

    kept: int
    """For the backward."""
    peak: int
    """Most that is alive in its backward: what it kept, temporaries, gradients; not the residual stream's gradient."""
    gradients: int = 0
    """Gradients of its weights."""


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the formulas of all parts need."""

    batch_size: int
    seq_len: int
    dim: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of one number in the dtype of the weights."""
        return self.dtype.itemsize

    @property
    def exact_bytes(self) -> int:
        """Bytes of one number where statistics, rotations and softmax are computed: at least fp32."""
        return max(self.dtype.itemsize, torch.float32.itemsize)

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def stream(self) -> int:
        """Bytes of one (T, D)."""
        return self.tokens * self.dim * self.bytes


def estimate_memory(
    config: DecoderConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    optimizer: str | None = "adamw",
    checkpoint_activations: bool = False,
) -> MemoryEstimate:
    """Memory of one training step and of decoding, in closed form; nothing is allocated.

    Every token is routed evenly, and the experts run on the backend that `choose_backend` takes on a CPU. The formulas
    count what autograd keeps for each operation of our layers, and find the peak by walking backwards over them. They
    are made for the backends "sliced" and "sliced_recompute"; others are counted as one FFN over all rows. Custom
    modules are left out and named; only `trace_memory` can count them.

    Args:
        dtype: of weights, activations, gradients, optimizer state and KV cache (no autocast).
        optimizer: "adamw", "muon" (`MuonAdamW`) or None.
        checkpoint_activations: as `build_decoder` takes it.

    Raises:
        InputError: impossible sizes, or an unknown optimizer.
    """
    _check_sizes(batch_size, seq_len, dtype)
    if optimizer not in ("adamw", "muon", None):
        raise InputError(f"optimizer={optimizer!r}: must be one of adamw, muon, None")
    sizes = _Sizes(batch_size, seq_len, config.dim, dtype)
    shapes = decoder_shapes(config)
    gradients = _nbytes(shapes, dtype)
    layers = config.layers
    by_kind = {i: _block(config, layers[i], sizes) for i in {layers.index(layer) for layer in layers}}
    blocks = [by_kind[layers.index(layer)] for layer in layers]
    activations, loss, step = _walk(config, blocks, sizes, gradients, checkpoint_activations)
    state, optimizer_step = optimizer_bytes(shapes, dtype, optimizer)
    return MemoryEstimate(
        weights=gradients,
        gradients=gradients,
        optimizer=state,
        activations=activations,
        loss=loss,
        step=step,
        optimizer_step=optimizer_step,
        kv_cache=batch_size * sum(_cached(config, layer, seq_len) for layer in layers) * dtype.itemsize,
        uncounted=uncounted(config),
    )


@dataclasses.dataclass(frozen=True)
class ActivationEstimate:
    """Bytes of a training step that are neither weights nor their gradients, wherever those are."""

    kept: int
    """What the forward pass keeps for the backward: `MemoryEstimate.activations`."""
    block: int
    """Most that the backward of one block needs beside it."""
    loss: int
    """Most that the loss needs beside it."""


def estimate_activations(
    config: DecoderConfig, *, batch_size: int, seq_len: int, dtype: torch.dtype, checkpoint_activations: bool = False
) -> ActivationEstimate:
    """The part of `estimate_memory` that grows with the tokens, under the same assumptions.

    Raises:
        InputError: impossible sizes.
    """
    found = estimate_memory(
        config,
        batch_size=batch_size,
        seq_len=seq_len,
        dtype=dtype,
        optimizer=None,
        checkpoint_activations=checkpoint_activations,
    )
    sizes = _Sizes(batch_size, seq_len, config.dim, dtype)
    needed = 0
    for layer in set(map(config.layers.index, config.layers)):
        parts = _block(config, config.layers[layer], sizes)
        again = sum(part.kept for part in parts) if checkpoint_activations else 0
        needed = max(needed, again + max(part.peak - part.kept - part.gradients for part in parts) + sizes.stream)
    return ActivationEstimate(
        kept=found.activations,
        block=needed,
        loss=found.loss - config.vocab_size * config.dim * sizes.exact_bytes,
    )


def _nbytes(shapes: Iterable[Shape], dtype: torch.dtype) -> int:
    return sum(shape.numel for shape in shapes) * dtype.itemsize


def _cached(config: DecoderConfig, layer: LayerConfig, length: int) -> int:
    """Numbers that the cache of a built-in mixer holds of one sequence, as their `cache_bytes`."""
    if not isinstance(layer.mixer, str):
        return 0
    if (mla := config.attention.mla) is not None:
        return length * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    most = config.chunk_of(layer.mixer) or config.window_of(layer.mixer) or length
    return min(length, most) * 2 * config.num_kv_heads * config.head_dim


def _walk(
    config: DecoderConfig, blocks: list[list[_Part]], sizes: _Sizes, all_gradients: int, checkpoint: bool
) -> tuple[int, int, int]:
    """Activations, loss, and the peak of the step."""
    stream = sizes.stream
    head = config.vocab_size * config.dim * sizes.bytes
    # in the statistics' own dtype a norm keeps its input itself, which a checkpoint keeps as well
    shared = stream if sizes.bytes == sizes.exact_bytes else 0
    final_norm = _norm(sizes)
    kept_by_block = [stream if checkpoint else sum(part.kept for part in parts) for parts in blocks]
    activations = sum(kept_by_block) + final_norm.kept + stream  # the last are the hidden states
    loss = _loss(config, sizes)
    peak = activations + loss
    held = sum(kept_by_block) + final_norm.kept
    gradients = head
    peak = max(peak, held + gradients + final_norm.peak - final_norm.kept)
    held -= final_norm.kept
    for parts, kept in zip(reversed(blocks), reversed(kept_by_block), strict=True):
        if checkpoint:
            held += sum(part.kept for part in parts) - shared
        for part in reversed(parts):
            peak = max(peak, held + gradients + stream + part.peak - part.kept)
            held -= part.kept
            gradients += part.gradients
        if checkpoint:
            held -= kept - shared
    # the gradient of the embedding is as large as the embedding, and a tied head's waits for it
    return activations, loss, max(peak, all_gradients + stream + (head if config.tie_embeddings else 0))


def _loss(config: DecoderConfig, sizes: _Sizes) -> int:
    """`linear_cross_entropy` at its peak, without the hidden states."""
    vocabulary, dim = config.vocab_size, config.dim
    chunk = min(sizes.tokens, rows_per_chunk(vocabulary))
    head_gradient, working = vocabulary * dim * sizes.exact_bytes, chunk * vocabulary * sizes.exact_bytes
    if sizes.bytes != sizes.exact_bytes:
        block = min(vocabulary, VOCABULARY_BLOCK)
        # a block of logits or their gradients, the gradient of its rows of the head, and of that a cast copy to add
        working += chunk * (block * sizes.bytes + dim * sizes.exact_bytes)
        working += block * dim * (sizes.bytes + sizes.exact_bytes)
        working = max(working, vocabulary * dim * sizes.bytes)  # the cast of the head's gradient comes last
    return sizes.stream + head_gradient + working


def _block(config: DecoderConfig, layer: LayerConfig, sizes: _Sizes) -> list[_Part]:
    """In the order of the forward pass; without custom modules."""
    norm = _norm(sizes)
    mixer = [_attention(config, layer.mixer, sizes)] if isinstance(layer.mixer, str) else []
    parts = [norm, *mixer, norm]
    if layer.ffn == "moe":
        assert config.moe is not None  # checked by the config
        parts.append(_routed(config, config.moe, sizes))
        if config.moe.shared_width:
            shared = _feed_forward(config, config.moe.shared_width, config.moe.backend, sizes)
            # the input is kept once for all experts
            parts.append(_Part(shared.kept - sizes.stream, shared.peak - sizes.stream, shared.gradients))
    elif isinstance(layer.ffn, str):
        parts.append(_feed_forward(config, config.ffn_width(layer.ffn), "auto", sizes))
    return parts


def _norm(sizes: _Sizes) -> _Part:
    """`RMSNorm`: its input, 1 / rms, and what the gain multiplies. What comes out is kept by whoever reads it."""
    elements = sizes.tokens * sizes.dim
    kept = elements * (sizes.exact_bytes + sizes.bytes) + sizes.tokens * sizes.exact_bytes
    return _Part(kept, 6 * elements * sizes.exact_bytes, sizes.dim * sizes.bytes)


KEPT_BY_GATED_FFN = {"relu": 3, "sigmoid": 3, "linear": 3, "quick_gelu": 5}
"""How many (T, F) a gated FFN keeps where it is not 4: the gate, the gate activated, up, and their product."""


def _feed_forward(config: DecoderConfig, width: int, backend: BackendName, sizes: _Sizes) -> _Part:
    gradients = _nbytes(feed_forward_shapes(config.dim, width), sizes.dtype)
    if runs_lean(sizes.tokens, torch.device("cpu"), sizes.dtype, config.dim, width, backend, config.activation):
        return _lean_feed_forward(config, width, backend, gradients, sizes)
    hidden = sizes.tokens * width * sizes.bytes
    kept = sizes.stream + KEPT_BY_GATED_FFN.get(config.activation, 4) * hidden
    # fullest where the product has handed its gradient to both factors
    return _Part(kept, kept + 2 * hidden + gradients // 3, gradients)


def _lean_feed_forward(config: DecoderConfig, width: int, backend: BackendName, gradients: int, sizes: _Sizes) -> _Part:
    """As one expert of a sliced backend."""
    row = width * sizes.bytes
    tile, keeps_all = tiles_of([sizes.tokens], 1)[1], backend != "sliced_recompute"
    kept = sizes.stream + gradients // 3 * 2 + 2 * sizes.tokens * row * keeps_all  # gate and up are copied into one
    scratches = (4 if keeps_all else 6) + (0 if config.activation == "silu" else 3)
    return _Part(kept, kept + gradients + scratches * tile * row + sizes.stream, gradients)


def _attention(config: DecoderConfig, mixer: Mixer, sizes: _Sizes) -> _Part:
    """What is kept in order: the input, the convolution's, angles, what QK norm normalizes, and softmax attention's."""
    attention, positions = config.attention, mixer in WITH_ROPE
    if attention.mla is not None:
        return _latent_attention(config, attention.mla, sizes)
    tokens, length = sizes.tokens, sizes.seq_len
    queries, keys = attention.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    channels = queries + 2 * keys
    heads = attention.num_heads + config.num_kv_heads
    kept = sizes.stream
    if attention.conv_width:
        padded = sizes.batch_size * (length + attention.conv_width - 1) * channels * sizes.bytes
        kept += padded
    if positions:
        kept += 2 * length * config.head_dim * sizes.exact_bytes  # sine and cosine, for queries and for keys
    if isinstance(attention.qk_norm, str):  # in fp32 as it is normalized, and what its gain multiplies
        statistics = heads if attention.qk_norm == "per_head" else 2
        kept += tokens * ((queries + keys + statistics) * sizes.exact_bytes + (queries + keys) * sizes.bytes)
    elif positions and attention.qk_norm:
        kept += tokens * (queries + keys + heads) * sizes.exact_bytes
    if attention.clip_qkv is not None:
        kept += tokens * channels * sizes.bytes

    if attention.sinks or config.window_of(mixer) is not None:
        kept, extra = _windowed(config, mixer, sizes, kept, channels)
        kept += tokens * attention.num_heads * sizes.exact_bytes  # log-sum-exp
        softmax = kept + extra + queries * config.dim * sizes.bytes
        convolution = sizes.stream + 5 * padded if attention.conv_width else 0
        return _Part(kept, max(softmax, convolution), _nbytes(attention_shapes(config), sizes.dtype))
    chunk = min(length, config.chunk_of(mixer) or length)
    rest = length % chunk
    viewed = False
    extra = 0
    for size, span in ((length - rest, chunk), (rest, rest)):
        if not size:
            continue
        cast = sizes.bytes == 2 and span * config.head_dim <= 16384  # see layers.attention.attend
        piece = sizes.batch_size * size * (sizes.exact_bytes if cast else sizes.bytes)
        if cast or (rest and size > span and sizes.batch_size > 1):
            kept += piece * channels
        else:
            viewed = True
        kept += piece * queries
        extra = max(extra, 2 * piece * (queries + keys))
    if viewed:  # without a copy, softmax attention keeps what queries, keys and values are views of
        source = channels
        if attention.conv_width:
            # its output, and apart from it what is rotated or scaled
            source += queries * (positions or attention.temperature is not None) + keys * positions
        kept += tokens * source * sizes.bytes
    if cast or rest:
        kept += tokens * queries * sizes.bytes  # the output projection's own input
    kept += tokens * attention.num_heads * sizes.exact_bytes  # log-sum-exp
    softmax = kept + extra + queries * config.dim * sizes.bytes  # the last is the gradient of the output projection
    convolution = sizes.stream + 5 * padded if attention.conv_width else 0
    return _Part(kept, max(softmax, convolution), _nbytes(attention_shapes(config), sizes.dtype))


def _latent_attention(config: DecoderConfig, mla: MLAConfig, sizes: _Sizes) -> _Part:
    """What is kept in order: the input, the latents around their norms, angles, and softmax attention's."""
    tokens, heads = sizes.tokens, config.attention.num_heads
    values, width = heads * mla.v_head_dim, max(config.head_dim, mla.v_head_dim)
    kept = sizes.stream + 2 * sizes.seq_len * mla.qk_rope_head_dim * sizes.exact_bytes  # sine and cosine
    for rank in (mla.q_lora_rank or 0, mla.kv_lora_rank):
        # the norm's input and 1 / rms, what its gain multiplies, and what the projection up reads
        kept += tokens * (rank * (sizes.exact_bytes + 2 * sizes.bytes) + sizes.exact_bytes * bool(rank))
    if sizes.bytes == sizes.exact_bytes:
        kept += tokens * mla.qk_rope_head_dim * sizes.bytes  # what is normalized is a view of a wider tensor
    cast = sizes.bytes == 2 and sizes.seq_len * width <= 16384  # see layers.attention
    piece = tokens * heads * width * (sizes.exact_bytes if cast else sizes.bytes)
    kept += 4 * piece + tokens * heads * sizes.exact_bytes  # queries, keys, values, what comes out, and log-sum-exp
    if width == mla.v_head_dim and not cast:
        kept += tokens * heads * mla.qk_nope_head_dim * sizes.bytes  # values are a view, beside the keys' parts
    if width > mla.v_head_dim or cast:
        kept += tokens * values * sizes.bytes  # the output projection's own input
    return _Part(
        kept, kept + 4 * piece + values * config.dim * sizes.bytes, _nbytes(attention_shapes(config), sizes.dtype)
    )


def _windowed(config: DecoderConfig, mixer: Mixer, sizes: _Sizes, kept: int, channels: int) -> tuple[int, int]:
    """What `windowed_attention` keeps on top of `kept`, and most that the backward of one of its calls needs beside."""
    attention, length, batch = config.attention, sizes.seq_len, sizes.batch_size
    window, sink = config.window_of(mixer) or length, int(attention.sinks)
    width = config.head_dim + (8 - config.head_dim % 8) * sink
    step = length if window >= length else min(length, max(window, LEAST_QUERIES))
    extra, copies = 0, False
    later = (length // step - 1, step, step + window - 1), (1, length % step, length % step + window - 1)
    for calls, size, keys in ((1, step, step), *later):
        if not calls or not size:
            continue
        seen = keys + sink
        cast = sizes.bytes == 2 and seen * width <= 16384  # see layers.attention.attend
        number = sizes.exact_bytes if cast else sizes.bytes
        given = batch * width * (attention.num_heads * size + 2 * config.num_kv_heads * seen) * number
        made = batch * width * attention.num_heads * size * number
        kept += calls * (made + (given if cast or sink else 0))
        kept += 0 if window >= length else calls * size * seen * number  # the mask, as what is added to logits
        copies |= not (cast or sink)
        extra = max(extra, given + made)
    if copies:  # what queries, keys and values are views of
        kept += sizes.tokens * channels * sizes.bytes
    if sink or cast or step < length:  # the output projection's own input
        kept += sizes.tokens * attention.num_heads * config.head_dim * sizes.bytes
    return kept, extra


def _routed(config: DecoderConfig, moe: MoEConfig, sizes: _Sizes) -> _Part:
    """Router, dispatch, experts and combine, rows spread evenly. Without the shared expert."""
    rows = sizes.tokens * moe.top_k
    width = moe.latent_dim or config.dim
    weights = 3 * moe.num_experts * width * moe.hidden_dim * sizes.bytes
    is_clamped = moe.experts == "clamped_swiglu"
    if is_clamped:
        weights += moe.num_experts * (2 * moe.hidden_dim + width) * sizes.bytes
    router = sum(math.prod(shape) for shape, _ in router_parameters(config)) * sizes.bytes
    kept = sizes.stream + sizes.tokens * moe.num_experts * sizes.exact_bytes  # probabilities
    kept += rows * (8 * 3 + sizes.bytes)  # expert ids, permutations, scores
    dispatched = rows * sizes.dim * sizes.bytes
    activation = ACTIVATIONS[config.activation]
    backend, _ = choose_backend(torch.device("cpu"), sizes.dtype, config.dim, moe.hidden_dim, moe.backend, activation)
    is_sliced = backend in ("sliced", "sliced_recompute") and not is_clamped
    # see layers.sliced.rounding
    places, tile = tiles_of(_evenly(rows, moe.num_experts), 16 if sizes.bytes == 2 else 1)
    kept += 2 * dispatched  # on both sides of the scores
    hidden = (places if is_sliced else rows) * moe.hidden_dim * sizes.bytes
    if is_sliced:
        kept += 2 * hidden if backend == "sliced" else 0
        scratch = tile * moe.hidden_dim * sizes.bytes
        scratches = (4 if backend == "sliced" else 6) + (0 if config.activation == "silu" else 3)
        working = weights + scratches * scratch
    else:
        # gate and up are one tensor; the clamped ones are kept too, the sigmoid, and the products
        kept += (7 if is_clamped else max(4, KEPT_BY_GATED_FFN.get(config.activation, 4))) * hidden
        working = max(2 * hidden + weights // 3, weights)
    # gradients of the rows on both sides; what came out is gone by now if the scores were applied to it
    working += 2 * dispatched - (0 if moe.score_before_experts else dispatched)
    combine = 3 * dispatched if moe.top_k > 1 or not moe.score_before_experts else 2 * dispatched
    shared_gradient = sizes.stream if moe.shared_width else 0
    return _Part(kept, kept + max(combine, working) + shared_gradient, weights + router)


def _evenly(rows: int, num_experts: int) -> list[int]:
    return [rows // num_experts + (i < rows % num_experts) for i in range(num_experts)]


def optimizer_bytes(shapes: Sequence[Shape], dtype: torch.dtype, name: str | None) -> tuple[int, int]:
    """Bytes of the state of "adamw", "muon" or None, and what a step holds besides it and the weights."""
    gradients = _nbytes(shapes, dtype)
    if name is None:
        return 0, 0
    state = 2 * gradients + torch.float32.itemsize * len(shapes)  # each counts its steps
    if name == "adamw":
        return state, gradients
    by_shape: dict[tuple[int, ...], list[Shape]] = {}
    for shape in shapes:
        if shape.kind == "matrix":  # what Muon steps
            by_shape.setdefault(shape.sizes[-2:], []).append(shape)
    held, peak = gradients, gradients
    for sizes, together in by_shape.items():
        numel = sum(shape.numel for shape in together)
        state -= numel * dtype.itemsize  # one moment
        x = 4 * numel  # the gradients of one shape in fp32
        gram = x // max(sizes) * min(sizes)
        peak = max(peak, held + x + 5 * gram)  # the products of small polynomials
        if dtype != torch.float32:  # then the update of one parameter exists, in fp32 and in its dtype
            largest = max(shape.numel for shape in together)
            peak = max(peak, held + x + gram + (4 + dtype.itemsize) * largest)
        held -= numel * dtype.itemsize
    return state, peak


# ---- by counting


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operations inside it make, until the last reference to it is gone.

    Args:
        outside: tensors whose memory does not count.
    """

    def __init__(self, outside: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in outside)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, self.current + _cast_by_kernel(func, args))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage)
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size: int) -> None:
        self.current -= size


def _cast_by_kernel(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes of the copies that elementwise operations on a CPU make of operands in another dtype than the result."""
    if torch.Tag.pointwise not in func.tags:
        return 0
    operands = [x for x in args if isinstance(x, Tensor) and x.dim() and x.device.type == "cpu"]
    if len({x.dtype for x in operands}) < 2:
        return 0
    common = functools.reduce(torch.promote_types, (x.dtype for x in operands))
    return sum(x.numel() * common.itemsize for x in operands if x.dtype != common)


MOST_TRACED_TOKENS = 2**24
"""The loss goes over them in chunks, one after the other."""


def trace_memory(
    config: DecoderConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    make_optimizer: Callable[[Decoder], torch.optim.Optimizer] | None = None,
    checkpoint_activations: bool = False,
) -> MemoryEstimate:
    """`estimate_memory` counted: a step of the real model on fake tensors, which have shapes and lifetimes, no memory.

    Their values are unknown, so rows are spread evenly over the experts; what a kernel takes and gives back within
    itself is not seen. Its time grows with the number of operations, not with their size: seconds, even for Llama 4.

    Args:
        make_optimizer: called with the decoder; None for no optimizer.

    Raises:
        InputError: impossible or too large sizes, or the backend "grouped" in another dtype than bfloat16.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # here, because it loads a lot

    _check_sizes(batch_size, seq_len, dtype)
    if batch_size * seq_len > MOST_TRACED_TOKENS:
        raise InputError(
            f"batch_size={batch_size}, seq_len={seq_len}: to count on tensors, both together must be at most "
            f"{MOST_TRACED_TOKENS} tokens; the formula takes any number"
        )
    with torch.device("meta"):
        decoder = build_decoder(config, checkpoint_activations=checkpoint_activations, dtype=dtype)
    _balance(decoder, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), _RealWhereKnown():
        _move_to_fake_cpu(decoder)
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        labels = torch.zeros(batch_size * seq_len, dtype=torch.int64)
        parameters = list(decoder.parameters())
        head = decoder.head.weight
        if config.tie_embeddings:  # fake gradients are not added in place, so two leaves share the weight for the step
            head = nn.Parameter(head.detach())
        with LiveBytes([tokens, labels, *parameters]) as live:
            activations, loss, step = _trace_step(decoder, tokens, labels, head, live)
            del head
            gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
            state = optimizer_step = 0
            if make_optimizer is not None:
                state, optimizer_step = _trace_optimizer(make_optimizer(decoder), parameters, live)
        kv_cache = sum(_cache_bytes(block, batch_size, seq_len, dtype) for block in decoder.layers)
    return MemoryEstimate(
        weights=sum(parameter.nbytes for parameter in decoder.parameters()),
        gradients=gradients,
        optimizer=state,
        activations=activations,
        loss=loss,
        step=step,
        optimizer_step=optimizer_step,
        kv_cache=kv_cache,
    )


def _balance(decoder: Decoder, dtype: torch.dtype) -> None:
    """Spread the rows of every MoE layer evenly, as fake tensors cannot say where they go.

    Raises:
        InputError: a backend that fake tensors do not know in this dtype.
    """
    for module in decoder.modules():
        if isinstance(module, Experts):
            if isinstance(module, ClampedExperts) and module.backend == "auto":
                module.backend = "loop"  # it keeps the same
            if module.backend == "grouped" and dtype != torch.bfloat16:
                raise InputError(f"backend='grouped', dtype={dtype}: fake tensors know grouped_mm in bfloat16 only")
            module.register_forward_pre_hook(_route_evenly)
        elif isinstance(module, MoE):
            module.assume_full = True


def _trace_step(
    decoder: Decoder, tokens: Tensor, labels: Tensor, head: Tensor, live: LiveBytes
) -> tuple[int, int, int]:
    """Forward and backward: bytes of the activations, what the loss adds to them, and the highest of all."""
    hidden = decoder.hidden_states(tokens)[0]
    activations, forward_peak, live.peak = live.current, live.peak, live.current
    loss = linear_cross_entropy(hidden.flatten(0, 1), head, labels)
    loss_bytes = live.peak - activations
    del hidden
    loss.backward()
    del loss
    return activations, loss_bytes, max(forward_peak, live.peak)


def _move_to_fake_cpu(decoder: Decoder) -> None:
    """From the meta device to the CPU of a fake mode (`Module.to` cannot do it)."""
    made: dict[Tensor, Tensor] = {}
    for module in decoder.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor not in made:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                made[tensor] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
            setattr(module, name, made[tensor])


class _RealWhereKnown(TorchDispatchMode):
    """Carries out operations on real tensors alone, though fake ones surround them: the row counts are real."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not tensors or any(isinstance(x, FakeTensor) for x in tensors):
            return func(*args, **(kwargs or {}))
        with unset_fake_temporarily():
            return func(*args, **(kwargs or {}))


def _route_evenly(experts: nn.Module, arguments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Fake tensors cannot say how many rows an expert has, so each has as many as any other."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    assert isinstance(experts, Experts)
    rows, num_experts = arguments[0], experts.num_experts
    with unset_fake_temporarily():
        return rows, torch.tensor(_evenly(rows.size(0), num_experts))


def _trace_optimizer(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], live: LiveBytes
) -> tuple[int, int]:
    optimizer.step()  # the first one makes the state
    state = sum(x.nbytes for x in tree_leaves(dict(optimizer.state)) if isinstance(x, Tensor))
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    live.peak = live.current
    optimizer.step()
    return state, live.peak - state


class _WatchedCache(AttentionCache):
    read = 0
    """Bytes of keys and values that the last queries could see."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().append(k, v)
        self.read = keys.nbytes + values.nbytes
        return keys, values


@torch.no_grad()
def _cache_bytes(block: nn.Module, batch_size: int, seq_len: int, dtype: torch.dtype) -> int:
    """Bytes of one layer's cache, at the fullest it gets while seq_len tokens are decoded."""
    assert isinstance(block, Block)
    mixer = block.mixer
    if not isinstance(mixer, (Attention, MultiHeadLatentAttention)):
        return 0
    made = mixer.make_cache()
    cache = _WatchedCache(made.chunk, slides=made.slides)
    length = min(seq_len, made.chunk or seq_len)
    x = torch.empty(batch_size, length, mixer.o_proj.out_features, dtype=dtype)
    if length > 1:
        mixer(x[:, :-1], cache)
    mixer(x[:, -1:], cache)
    return cache.read
