"""The contracts between the parts: what a drafter, verifier, policy, rollback, adapter must do.

All arrays carry the batch axis first. Shapes use B (rows), T (tokens), K (draft tokens),
V (vocabulary), D (hidden size), F (features: number of taps times D).
A component is a class with an `info` (`ComponentInfo`) and the methods of its protocol; nothing
is inherited. What a component may be able to do besides is in `draftloom.abilities`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import attrs
import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from draftloom.model_info import ModelInfo
    from draftloom.sampling import SamplingState

__all__ = [
    "AcceptancePolicy",
    "CacheKind",
    "CacheRollback",
    "ComponentInfo",
    "CycleNode",
    "Draft",
    "DraftLaw",
    "DraftRequest",
    "DraftSession",
    "Drafter",
    "LayerSpeculation",
    "LoadedModel",
    "Need",
    "Port",
    "Preserves",
    "Speculation",
    "TargetAdapter",
    "TargetAdapterFactory",
    "TargetInfo",
    "TargetOutput",
    "Verifier",
    "Width",
    "WidthPolicy",
]


class DraftLaw(enum.StrEnum):
    """The law that draft tokens were drawn from."""

    DETERMINISTIC = "deterministic"
    """Chosen, not drawn: q is one-hot at the token."""
    DENSE = "dense"
    """Drawn from q rows over the whole vocabulary."""
    TOP_K = "top-k"
    """Drawn from q rows over a few candidates."""


class Preserves(enum.StrEnum):
    """What an acceptance policy promises about the output."""

    GREEDY = "greedy tokens"
    DISTRIBUTION = "distribution"
    NOTHING = "nothing"


class Need(enum.StrEnum):
    """What a component cannot work without."""

    TAPS = "taps"
    """Hidden states of the layers in `ComponentInfo.tap_layers`."""
    TAPE = "tape"
    """Recurrent layers that record their updates during verify."""
    DRAFT_PROBS = "draft-probs"
    """The q rows of every draft (a deterministic draft has none)."""


class CacheKind(enum.StrEnum):
    """What a layer's cache is."""

    ATTENTION = "attention"
    SLIDING_WINDOW = "sliding-window"
    GATED_DELTA = "gated-delta"
    RECURRENT = "recurrent"
    OTHER = "other"


@attrs.frozen
class Port:
    """A named, typed value that nodes exchange within a cycle.

    Attributes:
        name: ports of the same name are connected.
        type: what travels, in words or as shape and dtype (``[B, K+1, V]``). Two ports of one
            name must agree; an empty type agrees with any.
    """

    name: str
    type: str = ""


@attrs.frozen
class ComponentInfo:
    """What a component says about itself before anything is loaded.

    Attributes:
        name: the name it is registered under.
        summary: one line for listings.
        details: what this one does that its name does not say; `Pipeline.describe` shows it.
        needs: what it cannot work without.
        law: drafters: the law of its drafts.
        preserves: acceptance policies: what the output keeps.
        cache_kinds: rollbacks: the kinds it can take back.
        tap_layers: drafters: target layers whose output it reads.
        default_width: drafters: draft tokens a cycle when the user does not say.
        max_width: drafters: the most draft tokens it can propose; None is no limit.
        model_options: options that name a model (folder or repository); the builder turns them
            into local folders before the component is made.
        checkpoint_options: those of them that name a drafter checkpoint; the builder hands over
            what a checkpoint format reads of it (`DrafterDescription`), the folder where none does.
        nested_options: options that hold other drafters; the builder makes those first.
        paired: drafters: sources of drafts (`Draft.source`) that were made for one target, so that
            hardly any acceptance means that the two do not belong together.
        stated_length: drafters: acceptance length that the checkpoint states; None is not stated.
        inputs: inserted nodes: ports it reads.
        outputs: inserted nodes: ports it writes; one it also reads is rewritten in place.
    """

    name: str
    summary: str = ""
    needs: tuple[Need, ...] = ()
    law: DraftLaw | None = None
    preserves: Preserves | None = None
    cache_kinds: tuple[CacheKind, ...] = ()
    tap_layers: tuple[int, ...] = ()
    default_width: int = 4
    max_width: int | None = None
    model_options: tuple[str, ...] = ()
    checkpoint_options: tuple[str, ...] = ()
    nested_options: tuple[str, ...] = ()
    paired: tuple[str, ...] = ()
    stated_length: float | None = None
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    details: str = ""

    @property
    def lossless(self) -> bool:
        """Whether a policy promises the target's own tokens or law."""
        return self.preserves in (Preserves.GREEDY, Preserves.DISTRIBUTION)


