"""The frozen target of a training run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom.contracts import TargetAdapter, TargetInfo, TargetOutput
from draftloom.kernel_settings import tune_by_default
from draftloom.model_info import ModelInfo
from draftloom.plugins import PluginManager

__all__ = ["FrozenTarget"]

_EDGE = 2**20


class FrozenTarget:
    """A target adapter that can step aside, so that a pipeline uses the same weights meanwhile.

    Args:
        reference: folder, hub repository or bundled name.
        plugins: find adapter and weights.
        dtype: compute type, ``auto`` or a type's name.

    Attributes:
        source: the target's config and folder.
        tokenizer: mlx-lm's TokenizerWrapper, or None.

    Raises:
        ModelError: the target cannot be found, read or served.
    """

    def __init__(self, reference: str, plugins: PluginManager, dtype: str = "auto") -> None:
        self.source = ModelInfo.from_path(plugins.locate_model(reference), reference)
        self._factory: Any = plugins.adapter_for(self.source).load()
        self.info: TargetInfo = self._factory.describe(self.source)
        loaded = plugins.load_model(self.source, dtype)
        self.model: nn.Module = loaded.model
        self.tokenizer = loaded.tokenizer
        self._taps: tuple[int, ...] = ()
        self._plugins = plugins
        self._adapter = self._adapt()

    def _adapt(self) -> TargetAdapter:
        adapter: TargetAdapter = self._factory(self.model, self.info)
        tune_by_default(adapter, self._plugins)
        return adapter

    def tap(self, layers: Sequence[int]) -> None:
        """Choose the layers whose outputs are the features."""
        self._taps = tuple(layers)
        self._adapter.tap(layers)

    def forward(self, tokens: mx.array, cache: list[Any]) -> TargetOutput:
        """Logits and features of tokens [B, T]; both lazy."""
        return self._adapter.forward(tokens, cache)

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings [B, T, D]."""
        return self._adapter.embed(tokens)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits [..., V]."""
        return self._adapter.head(hidden)

    def make_cache(self) -> list[Any]:
        """Fresh caches."""
        return self._adapter.make_cache()

    def close(self) -> None:
        """Put the model back as mlx-lm loaded it."""
        self._adapter.close()

    @contextmanager
    def released(self) -> Iterator[nn.Module]:
        """The plain model, for a pipeline to wrap; afterwards the taps are in place again."""
        self._adapter.close()
        try:
            yield self.model
        finally:
            self._adapter = self._adapt()
            self._adapter.tap(self._taps)

    def fingerprint(self) -> str:
        """sha256 over the config, and name, size, first and last MiB of every weight file."""
        total = hashlib.sha256()
        folder = self.source.path or Path()
        total.update((folder / "config.json").read_bytes())
        for file in sorted(folder.glob("model*.safetensors")):
            size = file.stat().st_size
            total.update(f"{file.name}/{size}".encode())
            with file.open("rb") as stream:
                total.update(stream.read(_EDGE))
                stream.seek(max(0, size - _EDGE))
                total.update(stream.read(_EDGE))
        return total.hexdigest()
