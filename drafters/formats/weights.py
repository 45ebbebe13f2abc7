"""Stored tensors of a drafter checkpoint: names, packing, vocabulary map, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from draftloom.checkpoint import DrafterDescription
from draftloom.errors import ModelError

__all__ = ["StoredWeights", "fill"]

AGAIN = "is the download complete, and do config and weights belong together?"
NAMED = 4
"""Tensors that a message names at most."""


class StoredWeights:
    """The tensors of a checkpoint by their names inside, unpacked (drafters are small).

    Args:
        description: of the checkpoint.

    Attributes:
        folder: where they lie.
        tensors: what the network is filled with, in the types they are stored in.
        target_ids: [draft_vocab_size] int32, the target's id of every token that the drafter
            proposes; None where those are the same.

    Raises:
        ModelError: files missing or corrupt, or a vocabulary map that does not fit; names the file
            and the tensor.
    """

    def __init__(self, description: DrafterDescription) -> None:
        self._description = description
        self.folder = description.path or Path(description.name)
        self._files: dict[str, Path] = {}
        stored = self._load()
        try:
            plain = _unpack(stored, description.quantization or {})
        except (RuntimeError, ValueError, KeyError) as error:
            raise self.refuse(error) from error
        self.tensors = {description.tensor_name(name): value for name, value in plain.items()}
        self._names = {description.tensor_name(name): name for name in plain}
        self.target_ids = self._vocabulary()

    def _load(self) -> dict[str, mx.array]:
        files = self._shards()
        stored: dict[str, mx.array] = {}
        ignored = self._description.ignored_tensors
        for file in files:
            try:
                arrays: Any = mx.load(str(file))
            except (RuntimeError, ValueError, OSError) as error:
                raise self.refuse(error) from error
            for name, value in arrays.items():
                if not any(fnmatchcase(name, pattern) for pattern in ignored):
                    stored[name], self._files[name] = value, file
        return stored

    def _shards(self) -> list[Path]:
        """The files of the weights: those that an index names, where there is one."""
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            files = sorted(self.folder.glob("model*.safetensors"))
            if not files:
                message = f"{self.folder} has no model.safetensors"
                raise ModelError(message, "is the download complete?")
            return files
        try:
            names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read: {error!r}", "download it again") from error
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise ModelError(f"{index} names {missing[0]}, which is not there", AGAIN)
        return [self.folder / name for name in names]

    def refuse(self, error: Exception | str) -> ModelError:
        """An error that names the folder."""
        reason = " ".join(str(error).split())[:300]
        return ModelError(
            f"the drafter's weights in {self.folder} cannot be loaded: {reason}", AGAIN
        )

    @property
    def own(self) -> frozenset[str]:
        """Which of ``embed_tokens`` and ``lm_head`` the checkpoint has, or must have."""
        parts = {p for p in ("embed_tokens", "lm_head") if f"{p}.weight" in self.tensors}
        return frozenset(parts if self.target_ids is None else {*parts, "lm_head"})

    @property
    def dtype(self) -> mx.Dtype:
        """The type that most of the weights are stored in: that of the largest tensor."""
        return max(self.tensors.values(), key=lambda tensor: tensor.size).dtype

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Compare with the tensors that a network has.

        Args:
            wanted: shapes by name.

        Raises:
            ModelError: tensors are missing, unknown, or of another shape; names them.
        """
        missing = sorted({*wanted} - {*self.tensors})
        if missing:
            raise self.refuse(f"tensor {_some(missing)} missing")
        extra = sorted(self._names[name] for name in {*self.tensors} - {*wanted})
        if extra:
            raise self.refuse(
                f"format {self._description.format} does not know tensor {_some(extra)}"
            )
        for name, shape in wanted.items():
            found = tuple(self.tensors[name].shape)
            if found != shape:
                raise self.refuse(f"tensor {self._names[name]} is {found}, not {shape}")

    def _vocabulary(self) -> mx.array | None:
        """The ids of d2t (target = draft + d2t), checked against the vocabulary and t2d."""
        size = self._description.vocab_size
        offsets, kept = self.tensors.pop("d2t", None), self.tensors.pop("t2d", None)
        reduced = self._description.draft_vocab_size
        if offsets is None:
            if reduced is not None:
                raise self.refuse(f"tensor d2t missing, draft_vocab_size is {reduced}")
            return None
        where = self._files[self._names["d2t"]]
        if offsets.ndim != 1 or reduced not in (None, offsets.size):
            wanted = (reduced if reduced is not None else "draft_vocab_size",)
            raise self.refuse(f"tensor d2t is {tuple(offsets.shape)}, not {wanted}")
        shifts: Any = offsets.tolist()
        ids = [int(token + shift) for token, shift in enumerate(shifts)]
        outside = next((i for i, t in enumerate(ids) if not 0 <= t < size), None)
        if outside is not None:
            raise ModelError(
                f"{where}: d2t maps draft token {outside} to {ids[outside]}, outside the target's "
                f"vocabulary of {size}",
                "d2t holds target id minus draft id",
            )
        if len({*ids}) != len(ids):
            seen: set[int] = set()
            twice = next(t for t in ids if t in seen or seen.add(t))  # type: ignore[func-returns-value]
            raise ModelError(
                f"{where}: d2t maps two draft tokens to {twice}", "d2t holds target id - draft id"
            )
        if kept is not None:
            self._check_kept(kept, {*ids}, size)
        return mx.array(ids, dtype=mx.int32)

    def _check_kept(self, kept: mx.array, ids: set[int], size: int) -> None:
        where = self._files[self._names["t2d"]]
        if tuple(kept.shape) != (size,):
            raise self.refuse(f"tensor t2d is {tuple(kept.shape)}, not {(size,)}")
        flags: Any = (kept != 0).tolist()
        marked = {token for token, flag in enumerate(flags) if flag}
        if marked != ids:
            token = min(marked ^ ids)
            state = "marks" if token in marked else "does not mark"
            raise ModelError(
                f"{where}: t2d and d2t disagree: t2d {state} target token {token}, d2t "
                f"{'leaves it out' if token in marked else 'maps to it'}",
                "are both of the same checkpoint?",
            )


