"""What is said about the choices of a router."""

import torch

from moesaic.evaluation.routing import routing_sums
from moesaic.layers import Routing


def test_share_of_tokens_without_any_expert() -> None:
    ids = torch.tensor([[0, 3], [3, 3], [1, 2], [3, 3]])  # 3 of 3 experts: none
    routing = Routing(torch.zeros(4, 3), torch.ones(4, 2), ids)
    assert routing_sums(routing).no_expert_share() == 0.5
    valid = torch.tensor([True, True, True, False])
    assert routing_sums(routing, valid).no_expert_share() == torch.tensor(1 / 3).item()
    assert routing_sums(routing._replace(expert_ids=ids.clamp(max=2))).no_expert_share() == 0
