"""What a training takes on any number of accelerators, found on this machine in seconds.

`lay_out` builds one block of each kind without memory, and spreads it by the function of a run over a process group
that sends nothing. `plan` adds up from there: bytes on one rank, bytes on the wire, and how long both links and the
arithmetic take at least.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.layers import MoE, ParameterKind, parameter_kinds
from moesaic.models import Account, Decoder, DecoderConfig, account
from moesaic.models.custom import asks_for, custom_modules
from moesaic.models.decoder import Block, build_block
from moesaic.models.memory import ActivationEstimate, estimate_activations
from moesaic.models.shapes import uncounted
from moesaic.parallel.config import ParallelConfig, require_degrees, require_precision, require_vocabulary
from moesaic.parallel.shards import held, is_sharded

__all__ = ["FORMATS", "Collective", "Formats", "Memory", "Part", "Plan", "Setup", "Weight", "lay_out", "plan"]


class Formats(NamedTuple):
    """Numbers that a precision has, and where."""

    weights: torch.dtype
    """Weights, gradients and moments, kept and sent."""
    sent: torch.dtype
    """Rows on their way to their experts."""
    returned: torch.dtype
    """Rows on their way back, and gathered weights that are `narrow`."""
    matmul: str
    """A key of `Hardware.peaks`."""
    narrow_linears: bool = True
    """Whether `Weight.narrow` holds for linear layers: torchao's round to 8 bits from fp32."""

    @property
    def casts(self) -> bool:
        """Whether products have other numbers than weights, as autocast does."""
        return self.weights != self.returned


