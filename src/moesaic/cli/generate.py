"""Continue a prompt: python scripts/generate.py CHECKPOINT 'def main(' [--temperature 0.8] [--seed 1] ..."""

import argparse
import sys
from collections.abc import Sequence

from moesaic.checkpoints import load_model
from moesaic.errors import InputError
from moesaic.evaluation.sampling import SampleConfig, sample_text

__all__ = ["generate_text", "main"]


def generate_text(checkpoint: str, sampling: SampleConfig, seed: int = 0) -> str:
    """The prompt and its continuation by the model of a checkpoint."""
    model = load_model(checkpoint)
    if model.tokenizer is None:
        raise InputError(f"checkpoint {checkpoint}: it has no tokeniser, it was trained on token ids")
    return sample_text(model.decoder, model.tokenizer, sampling, seed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="<run>/checkpoints/last.ckpt")
    parser.add_argument("prompt", nargs="?", default=SampleConfig.prompt)
    parser.add_argument("--max-new-tokens", type=int, default=SampleConfig.max_new_tokens)
    parser.add_argument("--temperature", type=float, default=SampleConfig.temperature, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=SampleConfig.top_k)
    parser.add_argument("--top-p", type=float, default=SampleConfig.top_p)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args(arguments))
    checkpoint, seed = given.pop("checkpoint"), given.pop("seed")
    try:
        print(generate_text(checkpoint, SampleConfig(**given), seed))
    except ValueError as error:  # InputError is one
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
