"""Score a checkpoint on any data source: python scripts/evaluate.py checkpoint=PATH [data=files data.path=...]"""

import sys
from pathlib import Path
from typing import Any

import hydra
from _cli import CONFIG_PATH, exit_on_bad_input, plain, refuse_unknown_keys
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moesaic.config import from_mapping
from moesaic.data import DataConfig, EvaluationLoader, load_data
from moesaic.errors import InputError
from moesaic.evaluation.language_modelling import evaluate_language_model
from moesaic.evaluation.plots import plot_loss_by_position
from moesaic.evaluation.routing import load_health
from moesaic.training.checkpoints import load_model
from moesaic.training.config import require_accelerator
from moesaic.training.records import write_json


def evaluate(config: dict[str, Any]) -> dict[str, Any]:
    """Loss in nats per token, bits per byte and router load of a checkpoint, as a plain mapping."""
    if config["split"] not in ("validation", "train"):
        raise InputError(f"split={config['split']!r}: allowed are validation, train")
    for key in ("seq_len", "batch_size", "max_batches"):
        if config[key] is not None and (not isinstance(config[key], int) or config[key] < 1):
            raise InputError(f"{key}={config[key]!r}: allowed are integers >= 1")
    require_accelerator("accelerator", config["accelerator"])
    data_config = from_mapping(DataConfig, config["data"], "data")
    model = load_model(config["checkpoint"])
    data = load_data(data_config, model.tokenizer)
    if data.vocab_size > model.config.vocab_size:
        raise InputError(
            f"data: token ids up to {data.vocab_size - 1}, but the checkpoint has a vocabulary of "
            f"{model.config.vocab_size}"
        )
    trained_length = model.run_config["training"]["seq_len"]
    split = getattr(data, config["split"])
    loader = EvaluationLoader(
        split.tokens,
        seq_len=config["seq_len"] or trained_length,
        batch_size=config["batch_size"],
        max_batches=config["max_batches"],
    )
    decoder = model.decoder.to("cuda" if config["accelerator"] == "gpu" else "cpu")
    score = evaluate_language_model(
        decoder, track(loader, "evaluating", total=len(loader), console=Console(stderr=True)), model.token_bytes
    )
    if config["max_batches"] is None:  # of a memory map without tokeniser the bytes are known for the whole split only
        score.num_bytes = score.num_bytes or split.num_bytes or 0
    numbers: dict[str, Any] = {"tokens": score.num_tokens, "loss": score.loss, "bits_per_byte": score.bits_per_byte}
    for name, counts in score.tokens_per_expert.items():
        numbers[f"router/{name}/max_violation"], numbers[f"router/{name}/dead_share"] = load_health(counts)
    if config["output"]:
        output = Path(config["output"])
        output.mkdir(parents=True, exist_ok=True)
        record = {"config": config, **numbers, "loss_by_position": score.loss_by_position}
        write_json(output / "evaluation.json", record)
        chunk = model.config.attention.attention_chunk_size
        plot_loss_by_position(score.loss_by_position, output / "loss_by_position.png", trained_length, chunk)
    return numbers


@hydra.main(config_path=CONFIG_PATH, config_name="evaluate", version_base="1.3")
def main(config: DictConfig) -> None:
    numbers = exit_on_bad_input(lambda: evaluate(plain(config)))
    table = Table("measure", "value", title=str(config.checkpoint))
    for name, value in numbers.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    exit_on_bad_input(lambda: refuse_unknown_keys("evaluate", sys.argv[1:]))
    main()
