"""Is any other MoE layer faster than ours, or smaller, at the same precision?

    python -m benchmarks.peers [--smoke] [--device cuda] [--output results.jsonl] [--layer package.module:factory]

Our layer, transformers' Llama 4, Mixtral and Qwen3-MoE blocks with every experts implementation that the installed
version offers, torchtitan's layer, st-moe-pytorch, mixture-of-experts and pytorch-mixtures; on a GPU scattermoe and
sonic-moe as well; and yours, with --layer (may be repeated). A factory is called with d_model=, d_ff=, n_experts=,
top_k=, shared= and dtype=, as `benchmarks.layer.benchmark_layer` is, and returns an nn.Module that maps (B, L, d_model)
to the same shape, or to a tuple that starts with it; it is moved to the device.

All get the same tokens and (where the router is known) the same router weights, so that every expert has the same rows
in all of them, and do the same active FLOPs: where an expert has two matrices instead of three, they are half as wide
again. Where the conformance kit (`moesaic.testing`) has a float64 reference of a layer, outputs are held against that,
on some of the tokens; else they have to be finite. Ratios are to the limit, see `benchmarks.limit`. What cannot run is
a row that says why.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.testing import MoEUnderTest
from moesaic.testing.peers import PEERS as KNOWN
from moesaic.testing.recognize import describe

from .harness import Measurement, Options, Progress, finish, gigabytes, parse_options, print_table
from .layer import benchmark_layer
from .limit import PASSES, DenseSwiGLU, Precision, compare, forward, precisions_to_time, reason

__all__ = ["OURS", "Case", "Peer", "main", "measure", "peers"]

OURS = "moesaic"
CHECKED_TOKENS = 64


class CannotRun(Exception):
    """The message says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape that layers are asked for."""

    experts: int
    top_k: int
    shared: bool
    tokens: int
    length: int
    """Of a sequence: some have a capacity per sequence."""
    dim: int
    hidden_dim: int
    memory_gb: float = 4.0
    """What copies more than this is not run."""

    @property
    def width(self) -> int:
        return (self.top_k + self.shared) * self.hidden_dim

    @property
    def parameters(self) -> int:
        return self.dim * (3 * self.hidden_dim * (self.experts + self.shared) + self.experts)

    def described(self) -> dict[str, object]:
        sizes = {key: value for key, value in dataclasses.asdict(self).items() if key != "memory_gb"}
        return {**sizes, "rows_each": self.tokens * self.top_k // self.experts}


@functools.cache
def draw(case: Case) -> tuple[Tensor, Tensor]:
    """Router weights (E, D) and tokens (B, L, D) in fp32: of twice as many, those that are routed most clearly.

    Where rounding decided the routing, outputs in bf16 could not be held against any others.
    """
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(case.experts, case.dim, generator=generator) * case.dim**-0.5
    candidates = torch.randn(2 * case.tokens, case.dim, generator=generator)
    logits = (candidates @ router.T).sort(dim=1, descending=True).values
    margins = logits[:, case.top_k - 1] - logits[:, case.top_k]
    return router, candidates[margins.topk(case.tokens).indices.sort().values].unflatten(0, (-1, case.length))


def full_capacity(case: Case) -> float:
    """The least capacity factor with which nothing is dropped: per sequence, a share of the tokens for each expert."""
    router, x = draw(case)
    chosen = (x @ router.T).topk(case.top_k, dim=-1).indices
    fullest = nn.functional.one_hot(chosen, case.experts).sum(dim=(1, 2)).max().item()
    return (fullest + 0.5) * case.experts / case.length


# ---- the layers


@dataclasses.dataclass(frozen=True)
class Peer:
    make: Callable[[Case, torch.dtype], MoEUnderTest]
    """(case, dtype of the parameters) -> the layer and what is known of it; whatever it raises says why it cannot."""
    package: str = ""
    note: str = ""


def made_by(factory: Callable[..., Any], case: Case, dtype: torch.dtype) -> MoEUnderTest:
    """By a factory of the signature that --layer asks for."""
    return describe(
        factory(
            d_model=case.dim,
            d_ff=case.hidden_dim,
            n_experts=case.experts,
            top_k=case.top_k,
            shared=case.shared,
            dtype=dtype,
        )
    )


def transformers_llama4(case: Case, dtype: torch.dtype) -> MoEUnderTest:
    if not case.shared:
        raise CannotRun("it always has a shared expert")
    modeling = importlib.import_module("transformers.models.llama4.modeling_llama4")
    config = modeling.Llama4TextConfig(
        hidden_size=case.dim,
        intermediate_size=case.hidden_dim,
        num_local_experts=case.experts,
        num_experts_per_tok=case.top_k,
    )
    return describe(modeling.Llama4TextMoe(config))


def transformers_gated(model: str, implementation: str, case: Case, dtype: torch.dtype) -> MoEUnderTest:
    """Mixtral or Qwen3-MoE."""
    if case.shared:
        raise CannotRun("it has no shared expert")
    copied = 3 * case.tokens * case.top_k * 3 * case.dim * case.hidden_dim * dtype.itemsize
    if implementation == "batched_mm" and copied > case.memory_gb * 1e9:
        raise CannotRun(f"copies weights per row: about {copied / 1e9:.0f} GB, allowed {case.memory_gb:g}")
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    sizes = {"hidden_size": case.dim, "num_experts_per_tok": case.top_k}
    if model == "mixtral":
        config = modeling.MixtralConfig(**sizes, intermediate_size=case.hidden_dim, num_local_experts=case.experts)
        block = modeling.MixtralSparseMoeBlock
    else:
        config = modeling.Qwen3MoeConfig(**sizes, moe_intermediate_size=case.hidden_dim, num_experts=case.experts)
        block = modeling.Qwen3MoeSparseMoeBlock
    config._experts_implementation = implementation
    return describe(block(config))


def torchtitan(case: Case, dtype: torch.dtype) -> MoEUnderTest:
    known = KNOWN["torchtitan"](num_experts=case.top_k)  # with so many experts its reference takes top_k of any number
    moe = importlib.import_module("torchtitan.models.common.moe")
    linear = importlib.import_module("torchtitan.models.common.linear").Linear.Config
    dispatcher = importlib.import_module("torchtitan.models.common.token_dispatcher").LocalTokenDispatcher.Config
    dim, hidden_dim, experts = case.dim, case.hidden_dim, case.experts
    into, out = linear(in_features=dim, out_features=hidden_dim), linear(in_features=hidden_dim, out_features=dim)
    module = moe.MoE.Config(
        num_experts=experts,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=dim, hidden_dim=hidden_dim, num_experts=experts),
            token_dispatcher=dispatcher(num_experts=experts, top_k=case.top_k),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=experts, gate=linear(in_features=dim, out_features=experts), top_k=case.top_k
        ),
        shared_experts=moe.FeedForward.Config(w1=into, w2=out, w3=into) if case.shared else None,
    ).build()

    def reference(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        assert known.reference is not None
        y = known.reference(weights, x)
        if case.shared:
            w1, w2, w3 = (weights[f"shared_experts.{name}.weight"] for name in ("w1", "w2", "w3"))
            y = y + (nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        return y

    return dataclasses.replace(known, module=module, reference=reference)


def st_moe_pytorch(case: Case, dtype: torch.dtype) -> MoEUnderTest:
    known = KNOWN["st-moe-pytorch"]()
    if case.shared or case.top_k < 2:
        raise CannotRun("it has no shared expert, and is top-2 or more")
    capacity = full_capacity(case)
    module = importlib.import_module("st_moe_pytorch").MoE(
        dim=case.dim,
        num_experts=case.experts,
        gating_top_n=case.top_k,
        expert_hidden_mult=1.5 * (case.hidden_dim + 0.5) / case.dim,  # it takes two thirds, and rounds down
        threshold_train=0.0,
        threshold_eval=0.0,
        capacity_factor_train=capacity,
        capacity_factor_eval=capacity,
    )
    return dataclasses.replace(known, module=module)


def mixture_of_experts(case: Case, dtype: torch.dtype) -> MoEUnderTest:
    known = KNOWN["mixture-of-experts"]()
    if case.shared or case.top_k != 2:
        raise CannotRun("it has no shared expert, and is top-2")
    capacity = full_capacity(case)
    module = importlib.import_module("mixture_of_experts").MoE(
        dim=case.dim,
        num_experts=case.experts,
        hidden_dim=3 * case.hidden_dim // 2,
        second_policy_train="all",
        second_policy_eval="all",
        capacity_factor_train=capacity,
        capacity_factor_eval=capacity,
    )
    return dataclasses.replace(known, module=module)


def pytorch_mixtures(case: Case, dtype: torch.dtype) -> MoEUnderTest:
    known = KNOWN["pytorch-mixtures-topk"](num_experts=case.top_k)  # as for torchtitan
    if case.shared:
        raise CannotRun("it has no shared expert")
    package = importlib.import_module("pytorch_mixtures")
    config = package.MoEConfig(
        hidden_dim=case.dim,
        intermediate_dim=3 * case.hidden_dim // 2,
        num_experts=case.experts,
        expert_fn="ff",
        expert_act="silu",
        router_fn="topk",
        capacity_factor=None,
        topk=case.top_k,
        dtype=dtype,
    )
    return dataclasses.replace(known, module=package.TopkMoE(config))


class ScatterMoE(nn.Module):
    """A softmax router before scattermoe's experts, as in its Mixtral example."""

    def __init__(self, experts: nn.Module, case: Case) -> None:
        super().__init__()
        self.gate, self.experts, self.top_k = nn.Linear(case.dim, case.experts, bias=False), experts, case.top_k

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scores, ids = self.gate(tokens).float().softmax(dim=-1).topk(self.top_k, dim=-1)
        scores = scores / scores.sum(dim=-1, keepdim=True)
        return self.experts(tokens, scores.to(x.dtype), ids).view_as(x)