def fill(network: nn.Module, stored: StoredWeights, dtype: mx.Dtype) -> None:
    """Put a checkpoint's tensors into a network, in the type asked for.

    Raises:
        ModelError: tensors missing, unknown, of another shape, or not finite; names the folder and
            the tensor.
    """
    flat: Any = tree_flatten(network.parameters())
    stored.check({name: tuple(value.shape) for name, value in flat})
    network.load_weights([(name, value.astype(dtype)) for name, value in stored.tensors.items()])
    try:
        mx.eval(network.parameters())
    except RuntimeError as error:  # a file is read when a tensor of it is
        raise stored.refuse(error) from error
    _check_finite(network, stored)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _unpack(stored: Mapping[str, mx.array], settings: Mapping[str, Any]) -> dict[str, mx.array]:
    """Plain tensors. `settings` are mlx-lm's quantization, which may name single layers."""
    plain: dict[str, mx.array] = {}
    for name, value in stored.items():
        stem, _, kind = name.rpartition(".")
        if f"{stem}.scales" not in stored:
            plain[name] = value
        elif kind == "weight":
            layer = settings.get(stem)
            own: Mapping[str, Any] = layer if isinstance(layer, dict) else settings
            plain[name] = mx.dequantize(
                value,
                stored[f"{stem}.scales"],
                stored.get(f"{stem}.biases"),
                group_size=own.get("group_size", settings["group_size"]),
                bits=own["bits"],
                mode=own.get("mode", settings.get("mode", "affine")),
            )
    return plain


def _check_finite(network: nn.Module, stored: StoredWeights) -> None:
    tensors: Any = tree_flatten(network.parameters())
    finite: Any = mx.stack([mx.isfinite(value).all() for _, value in tensors]).tolist()
    bad = [name for (name, _), ok in zip(tensors, finite, strict=True) if not ok]
    if bad:
        raise ModelError(f"the drafter's weights in {stored.folder} are not finite: {bad[0]}")
