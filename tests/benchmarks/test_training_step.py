"""The training-step benchmark runs the model that `make train` trains."""

from pathlib import Path
from typing import Any

import yaml

from benchmarks.training_step import DEFAULT
from moesaic.config import from_mapping
from moesaic.models import DecoderConfig

ROOT = Path(__file__).resolve().parents[2]


def test_the_model_is_the_default_one() -> None:
    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers(item) for key, item in value.items()}
        return float(value) if isinstance(value, str) and value[:1].isdigit() else value  # YAML 1.1 reads 1e-5 as text

    content = numbers(yaml.safe_load((ROOT / "conf" / "model" / "small.yaml").read_text()))
    assert from_mapping(DecoderConfig, {**content, "vocab_size": DEFAULT.vocab_size}) == DEFAULT
