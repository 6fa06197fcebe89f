"""Score a checkpoint on any data source: moesaic evaluate CHECKPOINT [data=files data.path=...]

A recall checkpoint: data=associative_recall, with data.task as it was trained.

What each expert takes, and what another checkpoint of the same run routes differently:
moesaic evaluate CHECKPOINT task=specialization output=DIRECTORY [other_checkpoint=PATH]

Long contexts, with switches of the model turned at inference only:
moesaic evaluate CHECKPOINT task=loss_by_position|needle variants=[as_trained,no_temperature,window]
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, track
from rich.table import Column, Table
from torch import Tensor

from moesaic.checkpoints import TrainedModel, load_model
from moesaic.cli.common import launch, plain
from moesaic.config import flatten, from_mapping, require_same, to_mapping
from moesaic.data import AnyEvaluationLoader, Data, DataConfig, Task, TokenStream, load_data, token_strings
from moesaic.data.tokenizers import same_ids
from moesaic.devices import require_accelerator
from moesaic.errors import InputError, reason
from moesaic.evaluation.capacity import capacity_numbers
from moesaic.evaluation.checkpoint_evaluations import (
    checkpoint_digest,
    open_source,
    require_tokenizer,
    run_loss_by_position,
    run_needles,
    summarize_loss_by_position,
    summarize_needle_variants,
)
from moesaic.evaluation.drift import Drift
from moesaic.evaluation.language_modeling import LanguageModelScore, evaluate_split
from moesaic.evaluation.long_context import LossByPositionConfig
from moesaic.evaluation.long_context_plots import plot_needles, plot_variants_by_position
from moesaic.evaluation.needle import NeedleConfig
from moesaic.evaluation.plots import plot_loss_by_position
from moesaic.evaluation.recall import RecallScore, plot_recall, recall_numbers, score_recall
from moesaic.evaluation.routing import load_health
from moesaic.evaluation.specialization import Specialization, file_kinds
from moesaic.evaluation.specialization_plots import plot_specialization
from moesaic.files import make_folder, write_json
from moesaic.layers import Routing
from moesaic.models import Decoder, account
from moesaic.models.custom import custom_modules
from moesaic.reading import read_json

__all__ = ["main"]


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """What a checked task=score or task=specialization works on."""

    config: dict[str, Any]
    model: TrainedModel
    data: Data
    seq_len: int
    digest: str | None
    """Hash of the checkpoint; None without an output."""

    @property
    def split(self) -> TokenStream:
        split: TokenStream = getattr(self.data, self.config["split"])
        return split

    @property
    def trained_length(self) -> int:
        length: int = self.model.run_config["training"]["seq_len"]
        return length


def evaluate(config: dict[str, Any], tell: Callable[[dict[str, Any]], None] = lambda numbers: None) -> dict[str, Any]:
    """Loss in nats per token, bits per byte and router load of a checkpoint, as a plain mapping.

    With task=specialization what explains the choice of expert as well, and drift to other_checkpoint.

    Args:
        tell: called with them before anything is written: a full disk must not cost them.
    """
    _require_score_keys(config)
    given = _open(config)
    decoder = given.model.decoder.to("cuda" if config["accelerator"] == "gpu" else "cpu")
    names = token_strings(given.model.tokenizer)
    specialization = Specialization(given.model.config.vocab_size, names, file_kinds(given.split, given.data.tokenizer))
    watchers: list[Specialization | Drift] = [specialization] if config["task"] == "specialization" else []
    if config["other_checkpoint"] is not None:
        watchers.append(Drift(_other_decoder(config["other_checkpoint"], given.model).to(decoder.device)))
    _make_output(config)
    score = _score(given, decoder, watchers)
    if config["task"] == "specialization" and not score.tokens_per_expert:
        raise InputError(f"task=specialization: {config['checkpoint']} has no MoE layers")
    numbers: dict[str, Any] = {"tokens": score.num_tokens, "seq_len": given.seq_len}  # a loss depends on its windows
    numbers |= {"windows": score.num_windows, "windows_in_split": score.windows_in_split}
    numbers["trained_seq_len"] = given.trained_length
    if custom := custom_modules(given.model.config):
        numbers["custom_modules"] = ", ".join(f"{where}: {module['type']}" for where, module in custom.items())
    numbers |= {"loss": score.loss, "bits_per_byte": score.bits_per_byte}
    for name, counts in score.tokens_per_expert.items():
        numbers[f"router/{name}/max_violation"], numbers[f"router/{name}/dead_share"] = load_health(counts)
    for watcher in watchers:
        numbers |= watcher.numbers()
    recalled: dict[int, RecallScore] = {}
    if given.data.task is not None:
        recalled = score_recall(decoder, given.data.task, given.seq_len, config["batch_size"])
        numbers |= {**recall_numbers(recalled), "recall/chance": given.data.task.chance}
        numbers |= capacity_numbers(score, given.data.task, account(given.model.config, given.seq_len))
    tell(numbers)
    if config["output"]:
        _write(given, numbers, score, recalled, specialization)
    return numbers


def _require_score_keys(config: dict[str, Any]) -> None:
    """Refuse what needs no file to be seen wrong."""
    _require_paths(config)
    if config["other_checkpoint"] is not None and config["task"] != "specialization":
        raise InputError(f"other_checkpoint={config['other_checkpoint']}: only task=specialization has it")
    if config["variants"] != ["as_trained"]:
        raise InputError(f"variants={config['variants']}: they need task=loss_by_position or task=needle")
    if config["split"] not in ("validation", "train"):
        raise InputError(f"split={config['split']!r}: must be one of validation, train")
    for key in ("seq_len", "batch_size", "max_batches"):
        if config[key] is not None and (type(config[key]) is not int or config[key] < 1):
            raise InputError(f"{key}={config[key]!r}: must be an integer >= 1")
    require_accelerator("accelerator", config["accelerator"])


def _open(config: dict[str, Any]) -> _Evaluation:
    """Load checkpoint and data; what does not fit together is refused."""
    data_config = from_mapping(DataConfig, config["data"], "data")
    model = load_model(config["checkpoint"])
    _require_readable(model, data_config, config["checkpoint"])
    digest = checkpoint_digest(config["checkpoint"]) if config["output"] else None
    _require_same_evaluation(config, digest)
    data = load_data(data_config, model.tokenizer)
    if data.vocab_size > model.config.vocab_size:
        raise InputError(
            f"data: token ids up to {data.vocab_size - 1}, but the checkpoint has a vocabulary of "
            f"{model.config.vocab_size}"
        )
    given = _Evaluation(config, model, data, config["seq_len"] or model.run_config["training"]["seq_len"], digest)
    if data.task is None:
        if config["seq_len"] is not None and given.seq_len >= len(given.split.tokens):
            raise InputError(
                f"seq_len={given.seq_len}: longer than the data, the {config['split']} split has "
                f"{len(given.split.tokens)} tokens; it must be shorter"
            )
        return given
    if config["split"] != "validation":
        raise InputError(f"split={config['split']!r}: must be validation, the test sequences of a recall task")
    if config["max_batches"] is not None:
        raise InputError(
            f"max_batches={config['max_batches']}: of a recall task all test sequences are scored; must be null"
        )
    data.task.require_length(given.seq_len, "seq_len")
    return given


def _make_output(config: dict[str, Any]) -> None:
    if config["output"]:
        make_folder(Path(config["output"]), "output")


def _score(given: _Evaluation, decoder: Decoder, watchers: Sequence[Specialization | Drift]) -> LanguageModelScore:
    def watch(routing: Mapping[str, Routing], batch: dict[str, Tensor]) -> None:
        for watcher in watchers:
            watcher.update(routing, batch)

    def show(loader: AnyEvaluationLoader) -> Iterable[dict[str, Tensor]]:
        return track(loader, "evaluating", total=len(loader), console=Console(emoji=False, stderr=True))

    return evaluate_split(
        decoder,
        given.data,
        seq_len=given.seq_len,
        batch_size=given.config["batch_size"],
        split=given.config["split"],
        max_batches=given.config["max_batches"],
        token_bytes=given.model.token_bytes,
        watch=watch,
        show=show,
    )


def _write(
    given: _Evaluation,
    numbers: dict[str, Any],
    score: LanguageModelScore,
    recalled: dict[int, RecallScore],
    specialization: Specialization,
) -> None:
    """Write numbers and pictures into the output directory."""
    output = Path(given.config["output"])
    if given.config["task"] == "specialization":
        plot_specialization(specialization, output / "specialization.png")
        write_json(output / "specialization.json", specialization.counts())
    record = {"config": given.config, "checkpoint_digest": given.digest, **numbers}
    if given.data.task is not None:  # most positions of its sequences have no loss, so none is shown by position
        write_json(output / "evaluation.json", record)
        plot_recall(recalled, output / "recall.png", given.seq_len, given.data.task.chance)
        return
    write_json(output / "evaluation.json", {**record, "loss_by_position": score.loss_by_position})
    chunk = given.model.config.attention.attention_chunk_size
    # not loss_by_position.png: that is the picture of the task of this name, which may have the same directory
    plot_loss_by_position(score.loss_by_position, output / "evaluation.png", given.trained_length, chunk)


PICTURES = ("evaluation.png", "recall.png", "specialization.png")


def _require_same_evaluation(config: dict[str, Any], digest: str | None) -> None:
    """Refuse a directory with an evaluation.json of other settings, or with others' pictures: they'd be overwritten."""
    if not config["output"]:
        return
    path = Path(config["output"]) / "evaluation.json"
    try:
        if not path.exists():
            if found := [name for name in PICTURES if path.with_name(name).exists()]:
                raise InputError(
                    f"{path.with_name(found[0])}: would be overwritten, and {path.name} is not beside it; choose "
                    "another output"
                )
            return
        record = read_json(path)
    except OSError as error:
        raise InputError(f"output={config['output']!r}: cannot be read ({reason(error)})") from error
    try:
        stored = _deciding(record["config"], record["checkpoint_digest"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a result of moesaic evaluate; choose another output") from error
    where = ("checkpoint", "output", "batch_size", "accelerator", "data.cache_dir", "variants")
    choose = "results of another evaluation, choose another output"
    require_same(f"{path}: {choose}", stored, _deciding(config, digest), where)


def _deciding(config: dict[str, Any], digest: str | None) -> dict[str, Any]:
    """The keys that decide what an evaluation finds; a key that is null is as one that is not there."""
    flat = flatten({**config, "checkpoint_digest": digest})
    others = ("loss_by_position", "needle")  # of other tasks
    return {key: value for key, value in flat.items() if value is not None and key.split(".")[0] not in others}


def _require_readable(model: TrainedModel, data: DataConfig, checkpoint: str) -> None:
    """Refuse text that the checkpoint has no tokenizer for, and recall tasks whose ids mean something else to it."""
    task, trained = data.make_task(), from_mapping(DataConfig, model.run_config["data"], "data")
    if task is None:
        require_tokenizer(model, data, checkpoint)
        return
    if model.tokenizer is not None:
        raise InputError(f"data.source={data.source!r}: a recall task, but the checkpoint was trained on text")
    known = trained.make_task()
    if known is not None and (trained.source, _meaning(known)) != (data.source, _meaning(task)):
        raise InputError(
            f"data.source={data.source!r}: its ids mean {_meaning(task)}, but the checkpoint was trained on "
            f"{trained.source!r} with {_meaning(known)}; give data={trained.source} and data.task as in training"
        )


def _meaning(task: Task) -> dict[str, Any]:
    """What the ids stand for, by how many there are of each kind; facts are others wherever any key is."""
    if task.answer_bits is not None:
        return to_mapping(task)
    kinds = {name: getattr(task, name) for name in ("keys", "values", "fillers") if hasattr(task, name)}
    return {**kinds, "all": task.vocab_size}


def _other_decoder(checkpoint: str, model: TrainedModel) -> Decoder:
    """Decoder of a checkpoint that reads the same tokens."""
    other = load_model(checkpoint)
    if not same_ids(other.tokenizer, model.tokenizer):
        raise InputError(f"other_checkpoint={checkpoint}: it has another tokenizer than checkpoint")
    if other.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"other_checkpoint={checkpoint}: it has a vocabulary of {other.config.vocab_size}; checkpoint has one of "
            f"{model.config.vocab_size}"
        )
    return other.decoder


def evaluate_long_context(config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The tasks loss_by_position and needle: numbers per variant."""
    return _evaluate_long_context(config)[0]


