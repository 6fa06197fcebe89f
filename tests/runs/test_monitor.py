"""Alarms: a collapsed router is reported, a healthy one is not, a loss that is not finite stops the run in time."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoints import load_checkpoint
from moesaic.evaluation.routing import RoutingHealth, routing_health
from moesaic.layers import Routing, count_tokens
from moesaic.training import run as run_module
from moesaic.training.run import run

Composed = Callable[..., dict[str, Any]]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def routing_of(logits: torch.Tensor, top_k: int = 1) -> Routing:
    ids = logits.topk(top_k).indices
    return Routing(logits, torch.sigmoid(logits.gather(1, ids)), ids, count_tokens(ids, logits.size(1)))


def test_health_of_known_routings() -> None:
    balanced = routing_health(routing_of(4.0 * torch.eye(4)))
    assert balanced.max_violation == pytest.approx(0)
    assert balanced.dead_share == 0
    assert balanced.margin == pytest.approx(4.0)
    collapsed = routing_health(routing_of(torch.tensor([[1.0, 0, 0, 0]] * 8)))
    assert collapsed.max_violation == pytest.approx(3)
    assert collapsed.dead_share == pytest.approx(0.75)
    undecided = routing_health(routing_of(torch.zeros(8, 4)))
    assert undecided.entropy == pytest.approx(1)
    one_expert = routing_health(routing_of(torch.zeros(8, 1)))
    assert one_expert == RoutingHealth(0.0, 0.0, 0.0, 0.0)


def test_padding_does_not_count_in_health() -> None:
    logits = torch.randn(6, 4)
    padded = torch.cat((logits, torch.tensor([[9.0, 0, 0, 0]] * 20)))
    valid = torch.arange(26) < 6
    assert routing_health(routing_of(padded), valid) == routing_health(routing_of(logits))


def collapse(module: Any) -> None:
    """Make expert 0 of layers.1 win for every token, by a selection bias that no gradient can move."""
    module.decoder.layers[1].ffn.router.expert_bias[0] = 100.0


@pytest.mark.slow
def test_collapsed_router_raises_the_alarm_once(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module.LanguageModel, "on_train_start", with_action(collapse))
    with pytest.warns(RuntimeWarning, match=r"layers.1.ffn has collapsed: its fullest expert takes 8.0x") as caught:
        metrics = run(composed("model.moe.expert_bias=true", "training.log_every=2", "training.steps=40"))
    about_layer_1 = [w for w in caught if "layers.1.ffn has collapsed" in str(w.message)]
    assert len(about_layer_1) == 1
    assert any("88% of its experts are dead" in warning for warning in metrics["warnings"])


def with_action(action: Callable[[Any], None]) -> Callable[[Any], None]:
    original = run_module.LanguageModel.on_train_start

    def on_train_start(self: Any) -> None:
        original(self)
        action(self)

    return on_train_start


@pytest.mark.slow
def test_healthy_router_raises_none(composed: Composed) -> None:
    config = composed("training.log_every=1", "model.moe.router=uniform")
    assert run(config)["warnings"] == []
    [run_dir] = Path(config["output_dir"]).glob("*/*")
    rows = read_csv(run_dir / "routing.csv")
    assert {row["layer"] for row in rows} == {"layers.1.ffn", "layers.3.ffn"}
    assert all(float(row["load"]) == pytest.approx(1) for row in rows)


@pytest.mark.slow
def test_broken_weights_stop_the_run_and_name_the_layer(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    original = run_module.LanguageModel.training_step

    def poison(self: Any, batch: Any, batch_index: int) -> Any:
        if self.trainer.global_step == 15:
            self.decoder.layers[2].ffn.up_proj.weight.data[0, 0] = float("nan")
        return original(self, batch, batch_index)

    monkeypatch.setattr(run_module.LanguageModel, "training_step", poison)
    config = composed()
    with pytest.warns(RuntimeWarning, match=r"step 15: the loss is nan; layers.2 is the first layer"):
        metrics = run(config)
    assert metrics["status"] == "diverged"
    [run_dir] = Path(config["output_dir"]).glob("*/*")
    assert json.loads((run_dir / "metrics.json").read_text())["status"] == "diverged"
    last = load_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 10
    assert all(value.isfinite().all() for value in last["state_dict"].values())
