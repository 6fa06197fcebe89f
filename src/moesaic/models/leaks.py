"""What the parts of a model say of what a token's output may depend on: later tokens, and other sequences."""

import dataclasses

from torch import nn

from moesaic.imports import resolve
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers import ROUTERS
from moesaic.models.config import DecoderConfig

__all__ = ["SEES_LATER", "SEES_OTHERS", "Leaks", "leaks_of"]

SEES_LATER = "sees later tokens"
"""The mark of a model that is not causal."""

SEES_OTHERS = "sees other sequences"
"""The mark of a model whose outputs depend on the batch."""


@dataclasses.dataclass(frozen=True)
class Leaks:
    """Whether a model is causal, and whether it depends on its batch, by what the classes of its parts state.

    None: a custom part does not state it. `moesaic compare` checks such parts.
    """

    causal: bool | None = True
    depends_on_batch: bool | None = False
    is_control: bool = False
    """Whether what it has of the batch is the place of a token alone, as with `uniform`."""

    @property
    def mark(self) -> str | None:
        """What to say wherever the model is named; None where nothing is known to leak."""
        if self.causal is False:
            return SEES_LATER
        return SEES_OTHERS if self.depends_on_batch and not self.is_control else None

    @property
    def words(self) -> tuple[str, str]:
        """For the columns "causal" and "batch" of a table: yes, no, or "not stated"."""
        said = {True: "yes", False: "no", None: "not stated"}
        return said[self.causal], said[self.depends_on_batch]


def leaks_of(config: DecoderConfig) -> Leaks:
    """Ask the classes of routers and feed-forward layers; custom mixers state nothing.

    Raises:
        InputError: a custom part cannot be imported.
    """
    classes: list[object] = []
    name = None
    for layer in config.layers:
        if isinstance(layer.ffn, dict):
            classes.append(resolve(layer.ffn["type"], "ffn: type"))
        elif layer.ffn == "moe" and config.moe is not None:
            name = config.moe.built_in_router
            router = config.moe.router
            classes.append(ROUTERS[name] if name else resolve(router["type"], "router: type"))  # type: ignore[index]
        if isinstance(layer.mixer, dict):
            classes.append(nn.Module)
    causal = [_stated(each, "causal") for each in classes]
    batch = [_stated(each, "depends_on_batch") for each in classes]
    return Leaks(
        causal=False if False in causal else None if None in causal else True,
        depends_on_batch=True if True in batch else None if None in batch else False,
        is_control=name == "uniform",
    )


def _stated(cls: object, name: str) -> bool | None:
    """What a class says; somebody else's that inherits from `TopKRouter` has not said it of its own code."""
    own = not str(getattr(cls, "__module__", "")).startswith("moesaic.")
    for each in getattr(cls, "__mro__", ()):
        if name in vars(each) and not (own and each is TopKRouter):
            return bool(vars(each)[name])
    return None
