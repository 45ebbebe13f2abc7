"""Runs Metal kernel bodies on the CPU; see emulator.py."""

from __future__ import annotations

import re
import shutil

import pytest

from draftloom.kernels.backend import CUDA_BUILTINS

__all__ = ["builtins_in", "cuda_prelude", "needs_compiler"]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
"""Marks what compiles a kernel's body as C++."""


def builtins_in(text: str) -> set[str]:
    """Metal's own words in a kernel's header and body."""
    words = r"\b(?:simd_\w+|simdgroup_\w+|thread\w*_\w+|metal::\w+|fast::\w+)"
    return set(re.findall(words, text))


def cuda_prelude(prelude: str) -> str:
    """What of CUDA's prelude C++ can compile: everything but the builtins."""
    words = "#define __device__\n#define __forceinline__ inline\n"
    return words + prelude.removeprefix(CUDA_BUILTINS)
