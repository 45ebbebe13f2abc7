"""Small stand-ins: tiny random models, drafters that know the answer or fail, recording parts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from hypothesis import settings
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import tokenizer_utils
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from draftloom import (
    ComponentInfo,
    Draft,
    DraftLaw,
    Pipeline,
    PipelineBuilder,
    PluginManager,
    hookimpl,
)
from draftloom.adapters.bundled import default_pair

quick = settings(deadline=None, derandomize=True, database=None)
"""How the properties here are tried: the same cases everywhere, however busy the machine is."""

VOCAB = 32
PROMPT = (1, 5, 9, 2, 7, 5, 9)

ATTENTION = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
HYBRID = ATTENTION | {
    "model_type": "qwen3_5",
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}


def new_model(config: dict[str, Any] = ATTENTION, seed: int = 0, **changes: Any) -> nn.Module:
    """A random float32 model whose greedy texts vary."""
    config = json.loads(json.dumps(config | changes))
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    keys = iter(mx.random.split(mx.random.key(seed), 256))
    weights = []
    for name, value in sorted(tree_flatten(model.parameters())):
        noise = mx.random.normal(value.shape, key=next(keys))
        if value.ndim == 1:
            fresh = 1 + 0.2 * noise
        elif "embed" in name:
            fresh = noise
        else:
            fresh = 2 * noise / value.shape[-1] ** 0.5
        weights.append((name, fresh))
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


@cache
def model(config: str = "attention", seed: int = 0) -> nn.Module:
    """A model that tests share; pipelines put it back when they close."""
    return new_model(HYBRID if config == "hybrid" else ATTENTION, seed)


@cache
def tokenizer() -> Any:
    """The bundled pair's tokenizer; byte-level, 8192 tokens."""
    return tokenizer_utils.load(default_pair().target, eos_token_ids=[0])


