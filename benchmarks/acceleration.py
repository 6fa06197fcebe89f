"""How much faster, and in how much less memory, do transformers' MoE blocks run once accelerated?

    python -m benchmarks.acceleration [--smoke] [--device cuda --dtype bf16] [--output results.jsonl]

A block of each model at one size, with as many experts as --experts says, against every experts implementation that the
installed transformers offers for it; all share their parameters. Forward, and forward with backward. Ratios are
theirs / ours: above 1 ours is faster or smaller.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Llama4TextConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moesaic.interop import accelerate

from .harness import (
    DTYPES,
    Measurement,
    Options,
    Progress,
    count,
    finish,
    gigabytes,
    parse_options,
    peak_memory,
    print_table,
    quantiles,
    time_in_turn,
)
from .limit import output_of

__all__ = ["Case", "main", "measure"]

TOP_K = {"llama4": 1, "mixtral": 2, "qwen3_moe": 8, "olmoe": 8}  # of the published models
OURS = "accelerated"


@dataclasses.dataclass(frozen=True)
class Case:
    """One block at one size."""

    model: str
    num_experts: int
    tokens: int
    dim: int
    hidden_dim: int
    dtype: str
    device: torch.device

    @property
    def top_k(self) -> int:
        return min(TOP_K[self.model], self.num_experts)

    @property
    def implementations(self) -> list[str]:
        """What the installed transformers has for this block; Llama 4's has one way only."""
        return ["own bmm"] if self.model == "llama4" else ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]

    def build(self) -> tuple[nn.Module, Tensor]:
        """The block as transformers makes it, with weights drawn, and an input (1, T, D)."""
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": self.dim,
            "num_experts_per_tok": self.top_k,
            "intermediate_size": self.hidden_dim,
        }
        experts = self.num_experts
        blocks: dict[str, Callable[[], nn.Module]] = {
            "llama4": lambda: Llama4TextMoe(Llama4TextConfig(**sizes, num_local_experts=experts)),
            "mixtral": lambda: MixtralSparseMoeBlock(MixtralConfig(**sizes, num_local_experts=experts)),
            "qwen3_moe": lambda: Qwen3MoeSparseMoeBlock(
                Qwen3MoeConfig(**sizes, num_experts=experts, moe_intermediate_size=self.hidden_dim)
            ),
            "olmoe": lambda: OlmoeSparseMoeBlock(OlmoeConfig(**sizes, num_experts=experts)),
        }
        with torch.device(self.device):
            block = blocks[self.model]()
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=self.dim**-0.5)
            x = torch.randn(1, self.tokens, self.dim)
        dtype = DTYPES[self.dtype]
        return block.to(dtype), x.to(dtype).requires_grad_()

    def copied_bytes(self) -> int:
        """What batched_mm copies in a step: three matrices per routed row, their gradients, and an accumulation."""
        return 3 * self.tokens * self.top_k * 3 * self.dim * self.hidden_dim * DTYPES[self.dtype].itemsize


def variant(block: nn.Module, implementation: str) -> nn.Module:
    """A copy of the block on the same parameters."""
    made = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    if implementation == OURS:
        return accelerate(made)
    if implementation != "own bmm":
        made.experts.config._experts_implementation = implementation  # type: ignore[union-attr]
    return made


