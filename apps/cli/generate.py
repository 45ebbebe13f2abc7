"""`draftloom generate`: one text from one prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from draftloom.errors import UsageError

from .generation import GenerationSinks, build, run_generation
from .memory_options import (
    ContextLengthOption,
    KvBitsOption,
    KvGroupSizeOption,
    MemoryLimitOption,
    PrefillStepSizeOption,
    QuantizedKvStartOption,
)
from .offline import OfflineOption
from .options import (
    AcceptanceOption,
    BlockSizeOption,
    DrafterBitsOption,
    DrafterConfidenceOption,
    DrafterOption,
    DrafterSinksOption,
    DrafterWindowOption,
    DtypeOption,
    JsonOption,
    KernelOption,
    MinPOption,
    ParkOption,
    PipelineFlags,
    PipelineOption,
    RollbackOption,
    SeedOption,
    StopOption,
    TargetOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    VerifierOption,
    WidthOption,
    read_prompt,
    text_options,
)
from .output import TextPrinter, fallback_on_stderr, summary
from .sampling_options import (
    FrequencyContextSizeOption,
    FrequencyPenaltyOption,
    LogitBiasOption,
    PresenceContextSizeOption,
    PresencePenaltyOption,
    RepetitionContextSizeOption,
    RepetitionPenaltyOption,
    XtcProbabilityOption,
    XtcSpecialTokensOption,
    XtcThresholdOption,
)
from .state import state_of
from .trace import TraceFile

__all__ = ["generate"]


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; else it is read from stdin.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file; - is stdin.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate at most.")] = 256,
    stop: StopOption = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Put the prompt into the chat template, or take it as it is. "
            "Default: chat where the tokenizer has a template.",
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write one record a cycle.")
    ] = None,
    as_json: JsonOption = False,
    logprobs: Annotated[
        bool,
        typer.Option(
            "--logprobs", help="Give each token's log-probability (with --json or --trace)."
        ),
    ] = False,
    top_logprobs: Annotated[
        int,
        typer.Option(metavar="N", help="Give the N most likely tokens with it."),
    ] = 0,
    target: TargetOption = None,
    drafter: DrafterOption = None,
    drafter_bits: DrafterBitsOption = None,
    drafter_window: DrafterWindowOption = None,
    drafter_confidence: DrafterConfidenceOption = None,
    drafter_sinks: DrafterSinksOption = None,
    offline: OfflineOption = False,
    verifier: VerifierOption = None,
    acceptance: AcceptanceOption = None,
    rollback: RollbackOption = None,
    block_size: BlockSizeOption = None,
    width: WidthOption = None,
    park: ParkOption = None,
    kernel: KernelOption = None,
    pipeline: PipelineOption = None,
    dtype: DtypeOption = None,
    kv_bits: KvBitsOption = None,
    kv_group_size: KvGroupSizeOption = None,
    quantized_kv_start: QuantizedKvStartOption = None,
    memory_limit: MemoryLimitOption = None,
    context_length: ContextLengthOption = None,
    prefill_step_size: PrefillStepSizeOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = None,
    xtc_probability: XtcProbabilityOption = None,
    xtc_threshold: XtcThresholdOption = None,
    xtc_special_tokens: XtcSpecialTokensOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    repetition_context_size: RepetitionContextSizeOption = None,
    presence_penalty: PresencePenaltyOption = None,
    presence_context_size: PresenceContextSizeOption = None,
    frequency_penalty: FrequencyPenaltyOption = None,
    frequency_context_size: FrequencyContextSizeOption = None,
    logit_bias: LogitBiasOption = None,
) -> None:
    """Generate one text. It equals what the target would have written alone.

    Ctrl-C ends it with what there is.
    """
    flags = PipelineFlags(
        target=target, drafter=drafter, drafter_bits=drafter_bits,
        drafter_confidence=drafter_confidence,
        drafter_window=drafter_window, drafter_sinks=drafter_sinks, verifier=verifier,
        acceptance=acceptance,
        rollback=rollback, block_size=block_size, width=width, park=park, kernel=kernel,
        pipeline=pipeline, dtype=dtype, temperature=temperature, top_p=top_p, top_k=top_k,
        min_p=min_p, seed=seed,
        kv_bits=kv_bits, kv_group_size=kv_group_size, quantized_kv_start=quantized_kv_start,
        memory_limit=memory_limit, context_length=context_length,
        prefill_step_size=prefill_step_size,
        xtc_probability=xtc_probability, xtc_threshold=xtc_threshold,
        xtc_special_tokens=xtc_special_tokens, repetition_penalty=repetition_penalty,
        repetition_context_size=repetition_context_size, presence_penalty=presence_penalty,
        presence_context_size=presence_context_size, frequency_penalty=frequency_penalty,
        frequency_context_size=frequency_context_size, logit_bias=logit_bias,
    )  # fmt: skip
    text, options = read_prompt(prompt, prompt_file), text_options(max_tokens, stop)
    if logprobs or top_logprobs:
        if not as_json and trace is None:
            raise UsageError("--logprobs has no place in plain text", "add --json or --trace FILE")
        options |= {"logprobs": True, "top_logprobs": top_logprobs}
    trace_file = None if trace is None else TraceFile(trace)
    builder = flags.builder(state_of(context).plugins)
    printer = TextPrinter()
    with fallback_on_stderr(), build(builder) as built:
        templated = built.tokenizer is not None and built.tokenizer.has_chat_template
        if chat and not templated:
            raise UsageError(f"{built.names['target']} has no chat template", "use --raw")
        as_chat = templated if chat is None else chat
        result = run_generation(
            built,
            [{"role": "user", "content": text}] if as_chat else text,
            GenerationSinks(on_text=_nowhere if as_json else printer.write, trace=trace_file),
            options,
        )
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
    else:
        printer.end()
        summary(result)


def _nowhere(text: str) -> None:
    """The text is part of the JSON object."""
