"""What a drafter checkpoint says of itself, in one form for every file format.

A checkpoint format is a module that reads a config into a `DrafterDescription` (hook
`read_drafter_checkpoint`). Drafters know descriptions only: a new format needs no new drafter, and
a new drafter no new format.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from draftloom.contracts import TargetInfo
from draftloom.errors import Problem

__all__ = [
    "CandidateSelector",
    "ConfidenceHead",
    "DrafterDescription",
    "DynamicConvolution",
    "MarkovHead",
    "WindowRule",
]


class WindowRule(enum.StrEnum):
    """Which rows of the context a sliding layer with window W sees."""

    QUERY = "query"
    """Counted from each slot: key >= slot - W + 1."""
    BLOCK = "block"
    """Counted from the anchor, the same rows for every slot of a block: key >= anchor - W."""


@attrs.frozen
class MarkovHead:
    """A bias on the logits that depends on the tokens before, of low rank (DSpark).

    Attributes:
        rank: r. With e = w1[previous token] [r] the bias is w2 of a vector [r] made of it.
        kind: ``vanilla``: e itself. ``gated``: e times a gate of slot and e. ``rnn``: the output of
            a recurrent state over the block, from slot and e.
    """

    rank: int
    kind: str = "vanilla"


@attrs.frozen
class ConfidenceHead:
    """One number a slot: how likely the target keeps its token (DSpark).

    Attributes:
        with_markov: it reads the Markov head's row of the token before too.
    """

    with_markov: bool


@attrs.frozen
class DynamicConvolution:
    """A grouped dynamic causal convolution around every sublayer (DFlash 2).

    Attributes:
        kernel_size: taps, the slot's own included.
        group_size: neighbouring channels that share a dynamic kernel.
    """

    kernel_size: int
    group_size: int


@attrs.frozen
class CandidateSelector:
    """A walk over the best candidates of each slot (DFlash 2).

    Attributes:
        rank: of its factors.
        top_k: candidates a slot.
    """

    rank: int
    top_k: int


@attrs.frozen(kw_only=True)
class DrafterDescription:
    """A drafter that reads a target's hidden states, whatever format its files have.

    Attributes:
        name: what the user called the checkpoint.
        path: its folder; None for a config that is in memory.
        format: the format that read it.
        drafter: the registered drafter that serves it (``dflash``, ``dflash2``, ``dspark``).
        hidden_size: D, that of the target.
        intermediate_size: of the MLP.
        num_layers: decoder layers.
        num_heads, num_kv_heads, head_dim: attention.
        vocab_size: V, that of the target.
        draft_vocab_size: tokens it can propose, with a head of its own and a map ``d2t``; None is
            every token of the target.
        rms_norm_eps: of every norm.
        rope_theta: base of the rotary embedding.
        rope_scaling: its scaling (``rope_type`` yarn, ...); None is plain.
        rope_interleaved: whether neighbouring dimensions are rotated together, not halves.
        max_positions: positions it was made for.
        layer_types: ``full_attention`` or ``sliding_attention``, a layer.
        sliding_window: W of the sliding layers.
        window_rule: what W counts.
        is_causal: inside the block; None means sliding layers are and full layers are not.
        block_size: slots, the anchor's among them.
        first_slot: slot that predicts the first draft token: 0 is the anchor's own, 1 the one
            after it.
        mask_token_id: stands in the slots after the anchor's.
        tap_layers: target layers whose outputs are the features (z-lab's numbers, from 0).
        num_target_layers: of the target it was trained for; None is not said.
        embedding_scale: factor on the target's embeddings.
        scales_table: whether it is meant for the rows of the target's table. A target may have a
            factor of its own (Gemma); without this the two are multiplied.
        output_multiplier: factor on the hidden states before the head.
        softcap: c of c * tanh(logits / c); None is off.
        quantization: of stored weights, as mlx-lm writes it; None is plain.
        dtype: name of the type it was trained in, as the config says it; None is not said.
        markov, confidence: the heads of a DSpark drafter.
        convolution, selector: the additions of a DFlash 2 drafter.
        renames: prefixes of stored tensor names and what stands for them inside, first match.
        ignored_tensors: patterns (``fnmatch``) of stored tensors that a drafter does not need.
        unread: config keys that the format does not know and that are not known to matter.
        trained_context: tokens of the longest sequences it was trained on; None is not stated.
        stated_length: acceptance length that the checkpoint states; None is not stated.
    """

    name: str
    path: Path | None
    format: str
    drafter: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    layer_types: tuple[str, ...]
    block_size: int
    mask_token_id: int
    tap_layers: tuple[int, ...]
    draft_vocab_size: int | None = None
    rope_scaling: Mapping[str, Any] | None = None
    rope_interleaved: bool = False
    sliding_window: int | None = None
    window_rule: WindowRule = WindowRule.QUERY
    is_causal: bool | None = None
    first_slot: int = 1
    num_target_layers: int | None = None
    embedding_scale: float = 1.0
    scales_table: bool = False
    output_multiplier: float = 1.0
    softcap: float | None = None
    quantization: Mapping[str, Any] | None = None
    dtype: str | None = None
    markov: MarkovHead | None = None
    confidence: ConfidenceHead | None = None
    convolution: DynamicConvolution | None = None
    selector: CandidateSelector | None = None
    renames: tuple[tuple[str, str], ...] = ()
    ignored_tensors: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    trained_context: int | None = None
    stated_length: float | None = None

    @property
    def max_width(self) -> int:
        """The most tokens a block proposes."""
        return self.block_size - self.first_slot

    @property
    def label(self) -> str:
        """The folder, or the name where there is none, for messages."""
        return self.name if self.path is None else str(self.path)

    def tensor_name(self, stored: str) -> str:
        """The name inside of a stored tensor."""
        for prefix, replacement in self.renames:
            if stored.startswith(prefix):
                return replacement + stored[len(prefix) :]
        return stored

    def problems(self, target: TargetInfo) -> Iterable[Problem]:
        """What does not fit the target."""
        hint = "is this the drafter of another target?"
        fits = {
            "vocab_size": (self.vocab_size, target.vocab_size),
            "hidden_size": (self.hidden_size, target.hidden_size),
            "num_target_layers": (self.num_target_layers, target.num_layers),
        }
        for key, (ours, theirs) in fits.items():
            if ours is not None and ours != theirs:
                message = f"the drafter was made for {key} {ours}, the target has {theirs}"
                yield Problem(self.drafter, message, hint)
        if not 0 <= self.mask_token_id < target.vocab_size:
            message = f"mask_token_id {self.mask_token_id} is outside the target's vocabulary"
            yield Problem(self.drafter, message, hint)
