"""The built-in drafters."""

from __future__ import annotations

from collections.abc import Callable

from draftloom.checkpoint import DrafterDescription
from draftloom.contracts import ComponentInfo
from draftloom.hookspecs import Register, hookimpl
from draftloom.model_info import ModelInfo
from draftloom.spec import ComponentSpec

__all__ = [
    "read_drafter_checkpoint",
    "register_drafters",
    "register_kernels",
    "resolve_drafter_checkpoint",
]


@hookimpl
def register_drafters(register: Register) -> None:
    """dflash, dflash2, dspark, autoregressive, prompt-lookup, cascade, none."""
    register("dflash", "draftloom.drafters.dflash:DFlashDrafter")
    register("dflash2", "draftloom.drafters.dflash2:DFlash2Drafter")
    register("dspark", "draftloom.drafters.dspark:DSparkDrafter")
    register("autoregressive", "draftloom.drafters.autoregressive:AutoregressiveDrafter")
    register("prompt-lookup", "draftloom.drafters.prompt_lookup:PromptLookupDrafter")
    register("cascade", "draftloom.drafters.cascade:CascadeDrafter")
    register("none", "draftloom.drafters.none:NoDrafter")


@hookimpl
def register_kernels(register: Register) -> None:
    """How a drafter's pass is launched."""
    for name, summary in (
        ("on", "a drafter's pass over a block is traced once and replayed"),
        ("ahead", "the same, and launched before the host knows what the draft goes on from"),
    ):
        full = f"compiled-draft/{name}"
        register(full, f"draftloom.drafters.dflash.compiled:{name}", ComponentInfo(full, summary))


@hookimpl(trylast=True)
def read_drafter_checkpoint(model: ModelInfo) -> DrafterDescription | None:
    """speculators, DSpark, SpecForge, z-lab (DFlash and DFlash 2)."""
    from .formats import describe_checkpoint

    return describe_checkpoint(model)


@hookimpl(trylast=True)
def resolve_drafter_checkpoint(
    model: ModelInfo, describe: Callable[[], DrafterDescription | None]
) -> ComponentSpec | None:
    """The drafter that the checkpoint's description names; any other model drafts
    autoregressively."""
    description = describe()
    if description is not None:
        return ComponentSpec.make(description.drafter, {"checkpoint": model.name})
    return ComponentSpec.make("autoregressive", {"model": model.name})
