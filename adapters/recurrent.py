"""Recurrent layers other than the gated delta rule of Qwen: short convolutions, Mamba-2, Kimi.

Each stands in for one mixer of one model and shares its parameters. Unless the cache it is handed
records, it calls the mixer as it is. When it records, the mixer's own code runs on a shallow copy
whose convolution (and, for Mamba-2, whose state step) is watched; only Kimi's layer, which calls
its recurrence as a function of a module, is written again. Tests compare with stock mlx-lm.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gated_delta import compute_g, normalize_qk

from draftloom.kernel_settings import KernelSettings
from draftloom.kernels import ssm
from draftloom.kernels.gated_delta import prefer, verify
from draftloom.recording import RecordingEntry

__all__ = ["RecordingConvolution", "RecordingKimi", "RecordingMamba"]


class _Watched(nn.Module):
    """A convolution whose input, the window [B, W + T, C], is kept."""

    def __init__(self, convolution: nn.Module, seen: list[mx.array]) -> None:
        super().__init__()
        self.convolution = convolution
        object.__setattr__(self, "_seen", seen)

    def __call__(self, window: mx.array) -> mx.array:
        self._seen.append(window)
        output: mx.array = self.convolution(window)
        return output


def _default_order() -> str:
    return "stepwise" if mx.default_device() == mx.Device(mx.cpu) else "block"


def _recording(args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordingEntry | None:
    """The recording cache among a mixer's arguments."""
    given = (*args, *kwargs.values())
    return next((value for value in given if isinstance(value, RecordingEntry)), None)


class _Stand(nn.Module):
    """Stands in for a mixer.

    Args:
        mixer: the layer's own.
    """

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.tune(KernelSettings())

    def tune(self, settings: KernelSettings) -> None:
        """Choose the kernels: ``ssm`` for Mamba-2, ``gated-delta`` for Kimi."""
        object.__setattr__(self, "_use", prefer(settings.use("gated-delta")))
        order = settings.use("ssm", off="block") or _default_order()
        object.__setattr__(self, "_order", ssm.ORDERS[order] if isinstance(order, str) else order)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """What the mixer gives, whatever its arguments."""
        entry = _recording(args, kwargs)
        if entry is None:
            output: mx.array = self.mixer(*args, **kwargs)
            return output
        return self._record(entry, args, kwargs)

    def _record(
        self, entry: RecordingEntry, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> mx.array:
        raise NotImplementedError


class RecordingConvolution(_Stand):
    """LFM2's short convolution: what it remembers is a slice of its input."""

    def _record(
        self, entry: RecordingEntry, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> mx.array:
        seen: list[mx.array] = []
        mixer: Any = copy.copy(self.mixer)
        mixer["conv"] = _Watched(mixer["conv"], seen)
        output: mx.array = mixer(*args, **kwargs)
        entry.record(None, seen[0])
        return output


class RecordingMamba(_Stand):
    """A Mamba-2 mixer.

    On the CPU (or where ``ssm`` is ``stepwise``) its state step is run token by token, as plain
    decoding runs it, so that a block gives the very bits of single steps; over a block at once
    mlx-lm adds in another order. Elsewhere the block is run at once.
    """

    def _record(
        self, entry: RecordingEntry, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> mx.array:
        seen: list[mx.array] = []
        mixer: Any = copy.copy(self.mixer)
        mixer["conv1d"] = _Watched(mixer["conv1d"], seen)
        step = mixer._ssm
        tapes = []

        def watched(
            x: mx.array, keys: mx.array, queries: mx.array, dt: mx.array, cache: Any, mask: Any
        ) -> mx.array:
            rows, tokens, _ = x.shape
            tape = ssm.tape_of(
                x.reshape(rows, tokens, mixer.num_heads, mixer.head_dim),
                keys.reshape(rows, tokens, mixer.n_groups, mixer.ssm_state_size),
                dt,
                mixer.dt_bias,
                mixer.A_log,
                mixer.time_step_limit,
            )
            tapes.append(tape)
            given: mx.array = self._order(step, (x, keys, queries, dt), cache, mask)
            return given

        object.__setattr__(mixer, "_ssm", watched)
        output: mx.array = mixer(*args, **kwargs)
        entry.record(tapes[0], seen[0])
        return output


class RecordingKimi(_Stand):
    """Kimi's delta attention: a decay for every key channel, three short convolutions."""

    def _record(
        self, entry: RecordingEntry, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> mx.array:
        mixer: Any = self.mixer
        x = args[0]
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        rows, tokens, _ = x.shape
        shape = (rows, tokens, mixer.num_heads, mixer.head_dim)
        windows: list[mx.array] = []
        parts = []
        for slot, name in enumerate("qkv"):
            short: Any = copy.copy(mixer[f"{name}_conv"])
            short["conv"] = _Watched(short["conv"], windows)
            before = entry[slot]
            if before is None:
                before = mx.zeros(
                    (rows, mixer.conv_kernel - 1, mixer.projection_dim), dtype=x.dtype
                )
            part, entry[slot] = short(mixer[f"{name}_proj"](x), before, mask, None)
            parts.append(part.reshape(shape))
        q, k, v = parts
        q, k = normalize_qk(q, k, inv_scale=mixer.scale, eps=1e-6)
        a = mixer.f_b_proj(mixer.f_a_proj(x)).reshape(shape)
        b = mixer.b_proj(x).reshape(shape[:3])
        g = compute_g(
            mixer.A_log.reshape(mixer.num_heads, 1),
            a,
            mixer.dt_bias.reshape(mixer.num_heads, mixer.head_dim),
        )
        state = entry[3]
        if state is None:
            state = mx.zeros((rows, mixer.num_heads, *[mixer.head_dim] * 2), dtype=mx.float32)
        out, tape, entry[3] = verify(q, k, v, g, mx.sigmoid(b), state, mask, use=self._use)
        entry.record(tape, *windows)
        entry.advance(tokens)
        gate = mixer.g_b_proj(mixer.g_a_proj(x)).reshape(shape)
        out = (mixer.o_norm(out) * mx.sigmoid(gate)).reshape(rows, tokens, -1)
        return mixer.o_proj(out)
