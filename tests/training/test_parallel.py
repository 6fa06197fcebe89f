"""One training on several processes is the training of one process."""

import dataclasses

import pytest

from moesaic.parallel.workers import Workers
from moesaic.training.config import OptimizerConfig
from moesaic.training.parallel_check import LAYOUTS, MODELS, Trained, Training, deviations, train_on

ADAMW = OptimizerConfig(name="adamw", learning_rate=1e-2, eps=1e-3)
MUON = OptimizerConfig(name="muon", learning_rate=1e-2, muon_learning_rate=1e-2, eps=1e-3)
LLAMA, SOFTMAX = MODELS

CASES = {
    "adamw": Training(LLAMA, ADAMW),
    "muon": Training(SOFTMAX, MUON),
    "accumulate": Training(LLAMA, MUON, accumulate=2, uneven=True),
    "uneven": Training(SOFTMAX, ADAMW, uneven=True),
    "starved": Training(LLAMA, ADAMW, starved=True, checkpoint_activations=True),
}

SEVERAL = [name for name in LAYOUTS if name != "one process"]
QUICK = {("experts on 2, each sharded on 2", "accumulate"), ("shards on 2", "muon"), ("experts on 2", "starved")}

_alone: dict[Training, Trained] = {}


def alone(workers: Workers, training: Training) -> Trained:
    if training not in _alone:
        _alone[training] = train_on(workers, training, LAYOUTS["one process"])
    return _alone[training]


def too_far(found: dict[str, float], tolerance: float) -> dict[str, float]:
    """Deviations above `tolerance`; entropies and margins of routers are sums in fp32 in any run."""
    return {name: each for name, each in found.items() if not each <= max(tolerance, 1e-6 * name.startswith("router/"))}


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        pytest.param(layout, case, marks=[] if (layout, case) in QUICK else pytest.mark.slow)
        for layout in SEVERAL
        for case in CASES
    ],
)
def test_equals_one_process(workers: Workers, layout: str, case: str) -> None:
    found = deviations(train_on(workers, CASES[case], LAYOUTS[layout]), alone(workers, CASES[case]))
    assert {"train/loss", "norm/experts", "norm/mixer", "norm/router", "norm/clipped", "expert bias"} <= found.keys()
    assert too_far(found, 1e-10) == {}


@pytest.mark.parametrize("layout", ["shards on 2", pytest.param("experts on 2", marks=pytest.mark.slow)])
def test_equals_one_process_in_fp32(workers: Workers, layout: str) -> None:
    training = dataclasses.replace(CASES["uneven"], precision="32-true")
    found = deviations(train_on(workers, training, LAYOUTS[layout]), alone(workers, training))
    assert too_far(found, 1e-5) == {}
