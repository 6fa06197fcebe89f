"""Weights that several ranks share, as one of them sees them."""

from torch import Tensor

__all__ = ["held"]


def held(weight: Tensor) -> Tensor:
    """What this rank holds of a weight: of a DTensor its shard, through which gradients flow, else all of it.

    Told by its method, so that nothing here imports torch's distributed tensors.
    """
    # asked of the type: torch.compile takes it that no tensor has such a method, where the tensor itself is asked
    if not hasattr(type(weight), "to_local"):
        return weight
    local: Tensor = weight.to_local()  # type: ignore[attr-defined]
    return local
