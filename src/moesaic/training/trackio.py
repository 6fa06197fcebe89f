"""Rows of a run in Trackio, a tracker that keeps them on the user's machine."""

import importlib
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["TrackioLogger"]


class TrackioLogger(Logger):
    """Sends every logged row to trackio, which begins with the first one.

    Args:
        project: under which trackio keeps the run.
        run_name: of the run; None lets trackio choose.
        arguments: passed on to trackio.init, such as space_id.
    """

    def __init__(self, project: str = "moesaic", run_name: str | None = None, **arguments: Any) -> None:
        super().__init__()
        self._project, self._run_name, self._arguments = project, run_name, arguments
        self._trackio = importlib.import_module("trackio")
        self._run: Any = None

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._run_name or ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._run is None:
            self._run = self._trackio.init(project=self._project, name=self._run_name, **self._arguments)
        self._trackio.log(metrics, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._trackio.finish()
            self._run = None
