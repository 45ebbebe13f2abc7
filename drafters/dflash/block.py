"""What the drafters that fill a block of slots share: a loaded checkpoint, and its context."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn

from draftloom.abilities import BindContext
from draftloom.checkpoint import DrafterDescription
from draftloom.contracts import ComponentInfo, TargetAdapter
from draftloom.drafters.formats import StoredWeights, describe_checkpoint, fill
from draftloom.errors import CheckpointWarning, ModelError, Problem
from draftloom.kernel_settings import KernelSettings
from draftloom.kernels import qk_norm_rope
from draftloom.memory import CacheCost, array_bytes, cache_bytes, module_bytes
from draftloom.model_info import ModelInfo

from .compiled import CompiledBlock, compiled_block
from .context import ContextWindow
from .model import DFlashModel
from .one_product import OPERATION, few_rows_in_network, pack_network, place_heads
from .packing import Packing

__all__ = [
    "BlockContext",
    "BlockOptions",
    "LoadedDrafter",
    "context_bytes",
    "described",
    "embedding_factor",
    "load_drafter",
    "load_network",
    "tune_network",
    "with_taps",
]

SAME_SCALE = 0.02
"""How far apart two factors may be by rounding alone: a model's own is rounded to its type."""
MAX_PENDING = 512
"""Rows of features kept unprojected at most."""


def described(checkpoint: Path | DrafterDescription, drafter: str) -> DrafterDescription:
    """The description of a checkpoint that a drafter is to serve.

    Args:
        checkpoint: as the builder read it, or a folder of a built-in format.
        drafter: the name of the drafter.

    Raises:
        ModelError: no format reads the folder, or another drafter serves it.
    """
    found: DrafterDescription | None
    if isinstance(checkpoint, DrafterDescription):
        found, name = checkpoint, checkpoint.name
    else:
        model = ModelInfo.from_path(Path(checkpoint))
        found, name = describe_checkpoint(model), model.name
        if found is None:
            raise ModelError(
                f"{name} is not a DFlash checkpoint (architectures {model.architectures})",
                "an ordinary model drafts through the drafter 'autoregressive'",
            )
    if found.drafter != drafter:
        raise ModelError(
            f"{name} is a checkpoint of format {found.format} for the drafter {found.drafter!r}, "
            f"not for {drafter!r}",
            "name the folder alone: the drafter is then chosen by what it holds",
        )
    return found


def with_taps(
    info: ComponentInfo, description: DrafterDescription, details: str = ""
) -> ComponentInfo:
    """What a drafter says of itself once its checkpoint is known."""
    width, taps = description.max_width, description.tap_layers
    return attrs.evolve(
        info,
        tap_layers=taps,
        default_width=width,
        max_width=width,
        details=details,
        stated_length=description.stated_length,
    )


@attrs.frozen
class BlockOptions:
    """How a checkpoint is run, as far as users choose it.

    Attributes:
        packing: how the weights are packed on load; None leaves them plain.
        window: which committed positions the layers keep.
    """

    packing: Packing | None = None
    window: ContextWindow = attrs.Factory(ContextWindow)

    @classmethod
    def of(
        cls,
        bits: int | None = None,
        group_size: int | None = None,
        window: int | None = None,
        sinks: int | None = None,
        trained: int | None = None,
    ) -> BlockOptions:
        """What the options of a drafter ask for; None is the default of each.

        Args:
            bits: 4 or 8 packs the weights.
            group_size: weights that share a scale, with `bits`: 32, 64 or 128; None takes 64, or
                32 where 64 does not divide every width.
            window: the last positions that the context keeps; 0 keeps all. None takes `trained`, or
                4096 where nothing states that.
            sinks: the first positions that it keeps beside them; None takes 64.
            trained: tokens of the longest sequences that the drafter was trained on.

        Raises:
            UsageError: a value out of its range, or one that means nothing beside the others.
        """
        return cls(Packing.of(bits, group_size), ContextWindow.of(window, sinks, trained))

    def describe(self, network: DFlashModel) -> str:
        """What is done to this network, for people."""
        parts = [] if self.packing is None else [self.packing.describe(network)]
        windows: list[int | None] = [layer.self_attn.window for layer in network.layers]
        if None in windows:
            parts.append(self.window.describe())
        own = sorted({window for window in windows if window is not None})
        seen = [min(window, self.window.window or window) for window in own]
        parts += [f"sliding layers see the last {window}" for window in seen]
        return "; ".join(parts)

    def problems(self, network: DFlashModel, where: str) -> Iterable[Problem]:
        """Why this network cannot be run so. Reads shapes only."""
        return () if self.packing is None else self.packing.problems(network, where)


