"""DSpark: DFlash's block, walked from left to right with a bias from the token before.

The slots' logits come from one pass, as in DFlash. A Markov head adds w2(w1[previous token]) to
each, so that the token of a slot agrees with the one before it; a confidence head says how likely
the target keeps it. Above temperature 0 every token is drawn from its law, which is the q that the
acceptance policy gets.

Source: config.json and tensors of public DSpark checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from draftloom.checkpoint import DrafterDescription, MarkovHead
from draftloom.contracts import ComponentInfo, Draft, DraftLaw, DraftRequest, Need
from draftloom.drafting import all_finite
from draftloom.errors import UsageError
from draftloom.sampling import SamplingState, target_law

from .dflash.base import BlockDrafter, BlockSession
from .dflash.block import LoadedDrafter
from .dflash.model import DFlashModel

__all__ = ["DSparkDrafter"]


class _Markov(nn.Module):
    """w1 has a row for every token of the target, w2 one for every token that can be proposed."""

    def __init__(self, config: DrafterDescription, head: MarkovHead) -> None:
        super().__init__()
        rank, hidden = head.rank, config.hidden_size
        self.kind = head.kind
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        size = config.draft_vocab_size or config.vocab_size
        self.markov_w2 = nn.Linear(rank, size, bias=False)
        if head.kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif head.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def __call__(
        self, row: mx.array, hidden: mx.array, state: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Bias [B, draft vocabulary] of a slot, and the state after it.

        Args:
            row: [B, r], w1 of the token before.
            hidden: [B, D] of the slot.
            state: [B, r], zeros at the first slot.
        """
        if self.kind == "gated":
            gate = mx.sigmoid(self.gate_proj(mx.concatenate([hidden, row], axis=-1)))
            row = gate * row
        elif self.kind == "rnn":
            joint = self.joint_proj(mx.concatenate([state, row, hidden], axis=-1))
            gate, candidate, output = mx.split(joint, 3, axis=-1)
            gate = mx.sigmoid(gate)
            state = gate * state + (1 - gate) * mx.tanh(candidate)
            row = mx.tanh(output)
        return self.markov_w2(row), state


class _Confidence(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 1)

    def __call__(self, inputs: mx.array) -> mx.array:
        """Probability [B] float32 that a token is kept."""
        return mx.sigmoid(self.proj(inputs)[..., 0].astype(mx.float32))


class DSparkModel(DFlashModel):
    """DFlash's network with the heads that the description names."""

    def __init__(self, config: DrafterDescription, own: frozenset[str] = frozenset()) -> None:
        super().__init__(config, own)
        rank = 0 if config.markov is None else config.markov.rank
        if config.markov is not None:
            self.markov_head = _Markov(config, config.markov)
        if config.confidence is not None:
            with_markov = rank if config.confidence.with_markov else 0
            self.confidence_head = _Confidence(config.hidden_size + with_markov)


class DSparkDrafter(BlockDrafter):
    """Drafting with a DSpark checkpoint of any format.

    Args:
        checkpoint: its description, or a folder of a built-in format.
        confidence_threshold: in [0, 1); a draft ends before the first token at which the product
            of the confidences so far is below it. 0 keeps every draft whole.
        bits, group_size, window, sinks: see `BlockOptions.of`.

    Attributes:
        description: of the checkpoint.

    Raises:
        ModelError: the folder is not a DSpark checkpoint, or its config is incomplete.
        UsageError: a threshold out of range, or one for a checkpoint without a confidence head;
            another option out of its range.
    """

    info = ComponentInfo(
        "dspark",
        "a block over the target's hidden states, each token with the one before in mind",
        needs=(Need.TAPS,),
        law=DraftLaw.DENSE,
        model_options=("checkpoint",),
        checkpoint_options=("checkpoint",),
        paired=("dspark",),
    )
    serves = "dspark"
    network = DSparkModel

    def __init__(
        self,
        checkpoint: Path | DrafterDescription,
        confidence_threshold: float = 0.0,
        bits: int | None = None,
        group_size: int | None = None,
        window: int | None = None,
        sinks: int | None = None,
    ) -> None:
        super().__init__(checkpoint, bits, group_size, window, sinks)
        number = isinstance(confidence_threshold, int | float)
        if not number or not 0 <= confidence_threshold < 1:
            raise UsageError(
                f"confidence_threshold must be in [0, 1), got {confidence_threshold!r}",
                "0 keeps every draft whole",
            )
        if confidence_threshold and self.description.confidence is None:
            raise UsageError(
                f"{self.description.label} has no confidence head",
                "leave confidence_threshold out",
            )
        self._threshold = float(confidence_threshold)
        if self._threshold:
            packed = self.info.details
            cut = f"drafts end where confidence falls below {self._threshold:g}"
            self._tell("; ".join(filter(None, [packed, cut])))

    def open(self, request: DraftRequest) -> DSparkSession:
        """Begin a generation.

        Raises:
            ModelError: the drafter was not bound.
        """
        return DSparkSession(self._weights(), request.vocab_size, self._threshold)


