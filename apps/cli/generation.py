"""One generation as the command line runs it: streamed, traced, and cancelled by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import attrs

from draftloom.errors import ModelError

from .output import PrefillBar, busy, say_note
from .trace import TraceFile

if TYPE_CHECKING:
    from draftloom.builder import PipelineBuilder
    from draftloom.pipeline import Chunk, GenerationResult, Pipeline, Prompt

__all__ = ["CancelSwitch", "GenerationSinks", "build", "run_generation"]


class CancelSwitch:
    """Turns the first Ctrl-C into a request to stop, the second into an interrupt.

    A context manager; inside, calling it says whether to stop. Outside the main thread, where
    Python delivers no signals, it never says so.
    """

    def __init__(self) -> None:
        self._pressed = False
        self._before: Any = None

    def __call__(self) -> bool:
        return self._pressed

    def __enter__(self) -> CancelSwitch:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True


class _CancelledInPrompt(Exception):
    """Ctrl-C before the first token."""


@attrs.frozen(kw_only=True)
class GenerationSinks:
    """Where a generation goes while it runs.

    Attributes:
        on_text: told every piece of text.
        trace: told every cycle; None for none.
    """

    on_text: Callable[[str], None] = lambda text: None
    trace: TraceFile | None = None


def build(builder: PipelineBuilder) -> Pipeline:
    """Build a pipeline, with a moving line while weights are loaded.

    Raises:
        ModelError, GraphError: see `PipelineBuilder.build`.
    """
    from draftloom.adapters.hub import Hub

    plan = builder.check()  # so that a mistake is said before anything moves on the screen
    folders = plan.folders if plan.model.path is None else (plan.model.path, *plan.folders)
    for folder in folders:
        with suppress(ModelError):  # loading says it; here the download has the line to itself
            Hub().complete(folder)
    name = builder.spec.target or "the bundled pair"
    if not plan.acceptance.info.lossless:
        say_note(
            f"acceptance {plan.names['acceptance']} is lossy: the text may not be the target's own"
        )
    with busy(f"loading {Path(name).name or name}"):
        pipeline = builder.build()
    with busy("measuring what drafting costs here (once)"):
        pipeline.calibrate()
    return pipeline


def run_generation(
    pipeline: Pipeline,
    prompt: Prompt,
    sinks: GenerationSinks,
    options: dict[str, Any],
) -> GenerationResult:
    """Generate one text; Ctrl-C ends it with what there is.

    Args:
        pipeline: built.
        prompt: text or messages.
        sinks: where text and cycles go.
        options: fields of `GenerateOptions` besides the callbacks.

    Raises:
        UsageError: a prompt or an option that cannot be honoured; nothing was written then.
        GenerationError: the target failed; the text so far has been handed out.
    """
    with CancelSwitch() as cancelled:
        bar: list[PrefillBar] = []

        def on_prefill(done: int, total: int) -> None:
            if cancelled():
                raise _CancelledInPrompt
            if bar:
                bar[0].update(done, total)

        stream = pipeline.stream(prompt, cancelled=cancelled, on_prefill=on_prefill, **options)
        bar.append(PrefillBar())
        chunks: list[Chunk] = []
        try:
            for chunk in stream:
                bar[0].stop()
                chunks.append(chunk)
                sinks.on_text(chunk.text)
                if sinks.trace is not None:
                    sinks.trace.add(chunk)
        except _CancelledInPrompt:
            pass
        finally:
            bar[0].stop()
            if sinks.trace is not None:
                sinks.trace.close()
    return stream.result(chunks)
