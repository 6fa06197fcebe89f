"""Experiment runs: configuration, LightningModule, records, verdict. Needs the [train] extra."""

import importlib.util

if importlib.util.find_spec("lightning") is None:
    raise ModuleNotFoundError("moesaic.training needs Lightning: pip install 'moesaic[train]'", name="lightning")
