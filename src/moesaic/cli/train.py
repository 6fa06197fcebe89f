"""Train a model: moesaic train [experiment=NAME] [key=value ...]; -m for a sweep. See conf/train.yaml."""

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from moesaic.cli.common import launch, plain
from moesaic.errors import InputError
from moesaic.files import write_json, write_yaml
from moesaic.studies.sweep import write_report
from moesaic.training.lightning_options import as_additions
from moesaic.training.run import resolve_resume, run

__all__ = ["main", "train", "train_in_sweep"]

sweeps: dict[Path, int] = {}
"""Directory of each sweep of this process and how many of its runs failed."""


def train(config: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """One run of a composed config; returns its final metrics.

    When resuming, the stored config of the run counts; `overrides` (key=value) that contradict it are refused.
    """
    if "study" in config:
        raise InputError(f"this is a study: moesaic study experiment=study_{config['name']}")
    if config.get("resume"):
        stored, _ = resolve_resume(config)
        for override in overrides:
            key, _, value = override.lstrip("+").partition("=")
            if key in ("resume", "run_dir", "output_dir", "name", "experiment", "debug", "trust"):
                continue
            found = OmegaConf.select(OmegaConf.create(stored), key)
            if str(found) != str(OmegaConf.select(OmegaConf.create(config), key)):
                raise InputError(f"{key}={value}: the run to resume has {found!r}; resume continues it unchanged")
    return run(config)


def train_in_sweep(config: dict[str, Any], run_dir: Path) -> None:
    """One run of a sweep: a failure is recorded and the sweep goes on. All have one precision, to be comparable."""
    if config["trainer"]["precision"] == "auto":
        config = {**config, "trainer": {**config["trainer"], "precision": "32-true"}}
    sweeps.setdefault(run_dir.parent, 0)
    try:
        metrics = train({**config, "run_dir": str(run_dir)})
        failed = metrics["status"] not in ("finished", "stopped")
    except Exception as error:
        if not isinstance(error, InputError):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        failed = True
        if not (run_dir / "config.yaml").exists():
            write_yaml(run_dir / "config.yaml", config)
        write_json(run_dir / "metrics.json", {"status": "failed", "error": f"{type(error).__name__}: {error}"})
    sweeps[run_dir.parent] += failed


def _task(config: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        train_in_sweep(plain(config), Path(hydra_config.runtime.output_dir))
    else:
        train(plain(config), list(hydra_config.overrides.task))


def main(arguments: Sequence[str]) -> None:
    launch("train", as_additions(arguments), _task)
    for directory, failures in sweeps.items():
        print(write_report(directory))
        print(f"written: {directory}/report.md, report.csv, report.png")
        if failures:
            print(f"error: {failures} run(s) of this sweep failed, see the table", file=sys.stderr)
            sys.exit(1)
