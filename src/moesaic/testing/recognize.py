"""From what a factory made to a `MoEUnderTest`: ours, Hugging Face's, or a plain module of which nothing is known."""

from torch import nn

from moesaic.errors import InputError
from moesaic.layers import RoutedLayer
from moesaic.testing.adapter import MoEUnderTest
from moesaic.testing.hugging_face import describe_transformers
from moesaic.testing.ours import describe_routed

__all__ = ["describe"]


def describe(made: object) -> MoEUnderTest:
    """Raises InputError for anything else than an nn.Module or a `MoEUnderTest`."""
    if isinstance(made, MoEUnderTest):
        return made
    if not isinstance(made, nn.Module):
        raise InputError(f"the factory made {type(made).__name__}: must be an nn.Module or a MoEUnderTest")
    if isinstance(made, RoutedLayer):
        return describe_routed(made)
    return describe_transformers(made) or MoEUnderTest(made)
