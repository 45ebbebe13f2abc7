"""NVRTC, NVIDIA's compiler of kernels at run time, as the library that MLX-CUDA has loaded."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path

import attrs

__all__ = ["SONAMES", "KernelCompileError", "Nvrtc", "find_nvrtc", "load_nvrtc"]

SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
"""Names of the library, in the order in which they are tried."""
_log = logging.getLogger("draftloom.kernels")
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "nvrtcVersion": (ctypes.POINTER(ctypes.c_int),) * 2,
    "nvrtcCreateProgram": (
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ),
    "nvrtcCompileProgram": (ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "nvrtcGetProgramLogSize": (ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)),
    "nvrtcGetProgramLog": (ctypes.c_void_p, ctypes.c_char_p),
    "nvrtcGetCUBINSize": (ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)),
    "nvrtcGetCUBIN": (ctypes.c_void_p, ctypes.c_char_p),
    "nvrtcDestroyProgram": (ctypes.POINTER(ctypes.c_void_p),),
}


class KernelCompileError(RuntimeError):
    """NVRTC refused a kernel; names it and has the compiler's log."""


@attrs.frozen(eq=False)
class Nvrtc:
    """The library; threads may compile at the same time.

    Attributes:
        library: its functions.
        version: as ``13.5``.
    """

    library: ctypes.CDLL
    version: str

    def compile(self, name: str, text: str, options: Sequence[str]) -> bytes:
        """Compile a translation unit to machine code.

        Args:
            name: of the kernel, for the compiler's messages.
            text: CUDA, with no includes.
            options: of the compiler; one of them is ``--gpu-architecture=sm_...``.

        Returns:
            A cubin.

        Raises:
            KernelCompileError: the compiler refuses the text or an option.
        """
        with self._program(name, text) as program:
            given = (ctypes.c_char_p * len(options))(*(one.encode() for one in options))
            failed = self.library.nvrtcCompileProgram(program, len(options), given)
            if failed:
                log = self._contents("nvrtcGetProgramLog", name, program).rstrip(b"\0").decode()
                raise self._refused(f"{name} ({' '.join(options)})", failed, log)
            return self._contents("nvrtcGetCUBIN", name, program)

    @contextmanager
    def _program(self, name: str, text: str) -> Iterator[ctypes.c_void_p]:
        program = ctypes.c_void_p()
        failed = self.library.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None
        )
        if failed:
            raise self._refused(name, failed)
        try:
            yield program
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _contents(self, function: str, name: str, program: ctypes.c_void_p) -> bytes:
        """What a function of the library and its sibling that tells the size give."""
        size = ctypes.c_size_t()
        failed = getattr(self.library, function + "Size")(program, ctypes.byref(size))
        held = ctypes.create_string_buffer(size.value)
        failed = failed or getattr(self.library, function)(program, held)
        if failed:
            raise self._refused(name, failed)
        return held.raw

    def _refused(self, name: str, status: int, log: str = "") -> KernelCompileError:
        word = self.library.nvrtcGetErrorString(status).decode()
        return KernelCompileError(
            f"NVRTC {self.version} cannot compile kernel {name}: {word}\n{log}".rstrip()
        )


@cache
def find_nvrtc() -> Nvrtc | str:
    """The library, looked for once; where none can be loaded, why not, in one line."""
    found = load_nvrtc([*SONAMES, *_installed()])
    if isinstance(found, str):
        _log.info("MLX compiles CUDA kernels, anew in every process: %s", found)
    return found


def load_nvrtc(names: Sequence[str]) -> Nvrtc | str:
    """The first library of these names or paths that is loaded in this process, else the first
    that can be, else why none of them can. (A release of CUDA other than MLX's own may make code
    that the driver does not take.)"""
    reasons = []
    for mode, name in product((os.RTLD_NOLOAD | os.RTLD_NOW, os.RTLD_NOW), names):
        try:
            library = ctypes.CDLL(name, mode)
        except OSError as error:
            reasons.append(str(error))
            continue
        for function, types in _SIGNATURES.items():
            getattr(library, function).argtypes = types
        library.nvrtcGetErrorString.argtypes = (ctypes.c_int,)
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return Nvrtc(library, f"{major.value}.{minor.value}")
    return "; ".join(reasons[len(names) :])


def _installed() -> list[str]:
    """The libraries of NVIDIA's Python packages, for where nothing has loaded one yet."""
    found = importlib.util.find_spec("nvidia")
    folders = () if found is None else found.submodule_search_locations or ()
    below = ("cu13/lib", "cuda_nvrtc/lib")
    files = [Path(folder, lib, name) for folder in folders for lib in below for name in SONAMES]
    return [str(file) for file in files if file.is_file()]
