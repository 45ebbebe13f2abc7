"""What a benchmark runs: one loaded target, and the ways of decoding it that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from draftloom.blueprint import Blueprint
from draftloom.builder import PipelineBuilder
from draftloom.errors import UsageError
from draftloom.spec import ComponentSpec, PipelineSpec

__all__ = [
    "ALONE",
    "PLAIN",
    "Simulation",
    "Subject",
    "Variant",
    "load_subject",
    "make_variants",
    "steady",
]

ALONE = "mlx-lm"
PLAIN = "width 0"


@attrs.frozen(eq=False)
class Variant:
    """One way of decoding.

    Attributes:
        name: in tables and plots.
        builder: of its pipeline, over the loaded target; None is plain mlx-lm.
        parts: names of its components; empty for plain mlx-lm.
    """

    name: str
    builder: PipelineBuilder | None
    parts: dict[str, str]


@attrs.frozen
class Simulation:
    """What is simulated.

    Attributes:
        shape: name of the shape.
        rates: probability that a draft token is kept if those before it are, by position; the
            last one holds for all positions after it.
        seed: of weights, prompts and draws.
        prompt_tokens: length of the random prompts.
    """

    shape: str
    rates: tuple[float, ...]
    seed: int = 0
    prompt_tokens: int = 128

    def rate(self, position: int) -> float:
        """The probability at a position, from 0."""
        return self.rates[min(position, len(self.rates) - 1)]


@attrs.frozen(eq=False)
class Subject:
    """A target and its variants. They share the weights; one of them is open at a time.

    Attributes:
        name: of the target.
        model: as mlx-lm loaded it.
        tokenizer: mlx-lm's TokenizerWrapper; None where weights are random.
        variants: the target alone, draftloom without drafts, then the pipelines.
        context_limit: most positions; None is unknown.
        vocab_size: V.
        simulation: where acceptance is simulated and weights are random; else None.
        folder: a temporary folder that the variants need, kept as long as this is.
    """

    name: str
    model: Any
    tokenizer: Any
    variants: tuple[Variant, ...]
    context_limit: int | None
    vocab_size: int
    simulation: Simulation | None = None
    folder: Any = None


def load_subject(named: Sequence[tuple[str, PipelineBuilder]]) -> Subject:
    """Check all pipelines, then load their target once.

    Args:
        named: pipelines and what to call them; at least one.

    Raises:
        UsageError: they have different targets or types, two have one name, or one changes
            logits.
        ModelError, GraphError: one of them cannot be built.
    """
    plans = [(name, builder.check()) for name, builder in named]
    first = plans[0][1]
    for name, plan in plans:
        if plan.sampling.edits_logits:
            raise UsageError(
                f"pipeline {name!r} changes logits (bias, penalties or processors)",
                "bench compares with the target alone: leave them out of `sampling`",
            )
        if (plan.target.name, plan.spec.dtype) != (first.target.name, first.spec.dtype):
            raise UsageError(
                f"pipeline {name!r} has target {plan.target.name} ({plan.spec.dtype}), "
                f"{plans[0][0]!r} has {first.target.name} ({first.spec.dtype})",
                "bench compares pipelines of one target",
            )
    plugins = named[0][1].plugins
    loaded = plugins.load_model(first.model, first.spec.dtype)
    return Subject(
        name=first.target.name,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        variants=make_variants(plans, named[0][1], loaded.model, loaded.tokenizer),
        context_limit=first.target.context_limit,
        vocab_size=first.target.vocab_size,
    )


def steady(builder: PipelineBuilder) -> PipelineBuilder:
    """The pipeline with a width that no clock chooses: where none was chosen, the drafter's own,
    kept whatever it accepts. What is compared then does the same work."""
    if builder.spec.width.use != "auto":
        return builder
    return builder.width("fixed", park=False)


def make_variants(
    plans: Sequence[tuple[str, Blueprint]], builder: PipelineBuilder, model: Any, tokenizer: Any
) -> tuple[Variant, ...]:
    """The target alone, draftloom without drafts, and each plan, over one loaded model. A plan of
    width 0 that goes by that name alone is draftloom without drafts: it is there once.

    Raises:
        UsageError: two variants of one name.
    """

    def over_loaded(spec: PipelineSpec) -> PipelineBuilder:
        return PipelineBuilder(plugins=builder.plugins, spec=spec).model(model, tokenizer)

    first = plans[0][1]
    plain = attrs.evolve(
        first.spec,
        drafter=ComponentSpec("none"),
        width=ComponentSpec.make("fixed", {"tokens": 0}),
        acceptance=ComponentSpec("greedy"),
        inserts=(),
    )
    plain_parts = {**first.names, "drafter": "none", "acceptance": "greedy", "width": "fixed 0"}
    variants = [Variant(ALONE, None, {}), Variant(PLAIN, over_loaded(plain), plain_parts)]
    asked = [
        (name, plan) for name, plan in plans if (name, plan.spec.width) != (PLAIN, plain.width)
    ]
    variants += [Variant(name, over_loaded(plan.spec), _parts(plan)) for name, plan in asked]
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two variants are called {name!r}", "is one given twice?")
    return tuple(variants)


def _parts(plan: Blueprint) -> dict[str, str]:
    """Names of the components, and of kernels that are not chosen automatically."""
    return {**plan.names, **({"kernels": str(plan.kernels)} if plan.kernels.choices else {})}
