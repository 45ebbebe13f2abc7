"""Checkpoint formats of drafters: config keys and tensor names, read into one description.

A module a format; each has ``read(model)``, which is None for a checkpoint of another format.
"""

from .describe import describe_checkpoint
from .weights import StoredWeights, fill

__all__ = ["StoredWeights", "describe_checkpoint", "fill"]
