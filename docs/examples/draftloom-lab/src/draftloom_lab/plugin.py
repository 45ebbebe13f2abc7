"""The hooks: what this distribution brings, by name. The entry point is this module."""

from draftloom import Register, hookimpl


@hookimpl
def register_drafters(register: Register) -> None:
    """lab.repeat-last."""
    register("lab.repeat-last", "draftloom_lab.drafter:RepeatLast")


@hookimpl
def register_acceptance_policies(register: Register) -> None:
    """lab.strict-margin."""
    register("lab.strict-margin", "draftloom_lab.acceptance:StrictMargin")


@hookimpl
def register_cache_rollbacks(register: Register) -> None:
    """lab.copy."""
    register("lab.copy", "draftloom_lab.rollback:CopyRollback")


@hookimpl
def register_target_adapters(register: Register) -> None:
    """lab.phi."""
    register("lab.phi", "draftloom_lab.adapter:PhiAdapter")


@hookimpl
def register_nodes(register: Register) -> None:
    """lab.ban-tokens."""
    register("lab.ban-tokens", "draftloom_lab.node:BanTokens")