# --- the target ------------------------------------------------------------------------------


@attrs.frozen
class TargetInfo:
    """What is known of a target before its weights are loaded.

    Attributes:
        name: the reference the user gave (hub name or folder).
        adapter: name of the adapter that claimed it.
        model_type: `model_type` of its config.
        hidden_size: D.
        vocab_size: V.
        num_layers: decoder layers.
        cache_kinds: kind of each entry of `make_cache()`, in order.
        context_limit: most positions it was made for; None is unknown.
        can_tap: whether hidden states can be taken.
        why_no_taps: why they cannot; may be empty.
        tape_kinds: cache kinds whose layers can record a tape.
    """

    name: str
    adapter: str
    model_type: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    cache_kinds: tuple[CacheKind, ...]
    context_limit: int | None = None
    can_tap: bool = True
    why_no_taps: str = ""
    tape_kinds: tuple[CacheKind, ...] = ()


class TargetOutput(NamedTuple):
    """What a target's forward gives.

    Attributes:
        logits: [B, T, V].
        features: [B, T, F], outputs of the tapped layers side by side; None without taps.
    """

    logits: mx.array
    features: mx.array | None


class TargetAdapter(Protocol):
    """One loaded target model behind a uniform face.

    An adapter wraps or replaces *instances* inside the model and undoes it in `close`;
    it never patches a class or a module.
    """

    info: TargetInfo
    model: nn.Module

    def tap(self, layers: Sequence[int]) -> None:
        """Choose the layers whose outputs `forward` returns as features (value after the
        layer's residual add). An empty sequence turns taps off."""

    def forward(self, tokens: mx.array, cache: list[Any]) -> TargetOutput:
        """Run tokens [B, T] int32 through the model and append them to the caches."""

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings [B, T, D] as the model's first layer gets them."""

    def head(self, hidden: mx.array) -> mx.array:
        """Logits [..., V] of normed hidden states [..., D]."""

    def make_cache(self) -> list[Any]:
        """Fresh caches for one generation, one entry a cached layer."""

    def close(self) -> None:
        """Put every replaced instance back. The model is then what mlx-lm loaded."""


class TargetAdapterFactory(Protocol):
    """An adapter class: says from the config alone whether and how it serves a model."""

    def claims(self, model: ModelInfo) -> bool:
        """Whether this adapter serves the model."""

    def describe(self, model: ModelInfo) -> TargetInfo:
        """What the target is, from its config alone; loads no weight."""

    def __call__(self, model: nn.Module, info: TargetInfo) -> TargetAdapter:
        """Wrap a loaded model."""


@attrs.frozen(eq=False)
class LoadedModel:
    """Weights and tokenizer as mlx-lm loads them.

    Attributes:
        model: the module.
        tokenizer: mlx-lm's TokenizerWrapper; None where the folder has none.
    """

    model: nn.Module
    tokenizer: Any


