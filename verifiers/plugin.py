"""The built-in verifiers, acceptance policies and width policies."""

from __future__ import annotations

from draftloom.hookspecs import Register, hookimpl

__all__ = ["register_acceptance_policies", "register_verifiers", "register_width_policies"]


@hookimpl
def register_verifiers(register: Register) -> None:
    """block, sequential."""
    register("block", "draftloom.verifiers.block:BlockVerifier")
    register("sequential", "draftloom.verifiers.sequential:SequentialVerifier")


@hookimpl
def register_acceptance_policies(register: Register) -> None:
    """auto, greedy, speculative-sampling, block-verification, typical."""
    package = "draftloom.verifiers.acceptance"
    register("auto", f"{package}.auto:AutoAcceptance")
    register("greedy", f"{package}.greedy:GreedyAcceptance")
    register("speculative-sampling", f"{package}.speculative_sampling:SpeculativeSampling")
    register("block-verification", f"{package}.block_verification:BlockVerification")
    register("typical", f"{package}.typical:TypicalAcceptance")


@hookimpl
def register_width_policies(register: Register) -> None:
    """auto, fixed, adaptive."""
    register("auto", "draftloom.verifiers.width.auto:AutoWidth")
    register("fixed", "draftloom.verifiers.width.fixed:FixedWidth")
    register("adaptive", "draftloom.verifiers.width.adaptive:AdaptiveWidth")
