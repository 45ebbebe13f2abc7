"""How a drafter is trained: every number that shapes the losses, and those that do not."""

from __future__ import annotations

import math

import attrs

from draftloom.errors import UsageError

__all__ = ["LOSSES", "OPTIMIZERS", "WEIGHTINGS", "TrainSettings", "default_gamma"]

LOSSES = ("cross-entropy", "kl")
WEIGHTINGS = ("decay", "d-pace")
COMPUTE = ("float32", "bfloat16")
OPTIMIZERS = {"adamw": 6e-4, "muon": 0.02}
"""Their names, and the learning rate of each where none is given."""


def default_gamma(block_size: int) -> float:
    """The paper's gamma: 7, 5, 4 for blocks of 16, 10, 8 (the next larger block's in between)."""
    return 4.0 if block_size <= 8 else 5.0 if block_size <= 10 else 7.0


@attrs.frozen(kw_only=True)
class TrainSettings:
    """One training run.

    Attributes:
        steps: optimizer updates; None where only `max_minutes` ends the run.
        max_minutes: the run ends after so long, and the learning rate follows the clock. Counted
            without the first step of a process (which compiles kernels), saving and measuring.
        batch: sequences of a forward.
        accumulate: forwards of an update.
        context: tokens of a sequence at most.
        anchors: random blocks of a sequence, drawn anew each epoch.
        recompute: whether layers and logits are computed again for the gradient instead of kept
            (gradient checkpointing): less memory, about a third more time.
        optimizer: a name of `OPTIMIZERS`. ``muon`` turns the updates of matrices orthogonal; norms
            are left to AdamW, at the learning rate in proportion.
        learning_rate: at the end of the warm-up; None is the optimizer's own.
        warmup: share of the steps.
        min_rate: share of the learning rate that the cosine ends at.
        weight_decay, betas, clip: of AdamW; clip is the largest norm of the gradient.
        loss: one of `LOSSES`.
        weighting: one of `WEIGHTINGS`.
        gamma: of the weights exp(-(k-1)/gamma); None is the paper's for the block size.
        alpha: a of the D-PACE weights.
        compile: whether a step is traced once and fused (`mx.compile`): every batch then has the
            same shape. The first step takes long, the others less.
        compute: type of the forward; weights and optimizer are float32 in any case.
        seed: of weights, order and anchors.
        held_out: share of the documents kept apart for tau.
        eval_prompts, eval_tokens: of each measurement of tau; without prompts nothing is measured.
        eval_first: whether tau is measured before the first step too.
        eval_every, save_every, log_every: steps between; 0 is only at the end.
    """

    steps: int | None = 1000
    max_minutes: float | None = None
    batch: int = 8
    accumulate: int = 1
    context: int = 2048
    anchors: int = 128
    recompute: bool = False
    optimizer: str = "adamw"
    learning_rate: float | None = None
    warmup: float = 0.04
    min_rate: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    loss: str = "cross-entropy"
    weighting: str = "decay"
    gamma: float | None = None
    alpha: float = 0.5
    compile: bool = False
    compute: str = "float32"
    seed: int = 0
    held_out: float = 0.05
    eval_prompts: int = 8
    eval_tokens: int = 64
    eval_first: bool = True
    eval_every: int = 250
    save_every: int = 250
    log_every: int = 10

    def check(self, block_size: int) -> None:
        """See that the numbers make sense together.

        Raises:
            UsageError: one of them does not; names it.
        """
        self._check_length()
        for name in ("batch", "accumulate", "anchors", "eval_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_prompts", "eval_every", "save_every", "log_every", "weight_decay"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.context < block_size + 1:
            raise UsageError(
                f"a context of {self.context} tokens is shorter than a block of {block_size} and "
                "the token before it",
                f"give a context of at least {block_size + 1}, or a smaller block",
            )
        self._check_numbers()

    def _check_length(self) -> None:
        steps, minutes = self.steps, self.max_minutes
        if steps is None and minutes is None:
            raise UsageError("a run needs an end", "give steps or max_minutes")
        if steps is not None and steps < 1:
            raise UsageError(f"steps must be at least 1, got {steps}")
        if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
            raise UsageError(f"max_minutes must be above 0, got {minutes}")

    def _check_numbers(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(
                f"no optimizer {self.optimizer!r}", f"there are {', '.join(OPTIMIZERS)}"
            )
        for name, value in (("learning_rate", self.peak), ("clip", self.clip)):
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be above 0, got {value}")
        for name, known in (("loss", LOSSES), ("weighting", WEIGHTINGS), ("compute", COMPUTE)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"no {name} {getattr(self, name)!r}", f"there are {', '.join(known)}"
                )
        for name in ("warmup", "min_rate", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is a share, 0 up to 1, got {getattr(self, name)}")
        if not 0 <= self.alpha <= 1 or (self.gamma is not None and self.gamma <= 0):
            raise UsageError("alpha lies in 0..1, and gamma above 0")

    @property
    def peak(self) -> float:
        """The learning rate at the end of the warm-up."""
        return OPTIMIZERS[self.optimizer] if self.learning_rate is None else self.learning_rate

    def progress(self, step: int, clock: float = 0.0) -> float:
        """Share 0..1 of the run that is done after `step` updates and `clock` seconds."""
        by_step = 0.0 if self.steps is None else step / self.steps
        by_clock = 0.0 if self.max_minutes is None else clock / (60 * self.max_minutes)
        return min(1.0, max(by_step, by_clock))

    def rate(self, step: int, clock: float = 0.0) -> float:
        """The learning rate of update `step`, from 0: linear warm-up, then a cosine, over the steps
        or the time, whichever is further."""
        done = self.progress(step, clock)
        if self.steps is not None and self.max_minutes is None:
            warm = math.ceil(self.warmup * self.steps)
            if step < warm:
                return self.peak * (step + 1) / warm
            begin = warm / self.steps
        else:
            if done < self.warmup:
                return self.peak * max(done / self.warmup, 0.01)
            begin = self.warmup
        share = (done - begin) / max(1e-9, 1 - begin)
        low = self.min_rate
        return self.peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))

    def shaping(self) -> dict[str, object]:
        """What the losses depend on: a run can only be resumed with the same."""
        free = {"eval_prompts", "eval_tokens", "eval_first", "eval_every", "save_every",
                "log_every", "compile", "recompute"}  # fmt: skip
        values = {k: v for k, v in attrs.asdict(self).items() if k not in free}
        return {**values, "betas": list(self.betas)}