def scattermoe(case: Case, dtype: torch.dtype) -> MoEUnderTest:
    if case.shared:
        raise CannotRun("it has no shared expert")
    experts = importlib.import_module("scattermoe.mlp").GLUMLP(
        input_size=case.dim,
        hidden_size=case.hidden_dim,
        num_experts=case.experts,
        top_k=case.top_k,
        activation=nn.SiLU(),
    )
    return MoEUnderTest(ScatterMoE(experts, case), router_weight=lambda module: module.gate.weight)


def sonic_moe(case: Case, dtype: torch.dtype) -> MoEUnderTest:
    if case.shared:
        raise CannotRun("it has no shared expert")
    module = importlib.import_module("sonicmoe").MoE(
        num_experts=case.experts,
        num_experts_per_tok=case.top_k,
        hidden_size=case.dim,
        intermediate_size=case.hidden_dim,
        activation_function=importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    )
    return MoEUnderTest(module, router_weight=lambda module: module.router.weight)


def peers(device: torch.device) -> dict[str, Peer]:
    """Everybody, installed or not."""
    try:
        offered = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS.valid_keys()
    except ImportError:
        offered = []
    found = {
        OURS: Peer(functools.partial(made_by, benchmark_layer)),
        "llama4": Peer(transformers_llama4, "transformers", "every expert computes every token"),
    }
    for model in ("mixtral", "qwen3_moe"):
        for implementation in ["eager", *offered]:
            make = functools.partial(transformers_gated, model, implementation)
            note = "its experts stay in fp32 under autocast" if implementation == "grouped_mm" else ""
            found[f"{model} {implementation}"] = Peer(make, "transformers", note)
    found["torchtitan"] = Peer(torchtitan, "torchtitan")
    full = "capacity factor just such that nothing is dropped"
    found["st-moe-pytorch"] = Peer(st_moe_pytorch, "st-moe-pytorch", f"GEGLU with biases; {full}")
    two_matrices = "experts of two matrices, 1.5 times as wide"
    found["mixture-of-experts"] = Peer(mixture_of_experts, "mixture-of-experts", f"{two_matrices}; {full}")
    found["pytorch-mixtures"] = Peer(pytorch_mixtures, "pytorch-mixtures", f"{two_matrices}, with biases")
    if device.type == "cuda":
        found["scattermoe"] = Peer(scattermoe, "scattermoe", "softmax router of this benchmark")
        found["sonic-moe"] = Peer(sonic_moe, "sonic-moe")
    return found


