"""Every kernel that is compiled for CUDA with no headers, in all variants that checks run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import mlx.core as mx

from draftloom.kernels import few_rows, gated_delta, qk_norm_rope, verify_attention
from draftloom.kernels.backend import Backend
from draftloom.kernels.cuda_program import program
from draftloom.kernels.few_rows import checks as few_rows_checks
from draftloom.kernels.few_rows.launch import Launcher as FewRows
from draftloom.kernels.gated_delta import checks as gated_delta_checks
from draftloom.kernels.gated_delta.launch import Launcher as GatedDelta
from draftloom.kernels.qk_norm_rope import checks as qk_checks
from draftloom.kernels.qk_norm_rope.launch import Launcher as QkNormRope
from draftloom.kernels.verify_attention import checks as attention_checks
from draftloom.kernels.verify_attention.launch import Launcher as Attention

__all__ = ["FAMILIES", "Program"]


@attrs.frozen
class Program:
    """A kernel as a launcher asks for it: the name of its function and the text."""

    name: str
    text: str


@attrs.frozen(eq=False)
class _Recorder:
    """Stands in for what builds kernels: notes texts, computes nothing."""

    found: dict[str, Program] = attrs.field(factory=dict)

    def __call__(self, **parts: Any) -> Callable[..., list[mx.array]]:
        def launch(
            *,
            inputs: list[mx.array],
            output_shapes: list[tuple[int, ...]],
            output_dtypes: list[mx.Dtype],
            template: list[tuple[str, Any]],
            **rest: Any,
        ) -> list[mx.array]:
            text = program(
                parts["name"],
                parts["header"],
                parts["source"],
                [(n, x.dtype, x.ndim) for n, x in zip(parts["input_names"], inputs, strict=True)],
                list(zip(parts["output_names"], output_dtypes, strict=True)),
                template,
            )
            self.found[text] = Program(parts["name"], text)
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    def on(self, backend: Backend) -> Backend:
        """A backend whose kernels are noted here."""
        return attrs.evolve(backend, build=self)


def _gated_delta(recorder: _Recorder) -> None:
    launcher = GatedDelta(recorder.on(gated_delta.cuda.BACKEND))
    for case in gated_delta_checks.CASES:
        block, state, mask = case.arrays()
        for write_state in (True, False):
            tape = launcher.verify(*block, state, mask, write_state=write_state)[1]
            launcher.replay_verify(tape, 1, block, state, mask, write_state=write_state)
        launcher.prefill(*block, state, mask)
        launcher.replay(state, tape, 1)


def _attention(recorder: _Recorder) -> None:
    launcher = Attention(recorder.on(verify_attention.cuda.BACKEND))
    for case in attention_checks.CASES:
        q, k, v, sinks = case.arrays()
        lengths = mx.array(case.lengths)
        launcher.attend(q, k, v, lengths, scale=case.scale, window=case.window, sinks=sinks)


def _few_rows(recorder: _Recorder) -> None:
    launcher = FewRows(recorder.on(few_rows.cuda.BACKEND))
    for case in few_rows_checks.CASES:
        x, weight = case.arrays()
        launcher.product(x, weight)
        launcher.product(x[0], weight)


def _qk_norm_rope(recorder: _Recorder) -> None:
    launcher = QkNormRope(recorder.on(qk_norm_rope.cuda.BACKEND))
    for case in qk_checks.CASES:
        rows, heads, norms, rope = case.arrays()
        launcher.place(rows, heads, norms, qk_norm_rope.Rotation(rope, case.offset))


def _recorded(run: Callable[[_Recorder], None]) -> Callable[[], list[Program]]:
    def programs() -> list[Program]:
        recorder = _Recorder()
        run(recorder)
        return list(recorder.found.values())

    return programs


FAMILIES: dict[str, Callable[[], list[Program]]] = {
    "gated-delta": _recorded(_gated_delta),
    "verify-attention": _recorded(_attention),
    "few-rows": _recorded(_few_rows),
    "qk-norm-rope": _recorded(_qk_norm_rope),
}
"""By operation: what its kernels are."""
