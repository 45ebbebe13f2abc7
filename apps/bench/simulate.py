"""Random weights of a real shape, and an acceptance that is drawn instead of earned.

The target's and the drafter's passes cost what they would cost with trained weights; which draft
tokens are kept is drawn with a given probability by position. What comes out is no text, and the
numbers say what a machine can do at that acceptance, not what a drafter reaches.
"""

from __future__ import annotations

import json
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes

from draftloom.abilities import BindContext
from draftloom.builder import PipelineBuilder
from draftloom.contracts import ComponentInfo, Draft, Preserves
from draftloom.drafters.dflash import DFlashDrafter, DFlashModel, LoadedDrafter
from draftloom.drafters.dflash.block import tune_network
from draftloom.errors import UnknownNameError, UsageError
from draftloom.hookspecs import Register, hookimpl
from draftloom.plugins import PluginManager
from draftloom.sampling import SamplingState

from .prompts import EncodedPrompt
from .subjects import Simulation, Subject, make_variants

__all__ = ["no_text_tokenizer", "random_prompts", "shape_names", "simulated_subject"]

Builders = Sequence[tuple[str, PipelineBuilder]]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def _shapes() -> Mapping[str, Any]:
    text = files("draftloom.apps.bench").joinpath("shapes.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def shape_names() -> tuple[str, ...]:
    """The shapes that there are."""
    return tuple(_shapes())


def drafter_config(target: Mapping[str, Any], drafter: Mapping[str, Any]) -> dict[str, Any]:
    """A DFlash config (z-lab layout) for a target of a shape, with the usual taps."""
    layers, taps = target["num_hidden_layers"], drafter["taps"]
    ids = [round(1 + i * (layers - 4) / max(taps - 1, 1)) for i in range(taps)]
    own = {key: value for key, value in drafter.items() if key not in ("taps", "block_size")}
    shared = ("hidden_size", "vocab_size", "rms_norm_eps", "max_position_embeddings")
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "rope_theta": 10000000.0,
        **{key: target[key] for key in shared},
        **own,
        "num_target_layers": layers,
        "dflash_config": {
            "mask_token_id": target["vocab_size"] - 1,
            "target_layer_ids": ids,
            "block_size": drafter["block_size"],
        },
    }


def randomize(model: nn.Module, seed: int, dtype: mx.Dtype) -> None:
    """Fill a model with random weights whose activations stay finite, one array at a time."""
    key = mx.random.key(seed)
    filled = []
    for name, value in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        if name.endswith(("A_log", "dt_bias", "bias")):
            weight = mx.zeros(value.shape, dtype=dtype)
        elif value.ndim == 1:
            weight = mx.ones(value.shape, dtype=dtype)
        else:
            weight = mx.random.normal(value.shape, dtype=dtype, key=own)
            weight = (weight * value.shape[-1] ** -0.5).astype(dtype)
        mx.eval(weight)
        filled.append((name, weight))
        mx.clear_cache()
    model.update(tree_unflatten(filled))
    model.eval()


class SimulatedDFlash(DFlashDrafter):
    """A DFlash drafter with random weights: its cost, and tokens that mean nothing.

    Args:
        checkpoint: folder with config.json; it needs no weights.
        seed: of the weights.
    """

    info = attrs.evolve(
        DFlashDrafter.info, name="simulated-dflash", summary="random weights (simulated)"
    )

    def __init__(self, checkpoint: Path, seed: int = 0) -> None:
        super().__init__(checkpoint)
        self._seed = seed

    def bind(self, context: BindContext) -> None:
        """Make the weights, in the type that the target computes in."""
        network = DFlashModel(self.description)
        randomize(network, self._seed + 1, context.target.embed(mx.array([[0]])).dtype)
        compiled = tune_network(network, self.description, context.kernels)
        self._loaded = LoadedDrafter(self.description, network, context.target, compiled=compiled)


class SimulatedAcceptance:
    """Keeps a random prefix of the draft; the next token is the target's own.

    Args:
        rates: see `Simulation`.
        seed: of the draws, which go on over all texts of a pipeline.
    """

    info = ComponentInfo(
        "simulated", "a random prefix, for benchmarks", preserves=Preserves.NOTHING
    )

    def __init__(self, rates: Sequence[float], seed: int = 0) -> None:
        self._simulation = Simulation("", tuple(rates))
        self._key = mx.random.key(seed + 2)

    def accept(
        self, draft: Draft, logits: mx.array, sampling: SamplingState
    ) -> tuple[mx.array, mx.array]:
        """num_accepted [B] and next_token [B], from logits [B, K+1, V]."""
        best = mx.argmax(logits, axis=-1).astype(mx.int32)
        if not draft.width:
            return mx.zeros((best.shape[0],), dtype=mx.int32), best[:, 0]
        self._key, key = mx.random.split(self._key)
        rates = mx.array([self._simulation.rate(i) for i in range(draft.width)])
        kept = mx.random.uniform(shape=draft.tokens.shape, key=key) < rates
        num_accepted = mx.cumprod(kept.astype(mx.int32), axis=1).sum(axis=1)
        return num_accepted, mx.take_along_axis(best, num_accepted[:, None], axis=1)[:, 0]


