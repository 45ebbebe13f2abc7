"""DFlash 2: DFlash's block with convolutions around every sublayer, and a walk over candidates.

A grouped dynamic causal convolution before and after each sublayer lets the slots of a block see
those before them, also where attention is bidirectional. A selector takes the best candidates of
each slot and walks from left to right: a candidate's score is its logit and how well it follows the
token before. Above temperature 0 the walk is drawn, and the law of each draw is the q that the
acceptance policy gets: a few candidates, nothing elsewhere.

Source: config.json and tensors of public DFlash 2 checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import mlx.core as mx
import mlx.nn as nn

from draftloom.checkpoint import CandidateSelector, DrafterDescription, DynamicConvolution
from draftloom.contracts import ComponentInfo, Draft, DraftLaw, DraftRequest, Need
from draftloom.drafting import all_finite
from draftloom.errors import ModelError
from draftloom.sampling import SamplingState

from .dflash.base import BlockDrafter, BlockSession
from .dflash.context import ContextCache
from .dflash.model import ALL_ROWS, DFlashLayer, DFlashModel, Shared

__all__ = ["DFlash2Drafter", "DFlash2Model"]


class _Convolution(nn.Module):
    """out[i, c] = sum over t < k of (base[side, t, c] + delta[i, side, t, c // g]) x[i - t, c].

    Zero before the block. Side 0 is a sublayer's input, side 1 its output.
    """

    def __init__(self, config: DrafterDescription, kernel: DynamicConvolution) -> None:
        super().__init__()
        if config.hidden_size % kernel.group_size:
            raise ModelError(
                f"{config.label}: conv_group_size {kernel.group_size} does not divide hidden_size "
                f"{config.hidden_size}",
                "is config.json complete?",
            )
        self.taps, self.group = kernel.kernel_size, kernel.group_size
        groups = config.hidden_size // kernel.group_size
        self.base_kernel = mx.zeros((2, kernel.kernel_size, config.hidden_size))
        self.kernel_projection = nn.Linear(
            config.hidden_size, 2 * kernel.kernel_size * groups, bias=False
        )

    def __call__(self, x: mx.array, sublayer: Callable[[mx.array], mx.array]) -> mx.array:
        """The sublayer between both convolutions. Their kernels come from its normed input.

        Args:
            x: [B, T, D], normed.
            sublayer: [B, T, D] to [B, T, D].
        """
        rows, tokens, size = x.shape
        delta = self.kernel_projection(x)
        delta = delta.reshape(rows, tokens, 2, self.taps, size // self.group, 1)
        base = self.base_kernel.reshape(2, self.taps, size // self.group, self.group)
        kernels = base + delta  # [B, T, 2, k, groups, g]
        return self._convolve(sublayer(self._convolve(x, kernels[:, :, 0])), kernels[:, :, 1])

    def _convolve(self, x: mx.array, kernel: mx.array) -> mx.array:
        """[B, T, D] by a kernel [B, T, k, groups, g] of every slot."""
        rows, tokens, size = x.shape
        grouped = x.reshape(rows, tokens, size // self.group, self.group)
        before = mx.zeros((rows, self.taps - 1, *grouped.shape[2:]), dtype=x.dtype)
        padded = mx.concatenate([before, grouped], axis=1)
        # Tap t of slot i is row i - t of the block: row k - 1 + i - t of the padded one.
        first = self.taps - 1
        parts = [
            kernel[:, :, t] * padded[:, first - t : first - t + tokens] for t in range(self.taps)
        ]
        return sum(parts[1:], parts[0]).reshape(rows, tokens, size)


class _Layer(DFlashLayer):
    def __init__(self, config: DrafterDescription, kind: str, kernel: DynamicConvolution) -> None:
        super().__init__(config, kind)
        self.attention_conv = _Convolution(config, kernel)
        self.mlp_conv = _Convolution(config, kernel)

    def __call__(
        self, x: mx.array, cache: ContextCache, shared: Shared, rows: slice = ALL_ROWS
    ) -> mx.array:
        """These rows of a block [B, T, D] after the layer. The context's keys and values see no
        convolution. All rows are computed: those behind them are in the convolutions of others."""
        normed = self.input_layernorm(x)
        h = x + self.attention_conv(normed, lambda inner: self.self_attn(inner, cache, shared))
        return (h + self.mlp_conv(self.post_attention_layernorm(h), self.mlp))[:, rows]


class _Selector(nn.Module):
    """score(c | previous) = logit(c) + <P[previous] * (W h), S[c]>."""

    def __init__(self, config: DrafterDescription, selector: CandidateSelector) -> None:
        super().__init__()
        words = config.draft_vocab_size or config.vocab_size
        if selector.top_k > words:
            raise ModelError(
                f"{config.label}: selector_top_k {selector.top_k} is above the {words} tokens that "
                "can be proposed",
                "is config.json complete?",
            )
        rank = selector.rank
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)
        self.predecessor_codebook = mx.zeros((config.vocab_size, rank))
        self.successor_codebook = mx.zeros((config.vocab_size, rank))

    def __call__(
        self, hidden: mx.array, logits: mx.array, candidates: mx.array, anchor: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Scores of all walks at once.

        Args:
            hidden: [B, K, D] of the slots.
            logits: [B, K, k] of the candidates.
            candidates: [B, K, k], the target's ids.
            anchor: [B], the target's id.

        Returns:
            [B, k] float32 of the first slot, and [B, K-1, k, k] float32 of the others: row m is for
            candidate m of the slot before.
        """
        query = self.hidden_projection(hidden)
        successors = self.successor_codebook[candidates].swapaxes(-1, -2)  # [B, K, r, k]
        first = (self.predecessor_codebook[anchor] * query[:, 0])[:, None] @ successors[:, 0]
        before = self.predecessor_codebook[candidates[:, :-1]] * query[:, 1:, None]
        others = before @ successors[:, 1:]
        logits = logits.astype(mx.float32)
        return first[:, 0] + logits[:, 0], others + logits[:, 1:, None]


class DFlash2Model(DFlashModel):
    """DFlash's network with convolutions in its layers, and a selector."""

    def __init__(self, config: DrafterDescription, own: frozenset[str] = frozenset()) -> None:
        super().__init__(config, own)
        if config.selector is None:
            raise ModelError(f"{config.label}: a dflash2 drafter needs a candidate selector")
        self.candidate_selector = _Selector(config, config.selector)

    def make_layer(self, config: DrafterDescription, kind: str) -> DFlashLayer:
        """A layer with its convolutions."""
        if config.convolution is None:
            raise ModelError(f"{config.label}: a dflash2 drafter needs convolutions")
        return _Layer(config, kind, config.convolution)


class DFlash2Drafter(BlockDrafter):
    """Drafting with a DFlash 2 checkpoint of any format.

    Args:
        checkpoint: its description, or a folder of a built-in format.
        bits, group_size, window, sinks: see `BlockOptions.of`.

    Attributes:
        description: of the checkpoint.

    Raises:
        ModelError: the folder is not a DFlash 2 checkpoint, or its config is incomplete or does not
            fit together.
        UsageError: an option out of its range.
    """

    info = ComponentInfo(
        "dflash2",
        "a block with convolutions, and a walk over the best candidates of each slot",
        needs=(Need.TAPS,),
        law=DraftLaw.TOP_K,
        model_options=("checkpoint",),
        checkpoint_options=("checkpoint",),
        paired=("dflash2",),
    )
    serves = "dflash2"
    network = DFlash2Model

    def open(self, request: DraftRequest) -> DFlash2Session:
        """Begin a generation.

        Raises:
            ModelError: the drafter was not bound.
        """
        return DFlash2Session(self._weights())


class DFlash2Session(BlockSession):
    """One generation: a context, and the walk over the candidates."""

    def _propose(self, anchor: mx.array, width: int, count: int, sampling: SamplingState) -> Draft:
        """`count` tokens [B, count] after the anchor [B]; above temperature 0 with the law of each
        over its candidates."""
        loaded, selector = self._loaded, self._loaded.description.selector
        assert selector is not None
        hidden = self._context.hidden(anchor, width, count)
        logits = loaded.scores(hidden)
        best = mx.argpartition(-logits, kth=selector.top_k - 1, axis=-1)[..., : selector.top_k]
        kept = mx.take_along_axis(logits, best, axis=-1)
        candidates = loaded.to_target(best)
        first, others = loaded.network.candidate_selector(hidden, kept, candidates, anchor)
        chosen, laws = self._walk(first, others, sampling)
        tokens = mx.take_along_axis(candidates, chosen[..., None], axis=-1)[..., 0]
        draft = Draft.deterministic(
            tokens,
            all_finite(first, others, hidden),
            source="dflash2",
            ids_below=loaded.ids_below(logits),
        )
        if laws is None:
            return draft
        return attrs.evolve(draft, law=DraftLaw.TOP_K, probs=laws, candidates=candidates)

    @staticmethod
    def _walk(
        first: mx.array, others: mx.array, sampling: SamplingState
    ) -> tuple[mx.array, mx.array | None]:
        """Positions [B, K] among the candidates, and above temperature 0 the laws [B, K, k] float32
        that they were drawn from."""
        scores = first
        chosen: list[mx.array] = []
        laws: list[mx.array] = []
        for slot in range(others.shape[1] + 1):
            if slot:
                row = mx.broadcast_to(chosen[-1][:, None, None], (len(first), 1, first.shape[1]))
                scores = mx.take_along_axis(others[:, slot - 1], row, axis=1)[:, 0]
            if sampling.params.greedy:
                chosen.append(mx.argmax(scores, axis=-1))
                continue
            law = mx.softmax(scores / sampling.params.temperature, axis=-1)
            laws.append(law)
            chosen.append(mx.random.categorical(mx.log(law), key=sampling.draft_key()))
        return mx.stack(chosen, axis=1), mx.stack(laws, axis=1) if laws else None
