"""The built-in adapters, and where models and their drafters are found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from draftloom.contracts import ComponentInfo, LoadedModel, TargetInfo
from draftloom.hookspecs import Register, hookimpl
from draftloom.model_info import ModelInfo
from draftloom.spec import ComponentSpec

if TYPE_CHECKING:
    from draftloom.memory import WeightEstimate

__all__ = [
    "estimate_weights",
    "fetch_weights",
    "load_model",
    "locate_model",
    "register_kernels",
    "register_target_adapters",
    "resolve_drafter",
]


@hookimpl
def register_target_adapters(register: Register) -> None:
    """qwen3-5 and recurrent (hybrids), attention; generic is asked last."""
    register("qwen3-5", "draftloom.adapters.qwen3_5:HybridAdapter")
    register("attention", "draftloom.adapters.attention:AttentionAdapter")
    register("recurrent", "draftloom.adapters.hybrids:RecurrentAdapter")
    register("generic", "draftloom.adapters.generic:GenericAdapter")


@hookimpl
def register_kernels(register: Register) -> None:
    """How a pass is launched: layer by layer, or traced once and replayed."""
    full = "compiled-pass/on"
    summary = "the target's pass is traced once and replayed"
    register(full, "draftloom.adapters.compiled_pass:on", ComponentInfo(full, summary))
    module = "draftloom.adapters.early_launch"
    for name, summary in (("eighths", "a pass in eight pieces"), ("every-layer", "layer by layer")):
        full = f"early-launch/{name}"
        register(full, f"{module}:{name.replace('-', '_')}", ComponentInfo(full, summary))


@hookimpl(trylast=True)
def locate_model(reference: str) -> Path | None:
    """Bundled pairs, folders, hub repositories."""
    from .locate import locate

    return locate(reference)


@hookimpl
def fetch_weights(path: Path) -> None:
    """Repositories of the hub's cache."""
    from .hub import Hub

    Hub().complete(path)


@hookimpl(trylast=True)
def load_model(model: ModelInfo, dtype: str) -> LoadedModel | None:
    """Folders that mlx-lm can load."""
    from .weights import load

    return load(model, dtype)


@hookimpl(trylast=True)
def estimate_weights(model: ModelInfo, dtype: str) -> WeightEstimate | None:
    """From the headers of a folder's safetensors, or the sizes that the hub tells."""
    from .weights import estimate

    return estimate(model, dtype)


@hookimpl(trylast=True)
def resolve_drafter(target: TargetInfo, model: ModelInfo) -> ComponentSpec | None:
    """The drafter of a bundled pair, or of a pair of the registry by the target's exact name."""
    from .bundled import bundled_pairs
    from .hub import Repository
    from .locate import DRAFT_SUFFIX
    from .registry import Registry

    for pair in bundled_pairs().values():
        if model.path is not None and model.path.resolve() == pair.target.resolve():
            return ComponentSpec.make("dflash", {"checkpoint": pair.name + DRAFT_SUFFIX})
    repository = Repository.parse(target.name)
    if repository is None and model.path is not None:
        repository = Repository.of_snapshot(model.path)
    name = target.name if repository is None else repository.name
    found = Registry.load().find(name, model.path)
    return None if found is None else found.spec()
