"""Experiment runs: configuration, LightningModule, records, verdict. Needs the [train] extra."""
