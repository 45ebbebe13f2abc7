"""The built-in drafters."""

from __future__ import annotations

from draftloom.hookspecs import Register, hookimpl
from draftloom.model_info import ModelInfo
from draftloom.spec import ComponentSpec

__all__ = ["register_drafters", "resolve_drafter_checkpoint"]


@hookimpl
def register_drafters(register: Register) -> None:
    """dflash, autoregressive, prompt-lookup, cascade, none."""
    register("dflash", "draftloom.drafters.dflash:DFlashDrafter")
    register("autoregressive", "draftloom.drafters.autoregressive:AutoregressiveDrafter")
    register("prompt-lookup", "draftloom.drafters.prompt_lookup:PromptLookupDrafter")
    register("cascade", "draftloom.drafters.cascade:CascadeDrafter")
    register("none", "draftloom.drafters.none:NoDrafter")


@hookimpl(trylast=True)
def resolve_drafter_checkpoint(model: ModelInfo) -> ComponentSpec | None:
    """dflash for its checkpoints; any other model drafts autoregressively."""
    from .dflash.config import is_dflash

    if is_dflash(model):
        return ComponentSpec.make("dflash", {"checkpoint": model.name})
    return ComponentSpec.make("autoregressive", {"model": model.name})
