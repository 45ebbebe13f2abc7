"""Models of a hub: config first, weights when they are wanted, nothing half done, no code run."""

from .client import Hub
from .files import check_config
from .repository import Repository

__all__ = ["Hub", "Repository", "check_config"]
