"""A drafter's weights packed into few bits when it is loaded.

The projections of attention and MLP take the bits asked for. `fc`, and any other matrix outside of
those, takes 8: it is a small share of the bytes, and what it gives stands in the context of every
layer for the whole text, while an error in a layer touches one block. Norms, tables that are looked
up and matrices of a few rows stay as they are: packing them would make no product cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from draftloom.errors import Problem, UsageError

__all__ = ["BITS", "GROUP_SIZES", "Packing"]

BITS = (4, 8)
GROUP_SIZES = (64, 32, 128)
"""Group sizes that the kernels know; without one asked for, the first that fits every matrix."""

OUTER_BITS = 8
FEW_ROWS = 32


@attrs.frozen
class Packing:
    """How weights are packed: affine, as mlx-lm does it.

    Attributes:
        bits: of the projections of attention and MLP, 4 or 8.
        group_size: neighbouring weights that share a scale: 32, 64 or 128; None takes 64, or
            another where 64 divides some width not.

    Raises:
        UsageError: another number of bits, or another group size.
    """

    bits: int
    group_size: int | None = None

    def __attrs_post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise UsageError(
                f"a drafter is packed to 4 or 8 bits, got {self.bits!r}", "leave it out for neither"
            )
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise UsageError(
                f"group_size must be 32, 64 or 128, got {self.group_size!r}", "64 is usual"
            )

    @classmethod
    def of(cls, bits: int | None, group_size: int | None) -> Packing | None:
        """The packing that two options ask for; None for none.

        Raises:
            UsageError: a group size without bits, or a value out of its range.
        """
        if bits is not None:
            return cls(bits, group_size)
        if group_size is not None:
            raise UsageError("group_size is given, bits are not", "give bits = 4 or 8")
        return None

    def group_for(self, model: nn.Module) -> int | None:
        """The group size that attention, MLP and `fc` of this network take; None where there is
        none."""
        widths = {module.weight.shape[-1] for path, module in _matrices(model) if _decides(path)}
        wanted = GROUP_SIZES if self.group_size is None else (self.group_size,)
        return next((g for g in wanted if all(w % g == 0 for w in widths)), None)

    def problems(self, model: nn.Module, where: str) -> Iterator[Problem]:
        """Why this network cannot be packed so, in one line. Reads shapes only."""
        if self.group_for(model) is not None:
            return
        sizes = (self.group_size,) if self.group_size else tuple(sorted(GROUP_SIZES))
        # The other sizes are multiples of the smallest: where that divides all, there is a size.
        path, width = next(
            (path, module.weight.shape[-1])
            for path, module in _matrices(model)
            if _decides(path) and module.weight.shape[-1] % min(sizes)
        )
        groups = " or ".join(map(str, sizes))
        message = f"cannot be packed to {self.bits} bits: {path} is {width} wide, no multiple of"
        hint = "leave drafter bits out" if self.group_size is None else "try another group size"
        yield Problem(where, f"{message} {groups}", hint)

    def apply(self, model: nn.Module) -> None:
        """Pack the network in place, one matrix after the other, so that the memory of the plain
        weights goes as it is done.

        Raises:
            UsageError: a matrix cannot be grouped; see `problems`.
        """
        group = self.group_for(model)
        if group is None:
            raise UsageError(str(next(self.problems(model, "drafter"))))
        for path, module in list(_matrices(model)):
            if module.weight.shape[-1] % group:
                continue
            bits = self.bits if _in_sublayer(path) else OUTER_BITS
            packed = module.to_quantized(group_size=group, bits=bits)
            mx.eval(packed.parameters())
            tree: Any = tree_unflatten([(path, packed)])
            model.update_modules(tree)
        mx.clear_cache()

    def describe(self, model: nn.Module) -> str:
        """What is done to this network, for people."""
        outer = "" if self.bits == OUTER_BITS else f", {OUTER_BITS} outside attention and MLP"
        return f"weights packed to {self.bits} bits{outer}, groups of {self.group_for(model)}"


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in sorted(model.named_modules()):
        if isinstance(module, nn.Linear) and (_decides(path) or module.weight.shape[0] >= FEW_ROWS):
            yield path, module


def _decides(path: str) -> bool:
    """Whether a drafter is refused where this matrix cannot be grouped."""
    return path == "fc" or _in_sublayer(path)


def _in_sublayer(path: str) -> bool:
    return any(part in ("self_attn", "mlp") for part in path.split("."))
