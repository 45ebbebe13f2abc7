"""Compiled CUDA kernels on disk: a file each, whose name says all that it was made of."""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from pathlib import Path

from draftloom.user_files import cache_folder, write_whole

__all__ = ["cubin_folder", "keep", "kept"]

_log = logging.getLogger("draftloom.kernels")
_DIGEST = hashlib.sha256().digest_size


def cubin_folder() -> Path:
    """Where compiled kernels are kept: ``draftloom/cuda`` in XDG_CACHE_HOME or ~/.cache."""
    return cache_folder() / "cuda"


def kept(folder: Path, name: str) -> bytes | None:
    """The cubin kept under a name; None where there is none, or not the one that was written."""
    file = folder / f"{name}.cubin"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _say_once(folder, f"cannot be read: {error}")
        return None
    digest, cubin = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(cubin).digest() == digest:
        return cubin
    _log.warning("%s is damaged; the kernel is compiled again", file)
    return None


def keep(folder: Path, name: str, cubin: bytes) -> None:
    """Write a cubin under a name, whole or not at all. Where that cannot be done, the log says so
    once, and the next process compiles it again."""
    try:
        write_whole(folder / f"{name}.cubin", hashlib.sha256(cubin).digest() + cubin)
    except OSError as error:
        _say_once(folder, f"cannot be written: {error}")


@cache
def _say_once(folder: Path, what: str) -> None:
    _log.warning("compiled CUDA kernels are not kept: %s %s", folder, what)
