"""Examples that ship with the package: custom modules that an experiment names by dotted path."""
