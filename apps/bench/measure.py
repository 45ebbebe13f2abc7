"""The timed runs: variants in turn, each repeat beginning with another one, warm-up apart.

A variant is opened (its drafter's weights are loaded), warmed up, run over all prompts and
lengths, and closed, which leaves the target as mlx-lm loaded it for the next one. None of that
but the runs is timed. Prefill is the time to the first token, decode the time from there on. The
pass that times the stages of a text follows its run: a host that is slower for a while is slower
for both.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import mlx.core as mx
import mlx_lm

from draftloom.errors import UsageError
from draftloom.events import CycleEvent
from draftloom.pipeline import Pipeline

from .prompts import BenchPrompt, EncodedPrompt
from .stages import StageTimes, time_stages
from .subjects import Subject, Variant

__all__ = [
    "WINDOW",
    "Measured",
    "Run",
    "Settings",
    "Text",
    "check_room",
    "encode_prompts",
    "measure",
    "repeated_share",
]


WINDOW = 512
"""Tokens of a text that are taken together, to see whether acceptance decays over a long one."""


@attrs.frozen(kw_only=True)
class Settings:
    """How a benchmark is run.

    Attributes:
        lengths: tokens to generate, one set of runs each, ascending.
        repeats: times that everything is run.
        warm_up: tokens generated before the first timed run of an opened variant.
        cool_down: seconds of rest before each variant's turn.
        stop_at_eos: end texts where the model ends them; else all have the full length.
        window: tokens of a text that are taken together, to see whether acceptance decays.
    """

    lengths: tuple[int, ...] = (256,)
    repeats: int = 3
    warm_up: int = 16
    cool_down: float = 0.0
    stop_at_eos: bool = False
    window: int = WINDOW


@attrs.frozen
class Run:
    """One text.

    Attributes:
        variant, suite: names.
        prompt: index of the prompt.
        length: tokens asked for.
        repeat: from 0.
        order: position in the order of all runs, from 0.
        prompt_tokens, tokens: of the prompt; generated.
        prefill_seconds: to the first token.
        decode_seconds: from the first token to the last.
        peak_bytes: most device memory held by MLX during the run, weights included.
        cycles, drafted, verified, accepted: counts; 0 for plain mlx-lm.
        verified_by_position, accepted_by_position: cycles, by draft position.
        windows: (cycles, accepted) of the cycles that began in each window of the text.
        repeated_by_window: as `repeated`, of the 8-grams that end in each window; plain mlx-lm has
            it too.
        fell_back: why the drafter was given up; empty while it works.
        mismatch: the alarm, where acceptance says that drafter and target do not belong together.
        repeated: share of the text's 8-grams that were there before; texts that loop are easy.
        same_tokens: whether they are those of plain mlx-lm in the same repeat; None where
            that says nothing (simulated) or there is no such run.
    """

    variant: str
    suite: str
    prompt: int
    length: int
    repeat: int
    order: int
    prompt_tokens: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float
    peak_bytes: int
    cycles: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    verified_by_position: tuple[int, ...] = ()
    accepted_by_position: tuple[int, ...] = ()
    windows: tuple[tuple[int, int], ...] = ()
    repeated_by_window: tuple[float, ...] = ()
    fell_back: str = ""
    mismatch: str = ""
    repeated: float = 0.0
    same_tokens: bool | None = None


@attrs.frozen
class Text:
    """A text with the origin of each token.

    Attributes:
        variant: who wrote it.
        pieces: (text, origin, cycle) a token; origin is ``first``, ``plain``, ``drafted``,
            ``corrected`` or ``bonus``.
    """

    variant: str
    pieces: tuple[tuple[str, str, int], ...]


@attrs.frozen
class Measured:
    """What was measured.

    Attributes:
        runs: all, in the order they were made.
        texts: one a variant.
        stages: one a pass that timed them, by repeat; empty where there were none.
    """

    runs: list[Run]
    texts: list[Text]
    stages: list[StageTimes]


@attrs.frozen(eq=False)
class _Raw:
    tokens: tuple[int, ...]
    prefill: float
    decode: float
    peak: int
    events: tuple[CycleEvent, ...] = ()
    stats: Any = None


def encode_prompts(subject: Subject, prompts: Sequence[BenchPrompt]) -> list[EncodedPrompt]:
    """Prompts as token ids: through the chat template where there is one."""
    plain = next(v.builder for v in subject.variants if v.builder is not None)
    with plain.build() as pipeline:
        chat = subject.tokenizer is not None and subject.tokenizer.has_chat_template
        return [
            EncodedPrompt(
                prompt.suite,
                pipeline.encode(
                    [{"role": "user", "content": prompt.text}] if chat else prompt.text
                ),
            )
            for prompt in prompts
        ]


def check_room(subject: Subject, settings: Settings, prompts: Sequence[EncodedPrompt]) -> None:
    """Refuse lengths that the target's context cannot hold.

    Raises:
        UsageError: a prompt and the longest text do not fit; names the longest prompt.
    """
    limit, wanted = subject.context_limit, max(*settings.lengths, settings.warm_up)
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    if limit is not None and len(longest.ids) + wanted > limit:
        raise UsageError(
            f"a prompt of {len(longest.ids)} tokens ({longest.suite}) and {wanted} new ones do not "
            f"fit: the target's context holds {limit}",
            "give shorter --lengths",
        )


def measure(
    subject: Subject,
    settings: Settings,
    prompts: Sequence[EncodedPrompt],
    progress: Callable[[str], None] = lambda what: None,
    *,
    stages: bool = False,
) -> Measured:
    """Run everything.

    Args:
        subject: what to run.
        settings: how.
        prompts: at least one.
        progress: told what runs next.
        stages: time the stages too, of each text of the shortest length after its run.
    """
    runs: list[Run] = []
    texts: list[Text] = []
    timed: list[StageTimes] = []
    reference: dict[tuple[int, int, int], tuple[int, ...]] = {}
    outputs: list[tuple[int, ...]] = []
    shortest, at_eos = settings.lengths[0], settings.stop_at_eos
    for repeat in range(settings.repeats):
        turn = repeat % len(subject.variants)
        for variant in (*subject.variants[turn:], *subject.variants[:turn]):
            turn_of = f"repeat {repeat + 1} of {settings.repeats}"
            progress(f"{variant.name}, {turn_of}")
            gc.collect()  # the drafter of the variant before is gone, and its memory with it
            mx.clear_cache()
            time.sleep(settings.cool_down)
            with _opened(subject, variant, settings) as (run_one, pipeline):
                run_one(prompts[0].ids, settings.warm_up)
                staged = pipeline if stages else None
                if staged is not None and settings.warm_up:
                    time_stages(variant.name, staged, prompts[:1], settings.warm_up)
                passes: list[StageTimes] = []
                for length in settings.lengths:
                    for index, prompt in enumerate(prompts):
                        raw = run_one(prompt.ids, length)
                        place = (variant.name, prompt.suite, index, length, repeat, len(runs))
                        runs.append(_run(place, prompt, raw, settings.window))
                        outputs.append(raw.tokens)
                        if variant.builder is None:
                            reference[(repeat, index, length)] = raw.tokens
                        elif repeat == 0 and index == 0 and length == shortest:
                            texts.append(_text(subject, variant.name, raw))
                        if staged is not None and length == shortest:
                            passes.append(
                                time_stages(variant.name, staged, [prompt], length, at_eos)
                            )
            if passes:
                timed.append(StageTimes.one_pass(passes))
    if subject.simulation is None:
        runs = [
            run
            if run.variant == subject.variants[0].name
            else attrs.evolve(
                run, same_tokens=reference[(run.repeat, run.prompt, run.length)] == tokens
            )
            for run, tokens in zip(runs, outputs, strict=True)
        ]
    return Measured(runs, texts, timed)


_RunOne = Callable[[Sequence[int], int], _Raw]


@contextmanager
def _opened(
    subject: Subject, variant: Variant, settings: Settings
) -> Iterator[tuple[_RunOne, Pipeline | None]]:
    """A function that runs one prompt, and the pipeline where it is one; the target is as mlx-lm
    loaded it before and after."""
    if variant.builder is None:
        tokenizer = subject.tokenizer
        if tokenizer is None:
            from .simulate import no_text_tokenizer

            tokenizer = no_text_tokenizer()
        tokenizer = copy.copy(tokenizer)
        if not settings.stop_at_eos:
            tokenizer.eos_token_ids = ()
        yield (lambda ids, length: _alone(subject.model, tokenizer, ids, length)), None
        return
    with variant.builder.build() as pipeline:
        at_eos = settings.stop_at_eos
        yield (lambda ids, length: _speculative(pipeline, ids, length, at_eos)), pipeline


def _alone(model: Any, tokenizer: Any, ids: Sequence[int], length: int) -> _Raw:
    tokens: list[int] = []
    mx.reset_peak_memory()
    begin = first = time.perf_counter()
    for response in mlx_lm.stream_generate(model, tokenizer, list(ids), max_tokens=length):
        tokens.append(int(response.token))
        if len(tokens) == 1:
            first = time.perf_counter()
    end = time.perf_counter()
    return _Raw(tuple(tokens), first - begin, end - first, mx.get_peak_memory())


def _speculative(pipeline: Pipeline, ids: Sequence[int], length: int, stop_at_eos: bool) -> _Raw:
    tokens: list[int] = []
    events: list[CycleEvent] = []
    mx.reset_peak_memory()
    begin = first = time.perf_counter()
    stream = pipeline.stream(
        list(ids),
        max_tokens=length,
        ignore_eos=not stop_at_eos,
        temperature=0.0,
        xtc_probability=0.0,
    )
    for chunk in stream:
        if not tokens:
            first = time.perf_counter()
        tokens.extend(chunk.token_ids)
        events.append(chunk.cycle)
    end = time.perf_counter()
    peak = mx.get_peak_memory()
    return _Raw(tuple(tokens), first - begin, end - first, peak, tuple(events), stream.stats)


def _run(
    place: tuple[str, str, int, int, int, int], prompt: EncodedPrompt, raw: _Raw, window: int
) -> Run:
    run = Run(*place, len(prompt.ids), len(raw.tokens), raw.prefill, raw.decode, raw.peak)
    run = attrs.evolve(
        run,
        repeated=repeated_share(raw.tokens),
        repeated_by_window=_repeated_by_window(raw.tokens, window),
    )
    stats = raw.stats
    if stats is None:
        return run
    return attrs.evolve(
        run,
        cycles=stats.cycles,
        drafted=stats.drafted,
        verified=stats.verified,
        accepted=stats.accepted,
        verified_by_position=tuple(stats.verified_by_position),
        accepted_by_position=tuple(stats.accepted_by_position),
        windows=_windows(raw.events, window),
        fell_back=stats.fell_back,
        mismatch=stats.mismatch,
    )


def repeated_share(tokens: Sequence[int], size: int = 8) -> float:
    """Share 0..1 of the runs of `size` tokens that were there before; 0 for a shorter text."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _repeated_by_window(tokens: Sequence[int], window: int, size: int = 8) -> tuple[float, ...]:
    """Share of the runs of `size` tokens ending in each window that were there before."""
    seen: set[tuple[int, ...]] = set()
    counts: list[list[int]] = []
    for end in range(size, len(tokens) + 1):
        gram = tuple(tokens[end - size : end])
        place = (end - 1) // window
        while len(counts) <= place:
            counts.append([0, 0])
        counts[place][0] += gram in seen
        counts[place][1] += 1
        seen.add(gram)
    return tuple(again / total if total else 0.0 for again, total in counts)


