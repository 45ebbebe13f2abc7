"""Every model of mlx-lm that has no tests of its own: it runs through the generic adapter with the
target's own text, or says in one line why not."""

from __future__ import annotations

import pytest

from draftloom.contracts import CacheKind
from tests.parity.test_more_families_text import cycles_of
from tests.support import pipelines
from tests.support.every_module import NOT_RUN, outcomes, tested_types
from tests.support.families_more import adapted

SERVED = {outcome.name: outcome for outcome in outcomes() if outcome.target is not None}
NOT_TRIED = {
    "baichuan_m1", "bailing_moe_linear", "gemma3n", "kimi_k3", "lille-130m", "llama4",
    "nemotron-nas",
}  # fmt: skip
"""Modules whose config nobody has made tiny here. A module that mlx-lm adds is tried by itself;
give it what it lacks in `tests/support/every_module.py`, or name it here."""


def test_every_module_is_tested_served_or_refused_with_a_reason() -> None:
    found = {outcome.name: outcome for outcome in outcomes()}
    assert len(found) + len(tested_types()) > 110
    assert {name for name, outcome in found.items() if not outcome.tried} == NOT_TRIED
    for outcome in found.values():
        assert (outcome.target is None) == bool(outcome.reason)
        assert "\n" not in outcome.reason
    assert {name for name, o in found.items() if o.reason and o.tried} == {
        "bitnet", "dbrx", "muse_spark", "olmo", "prism_hadamard_qwen35",
    }  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_every_cache_of_a_served_model_has_a_rollback(name: str) -> None:
    outcome = SERVED[name]
    assert outcome.target is not None
    for kind in outcome.target.cache_kinds:
        chosen = pipelines.plugins().rollback_for(kind, outcome.target)
        if kind is CacheKind.OTHER:
            assert chosen == "snapshot"
        assert chosen is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SERVED if name not in NOT_RUN])
def test_a_served_model_keeps_its_text(name: str) -> None:
    outcome = SERVED[name]
    assert outcome.family is not None
    with adapted(outcome.family) as target:
        assert target.info.adapter == "generic"
    assert cycles_of(outcome.family, 20) >= 20