def _evaluate_long_context(config: dict[str, Any]) -> tuple[dict[str, dict[str, float]], str]:
    """Numbers per variant, and what has to be known to read them: lengths, and what a guess scores."""
    if config["task"] not in ("loss_by_position", "needle"):
        raise InputError(f"task={config['task']!r}: must be one of score, specialization, loss_by_position, needle")
    _require_paths(config)
    if config["other_checkpoint"] is not None:
        raise InputError(f"other_checkpoint={config['other_checkpoint']}: only task=specialization has it")
    for key in ("seq_len", "max_batches"):
        if config[key] is not None:
            raise InputError(
                f"{key}={config[key]!r}: only task=score and task=specialization have it; "
                f"see the section {config['task']}"
            )
    if type(config["batch_size"]) is not int or config["batch_size"] < 1:
        raise InputError(f"batch_size={config['batch_size']!r}: must be an integer >= 1")
    variants = config["variants"]
    if not isinstance(variants, list) or not all(isinstance(name, str) for name in variants):
        raise InputError(f"variants={variants!r}: must be a list of names and key=value")
    require_accelerator("accelerator", config["accelerator"])
    loss_config = from_mapping(LossByPositionConfig, config["loss_by_position"], "loss_by_position")
    needle_config = from_mapping(NeedleConfig, config["needle"], "needle")
    source = open_source(
        config["checkpoint"],
        from_mapping(DataConfig, config["data"], "data"),
        config["split"],
        "cuda" if config["accelerator"] == "gpu" else "cpu",
    )
    output = Path(config["output"]) if config["output"] else None
    with Progress(console=Console(emoji=False, stderr=True)) as progress:
        bar = progress.add_task(config["task"], total=None)

        def advance(done: int, total: int) -> None:
            progress.update(bar, advance=done, total=total)

        if config["task"] == "needle":
            needles = run_needles(
                source, needle_config, variants, batch_size=config["batch_size"], output=output, advance=advance
            )
            if output is not None:
                plot_needles(needles, output / "needle.png", needle_config, source.train_length)
            lengths = sorted({cell.length for cells in needles.values() for cell in cells})
            caption = (
                f"within and beyond the training length of {source.train_length} tokens, in contexts of "
                f"{', '.join(map(str, lengths))}; ± standard error; chance of accuracy "
                f"{1 / (needle_config.distractors + 1):.4f}, of exact match 0"
            )
            return summarize_needle_variants(needles, needle_config.distractors, source.train_length), caption
        losses = run_loss_by_position(
            source, loss_config, variants, batch_size=config["batch_size"], output=output, advance=advance
        )
    if output is not None:
        plot_variants_by_position(losses, output / "loss_by_position.png", source.train_length)
    first = next(iter(losses.values()))
    caption = (
        f"within and beyond the training length of {source.train_length} tokens, in {len(first.nats)} stretches of "
        f"{first.edges[-1]}; ± standard error"
    )
    return summarize_loss_by_position(losses, source.train_length), caption


