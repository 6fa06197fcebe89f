"""FLOPs of whatever runs, counted: torch's counter, formulas for what it does not know, and the names of the rest."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Work"]


class Work:
    """A context that counts the FLOPs of everything within it. A multiply-add counts as two.

    Counted are matrix products, convolutions, attention, recurrent layers and Fourier transforms, in forward and in
    backward, with all rows and columns that they really work on. Elementwise operations, reductions and copies are
    free. An operator of anybody else counts once it has a formula (`torch.utils.flop_counter.register_flop_formula`).
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode  # here, because it loads a lot

        self._counter = FlopCounterMode(display=False, custom_mapping=_formulas())
        self._operators = _UnknownOperators(self._counter.flop_registry)
        self._escapes = _Escapes()

    def __enter__(self) -> "Work":
        self._counter.__enter__()
        self._operators.__enter__()
        self._escapes.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in (self._escapes, self._operators, self._counter):
            mode.__exit__(*error)

    @property
    def flops(self) -> int:
        """All that was counted."""
        return int(self._counter.get_total_flops())

    def flops_of(self, module: str) -> int:
        """What was counted within a module: its class and path below the outermost one called, "Decoder.layers.0"."""
        return int(sum(self._counter.get_flop_counts().get(module, {}).values()))

    @property
    def unknown(self) -> tuple[str, ...]:
        """Operators that took matrices of floating-point numbers and that nobody counts, such as aten::linalg_qr."""
        return tuple(sorted(self._operators.names | self._escapes.names))


class _UnknownOperators(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, formulas: Mapping[Any, Any]) -> None:
        super().__init__()
        self.formulas = formulas
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_known = func in self.formulas if isinstance(func, HigherOrderOperator) else self._is_known(func)
        if not is_known and any(_is_matrix(x) for x in tree_leaves((args, kwargs))):
            self.names.add(func.name() if isinstance(func, HigherOrderOperator) else func._schema.name)
        return func(*args, **(kwargs or {}))

    def _is_known(self, func: Any) -> bool:
        if func._overloadpacket in self.formulas or func.is_view or _FREE_TAGS & set(func.tags):
            return True
        namespace, name = func._schema.name.split("::")
        return namespace in ("aten", "prims", "prim") and not set(name.split("_")).isdisjoint(_FREE)


_FREE_TAGS = {torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.inplace_view}
_FREE = (
    *("view", "copy", "clone", "detach", "alias", "contiguous", "resize", "set", "lift", "squeeze", "transpose", "to"),
    *("empty", "zero", "zeros", "ones", "full", "fill", "new", "like", "rand", "uniform", "normal", "bernoulli"),
    *("exponential", "geometric", "cauchy", "random", "multinomial", "cat", "stack", "split", "chunk", "repeat"),
    *("roll", "flip", "rot90", "pad", "tril", "triu", "diag", "diagonal", "unfold", "fold", "im2col", "col2im"),
    *("gather", "scatter", "index", "embedding", "take", "put", "select", "slice", "nonzero", "where", "masked"),
    *("unique", "unique2", "bucketize", "searchsorted", "sort", "topk", "kthvalue", "mode", "bincount", "histc"),
    *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "softmax", "norm", "dropout", "loss", "loss2d"),
    *("sum", "mean", "var", "std", "prod", "max", "min", "median", "nanmedian", "aminmax", "equal", "glu", "prelu"),
    *("pool1d", "pool2d", "pool3d", "upsample", "foreach", "local", "item", "conj", "assert", "cell", "record"),
    *("pin", "jagged", "complex", "polar", "numel", "size", "stride"),
)
"""Words in the names of torch's own operators that move, make or reduce numbers and have no tag that says so."""


class _Escapes(TorchFunctionMode):
    """Watches for tensors that leave torch: what is computed with them elsewhere, nobody can count."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.ways = {
            Tensor.numpy: "numpy",
            Tensor.__array__: "numpy",
            Tensor.data_ptr: "data_ptr (a kernel outside torch)",
            Tensor.__dlpack__: "dlpack",
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            way = self.ways.get(func)
        except TypeError:  # not hashable
            way = None
        if way is not None and args and _is_matrix(args[0]):
            self.names.add(way)
        return func(*args, **(kwargs or {}))


def _is_matrix(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() >= 2 and (x.is_floating_point() or x.is_complex())


def _formulas() -> dict[Any, Any]:
    """Formulas for the operators that torch's counter does not know, over the shapes of their arguments."""
    aten = torch.ops.aten
    return {
        aten.addmm_: _products_added,
        aten.baddbmm_: _products_added,
        aten.addbmm: _products_added,
        aten.addbmm_: _products_added,
        aten.mv: _vector,
        aten.dot: _vector,
        aten.vdot: _vector,
        aten.addmv: _vector_added,
        aten.addmv_: _vector_added,
        aten._grouped_mm: _grouped,
        aten._scaled_grouped_mm: _grouped,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten.mkldnn_rnn_layer: _recurrent,
        aten.mkldnn_rnn_layer_backward: _recurrent_backward,
        aten._fft_c2c: _fourier,
        aten._fft_r2c: _real_fourier,
        aten._fft_c2r: _real_fourier,
    }


def _numel(shape: Any) -> int:
    return math.prod(int(size) for size in shape)


def _vector(matrix: Any, *_: Any, **__: Any) -> int:
    """A matrix, or a vector, times a vector."""
    return 2 * _numel(matrix)


def _vector_added(added: Any, matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * _numel(matrix)


def _products_added(added: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * _numel(a) * int(b[-1])


def _grouped(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Each row meets the matrix of its group; of two 2-D factors, the inner sizes are those of the groups."""
    if len(a) == 2 and len(b) == 2:
        return 2 * _numel(a) * int(b[-1])
    return 2 * _numel(out_shape) * int(a[-1])


def _visible(query: Any, key: Any, is_causal: bool) -> float:
    """Share of the (L, S) products that a causal kernel makes: those up to the diagonal."""
    length, keys = int(query[-2]), int(key[-2])
    seen = sum(min(i + 1, keys) for i in range(length)) if length != keys else length * (length + 1) // 2
    return seen / (length * keys) if is_causal else 1.0


def _attention(
    query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, *_: Any, **__: Any
) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    whole = sdpa_flop_count(query, _as_many(query, key), _as_many(query, value))
    return round(whole * _visible(query, key, is_causal))


def _attention_backward(
    gradient: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    dropout: float,
    is_causal: bool,
    *_: Any,
    **__: Any,
) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    whole = sdpa_backward_flop_count(gradient, query, _as_many(query, key), _as_many(query, value))
    return round(whole * _visible(query, key, is_causal))


def _recurrent(x: Any, of_inputs: Any, of_state: Any, *_: Any, **__: Any) -> int:
    """Every step multiplies its input and its state by a matrix."""
    return 2 * _numel(x[:-1]) * (_numel(of_inputs) + _numel(of_state))


def _recurrent_backward(x: Any, of_inputs: Any, of_state: Any, *_: Any, **__: Any) -> int:
    return 2 * _recurrent(x, of_inputs, of_state)


def _fourier(x: Any, dims: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """5 N log2 N per transform of N complex numbers (the convention of FFTW's benchmarks)."""
    longer = max(x, out_shape, key=_numel)
    return round(5 * _numel(longer) * math.log2(max(2, _numel(longer[d] for d in dims))))


def _real_fourier(x: Any, dims: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _fourier(x, dims, out_shape=out_shape) // 2


def _as_many(query: Any, shared: Any) -> Any:
    """The shape of keys or values as if every query head had its own."""
    return (*shared[:1], query[1], *shared[2:])
