"""Inputs for verify attention, and what is right: for the emulated tests and those on a GPU."""

from __future__ import annotations

import attrs
import mlx.core as mx

from draftloom.kernels.verify_attention import reference

__all__ = ["CASES", "TOLERANCE", "Case", "error", "inputs", "poisoned", "truth"]

TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 6e-3}
"""Relative error (norm of the difference over norm) against the float32 reference. Outputs and, in
the kernels, softmax weights are rounded to the dtype of q."""


@attrs.frozen
class Case:
    """A call.

    Attributes:
        kind: "fp32", "fp16" or "bf16".
        heads: Hq and Hkv.
        queries: M.
        lengths: valid keys of each row of the batch.
        allocated: N.
        size: D.
        window: or None.
        sinks: whether there are some.
    """

    kind: str
    heads: tuple[int, int]
    queries: int
    lengths: tuple[int, ...]
    allocated: int
    size: int
    window: int | None = None
    sinks: bool = False

    @property
    def dtype(self) -> mx.Dtype:
        """Of queries, keys and values."""
        return {"fp32": mx.float32, "fp16": mx.float16, "bf16": mx.bfloat16}[self.kind]

    @property
    def scale(self) -> float:
        """The usual one."""
        return float(self.size**-0.5)

    def __str__(self) -> str:
        heads, lengths = "of".join(map(str, self.heads)), "+".join(map(str, self.lengths))
        name = f"{self.kind}-H{heads}-M{self.queries}-N{lengths}in{self.allocated}-D{self.size}"
        name += f"-window{self.window}" if self.window else ""
        return name + ("-sinks" if self.sinks else "")


CASES = (
    Case("fp32", (2, 2), 1, (1,), 3, 64),  # a first token
    Case("bf16", (4, 1), 1, (77,), 128, 128),  # plain decoding
    Case("fp32", (4, 2), 5, (41,), 64, 64),
    Case("bf16", (4, 1), 16, (70,), 80, 256),  # the shape of the bar: 64 packed rows
    Case("fp32", (4, 1), 9, (50,), 50, 256, sinks=True),
    Case("fp16", (6, 2), 7, (63, 40, 7), 96, 128, sinks=True),
    Case("bf16", (8, 1), 13, (90, 61), 97, 64, window=11),  # 104 rows: two threadgroups
    Case("fp16", (2, 1), 32, (129,), 160, 64, window=40, sinks=True),
    Case("bf16", (3, 1), 11, (65,), 300, 128, window=1),
)
"""Odd lengths, one row and many, keys that fill their buffer and keys that do not."""


def inputs(case: Case, seed: int = 3) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
    """q [B, Hq, M, D], keys and values [B, Hkv, N, D], sinks [Hq] or None."""
    mx.random.seed(seed)
    rows, (heads, key_heads) = len(case.lengths), case.heads
    q = 2 * mx.random.normal((rows, heads, case.queries, case.size))
    k, v = (mx.random.normal((rows, key_heads, case.allocated, case.size)) for _ in range(2))
    sinks = mx.random.normal((heads,)).astype(case.dtype) if case.sinks else None
    made = tuple(x.astype(case.dtype) for x in (q, k, v))
    mx.eval(*made)
    return (*made, sinks)


def poisoned(case: Case, keys: mx.array) -> mx.array:
    """Keys or values with NaN past the valid ones."""
    lengths = mx.array(case.lengths)[:, None, None, None]
    valid = mx.arange(case.allocated)[:, None] < lengths
    return mx.where(valid, keys, mx.array(float("nan"), keys.dtype))


def truth(case: Case) -> mx.array:
    """The reference, on the CPU: [B, Hq, M, D] float32."""
    with mx.stream(mx.cpu):
        q, k, v, sinks = inputs(case)
        lengths = mx.array(case.lengths)
        exact = reference.attend(
            q, k, v, lengths, scale=case.scale, window=case.window, sinks=sinks
        )
        mx.eval(exact)
    return exact


def error(found: mx.array, exact: mx.array) -> float:
    """Relative error; NaN counts as infinite."""
    with mx.stream(mx.cpu):
        gap = found.astype(mx.float32) - exact
        size = mx.sqrt((gap * gap).sum() / (exact * exact).sum()).item()
    return size if size == size else float("inf")
