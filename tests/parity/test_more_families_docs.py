"""The page of families is the one that the adapters and these tests give.

``python -m tests.parity.test_more_families_docs`` writes it anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from draftloom.adapters import attention, qwen3_5
from draftloom.contracts import TargetInfo
from draftloom.model_info import ModelInfo
from tests.parity.test_more_families_text import ASKED
from tests.support import models, pipelines
from tests.support.every_module import NOT_RUN, outcomes
from tests.support.families_more import GENERIC, MORE, RECURRENT, SLIDING

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "families.md"

VARIANTS = {"llama-sliding": "sliding layers", "llama-3.1": "Llama 3.1's rope"}

HEAD = """\
# Families

Written by a test from the adapters and from what is tested;
`tests/parity/test_more_families_docs.py` fails when this page is out of date.

Every family below is compared with stock mlx-lm on a tiny random model, in float32 on the CPU:

- **bits**: logits, hidden states of every layer, head and embeddings are equal bit for bit, over a
  prefill, blocks and single steps; where *taps* says no, logits only.
- **N cycles**: greedy text equals plain mlx-lm's token for token over at least N cycles with drafts
  that mislead on purpose, verified in blocks and one by one, with prompts longer than the window
  and block sizes between 1 and 16 (where there is a window: every one of them); caches are compared
  with those of a fresh prefill. A sliding window that has wrapped holds its keys in another order,
  which sums feel (about 1e-5).

| Model type | Adapter | Taps | Caches | Rollback | Tested |
|---|---|---|---|---|---|
"""

REST = """
## Every other model of mlx-lm

Walked by `tests/parity/test_every_module.py`: each module gets the smallest config that a general
rule makes for it. *Served* is: greedy text equals plain mlx-lm's over 20 cycles of drafts that
mislead.

| Module | | Taps | Caches | Rollback |
|---|---|---|---|---|
"""

TAIL = """
A model type that is not in the table and that mlx-lm can load is claimed by `generic`, asked after
every other adapter: prompt lookup and an autoregressive drafter serve it. Hidden states are offered
where the model, run once without weights, shows that each layer takes what the one before it gave.
A model that cannot be served says why in one line;
[Write an adapter](../how-to/write-an-adapter.md) shows what to do.
"""


def described(name: str, config: dict[str, object]) -> TargetInfo:
    info = ModelInfo(name, None, config)
    component = pipelines.plugins().adapter_for(info)
    target: TargetInfo = component.load().describe(info)
    assert target.adapter == component.name
    return target


def row(config: dict[str, object], tested: str) -> str:
    info = described("x", config)
    kinds = list(dict.fromkeys(info.cache_kinds))
    rollbacks = [pipelines.plugins().rollback_for(kind, info) for kind in kinds]
    cells = (
        f"`{config['model_type']}`",
        f"`{info.adapter}`",
        "yes" if info.can_tap else "no",
        ", ".join(kinds),
        ", ".join(dict.fromkeys(str(name) for name in rollbacks)),
        tested,
    )
    return f"| {' | '.join(cells)} |\n"


def rows() -> Iterator[str]:
    windowed = {family.name for family in SLIDING} | {"recurrent_gemma"}
    seen: set[object] = set()
    for family in models.FAMILIES.values():
        if family.config["model_type"] not in seen:
            seen.add(family.config["model_type"])
            yield row(family.config, "bits, 5000 cycles together")
    further_ones = [
        family
        for group in (MORE, RECURRENT, GENERIC)
        for family in sorted(group.values(), key=lambda f: f.name)
    ]
    for further in further_ones:
        asked = further.name in windowed or further.name in ASKED
        tested = f"bits, {200 if asked else 50} cycles"
        line = row(further.config, tested)
        if further.name != further.model_type:
            line = line.replace(" | ", f" ({VARIANTS[further.name]}) | ", 1)
        yield line


def other_rows() -> Iterator[str]:
    for outcome in outcomes():
        info = outcome.target
        if info is None:
            what = "refused" if outcome.tried else "not tried, its config is not made here"
            reason = f"{what}: {outcome.reason[:110]}" if outcome.tried else what
            yield f"| `{outcome.name}` | {reason} | | | |\n"
            continue
        kinds = list(dict.fromkeys(info.cache_kinds))
        rollbacks = dict.fromkeys(
            str(pipelines.plugins().rollback_for(kind, info)) for kind in kinds
        )
        ran = "served" if outcome.name not in NOT_RUN else "described, its text not compared"
        cells = (
            f"`{outcome.name}`", ran, "yes" if info.can_tap else "no", ", ".join(kinds),
            ", ".join(rollbacks),
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |\n"


def page() -> str:
    return HEAD + "".join(rows()) + TAIL + REST + "".join(other_rows())


def test_the_page_of_families_is_up_to_date() -> None:
    command = "python -m tests.parity.test_more_families_docs"
    assert PAGE.read_text(encoding="utf-8") == page(), f"write it anew: {command}"


def test_every_claimed_model_type_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    inner = {"qwen3_5_text", "qwen3_5_moe_text"}  # not loaded by themselves
    types = {*attention.MODEL_TYPES, *attention.FURTHER_MODEL_TYPES, *qwen3_5.MODEL_TYPES} - inner
    assert {name for name in types if f"| `{name}`" not in text} == set()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
