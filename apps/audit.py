"""Is the text really the target's own? The pipeline against the target alone, token by token.

The reference is plain mlx-lm (`mlx_lm.generate.generate_step`) on the very same loaded weights: the
pipeline generates first, is then closed, which takes its taps and recorders out of the model, and
only then does mlx-lm run. Nothing of draftloom takes part in the reference.

A first difference is judged by the target's own logits there, as plain decoding computes them.
Where two tokens are as good as equal, a device whose products depend on the number of rows may
take either: a *tie*. Everything else is a *bug*.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors

from draftloom.sampling import SamplingParams

if TYPE_CHECKING:
    from draftloom.builder import PipelineBuilder

__all__ = [
    "AuditReport",
    "Difference",
    "PromptAudit",
    "Reference",
    "Verdict",
    "first_difference",
    "judge",
    "run_audit",
    "tie_bound",
]

Verdict = Literal["tie", "bug"]

_RELATIVE_BOUND = {mx.float32: 2e-5, mx.float16: 8e-3, mx.bfloat16: 3.2e-2}


@attrs.frozen
class Difference:
    """The first position at which two texts differ.

    Attributes:
        position: index of the token in the generated text.
        pipeline_token: the pipeline's token; None where its text had ended.
        target_token: the target's own; None where its text had ended.
        pipeline_logit: the target's logit of the pipeline's token, by plain decoding.
        target_logit: that of its own token.
        margin: target_logit - pipeline_logit; None where one of the texts had ended.
        bound: a margin up to this is a tie.
        verdict: ``tie`` or ``bug``.
    """

    position: int
    pipeline_token: int | None
    target_token: int | None
    pipeline_logit: float | None
    target_logit: float | None
    margin: float | None
    bound: float
    verdict: Verdict


@attrs.frozen
class PromptAudit:
    """One prompt, both ways.

    Attributes:
        prompt: its text.
        prompt_tokens: its length in tokens.
        tokens: tokens the pipeline generated.
        identical: whether the target alone wrote the very same tokens.
        acceptance_length: tokens a cycle.
        fell_back: why the drafter was given up; empty where it was not.
        difference: the first one; None where identical.
    """

    prompt: str
    prompt_tokens: int
    tokens: int
    identical: bool
    acceptance_length: float
    fell_back: str
    difference: Difference | None


@attrs.frozen
class AuditReport:
    """All prompts.

    Attributes:
        pipeline: names of target, adapter, drafter, verifier, acceptance, rollback, width.
        dtype: what the target computes logits in.
        device: where it ran.
        prompts: one entry a prompt.
    """

    pipeline: dict[str, str]
    dtype: str
    device: str
    prompts: tuple[PromptAudit, ...]

    def count(self, verdict: Verdict) -> int:
        """Prompts whose first difference has this verdict."""
        found = [p.difference for p in self.prompts if p.difference is not None]
        return sum(difference.verdict == verdict for difference in found)

    @property
    def verdict(self) -> Literal["identical", "tie", "bug"]:
        """The worst verdict of all prompts."""
        if self.count("bug"):
            return "bug"
        return "tie" if self.count("tie") else "identical"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `draftloom audit --json` prints it."""
        counts = {
            "verdict": self.verdict,
            "identical": sum(p.identical for p in self.prompts),
            "ties": self.count("tie"),
            "bugs": self.count("bug"),
        }
        return {**counts, **attrs.asdict(self), "prompts": [attrs.asdict(p) for p in self.prompts]}


@attrs.frozen(eq=False)
class Reference:
    """What the target wrote alone, up to where it left the pipeline's text.

    Attributes:
        tokens: its tokens, those that agree and the first that does not.
        logits: its logits [V] at the last of them.
    """

    tokens: tuple[int, ...]
    logits: mx.array


