"""`draftloom chat`: a conversation, at a terminal or piped in line by line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

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
    KernelOption,
    MinPOption,
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
    text_options,
)
from .output import TextPrinter, error_console, fallback_on_stderr, say_error, summary, summary_line
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

if TYPE_CHECKING:
    from draftloom.pipeline import GenerationResult, Pipeline

__all__ = ["Conversation", "chat"]

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system message and forget the conversation; without TEXT, remove it",
    "/thinking on|off|auto": "let the model think first, or not",
    "/stats": "how the last answer went",
    "/quit": "leave (also /exit, or end of input)",
}


def chat(
    context: typer.Context,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message of the conversation.")
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Let the model think first, or not, where its chat template has the switch.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of an answer at most.")
    ] = 1024,
    stop: StopOption = None,
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
    """Talk with a target that has a chat template. Type /help for commands.

    Piped in, every line is a message (or a command) and stdout holds the answers only.
    """
    flags = PipelineFlags(
        target=target, drafter=drafter, drafter_bits=drafter_bits,
        drafter_confidence=drafter_confidence,
        drafter_window=drafter_window, drafter_sinks=drafter_sinks, verifier=verifier,
        acceptance=acceptance,
        rollback=rollback, block_size=block_size, kernel=kernel, pipeline=pipeline, dtype=dtype,
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed,
        kv_bits=kv_bits, kv_group_size=kv_group_size, quantized_kv_start=quantized_kv_start,
        memory_limit=memory_limit, context_length=context_length,
        prefill_step_size=prefill_step_size,
        xtc_probability=xtc_probability, xtc_threshold=xtc_threshold,
        xtc_special_tokens=xtc_special_tokens, repetition_penalty=repetition_penalty,
        repetition_context_size=repetition_context_size, presence_penalty=presence_penalty,
        presence_context_size=presence_context_size, frequency_penalty=frequency_penalty,
        frequency_context_size=frequency_context_size, logit_bias=logit_bias,
    )  # fmt: skip
    options = text_options(max_tokens, stop)
    builder = flags.builder(state_of(context).plugins)
    with fallback_on_stderr(), build(builder) as built:
        if built.tokenizer is None or not built.tokenizer.has_chat_template:
            raise UsageError(
                f"{built.names['target']} has no chat template",
                "use `draftloom generate`, or name a target that has one",
            )
        conversation = Conversation(built, options, system=system or "", thinking=thinking)
        _talk(conversation, interactive=_interactive())


class Conversation:
    """Messages so far, and the target that answers them.

    Every answer runs the whole conversation through the chat template again: templates rewrite
    earlier turns (thoughts are dropped), so that the caches of the turn before do not fit.

    Args:
        pipeline: its tokenizer has a chat template.
        options: of every generation.
        system: system message; empty for none.
        thinking: for templates with the switch; None is the template's default.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        options: dict[str, Any],
        *,
        system: str = "",
        thinking: bool | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._options = options
        self._system = system
        self.thinking = thinking
        self.last: GenerationResult | None = None
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forget everything but the system message, which may be given anew."""
        self._system = self._system if system is None else system
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, text: str, printer: TextPrinter) -> None:
        """Answer a message, streaming; it and the answer become part of the conversation.

        Raises:
            UsageError: the conversation does not fit the target's context; it stays as it was.
            GenerationError: the target failed; the conversation stays as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        result = run_generation(
            self._pipeline,
            messages,
            GenerationSinks(on_text=printer.write),
            {**self._options, "thinking": self.thinking},
        )
        printer.end()
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        self.last = result
        summary(result)


def _interactive() -> bool:
    return sys.stdin.isatty()


def _talk(conversation: Conversation, *, interactive: bool) -> None:
    """Read and answer until the input ends. At a terminal a message that cannot be answered does
    not end the conversation; in a pipe it does, with its exit code."""
    printer = TextPrinter()
    if interactive:
        error_console().print("/help lists commands; Ctrl-D ends.", style="dim")
    while (line := _read_line(interactive)) is not None:
        if not line:
            continue
        if line.startswith("/"):
            if _command(conversation, line, interactive):
                return
            continue
        try:
            conversation.answer(line, printer)
        except UsageError as error:
            if not interactive:
                raise
            say_error(f"{error}; /reset forgets the conversation")


def _read_line(interactive: bool) -> str | None:
    """The next message without surrounding space; None at the end of input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.strip() if line else None
    import readline  # noqa: F401  (editing and history for input())

    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        error_console().print()
        return None


def _command(conversation: Conversation, line: str, interactive: bool) -> bool:
    """Run a slash command; True ends the conversation.

    Raises:
        UsageError: an unknown command, in a pipe.
    """
    name, _, rest = line.partition(" ")
    note = error_console()
    if name in ("/quit", "/exit"):
        return True
    if name == "/reset":
        conversation.reset()
    elif name == "/system":
        conversation.reset(system=rest.strip())
    elif name == "/thinking" and rest.strip() in ("on", "off", "auto"):
        conversation.thinking = {"on": True, "off": False, "auto": None}[rest.strip()]
    elif name == "/stats":
        last = conversation.last
        note.print("no answer yet" if last is None else summary_line(last), markup=False)
    elif name == "/help":
        width = max(map(len, COMMANDS))
        for command, meaning in COMMANDS.items():
            note.print(f"{command:<{width}}  {meaning}", markup=False)
    else:
        error = UsageError(f"no command {line!r}", f"known: {', '.join(COMMANDS)}")
        if not interactive:
            raise error
        say_error(str(error))
    return False
