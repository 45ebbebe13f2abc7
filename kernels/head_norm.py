"""What kernels have in common whose simdgroups norm one head each."""

from __future__ import annotations

from typing import ClassVar

import attrs
import mlx.core as mx

__all__ = ["HeadNormRequest", "HeadNormVariant"]

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@attrs.frozen
class HeadNormRequest:
    """What a call asks of such a kernel.

    Attributes:
        dtype: of what is normed.
        size: numbers of a head.
        plain: whether norms and all else of the layer are those that the kernel computes.
        device: "cpu" or "gpu", the default device.
    """

    dtype: mx.Dtype
    size: int
    plain: bool
    device: str

    def why_not(self, name: str, otherwise: str) -> str | None:
        """Why the body cannot serve it, or None if it can.

        Args:
            name: what the kernel calls the size.
            otherwise: what to say of a layer that is not plain.
        """
        if self.size % 32 or not 32 <= self.size <= 256:
            return f"{name} = {self.size}: the kernel needs a multiple of 32 up to 256"
        if self.dtype not in _FLOATS:
            return f"dtype {self.dtype}: the kernel takes float32, float16 and bfloat16"
        return None if self.plain else otherwise


@attrs.frozen(cache_hash=True)
class HeadNormVariant:
    """Such a kernel for one epsilon.

    Attributes:
        name: a short one; the backend adds a digest of the source.
        inputs, outputs: names, in order.
        body: has ``@EPS@`` where the epsilon goes.
        eps: added to the mean square; written into the source, since a kernel's template values
            are whole numbers.
    """

    name: ClassVar[str]
    inputs: ClassVar[list[str]]
    outputs: ClassVar[list[str]]
    body: ClassVar[str]
    eps: float

    @property
    def source(self) -> str:
        """The body, as handed to MLX for either backend."""
        return self.body.replace("@EPS@", f"{self.eps:.9e}f")
