"""Gated-delta layers that record a tape during verify.

A wrapper takes the place of the mixer of one layer. Unless the cache it is handed records, it
calls the mixer as it is; when it does, it runs the same operations in the same order and keeps
the updates. Contract tests compare both with stock mlx-lm, bit for bit on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom.device import on_cuda
from draftloom.kernel_settings import AUTO, OFF, KernelSettings
from draftloom.kernels.gated_delta import prefer, prefill, replay, replay_verify, verify
from draftloom.kernels.gated_delta_inputs import Layer, Projected, prepare
from draftloom.kernels.gated_norm import normalise
from draftloom.recording import Deferred, RecordingEntry

__all__ = ["Projections", "RecordingMixer", "project_qwen3_5", "project_qwen3_next"]

Block = tuple[mx.array, mx.array, mx.array, mx.array, mx.array]
"""q, k [B, T, Hk, Dk], v [B, T, Hv, Dv], g, beta [B, T, Hv], as the kernels want them."""

Projections = Callable[[Any, mx.array], tuple[mx.array, mx.array, mx.array, mx.array]]
"""(mixer, inputs [B, T, D]) -> q|k|v [B, T, C], z [B, T, Hv, Dv], b [B, T, Hv], a [B, T, Hv]."""


def project_qwen3_5(mixer: Any, inputs: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Input projections of mlx_lm.models.qwen3_5.GatedDeltaNet."""
    rows, tokens, _ = inputs.shape
    z = mixer.in_proj_z(inputs).reshape(rows, tokens, mixer.num_v_heads, mixer.head_v_dim)
    return mixer.in_proj_qkv(inputs), z, mixer.in_proj_b(inputs), mixer.in_proj_a(inputs)


def project_qwen3_next(
    mixer: Any, inputs: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Input projections of mlx_lm.models.qwen3_next.Qwen3NextGatedDeltaNet."""
    rows, tokens, _ = inputs.shape
    q, k, v, z, b, a = mixer.fix_query_key_value_ordering(
        mixer.in_proj_qkvz(inputs), mixer.in_proj_ba(inputs)
    )
    qkv = mx.concatenate([x.reshape(rows, tokens, -1) for x in (q, k, v)], axis=-1)
    return qkv, z, b, a


class RecordingMixer(nn.Module):
    """Stands in for a gated-delta mixer and shares its parameters.

    Args:
        mixer: the layer's own.
        project: its input projections.
    """

    def __init__(self, mixer: nn.Module, project: Projections) -> None:
        super().__init__()
        self.mixer = mixer
        object.__setattr__(self, "_project", project)
        self.tune(KernelSettings())

    def tune(self, settings: KernelSettings) -> None:
        """Choose the kernels: ``gated-delta`` by name also serves the prompt; ``off`` leaves the
        prompt to the mixer itself, and verify to the array path. ``gated-delta-inputs`` and
        ``gated-norm`` are what stands before and behind the recurrence."""
        use = prefer(settings.use("gated-delta"))
        object.__setattr__(self, "_use", use)
        object.__setattr__(self, "_replay", partial(replay, use=use))
        object.__setattr__(self, "_inputs", settings.use("gated-delta-inputs"))
        object.__setattr__(self, "_norm", settings.use("gated-norm"))
        object.__setattr__(self, "_prompt", _prompts_served(settings.choice("gated-delta")))

    def __call__(
        self, inputs: mx.array, mask: mx.array | None = None, cache: Any | None = None
    ) -> mx.array:
        """Output [B, T, D] of inputs [B, T, D]."""
        recording = isinstance(cache, RecordingEntry)
        if cache is None or not (recording or (self._prompt and cache.lengths is None)):
            return self.mixer(inputs, mask, cache)
        qkv, z, b, a = self._project(self.mixer, inputs)
        projected = Projected(qkv, a, b)
        prepared = prepare(self._layer(), projected, cache[0], mask, use=self._inputs)
        block, window = prepared[:5], prepared.window
        cache[0] = mx.contiguous(window[:, -(self.mixer.conv_kernel_size - 1) :, :])
        if isinstance(cache, RecordingEntry):
            output = self._record(cache, block, mask, window)
        else:
            state = _state(cache, block)
            output, cache[1] = prefill(*block, state, mask, use=self._use)
        cache.advance(inputs.shape[1])
        output = normalise(self.mixer.norm, output, z, use=self._norm)
        return self.mixer.out_proj(output.reshape(*inputs.shape[:2], -1))

    def _layer(self) -> Layer:
        mixer: Any = self.mixer
        return Layer(
            conv=mixer.conv1d,
            a_log=mixer.A_log,
            dt_bias=mixer.dt_bias,
            key_heads=mixer.num_k_heads,
            value_heads=mixer.num_v_heads,
            key_size=mixer.head_k_dim,
            value_size=mixer.head_v_dim,
        )

    def _record(
        self, cache: RecordingEntry, block: Block, mask: mx.array | None, window: mx.array
    ) -> mx.array:
        """Verify a block and record what it did; y [B, T, Hv, Dv].

        Where states are deferred, the replay that leads to the state before the block and the
        block itself are one call, and the state after it is not computed: whoever wants it
        replays the tape.
        """
        if not cache.defers:
            output, tape, cache[1] = verify(*block, _state(cache, block), mask, use=self._use)
            cache.record(tape, window)
            return output
        left = cache.deferred
        if left is None:
            state = _state(cache, block)
            output, tape, _ = verify(*block, state, mask, write_state=False, use=self._use)
        else:
            output, tape, state, _ = replay_verify(
                left.tape, left.count, block, left.state, mask, use=self._use
            )
        cache.record(tape, window, after=Deferred(state, tape, tape.length, self._replay))
        return output


def _state(cache: Any, block: Block) -> mx.array:
    """The state [B, Hv, Dv, Dk] of a cache."""
    state: mx.array | None = cache[1]
    if state is None:
        _, k, v, _, _ = block
        state = mx.zeros((*v.shape[:1], *v.shape[2:], k.shape[-1]), dtype=mx.float32)
    return state


def _prompts_served(choice: str) -> bool:
    """Whether our prefill is to be taken instead of mlx-lm's.

    Off Metal mlx-lm runs the recurrence token by token. On the CPU that is the order of operations
    to keep; on CUDA the kernel of the same rule takes its place. A kernel that was named runs.
    """
    return on_cuda() if choice == AUTO else choice != OFF