_FP32, _BF16 = torch.float32, torch.bfloat16
FORMATS = {
    "32-true": Formats(_FP32, _FP32, _FP32, "fp32"),
    "bf16-mixed": Formats(_FP32, _FP32, _BF16, "bf16"),  # autocast: the stream and what norms give stay in fp32
    "bf16-true": Formats(_BF16, _BF16, _BF16, "bf16"),
    "64-true": Formats(torch.float64, torch.float64, torch.float64, "fp64"),
    "fp8": Formats(_FP32, _FP32, _BF16, "fp8", narrow_linears=False),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A training, as far as its size matters.

    Args:
        ranks: processes, one accelerator each.
        per_node: accelerators of a node.
        batch_size: sequences of a micro-batch, over all ranks.
        precision: a key of `FORMATS`.
    """

    model: DecoderConfig
    parallel: ParallelConfig
    ranks: int
    per_node: int
    batch_size: int
    seq_len: int
    precision: str
    optimizer: Literal["adamw", "muon"]
    checkpoint_activations: bool

    @property
    def formats(self) -> Formats:
        return FORMATS[self.precision]

    @property
    def owners(self) -> int:
        """Ranks that have other rows of a batch: one of each group that shares matrices."""
        return self.ranks // self.parallel.tensor

    @property
    def tokens(self) -> int:
        """Tokens of one rank, which those that share matrices with it have too."""
        return self.batch_size // self.owners * self.seq_len


# ---- how it is laid out


class Weight(NamedTuple):
    """One parameter as the fullest rank has it: rank 0."""

    name: str
    shape: tuple[int, ...]
    """That of the whole."""
    kind: ParameterKind
    here: int
    """Numbers that this rank keeps."""
    sharding_dim: int | None
    """The dimension along which the ranks that gather it have parts of it."""
    ranks: int
    """Ranks that gather it together."""
    nodes: int
    """Nodes over which these are spread, at most."""
    narrow: bool
    """Whether it is gathered in the dtype of products, where that is another."""
    shared: int = 1
    """Ranks that work with one part each: of the experts, or of a matrix."""
    shared_dim: int | None = None
    """The dimension along which these have parts of it."""

    @property
    def gathered(self) -> int:
        """Numbers that this rank has while it works with it, padding to equal shards included."""
        return self.here * self.ranks

    @property
    def stacked(self) -> int:
        """Numbers that Muon orthogonalizes here, whole matrices."""
        matrix = range(len(self.shape) - 2, len(self.shape))
        gathered = self.gathered if self.sharding_dim in matrix else self.here
        return gathered * (self.shared if self.shared_dim in matrix else 1)


@dataclasses.dataclass(frozen=True)
class Part:
    """Blocks of one kind, or what is outside of the blocks: embedding, last norm and head."""

    name: str
    """The channel mixer of the blocks; empty for what is outside of them."""
    count: int
    weights: tuple[Weight, ...]
    expert_ranks: int = 1
    """Ranks that share the experts, 1 where rows stay."""
    expert_nodes: int = 1
    has_routed: bool = False
    """Whether tokens go to experts."""

    @property
    def groups(self) -> list[list[Weight]]:
        """Weights that are gathered together."""
        found: dict[tuple[int, int], list[Weight]] = {}
        for weight in self.weights:
            found.setdefault((weight.ranks, weight.nodes), []).append(weight)
        return list(found.values())

    @property
    def here(self) -> int:
        return sum(weight.here for weight in self.weights)

    @property
    def gathered(self) -> int:
        return sum(weight.gathered for weight in self.weights if weight.ranks > 1)

    def gathered_bytes(self, formats: Formats) -> int:
        """What `gathered` takes as it comes."""
        return sum(_came_as(weight, formats) * weight.gathered for weight in self.weights if weight.ranks > 1)


def _came_as(weight: Weight, formats: Formats) -> int:
    """Bytes of each number of a weight that is gathered."""
    is_narrow = weight.narrow and (formats.narrow_linears or len(weight.shape) > 2)
    return (formats.returned if is_narrow else formats.weights).itemsize


def lay_out(setup: Setup) -> list[Part]:
    """All parts of the model as one rank has them; blocks that are alike are laid out once and counted.

    Raises:
        InputError: the ranks cannot share model or batch evenly, or not in this precision.
    """
    require_degrees(setup.parallel, setup.ranks, setup.batch_size, setup.model)
    require_vocabulary(setup.parallel, setup.ranks, setup.model)
    require_precision(setup.parallel, setup.precision)
    what = setup.model, setup.parallel, setup.ranks, setup.per_node
    if (key := repr(what)) not in _laid_out:  # a custom module is a dict, so that no config with one has a hash
        _laid_out[key] = _lay_out(*what)
    return _laid_out[key]


_laid_out: dict[str, list[Part]] = {}


def _lay_out(model: DecoderConfig, parallel: ParallelConfig, ranks: int, per_node: int) -> list[Part]:
    kinds = list(model.layers)
    names: list[Any] = [_name(model, layer.ffn) for layer in kinds]
    if any(asks_for(custom, "layer_index") for custom in custom_modules(model).values()):
        first = list(range(model.num_layers))
    else:
        first = [kinds.index(layer) for layer in kinds]
    with torch.device("meta"):
        blocks = {i: build_block(model, i) for i in set(first)}
    # mixers of other kinds may have the same weights
    alike: dict[Any, list[int]] = {}
    for i in first:
        shapes = tuple((name, weight.shape) for name, weight in blocks[i].named_parameters())
        alike.setdefault((names[i], shapes), []).append(i)
    with torch.device("meta"):
        decoder = Decoder(
            vocab_size=model.vocab_size,
            dim=model.dim,
            blocks=[blocks[layers[0]] for layers in alike.values()],
            tie_embeddings=model.tie_embeddings,
        )
    kinds_of = parameter_kinds(decoder)
    narrow = _narrow(decoder)
    with _spread(decoder, parallel, ranks):
        weights = {
            name: _weight(name, each, kinds_of[name], per_node, name in narrow)
            for name, each in decoder.named_parameters()
        }
        parts = []
        for i, (block, layers) in enumerate(zip(decoder.layers, alike.values(), strict=True)):
            assert isinstance(block, Block)
            own = tuple(weight for name, weight in weights.items() if name.startswith(f"layers.{i}."))
            routed = isinstance(block.ffn, MoE)
            parts.append(Part(names[layers[0]], len(layers), own, *_exchange(block.ffn, per_node), routed))
        outside = tuple(weight for name, weight in weights.items() if not name.startswith("layers."))
    return [Part("", 1, outside), *parts]


def _name(model: DecoderConfig, ffn: Any) -> str:
    if isinstance(ffn, dict):
        return str(ffn["type"]).rpartition(".")[2]
    return "MoE" if ffn == "moe" else f"dense {model.ffn_width(ffn)}"


def _narrow(decoder: Decoder) -> set[str]:
    """Names of the weights that are gathered in the dtype of products, in a mixed run."""
    from moesaic.parallel.apply import working_narrow

    blocks = [block for block in decoder.layers if isinstance(block, Block)]
    modules = {part for block in blocks for part in working_narrow(block, expert_ranks=1)}
    return {
        f"{name}.{weight}"
        for name, module in decoder.named_modules()
        if module in modules
        for weight, _ in module.named_parameters(recurse=False)
    }


@contextlib.contextmanager
def _spread(decoder: Decoder, parallel: ParallelConfig, ranks: int) -> Iterator[None]:
    """Within, the decoder is spread as on rank 0 of so many."""
    if ranks == 1 or not parallel.shard:
        yield
        return
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from moesaic.parallel.apply import parallelize

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with _OneEmpty():
            parallelize(decoder, parallel, torch.device("cpu"))
        yield
    finally:
        distributed.destroy_process_group()


class _OneEmpty(torch.overrides.TorchFunctionMode):
    """Gives the same empty tensor for all ranks that get nothing of a weight: to make 32,768 of them takes minutes."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[Any, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.new_empty or kwargs or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        key = (args[0].dtype, *args[1:])
        if key not in self._made:
            self._made[key] = func(*args)
        return self._made[key]


def _weight(name: str, weight: Any, kind: ParameterKind, per_node: int, narrow: bool) -> Weight:
    shape = tuple(weight.shape)
    if not is_sharded(weight):
        return Weight(name, shape, kind, weight.numel(), None, 1, 1, narrow)
    # FSDP2's dimension of a mesh is the first
    ranks, nodes = _reach(weight.device_mesh, 0, per_node)
    shared, shared_dim = 1, None
    if weight.device_mesh.ndim > 1 and (shared_dim := getattr(weight.placements[1], "dim", None)) is not None:
        shared = weight.device_mesh.size(1)
    sharding_dim = weight.placements[0].dim
    return Weight(name, shape, kind, held(weight).numel(), sharding_dim, ranks, nodes, narrow, shared, shared_dim)


def _exchange(ffn: nn.Module, per_node: int) -> tuple[int, int]:
    """Ranks that share the experts of a layer, and over how many nodes they are spread."""
    weight: Any = next(ffn.experts.parameters(), None) if isinstance(ffn, MoE) else None
    names = weight.device_mesh.mesh_dim_names if is_sharded(weight) else ()
    return _reach(weight.device_mesh, names.index("ep"), per_node) if "ep" in names else (1, 1)


def _reach(mesh: Any, dim: int, per_node: int) -> tuple[int, int]:
    """Ranks along a dimension of a mesh, and the most nodes that any such row of ranks touches."""
    rows = mesh.mesh.movedim(dim, -1).reshape(-1, mesh.size(dim))
    nodes = (rows // per_node).sort(dim=1).values
    return mesh.size(dim), int((nodes.diff(dim=1) != 0).sum(1).max()) + 1


# ---- what it sends


class Collective(NamedTuple):
    """What ranks send each other for one part of the model, the same `times` per step. Bytes."""

    operation: Literal["all-gather", "reduce-scatter", "all-to-all", "all-reduce"]
    what: str
    part: Part
    times: int
    """Per layer."""
    message: int
    """The whole of it: what is gathered, what is summed, or what a rank sends, its share for itself included."""
    ranks: int
    nodes: int

    @property
    def received(self) -> float:
        """Bytes that a rank receives in a step."""
        return self._volume * (self.ranks - 1) / self.ranks

    @property
    def network(self) -> float:
        """The part of `received` that comes from other nodes: at least so much, as a node gets nothing twice.

        What is gathered enters a node once, by the cards of all ranks that it has. So do sums.
        """
        here = self.ranks / self.nodes
        away = 1 - here / self.ranks
        return self._volume * (away if self.operation == "all-to-all" else away / here)

    @property
    def nvlink(self) -> float:
        """The part of `received` that comes from the same node, or is handed on in it."""
        return self.received - self.network

    @property
    def _volume(self) -> float:
        return self.part.count * self.times * self.message * (2 if self.operation == "all-reduce" else 1)


def collectives(setup: Setup, parts: list[Part]) -> list[Collective]:
    """All that a rank sends and receives for one micro-batch and its optimizer step, but for a few counts.

    FSDP2 gathers a block's weights before its forward and again before its backward, and those outside of the blocks
    once; it sums each gradient once. Under activation checkpointing rows travel to the experts once more.
    """
    found: list[Collective] = []
    size = setup.formats.weights.itemsize
    copies = setup.ranks > 1 and not setup.parallel.shard
    for part in parts:

        def add(operation: Any, what: str, times: int, message: int, ranks: int, nodes: int, part: Part = part) -> None:
            if ranks > 1 and message:
                found.append(Collective(operation, what, part, times, message, ranks, nodes))

        if copies:
            nodes = math.ceil(setup.ranks / setup.per_node)
            add("all-reduce", "gradients", 1, size * part.here, setup.ranks, nodes)
        is_block = part is not parts[0]
        for group in part.groups:
            ranks, nodes = group[0].ranks, group[0].nodes
            message = sum(_came_as(weight, setup.formats) * weight.gathered for weight in group)
            add("all-gather", "weights", 2 if is_block else 1, message, ranks, nodes)
            sums = size * sum(weight.gathered for weight in group)
            add("reduce-scatter", "gradients", 1, sums, ranks, nodes)
            if setup.optimizer == "muon":
                split = [each for each in group if each.kind == "matrix" and each.stacked != each.here]
                add("all-gather", "for Muon", 1, size * sum(each.gathered for each in split), ranks, nodes)
                parted = [each for each in split if each.stacked != each.gathered]
                add("all-gather", "for Muon", 1, size * sum(each.stacked for each in parted), *_tensor(setup))
        if setup.parallel.tensor > 1:
            for operation, what, times, message in _of_shared_matrices(setup, part, is_block):
                add(operation, what, times, message, *_tensor(setup))
        if part.expert_ranks > 1:
            assert setup.model.moe is not None
            rows = setup.tokens * setup.model.moe.top_k // setup.parallel.tensor
            again = int(setup.checkpoint_activations)
            sent, returned = setup.formats.sent.itemsize, setup.formats.returned.itemsize
            for what, times, message in (
                ("rows to experts", 2 + again, rows * setup.model.dim * sent),
                ("rows back", 2 + again, rows * setup.model.dim * returned),
                ("scores", 2 + again, rows * sent),
                ("counts", 1 + again, setup.model.moe.num_experts * torch.int64.itemsize),
            ):
                add("all-to-all", what, times, message, part.expert_ranks, part.expert_nodes)
    return found


def _tensor(setup: Setup) -> tuple[int, int]:
    """Ranks that share matrices, and over how many nodes they are spread: they stand next to each other."""
    return setup.parallel.tensor, math.ceil(setup.parallel.tensor / setup.per_node)


def _of_shared_matrices(setup: Setup, part: Part, is_block: bool) -> Iterator[tuple[Any, str, int, int]]:
    """What the ranks that share matrices send for a layer: operation, what, times, bytes.

    A matrix whose outputs are shared sums the gradient of its input, and one whose inputs are shared sums its output.
    """
    shared = [each for each in part.weights if each.shared > 1 and len(each.shape) == 2]
    sent, returned = setup.formats.sent.itemsize, setup.formats.returned.itemsize
    stream, again = setup.tokens * setup.model.dim, int(setup.checkpoint_activations)
    if not is_block:  # the embedding and the head share the vocabulary
        yield "all-reduce", "activations", 1, stream * sent
        yield "all-reduce", "their gradients", 1, stream * sent
        yield "all-reduce", "sums of the loss", 1, 3 * setup.tokens * _FP32.itemsize
        return
    outputs = sum(each.shared_dim == 1 for each in shared)
    # what is computed again stops before the last message of a block, which no gradient needs
    ends_in_sum = any(each.name.endswith("down_proj.weight") for each in shared)
    yield "all-reduce", "activations", outputs + again * (outputs - ends_in_sum), stream * returned
    yield "all-reduce", "their gradients", len(shared) - outputs, stream * sent
    if channels := sum(math.prod(each.shape) for each in part.weights if each.name.endswith(".conv.weight")):
        yield "all-reduce", "gradients of channels", 1, channels * setup.formats.weights.itemsize
    if part.has_routed:
        assert setup.model.moe is not None
        yield "all-gather", "of experts", 1 + again * ends_in_sum, stream * returned
        yield "all-gather", "their gradients", 1, (stream + setup.tokens * setup.model.moe.top_k) * sent


# ---- what it holds


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank. `total` adds what is not quite alive at one time, so it is rather too high."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """Whole weights: two blocks, one at work and one on its way, and what is outside of the blocks."""
    unsummed: int
    """Gradients before they are summed over ranks: of two blocks, and of what is outside; of copies, DDP's buckets."""
    casts: int
    """Copies of weights that autocast keeps in bf16 until the backward: of those that do not come to a block so."""
    activations: int
    working: int
    """What one block at work, or the loss, needs beside what is kept."""
    stepping: int
    """What Muon needs for its largest batch of matrices."""

    @property
    def state(self) -> int:
        """What stays from step to step, gradients included."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        passes = self.gathered + self.unsummed + self.casts + self.activations + self.working
        return self.state + max(passes, self.stepping)


def memory(setup: Setup, parts: list[Part]) -> Memory:
    formats = setup.formats
    size, blocks, outside = formats.weights.itemsize, parts[1:], parts[0]
    here = sum(part.count * part.here for part in parts)
    moments = sum(
        part.count * weight.here * (1 if setup.optimizer == "muon" and weight.kind == "matrix" else 2)
        for part in parts
        for weight in part.weights
    )
    copies = setup.ranks > 1 and not setup.parallel.shard
    found = _activations(setup)
    return Memory(
        weights=size * here,
        gradients=size * here,
        optimizer=size * moments,
        gathered=outside.gathered_bytes(formats) + 2 * max(part.gathered_bytes(formats) for part in blocks),
        unsummed=size * (here if copies else outside.gathered + 2 * max(part.gathered for part in blocks))
        + _whole_embedding(setup, outside),
        casts=_casts(setup, blocks) if formats.casts else 0,
        activations=found.kept,
        working=max(found.block, found.loss),
        stepping=_stepping(setup, parts) if setup.optimizer == "muon" else 0,
    )


def _whole_embedding(setup: Setup, outside: Part) -> int:
    """The gradient of a shared embedding, which torch makes for the whole vocabulary and then takes a part of."""
    [embedding] = (each for each in outside.weights if each.name == "embedding.weight")
    return setup.formats.weights.itemsize * math.prod(embedding.shape) if embedding.shared > 1 else 0


def _activations(setup: Setup) -> ActivationEstimate:
    """By the formulas of `moesaic.models.memory`. Under autocast what is kept counts as in fp32, which is a bound.

    With checkpoints it is the stream between blocks, which is in fp32 then. Without them the default model keeps a
    sixth less. A block at work is taken half way between fp32 and bf16.
    """

    model = _share_of(setup.model, setup.parallel.tensor)

    def estimate(dtype: torch.dtype) -> ActivationEstimate:
        return estimate_activations(
            model,
            batch_size=setup.batch_size // setup.owners,
            seq_len=setup.seq_len,
            dtype=dtype,
            checkpoint_activations=setup.checkpoint_activations,
        )

    high = estimate(setup.formats.weights)
    if not setup.formats.casts:
        return high
    low = estimate(setup.formats.returned)
    return ActivationEstimate(high.kept, (high.block + low.block) // 2, high.loss)


def _share_of(model: DecoderConfig, ranks: int) -> DecoderConfig:
    """A model with the heads, widths and vocabulary of one rank: its activations are those of that rank.

    Experts have a share of the rows rather than of the width, which is as many numbers between their matrices.
    """
    if ranks == 1:
        return model
    heads, moe = model.attention, model.moe
    attention = heads
    if heads.mla is None:  # which every rank has whole
        attention = dataclasses.replace(
            heads,
            num_heads=heads.num_heads // ranks,
            num_kv_heads=model.num_kv_heads // ranks,
            head_dim=model.head_dim,
        )
    if moe is not None:
        shared = moe.shared_width // ranks
        moe = dataclasses.replace(moe, hidden_dim=max(1, moe.hidden_dim // ranks), shared_hidden_dim=shared)
    return dataclasses.replace(
        model,
        attention=attention,
        moe=moe,
        padding_token=None,
        hidden_dim=model.hidden_dim // ranks,
        vocab_size=model.vocab_size // ranks,
    )


def _casts(setup: Setup, blocks: list[Part]) -> int:
    """Copies of whole matrices. Autocast keeps those of linear layers until the forward ends, and the graph all.

    Routers compute in fp32.
    """
    return setup.formats.returned.itemsize * sum(
        part.count * weight.gathered
        for part in blocks
        for weight in part.weights
        if weight.kind == "matrix"
        and not (weight.narrow and weight.ranks > 1)
        and (len(weight.shape) == 2 or not setup.checkpoint_activations)
    )


def _stepping(setup: Setup, parts: list[Part]) -> int:
    """Matrices of one shape and layout as one batch in bf16, five products of the smaller side, one gathered weight."""
    batches: dict[Any, tuple[int, int]] = {}
    for part in parts:
        for weight in part.weights:
            if weight.kind == "matrix":
                key = (weight.shape[-2:], weight.ranks, weight.sharding_dim)
                numbers, largest = batches.get(key, (0, 0))
                batches[key] = (numbers + part.count * weight.stacked, max(largest, weight.stacked))
    return max(
        (
            int(_BF16.itemsize * numbers * (1 + 5 * min(shape) / max(shape))) + setup.formats.weights.itemsize * largest
            for (shape, *_), (numbers, largest) in batches.items()
        ),
        default=0,
    )


# ---- all of it


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step of one micro-batch takes."""

    setup: Setup
    parts: list[Part]
    memory: Memory
    collectives: list[Collective]
    account: Account
    optimizer_flops: float
    """FLOPs of Muon on this rank, which orthogonalizes gathered matrices on every rank."""
    uncounted: tuple[str, ...]
    """Dotted paths of custom modules, whose activations have no formula."""

    @property
    def model_flops(self) -> float:
        """Active FLOPs of one rank, forward and backward: what MFU counts."""
        return self._share * self.account.training_flops

    @property
    def _share(self) -> float:
        """Tokens of which this rank makes all the work, as much as it makes of those that others have too."""
        return self.setup.tokens / self.setup.parallel.tensor

    @property
    def flops(self) -> float:
        """All FLOPs of one rank: with Muon's, and with the second forward of activation checkpointing."""
        again = self.account.forward_flops if self.setup.checkpoint_activations else 0.0
        return self.model_flops + self._share * again + self.optimizer_flops

    @property
    def nvlink(self) -> float:
        """Bytes that a rank receives within its node."""
        return math.fsum(each.nvlink for each in self.collectives)

    @property
    def network(self) -> float:
        """Bytes that a rank receives from other nodes."""
        return math.fsum(each.network for each in self.collectives)

    @property
    def padding(self) -> float:
        """Share of the gathered numbers that only fill up shards to one size."""
        gathered = sum(part.count * part.gathered for part in self.parts)
        owners = {weight.ranks for part in self.parts for weight in part.weights}
        if gathered == 0 or owners == {1}:
            return 0.0
        whole = sum(
            part.count * math.prod(weight.shape) / weight.shared
            for part in self.parts
            for weight in part.weights
            if weight.ranks > 1
        )
        return 1 - whole / gathered


def plan(setup: Setup) -> Plan:
    """Lay a training out and add up what it takes.

    Raises:
        InputError: the ranks cannot share model or batch evenly, or not in this precision.
    """
    parts = lay_out(setup)
    return Plan(
        setup=setup,
        parts=parts,
        memory=memory(setup, parts),
        collectives=collectives(setup, parts),
        account=account(setup.model, setup.seq_len),
        optimizer_flops=_muon_flops(parts) if setup.optimizer == "muon" else 0.0,
        uncounted=uncounted(setup.model),
    )


def _muon_flops(parts: list[Part]) -> float:
    """FLOPs of all matrices (k, n), k <= n: a gram matrix, 17 products of (k, k) in five iterations, a last product.

    See `moesaic.training.optimizers.orthogonalizer`.
    """
    total = 0.0
    for part in parts:
        for weight in part.weights:
            if weight.kind == "matrix":
                small, large = sorted(weight.shape[-2:])
                matrices = weight.stacked / (small * large)
                total += part.count * matrices * (4 * small**2 * large + 34 * small**3)
    return total
