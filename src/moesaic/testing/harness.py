"""How a check is run: a fresh layer with redrawn weights, tokens without near-ties, an outcome instead of a crash."""

import copy
import inspect
import math
import random
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.testing.adapter import MoEUnderTest, NotApplicable
from moesaic.testing.recognize import describe
from moesaic.testing.report import CheckResult

__all__ = [
    "CHECKS",
    "Check",
    "Factory",
    "Failed",
    "Layer",
    "NotApplicable",
    "Subject",
    "check",
    "compare",
    "compare_gradients",
    "deterministic_layer",
    "outcome",
    "relative_error",
    "try_out",
]

Factory = Callable[..., Any]
"""Makes the layer: an nn.Module or a `MoEUnderTest`. It may take `num_experts`."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Allowed |difference|, the largest one, relative to the largest |expected| value."""

MARGIN = 0.1
"""Least distance between the logits of the last chosen and the first refused expert: rounding must not decide."""


class Failed(Exception):
    """The property does not hold; the message says what was measured."""


class Layer:
    """One fresh instance of the layer under test, its weights redrawn."""

    def __init__(self, under_test: MoEUnderTest) -> None:
        self.under_test = under_test
        self.module = under_test.module
        tensor = next((p for p in self.module.parameters() if p.is_floating_point()), torch.zeros(()))
        self.dtype, self.device = tensor.dtype, tensor.device
        self.tolerance = TOLERANCES.get(under_test.compute_dtype or self.dtype, 0.05)
        redraw(self.module)
        self.dim = infer_dim(under_test) if under_test.dim is None else under_test.dim

    def __call__(self, x: Tensor, expert_ids: Tensor | None = None) -> Tensor:
        """The output for x (B, L, D), of its own choice of experts or of expert_ids (B * L, K)."""
        if expert_ids is None:
            y = self.under_test.forward(self.module, x.contiguous())
        else:
            y = self.need("replay")(self.module, x.contiguous(), expert_ids)
        if y.shape != x.shape:
            raise InputError(
                f"output of shape {tuple(y.shape)} for an input of shape {tuple(x.shape)}: the two must be the same"
            )
        return y

    def need(self, hook: str) -> Any:
        """The hook of that name.

        Raises:
            NotApplicable: if the layer has none.
        """
        value = getattr(self.under_test, hook)
        if value is None:
            raise NotApplicable(f"no {hook} known")
        return value

    def router_weight(self) -> Tensor:
        """(E, D), writable in place."""
        weight = self.need("router_weight")(self.module)
        if weight.dim() != 2 or weight.size(1) != self.dim:
            raise InputError(f"router_weight of shape {tuple(weight.shape)}: must be (experts, {self.dim})")
        return weight

    def router_parameter(self) -> nn.Parameter:
        """The parameter that `router_weight` is, or is a view of."""
        weight = self.router_weight()
        base = weight if weight._base is None else weight._base
        for parameter in self.module.parameters():
            if parameter is base:
                return parameter
        raise InputError("router_weight is neither a parameter of the module nor a view of one")

    def num_experts(self) -> int:
        """E."""
        known = self.under_test.num_experts
        return self.router_weight().size(0) if known is None else known

    def set_bias(self) -> None:
        """Give it a selection bias that matters, if it has one."""
        if self.under_test.expert_bias is not None:
            with torch.no_grad():
                bias = self.under_test.expert_bias(self.module)
                bias.copy_(0.3 * self.random(*bias.shape, seed=3))

    def expert_bias(self) -> Tensor:
        """A copy of the selection bias."""
        return self.need("expert_bias")(self.module).detach().clone()

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    def tokens(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """x (B, L, D), where possible without tokens that rounding could send to another expert."""
        wanted = batch * length
        weight, top_k = self.under_test.router_weight, self.under_test.top_k
        if weight is None or top_k is None:
            return self.random(batch, length, self.dim, seed=seed)
        candidates = self.random(8 * wanted, self.dim, seed=seed)
        logits = (candidates.double() @ weight(self.module).detach().double().T).sort(dim=-1, descending=True).values
        if logits.size(1) <= top_k:
            return candidates[:wanted].view(batch, length, -1)
        clear = logits[:, top_k - 1] - logits[:, top_k] >= MARGIN
        order = torch.cat([clear.nonzero(), (~clear).nonzero()]).flatten()
        return candidates[order[:wanted]].view(batch, length, -1)

    def named_gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.module.named_parameters()}


