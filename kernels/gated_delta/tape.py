"""The tape: what a verify pass records so that any prefix of its tokens can be replayed onto the
old state.

The gated delta rule updates the state of a head by ``S <- g_t S + delta_t k_t^T``. Everything about
token t that needs the state is in the vector delta_t (the innovation); with it, replaying is two
cheap operations a token and needs neither queries nor values. A tape holds O(T) vectors a layer
where keeping states would hold O(T) matrices.
"""

from collections.abc import Sequence

import attrs
import mlx.core as mx

__all__ = ["Tape", "concat_tapes"]


@attrs.frozen(eq=False)
class Tape:
    """Innovations, keys and decays of T tokens of one layer.

    A token that the verify mask left out has delta 0, key 0 and g 1, so that replaying it changes
    nothing.

    Attributes:
        delta: [B, T, Hv, Dv] float32, the innovations ``(v - S k) * beta``.
        k: [B, T, Hk, Dk], the normalised keys in the dtype the pass used.
        g: [B, T, Hv], or [B, T, Hv, Dk] with one a key channel: the decays (already exponentiated,
            0..1).
    """

    delta: mx.array
    k: mx.array
    g: mx.array

    @property
    def length(self) -> int:
        """T, the number of tokens on the tape."""
        return self.delta.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held by the three arrays."""
        return self.delta.nbytes + self.k.nbytes + self.g.nbytes


def concat_tapes(tapes: Sequence[Tape]) -> Tape:
    """Join tapes of consecutive tokens along the token axis.

    Args:
        tapes: one or more tapes of the same layer and batch, oldest first.

    Returns:
        A tape whose length is the sum of the lengths.

    Raises:
        ValueError: if ``tapes`` is empty.
    """
    if not tapes:
        raise ValueError("concat_tapes needs at least one tape")
    if len(tapes) == 1:
        return tapes[0]
    return Tape(
        delta=mx.concatenate([tape.delta for tape in tapes], axis=1),
        k=mx.concatenate([tape.k for tape in tapes], axis=1),
        g=mx.concatenate([tape.g for tape in tapes], axis=1),
    )
