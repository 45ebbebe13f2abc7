"""What is done to the target's logits before a policy sees them: bias, penalties, processors.

Row i of a verify pass predicts the token after the anchor and the first i draft tokens, so it is
processed with the history prompt + text + d1 .. di, as plain decoding would process it if the
draft is accepted so far. The built-in ones work on all K+1 rows at once, lazily, and in mlx-lm's
own arithmetic: a row is bit-equal to what mlx-lm's own processors make of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from draftloom.errors import GenerationError
from draftloom.sampling import LogitsProcessor, SamplingParams

__all__ = ["LogitsProcessing", "bias_logits", "penalise", "windows"]


class LogitsProcessing:
    """The processing of one generation. B = 1.

    Args:
        params: bias, penalties, and processors of the user's own.
        prompt: token ids; a history begins with it.
        text: tokens emitted so far. Not copied: the owner appends to it.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], text: list[int]) -> None:
        self._params = params
        self._edits = params.edits_logits
        self._prompt = tuple(prompt)
        self._text = text
        self._failed: tuple[int, Exception] | None = None
        self._dead: mx.array | None = None
        self._tokens = mx.array(self._prompt, dtype=mx.int32)

    def __call__(self, block: mx.array, logits: mx.array) -> mx.array:
        """Process every row, by the history that leads to it.

        Args:
            block: [1, K+1] int32, [anchor, d1 .. dK].
            logits: [1, K+1, V], as the target gave them.

        Returns:
            [1, K+1, V].

        Raises:
            GenerationError: a processor failed on tokens that are part of the text already, or
                there are several rows.
        """
        if not self._edits:
            return logits
        if block.shape[0] != 1:
            raise GenerationError(
                f"bias, penalties and processors serve one text, not {block.shape[0]} rows",
                "generate the texts one by one",
            )
        self._failed, self._dead = None, None
        params, draft = self._params, block[:, 1:]
        if params.logit_bias:
            logits = bias_logits(logits, params.logit_bias)
        for name, penalty in params.penalties().items():
            if penalty:
                kind = name.removesuffix("_penalty")
                size: int = getattr(params, f"{kind}_context_size")
                # All of the text: as long as the last row's is.
                size = size or len(self._prompt) + len(self._text) + draft.shape[1]
                logits = penalise(logits, windows(self._context(size), draft), kind, penalty)
        if params.logits_processors:
            logits = self._by_row(draft, logits)
        return logits

    @property
    def reads_text(self) -> bool:
        """Whether rows are processed by the tokens of the text, which the host must know."""
        return bool(self._params.logits_processors) or any(self._params.penalties().values())

    @property
    def dead(self) -> mx.array | None:
        """[K+1] bool, where the user's processors left no token that may come; None without them.
        Lazy, and of the last call."""
        return self._dead

    def check_used(self, count: int, dead: Sequence[bool] = ()) -> None:
        """Raise what went wrong in the first `count` rows of the last call.

        A processor may not be able to go on from a draft token that it has forbidden itself, or
        after the end of the text. That is no error as long as nothing is decided on such a row.

        Args:
            count: rows that tokens of the text were decided on.
            dead: values of `dead`.

        Raises:
            GenerationError: a processor failed there, or forbade every token.
        """
        if self._failed is not None and self._failed[0] < count:
            raise _failure(self._params.logits_processors, self._failed[1])
        if any(dead[:count]):
            raise GenerationError(
                "the logits processors left no token that may come",
                "let at least one token keep a finite logit, end-of-sequence for example",
            )

    def _context(self, size: int) -> mx.array:
        """The last `size` tokens of the history [1, size] int32, -1 before its start."""
        tail = self._text[-size:]
        head = self._prompt[max(0, len(self._prompt) + len(self._text) - size) :]
        return mx.array([[-1] * (size - len(head) - len(tail)) + [*head, *tail]], dtype=mx.int32)

    def _by_row(self, draft: mx.array, logits: mx.array) -> mx.array:
        """Call the user's processors once a row, with tokens that are computed already."""
        known = self._tokens.size - len(self._prompt)
        new = mx.array(self._text[known:], dtype=mx.int32)
        self._tokens = mx.concatenate([self._tokens, new])
        tokens = mx.concatenate([self._tokens, draft[0].astype(mx.int32)])
        mx.eval(self._tokens, tokens)  # waits for the draft, not for the target
        history, rows = self._tokens.size, []
        for i in range(logits.shape[1]):
            row = None
            if self._failed is None:
                row = self._one_row(i, tokens[: history + i], logits[:, i])
            rows.append(logits[:, i] if row is None else row)
        found = mx.stack(rows, axis=1)
        self._dead = (found == -mx.inf).all(axis=-1)[0]
        # A row without a token has no law. It must not spoil the rows before it with NaN.
        return mx.where(self._dead[None, :, None], logits, found)

    def _one_row(self, index: int, tokens: mx.array, row: mx.array) -> mx.array | None:
        """What the processors make of a row; None where one failed."""
        shape = row.shape
        try:
            for processor in self._params.logits_processors:
                row = processor(tokens, row)
                if not isinstance(row, mx.array) or row.shape != shape:
                    raise TypeError(f"it returned {_describe(row)} for logits {shape}")
        except Exception as error:
            if not index:
                raise _failure(self._params.logits_processors, error) from error
            self._failed = (index, error)  # raised by `check_used`, if the row is used
            return None
        return row


