"""Keys of a run config that define the experiment: those that can change what a run computes."""

from collections.abc import Mapping
from typing import Any

from moesaic.config import flatten

__all__ = ["defining"]

KEYS = frozenset(
    {
        *("name", "output_dir", "run_dir", "resume", "finish", "data.cache_dir"),
        *("training.log_every", "training.checkpoint_every"),
        *("trainer.accelerator", "trainer.strategy", "trainer.threads", "trainer.keep_freed_memory"),
        *("trainer.profiler", "trainer.detect_anomaly", "trainer.num_sanity_val_steps"),
        *("trainer.enable_progress_bar", "trainer.enable_model_summary"),
    }
)
"""Keys that say where a run happens and what is seen of it."""

SECTIONS = ("sample", "logger", "parallel")
"""Sections that decide what is shown of a run, or how several processes share it."""

WATCHERS = frozenset(
    {
        *("DeviceStatsMonitor", "LearningRateMonitor", "ThroughputMonitor"),
        *("ModelCheckpoint", "OnExceptionCheckpoint", "ModelSummary", "RichModelSummary"),
        *("ProgressBar", "RichProgressBar", "TQDMProgressBar"),
    }
)
"""Callbacks of Lightning that only watch. Any other may change what is computed."""


def defining(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a run config that define the experiment, by dotted path.

    How many devices there are is one of them, because sums over them round otherwise; which ones is not.
    """
    callbacks = config.get("callbacks")
    if isinstance(callbacks, Mapping):
        callbacks = {name: each for name, each in callbacks.items() if not _only_watches(each)}
    flat = flatten({**config, "callbacks": callbacks} if "callbacks" in config else config)
    if isinstance(devices := flat.get("trainer.devices"), (list, tuple)):
        flat["trainer.devices"] = len(devices)
    return {key: value for key, value in flat.items() if key not in KEYS and key.split(".")[0] not in SECTIONS}


def _only_watches(callback: Any) -> bool:
    target = callback.get("_target_") if isinstance(callback, Mapping) else None
    return str(target).rpartition(".")[2] in WATCHERS
