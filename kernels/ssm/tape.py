"""The tape of a Mamba-2 layer.

The state of a head goes by ``S <- a_t S + u_t b_t^T``. All of it that belongs to token t, the decay
a, the scaled input u and the direction b, is known before the state is: replaying needs no outputs.
"""

from collections.abc import Sequence

import attrs
import mlx.core as mx

__all__ = ["SsmTape", "concat_tapes"]


@attrs.frozen(eq=False)
class SsmTape:
    """What T tokens do to the state of one layer.

    Attributes:
        decay: [B, T, H] float32, a, 0..1.
        inputs: [B, T, H, Dh] float32, u: the inputs times the time step.
        keys: [B, T, G, Ds], b, one for H / G heads, in the dtype the pass used.
    """

    decay: mx.array
    inputs: mx.array
    keys: mx.array

    @property
    def length(self) -> int:
        """T, the number of tokens on the tape."""
        return self.decay.shape[1]


def concat_tapes(tapes: Sequence[SsmTape]) -> SsmTape:
    """Join tapes of consecutive tokens of one layer, oldest first.

    Raises:
        ValueError: if ``tapes`` is empty.
    """
    if not tapes:
        raise ValueError("concat_tapes needs at least one tape")
    if len(tapes) == 1:
        return tapes[0]
    names = ("decay", "inputs", "keys")
    return SsmTape(*(mx.concatenate([getattr(t, n) for t in tapes], axis=1) for n in names))
