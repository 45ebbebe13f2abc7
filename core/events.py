"""Frozen records of what happened in a generation, handed to observers on the host."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from draftloom.memory import MemoryUse

__all__ = [
    "CycleEvent",
    "FailureEvent",
    "FinishReason",
    "GenerationStats",
    "MismatchEvent",
    "Outcome",
    "PrefillEvent",
    "TokenLogprob",
]

FinishReason = Literal["stop", "length", "cancelled"]


@attrs.frozen
class PrefillEvent:
    """The prompt is in the caches and the first token is known.

    Attributes:
        prompt_tokens: tokens of the prompt.
        seconds: from the start to the first token, wall clock.
    """

    prompt_tokens: int
    seconds: float


@attrs.frozen
class TokenLogprob:
    """How likely the target thought a token of the text.

    Attributes:
        token_id: the token.
        logprob: its natural log-probability, after bias, penalties and processors, before
            temperature and filters, as in mlx-lm.
        top: the most likely tokens there and their log-probabilities, best first, as many as
            were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as the command line prints it."""
        top = [{"token_id": token, "logprob": value} for token, value in self.top]
        return {"token_id": self.token_id, "logprob": self.logprob, "top": top}


@attrs.frozen
class CycleEvent:
    """One cycle: draft, verify, accept, roll back, commit.

    Attributes:
        index: 0 is the token that the prompt's last position gives (it belongs to no cycle and
            is left out of every rate); the first real cycle is 1.
        token_ids: tokens committed, cut at the end of the text.
        drafted: tokens the drafter proposed.
        verified: how many of them the target looked at, without those past an end that the drafter
            itself set (`Draft.lengths`).
        accepted: how many of them it agreed with.
        source: name of the drafter that proposed; empty when nothing was proposed.
        seconds: wall time since the cycle before.
        finish_reason: why the text ends here; None while it goes on.
        logprobs: one record a token, where they were asked for.
    """

    index: int
    token_ids: tuple[int, ...]
    drafted: int
    verified: int
    accepted: int
    source: str
    seconds: float
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a trace."""
        fields = {a.name: getattr(self, a.name) for a in attrs.fields(CycleEvent)}
        del fields["logprobs"]
        if self.logprobs:
            fields["logprobs"] = [record.as_dict() for record in self.logprobs]
        return fields


@attrs.frozen
class Outcome:
    """What a cycle decided, on the host.

    Attributes:
        num_accepted: as the acceptance policy decided.
        kept: draft tokens the caches keep, less where the text ends inside the block; None
            takes the whole cycle back.
        tokens: tokens committed to the text.
        committed: tokens the caches take in: the anchor and the kept draft tokens.
        finish_reason: why the text ends here, or None.
        logprobs: one record a token, where they were asked for.
        offered: draft tokens that the drafter stood by, those accepted among them.
    """

    num_accepted: int
    kept: int | None
    tokens: tuple[int, ...]
    committed: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] = ()
    offered: int = 0


@attrs.frozen
class FailureEvent:
    """A generation ended in an error.

    Attributes:
        message: the error, one line.
        generated_tokens: tokens committed before it.
    """

    message: str
    generated_tokens: int