def given_layer(name: str) -> tuple[str, Peer]:
    """The peer that --layer names."""
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}; must be package.module:factory") from error
    if not callable(factory):
        raise argparse.ArgumentTypeError(f"{name} is {type(factory).__name__}: must be a function")
    return name, Peer(functools.partial(made_by, factory))


# ---- the measurement


def prepare(peer: Peer, case: Case, precision: Precision, x: Tensor) -> tuple[nn.Module, str]:
    """The layer on x's device with weights drawn, its output checked, and a note.

    Raises:
        Exception: whatever is in its way.
    """
    torch.manual_seed(0)
    under_test = peer.make(case, precision.dtype)
    if under_test.compute_dtype is not None and precision.name == "fp32":
        raise CannotRun(f"its experts compute in {under_test.compute_dtype} whatever the parameters are: see mixed")
    module = under_test.module.to(device=x.device, dtype=precision.dtype)
    with torch.no_grad():
        for parameter in module.parameters():  # transformers' blocks by themselves hold whatever was in memory
            if parameter.dim() >= 2:
                parameter.normal_(std=case.dim**-0.5)
        if under_test.router_weight is not None:
            under_test.router_weight(module).copy_(draw(case)[0])
    notes = [f"{peer.package} {importlib.metadata.version(peer.package)}"] if peer.package else []
    notes.append(peer.note)
    if under_test.router_weight is None:
        notes.append("with a routing of its own")
    share = sum(parameter.numel() for parameter in module.parameters()) / case.parameters
    if abs(share - 1) > 0.02:
        notes.append(f"{share:.2f}x the parameters of the case")
    notes.append(check_output(under_test, precision, x))
    return module, "; ".join(filter(None, notes))