def _describe(value: object) -> str:
    return f"shape {value.shape}" if isinstance(value, mx.array) else f"{type(value).__name__}"


def _failure(processors: Sequence[LogitsProcessor], error: Exception) -> GenerationError:
    names = ", ".join(getattr(p, "__name__", type(p).__name__) for p in processors)
    return GenerationError(f"a logits processor ({names}) failed: {error}")


def windows(context: mx.array, draft: mx.array) -> mx.array:
    """The last C tokens before each row of a verify pass: [B, K+1, C] int32.

    Args:
        context: [B, C] int32, the last tokens of the history with the anchor at the end; -1 where
            the history is shorter.
        draft: [B, K] int32.
    """
    size, width = context.shape[1], draft.shape[1]
    tokens = mx.concatenate([context, draft.astype(mx.int32)], axis=1)
    return tokens[:, mx.arange(width + 1)[:, None] + mx.arange(size)[None]]


def bias_logits(logits: mx.array, bias: Sequence[tuple[int, float]]) -> mx.array:
    """Logits [B, T, V] with a number added to some tokens, given as pairs (token, number)."""
    tokens, numbers = zip(*bias, strict=True)
    return logits.at[..., mx.array(tokens)].add(mx.array(numbers))


def penalise(logits: mx.array, seen: mx.array, kind: str, penalty: float) -> mx.array:
    """Logits [B, T, V] with the tokens that were seen made less likely.

    Args:
        logits: [B, T, V].
        seen: [B, T, C] int32, what counts as seen for each row; -1 is no token. The last column
            is always a token.
        kind: ``repetition``, ``presence`` or ``frequency``.
        penalty: see `SamplingParams`.

    Source: mlx_lm.sample_utils.make_repetition_penalty, make_presence_penalty,
        make_frequency_penalty, with their order of operations.
    """
    # In place of "no token", the last one once more: a second time changes nothing.
    tokens = mx.where(seen < 0, seen[..., -1:], seen)
    if kind == "frequency":
        rows, places = mx.arange(seen.shape[0]), mx.arange(seen.shape[1])
        times = mx.where(seen < 0, 0.0, penalty).astype(logits.dtype)
        return logits.at[rows[:, None, None], places[None, :, None], tokens].subtract(times)
    chosen = mx.take_along_axis(logits, tokens, axis=-1)
    if kind == "presence":
        changed = chosen - penalty
    else:
        changed = mx.where(chosen < 0, chosen * penalty, chosen / penalty)
    return mx.put_along_axis(logits, tokens, changed, axis=-1)
