"""Models of a hub: config first, weights when they are wanted, nothing half done, no code run."""

from .cached import Stored, cached, cached_names, stored
from .client import Hub
from .files import again, check_config
from .repository import Repository

__all__ = [
    "Hub",
    "Repository",
    "Stored",
    "again",
    "cached",
    "cached_names",
    "check_config",
    "stored",
]
