"""Say what a training takes on many GPUs, without any of them: moesaic plan MODEL devices=N [key=value ...]"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from moesaic.cli.arguments import require_known
from moesaic.cli.common import composed, launch, plain
from moesaic.config import from_mapping
from moesaic.devices import gigabytes
from moesaic.errors import InputError
from moesaic.models import DecoderConfig
from moesaic.overrides import override
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.fitting import MOST_RANKS, all_changes, changes_that_fit
from moesaic.parallel.hardware import HARDWARE, Hardware
from moesaic.parallel.plan import FORMATS, Collective, Plan, Setup, plan
from moesaic.training.config import OptimizerConfig, TrainerConfig, TrainingConfig

__all__ = ["main"]

META = (390e12, 32_768)
"""FLOPs per second and GPU that Meta reports of Behemoth's training in FP8, and on about how many GPUs (Llama 4's blog
post of 2025-04-05). Taken as active FLOPs, which is what MFU counts."""

MEMORY_ROWS = {
    "weights": "its part of them",
    "gradients": "its part of their sums",
    "optimizer": "its part of the moments",
    "gathered": "weights: of two blocks, and outside of them",
    "unsummed": "gradients of the same, before their sum",
    "casts": "bf16 copies by autocast, of what is not sharded",
    "activations": "kept for the backward",
    "working": "beside that, for a block or the loss",
    "stepping": "Muon's largest batch, once these five are gone",
}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where it runs: the keys of the command that are no keys of a run."""

    devices: int = dataclasses.field(metadata={"most": 2**16})
    gpus_per_node: int
    device: str
    memory_gb: float | None
    peak_tflops: float | None
    nvlink_gb_per_s: float | None
    network_gb_per_s: float | None
    mfu: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and value <= 0:
                raise ValueError(f"{name}={value}: must be a number > 0")
        if self.devices > self.gpus_per_node and self.devices % self.gpus_per_node:
            below = self.devices - self.devices % self.gpus_per_node
            raise ValueError(
                f"devices={self.devices}: must be a multiple of gpus_per_node={self.gpus_per_node}, such as {below} "
                f"or {below + self.gpus_per_node}"
            )
        if self.mfu > 1:
            raise ValueError(f"mfu={self.mfu}: must be a share, at most 1")

    def hardware(self, precision: str) -> Hardware:
        """What the device can do, with the numbers that were given.

        Raises:
            InputError: its peak in this precision is not known.
        """
        known, number = HARDWARE[self.device], FORMATS[precision].matmul
        peaks = dict(known.peaks)
        if self.peak_tflops is not None:
            peaks[number] = self.peak_tflops * 1e12
        if number not in peaks:
            raise InputError(
                f"peak_tflops=None: must be given for device={self.device} with trainer.precision={precision}, as its "
                f"peak in {number} is not in our table"
            )
        return dataclasses.replace(
            known,
            memory=known.memory if self.memory_gb is None else self.memory_gb * 1e9,
            peaks=peaks,
            nvlink=known.nvlink if self.nvlink_gb_per_s is None else self.nvlink_gb_per_s * 1e9,
            network=known.network if self.network_gb_per_s is None else self.network_gb_per_s * 1e9,
        )


def read(given: Mapping[str, Any]) -> tuple[_Place, Setup]:
    """The keys of the command.

    Raises:
        InputError: one of them is wrong, by the types of a run.
    """
    ours = [field.name for field in dataclasses.fields(_Place)]
    require_known("device", given["device"], [*HARDWARE])
    place = from_mapping(_Place, {key: given[key] for key in ours})
    vocabulary = given["model"]["vocab_size"]
    if vocabulary is None:
        vocabulary = composed("train", [])["data"]["vocab_size"]
    training = from_mapping(TrainingConfig, given["training"], "training")
    trainer = from_mapping(TrainerConfig, given["trainer"], "trainer")
    return place, Setup(
        model=from_mapping(DecoderConfig, {**given["model"], "vocab_size": vocabulary}, "model"),
        parallel=from_mapping(ParallelConfig, given["parallel"], "parallel"),
        ranks=place.devices,
        per_node=place.gpus_per_node,
        batch_size=training.batch_size,
        seq_len=training.seq_len,
        precision="bf16-mixed" if trainer.precision == "auto" else trainer.precision,
        optimizer=from_mapping(OptimizerConfig, given["optimizer"], "optimizer").name,
        checkpoint_activations=trainer.checkpoint_activations,
    )


