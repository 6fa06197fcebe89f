"""The one exception for bad input: scripts print it without a traceback."""

__all__ = ["InputError"]


class InputError(ValueError):
    """What a person gave (config key, file, checkpoint, shape) cannot be used.

    The message names the key or file, says what was found and what is allowed.
    """
