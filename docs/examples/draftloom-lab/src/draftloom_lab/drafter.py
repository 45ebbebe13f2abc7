"""A drafter: the least one can guess."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from draftloom import ComponentInfo, Draft, DraftLaw, DraftRequest, SamplingState


class RepeatLast:
    """Drafts the last token, over and over. It has no state, so it is its own session."""

    info = ComponentInfo(
        "lab.repeat-last",
        "the last token, over and over",
        law=DraftLaw.DETERMINISTIC,
        default_width=3,
    )

    def open(self, request: DraftRequest) -> RepeatLast:
        """Begin a generation."""
        return self

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """There is nothing to learn."""

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        """The anchor [B], `width` times."""
        return Draft.deterministic(mx.repeat(anchor[:, None], width, axis=1))