@attrs.frozen(eq=False)
class LoadedDrafter:
    """A checkpoint's network beside the target it drafts for.

    Attributes:
        description: of the checkpoint.
        network: its weights.
        target: gives embedding and head where the network has none of its own.
        target_ids: [draft vocabulary] int32, the target's id of each token it proposes; None
            where those are the same.
        feature_dtype: the type that the drafter saw features in when it was trained; None takes
            them as they come.
        window: which committed positions the context keeps.
        embedding_factor: on what the target's embedding gives.
        compiled: the network's pass over a block, traced; None runs it as it is.
    """

    description: DrafterDescription
    network: Any
    target: TargetAdapter
    target_ids: mx.array | None = None
    feature_dtype: mx.Dtype | None = None
    window: ContextWindow = attrs.Factory(ContextWindow)
    embedding_factor: float = 1.0
    compiled: CompiledBlock | None = None

    def memory(self) -> dict[str, int]:
        """Bytes of the weights."""
        own = 0 if self.target_ids is None else self.target_ids.nbytes
        return {"weights": module_bytes(self.network) + own}

    def features(self, taps: mx.array) -> mx.array:
        """Taps [B, T, F] rounded as those of training, in the type that the network computes in."""
        wanted = self.feature_dtype
        if wanted is not None and wanted != taps.dtype:
            if wanted == mx.float16:  # what overflows there was at its end in training too
                limit = mx.finfo(mx.float16).max
                taps = mx.clip(taps, -limit, limit)
            taps = taps.astype(wanted)
        return taps.astype(self.network.norm.weight.dtype)

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings [B, T, D] of the target's tokens [B, T], scaled."""
        scale = self.embedding_factor
        if "embed_tokens" in self.network:
            found: mx.array = self.network.embed_tokens(tokens)
            scale = self.description.embedding_scale
        else:
            found = self.target.embed(tokens)
        return found if scale == 1.0 else found * scale

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [..., draft vocabulary] of hidden states [..., D]; a head of the drafter's own
        gives them before the soft cap, which keeps their order."""
        own = "lm_head" in self.network
        found: mx.array = self.network.lm_head(hidden) if own else self.target.head(hidden)
        return found

    def scores(self, hidden: mx.array) -> mx.array:
        """Logits [..., draft vocabulary] that a law is made of: those of a head of its own are
        capped here, the target's head caps by itself."""
        logits, cap = self.logits(hidden), self.description.softcap
        if cap is None or "lm_head" not in self.network:
            return logits
        return cap * mx.tanh(logits / cap)

    def to_target(self, tokens: mx.array) -> mx.array:
        """The target's ids int32 of tokens of the draft vocabulary."""
        return tokens.astype(mx.int32) if self.target_ids is None else self.target_ids[tokens]

    def ids_below(self, logits: mx.array) -> int:
        """What the target's ids are below of tokens chosen by logits [..., draft vocabulary].
        `target_ids` were looked at when they were loaded."""
        return logits.shape[-1] if self.target_ids is None else self.description.vocab_size


def embedding_factor(description: DrafterDescription, target: TargetAdapter) -> float:
    """What the target's embeddings are multiplied by for a drafter.

    A scale that is meant for the rows of the table takes the target's own factor on them into
    account: it is not applied twice.
    """
    scale = description.embedding_scale
    if not description.scales_table:
        return scale
    factor = scale / _own_scale(target)
    return 1.0 if abs(factor - 1) < SAME_SCALE else factor