class _Plugin:
    @hookimpl
    def register_drafters(self, register: Register) -> None:
        register("simulated-dflash", SimulatedDFlash)

    @hookimpl
    def register_acceptance_policies(self, register: Register) -> None:
        register("simulated", SimulatedAcceptance)


def simulated_subject(
    simulation: Simulation,
    dtype: str,
    widths: Sequence[tuple[str, str | int | None]],
    kernels: Mapping[str, str] | None = None,
    vary: Callable[[Builders], Builders] = lambda builders: builders,
) -> Subject:
    """A target with random weights and its variants.

    Args:
        simulation: shape and rates.
        dtype: of the weights; ``auto`` is bfloat16.
        widths: variants: what to call them, and their width policy or number of draft tokens;
            None is the drafter's own.
        kernels: choices by operation, as `PipelineBuilder.kernels` takes them.
        vary: makes the variants' builders, with their names, into others.

    Raises:
        UnknownNameError: no such shape.
        UsageError: no such type, or a rate outside [0, 1].
        GraphError: an unknown operation or implementation.
    """
    shapes = _shapes()
    if simulation.shape not in shapes:
        raise UnknownNameError("shape", simulation.shape, shapes)
    if dtype not in (*DTYPES, "auto"):
        raise UsageError(f"no type {dtype!r}", f"known: {', '.join(('auto', *DTYPES))}")
    if not simulation.rates or not all(0 <= rate <= 1 for rate in simulation.rates):
        raise UsageError("a simulated acceptance is outside [0, 1]", "0.85, or 0.9,0.8,0.7")
    shape = shapes[simulation.shape]
    base = PipelineBuilder(plugins=PluginManager(entry_points=False, extra=[_Plugin()]))
    folder = tempfile.TemporaryDirectory(prefix="draftloom-bench-")
    text = json.dumps(drafter_config(shape["target"], shape["drafter"]))
    Path(folder.name, "config.json").write_text(text, encoding="utf-8")
    model = _model(shape["target"], simulation.seed, DTYPES.get(dtype, mx.bfloat16))
    seed, rates = simulation.seed, list(simulation.rates)
    base = base.model(model).drafter("simulated-dflash", checkpoint=folder.name, seed=seed)
    base = base.acceptance("simulated", rates=rates, seed=seed).kernels(kernels or {})
    builders: Builders = [
        (name, base.own_width() if width is None else base.width(width)) for name, width in widths
    ]
    plans = [(name, builder.check()) for name, builder in vary(builders)]
    variants = make_variants(plans, base, model, None)
    first = plans[0][1].target
    return Subject(
        name=f"{simulation.shape} (random weights, simulated)",
        model=model,
        tokenizer=None,
        variants=tuple(attrs.evolve(v, name=f"{v.name} (simulated)") for v in variants),
        context_limit=first.context_limit,
        vocab_size=first.vocab_size,
        simulation=simulation,
        folder=folder,
    )


def _model(config: dict[str, Any], seed: int, dtype: mx.Dtype) -> nn.Module:
    model_class, args_class = _get_classes(config)
    model: nn.Module = model_class(args_class.from_dict(config))
    randomize(model, seed, dtype)
    return model


def random_prompts(simulation: Simulation, vocab_size: int, count: int) -> list[EncodedPrompt]:
    """Random prompts of the simulation's length."""
    shape = (count, simulation.prompt_tokens)
    ids: Any = mx.random.randint(0, vocab_size, shape, key=mx.random.key(simulation.seed)).tolist()
    return [EncodedPrompt("random tokens", tuple(row)) for row in ids]


class _NoText:
    """What `mlx_lm.stream_generate` needs of a tokenizer, where tokens have no text."""

    eos_token_id = None
    bos_token = None
    chat_template = None
    clean_up_tokenization_spaces = False

    def get_vocab(self) -> dict[str, int]:
        return {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [0]

    def decode(self, tokens: Sequence[int]) -> str:
        return ""

    def apply_chat_template(self, messages: Any) -> str:
        return ""


def no_text_tokenizer() -> TokenizerWrapper:
    """A tokenizer for a model that has none: every token is without text."""
    return TokenizerWrapper(_NoText())