class Subject:
    """The layer under test as checks see it: a source of fresh instances."""

    def __init__(self, factory: Factory) -> None:
        if isinstance(factory, (nn.Module, MoEUnderTest)):
            raise InputError(f"{type(factory).__name__} is a layer: must be a function that returns one")
        self.factory = factory

    def fresh(self) -> Layer:
        """Raises InputError if the factory raises or makes something else than a layer."""
        return self._make(self.factory)

    def with_one_expert(self) -> Layer:
        """Raises NotApplicable if nobody says how to make one."""
        if _takes_num_experts(self.factory):
            return self._make(lambda: self.factory(num_experts=1))
        single = self.fresh().under_test.single_expert
        if single is None:
            raise NotApplicable("the factory takes no num_experts, and no single_expert is known")
        return self._make(single)

    def _make(self, factory: Factory) -> Layer:
        torch.manual_seed(0)
        try:
            made = factory()
        except (InputError, NotApplicable):
            raise
        except Exception as error:
            raise InputError(f"the factory raised {type(error).__name__}: {error}") from error
        if isinstance(made, nn.Module):
            with suppress(Exception):  # what cannot be copied had better be new each time
                made = copy.deepcopy(made)
        return Layer(describe(made))


def _takes_num_experts(factory: Factory) -> bool:
    try:
        return "num_experts" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False


@dataclass(frozen=True)
class Check:
    """One property of a layer, by name, and the public bug that it guards against.

    Calling it with a factory is for pytest: AssertionError if the layer fails, a skip if the check does not apply.
    """

    name: str
    statement: str
    bug: str
    function: Callable[[Subject], str | None]

    def run(self, factory: Factory) -> CheckResult:
        """The outcome as a row; an exception in the layer is a failure, not a crash."""
        row = CheckResult(self.name, "pass", "", self.statement, self.bug)
        return outcome(row, lambda: self.function(Subject(factory)))

    def __call__(self, factory: Factory) -> None:
        row = self.run(factory)
        if row.status == "fail":
            raise AssertionError(f"{self.statement}: {row.detail} (guards against {self.bug})")
        if row.status == "not applicable":
            raise unittest.SkipTest(row.detail)  # pytest and unittest skip on it

    def __str__(self) -> str:
        return self.name


def outcome(row: CheckResult, measure: Callable[[], str | None]) -> CheckResult:
    """`row` with the status and the detail that come of `measure`: what it returns, or what it raises."""
    with undisturbed():
        try:
            return replace(row, detail=measure() or "")
        except NotApplicable as reason:
            return replace(row, status="not applicable", detail=str(reason))
        except Failed as failure:
            return replace(row, status="fail", detail=str(failure))
        except Exception as error:
            detail = f"{type(error).__name__}: {_first_lines(str(error))}"
            return replace(row, status="fail", detail=detail, raised=True)


@contextmanager
def undisturbed() -> Iterator[None]:
    """The caller's random generators, gradient mode and warning filters are as before, whatever a layer does."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def try_out(factory: Factory) -> Layer:
    """Raises InputError for what is no layer at all; what else may go wrong is for the checks to say."""
    with undisturbed():
        layer = Subject(factory).fresh()
        try:
            layer(layer.random(2, 3, layer.dim))
        except InputError:
            raise
        except Exception:  # the rows will name it
            return layer
        return layer


CHECKS: list[Check] = []
"""In the order in which they are run and shown."""


def check(name: str, statement: str, bug: str) -> Callable[[Callable[[Subject], str | None]], Check]:
    """Register a function as a check. It returns what it measured; it raises `Failed` or `NotApplicable`."""

    def register(function: Callable[[Subject], str | None]) -> Check:
        made = Check(name, statement, bug, function)
        CHECKS.append(made)
        return made

    return register


def deterministic_layer(subject: Subject) -> Layer:
    """A fresh layer in evaluation mode.

    Raises:
        NotApplicable: if it computes two different things from one input; comparing would say nothing.
    """
    layer = subject.fresh()
    layer.module.eval()
    x = layer.tokens(2, 8)
    with torch.no_grad():
        if relative_error(layer(x), layer(x)) > layer.tolerance:
            raise NotApplicable("evaluation is random (see deterministic)")
    return layer


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; nan counts as infinite."""
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().item() or 1.0
    error = (found.double() - expected.double()).abs().max().item() / scale
    return error if math.isfinite(error) else math.inf


