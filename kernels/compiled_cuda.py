"""CUDA kernels that draftloom compiles itself and keeps on disk.

MLX compiles a custom kernel anew in every process, with headers that take seconds to read.
`cuda_kernel` takes the same arguments as ``mx.fast.cuda_kernel`` and gives what is called alike;
its text includes nothing (:mod:`.cuda_program`), and the machine code is kept (:mod:`.cubins`).

Two kinds of kernels are MLX's still: those that read inputs through their strides, which nobody
knows but MLX when it launches them; and all of them where NVRTC cannot be loaded.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx

from .cubins import cubin_folder, keep, kept
from .cuda_program import program, shaped_inputs
from .nvrtc import Nvrtc, find_nvrtc

__all__ = [
    "CompiledKernel",
    "CudaKernels",
    "Launch",
    "architecture",
    "cuda_kernel",
    "kernels_compiled",
]

Launch = Callable[..., list[mx.array]]
"""``mx.fast.precompiled_cuda_kernel``, or what is called like it."""
_COMPILED: list[str] = []


@attrs.frozen
class CudaKernels:
    """Makes kernels, as ``mx.fast.cuda_kernel`` does.

    Attributes:
        compiler: gives NVRTC, or why there is none.
        mlx: makes the kernels that are MLX's still.
    """

    compiler: Callable[[], Nvrtc | str] = find_nvrtc
    mlx: Callable[..., Any] = mx.fast.cuda_kernel

    def __call__(
        self,
        *,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
    ) -> Callable[..., list[mx.array]]:
        """A kernel; compiled at its first launch with each set of template values, dtypes and
        numbers of axes.

        Args:
            name: unique to the source.
            input_names: of the arguments, in order.
            output_names: likewise.
            source: the body.
            header: what goes before the function.
            ensure_row_contiguous: whether inputs that are not contiguous are copied first. False
                means that the body reads strides: MLX compiles it.
        """
        found = self.compiler()
        if isinstance(found, str) or not ensure_row_contiguous:
            kernel: Callable[..., list[mx.array]] = self.mlx(
                name=name,
                input_names=input_names,
                output_names=output_names,
                source=source,
                header=header,
                ensure_row_contiguous=ensure_row_contiguous,
            )
            return kernel
        return _one_of_each(name, tuple(input_names), tuple(output_names), source, header, found)

    def how(self) -> str:
        """Who compiles kernels here, in one line."""
        found = self.compiler()
        if isinstance(found, str):
            return f"by MLX, anew in every process: {found}"
        return f"by NVRTC {found.version}, kept in {cubin_folder()}"


cuda_kernel = CudaKernels()
"""What the built-in kernels are made with."""


def kernels_compiled() -> int:
    """How many kernels this process has compiled itself; what was found on disk is not counted."""
    return len(_COMPILED)


@cache
def architecture() -> str:
    """Of the GPU, as ``sm_90``."""
    return str(mx.device_info(mx.Device(mx.gpu))["architecture"])


@lru_cache(maxsize=1024)
def _one_of_each(*parts: Any) -> CompiledKernel:
    """Plans for many shapes share what is compiled of one source."""
    return CompiledKernel(*parts)


@attrs.frozen
class _Compiled:
    """One kernel for MLX: the name of its function, and its machine code."""

    name: str
    cubin: bytes = attrs.field(repr=False)


@attrs.define(eq=False)
class CompiledKernel:
    """A kernel on CUDA; threads may launch it at the same time.

    Attributes:
        name: unique to the source.
        input_names: of the arguments, in order.
        output_names: likewise.
        source: the body.
        header: what goes before the function.
        compiler: of the text.
        launch: called to run what is compiled; None is ``mx.fast.precompiled_cuda_kernel``.
        folder: where compiled kernels are kept, or None for `cubin_folder`.
        architecture: tells what device to compile for.
    """

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    compiler: Nvrtc
    launch: Launch | None = None
    folder: Path | None = None
    architecture: Callable[[], str] = architecture
    _shaped: tuple[int, ...] = attrs.field(init=False)
    _ready: dict[Any, _Compiled] = attrs.field(init=False, factory=dict)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock)

    def __attrs_post_init__(self) -> None:
        self._shaped = shaped_inputs(self.input_names, self.source)

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] = (),
        init_value: float | None = None,
    ) -> list[mx.array]:
        """Launch, as a kernel of ``mx.fast.cuda_kernel`` is launched; lazy.

        Args:
            inputs: as many as there are names.
            output_shapes: of each output.
            output_dtypes: likewise.
            grid: threads, by axis.
            threadgroup: threads of a threadgroup, by axis.
            template: names and values that the body is compiled with.
            init_value: what outputs hold before; None leaves them as allocated.

        Raises:
            KernelCompileError: the compiler refuses the source.
            ValueError: other numbers of inputs or outputs than names, or an unknown dtype.
        """
        shapes = [inputs[i].shape for i in self._shaped]
        key = (
            tuple(template),
            tuple([x.dtype for x in inputs]),
            tuple(output_dtypes),
            tuple([len(shape) for shape in shapes]),
        )
        made = self._ready.get(key)
        if made is None:
            made = self._make(key, inputs, output_dtypes, template)
        run = self.launch or mx.fast.precompiled_cuda_kernel
        return run(
            name=made.name,
            compiled_source=made.cubin,
            inputs=inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            scalars=[length for shape in shapes for length in shape],
            grid=grid,
            threadgroup=threadgroup,
            init_value=init_value,
            ensure_row_contiguous=True,
        )

    def _make(
        self,
        key: Any,
        inputs: Sequence[mx.array],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, Any]],
    ) -> _Compiled:
        """Compile, unless another thread or process has; the first of two threads does it."""
        with self._lock:
            if key not in self._ready:
                named = zip(self.input_names, inputs, strict=True)
                arguments = [(name, x.dtype, x.ndim) for name, x in named]
                outputs = list(zip(self.output_names, output_dtypes, strict=True))
                self._ready[key] = self._compiled(arguments, outputs, template)
            return self._ready[key]

    def _compiled(
        self,
        inputs: Sequence[tuple[str, mx.Dtype, int]],
        outputs: Sequence[tuple[str, mx.Dtype]],
        template: Sequence[tuple[str, Any]],
    ) -> _Compiled:
        """MLX tells modules apart by name alone, and so does the folder: the name has a digest of
        the text and of who compiles it for what."""
        options = [f"--gpu-architecture={self.architecture()}"]
        parts = (self.name, self.header, self.source, inputs, outputs, template)
        made_of = "\0".join([self.compiler.version, *options, program(*parts)])
        name = f"{self.name}_{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
        folder = self.folder or cubin_folder()
        cubin = kept(folder, name)
        if cubin is None:
            cubin = self.compiler.compile(name, program(name, *parts[1:]), options)
            _COMPILED.append(name)
            keep(folder, name, cubin)
        return _Compiled(name, cubin)
