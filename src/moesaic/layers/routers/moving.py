"""What training asks of a router that has a state of its own."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from moesaic.layers.routing import Routing

__all__ = ["MovingRouter", "observed_by"]


@runtime_checkable
class MovingRouter(Protocol):
    """A router with a state that training moves once per optimizer step, by what all tokens of the step did."""

    def observe(self, routing: Routing, valid: Tensor | None) -> Tensor:
        """What some tokens did, for `end_step`; those of micro-batches and ranks are added. `valid` (T,) is no padding.

        It is not asked about a routing that was replayed.
        """

    def end_step(self, observed: Tensor) -> None:
        """Move the state in place, between backward and step."""


def observed_by(router: MovingRouter, routing: Routing, valid: Tensor | None) -> Tensor:
    """What the router observes.

    Raises:
        TypeError: no tensor, which could not be added over micro-batches and ranks.
    """
    found: Any = router.observe(routing, valid)
    if not isinstance(found, Tensor):
        raise TypeError(f"{type(router).__name__}: observe returned {type(found).__name__}; must be a tensor")
    return found