def compare(found: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """Raises Failed if the relative error is above the tolerance; returns it otherwise."""
    error = relative_error(found, expected)
    if error > tolerance:
        raise Failed(f"{what}: relative error {error:.1e}, allowed {tolerance:.0e}")
    return error


def compare_gradients(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], tolerance: float, what: str = ""
) -> float:
    """Each gradient relative to itself, so that a small one cannot hide behind a large one.

    One that is nothing but rounding beside the largest must be as small in both.
    """
    largest = max((g.abs().max().item() for g in expected.values() if g.numel()), default=0.0)
    wrong, worst = [], 0.0
    for name, oracle in expected.items():
        gradient = found[name]
        own = oracle.abs().max().item() if oracle.numel() else 0.0
        scale = own if own > tolerance * largest else largest
        if gradient is None:
            if own > tolerance * largest:
                wrong.append(f"{name} has none")
            continue
        error = (gradient.double() - oracle.double()).abs().max().item() / (scale or 1.0) if oracle.numel() else 0.0
        if not error <= tolerance:
            wrong.append(f"{name} {error:.1e}")
        else:
            worst = max(worst, error)
    if wrong:
        raise Failed(f"{what}gradients with a relative error above {tolerance:.0e}: {', '.join(wrong)}")
    return worst


@torch.no_grad()
def redraw(module: nn.Module) -> None:
    """Matrices ~ N(0, 1.4^2 / size(1)), a scale at which mistakes show; vectors stay, unless they are not finite.

    size(1) is the fan-in of a Linear and of stacked (E, in, out) experts. Some published blocks leave their weights to
    a model class that initializes them; alone they hold whatever was in memory.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() >= 2:
            drawn = torch.randn(parameter.shape, generator=generator) * 1.4 * parameter.size(1) ** -0.5
            parameter.copy_(drawn)
        elif not bool(parameter.isfinite().all()):
            parameter.zero_()


def infer_dim(under_test: MoEUnderTest) -> int:
    """The one width that the layer maps to itself, tried among the sizes of its parameters.

    Raises:
        InputError: if none does, with what was tried, or several do.
    """
    module = under_test.module
    parameters = list(module.parameters())
    if not parameters:
        raise InputError(f"{type(module).__name__} has no parameters: give dim in a MoEUnderTest")
    fitting, tried, training = [], [], module.training
    module.eval()
    for size in sorted({size for p in parameters for size in p.shape}):
        x = torch.zeros(2, 3, size, dtype=parameters[0].dtype, device=parameters[0].device)
        try:
            with torch.no_grad():
                shape = tuple(under_test.forward(module, x + 0.5).shape)
        except Exception as error:
            tried.append(f"{tuple(x.shape)} raised {type(error).__name__}: {_first_lines(str(error), 100)}")
            continue
        if shape == tuple(x.shape):
            fitting.append(size)
        else:
            tried.append(f"{tuple(x.shape)} gave {shape}")
    module.train(training)
    if len(fitting) == 1:
        return fitting[0]
    name = type(module).__name__
    if fitting:
        raise InputError(f"{name}: inputs of several widths fit ({fitting}): give dim in a MoEUnderTest")
    raise InputError(f"{name} maps no (2, 3, D) to itself, as a mixture-of-experts layer does; {'; '.join(tried)}")


def _first_lines(text: str, limit: int = 300) -> str:
    """On one line, and not endless: exceptions of compilers run to pages."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
