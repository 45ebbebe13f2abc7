"""The short way in: `load` a pipeline, or stream as with mlx-lm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import attrs
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from draftloom.builder import PipelineBuilder
from draftloom.contracts import TargetAdapter
from draftloom.engine import Engine
from draftloom.errors import UsageError
from draftloom.kernel_settings import tune_by_default
from draftloom.model_info import ModelInfo
from draftloom.pipeline import GenerateOptions, Pipeline
from draftloom.plugins import PluginManager
from draftloom.sampling import LogitsProcessor, SamplingParams, log_probs
from draftloom.spec import ComponentSpec

__all__ = ["StreamOptions", "load", "stream_generate"]


def load(
    target: str | Path = "",
    drafter: str = "auto",
    *,
    dtype: str = "auto",
    plugins: PluginManager | None = None,
) -> Pipeline:
    """Build a pipeline with every default.

    Args:
        target: folder, hub repository or bundled name; empty is the bundled pair.
        drafter: ``auto`` finds the target's own; else a registered name or a checkpoint.
        dtype: ``auto``, ``stored``, ``float32``, ``bfloat16`` or ``float16``.
        plugins: by default all installed ones.

    Raises:
        ModelError, GraphError: see `PipelineBuilder.build`.
    """
    return PipelineBuilder(target, plugins=plugins).dtype(dtype).drafter(drafter).build()


class StreamOptions(TypedDict, total=False):
    """What `stream_generate` takes besides: mlx-lm's names, with their meaning there, and the
    sampling parameters as numbers."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    xtc_probability: float
    xtc_threshold: float
    xtc_special_tokens: Sequence[int] | None
    repetition_penalty: float
    repetition_context_size: int
    presence_penalty: float
    presence_context_size: int
    frequency_penalty: float
    frequency_context_size: int
    logit_bias: Mapping[int, float]
    logits_processors: Sequence[LogitsProcessor]
    num_draft_tokens: int
    prompt_cache: list[Any]
    prefill_step_size: int
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    prompt_progress_callback: Callable[[int, int], None]


_SAMPLING = tuple(field.name for field in attrs.fields(SamplingParams))

_REPLACED = {
    "sampler": "give temperature, top_p, top_k, min_p, xtc_probability: a draft is judged by the "
    "law that they make, and a sampler gives tokens only",
}
"""mlx-lm's arguments that are asked for in another way here."""


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    *,
    drafter: str | ComponentSpec = "auto",
    **options: Unpack[StreamOptions],
) -> Iterator[GenerationResponse]:
    """Yield what `mlx_lm.stream_generate` yields, token by token, decoded speculatively.

    Args:
        model: a target that mlx-lm loaded. It is put back as it was when the text ends.
        tokenizer: its tokenizer.
        prompt: text or token ids.
        max_tokens: tokens at most; -1 goes up to the context limit.
        draft_model: a smaller model that mlx-lm loaded, for the autoregressive drafter.
        drafter: a registered name, a checkpoint or a component; ``auto`` is `draft_model` where
            one is given and prompt lookup where not.
        **options: see `StreamOptions`. mlx-lm's `sampler` callable is not taken: give the
            sampling parameters instead. `logits_processors` are mlx-lm's, called once a verified
            position.

    Raises:
        UsageError: an argument that cannot be honoured.
        ModelError, GraphError: the model or the pipeline cannot be served.
    """
    for name in options:
        if name not in StreamOptions.__annotations__:
            known = ", ".join(StreamOptions.__annotations__)
            raise UsageError(
                f"stream_generate does not take {name!r}",
                _REPLACED.get(name, f"it takes {known}"),
            )
    wrapper = tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)
    builder = PipelineBuilder().model(model, wrapper)
    if draft_model is None and drafter == "auto":
        builder = builder.drafter("prompt-lookup")
    elif draft_model is None:
        builder = builder.drafter(drafter)
    if "num_draft_tokens" in options:
        builder = builder.width(options["num_draft_tokens"])
    builder = builder.kv_cache(
        options.get("kv_bits"),
        options.get("kv_group_size", 64),
        options.get("quantized_kv_start", 5000),
    )
    chosen = GenerateOptions(
        max_tokens=None if max_tokens == -1 else max_tokens,
        **{name: options[name] for name in _SAMPLING if name in options},  # type: ignore
        cache=options.get("prompt_cache"),
        prefill_chunk=options.get("prefill_step_size"),
        on_prefill=options.get("prompt_progress_callback"),
    )
    return _responses(builder, prompt, chosen, draft_model)


def _adapt(plugins: PluginManager, model: nn.Module) -> TargetAdapter:
    info = ModelInfo.from_model(model)
    factory = plugins.adapter_for(info).load()
    adapter: TargetAdapter = factory(model, factory.describe(info))
    tune_by_default(adapter, plugins)
    return adapter


def _responses(
    builder: PipelineBuilder, prompt: Any, options: GenerateOptions, draft_model: nn.Module | None
) -> Iterator[GenerationResponse]:
    draft = None if draft_model is None else _adapt(builder.plugins, draft_model)
    try:
        if draft is not None:
            builder = builder.drafter("autoregressive", model=draft)
        with builder.build() as pipeline:
            ids: Any = prompt.tolist() if isinstance(prompt, mx.array) else prompt
            engine = pipeline.engine(pipeline.encode(ids), options)
            with wired_limit(pipeline.model):
                try:
                    yield from _tokens(engine, pipeline)
                finally:
                    if options.cache is not None:
                        engine.absorb_last()  # mlx-lm's caches hold the last token as well
    finally:
        if draft is not None:
            draft.close()


def _tokens(engine: Engine, pipeline: Pipeline) -> Iterator[GenerationResponse]:
    """One response a token; the last one carries the finish reason, as in mlx-lm."""
    detokenizer, eos = pipeline.tokenizer.detokenizer, pipeline.tokenizer.eos_token_ids
    stats, begin, prompt_seconds, count = engine.stats, time.perf_counter(), 0.0, 0
    for event in engine.cycles():
        if event.index == 0:
            prompt_seconds = time.perf_counter() - begin
            begin = time.perf_counter()
        for position, token in enumerate(event.token_ids):
            count += 1
            last = event.finish_reason is not None and position + 1 == len(event.token_ids)
            if token not in eos:
                detokenizer.add_token(token)
            if last:
                detokenizer.finalize()
            response = GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                logprobs=log_probs(engine.logits_row(position)),
                from_draft=position < event.accepted,
                prompt_tokens=stats.prompt_tokens,
                prompt_tps=stats.prompt_tokens / prompt_seconds,
                generation_tokens=count,
                generation_tps=count / max(time.perf_counter() - begin, 1e-9),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=event.finish_reason if last else None,
            )
            try:
                yield response
            except GeneratorExit:
                engine.cut(position + 1)
                raise
