"""What of the device decides between two ways of doing the same, and how much memory it has."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx

__all__ = ["backend_name", "default_limit", "device_memory", "on_cuda", "on_gpu"]

MEMORY_KEYS = ("max_recommended_working_set_size", "total_memory", "memory_size")
"""What `mx.device_info` calls the memory that a model may take, by backend."""
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
HOST_MEMORY = Path("/proc/meminfo")


def backend_name() -> str:
    """The backend that MLX has: ``metal``, ``cuda`` or ``cpu``, whatever the default device."""
    return "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "cpu"


def on_gpu() -> bool:
    """Whether arrays are computed by a GPU here."""
    on: bool = mx.default_device() == mx.Device(mx.gpu)
    return on


def on_cuda() -> bool:
    """Whether arrays are computed by MLX-CUDA here."""
    return on_gpu() and mx.cuda.is_available()


def device_memory() -> int | None:
    """Bytes that models may take on the device that is used; None where nothing says."""
    if mx.default_device() != mx.Device(mx.cpu):
        details = mx.device_info()
        found = next((details[key] for key in MEMORY_KEYS if key in details), None)
        if found is not None:
            return int(found)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        return min(memory, int(CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return memory


def default_limit() -> int | None:
    """`device_memory`, and where the host's own memory is used, no more than it has to spare."""
    memory = device_memory()
    if memory is None or mx.default_device() != mx.Device(mx.cpu):
        return memory
    try:
        lines = dict(line.split(":", 1) for line in HOST_MEMORY.read_text().splitlines())
        spare = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return memory
    return min(memory, mx.get_active_memory() + mx.get_cache_memory() + spare)