def tie_bound(dtype: mx.Dtype, *logits: float) -> float:
    """The margin up to which a difference counts as a tie.

    A share of the larger logit (of 1 where both are smaller): 2e-5 in float32, where a sum of some
    thousand products in another order differs by about 1e-5 of its size; 8e-3 in float16 and
    3.2e-2 in bfloat16, which is 8 and 4 steps of the type: a logit of 20 then ties within 4e-4,
    0.16 and 0.64.

    Args:
        dtype: of the target's logits.
        *logits: those that are compared.
    """
    return _RELATIVE_BOUND.get(dtype, 2e-5) * max([1.0, *map(abs, logits)])


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token that differs, the end of a text counting as one; None if equal."""
    for index, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            return index
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def judge(position: int, ours: int | None, theirs: int | None, logits: mx.array) -> Difference:
    """The verdict on a difference. A text that ended where the other went on is a bug.

    Args:
        position: index of the token.
        ours, theirs: the pipeline's token and the target's; None at the end of a text.
        logits: [V] of the target alone, at that position.
    """
    if ours is None or theirs is None:
        bound = tie_bound(logits.dtype)
        return Difference(position, ours, theirs, None, None, None, bound, "bug")
    pair: Any = logits[mx.array([ours, theirs])].astype(mx.float32).tolist()
    our, their = pair
    margin, bound = their - our, tie_bound(logits.dtype, our, their)
    # NaN compares false: a margin that is no number is a bug.
    verdict: Verdict = "tie" if abs(margin) <= bound else "bug"
    return Difference(position, ours, theirs, our, their, margin, bound, verdict)


def run_reference(
    model: Any,
    prompt: Sequence[int],
    ours: Sequence[int],
    eos: frozenset[int],
    limit: int,
    kv_cache: Mapping[str, int] | None = None,
    params: SamplingParams | None = None,
) -> Reference:
    """Let mlx-lm decode until the text ends or leaves `ours`.

    Args:
        model: as mlx-lm loaded it.
        prompt: token ids.
        ours: the pipeline's tokens.
        eos: tokens that end the text.
        limit: tokens at most.
        kv_cache: mlx-lm's settings of quantized caches; None for plain ones.
        params: its bias, penalties and processors are applied by mlx-lm.
    """
    rows: deque[mx.array] = deque()

    def keep(_: mx.array, logits: mx.array) -> mx.array:
        rows.append(logits[0])
        return logits

    tokens: list[int] = []
    row = mx.zeros((1,))
    settings: Any = kv_cache or {}
    processors = [*_processors(params or SamplingParams()), keep]
    steps = generate_step(
        mx.array(list(prompt)), model, max_tokens=limit, logits_processors=processors, **settings
    )
    for token, _ in steps:
        row = rows.popleft()  # mlx-lm is one step ahead: the later rows are of later tokens
        index = len(tokens)
        tokens.append(int(token))
        if tokens[-1] in eos or index >= len(ours) or tokens[-1] != ours[index]:
            break
    return Reference(tuple(tokens), row)


def _processors(params: SamplingParams) -> list[Any]:
    """mlx-lm's own processors for the same parameters."""
    built_in = make_logits_processors(
        logit_bias=dict(params.logit_bias),
        **params.penalties(),
        repetition_context_size=params.repetition_context_size,
        presence_context_size=params.presence_context_size,
        frequency_context_size=params.frequency_context_size,
    )
    return [*built_in, *params.logits_processors]


@attrs.frozen
class _Generated:
    """What the pipeline did with a prompt."""

    text: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    acceptance_length: float
    fell_back: str


def run_audit(
    builder: PipelineBuilder, prompts: Sequence[str], max_tokens: int = 64
) -> AuditReport:
    """Generate greedily from each prompt, both ways, and compare.

    Args:
        builder: the pipeline to be judged.
        prompts: texts, taken as they are (no chat template).
        max_tokens: tokens a prompt at most.

    Raises:
        ModelError, GraphError: the pipeline cannot be built.
        UsageError: a prompt that cannot be run.
        GenerationError: the target failed.
    """
    with builder.build() as pipeline:
        generated = []
        for text in prompts:
            ids = pipeline.encode(text)
            # Greedy decoding has no use for XTC, and refuses it.
            result = pipeline.generate(
                ids, max_tokens=max_tokens, temperature=0.0, xtc_probability=0.0
            )
            generated.append(
                _Generated(
                    text,
                    ids,
                    result.token_ids,
                    result.stats.acceptance_length,
                    result.stats.fell_back,
                )
            )
        model, names = pipeline.model, result.pipeline if generated else pipeline.names
        eos = frozenset(getattr(pipeline.tokenizer, "eos_token_ids", None) or ())
        context, kv_cache = pipeline.target.context_limit, pipeline.spec.kv_cache
        params = pipeline.sampling
    # The pipeline is closed: the model is as mlx-lm loaded it.
    entries, dtype = [], ""
    settings = None if kv_cache is None else attrs.asdict(kv_cache)
    for item in generated:
        limit = max_tokens if context is None else min(max_tokens, context - len(item.prompt))
        reference = run_reference(model, item.prompt, item.tokens, eos, limit, settings, params)
        dtype = str(reference.logits.dtype).removeprefix("mlx.core.")
        entries.append(_compare(item, reference))
    return AuditReport(names, dtype, str(mx.default_device()), tuple(entries))


def _compare(item: _Generated, reference: Reference) -> PromptAudit:
    position, difference = first_difference(item.tokens, reference.tokens), None
    if position is not None:
        ours, theirs = (
            tokens[position] if position < len(tokens) else None
            for tokens in (item.tokens, reference.tokens)
        )
        difference = judge(position, ours, theirs, reference.logits)
    return PromptAudit(
        prompt=item.text,
        prompt_tokens=len(item.prompt),
        tokens=len(item.tokens),
        identical=difference is None,
        acceptance_length=item.acceptance_length,
        fell_back=item.fell_back,
        difference=difference,
    )
