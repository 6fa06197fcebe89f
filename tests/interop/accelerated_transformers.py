"""A pytest plugin for transformers' own tests: every model they make is accelerated. docs/accelerate.md says how.

Models are made in two ways: constructed, and loaded by `from_pretrained`, which constructs them on the meta device.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moesaic.interop.accelerate import BLOCKS, accelerate

accelerated: dict[str, int] = {}
"""Models per class, for the last line of the report: a plugin that does nothing must not look like one that works."""


def accelerate_if_supported(model: torch.nn.Module) -> None:
    supported = any(isinstance(module, tuple(BLOCKS)) for module in model.modules())
    if supported and not any(parameter.is_meta for parameter in model.parameters()):
        accelerate(model)
        accelerated[type(model).__name__] = accelerated.get(type(model).__name__, 0) + 1


def after_construction(post_init: Callable[[PreTrainedModel], None]) -> Callable[[PreTrainedModel], None]:
    def wrapped(self: PreTrainedModel) -> None:
        post_init(self)
        accelerate_if_supported(self)

    return wrapped


def after_loading(from_pretrained: Callable[..., Any]) -> classmethod:
    def wrapped(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        loaded = from_pretrained(cls, *args, **kwargs)  # with output_loading_info a pair
        accelerate_if_supported(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    return classmethod(wrapped)


def pytest_configure() -> None:
    PreTrainedModel.post_init = after_construction(PreTrainedModel.post_init)
    PreTrainedModel.from_pretrained = after_loading(PreTrainedModel.from_pretrained.__func__)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = ", ".join(f"{count} {name}" for name, count in sorted(accelerated.items()))
    terminalreporter.write_line(f"models accelerated by moesaic in this process: {counts or 'NONE'}")
