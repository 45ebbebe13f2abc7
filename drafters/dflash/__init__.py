"""DFlash: a block-diffusion drafter that reads the target's hidden states."""

from .block import BlockContext, LoadedDrafter, embedding_factor, load_drafter, load_network
from .drafter import DFlashDrafter
from .model import DFlashModel

__all__ = [
    "BlockContext",
    "DFlashDrafter",
    "DFlashModel",
    "LoadedDrafter",
    "embedding_factor",
    "load_drafter",
    "load_network",
]
