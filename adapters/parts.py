"""Where the parts of a model are: its head and embeddings, run by the model's own code.

Nothing of a family is written again. `head` runs the model's own call with an inner model that
hands over the hidden states; `embed` runs the inner model's own call with no layers and no final
norm. Scales, soft caps and multipliers are therefore the family's own. Both work on shallow
copies: the model itself is never changed.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from draftloom.kernels.stand_in import StandIn

__all__ = ["Parts", "why_no_taps"]

FINAL_NORMS = (
    "norm", "final_layernorm", "final_layer_norm", "final_norm", "embedding_norm", "norm_f", "ln_f",
)  # fmt: skip
"""Names of the norm that follows the last layer."""
INNER = ("language_model", "model", "transformer", "backbone")
"""Names of what a model wraps."""


@attrs.frozen(eq=False)
class Parts:
    """Where the layers of a model are.

    Attributes:
        path: attribute names from the model to the module that runs the layers.
        owners: the modules along the path: the model first, the one that runs the layers last.
        name: attribute of the last owner that holds the layers.
        norm: attribute of the last owner that holds the final norm.
    """

    path: tuple[str, ...]
    owners: tuple[Any, ...]
    name: str
    norm: str

    @classmethod
    def of(cls, model: nn.Module) -> Parts | None:
        """The parts of a model; None where they are laid out in a way not known here."""
        layers = getattr(model, "layers", None)
        if not isinstance(layers, list) or not layers:
            return None
        path, owners, node = [], [model], model
        while (name := _list_of(node, layers)) is None:
            step = next((n for n in INNER if n in node), None)
            if step is None:
                return None
            node = node[step]
            path.append(step)
            owners.append(node)
        norm = next((n for n in FINAL_NORMS if n in node), None)
        if not path or norm is None:
            return None
        return cls(tuple(path), tuple(owners), name, norm)

    @property
    def layers(self) -> list[nn.Module]:
        """The list that the model runs through."""
        found: list[nn.Module] = self.owners[-1][self.name]
        return found

    def head(self, hidden: mx.array) -> mx.array:
        """Logits [..., V] of normed hidden states [..., D], by the model's own call."""
        module: Any = _GivesBack(self.owners[-1])
        for owner, name in zip(reversed(self.owners[:-1]), reversed(self.path), strict=True):
            shallow = copy.copy(owner)
            shallow[name] = module
            module = shallow
        logits: mx.array = module(hidden)
        return logits

    def embed(self, tokens: mx.array) -> mx.array:
        """What the first layer gets [B, T, D], by the inner model's own call."""
        inner = copy.copy(self.owners[-1])
        inner[self.name] = []
        inner[self.norm] = _Identity()
        embeddings: mx.array = inner(tokens, cache=make_prompt_cache(self.owners[0]))
        return embeddings


def _list_of(module: nn.Module, layers: list[nn.Module]) -> str | None:
    """Name of the attribute of a module that is this list of layers."""
    for name, value in module.items():
        same = isinstance(value, list) and len(value) == len(layers)
        if same and all(a is b for a, b in zip(value, layers, strict=True)):
            return str(name)
    return None


class _Identity(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return x


class _GivesBack(StandIn):
    """Stands for an inner model and gives its first argument back; the rest is the model's."""

    held = "inner"

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        found: mx.array = args[0] if args else next(iter(kwargs.values()))
        return found


# --- before any weight is loaded --------------------------------------------------------------


class _Probe(nn.Module):
    """Keeps what a module was given and what it gave, as objects."""

    def __init__(self, module: nn.Module, seen: list[tuple[Any, Any]]) -> None:
        super().__init__()
        self.module = module
        object.__setattr__(self, "_seen", seen)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module(*args, **kwargs)
        given = args[0] if args else next(iter(kwargs.values()), None)
        self._seen.append((given, output[0] if isinstance(output, tuple) else output))
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self:
                raise
            return getattr(self["module"], name)


def why_no_taps(skeleton: nn.Module, parts: Parts | None, hidden_size: int) -> str:
    """Why hidden states cannot be taken; empty where they can.

    The model is run once, lazily: nothing is computed. Every layer must run once, take what the
    layer before it gave, and the final norm what the last one gave; head and embeddings must have
    the right shapes.
    """
    if parts is None:
        return "its layers are laid out in a way not known here"
    try:
        seen, logits = _watch(skeleton, parts)
        if len(seen) != len(parts.layers) + 1:
            return "its layers do not run once each"
        if any(given is not gave for (_, gave), (given, _) in itertools.pairwise(seen)):
            return "a layer does not take what the one before it gave"
        if any(given.shape != (1, 2, hidden_size) for given, _ in seen):
            return "its hidden states are not [B, T, D]"
        if parts.head(seen[-1][1]).shape != logits.shape:
            return "its head cannot be run alone"
        if parts.embed(mx.zeros((1, 2), dtype=mx.int32)).shape != (1, 2, hidden_size):
            return "its embeddings cannot be had alone"
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        return f"it cannot be taken apart: {type(error).__name__}: {error}"
    return ""


def _watch(skeleton: nn.Module, parts: Parts) -> tuple[list[tuple[Any, Any]], mx.array]:
    """Run two tokens, lazily: what went into layers and norm and came out; the logits."""
    seen: list[tuple[Any, Any]] = []
    layers, inner = parts.layers, parts.owners[-1]
    originals, norm = list(layers), inner[parts.norm]
    try:
        layers[:] = [_Probe(layer, seen) for layer in originals]
        inner[parts.norm] = _Probe(norm, seen)
        logits = skeleton(mx.zeros((1, 2), dtype=mx.int32), cache=make_prompt_cache(skeleton))
    finally:
        layers[:] = originals
        inner[parts.norm] = norm
    return seen, logits
