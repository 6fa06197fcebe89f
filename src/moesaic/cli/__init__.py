"""The commands, one module each: moesaic <command> [key=value ...]."""
