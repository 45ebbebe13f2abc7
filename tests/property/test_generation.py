"""Greedy text equals plain mlx-lm's, and caches a fresh prefill's, for pipelines of every make.

On the CPU in float32, bit for bit. `test_at_least_5000_cycles` runs every combination of family,
drafter and rollback with fixed draws, and counts; hypothesis draws more, in smaller numbers.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import cases, models
from tests.support.cases import Case
from tests.support.profile import examples

CYCLES = 5000
GROUPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def draws(family: str) -> st.SearchStrategy[Case]:
    # Hypothesis prefers what comes first: another drafter for every family, and no block of one.
    turn = 5 * list(models.FAMILIES).index(family) % len(cases.DRAFTERS)
    return st.builds(
        Case,
        family=st.just(family),
        drafter=st.sampled_from((*cases.DRAFTERS[turn:], *cases.DRAFTERS[:turn])),
        rollback=st.sampled_from(cases.rollbacks_for(family)),
        verifier=st.sampled_from(cases.VERIFIERS),
        block_size=st.sampled_from((7, 16, *range(2, 7), *range(8, 16), 1)),
        prompt=st.lists(st.integers(0, models.VOCAB - 1), min_size=1, max_size=14).map(tuple),
        seed=st.integers(0, 99),
        prefill_chunk=st.sampled_from((1, 2, 5, 2048)),
    )


@pytest.mark.parametrize("family", models.FAMILIES)
def test_text_and_caches_equal_plain_mlx_lm(family: str, folder: Path) -> None:
    @examples(3, family)
    @given(draws(family))
    def check(case: Case) -> None:
        cases.run(case, folder)

    check()


def all_combinations() -> list[Case]:
    """Every family x drafter x rollback under the block verifier, and every family x drafter under
    the sequential one (slow); sizes and prompts drawn with a fixed seed."""
    rng = np.random.default_rng(20_26)
    prompts = {
        family: [tuple(map(int, rng.integers(models.VOCAB, size=size))) for size in (1, 5, 12)]
        for family in models.FAMILIES
    }
    combinations = [
        (family, drafter, rollback, verifier)
        for family in models.FAMILIES
        for drafter, rollback, verifier in itertools.product(
            cases.DRAFTERS, cases.rollbacks_for(family), cases.VERIFIERS
        )
        if verifier == "block" or rollback == "auto"
    ]
    sizes = itertools.cycle(rng.permutation(np.arange(1, 17)).tolist())
    return [
        Case(
            *names,
            block_size=next(sizes),
            prompt=prompts[names[0]][rng.integers(3)],
            seed=int(rng.integers(2**16)),
            prefill_chunk=int(rng.choice([3, 2048])),
        )
        for names in combinations
    ]


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_at_least_5000_cycles(group: int, folder: Path, record_property: object) -> None:
    every = all_combinations()
    assert {case.block_size for case in every} == set(range(1, 17))
    families = list(models.FAMILIES)
    mine = [case for case in every if families.index(case.family) % GROUPS == group]
    cycles = sum(cases.run(case, folder) for case in mine)
    print(f"{cycles} cycles in {len(mine)} generations")
    record_property("cycles", cycles)  # type: ignore[operator]
    assert cycles >= CYCLES / GROUPS


@pytest.mark.slow
@pytest.mark.parametrize("family", models.FAMILIES)
def test_text_and_caches_in_more_draws(family: str, folder: Path) -> None:
    @examples(12, family, "more")
    @given(draws(family))
    def check(case: Case) -> None:
        cases.run(case, folder)

    check()