class DSparkSession(BlockSession):
    """One generation: a context, and the walk over the slots."""

    def __init__(self, loaded: LoadedDrafter, vocab_size: int, threshold: float) -> None:
        super().__init__(loaded)
        self._vocab_size = vocab_size
        self._threshold = threshold

    def _propose(self, anchor: mx.array, width: int, count: int, sampling: SamplingState) -> Draft:
        """`count` tokens [B, count] after the anchor [B]; above temperature 0 with their q rows."""
        loaded, markov = self._loaded, self._loaded.description.markov
        hidden = self._context.hidden(anchor, width, count)
        base = loaded.scores(hidden)
        tokens, laws, confidences, token = [], [], [], anchor
        state = mx.zeros((anchor.shape[0], markov.rank if markov else 0), dtype=hidden.dtype)
        for slot in range(count):
            slot_hidden, logits = hidden[:, slot], base[:, slot]
            inputs = slot_hidden
            if markov is not None:
                row = loaded.network.markov_head.markov_w1(token)
                bias, state = loaded.network.markov_head(row, slot_hidden, state)
                logits = logits + bias
                inputs = mx.concatenate([slot_hidden, row], axis=-1)
            if self._threshold:
                confidences.append(self._confidence(slot_hidden, inputs))
            if sampling.params.greedy:
                token = loaded.to_target(mx.argmax(logits, axis=-1))
            else:
                laws.append(target_law(self._over_target(logits), sampling.params))
                drawn = mx.random.categorical(mx.log(laws[-1]), key=sampling.draft_key())
                token = drawn.astype(mx.int32)
            tokens.append(token)
        proposed = mx.stack(tokens, axis=1)
        return Draft(
            proposed,
            DraftLaw.DENSE if laws else DraftLaw.DETERMINISTIC,
            mx.stack(laws, axis=1) if laws else None,
            healthy=all_finite(hidden, base),
            source="dspark",
            lengths=self._lengths(confidences),
            ids_below=loaded.ids_below(base),
        )

    def _confidence(self, hidden: mx.array, with_row: mx.array) -> mx.array:
        """[B] of a slot. It depends on the tokens before the slot's own, never on that one: whether
        a token is in the draft is known before it is drawn, so that a cut draft is still one that
        was drawn from its law."""
        head = self._loaded.description.confidence
        found: mx.array = self._loaded.network.confidence_head(
            with_row if head is not None and head.with_markov else hidden
        )
        return found

    def _lengths(self, confidences: list[mx.array]) -> mx.array | None:
        """[B] int32: tokens before the product of confidences falls below the threshold."""
        if not confidences:
            return None
        products = mx.cumprod(mx.stack(confidences, axis=1), axis=1)
        kept = (products >= self._threshold).astype(mx.int32)
        return mx.cumprod(kept, axis=1).sum(axis=1)

    def _over_target(self, logits: mx.array) -> mx.array:
        """Logits [B, V] of the target's tokens: minus infinity where the drafter has no token."""
        ids = self._loaded.target_ids
        if ids is None:
            return logits
        rows = mx.full((logits.shape[0], self._vocab_size), -mx.inf, dtype=logits.dtype)
        ids = mx.broadcast_to(ids[None], logits.shape)
        return mx.put_along_axis(rows, ids, logits, axis=-1)
