"""The decode loop: the only one in draftloom.

Cache invariant, between cycles: the target's caches hold every token of the text but the last.
That last token is the anchor; a cycle verifies ``[anchor, d1 .. dK]`` in one pass, and row i of
the logits predicts the token after position i of that block. The last token of the prompt is
handled by the same cycle with K = 0, so that there is one path for all tokens.

A cycle blocks on the device once, in `Engine._read`. The next draft is launched before the
tokens just read are handed out, so that the device works while the host makes text of them; a
plain cycle that follows a plain cycle is launched whole, before the read (`draftloom.lookahead`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator
from typing import Any

import attrs
import mlx.core as mx
from mlx.utils import tree_flatten

from draftloom.abilities import Reporting, Traces, serving
from draftloom.contracts import (
    AcceptancePolicy,
    CacheKind,
    Draft,
    DraftRequest,
    Preserves,
    Speculation,
    Width,
    WidthPolicy,
)
from draftloom.drafting import GuardedDrafter, UnusableDraftError, one_line
from draftloom.errors import (
    DrafterMismatchWarning,
    DraftloomError,
    GenerationError,
    UsageError,
)
from draftloom.events import (
    CycleEvent,
    FailureEvent,
    FinishReason,
    GenerationStats,
    MismatchEvent,
    Outcome,
    PrefillEvent,
)
from draftloom.kv_conversion import KVConversion
from draftloom.logprobs import LogprobReader
from draftloom.lookahead import Lookahead
from draftloom.mismatch import park
from draftloom.parts import EngineParts, EngineRequest
from draftloom.processing import LogitsProcessing
from draftloom.room import Room
from draftloom.sampling import SamplingState
from draftloom.watch import MemoryWatch

__all__ = ["Engine"]

UNLIMITED_WIDTH = 2**16
CLEAR_CACHE_TOKENS = 256


class Engine:
    """Runs one generation of a pipeline. B = 1; every array carries the batch axis.

    Attributes:
        stats: counts so far.
        sampling: sampling state, with the seed in use.
        acceptance: the policy that serves this request.
    """

    def __init__(self, parts: EngineParts, request: EngineRequest) -> None:
        self._parts = parts
        self._request = request
        self._vocab_size = parts.target.info.vocab_size
        request.sampling.check_vocabulary(self._vocab_size)
        self.sampling = SamplingState(request.sampling)
        self._scores: LogprobReader | None = None
        if request.logprobs is not None:
            self._scores = LogprobReader(request.logprobs, self._vocab_size)
        self.acceptance = self._policy()
        self._width: WidthPolicy = serving(parts.width, request.sampling)
        self._cache = parts.target.make_cache() if request.cache is None else request.cache
        self._conversion = KVConversion(parts.kv_quantization, self._cache)
        self.stats = GenerationStats(
            prompt_tokens=len(request.prompt), mismatch=parts.monitor.message
        )
        self._past = max((getattr(entry, "offset", 0) for entry in self._cache), default=0)
        target = parts.target
        # A pass that is traced costs more at a length of its own than over a whole block.
        whole = isinstance(target, Traces) and target.traces and request.sampling.greedy
        self._room = Room.of(target.info, request, self._past, whole=whole)
        self._emitted: list[int] = []
        self._passed = 0  # draft tokens of the last pass, whoever stood by them
        self._processing = LogitsProcessing(request.sampling, request.prompt, self._emitted)
        widest = parts.drafter.info.max_width
        self._max_width = UNLIMITED_WIDTH if widest is None else widest
        self._plan = parts.graph.compile(self._calls())
        self._ahead = Lookahead(parts.graph.compile(self._calls()), self.sampling)
        self._overlaps = self._may_overlap()
        self._chosen: Width | None = None
        self._drafter = GuardedDrafter(parts.drafter, self._vocab_size, self.stats)
        self._watch = MemoryWatch(parts, self._cache, self._conversion, self._drafter)
        self._watch.prepare(request.prefill_chunk, self._cancelled, request.on_prefill)
        self._anchor = request.prompt[-1]
        self._clock = time.perf_counter()
        self._last: CycleEvent | None = None
        self._finished = False

    @property
    def cache(self) -> list[Any]:
        """The target's caches. They hold what was handed out: a cycle in flight is taken back."""
        self._ahead.drop()
        return self._cache

    def _may_overlap(self) -> bool:
        """Whether a plain cycle can be launched before the last one is read: nothing of it needs
        the token on the host, and both can be taken back. A full sliding window has given up the
        row that going back over two tokens would need."""
        parts = self._parts
        return not (
            parts.nodes
            or parts.kv_quantization
            or self._processing.reads_text
            or CacheKind.SLIDING_WINDOW in parts.target.info.cache_kinds
        )

    def _policy(self) -> AcceptancePolicy:
        params = self._request.sampling
        policy: AcceptancePolicy = serving(self._parts.acceptance, params)
        if policy.info.preserves is Preserves.GREEDY and not params.greedy:
            raise UsageError(
                f"acceptance {policy.info.name!r} is greedy, temperature is {params.temperature}",
                "use acceptance speculative-sampling, or temperature 0",
            )
        return policy

    # --- the loop ----------------------------------------------------------------------------

    def cycles(self) -> Generator[CycleEvent, None, None]:
        """Generate. Yields one event a cycle, the first for the prompt's own token.

        Raises:
            GenerationError: the target, a policy or an inserted node failed. The caches are as
                before the failing cycle.
        """
        try:
            if not self._prefill():
                seconds = time.perf_counter() - self._clock
                yield CycleEvent(0, (), 0, 0, 0, "", seconds, "cancelled")
                self.finish()
                return
            self._plan.set("draft", Draft.empty())
            self._set_anchor()
            while self._last is None or self._last.finish_reason is None:
                event = self._cycle(0 if self._last is None else self._last.index + 1)
                if self._last is None and self._request.on_prefill is not None:
                    total = len(self._request.prompt)
                    self._request.on_prefill(total, total)
                self._last = event
                self._emitted.extend(event.token_ids)
                self.stats.add(event)
                error = self._learn(event)
                alarm = self._parts.monitor.listen(event, self._request, self._emitted)
                if alarm is not None:
                    alarm = park(alarm, self._width, self.stats)
                if event.finish_reason is None and error is None:
                    error = self._launch_draft()
                error = self._announce(event, alarm) or error
                yield event  # what was committed is handed out before anything else can fail
                if error is not None:
                    raise error
        except DraftloomError as error:
            self._finished = True
            if isinstance(error, GenerationError):
                error.token_ids = tuple(self._emitted)
            failure = FailureEvent(str(error), self.stats.generated_tokens)
            self._parts.hook.generation_failed(event=failure)
            raise
        finally:
            self._ahead.drop()
        self.finish()

    def cut(self, kept_tokens: int) -> None:
        """End the text inside the last block: take the caches back to its first tokens.

        Args:
            kept_tokens: tokens of the last event that were emitted.
        """
        speculation = self._speculation
        if self._last is None or speculation is None:
            return
        self._ahead.drop()
        dropped = len(self._last.token_ids) - kept_tokens
        if dropped > 0:
            if kept_tokens:
                speculation.commit((kept_tokens - 1,))
                self._anchor = self._last.token_ids[kept_tokens - 1]
            else:
                speculation.abort()
            self.stats.generated_tokens -= dropped
            self.stats.committed -= dropped if self._last.index else 0

    def absorb_last(self) -> None:
        """Run the last token of the text through the target too: the caches then hold all of it,
        for callers who go on with what comes after it."""
        if self._last is None:
            return
        self._conversion.before_pass()
        self._parts.target.forward(mx.array([[self._anchor]], dtype=mx.int32), self.cache)
        self._conversion.settle()
        mx.eval([entry.state for entry in self._cache])

    def finish(self) -> None:
        """Say once that the generation has ended."""
        if not self._finished:
            self._finished = True
            self._ahead.drop()
            self._conversion.settle()
            # Whoever goes on with the caches may be another thread: nothing stays undone in them.
            mx.async_eval(tree_flatten([entry.state for entry in self._cache]))
            self.stats.memory = self._watch.report()
            if isinstance(self._width, Reporting):
                self.stats.width = self._width.report()
            self._parts.hook.generation_finished(event=self.stats)

    def logits_row(self, index: int) -> mx.array:
        """Logits [V] that the token at `index` of the last event was decided on."""
        row: mx.array = self._plan.get("logits")[0, index]
        return row

    def _prefill(self) -> bool:
        """Run all of the prompt but its last token; False where it was cancelled."""
        request, prompt = self._request, len(self._request.prompt)
        wanted = CLEAR_CACHE_TOKENS if request.max_tokens is None else self._room.tokens
        if self._watch.begin(self._past + prompt, wanted):
            self._drafter.open(DraftRequest((request.prompt,), self.sampling, self._vocab_size))
        return self._watch.prefill.run(request.prompt, self._past)

    def _cancelled(self) -> bool:
        return self._request.cancelled is not None and self._request.cancelled()

    def _cycle(self, index: int) -> CycleEvent:
        """Verify what is on the draft port, settle, and say what happened."""
        launched = self._ahead.launched
        plan = self._plan = self._ahead.take(self._plan)
        draft: Draft = plan.get("draft")
        self._passed = draft.width
        try:
            self._attempt(launched=launched)
        except BaseException as error:
            self._abort()
            if isinstance(error, GenerationError) or not isinstance(error, Exception):
                raise  # a policy that breaks its contract, or an interrupt
            if not draft.width:
                raise _failure(error) from error
            draft = self._retry_alone(error)
        outcome: Outcome = plan.get("outcome")
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if outcome.tokens:
            self._anchor = outcome.tokens[-1]
        return CycleEvent(
            index=index,
            token_ids=outcome.tokens,
            drafted=draft.width if draft.filled is None else draft.filled,
            verified=outcome.offered,
            accepted=outcome.num_accepted,
            source=draft.source,
            seconds=seconds,
            finish_reason=outcome.finish_reason,
            logprobs=outcome.logprobs,
        )

    @property
    def _speculation(self) -> Speculation | None:
        """Of the last cycle that was begun; None where that did not get so far."""
        speculation: Speculation | None = self._plan.get("speculation")
        return speculation

    def _attempt(self, *, launched: bool = False) -> None:
        if not launched:
            self._plan.set("speculation", None)
            for step in self._plan.verify:
                step()
        self._watch.weigh(self._speculation)
        for step in self._plan.settle:
            step()

    def _set_anchor(self) -> None:
        self._plan.set("anchor", mx.array([self._anchor], dtype=mx.int32))

    def _retry_alone(self, error: Exception) -> Draft:
        """Run a failed cycle again without its draft. The drafter is to blame only if the target
        succeeds alone."""
        draft = Draft.empty()
        self._plan.set("draft", draft)
        self._set_anchor()  # the failed attempt may have put the next one there
        try:
            self._attempt()
        except BaseException as second:
            self._abort()
            if not isinstance(second, Exception):
                raise  # an interrupt
            raise _failure(second) from error
        self._drafter.give_up(one_line(error))
        self._passed = 0
        return draft

    def _learn(self, event: CycleEvent) -> GenerationError | None:
        """Tell the width policy how the cycle went."""
        if not event.index or event.finish_reason == "cancelled":
            return None
        width = self._width
        try:
            width.observe(event.drafted, self._passed, event.accepted, event.seconds)
        except Exception as error:  # noqa: BLE001 raised by `cycles`
            return _failure(error)
        return None

    def _launch_draft(self) -> GenerationError | None:
        """Start the next draft on the device; it runs while the host makes text."""
        plan = self._plan
        if self._ahead.launched:
            return None
        try:
            for step in plan.propose:
                step()
        except Exception as error:  # noqa: BLE001 an inserted node failed; raised by `cycles`
            return _failure(error)
        try:
            mx.async_eval(plan.get("draft").tokens)
        except Exception as error:  # noqa: BLE001 a drafter may fail in any way
            self._drafter.give_up(one_line(error))
            plan.set("draft", Draft.empty())
        return None

    def _announce(self, event: CycleEvent, alarm: MismatchEvent | None) -> GenerationError | None:
        hook = self._parts.hook
        if alarm is not None:
            warnings.warn(alarm.said, DrafterMismatchWarning, stacklevel=2)
        try:
            if alarm is not None:
                hook.drafter_mismatched(event=alarm)
            if event.index == 0:
                hook.prefill_finished(event=PrefillEvent(self.stats.prompt_tokens, event.seconds))
            else:
                hook.cycle_finished(event=event)
        except Exception as error:  # noqa: BLE001 a plugin's observer failed; raised by `cycles`
            return GenerationError(f"a plugin failed to take in a cycle: {one_line(error)}")
        before = self.stats.generated_tokens - len(event.token_ids)
        if self.stats.generated_tokens // CLEAR_CACHE_TOKENS != before // CLEAR_CACHE_TOKENS:
            mx.clear_cache()
            position = self._past + self.stats.prompt_tokens + self.stats.generated_tokens
            ahead = min(CLEAR_CACHE_TOKENS, self._room.tokens - self.stats.generated_tokens)
            return self._watch.look(position, ahead)
        return None

    # --- the calls that the graph's nodes are bound to ---------------------------------------

    def _calls(self) -> dict[str, Callable[..., Any]]:
        parts, policy = self._parts, self.acceptance
        return {
            "width": self._choose,
            "draft": self._draft,
            "speculate": self._speculate,
            "verify": lambda block, spec: parts.verifier.verify(parts.target, block, spec),
            "process": self._processing,
            "accept": lambda draft, logits: policy.accept(draft, logits, self.sampling),
            "read": self._read,
            "rollback": self._roll_back,
            "observe": self._observe,
            **parts.nodes,
        }

    def _choose(self) -> Width:
        chosen, self._chosen = self._chosen, None
        return self._width.choose(self._max_width) if chosen is None else chosen

    def _look_ahead(self, drafted: bool) -> None:
        """Between launching a cycle's read and waiting for it: launch the next draft, where the
        drafter can; or, after a plain cycle, the next one, if that is a plain one too."""
        if not self._overlaps or self.stats.generated_tokens + 2 > self._room.tokens:
            return
        if self._passed and not (drafted and self._drafter.ahead and self.sampling.params.greedy):
            return
        try:
            self._chosen = self._width.choose(self._max_width)
        except Exception:  # noqa: BLE001 it is asked again after the read, and raises there
            return
        if self._passed:
            plan = self._plan
            kept, anchor, width = plan.get("num_accepted"), plan.get("next_token"), self._chosen
            room = self._room.for_drafts(self.stats.generated_tokens + 2, width.verify)
            widths = width.draft, min(width.verify, room)
            self._drafter.launch_ahead(plan.get("features"), kept + 1, anchor, *widths)
            return
        if min(self._chosen) > 0 and self._drafter.alive:
            return
        self._chosen = None
        self._ahead.launch(self._plan)

    def _draft(self, anchor: mx.array, width: Width) -> Draft:
        room = self._room.for_drafts(self.stats.generated_tokens + 1, width.verify)
        verify = min(width.verify, room, self._conversion.room)
        return self._drafter.propose(anchor, width.draft, verify, self.sampling)

    def _speculate(self, anchor: mx.array, draft: Draft) -> tuple[mx.array, Speculation]:
        self._conversion.before_pass()
        block = anchor[:, None]
        if draft.width:
            block = mx.concatenate([block, draft.tokens], axis=1)
        return block, self._parts.open_speculation(self._cache, block)

    def _read(
        self, draft: Draft, logits: mx.array, num_accepted: mx.array, next_token: mx.array
    ) -> tuple[Outcome, mx.array]:
        """The one blocking read of a cycle: counts, next token, health and tokens at once."""
        width, dead, scores = draft.width, self._processing.dead, []
        numbers = [num_accepted, next_token, *draft.said]
        columns = [number.astype(mx.int32)[:, None] for number in numbers]
        if width:
            columns.append(draft.tokens.astype(mx.int32))
        if dead is not None:
            columns.append(dead.astype(mx.int32)[None])
        packed = mx.concatenate(columns, axis=1)
        if self._scores is not None:
            scores = self._scores.lazy(logits, draft.tokens, num_accepted, next_token)
        mx.async_eval(packed, *scores)  # before the next pass, or the read would wait for that
        self._look_ahead(width > 0)
        if scores:
            mx.eval(packed, *scores)
        row: list[int] = packed.tolist()[0]  # type: ignore
        accepted, following, *said = row[: len(numbers)]
        drafted = tuple(row[len(numbers) : len(numbers) + width])
        healthy, offered = draft.read(said)
        if not healthy:
            raise UnusableDraftError("numbers that are not finite, or ids outside the vocabulary")
        if not 0 <= accepted <= width or not 0 <= following < self._vocab_size:
            raise GenerationError(
                f"acceptance policy {self.acceptance.info.name!r} gave num_accepted "
                f"{accepted} of {width} and next token {following}"
            )
        outcome = self._decide(accepted, (*drafted[:accepted], following), max(accepted, offered))
        blocked = () if dead is None else [flag != 0 for flag in row[-width - 1 :]]
        self._processing.check_used(len(outcome.tokens), blocked)
        if self._scores is not None:
            records = self._scores.records(scores, outcome.tokens)
            outcome = attrs.evolve(outcome, logprobs=records)
        return outcome, next_token

    def _decide(self, accepted: int, tokens: tuple[int, ...], offered: int) -> Outcome:
        """Cut the block where the text ends."""
        request = self._request
        if self._cancelled():
            return Outcome(accepted, None, (), (), "cancelled", offered=offered)
        reason: FinishReason | None = None
        tokens = tokens[: self._room.tokens - self.stats.generated_tokens]
        end = next((i for i, t in enumerate(tokens) if t in request.eos_token_ids), None)
        if end is not None:
            tokens, reason = tokens[: end + 1], "stop"
        elif self.stats.generated_tokens + len(tokens) >= self._room.tokens:
            reason = "length"
        committed = (self._anchor, *tokens[:-1])
        kept = len(tokens) - 1
        return Outcome(accepted, kept, tokens, committed, reason, offered=offered)

    def _roll_back(self, speculation: Speculation, outcome: Outcome) -> None:
        if outcome.finish_reason is not None:
            self._ahead.drop()
        if outcome.kept is None:
            speculation.abort()
        elif not self._ahead.launched:  # else it has committed already
            speculation.commit((outcome.kept,))

    def _observe(self, outcome: Outcome, features: mx.array | None) -> None:
        if outcome.committed and outcome.finish_reason is None:
            self._drafter.observe(outcome.committed, features)

    def _abort(self) -> None:
        self._ahead.drop()
        if self._speculation is not None:
            self._speculation.abort()


def _failure(error: Exception) -> GenerationError:
    if isinstance(error, GenerationError):
        return error
    return GenerationError(f"a cycle failed: {one_line(error)}", "the caches are as before it")
