"""`draftloom audit`: is the text really the target's own?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftloom.errors import UsageError

from .memory_options import KvBitsOption, KvGroupSizeOption, QuantizedKvStartOption
from .offline import OfflineOption
from .options import (
    AcceptanceOption,
    BlockSizeOption,
    DrafterBitsOption,
    DrafterConfidenceOption,
    DrafterOption,
    DrafterSinksOption,
    DrafterWindowOption,
    DtypeOption,
    JsonOption,
    KernelOption,
    PipelineFlags,
    PipelineOption,
    RollbackOption,
    TargetOption,
    VerifierOption,
    read_text,
    text_options,
)
from .output import busy, fallback_on_stderr
from .state import state_of

if TYPE_CHECKING:
    from draftloom.apps.audit import AuditReport, PromptAudit

__all__ = ["audit", "read_prompts"]


def audit(
    context: typer.Context,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Prompts: JSON lines with "prompt", or one prompt a line. Default: some built in.',
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens a prompt at most.")] = 64,
    as_json: JsonOption = False,
    target: TargetOption = None,
    drafter: DrafterOption = None,
    drafter_bits: DrafterBitsOption = None,
    drafter_window: DrafterWindowOption = None,
    drafter_confidence: DrafterConfidenceOption = None,
    drafter_sinks: DrafterSinksOption = None,
    offline: OfflineOption = False,
    verifier: VerifierOption = None,
    acceptance: AcceptanceOption = None,
    rollback: RollbackOption = None,
    block_size: BlockSizeOption = None,
    kernel: KernelOption = None,
    pipeline: PipelineOption = None,
    dtype: DtypeOption = None,
    kv_bits: KvBitsOption = None,
    kv_group_size: KvGroupSizeOption = None,
    quantized_kv_start: QuantizedKvStartOption = None,
) -> None:
    """Compare a pipeline's greedy tokens with those of the target alone, through plain mlx-lm.

    Exit code 1 if a difference is no tie of two logits.
    """
    text_options(max_tokens, None)
    flags = PipelineFlags(
        target=target, drafter=drafter, drafter_bits=drafter_bits,
        drafter_confidence=drafter_confidence,
        drafter_window=drafter_window, drafter_sinks=drafter_sinks, verifier=verifier,
        acceptance=acceptance,
        rollback=rollback, block_size=block_size, kernel=kernel, pipeline=pipeline,
        dtype=dtype, temperature=0.0, xtc_probability=0.0,
        kv_bits=kv_bits, kv_group_size=kv_group_size, quantized_kv_start=quantized_kv_start,
    )  # fmt: skip
    chosen = None if prompts is None else read_prompts(prompts)
    builder = flags.builder(state_of(context).plugins).own_width()
    builder.check()
    from draftloom.apps.audit import run_audit
    from draftloom.apps.prompts import AUDIT_PROMPTS

    with fallback_on_stderr(), busy("generating, both ways"):
        report = run_audit(builder, chosen or AUDIT_PROMPTS, max_tokens)
    typer.echo(json.dumps(report.as_dict()) if as_json else _describe(report))
    if report.verdict == "bug":
        raise typer.Exit(1)


def read_prompts(file: Path) -> list[str]:
    """Prompts of a file: JSON lines with "prompt", or plain text with one prompt a line.

    A file is JSON lines if it is called so (.jsonl) or if its first line is a JSON object.

    Raises:
        UsageError: it cannot be read, holds no prompt, or a line of it is none; names the line.
    """
    lines = read_text(file, "prompt file").splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UsageError(f"prompt file {file} holds no prompt", "write one a line")
    if file.suffix != ".jsonl" and not isinstance(_json_or_none(numbered[0][1]), dict):
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        record = _json_or_none(line)
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise UsageError(
                f'prompt file {file}, line {number}: no JSON object with a text "prompt"',
                'write {"prompt": "..."} on every line',
            )
        prompts.append(prompt)
    return prompts


def _json_or_none(line: str) -> object:
    try:
        value: object = json.loads(line)
    except ValueError:
        return None
    return value


def _describe(report: AuditReport) -> str:
    names = report.pipeline
    lines = [
        f"target {names['target']}, drafter {names['drafter']}, {names['width']}, "
        f"rollback {names['rollback']}, verifier {names['verifier']}, "
        f"logits {report.dtype} on {report.device}"
    ]
    lines += [_describe_prompt(number, prompt) for number, prompt in enumerate(report.prompts, 1)]
    same = sum(prompt.identical for prompt in report.prompts)
    lines.append(
        f"{same} of {len(report.prompts)} identical, {report.count('tie')} ties, "
        f"{report.count('bug')} bugs"
    )
    return "\n".join(lines)


def _describe_prompt(number: int, prompt: PromptAudit) -> str:
    begin = " ".join(prompt.prompt.split())
    begin = begin if len(begin) <= 40 else begin[:39] + "…"
    line = f"{number:>3}  {prompt.tokens:>4} tokens  tau {prompt.acceptance_length:.2f}  "
    if prompt.fell_back:
        begin += f"  [the target alone: {prompt.fell_back}]"
    found = prompt.difference
    if found is None:
        return f"{line}identical  {begin}"
    where = f"token {found.position}: {found.pipeline_token} instead of {found.target_token}"
    if found.margin is not None:
        where += (
            f", logits {found.pipeline_logit:.6g} and {found.target_logit:.6g}, "
            f"margin {found.margin:.3g} (a tie up to {found.bound:.3g})"
        )
    else:
        where += " (one of the texts had ended)"
    return f"{line}{found.verdict.upper():<9}  {begin}\n     {where}"