def _own_scale(target: TargetAdapter) -> float:
    """The factor between the target's embeddings and the rows of its table, measured on a few;
    1 where the one is no multiple of the other."""
    model: Any = getattr(target, "model", None)
    if not isinstance(model, nn.Module):
        return 1.0
    tokens = mx.arange(min(8, target.info.vocab_size))[None]
    full = target.embed(tokens).astype(mx.float32)
    for _, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            continue
        rows = module(tokens).astype(mx.float32)
        if rows.shape != full.shape:  # another table, as of per-layer inputs
            continue
        scale = (full * rows).sum() / (rows * rows).sum()
        rest = mx.abs(full - scale * rows).max() / mx.abs(full).max()
        found, error = float(scale), float(rest)
        if found > 0 and error < SAME_SCALE:
            return found
    return 1.0


def load_network(
    description: DrafterDescription, dtype: mx.Dtype, network: Any = DFlashModel
) -> tuple[Any, mx.array | None]:
    """The network of a checkpoint folder, and the target's ids of a reduced vocabulary.

    Args:
        description: of the checkpoint.
        dtype: that the network is to compute in.
        network: its class; called with the description and the parts the checkpoint has itself.

    Raises:
        ModelError: weights missing, corrupt, or not fitting the config; names the tensor.
    """
    stored = StoredWeights(description)
    return _filled(stored, description, dtype, network), stored.target_ids


def _filled(
    stored: StoredWeights, description: DrafterDescription, dtype: mx.Dtype, network: Any
) -> Any:
    if stored.target_ids is not None:
        description = attrs.evolve(description, draft_vocab_size=stored.target_ids.size)
    made = network(description, stored.own)
    fill(made, stored, dtype)
    return made


def load_drafter(
    description: DrafterDescription,
    context: BindContext,
    network: Any = DFlashModel,
    options: BlockOptions | None = None,
) -> LoadedDrafter:
    """Load a checkpoint in the type that the target computes in, pack it if asked to, and say what
    of its config nobody read (`CheckpointWarning`).

    Args:
        description: of the checkpoint.
        context: has the target.
        network: its class; see `load_network`.
        options: how it is run; None is every default.

    Raises:
        ModelError: weights missing, corrupt, or not fitting the config; names the tensor.
    """
    if description.unread:
        warnings.warn(
            f"{description.label}: config keys that format {description.format} does not know "
            f"were not read: {', '.join(description.unread)}",
            CheckpointWarning,
            stacklevel=2,
        )
    dtype = context.target.embed(mx.array([[0]])).dtype
    stored = StoredWeights(description)
    trained = stored.dtype if description.dtype is None else getattr(mx, description.dtype)
    made = _filled(stored, description, dtype, network)
    target_ids = stored.target_ids
    del stored  # the plain weights go as they are packed
    options = BlockOptions() if options is None else options
    if options.packing is not None:
        options.packing.apply(made)
    compiled = tune_network(made, description, context.kernels)
    factor = embedding_factor(description, context.target)
    return LoadedDrafter(
        description,
        made,
        context.target,
        target_ids,
        trained,
        options.window,
        factor,
        compiled,
    )


def tune_network(
    network: DFlashModel, description: DrafterDescription, kernels: KernelSettings
) -> CompiledBlock | None:
    """Have kernels run what they are chosen for in a network whose weights are final.

    Returns:
        The traces of its pass; None where it is not compiled.
    """
    pack_network(network, kernels.use(OPERATION, off="off"))
    few_rows_in_network(network, kernels.use("few-rows"))
    place_heads(network, kernels.use(qk_norm_rope.OPERATION.name))
    return compiled_block(network, description, kernels)


def context_bytes(
    description: DrafterDescription,
    options: BlockOptions,
    loaded: LoadedDrafter | None,
    tokens: int,
) -> int:
    """Bytes of a context of so many tokens; before the weights are loaded in the type that the
    device computes small models in."""
    network = DFlashModel(description) if loaded is None else loaded.network
    if loaded is not None:
        size = network.norm.weight.dtype.size
    else:
        size = 4 if mx.default_device() == mx.Device(mx.cpu) else 2
    row = 2 * description.num_kv_heads * description.head_dim * size
    limits = [cache.limit for cache in network.make_cache(options.window)]
    block = description.max_width + 1  # stands behind the context while it is drafted
    most = [None if limit is None else limit + block for limit in limits]
    return sum(CacheCost(0, row, limit).at(tokens + block) for limit in most)


