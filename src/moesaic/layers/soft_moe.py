"""A mixture of experts without a choice: every expert sees means of all tokens."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers.backend_choice import BackendName
from moesaic.layers.checks import require_last, require_sizes, require_weights_dtype
from moesaic.layers.experts import Experts
from moesaic.layers.feed_forward import ActivationName
from moesaic.layers.parametrization import Fans, ParameterKind, Parametrization
from moesaic.layers.routing import at_least_fp32

__all__ = ["SoftMoE"]


class SoftMoE(nn.Module):
    """Channel mixer of Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951): the control without sparsity.

    Each expert has `slots` inputs. A slot is a weighted mean of the tokens of a sequence, and each token gets a
    weighted mean of what the experts make of all slots. Both weights are a softmax of one matrix of logits,
    scale * (x / |x|) . (phi / |phi|): over tokens on the way in, over slots on the way out.

    A token sees later ones of its sequence. In a decoder it therefore stays a control, as expert choice does: its loss
    says nothing of what it could generate.

    Args:
        dim: model width D.
        hidden_dim: width F of each expert.
        num_experts: E.
        slots: inputs of each expert for one sequence, S.
        activation: a name in `ACTIVATIONS`.
        backend: as of `Experts`.
    """

    causal: ClassVar[bool] = False
    depends_on_batch: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        slots: int = 1,
        activation: ActivationName = "silu",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(slots=slots)
        self.experts = Experts(
            num_experts, dim, hidden_dim, activation=activation, backend=backend, device=device, dtype=dtype
        )
        self.dim, self.num_experts, self.slots = dim, num_experts, slots
        self.phi = nn.Parameter(torch.empty(dim, num_experts * slots, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.ones((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.experts.reset_parameters()
        nn.init.normal_(self.phi, std=self.dim**-0.5)
        nn.init.ones_(self.scale)

    def initialize(self, parametrization: Parametrization) -> None:
        self.experts.initialize(parametrization)
        nn.init.normal_(self.phi, std=parametrization.std("output", self.dim))
        nn.init.ones_(self.scale)

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        return {"phi": "output"}

    def fans(self) -> dict[str, Fans]:
        return {"phi": Fans(self.dim, self.num_experts * self.slots)}

    def flops_per_token(self, seq_len: int) -> float:
        """Logits and both means for a token, and its share of the slots of a sequence."""
        slots = self.num_experts * self.slots
        return 3 * 2 * self.dim * slots + slots * self.experts.flops_per_token(seq_len) / seq_len

    def forward(self, x: Tensor) -> Tensor:
        """(..., L, D) -> (..., L, D); the last dimension but one is the sequence."""
        require_last(x, self.dim, "SoftMoE")
        require_weights_dtype("SoftMoE", x, self.phi)
        if x.dim() < 2:
            raise ValueError(f"SoftMoE: x of shape {tuple(x.shape)}; must be (..., tokens, {self.dim})")
        tokens = x.reshape(-1, *x.shape[-2:])
        batch = tokens.size(0)
        with torch.autocast(x.device.type, enabled=False):  # as a router's
            phi = self.scale * F.normalize(self.phi, dim=0)
            logits = at_least_fp32(F.normalize(tokens.to(phi.dtype), dim=-1) @ phi)
        into, out = logits.softmax(dim=1).to(x.dtype), logits.softmax(dim=2).to(x.dtype)
        inputs = (into.transpose(1, 2) @ tokens).unflatten(1, (self.num_experts, self.slots))
        rows = inputs.transpose(0, 1).reshape(-1, self.dim)
        evenly = torch.full((self.num_experts,), batch * self.slots, device=x.device)
        made = self.experts(rows, evenly).view(self.num_experts, batch, self.slots, self.dim)
        return (out @ made.transpose(0, 1).flatten(1, 2)).view_as(x)

    def extra_repr(self) -> str:
        return f"slots={self.slots}"