# --- drafting --------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Draft:
    """Proposed tokens and the law they were drawn from. Lazy: nothing here is evaluated.

    Attributes:
        tokens: [B, K] int32; K may be 0 (nothing to propose) and less than was asked for.
        law: what q is.
        probs: q. DENSE: [B, K, V] float32. TOP_K: [B, K, k] float32, zero where not drawn from.
        candidates: TOP_K: [B, K, k] int32, the token ids of the probs.
        healthy: [B] bool, False where the drafter's numbers were not finite; None is unchecked.
        lengths: [B] int32, how many tokens of each row the drafter stands by; None is all of them.
            Whether token i is among them may depend on the tokens before it only. Those past are
            drawn from their law all the same: a policy may end there, and need not.
        source: name of the drafter that proposed it; the engine fills it in where empty.
        filled: slots that were filled for it, where those are more than its tokens.
        ids_below: every id in it is at least 0 and below this by how it came about, an argmax over
            so many logits for one; None has the engine look at them, on the device.
    """

    tokens: mx.array
    law: DraftLaw = DraftLaw.DETERMINISTIC
    probs: mx.array | None = None
    candidates: mx.array | None = None
    healthy: mx.array | None = None
    source: str = ""
    lengths: mx.array | None = None
    filled: int | None = None
    ids_below: int | None = None

    @classmethod
    def deterministic(
        cls,
        tokens: mx.array,
        healthy: mx.array | None = None,
        source: str = "",
        ids_below: int | None = None,
    ) -> Draft:
        """A draft of chosen tokens [B, K]: q is one-hot at each."""
        tokens = tokens.astype(mx.int32)
        return cls(tokens, healthy=healthy, source=source, ids_below=ids_below)

    @classmethod
    def empty(cls, rows: int = 1) -> Draft:
        """Nothing proposed: the cycle decodes one token the plain way."""
        return cls(mx.zeros((rows, 0), dtype=mx.int32))

    @property
    def width(self) -> int:
        """K, the number of tokens proposed a row."""
        return self.tokens.shape[1]

    def stands(self) -> mx.array:
        """[B, K] bool: which tokens the drafter stands by."""
        positions = mx.broadcast_to(mx.arange(self.width), self.tokens.shape)
        if self.lengths is None:
            return mx.ones(self.tokens.shape, dtype=mx.bool_)
        return positions < self.lengths[:, None]

    @property
    def said(self) -> list[mx.array]:
        """What the host reads besides the tokens, [B] each: health and lengths, where given."""
        if not self.width:
            return []
        return [a for a in (self.healthy, self.lengths) if a is not None]

    def read(self, said: Sequence[int]) -> tuple[bool, int]:
        """A row of `said`: healthy or not, and how many tokens the drafter stands by, 0..K."""
        left = list(said)
        healthy = self.healthy is None or not left or left.pop(0) != 0
        offered = left.pop(0) if left else self.width
        return healthy, min(max(offered, 0), self.width)

    def first(self, width: int) -> Draft:
        """The first `width` tokens of this draft, with their law."""
        if width >= self.width:
            return self
        cut = [None if a is None else a[:, :width] for a in (self.probs, self.candidates)]
        filled = self.width if self.filled is None else self.filled
        tokens = self.tokens[:, :width]
        return attrs.evolve(self, tokens=tokens, probs=cut[0], candidates=cut[1], filled=filled)


@attrs.frozen(eq=False)
class DraftRequest:
    """What a drafter is told when a generation begins.

    Attributes:
        prompt: token ids of each row. They reach the session through `observe` as well.
        sampling: the generation's sampling state.
        vocab_size: V of the target.
    """

    prompt: tuple[tuple[int, ...], ...]
    sampling: SamplingState
    vocab_size: int


class DraftSession(Protocol):
    """A drafter's state for one generation."""

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """Learn the tokens that the target's cache has just taken in.

        Called for each chunk of the prompt and after every cycle. Together the calls give every
        token once, in order; the anchor is not among them until the cycle that verifies it.

        Args:
            committed: token ids a row (rows may differ in length).
            features: [B, T, F] with row b valid up to len(committed[b]); None without taps.
        """

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        """Propose up to `width` (>= 1) tokens that follow the anchor [B] int32."""


class Drafter(Protocol):
    """Proposes tokens. Sessions hold the state; the drafter itself can serve many."""

    info: ComponentInfo

    def open(self, request: DraftRequest) -> DraftSession:
        """Begin a generation."""