class OneTokenEach:
    """A tokenizer in which token i is the i-th character of an alphabet."""

    bos_token = None
    has_chat_template = False

    def __init__(self, eos: Sequence[int] = ()) -> None:
        self.eos_token_ids = set(eos)

    @property
    def detokenizer(self) -> OneTokenEach:
        """A fresh detokenizer."""
        fresh = OneTokenEach()
        fresh.last_segment = ""
        return fresh

    def add_token(self, token: int) -> None:
        """Take a token."""
        self.last_segment = self.decode([token])

    def finalize(self) -> None:
        """Nothing is held back."""
        self.last_segment = ""

    @staticmethod
    def decode(tokens: Sequence[int]) -> str:
        """Text of tokens."""
        return "".join(chr(ord("A") + t) for t in tokens)

    @staticmethod
    def encode(text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of text."""
        return [ord(c) - ord("A") for c in text]


def plain(
    target: nn.Module, prompt: Sequence[int], count: int, cache: Any = None, **options: Any
) -> tuple[int, ...]:
    """What mlx-lm alone generates, greedily."""
    steps = generate_step(mx.array(prompt), target, max_tokens=count, prompt_cache=cache, **options)
    return tuple(int(token) for token, _ in steps)


def fresh_cache(target: nn.Module, tokens: Sequence[int]) -> list[Any]:
    """Caches of a run over tokens, one token a pass."""
    entries = make_prompt_cache(target)
    for token in tokens:
        target(mx.array([[token]]), cache=entries)
        mx.eval([entry.state for entry in entries])
    return entries


def cache_arrays(entries: Sequence[Any]) -> list[mx.array]:
    """What caches hold, without the room they keep for later."""
    found: list[mx.array] = []
    for entry in entries:
        if hasattr(entry, "offset") and getattr(entry, "keys", None) is not None:
            found += [entry.keys[..., : entry.offset, :], entry.values[..., : entry.offset, :]]
        elif hasattr(entry, "cache"):
            found += [a for a in entry.cache if a is not None]
    return found


def same_caches(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether two lists of caches hold the same, up to rounding."""
    one, two = cache_arrays(ours), cache_arrays(theirs)
    return len(one) == len(two) and all(
        a.shape == b.shape and bool(mx.allclose(a, b, rtol=1e-4, atol=1e-5))
        for a, b in zip(one, two, strict=True)
    )


def plugins(*extra: Any) -> PluginManager:
    """The built-in plugins and those given, nothing that happens to be installed."""
    return PluginManager(entry_points=False, extra=extra)


class Offer:
    """A plugin that offers components by kind: ``Offer(drafter={"name": part})``.

    A part is a class, a ``"module:attribute"``, or an object that is ready to use.
    """

    def __init__(self, name: str = "offer", **kinds: dict[str, Any]) -> None:
        self.__name__ = name
        self._kinds = kinds

    def _offer(self, kind: str, register: Callable[..., None]) -> None:
        for name, part in self._kinds.get(kind, {}).items():
            if isinstance(part, type | str):
                register(name, part)
            else:
                register(name, _ready(part), part.info)

    @hookimpl
    def register_target_adapters(self, register: Any) -> None:
        self._offer("adapter", register)

    @hookimpl
    def register_drafters(self, register: Any) -> None:
        self._offer("drafter", register)

    @hookimpl
    def register_verifiers(self, register: Any) -> None:
        self._offer("verifier", register)

    @hookimpl
    def register_acceptance_policies(self, register: Any) -> None:
        self._offer("acceptance", register)

    @hookimpl
    def register_cache_rollbacks(self, register: Any) -> None:
        self._offer("rollback", register)

    @hookimpl
    def register_width_policies(self, register: Any) -> None:
        self._offer("width", register)

    @hookimpl
    def register_nodes(self, register: Any) -> None:
        self._offer("node", register)


def _ready(part: Any) -> Callable[[], Any]:
    return lambda: part


class Scripted:
    """A drafter that proposes from a script: ``script(text so far with anchor, width) -> ids``.

    Attributes:
        observed: the tokens of every `observe`.
        asked: (anchor, width) of every `propose`.
    """

    info = ComponentInfo("scripted", law=DraftLaw.DETERMINISTIC, default_width=4)

    def __init__(
        self, script: Callable[[list[int], int], Any], max_width: int | None = None
    ) -> None:
        self._script = script
        self.info = ComponentInfo(
            "scripted", law=DraftLaw.DETERMINISTIC, default_width=4, max_width=max_width
        )
        self.observed: list[tuple[int, ...]] = []
        self.asked: list[tuple[int, int]] = []

    def open(self, request: Any) -> Scripted:
        self.observed, self.asked = [], []
        return self

    def observe(self, committed: Any, features: Any) -> None:
        self.observed.append(tuple(committed[0]))

    def propose(self, anchor: mx.array, width: int, sampling: Any) -> Draft:
        (token,) = anchor.tolist()
        self.asked.append((token, width))
        text = [t for tokens in self.observed for t in tokens] + [token]
        answer = self._script(text, width)
        if not isinstance(answer, list | tuple):
            return answer
        if not answer:
            return Draft.empty()
        return Draft.deterministic(mx.array([list(answer)]), source="scripted")


def knows(answer: Sequence[int], prompt: Sequence[int] = PROMPT) -> Scripted:
    """A drafter that proposes what the target will say."""
    text = [*prompt, *answer]
    return Scripted(lambda known, width: text[len(known) : len(known) + width])


def half_right(answer: Sequence[int], right: int, prompt: Sequence[int] = PROMPT) -> Scripted:
    """A drafter whose first `right` tokens are right and whose others are wrong."""
    text = [*prompt, *answer]

    def script(known: list[int], width: int) -> list[int]:
        block = text[len(known) : len(known) + width]
        return [t if i < right else (t + 1) % VOCAB for i, t in enumerate(block)]

    return Scripted(script)


def pipeline_of(
    drafter: Any = "none",
    *extra: Any,
    target: nn.Module | None = None,
    tokenizer: Any = None,
    configure: Callable[[PipelineBuilder], PipelineBuilder] = lambda builder: builder,
) -> Pipeline:
    """A pipeline over a tiny model.

    Args:
        drafter: a drafter object, or the name of a registered one.
        *extra: plugins.
        target: the model; by default the shared attention model.
        tokenizer: of the target; None for token ids only.
        configure: makes further choices.
    """
    if not isinstance(drafter, str):
        extra = (Offer("drafter-under-test", drafter={"under-test": drafter}), *extra)
        drafter = "under-test"
    builder = PipelineBuilder(plugins=plugins(*extra))
    builder = builder.model(model() if target is None else target, tokenizer)
    return configure(builder.drafter(drafter).width("fixed")).build()


DFLASH = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "block_size": 5,
    "num_target_layers": 2,
    "dflash_config": {"target_layer_ids": [0, 1], "mask_token_id": 3},
}


def write_dflash(folder: Path, weights: bool = True, **changes: Any) -> Path:
    """A random DFlash checkpoint in the layout of the public ones."""
    from draftloom.drafters.dflash import DFlashModel
    from draftloom.drafters.formats import describe_checkpoint
    from draftloom.model_info import ModelInfo

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(DFLASH | changes))
    if weights:
        mx.random.seed(7)
        network = DFlashModel(describe_checkpoint(ModelInfo.from_path(folder)))  # type: ignore
        tensors = dict(tree_flatten(network.parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def write_config(folder: Path, config: dict[str, Any] = ATTENTION, **changes: Any) -> Path:
    """A model folder that has only its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
