"""The model card of a trained drafter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .checkpoint import TrainState
from .data import Corpus
from .settings import TrainSettings

__all__ = ["model_card"]


def model_card(
    target: str,
    config: dict[str, Any],
    settings: TrainSettings,
    corpus: Corpus,
    state: TrainState,
    processes: int = 1,
) -> str:
    """README.md of the checkpoint: what it is for, what it saw, what was measured."""
    together = f" x {processes} processes" if processes > 1 else ""
    inner = config.get("dflash_config") or {}
    block = config.get("block_size") or inner.get("block_size")
    seen = sum(len(d) for d in corpus.train)
    files = {re.split(", (?:line|row) ", d.source, maxsplit=1)[0] for d in corpus.train}
    sources = sorted({f"`{Path(file).name}`" for file in files})  # no folder, no line
    sources = [*sources[:8], *([f"and {len(sources) - 8} more"] if len(sources) > 8 else [])]
    lines = [
        "# DFlash drafter",
        "",
        f"Drafts for `{target}`: {config['num_hidden_layers']} layers, block {block}, taps "
        f"{inner.get('target_layer_ids')}, mask token {inner.get('mask_token_id')}. It proposes; "
        "the target decides: the text is the target's own.",
        "",
        "```",
        f"draftloom generate --target {target} --drafter THIS_FOLDER PROMPT",
        "```",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        f"| documents | {len(corpus.train)} ({seen} tokens), {corpus.duplicates} duplicates left "
        "out |",
        f"| held out | {len(corpus.held_out)} documents |",
        f"| data | {', '.join(sources)} |",
        f"| data fingerprint | `{corpus.fingerprint[:16]}` |",
        f"| steps | {state.step}, {settings.batch} x {settings.accumulate}{together} "
        f"sequences of at most {settings.context} tokens, {settings.anchors} anchors each |",
        f"| seen | {state.tokens} context tokens in {state.seconds:.0f} s |",
        f"| loss | {settings.loss}, weights {settings.weighting} |",
        f"| optimizer | {settings.optimizer}, learning rate {settings.peak}, "
        f"seed {settings.seed} |",
        "",
        "## Measured",
        "",
    ]
    if not state.measured:
        return "\n".join([*lines, "Nothing was measured.", ""])
    last = state.measured[-1]
    lines += [
        f"Acceptance length **{last['tau']:.2f}** at step {last['step']}, by the real decoder, "
        f"greedy, over {last['cycles']} cycles and {last['tokens']} tokens after "
        f"{last['prompts']} held-out prompts"
        + (f" ({last['fell_back']} gave up on the drafter)." if last["fell_back"] else "."),
        "",
        "| draft position | accepted, of the cycles that verified it |",
        "|---|---|",
        *(f"| {i} | {share:.1%} |" for i, share in enumerate(last["by_position"], 1)),
        "",
        "| step | acceptance length |",
        "|---|---|",
        *(f"| {m['step']} | {m['tau']:.2f} |" for m in state.measured),
        "",
    ]
    return "\n".join(lines)
