"""The built-in kernels."""

from __future__ import annotations

from draftloom.contracts import ComponentInfo
from draftloom.hookspecs import Register, hookimpl

__all__ = ["register_kernels"]

_GATED_DELTA = "draftloom.kernels.gated_delta"
_INPUTS = "draftloom.kernels.gated_delta_inputs"
_NORM = "draftloom.kernels.gated_norm"
_ATTENTION = "draftloom.kernels.verify_attention"
_FEW_ROWS = "draftloom.kernels.few_rows"
_QK = "draftloom.kernels.qk_norm_rope"
_PACKED = "draftloom.kernels.packed_projections.target"
_PACKED_DRAFTER = "draftloom.kernels.packed_projections.drafter"
_KERNELS = (
    ("gated-delta/array", _GATED_DELTA, "token by token, in mlx-lm's order of operations"),
    ("gated-delta/chunked", _GATED_DELTA, "a chunk of tokens at a time, differentiable"),
    ("gated-delta/cuda", _GATED_DELTA, "one launch a block, CUDA"),
    ("gated-delta/metal", _GATED_DELTA, "one launch a block, Metal"),
    ("gated-delta-inputs/array", _INPUTS, "convolution to gates in mlx-lm's order of operations"),
    ("gated-delta-inputs/cuda", _INPUTS, "convolution, SiLU, norms, gates in one launch, CUDA"),
    (
        "gated-delta-inputs/metal",
        _INPUTS,
        "convolution, SiLU, norms, gates in one launch, Metal",
    ),
    ("gated-norm/array", _NORM, "the layer's own norm"),
    ("gated-norm/cuda", _NORM, "RMS norm and gate in one launch, CUDA"),
    ("gated-norm/metal", _NORM, "RMS norm and gate in one launch, Metal"),
    ("few-rows/array", _FEW_ROWS, "MLX's own product"),
    ("few-rows/cuda", _FEW_ROWS, "products of 2 to 32 rows in one launch, tensor cores, CUDA"),
    ("qk-norm-rope/array", _QK, "a drafter's norms and rotary positions one after the other"),
    ("qk-norm-rope/cuda", _QK, "norms and rotary positions of q and k in one launch, CUDA"),
    ("qk-norm-rope/metal", _QK, "norms and rotary positions of q and k in one launch, Metal"),
    ("packed-projections/packed", _PACKED, "every kind of place as one product"),
    ("packed-projections/attention", _PACKED, "queries, keys and values as one product"),
    ("packed-projections/gated-delta", _PACKED, "inputs of gated-delta layers as one product"),
    ("packed-projections/mlp", _PACKED, "gate and up as one product"),
    ("packed-projections/measure", _PACKED, "the kinds that are faster here, timed on load"),
    (
        "replay-verify/on",
        f"{_GATED_DELTA}:deferral",
        "the replay of the last block waits for the next one: one launch, one state",
    ),
    ("packed-drafter/packed", _PACKED_DRAFTER, "what of a drafter reads one input as one product"),
    ("packed-drafter/attention", _PACKED_DRAFTER, "q, k and v of a block as one product"),
    (
        "packed-drafter/context",
        _PACKED_DRAFTER,
        "k and v of a context, of all layers, as one product",
    ),
    ("packed-drafter/mlp", _PACKED_DRAFTER, "gate and up as one product"),
    ("packed-drafter/measure", _PACKED_DRAFTER, "what is faster here, timed on load"),
    ("ssm/stepwise", "draftloom.kernels.ssm", "Mamba-2 verifies token by token, as it decodes"),
    ("ssm/block", "draftloom.kernels.ssm", "Mamba-2 verifies a block at once, as mlx-lm does"),
    ("verify-attention/array", _ATTENTION, "MLX's own attention"),
    ("verify-attention/cuda", _ATTENTION, "two launches whatever the length, tensor cores, CUDA"),
    ("verify-attention/metal", _ATTENTION, "two launches whatever the length, Metal"),
)
"""(operation/implementation, where it is, summary); a module holds it under its own name."""


@hookimpl
def register_kernels(register: Register) -> None:
    """Every implementation of every operation."""
    for name, where, summary in _KERNELS:
        if ":" not in where:
            where += ":" + name.partition("/")[2].replace("-", "_")
        register(name, where, ComponentInfo(name, summary))
