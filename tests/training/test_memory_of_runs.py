"""What does not fit into memory is refused from the config, whatever the number of processes."""

import dataclasses

import pytest

from moesaic.config import from_mapping, to_mapping
from moesaic.devices import gigabytes, machine_memory
from moesaic.errors import InputError
from moesaic.models import DecoderConfig, llama4_toy
from moesaic.models.shapes import num_parameters
from moesaic.parallel.config import ParallelConfig
from moesaic.training.config import OptimizerConfig, RunConfig, TrainerConfig, TrainingConfig
from moesaic.training.memory import require_memory_of_run


def model_of(share: float) -> DecoderConfig:
    """Its weights in fp32 are about this share of the memory of this machine."""
    toy = llama4_toy(num_layers=2)
    assert toy.moe is not None
    moe = dataclasses.replace(toy.moe, hidden_dim=1024)
    one = dataclasses.replace(toy, interleave_moe_layer_step=1, moe=moe)
    width = int(1024 * share * machine_memory()[0] / (4 * num_parameters(one)))
    return dataclasses.replace(one, moe=dataclasses.replace(moe, hidden_dim=width))


def run_of(devices: int, nodes: int = 1, shard: bool = True, **more: object) -> RunConfig:
    trainer = {**to_mapping(TrainerConfig(precision="32-true")), "devices": devices, "num_nodes": nodes, **more}
    return RunConfig(
        training=TrainingConfig(batch_size=8, seq_len=16),
        optimizer=OptimizerConfig(name="adamw"),
        trainer=from_mapping(TrainerConfig, trainer, "trainer"),
        parallel=ParallelConfig(shard=shard),
    )


def test_each_process_builds_the_whole_model() -> None:
    """A sixth of the memory trains on one process, with gradients and moments, but eight cannot build it."""
    model = model_of(1 / 6)
    require_memory_of_run(run_of(1), model)
    with pytest.raises(InputError) as refused:
        require_memory_of_run(run_of(8), model)
    weights = 4 * num_parameters(model)
    there, owner = machine_memory()
    assert f"8 processes on this machine, each (weights {gigabytes(weights)} while it builds" in str(refused.value)
    assert f"needs {gigabytes(8 * weights)} of memory, but {owner} has {gigabytes(there)}" in str(refused.value)
    assert "fewer trainer.devices" in str(refused.value)


def test_shards_of_a_model_that_no_machine_trains_alone() -> None:
    """A third of the memory, four thirds with gradients and moments, fits where eight machines share it."""
    model = model_of(1 / 3)
    with pytest.raises(InputError, match="of memory, but"):
        require_memory_of_run(run_of(1), model)
    require_memory_of_run(run_of(1, nodes=8), model)
    with pytest.raises(InputError, match=r"2 processes on this machine, each \(weights .* while it builds"):
        require_memory_of_run(run_of(2, nodes=8), model, workers=2)


@pytest.mark.parametrize("more", [{"shard": False}, {"strategy": "ddp"}])
def test_a_copy_on_each_process_is_as_large_as_one_run(more: dict[str, object]) -> None:
    model = model_of(1 / 6)
    require_memory_of_run(run_of(1), model)
    with pytest.raises(InputError, match=r"2 processes on this machine, each \(weights .*, gradients"):
        require_memory_of_run(run_of(2, **more), model)  # type: ignore[arg-type]