def forward(block: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        output_of(block, x)


def forward_backward(block: nn.Module, x: Tensor) -> None:
    y = output_of(block, x)
    torch.autograd.grad(y, (x, *block.parameters()), torch.ones_like(y))


def obstacle(case: Case, implementation: str, memory_gb: float) -> str | None:
    """Why it is left out, if it has to be; tried on a block of the same architecture and four tokens."""
    if implementation == "batched_mm" and case.copied_bytes() > memory_gb * 1e9:
        return f"copies weights per row: about {case.copied_bytes() / 1e9:.0f} GB, allowed {memory_gb:g}"
    try:
        block, x = dataclasses.replace(case, num_experts=8, tokens=4, dim=64, hidden_dim=64).build()
        forward_backward(variant(block, implementation), x)
    except Exception as error:  # whatever an implementation raises is the answer
        return str(error).strip().splitlines()[0]
    return None


def require_agreement(variants: dict[str, nn.Module], x: Tensor) -> None:
    """A ratio between different results would mean nothing."""
    with torch.no_grad():
        ours = output_of(variants[OURS], x).float()
        for name, block in variants.items():
            error = ((output_of(block, x).float() - ours).norm() / ours.norm()).item()
            if not error < (1e-4 if x.dtype == torch.float32 else 0.05):
                raise SystemExit(f"{name} and ours differ by {error:.1e} (relative): not a benchmark")


def measure(options: Options, cases: Sequence[Case], memory_gb: float) -> Iterator[Measurement]:
    progress = Progress("acceleration", sum(2 * (1 + len(case.implementations)) for case in cases) * options.rounds)
    for case in cases:
        left_out = {name: obstacle(case, name, memory_gb) for name in case.implementations}
        block, x = case.build()
        names = [OURS, *(name for name, reason in left_out.items() if reason is None)]
        variants = {name: variant(block, name) for name in names}
        require_agreement(variants, x)
        shape = {key: value for key, value in dataclasses.asdict(case).items() if key not in ("dtype", "device")}
        for what, run in (("forward", forward), ("forward+backward", forward_backward)):
            calls = {name: functools.partial(run, made, x) for name, made in variants.items()}
            samples = time_in_turn(calls, options, tell=progress)
            middle = quantiles(samples[OURS])[1]
            row = Measurement("acceleration", "", {**shape, "top_k": case.top_k}, case.dtype, what, ratio_to=OURS)
            for name, call in calls.items():
                yield dataclasses.replace(
                    row,
                    variant=name,
                    seconds=quantiles(samples[name]),
                    ratio=quantiles(samples[name])[1] / middle,
                    peak_bytes=peak_memory(call, case.device),
                    note=f"transformers {transformers.__version__}",
                )
            for name, reason in left_out.items():
                if reason is not None:
                    yield dataclasses.replace(row, variant=name, note=f"not run: {reason}")


def report(rows: Sequence[Measurement]) -> None:
    lines = []
    reasons = {row.variant: row.note for row in rows if row.ratio is None}
    ours = {}
    for row in rows:
        key = (*row.shape.values(), row.dtype, row.what)
        if row.variant == OURS:
            ours[key] = row
        elif row.ratio is not None and row.seconds and row.peak_bytes and ours[key].peak_bytes and ours[key].seconds:
            head = [row.shape["model"], str(row.shape["num_experts"]), row.what, row.variant]
            milliseconds = [f"{seconds[1] * 1e3:.1f}" for seconds in (row.seconds, ours[key].seconds) if seconds]
            megabytes = [f"{peak / 1e6:.1f}" for peak in (row.peak_bytes, ours[key].peak_bytes) if peak]
            memory = f"{row.peak_bytes / (ours[key].peak_bytes or 1):.2f}x"
            lines.append([*head, *milliseconds, f"{row.ratio:.2f}x", *megabytes, memory])
    header = ["block", "E", "", "theirs", "theirs ms", "ours ms", "time", "theirs MB", "ours MB", "memory"]
    print_table("theirs / ours", header, lines)
    for name, reason in reasons.items():
        print(f"{name}: {reason}")


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    extra = [
        (["--models"], {"nargs": "+", "choices": list(TOP_K), "default": ["llama4", "mixtral", "qwen3_moe"]}),
        (["--experts"], {"nargs": "+", "type": count, "default": [8, 16, 64, 128]}),
        (["--tokens"], {"type": count, "default": 512}),
        (["--dim"], {"type": count, "default": 256}),
        (["--hidden-dim"], {"type": count, "default": 512, "help": "width of each expert"}),
        (["--dtype"], {"choices": list(DTYPES), "default": "fp32"}),
        (["--memory-gb"], {"type": gigabytes, "default": 6.0, "help": "batched_mm is left out above this"}),
    ]
    options, given = parse_options(__doc__ or "", arguments, *extra)
    tokens, dim, hidden_dim = (32, 32, 32) if options.smoke else (given.tokens, given.dim, given.hidden_dim)
    experts = [8, 16] if options.smoke else given.experts
    cases = [
        Case(model, e, tokens, dim, hidden_dim, given.dtype, options.device) for model in given.models for e in experts
    ]
    rows = finish(measure(options, cases, given.memory_gb), options)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
