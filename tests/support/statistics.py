"""Chi-square against an exact law, and the laws themselves in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

__all__ = ["chi_square", "filtered_law", "upper_gamma"]


def upper_gamma(shape: float, x: float) -> float:
    """Q(shape, x), the regularised upper incomplete gamma function.

    Source: Numerical Recipes, 6.2: series below shape + 1, continued fraction above.
    """
    if x <= 0:
        return 1.0
    scale = math.exp(-x + shape * math.log(x) - math.lgamma(shape))
    if x < shape + 1:
        term = total = 1 / shape
        n = shape
        while abs(term) > abs(total) * 1e-15:
            n += 1
            term *= x / n
            total += term
        return 1 - total * scale
    tiny = 1e-300
    b = x + 1 - shape
    c, d = 1 / tiny, 1 / b
    h = d
    for i in range(1, 10_000):
        a = -i * (i - shape)
        b += 2
        d = 1 / (a * d + b or tiny)
        c = b + a / c or tiny
        h *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return scale * h


def chi_square(
    outcomes: Iterable[Hashable], law: Mapping[Hashable, float], least: float = 5.0
) -> float:
    """p-value of counts against a law. Cells that expect fewer than `least` are pooled.

    An outcome of probability zero gives 0; where only one cell is left, there is nothing to say
    and the value is 1.
    """
    counts = Counter(outcomes)
    total = sum(counts.values())
    if any(law.get(outcome, 0.0) <= 0 for outcome in counts):
        return 0.0
    assert abs(sum(law.values()) - 1) < 1e-6, "the law is not one"
    small_seen, small_expected, statistic, cells = 0.0, 0.0, 0.0, 0
    for outcome, probability in law.items():
        expected, seen = probability * total, counts.get(outcome, 0)
        if expected < least:
            small_seen, small_expected = small_seen + seen, small_expected + expected
            continue
        statistic += (seen - expected) ** 2 / expected
        cells += 1
    if small_expected > 0:
        statistic += (small_seen - small_expected) ** 2 / small_expected
        cells += 1
    return upper_gamma((cells - 1) / 2, statistic / 2) if cells > 1 else 1.0


def filtered_law(
    logits: np.ndarray,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: Sequence[int] = (),
) -> np.ndarray:
    """What mlx-lm's sampler draws from, for one row of logits without ties, in float64.

    Filters in mlx-lm's order (top-p, min-p, XTC by a coin, top-k), all on the law at temperature 1;
    then the temperature.
    """
    law = np.exp(logits.astype(np.float64) - logits.max())
    law /= law.sum()
    kept = np.ones(law.size, dtype=bool)
    if top_p < 1:
        order = np.argsort(-law)
        above = np.cumsum(law[order]) - law[order]
        kept[order[above >= top_p]] = False
    if min_p > 0:
        kept &= law >= min_p * law.max()
    cut = kept.copy()
    alive = np.where(kept, law, 0.0)
    above = [i for i in range(law.size) if alive[i] / alive.sum() > xtc_threshold]
    for i in above:
        if i not in xtc_special_tokens and alive[i] > min(alive[above]):
            cut[i] = False

    def at_the_end(chosen: np.ndarray) -> np.ndarray:
        if top_k > 0:
            chosen[np.argsort(-np.where(chosen, law, -1.0))[top_k:]] = False
        scaled = np.where(chosen, law, 0.0) ** (1 / temperature)
        return scaled / scaled.sum()

    return xtc_probability * at_the_end(cut) + (1 - xtc_probability) * at_the_end(kept)