def _require_paths(config: dict[str, Any]) -> None:
    if config["checkpoint"] is None:
        raise InputError("checkpoint: missing; give moesaic evaluate RUN/checkpoints/last.ckpt")
    for key in ("checkpoint", "other_checkpoint", "output"):
        if config[key] is not None and not isinstance(config[key], str):
            raise InputError(f"{key}={config[key]!r}: must be a path; before a number or a word like true write ./")


def variants_table(summary: Mapping[str, Mapping[str, float]], title: str, caption: str = "") -> Table:
    """One row per variant; a standard error stands beside its number."""
    wanted = ["within/loss", "beyond/loss", "beyond/bits_per_byte", "within/difference", "beyond/difference"]
    wanted += [f"{place}/{score}" for place in ("within", "beyond") for score in ("accuracy", "exact_match")]
    wanted += ["beyond/accuracy_difference"]
    columns = [key for key in wanted if any(key in numbers for numbers in summary.values())]
    if "beyond/difference" in columns:
        columns.remove("within/difference")
    headings = [key.replace("/", "\n").replace("_", " ") for key in columns]
    table = Table(
        Column("variant", overflow="fold"),
        *headings,
        title=escape(title),
        caption=caption,
    )
    for name, numbers in summary.items():
        cells = []
        for key in columns:
            error = numbers.get(f"{key}_standard_error")
            cell = f"{numbers[key]:.4f}" if key in numbers else "-"
            cells.append(cell if error is None else f"{cell} ± {error:.4f}")
        table.add_row(escape(name), *cells)
    return table


def _task(config: DictConfig) -> None:
    console = Console(emoji=False, width=None if sys.stdout.isatty() else 120)
    if config.task not in ("score", "specialization"):
        summary, caption = _evaluate_long_context(plain(config))
        console.print(variants_table(summary, f"{config.task}: {config.checkpoint}", caption))
        return

    def show(numbers: dict[str, Any]) -> None:
        table = Table("measure", "value", title=escape(str(config.checkpoint)))
        for name, value in numbers.items():
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
        console.print(table)

    evaluate(plain(config), show)


def main(arguments: Sequence[str]) -> None:
    launch("evaluate", arguments, _task)
