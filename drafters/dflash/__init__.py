"""DFlash: a block-diffusion drafter that reads the target's hidden states."""

from .config import DFlashConfig
from .drafter import DFlashDrafter

__all__ = ["DFlashConfig", "DFlashDrafter"]