def report(given: Mapping[str, Any], name: str, console: Console) -> None:
    """Print the plan.

    Args:
        name: of the model.
    """
    place, setup = read(given)
    hardware = place.hardware(setup.precision)
    found = plan(setup)
    console.print(_memory_table(found, name, place, hardware))
    if found.memory.total > hardware.memory:
        _print_changes(setup, hardware, console)
    if found.collectives:
        console.print(_wire_table(found))
    console.print(_time_table(found, place, hardware, name))
    for line in _notes(found, place, hardware):
        console.print(line, highlight=False)


def _memory_table(found: Plan, name: str, place: _Place, hardware: Hardware) -> Table:
    setup, memory = found.setup, found.memory
    tensor = f"tensor {setup.parallel.tensor}, " if setup.parallel.tensor > 1 else ""
    layout = f"{tensor}expert {setup.parallel.expert}, {'sharded' if setup.parallel.shard else 'copies'}"
    active, checkpointed = found.account.active_parameters, ", checkpointed" if setup.checkpoint_activations else ""
    made = Table(
        title=f"{name}: {found.account.parameters / 1e9:,.2f}B parameters, {active / 1e9:,.2f}B active\n"
        f"{setup.ranks:,} {place.device}, {layout}; micro-batch {setup.batch_size:,} x {setup.seq_len:,} tokens, "
        f"{setup.precision}, {setup.optimizer}{checkpointed}"
    )
    for column in ("on the fullest GPU", "", "what"):
        made.add_column(column, justify="left" if column else "right")
    for row, what in MEMORY_ROWS.items():
        if bytes_ := getattr(memory, row):
            made.add_row(row, gigabytes(bytes_), what)
    verdict = "fits" if memory.total <= hardware.memory else "does not fit"
    made.add_section()
    made.add_row("total", gigabytes(memory.total), f"of {gigabytes(hardware.memory)}: {verdict}")
    numbers = sum(part.count * part.here for part in found.parts)
    made.caption = f"{numbers / 1e6:,.1f}M parameters on it, 1/{found.account.parameters / numbers:,.1f} of all"
    return made


def _print_changes(setup: Setup, hardware: Hardware, console: Console) -> None:
    changes = changes_that_fit(setup, hardware.memory)
    if changes:
        console.print("It would fit with any of:", highlight=False)
    else:
        more = f", nor do more devices up to {MOST_RANKS:,}" if setup.ranks < MOST_RANKS else ""
        console.print(f"Nothing tried makes it fit{more}. With all changes:", highlight=False)
        changes = [all_changes(setup)]
    for keys, changed in changes:
        typed = " ".join(override(key, value) for key, value in keys.items())
        largest = max(MEMORY_ROWS, key=lambda row: getattr(changed.memory, row))
        most = f"{largest} {gigabytes(getattr(changed.memory, largest))}"
        total = gigabytes(changed.memory.total)
        console.print(f"  {typed or 'as it is'}: {total}, the most is {most}", highlight=False, soft_wrap=True)


