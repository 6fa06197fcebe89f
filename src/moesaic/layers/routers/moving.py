"""What training asks of a router that has a state of its own."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from moesaic.layers.routing import Routing

__all__ = ["MovingRouter"]


@runtime_checkable
class MovingRouter(Protocol):
    """A router with a state that training moves once per optimizer step, by what all tokens of the step did."""

    def observe(self, routing: Routing, valid: Tensor | None) -> Tensor:
        """What some tokens did, for `end_step`; those of micro-batches and ranks are added. `valid` (T,) is no padding.

        It is not asked about a routing that was replayed.
        """

    def end_step(self, observed: Tensor) -> None:
        """Move the state in place, between backward and step."""