def check_output(under_test: MoEUnderTest, precision: Precision, x: Tensor) -> str:
    """What was found. Raises CannotRun if the output is wrong."""
    module = under_test.module
    y = forward(module, x, precision)
    if y.numel() != x.numel():
        raise CannotRun(f"output of shape {tuple(y.shape)} for tokens of shape {tuple(x.shape)}")
    y, tokens = y.detach().reshape(-1, x.size(-1)), x.detach().flatten(0, 1)
    if not bool(y.isfinite().all()):
        raise CannotRun("its output is not finite")
    if under_test.reference is None:
        return "output finite (no reference known)"
    some = slice(None, None, max(1, tokens.size(0) // CHECKED_TOKENS))
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        weights = {name: tensor.double() for name, tensor in state.items()}
        expected = under_test.reference(weights, tokens[some].double())
    error = ((y[some].double() - expected).norm() / expected.norm()).item()
    if not error < precision.tolerance:
        raise CannotRun(f"its output is off by {error:.1e} (relative) from a float64 reference")
    stays = ", so it stays in fp32 under autocast" if precision.autocast and error < 1e-4 else ""
    return f"output within {error:.0e} of a float64 reference{stays}"


def measure(options: Options, cases: Sequence[Case], contenders: Mapping[str, Peer]) -> Iterator[Measurement]:
    precisions = precisions_to_time(options)
    cells = len(precisions) * len(cases) * len(PASSES)
    progress = Progress("peers", cells * (1 + len(contenders)) * options.rounds)
    for precision in precisions:
        for case in cases:
            x = draw(case)[1].to(device=options.device, dtype=precision.dtype).requires_grad_()
            limit = DenseSwiGLU(case.dim, case.width).to(device=options.device, dtype=precision.dtype)
            row = Measurement("peers", "", case.described(), precision.name, "", flops=limit.flops(case.tokens))
            layers: dict[str, nn.Module] = {"dense": limit}
            notes: dict[str, str] = {}
            missing: dict[str, str] = {}
            for name, peer in contenders.items():
                try:
                    layers[name], notes[name] = prepare(peer, case, precision, x)
                except Exception as error:  # whatever it raises is the answer
                    missing[name] = why(error)
            yield from compare(layers, x, precision, options, row, notes=notes, tell=progress)
            for name, said in missing.items():
                for what in PASSES:
                    yield dataclasses.replace(row, variant=name, what=what, flops=None, note=f"not run: {said}")


def why(error: Exception) -> str:
    missing = isinstance(error, ModuleNotFoundError)
    return f"{reason(error)}: pip install 'moesaic[peers]'" if missing else reason(error)


def cases_for(options: Options, memory_gb: float) -> list[Case]:
    if options.smoke:
        sizes = SimpleNamespace(tokens=64, length=32, dim=32, hidden_dim=32)
        asked = [(4, 1, True), (4, 2, False)]
    elif options.device.type == "cuda":
        sizes = SimpleNamespace(tokens=16_384, length=2048, dim=2048, hidden_dim=2048)
        asked = [(16, 1, True), (16, 2, False), (64, 8, False)]
    else:
        sizes = SimpleNamespace(tokens=1024, length=256, dim=256, hidden_dim=512)
        asked = [(16, 1, True), (16, 2, False), (32, 2, False)]
    return [Case(experts, top_k, shared, **vars(sizes), memory_gb=memory_gb) for experts, top_k, shared in asked]


def report(rows: Sequence[Measurement]) -> None:
    ahead = []
    for shape in dict.fromkeys(tuple(row.shape.items()) for row in rows):
        of = [row for row in rows if tuple(row.shape.items()) == shape]
        cells = {(row.variant, row.dtype, row.what): row for row in of if row.ratio is not None}
        columns = list(dict.fromkeys((row.dtype, row.what) for row in of))
        lines = [
            [name, *(cell(cells.get((name, *column)), cells[("dense", *column)]) for column in columns)]
            for name in dict.fromkeys(name for name, *_ in cells)
        ]
        title = title_of(**dict(shape))
        header = ["time (memory)", *(f"{dtype} {what}" for dtype, what in columns)]
        print_table(f"{title}: all / limit", header, lines)
        for row in cells.values():
            ours = cells[(OURS, row.dtype, row.what)]
            if row.variant == OURS or row.variant.startswith("dense"):
                continue
            for what, theirs, own in (
                ("time", row.ratio, ours.ratio),
                ("memory", row.activation_bytes, ours.activation_bytes),
            ):
                if theirs is not None and own and theirs < own:
                    ahead.append(f"{row.variant}: {theirs / own:.2f}x our {what} in {row.dtype}, {row.what}; {title}")
    print("\nwhere a peer is ahead of ours:", *(ahead or ["nowhere"]), sep="\n  ")
    for said in dict.fromkeys(f"{row.variant}: {row.note}" for row in rows if row.seconds is None):
        print(said)


def title_of(experts: int, top_k: int, shared: bool, tokens: int, dim: int, hidden_dim: int, **_: Any) -> str:
    return f"top {top_k} of {experts}{' + shared' if shared else ''}, {tokens} tokens, {dim} -> {hidden_dim}"


def cell(row: Measurement | None, limit: Measurement) -> str:
    if row is None or row.activation_bytes is None:
        return ""
    return f"{row.ratio:.2f} ({row.activation_bytes / max(1, limit.activation_bytes or 0):.2f})"


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    extra = [
        (
            ["--layer"],
            {
                "action": "append",
                "type": given_layer,
                "default": [],
                "metavar": "package.module:factory",
                "help": "a layer of your own, measured with the others; may be repeated",
            },
        ),
        (["--memory-gb"], {"type": gigabytes, "default": 4.0, "help": "batched_mm is left out above this"}),
    ]
    options, given = parse_options(__doc__ or "", arguments, *extra)
    contenders = peers(options.device) | dict(given.layer)
    rows = finish(measure(options, cases_for(options, given.memory_gb), contenders), options)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