def _wire_table(found: Plan) -> Table:
    """By part of the model; what travels for the experts, with scores and counts, is one row."""
    made = Table(title="GB that a GPU receives per step", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("", "ranks", "nodes", "a layer", "all", "NVLink", "network"):
        made.add_column(column, justify="right" if column else "left", no_wrap=True)
    for part in found.parts:
        together: dict[tuple[str, int, int], list[Collective]] = {}
        for each in found.collectives:
            if each.part is part:
                what = "rows" if each.operation == "all-to-all" else each.what
                together.setdefault((f" {each.operation} {what}", each.ranks, each.nodes), []).append(each)
        made.add_row(f"{part.count} x {part.name}" if part.name else "embedding, norm, head")
        for (name, ranks, nodes), several in together.items():
            numbers = [sum(getattr(each, key) for each in several) for key in ("received", "nvlink", "network")]
            numbers.insert(0, numbers[0] / part.count)
            made.add_row(name, f"{ranks:,}", f"{nodes:,}", *map(_gigabytes, numbers))
    links = found.nvlink, found.network
    made.add_row("in all", "", "", "", *map(_gigabytes, (sum(links), *links)))
    return made


def _gigabytes(n: float) -> str:
    return f"{n / 1e9:,.3f}" if n < 1e11 else f"{n / 1e9:,.1f}"


def _time_table(found: Plan, place: _Place, hardware: Hardware, name: str) -> Table:
    number = FORMATS[found.setup.precision].matmul
    peak, tokens = hardware.peaks[number], found.setup.batch_size * found.setup.seq_len
    bounds = {"arithmetic": found.flops / peak}
    if found.collectives:
        bounds |= {"NVLink": found.nvlink / hardware.nvlink, "network": found.network / hardware.network}
    limit = max(bounds, key=lambda bound: bounds[bound])
    made = Table(title=f"seconds per step, with {peak / 1e12:,g} TFLOPs per second in {number}")
    for column in ("", "at least", "what"):
        made.add_column(column, justify="right" if column == "at least" else "left")
    made.add_row("arithmetic", _seconds(bounds["arithmetic"]), _flops(found))
    if found.collectives:
        made.add_row("NVLink", _seconds(bounds["NVLink"]), f"at {hardware.nvlink / 1e9:,g} GB/s into each GPU")
        made.add_row("network", _seconds(bounds["network"]), f"at {hardware.network / 1e9:,g} GB/s into each GPU")
    made.add_section()
    most = found.model_flops / bounds[limit] / peak
    speed = f"{tokens / bounds[limit]:,.0f} tokens/s"
    made.add_row("limit", _seconds(bounds[limit]), f"{limit}: at most {speed}, MFU {most:.1%}")
    if place.mfu <= most:
        seconds = found.model_flops / (peak * place.mfu)
        rate = f"{peak * place.mfu / 1e12:,.0f} TFLOPs per GPU"
        made.add_row(f"MFU {place.mfu:.1%}", _seconds(seconds), f"{tokens / seconds:,.0f} tokens/s, {rate}")
    else:
        made.add_row(f"MFU {place.mfu:.1%}", "", "out of reach")
    if name == "behemoth":
        made.add_row("as Meta", _seconds(found.model_flops / META[0]), _as_meta(hardware))
    return made


def _flops(found: Plan) -> str:
    terms = {
        "active": found.model_flops,
        "computed again": found.flops - found.model_flops - found.optimizer_flops,
        "Muon": found.optimizer_flops,
    }
    return "TFLOPs: " + ", ".join(f"{value / 1e12:,.0f} {term}" for term, value in terms.items() if value)


def _as_meta(hardware: Hardware) -> str:
    rate, gpus = META
    shares = [
        f"{rate / hardware.peaks[number]:.1%} of the {number} peak"
        for number in ("fp8", "bf16")
        if number in hardware.peaks
    ]
    return f"{rate / 1e12:g} TFLOPs per GPU in FP8 on about {gpus:,}: MFU {' or '.join(shares)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3g} s" if seconds >= 1e-3 else f"{seconds * 1e3:,.3g} ms"


def _notes(found: Plan, place: _Place, hardware: Hardware) -> list[str]:
    """What is known, and what is assumed."""
    lines = [
        "Exact: weights, gradients, moments, messages, laid out by the code of a run.",
        "Bounds: seconds, with full links, full overlap, nothing sent to a node twice.",
        "Assumed: experts share the tokens evenly; kernels keep what those for CPUs do.",
        "Not counted: fragmentation, CUDA's and NCCL's memory, sums of small counts.",
        f"{place.device}: {hardware.source}.",
    ]
    if found.padding > 0.02:
        lines.append(f"Padding: {found.padding:.0%} of what is gathered only makes shards equal.")
    if found.memory.casts > 0.1 * hardware.memory:
        lines.append("Autocast keeps bf16 copies of all matrices that are not sharded; not in bf16-true.")
    if found.setup.precision == "fp8":
        lines.append("Activations of fp8 are counted as those of bf16-mixed, and all products at the fp8 peak.")
    if found.uncounted:
        lines.append(f"Left out: the activations of {', '.join(found.uncounted)}.")
    return lines


def _task(config: DictConfig) -> None:
    chosen = str(HydraConfig.get().runtime.choices["model"])
    report(plain(config), chosen, Console(emoji=False))


def main(arguments: Sequence[str]) -> None:
    launch("plan", arguments, _task)
