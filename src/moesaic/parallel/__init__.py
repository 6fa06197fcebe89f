"""One training on several processes: how a decoder is laid out over them, and what that asks of the rest.

Nothing here knows Lightning. Modules that need torch's distributed tensors import them where they are used, so that a
run of one process does not.
"""
