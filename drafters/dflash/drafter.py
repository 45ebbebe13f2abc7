"""The DFlash drafter: all draft slots of a block are filled in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs
import mlx.core as mx

from draftloom.contracts import (
    BindContext,
    ComponentInfo,
    Draft,
    DraftLaw,
    DraftRequest,
    Need,
    TargetAdapter,
    TargetInfo,
)
from draftloom.errors import ModelError, Problem
from draftloom.model_info import ModelInfo
from draftloom.sampling import SamplingState

from .config import DFlashConfig
from .model import DFlashModel
from .weights import load_weights

__all__ = ["DFlashDrafter"]


class DFlashDrafter:
    """Block-diffusion drafting from a z-lab checkpoint.

    Draft tokens are the most likely of each slot also when the target samples: the slots are
    predicted independently of one another, so that drawing from each would agree with the target
    far less often.

    Args:
        checkpoint: folder with config.json and model.safetensors.

    Raises:
        ModelError: the folder is not a DFlash checkpoint, or its config is incomplete.
    """

    info = ComponentInfo(
        "dflash",
        "block diffusion over the target's hidden states (z-lab checkpoints)",
        needs=(Need.TAPS,),
        law=DraftLaw.DETERMINISTIC,
        model_options=("checkpoint",),
    )

    def __init__(self, checkpoint: Path) -> None:
        self._path = Path(checkpoint)
        self.config = DFlashConfig.from_model(ModelInfo.from_path(self._path))
        width = self.config.block_size - 1
        self.info = attrs.evolve(
            type(self).info,
            tap_layers=self.config.tap_layers,
            default_width=width,
            max_width=width,
        )
        self._model: DFlashModel | None = None
        self._target: TargetAdapter | None = None

    def check(self, target: TargetInfo) -> Iterable[Problem]:
        """What of the checkpoint does not fit the target."""
        return self.config.problems(target)

    def bind(self, context: BindContext) -> None:
        """Load the weights, in the type that the target computes in.

        Raises:
            ModelError: weights missing, corrupt, or not fitting the config; names the tensor.
        """
        self._target = context.target
        dtype = context.target.embed(mx.array([[0]])).dtype
        self._model = load_weights(self._path, self.config, dtype)

    def open(self, request: DraftRequest) -> DFlashSession:
        """Begin a generation.

        Raises:
            ModelError: the drafter was not bound.
        """
        if self._model is None or self._target is None:
            raise ModelError("the dflash drafter has no weights", "build the pipeline first")
        return DFlashSession(self._model, self._target, self.config)


MAX_PENDING = 512
"""Rows of features kept unprojected at most."""


class DFlashSession:
    """The context caches of one generation. With the pending features they stand for exactly the
    committed tokens.

    Features are projected when a draft is asked for, not when they arrive: a parked drafter costs
    (next to) nothing.
    """

    def __init__(self, model: DFlashModel, target: TargetAdapter, config: DFlashConfig) -> None:
        self._model = model
        self._target = target
        self._config = config
        self._cache = model.make_cache()
        self._pending: list[mx.array] = []

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """Take in the features [B, T, F] of committed tokens.

        Raises:
            ValueError: no features, or rows of different lengths.
        """
        if features is None:
            raise ValueError("dflash needs the target's hidden states")
        if len({len(row) for row in committed}) > 1:
            raise ValueError("rows of different lengths cannot share a context cache")
        self._pending.append(features[:, : len(committed[0])])
        if sum(rows.shape[1] for rows in self._pending) > MAX_PENDING:
            self._extend()
            mx.async_eval([(entry.keys, entry.values) for entry in self._cache])

    def _extend(self) -> None:
        """Append the pending features to the context."""
        if self._pending:
            self._model.extend(mx.concatenate(self._pending, axis=1), self._cache)
            self._pending.clear()

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        """`width` tokens [B, width] after the anchor [B], from one pass over [anchor, MASK ..]."""
        self._extend()
        config = self._config
        masks = mx.full((anchor.shape[0], width), config.mask_token_id, dtype=mx.int32)
        block = mx.concatenate([anchor[:, None].astype(mx.int32), masks], axis=1)
        embeddings = self._target.embed(block)
        if config.embedding_scale != 1.0:
            embeddings = embeddings * config.embedding_scale
        hidden = self._model(embeddings, self._cache)[:, 1:]
        if config.output_multiplier != 1.0:
            hidden = hidden * config.output_multiplier
        logits = self._target.head(hidden)
        # A soft cap keeps the order of logits, so that the argmax needs none.
        tokens = mx.argmax(logits, axis=-1)
        top = mx.take_along_axis(logits, tokens[..., None], axis=-1)
        healthy = mx.isfinite(hidden).all(axis=(1, 2)) & mx.isfinite(top).all(axis=(1, 2))
        return Draft.deterministic(tokens, healthy, source="dflash")