@attrs.frozen
class MismatchEvent:
    """Running acceptance says that drafter and target do not belong together. Once a pipeline.

    Attributes:
        drafter: whose drafts they were.
        cycles: cycles listened to, over all texts of the pipeline.
        acceptance_length: tokens a cycle over these.
        contexts: cycles that asked something new (a text that repeats itself counts once).
        first_accepted: of those, cycles whose first draft token was accepted.
        unrelated_rate: share of accepted first tokens up to which a drafter counts as unrelated.
        expected_rate: share that one made for the target reaches at least, on hard text too.
        stated_length: acceptance length that the checkpoint states; None where it states none.
        parked: whether the width policy has stopped drafting.
    """

    drafter: str
    cycles: int
    acceptance_length: float
    contexts: int
    first_accepted: int
    unrelated_rate: float
    expected_rate: float
    stated_length: float | None = None
    parked: bool = False

    @property
    def message(self) -> str:
        """What is wrong, the numbers, and what to check; one line."""
        stated = (
            f"; the checkpoint states {self.stated_length:.2f}"
            if self.stated_length is not None
            else ""
        )
        return (
            f"drafter {self.drafter!r} and this target do not seem to belong together: acceptance "
            f"length {self.acceptance_length:.2f} over {self.cycles} cycles (an unrelated drafter "
            f"gets about 1.0{stated}), {self.first_accepted} of {self.contexts} first draft tokens "
            f"accepted (made for the target: {self.expected_rate:.0%} or more; unrelated: "
            f"{self.unrelated_rate:.0%} or less). The text is the target's all the same. Check "
            "that the drafter's card names this very target and fine-tune, that its tap layers "
            "count layer outputs from 0, and that both have one tokenizer"
        )

    @property
    def said(self) -> str:
        """The message, and whether drafting goes on."""
        end = "the target goes on alone" if self.parked else "drafting goes on, as the width says"
        return f"{self.message}; {end}"


@attrs.define
class GenerationStats:
    """Counts of one generation, and the rates that follow from them.

    Attributes:
        prompt_tokens: tokens of the prompt.
        generated_tokens: tokens emitted, the one from the prompt included.
        cycles: cycles after the prompt.
        committed: tokens those cycles committed.
        drafted: tokens proposed in all cycles.
        verified: of those, looked at by the target.
        accepted: of those, accepted.
        verified_by_position: cycles that verified a draft token at position i.
        accepted_by_position: of those, cycles that accepted it.
        prefill_seconds: start to first token.
        decode_seconds: first token to last.
        fell_back: why the drafter was given up; empty while it works.
        mismatch: the mismatch alarm of the pipeline; empty where it did not ring.
        width: what the width policy chose in the end, and why; empty where it does not say.
        memory: what was held, in bytes; None until the generation has ended.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    cycles: int = 0
    committed: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    verified_by_position: list[int] = attrs.Factory(list)
    accepted_by_position: list[int] = attrs.Factory(list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    fell_back: str = ""
    mismatch: str = ""
    width: str = ""
    memory: MemoryUse | None = None

    def add(self, event: CycleEvent) -> None:
        """Count one cycle. A cycle that was cancelled committed nothing and is not counted."""
        if not event.token_ids:
            return
        self.generated_tokens += len(event.token_ids)
        if event.index == 0:
            self.prefill_seconds = event.seconds
            return
        self.cycles += 1
        self.committed += len(event.token_ids)
        self.decode_seconds += event.seconds
        self.drafted += event.drafted
        self.verified += event.verified
        self.accepted += event.accepted
        missing = event.verified - len(self.verified_by_position)
        self.verified_by_position.extend([0] * missing)
        self.accepted_by_position.extend([0] * missing)
        for i in range(event.verified):
            self.verified_by_position[i] += 1
            self.accepted_by_position[i] += i < event.accepted

    @property
    def acceptance_length(self) -> float:
        """tau: tokens a cycle as the acceptance policy decided, 1 + accepted / cycles; 0 without
        cycles. (The cut at the end of a text does not count against the drafter.)"""
        return 1 + self.accepted / self.cycles if self.cycles else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over verified draft tokens, 0..1; 0 without drafts. (Tokens that were drafted
        and not looked at were neither accepted nor rejected.)"""
        return self.accepted / self.verified if self.verified else 0.0

    @property
    def rate_by_position(self) -> list[float]:
        """Share of accepted draft tokens at each position, 0..1."""
        pairs = zip(self.accepted_by_position, self.verified_by_position, strict=True)
        return [accepted / verified for accepted, verified in pairs]

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens committed by cycles over the seconds they took; 0 without cycles."""
        return self.committed / self.decode_seconds if self.decode_seconds > 0 else 0.0
