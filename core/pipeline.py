"""A built pipeline: generate text, stream it, look at it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import attrs
from mlx_lm.generate import wired_limit

from draftloom.abilities import Calibratable, serving
from draftloom.calibration import calibrate
from draftloom.contracts import CycleNode, TargetInfo
from draftloom.engine import Engine
from draftloom.errors import UsageError
from draftloom.events import CycleEvent, FinishReason, GenerationStats, TokenLogprob
from draftloom.graph import Graph
from draftloom.parts import EngineParts, EngineRequest
from draftloom.sampling import LogitsProcessor, SamplingParams
from draftloom.spec import PipelineSpec
from draftloom.text import TextStream

__all__ = ["Chunk", "GenerateOptions", "GenerationResult", "Message", "Pipeline", "Prompt"]

Message = dict[str, Any]
"""A chat message: ``{"role": ..., "content": ...}``."""
LogitBias = Mapping[int, float] | tuple[tuple[int, float], ...]
"""Numbers by token id."""
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or the messages of a chat."""


def _stop(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@attrs.frozen(kw_only=True)
class GenerateOptions:
    """How one text is generated.

    Attributes:
        max_tokens: tokens at most; None goes up to the context limit.
        temperature, top_p, top_k, min_p, seed, xtc_probability, xtc_threshold,
        xtc_special_tokens, repetition_penalty, repetition_context_size, presence_penalty,
        presence_context_size, frequency_penalty, frequency_context_size, logit_bias,
        logits_processors: see `SamplingParams`; None keeps the pipeline's.
        logprobs: give the log-probability of every token.
        top_logprobs: give so many of the most likely tokens with it.
        stop: strings that end the text.
        ignore_eos: go on past end-of-sequence tokens (for benchmarks).
        thinking: for chat templates that have the switch; None is the template's default.
        prefill_chunk: prompt tokens run at once; None is the pipeline's `prefill_step_size`.
        cache: the target's caches to go on with; the prompt is what follows them.
        cancelled: polled once a cycle; True ends the text there.
        on_prefill: told (tokens done, tokens of the prompt).
        on_cycle: told every `CycleEvent`.
    """

    max_tokens: int | None = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    xtc_special_tokens: Sequence[int] | None = None
    repetition_penalty: float | None = None
    repetition_context_size: int | None = None
    presence_penalty: float | None = None
    presence_context_size: int | None = None
    frequency_penalty: float | None = None
    frequency_context_size: int | None = None
    logit_bias: LogitBias | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    stop: tuple[str, ...] = attrs.field(default=(), converter=_stop)
    ignore_eos: bool = False
    thinking: bool | None = None
    prefill_chunk: int | None = None
    cache: list[Any] | None = None
    cancelled: Callable[[], bool] | None = None
    on_prefill: Callable[[int, int], None] | None = None
    on_cycle: Callable[[CycleEvent], None] | None = None

    def sampling(self, default: SamplingParams) -> SamplingParams:
        """The default with what was given here on top."""
        names = [field.name for field in attrs.fields(SamplingParams)]
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        return attrs.evolve(default, **given)


class OptionNames(TypedDict, total=False):
    """The fields of `GenerateOptions`, as keyword arguments."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    xtc_probability: float | None
    xtc_threshold: float | None
    xtc_special_tokens: Sequence[int] | None
    repetition_penalty: float | None
    repetition_context_size: int | None
    presence_penalty: float | None
    presence_context_size: int | None
    frequency_penalty: float | None
    frequency_context_size: int | None
    logit_bias: LogitBias | None
    logits_processors: Sequence[LogitsProcessor] | None
    logprobs: bool
    top_logprobs: int
    stop: str | Sequence[str]
    ignore_eos: bool
    thinking: bool | None
    prefill_chunk: int | None
    cache: list[Any] | None
    cancelled: Callable[[], bool] | None
    on_prefill: Callable[[int, int], None] | None
    on_cycle: Callable[[CycleEvent], None] | None


@attrs.frozen
class Chunk:
    """What one cycle added to the text.

    Attributes:
        text: whole characters; may be empty while a character or a stop string is unfinished.
        token_ids: tokens committed by the cycle.
        cycle: the cycle itself.
        finish_reason: set on the last chunk.
    """

    text: str
    token_ids: tuple[int, ...]
    cycle: CycleEvent
    finish_reason: FinishReason | None = None

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """One record a token, where they were asked for."""
        return self.cycle.logprobs[: len(self.token_ids)]


@attrs.frozen
class GenerationResult:
    """A finished text.

    Attributes:
        text: without end-of-sequence token and stop string.
        token_ids: every token emitted, the one that ended the text included.
        finish_reason: ``stop`` (end-of-sequence or a stop string), ``length`` or ``cancelled``.
        stats: counts and rates.
        seed: the seed in use.
        pipeline: names of target, adapter, drafter, verifier, acceptance, rollback, width.
        lossless: whether the acceptance policy promises the target's own tokens or law.
        logprobs: one record a token of `token_ids`; None where they were not asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats
    seed: int
    pipeline: dict[str, str]
    lossless: bool = True
    logprobs: tuple[TokenLogprob, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as the command line prints it; ``logprobs`` only where asked for."""
        stats, scores = self.stats, {}
        if self.logprobs is not None:
            scores["logprobs"] = [record.as_dict() for record in self.logprobs]
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "prompt_tokens": stats.prompt_tokens,
            "generated_tokens": stats.generated_tokens,
            "finish_reason": self.finish_reason,
            "cycles": stats.cycles,
            "acceptance_length": stats.acceptance_length,
            "acceptance_rate": stats.acceptance_rate,
            "accepted_by_position": stats.rate_by_position,
            "prefill_seconds": stats.prefill_seconds,
            "decode_seconds": stats.decode_seconds,
            "decode_tokens_per_second": stats.decode_tokens_per_second,
            "fell_back": stats.fell_back,
            "mismatch": stats.mismatch,
            "width": stats.width,
            "memory": None if stats.memory is None else stats.memory.as_dict(),
            "seed": self.seed,
            "lossless": self.lossless,
            "pipeline": self.pipeline,
            **scores,
        }


class Pipeline:
    """A target, a drafter and the rest, ready to generate. Made by `PipelineBuilder.build`.

    Attributes:
        spec: what it was built from, defaults filled in.
        graph: the cycle.
        target: what the target is.
        tokenizer: mlx-lm's TokenizerWrapper; None for a target without one.
        sampling: default sampling parameters.
        names: names of target, adapter, drafter, verifier, acceptance, rollback, width.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        parts: EngineParts,
        tokenizer: Any,
        sampling: SamplingParams,
        names: dict[str, str],
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.names = names
        self._parts = parts
        self._calibrated = False

    @property
    def graph(self) -> Graph:
        """The cycle as a graph."""
        return self._parts.graph

    @property
    def nodes(self) -> Mapping[str, CycleNode]:
        """The inserted nodes by node name, for what they have gathered."""
        return self._parts.nodes

    @property
    def target(self) -> TargetInfo:
        """What the target is."""
        return self._parts.target.info

    @property
    def model(self) -> Any:
        """The target's module, as mlx-lm loaded it (with taps in place until `close`)."""
        return self._parts.target.model

    def describe(self) -> str:
        """The pipeline as text."""
        return self.graph.describe()

    @property
    def lossless(self) -> bool:
        """Whether the acceptance policy promises the target's own tokens or law."""
        return self._parts.acceptance.info.lossless

    def encode(self, prompt: Prompt, thinking: bool | None = None) -> tuple[int, ...]:
        """Token ids of a prompt: text as mlx-lm encodes it, messages through the chat template.

        Raises:
            UsageError: an empty prompt, or text for a target without a tokenizer.
        """
        if isinstance(prompt, str):
            ids = self._encode_text(prompt)
        elif prompt and isinstance(prompt[0], dict):
            ids = self._encode_chat(prompt, thinking)
        else:
            ids = tuple(int(t) for t in prompt)  # type: ignore[arg-type]
        if not ids:
            raise UsageError("the prompt is empty", "give at least one token")
        return ids

    def _encode_text(self, text: str) -> tuple[int, ...]:
        tokenizer = self._need_tokenizer()
        bos = tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        return tuple(tokenizer.encode(text, add_special_tokens=special))

    def _encode_chat(self, messages: Any, thinking: bool | None) -> tuple[int, ...]:
        tokenizer = self._need_tokenizer()
        if not tokenizer.has_chat_template:
            raise UsageError("this target has no chat template", "give the prompt as text")
        switch = {} if thinking is None else {"enable_thinking": thinking}
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **switch)
        return tuple(ids)

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UsageError("this target has no tokenizer", "give token ids")
        return self.tokenizer

    def generate(self, prompt: Prompt, **options: Unpack[OptionNames]) -> GenerationResult:
        """Generate a text.

        Args:
            prompt: text, token ids, or chat messages.
            **options: fields of `GenerateOptions`.

        Returns:
            The text, its tokens, and how the drafting went.

        Raises:
            UsageError: a prompt or an option that cannot be honoured.
            GenerationError: the target failed; carries the tokens so far.
        """
        stream = self.stream(prompt, **options)
        return stream.result(list(stream))

    def stream(self, prompt: Prompt, **options: Unpack[OptionNames]) -> TextGeneration:
        """Generate a text cycle by cycle: an iterator of `Chunk`. Arguments as `generate`."""
        given = GenerateOptions(**options)  # type: ignore[arg-type]
        return TextGeneration(self, self.encode(prompt, given.thinking), given)

    def engine(self, prompt: tuple[int, ...], options: GenerateOptions) -> Engine:
        """A decode loop over token ids, for those who want no text."""
        eos, sampling = (
            getattr(self.tokenizer, "eos_token_ids", None) or (),
            self._sampling(options),
        )
        if isinstance(serving(self._parts.width, sampling), Calibratable):
            self.calibrate()
        request = EngineRequest(
            prompt=prompt,
            max_tokens=options.max_tokens,
            sampling=sampling,
            eos_token_ids=frozenset(() if options.ignore_eos else eos),
            prefill_chunk=options.prefill_chunk,
            cache=options.cache,
            cancelled=options.cancelled,
            on_prefill=options.on_prefill,
            logprobs=options.top_logprobs if options.logprobs or options.top_logprobs else None,
        )
        return Engine(self._parts, request)

    def calibrate(self) -> None:
        """Tell the width policy what cycles cost here, if it wants to know: as kept, or measured in
        a few seconds. The first text does it by itself; here it can be done before."""
        width = self._parts.width
        if self._calibrated or not isinstance(width, Calibratable) or width.calibrate == "off":
            return
        self._calibrated = True
        costs = calibrate(self._parts, self.spec, fresh=width.calibrate == "fresh")
        if costs is not None:
            width.take_costs(costs)

    def _sampling(self, options: GenerateOptions) -> SamplingParams:
        """The request's parameters; XTC spares what mlx-lm's command line spares."""
        params = options.sampling(self.sampling)
        if not params.xtc_probability or params.xtc_special_tokens is not None:
            return params
        tokenizer, special = self.tokenizer, set[int]()
        if tokenizer is not None:
            special = {*tokenizer.encode("\n"), *tokenizer.eos_token_ids}
        return attrs.evolve(params, xtc_special_tokens=sorted(special))

    def close(self) -> None:
        """Undo what adapters did to the model. The pipeline cannot be used afterwards."""
        self._parts.target.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class TextGeneration(Iterator[Chunk]):
    """One text on its way: an iterator of `Chunk`.

    Attributes:
        stats: counts so far.
        seed: the seed in use.
        cache: the target's caches; at the end they hold every token of the text but the last.
    """

    def __init__(
        self, pipeline: Pipeline, prompt: tuple[int, ...], options: GenerateOptions
    ) -> None:
        self._pipeline = pipeline
        self._options = options
        self._text: TextStream | None = None
        if pipeline.tokenizer is not None:
            self._text = TextStream(pipeline.tokenizer, options.stop)
        elif options.stop:
            raise UsageError("stop strings need a tokenizer", "this target has none")
        self._engine = pipeline.engine(prompt, options)
        self._chunks = self._run()

    @property
    def stats(self) -> GenerationStats:
        """Counts so far."""
        return self._engine.stats

    @property
    def seed(self) -> int:
        """The seed in use."""
        return self._engine.sampling.seed

    @property
    def names(self) -> dict[str, str]:
        """The pipeline's component names, with the acceptance policy that serves this request."""
        return {**self._pipeline.names, "acceptance": self._engine.acceptance.info.name}

    @property
    def lossless(self) -> bool:
        """Whether the acceptance policy promises the target's own tokens or law."""
        return self._engine.acceptance.info.lossless

    @property
    def cache(self) -> list[Any]:
        """The target's caches."""
        return self._engine.cache

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def result(self, chunks: Sequence[Chunk]) -> GenerationResult:
        """The text of these chunks, with the counts so far; one left unfinished was cancelled."""
        reason = chunks[-1].finish_reason if chunks else None
        return GenerationResult(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=reason or "cancelled",
            stats=self.stats,
            seed=self.seed,
            pipeline=self.names,
            lossless=self.lossless,
            logprobs=self._logprobs(chunks),
        )

    def _logprobs(self, chunks: Sequence[Chunk]) -> tuple[TokenLogprob, ...] | None:
        if not (self._options.logprobs or self._options.top_logprobs):
            return None
        return tuple(record for chunk in chunks for record in chunk.logprobs)

    def close(self) -> None:
        """Stop here. The caches hold what was handed out."""
        self._chunks.close()

    def _run(self) -> Generator[Chunk, None, None]:
        engine, eos = self._engine, getattr(self._pipeline.tokenizer, "eos_token_ids", ())
        on_cycle = self._options.on_cycle
        try:
            with wired_limit(self._pipeline.model):
                for event in engine.cycles():
                    chunk = self._chunk(event, eos)
                    if on_cycle is not None:
                        tokens, scores = chunk.token_ids, chunk.logprobs
                        on_cycle(attrs.evolve(event, token_ids=tokens, logprobs=scores))
                    yield chunk
                    if chunk.finish_reason is not None:
                        return
        finally:
            engine.finish()

    def _chunk(self, event: CycleEvent, eos: Any) -> Chunk:
        reason, text = event.finish_reason, ""
        if self._text is None:
            return Chunk("", event.token_ids, event, reason)
        for count, token in enumerate(event.token_ids, start=1):
            if reason == "stop" and count == len(event.token_ids) and token in eos:
                break
            piece, stopped = self._text.push(token)
            text += piece
            if stopped:
                self._engine.cut(count)
                return Chunk(text, event.token_ids[:count], event, "stop")
        if reason is not None:
            text += self._text.finish()
        return Chunk(text, event.token_ids, event, reason)
