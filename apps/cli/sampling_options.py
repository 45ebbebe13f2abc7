"""The sampling options that are not everyone's: penalties, bias, XTC."""

from __future__ import annotations

from typing import Annotated

import typer

from draftloom.errors import UsageError

__all__ = [
    "SAMPLING",
    "FrequencyContextSizeOption",
    "FrequencyPenaltyOption",
    "LogitBiasOption",
    "PresenceContextSizeOption",
    "PresencePenaltyOption",
    "RepetitionContextSizeOption",
    "RepetitionPenaltyOption",
    "XtcProbabilityOption",
    "XtcSpecialTokensOption",
    "XtcThresholdOption",
    "parse_bias",
    "parse_tokens",
]

SAMPLING = "Sampling"

XtcProbabilityOption = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="Chance a token that XTC drops the top choices. Default: 0.",
        rich_help_panel=SAMPLING,
    ),
]
XtcThresholdOption = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="Of the tokens above it XTC keeps the least likely. Default: 0.1.",
        rich_help_panel=SAMPLING,
    ),
]
XtcSpecialTokensOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID,ID,...",
        help="Tokens that XTC never drops. Default: newline and end of sequence.",
        rich_help_panel=SAMPLING,
    ),
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Divide the logits of tokens in the context by it. Default: 1, off.",
        rich_help_panel=SAMPLING,
    ),
]
PresencePenaltyOption = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Subtract it from the logits of tokens in the context. Default: 0.",
        rich_help_panel=SAMPLING,
    ),
]
FrequencyPenaltyOption = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Subtract it for each time a token is in the context. Default: 0.",
        rich_help_panel=SAMPLING,
    ),
]
RepetitionContextSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens the repetition penalty looks back; 0 is all. Default: 20.",
        rich_help_panel=SAMPLING,
    ),
]
PresenceContextSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens the presence penalty looks back; 0 is all. Default: 20.",
        rich_help_panel=SAMPLING,
    ),
]
FrequencyContextSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens the frequency penalty looks back; 0 is all. Default: 20.",
        rich_help_panel=SAMPLING,
    ),
]
LogitBiasOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID=X,ID=X,...",
        help="Add numbers to the logits of tokens; -inf forbids one.",
        rich_help_panel=SAMPLING,
    ),
]


def parse_tokens(text: str) -> tuple[int, ...]:
    """Read ``ID,ID,...``; empty text is no token.

    Raises:
        UsageError: something that is no token id.
    """
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    for piece in pieces:
        if not piece.isdecimal():
            raise UsageError(
                f"--xtc-special-tokens cannot be read at {piece!r}", "write token ids: ID,ID,ID"
            )
    return tuple(map(int, pieces))


def parse_bias(text: str) -> dict[int, float]:
    """Read ``ID=NUMBER,ID=NUMBER``.

    Raises:
        UsageError: something else, or one token twice.
    """
    bias: dict[int, float] = {}
    for part in text.split(","):
        token, _, number = (piece.strip() for piece in part.partition("="))
        try:
            key, value = int(token), float(number)
        except ValueError:
            raise UsageError(
                f"--logit-bias cannot be read at {part.strip()!r}",
                "write ID=NUMBER,ID=NUMBER with token ids",
            ) from None
        if key in bias:
            raise UsageError(f"--logit-bias names token {key} twice", "once a token")
        bias[key] = value
    return bias