# --- verify, accept, roll back ---------------------------------------------------------------


class LayerSpeculation(Protocol):
    """One cache entry while a block is being verified.

    Attributes:
        entry: what the verify pass must use in place of the cache entry (may be the entry).
        reforwards: whether fewer accepted tokens than verified are reached by running the
            accepted tokens again (the composite then restores every layer and does so).

    May also have `started`, a sequence of lazy arrays that the last commit made: those of all
    layers are started on the device in one call, which costs less than one call a layer.
    """

    entry: Any
    reforwards: bool

    def commit(self, num_accepted: Sequence[int]) -> None:
        """Keep the anchor and `num_accepted[b]` draft tokens of each row.

        Absolute: may be called again with smaller counts until the next `begin`. With
        `reforwards` it is called only when everything was accepted (otherwise `abort`, and the
        accepted tokens are run again).
        """

    def abort(self) -> None:
        """Put the entry back as it was before `begin`. May follow a commit. Of two speculations of
        one token each, the later is aborted first."""


class CacheRollback(Protocol):
    """A strategy that can take the caches of some kinds back to the accepted prefix."""

    info: ComponentInfo

    def begin(self, entry: Any, block: mx.array) -> LayerSpeculation:
        """Prepare one cache entry for the verification of block [B, K+1] int32."""


class Speculation(Protocol):
    """All caches while a block is being verified.

    Attributes:
        cache: the entries that the verify pass must use.
        block: [B, K+1] int32, the tokens of the pass. A strategy that runs accepted tokens again
            takes them from here: who draws tokens as they run puts them here before committing.
    """

    cache: list[Any]
    block: mx.array

    def commit(self, num_accepted: Sequence[int]) -> None:
        """Keep the anchor and `num_accepted[b]` draft tokens of each row. Absolute: a later
        call with smaller counts cuts further."""

    def abort(self) -> None:
        """Put every cache back as before `begin`."""


class Verifier(Protocol):
    """Runs the target over a block."""

    info: ComponentInfo

    def verify(
        self, target: TargetAdapter, block: mx.array, speculation: Speculation
    ) -> TargetOutput:
        """Logits [B, K+1, V] and features [B, K+1, F] of block [B, K+1] = [anchor, d1 .. dK].

        Row i of the logits predicts the token after block[:, i].
        """


class AcceptancePolicy(Protocol):
    """Keeps the right prefix of a draft."""

    info: ComponentInfo

    def accept(
        self, draft: Draft, logits: mx.array, sampling: SamplingState
    ) -> tuple[mx.array, mx.array]:
        """Decide, lazily, on a draft of K >= 0 tokens.

        Args:
            draft: K proposals.
            logits: [B, K+1, V]; row i is the target's law for the token at draft position i.
            sampling: temperature, filters, and a random stream of its own.

        Returns:
            num_accepted [B] int32 in 0..K, and next_token [B] int32: the correction after a
            rejection, the bonus after K accepted.
        """


class Width(NamedTuple):
    """Draft slots to fill, and how many of them to verify, this cycle."""

    draft: int
    verify: int


class WidthPolicy(Protocol):
    """Chooses how much to draft and to verify."""

    info: ComponentInfo

    def choose(self, limit: int) -> Width:
        """The widths of the next cycle; `limit` is the drafter's most. (0, 0) is plain decoding."""

    def observe(self, drafted: int, verified: int, accepted: int, seconds: float) -> None:
        """Learn how the last cycle went: tokens drafted, verified, accepted; wall seconds."""


class CycleNode(Protocol):
    """A user's own node: called once a cycle with its input ports, gives its output ports.

    Its `info.inputs` and `info.outputs` name the ports. Arrays are lazy: reading a value on the
    host here costs a second blocking read a cycle.
    """

    info: ComponentInfo

    def __call__(self, *inputs: Any) -> Any:
        """Return the outputs: nothing, one value, or a tuple in the order of `info.outputs`."""
