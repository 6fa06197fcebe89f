"""The earlier stages of a run on pictures, as runs of their own below its directory."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from moesaic.checkpoints import load_checkpoint
from moesaic.config import from_mapping, require_same, to_mapping
from moesaic.data import load_data
from moesaic.errors import InputError, naming
from moesaic.files import lock, write_yaml
from moesaic.models.config import FORMAT
from moesaic.overrides import command_line, override
from moesaic.training.config import RunConfig
from moesaic.training.fusion_batches import make_batches
from moesaic.training.fusion_config import STAGES
from moesaic.training.fusion_start import stage_of
from moesaic.training.launched import processes
from moesaic.training.prepare import fit_vocabulary, new_run_dir
from moesaic.training.starting import STAGES_FOLDER, Found, busy, find_run, is_finished, require_free

__all__ = ["run_stages", "stage_config"]

Run = Callable[[Found, Console], dict[str, Any]]


def run_stages(found: Found, console: Console, run: Run) -> tuple[Found, dict[str, Any]]:
    """Run the stages that a run needs and that are not finished, in the folder stages of its directory.

    Args:
        run: what trains one of them.

    Returns:
        the run, which begins with the checkpoints of its stages, and nothing; or the run as it was, and the metrics of
        a stage that ended otherwise than finished.

    Raises:
        InputError: what would be refused of any stage, or of the run itself, before the first of them begins.
    """
    with found.naming_config():
        config = from_mapping(RunConfig, found.config)
    if config.fusion is None or found.kind in ("unfinished", "finished"):
        return found, {}
    names = _needed(config)
    if not names:
        return found, {}
    if (number := processes(to_mapping(config.trainer))) > 1:
        raise InputError(
            f"trainer.devices={config.trainer.devices!r}: {number} processes; fusion.stages are trained by one. Train "
            f"{', '.join(f'experiment=fusion_{name}' for name in names)} first, and give fusion.text and fusion.encoder"
        )
    _require_sound(found.config, names)
    run_dir = found.run_dir or _begin(config)
    there = dataclasses.replace(found, kind="begun", run_dir=run_dir, config={**found.config, "run_dir": str(run_dir)})
    taken: dict[str, str | None] = {"text": config.fusion.text, "encoder": config.fusion.encoder}
    with lock(run_dir, busy(run_dir)):
        for name in names:
            place = run_dir / STAGES_FOLDER / name
            console.print(f"[bold]stage[/]   {name}: {place}", highlight=False, soft_wrap=True)
            if not is_finished(place):
                asked = {**stage_config(found.config, name, taken), "run_dir": str(place), "resume": True}
                try:
                    metrics = run(find_run(asked), console)
                except KeyboardInterrupt:
                    line = command_line("train", override("resume", True), override("run_dir", run_dir))
                    console.print(f"to continue all stages:\n  {line}", markup=False, soft_wrap=True, highlight=False)
                    raise
                if metrics["status"] != "finished":
                    return found, metrics
            taken["text" if name == "text" else "encoder"] = str(place / "checkpoints" / "last.ckpt")
    begins = {**there.config, "fusion": {**there.config["fusion"], **taken}}
    return dataclasses.replace(there, config=begins), {}


def stage_config(config: Mapping[str, Any], name: str, taken: Mapping[str, str | None]) -> dict[str, Any]:
    """The config of a stage: that of the run, and what `fusion.stages` says of it.

    Vocabulary, encoder, pictures and captions are those of the run.

    Args:
        taken: the checkpoints that it may begin with, by `text` and `encoder`.
    """
    merged = _merged({**config, "fusion": {**config["fusion"], "stages": {}}}, config["fusion"]["stages"][name])
    begins = {"text": None, "encoder": None} if name == "encoder" else dict(taken)
    shared = {key: config["fusion"][key] for key in ("vision", "pictures") if key in config["fusion"]}
    merged["fusion"] = None if name == "text" else {**merged["fusion"], **shared, **begins}
    if "captions" in config["data"]:
        merged["data"] = {**merged["data"], "captions": config["data"]["captions"]}
    merged["model"] = {**merged["model"], "vocab_size": config["model"].get("vocab_size")}
    return merged


def _merged(mapping: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(mapping)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _needed(config: RunConfig) -> list[str]:
    """The stages that no checkpoint stands for, in their order."""
    fusion = config.fusion
    assert fusion is not None
    given = {"text"} if fusion.text is not None else set()
    if fusion.encoder is not None:
        with naming("fusion.encoder"):
            given |= {"encoder", *(["frozen"] if stage_of(load_checkpoint(fusion.encoder)) == "frozen" else [])}
    needed = [name for name in STAGES if name in fusion.stages and name not in given]
    if "frozen" in needed and fusion.text is None and "text" not in needed:
        raise InputError("fusion.text=None: must be a checkpoint, or fusion.stages.text the settings of one to train")
    return needed


def _require_sound(config: Mapping[str, Any], names: list[str]) -> None:
    """Refuse what is wrong with any stage or with the run itself, its data included."""
    whole = from_mapping(RunConfig, config)
    configs = {"": whole}
    for name in names:
        with naming(f"fusion.stages.{name}"):
            stage = from_mapping(RunConfig, stage_config(config, name, {"text": "(that of stage text)"}))
            if name != "encoder":
                require_same("model: must be that of the run", stage.model, whole.model, ("format",))
            configs[f"fusion.stages.{name}"] = stage
    for name, each in configs.items():
        with naming(name or "this run"):
            data = load_data(each.data)
            size = fit_vocabulary(each, data).vocab_size
            if each.fusion is not None and "text" in names and each.model.get("vocab_size") is None:
                raise InputError(f"model.vocab_size=None: must be {size}, which stage text cannot know")
            batches = make_batches(each, data)
            batches.training(), batches.val_dataloader()


def _begin(config: RunConfig) -> Path:
    """The directory of a new run, with its config, so that resume=true finds it whatever stage it is in."""
    if config.run_dir is not None:
        require_free(Path(config.run_dir))
    run_dir = new_run_dir(config)
    stored = dataclasses.replace(config, model={**config.model, "format": FORMAT})
    write_yaml(run_dir / "config.yaml", to_mapping(stored))
    return run_dir