class BlockContext:
    """The context caches of one generation. With the pending features they stand for exactly the
    committed tokens.

    Features are projected when a draft is asked for, not when they arrive: a parked drafter costs
    (next to) nothing.
    """

    def __init__(self, loaded: LoadedDrafter) -> None:
        self._loaded = loaded
        self._cache = loaded.network.make_cache(loaded.window)
        self._pending: list[mx.array] = []
        self._written = False  # what is observed next is in the buffers, and only to be counted
        self._masks: dict[tuple[int, int], mx.array] = {}

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """Take in the features [B, T, F] of committed tokens.

        Raises:
            ValueError: no features, or rows of different lengths.
        """
        if features is None:
            raise ValueError(f"{self._loaded.description.drafter} needs the target's hidden states")
        if len({len(row) for row in committed}) > 1:
            raise ValueError("rows of different lengths cannot share a context cache")
        tokens = len(committed[0])
        if self._written:
            self._written = False
            for entry in self._cache:
                entry.advance(tokens)
            return
        self._pending.append(features[:, :tokens])
        if sum(rows.shape[1] for rows in self._pending) >= MAX_PENDING:
            self._extend()
            mx.async_eval([entry.arrays for entry in self._cache])

    def memory(self) -> dict[str, int]:
        """Bytes of the context as allocated, and of the features that wait to be projected."""
        return {
            "context": sum(map(cache_bytes, self._cache)),
            "features": array_bytes(self._pending),
        }

    def _extend(self) -> None:
        """Append the pending features to the context."""
        if self._pending:
            features = self._loaded.features(mx.concatenate(self._pending, axis=1))
            self._loaded.network.extend(features, self._cache)
            self._pending.clear()

    def hidden(self, anchor: mx.array, width: int, count: int | None = None) -> mx.array:
        """Hidden states [B, count, D] of the first slots that predict the tokens after the anchor
        [B], from one pass over [anchor, MASK ..] with `width` such slots; None is all of them."""
        self._extend()
        self._written = False
        embeddings, rows = self._block(anchor, width, width if count is None else count)
        loaded, compiled = self._loaded, self._loaded.compiled
        found = None if compiled is None else compiled.run(embeddings, self._cache, rows)
        return self._scaled(
            loaded.network(embeddings, self._cache, rows) if found is None else found
        )

    def hidden_ahead(
        self, features: mx.array, kept: mx.array, anchor: mx.array, width: int, count: int
    ) -> mx.array | None:
        """The same over a context that is longer by the first `kept` ([1] int32) of the features
        [1, T, F], which are observed after it; None where that cannot be done now."""
        compiled = self._loaded.compiled
        if compiled is None or not compiled.ahead or features.shape[0] > 1:
            return None
        self._extend()
        embeddings, rows = self._block(anchor, width, count)
        features = self._loaded.features(features)
        found = compiled.run_ahead(features, kept, embeddings, self._cache, rows)
        if found is None:
            return None
        self._written = True
        return self._scaled(found)

    def _block(self, anchor: mx.array, width: int, count: int) -> tuple[mx.array, slice]:
        """Embeddings of [anchor, MASK ..] with `width` slots, and the rows of the first `count`."""
        described = self._loaded.description
        shape = (anchor.shape[0], width - 1 + described.first_slot)
        masks = self._masks.get(shape)
        if masks is None:
            masks = self._masks[shape] = mx.full(shape, described.mask_token_id, dtype=mx.int32)
        block = mx.concatenate([anchor[:, None].astype(mx.int32), masks], axis=1)
        rows = slice(described.first_slot, described.first_slot + count)
        return self._loaded.embed(block), rows

    def _scaled(self, hidden: mx.array) -> mx.array:
        scale = self._loaded.description.output_multiplier
        return hidden if scale == 1.0 else hidden * scale
