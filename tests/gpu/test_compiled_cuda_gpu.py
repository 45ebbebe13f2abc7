"""Kernels that draftloom compiles itself, on the GPU that is here: the bits of those that MLX
compiles of the same sources, and nothing to compile in a second process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import pytest

from draftloom.kernels import few_rows, gated_delta, verify_attention
from draftloom.kernels.few_rows import checks as few_rows_checks
from draftloom.kernels.few_rows.launch import Launcher as FewRows
from draftloom.kernels.gated_delta import checks as gated_delta_checks
from draftloom.kernels.gated_delta.launch import Launcher as GatedDelta
from draftloom.kernels.nvrtc import find_nvrtc
from draftloom.kernels.verify_attention import checks as attention_checks
from draftloom.kernels.verify_attention.launch import Launcher as Attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mx.cuda.is_available(), reason="for CUDA"),
]

FRESH = """
import mlx.core as mx
from draftloom.kernels import gated_delta
from draftloom.kernels.gated_delta import checks
from draftloom.kernels.compiled_cuda import kernels_compiled
for case in checks.KERNEL_CASES:
    block, state, mask = case.arrays()
    y, tape, end = gated_delta.cuda.LAUNCHER.verify(*block, state, mask)
    mx.eval(y, tape.delta, end)
    print(mx.sum(y.astype(mx.float32)).item())
print("compiled", kernels_compiled())
"""


def by_mlx(backend: Any) -> Any:
    return attrs.evolve(backend, build=mx.fast.cuda_kernel)


def same(own: list[mx.array], theirs: list[mx.array]) -> bool:
    """Whether all bits are; NaN too."""
    pairs = zip(own, theirs, strict=True)
    return all(mx.array_equal(a, b, equal_nan=True).item() for a, b in pairs)


@pytest.mark.parametrize("case", gated_delta_checks.KERNEL_CASES, ids=str)
def test_gated_delta_gives_the_same_bits(case: gated_delta_checks.Case) -> None:
    block, state, mask = case.arrays()
    found = []
    for backend in (gated_delta.cuda.BACKEND, by_mlx(gated_delta.cuda.BACKEND)):
        launcher = GatedDelta(backend)
        y, tape, end = launcher.verify(*block, state, mask)
        again = launcher.replay_verify(tape, 1, block, state, mask, write_state=True)
        replayed = launcher.replay(state, tape, case.tokens)
        found.append([y, tape.delta, end, again[0], *again[2:], replayed])
    assert same(*found)


@pytest.mark.parametrize("case", attention_checks.KERNEL_CASES, ids=str)
def test_verify_attention_gives_the_same_bits(case: attention_checks.Case) -> None:
    q, k, v, sinks = case.arrays()
    lengths, options = mx.array(case.lengths), {"scale": case.scale, "window": case.window}
    backend = verify_attention.cuda.BACKEND
    found = [
        [Attention(one).attend(q, k, v, lengths, sinks=sinks, **options)]
        for one in (backend, by_mlx(backend))
    ]
    assert same(*found)


SERVED = [case for case in few_rows_checks.CASES if case.outputs % 16 == case.size % 32 == 0]


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_few_rows_give_the_same_bits(case: few_rows_checks.Case) -> None:
    x, weight = case.arrays()
    backend = few_rows.cuda.BACKEND
    found = [[FewRows(one).product(x, weight)] for one in (backend, by_mlx(backend))]
    assert same(*found)


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    assert not isinstance(find_nvrtc(), str)
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", FRESH],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        said.append(done.stdout.splitlines())
    assert said[0][:-1] == said[1][:-1]
    assert (said[0][-1], said[1][-1]) == ("compiled 3", "compiled 0")  # two cases share one
    assert len(list((tmp_path / "draftloom" / "cuda").iterdir())) == 3
