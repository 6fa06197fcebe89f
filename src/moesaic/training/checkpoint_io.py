"""How Lightning writes and reads the checkpoints of a run."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from moesaic.checkpoints import load_checkpoint, write_checkpoint

__all__ = ["RunCheckpointIO"]


class RunCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; Lightning's own copies it there from TMPDIR.

    Args:
        start: the checkpoint that the run goes on from, as it was read and translated when the run was prepared.
    """

    def __init__(self, start: dict[str, Any]) -> None:
        self.start = start

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it; the file of that name is the old or the new one at any time."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The start of the run, or the content of another file, tensors only."""
        return self.start or load_checkpoint(path)