def _windows(events: Sequence[CycleEvent], size: int = WINDOW) -> tuple[tuple[int, int], ...]:
    windows: list[tuple[int, int]] = []
    written = 0
    for event in events:
        if event.index:
            if len(windows) <= written // size:
                windows.append((0, 0))
            cycles, accepted = windows[-1]
            windows[-1] = (cycles + 1, accepted + event.accepted)
        written += len(event.token_ids)
    return tuple(windows)


def _text(subject: Subject, variant: str, raw: _Raw) -> Text:
    detokenizer = None if subject.tokenizer is None else subject.tokenizer.detokenizer
    pieces = []
    for event in raw.events:
        for position, token in enumerate(event.token_ids):
            if detokenizer is None:
                piece = f"{token} "
            else:
                detokenizer.add_token(token)
                piece = detokenizer.last_segment
            pieces.append((piece, _origin(event, position), event.index))
    if detokenizer is not None and pieces:
        detokenizer.finalize()
        last = pieces[-1]
        pieces[-1] = (last[0] + detokenizer.last_segment, *last[1:])
    return Text(variant, tuple(pieces))


def _origin(event: CycleEvent, position: int) -> str:
    if event.index == 0:
        return "first"
    if not event.verified:
        return "plain"
    if position < event.accepted:
        return "drafted"
    return "corrected" if event.accepted < event.verified else "bonus"
