"""The options that commands share, and how they become a pipeline builder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from draftloom.errors import UsageError

from .sampling_options import SAMPLING, parse_bias, parse_tokens

if TYPE_CHECKING:
    from draftloom.builder import PipelineBuilder
    from draftloom.plugins import PluginManager
    from draftloom.spec import PipelineSpec

__all__ = [
    "AcceptanceOption",
    "BlockSizeOption",
    "DrafterBitsOption",
    "DrafterConfidenceOption",
    "DrafterOption",
    "DrafterSinksOption",
    "DrafterWindowOption",
    "DtypeOption",
    "JsonOption",
    "KernelOption",
    "MinPOption",
    "ParkOption",
    "PipelineFlags",
    "PipelineOption",
    "RollbackOption",
    "SeedOption",
    "StopOption",
    "TargetOption",
    "TemperatureOption",
    "TopKOption",
    "TopPOption",
    "VerifierOption",
    "WidthOption",
    "parse_kernels",
    "parse_rollback",
    "parse_width",
    "read_prompt",
    "read_text",
    "text_options",
]

PARTS = "Pipeline"

TargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|REPO",
        help="Model whose text it is: a folder, or OWNER/NAME[@REVISION] of the hub. "
        "Default: the bundled one.",
        rich_help_panel=PARTS,
    ),
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|DIR|REPO",
        help="A registered drafter, or a checkpoint. Default: the target's own.",
        rich_help_panel=PARTS,
    ),
]
DrafterBitsOption = Annotated[
    int | None,
    typer.Option(
        metavar="4|8",
        help="Pack a DFlash drafter's weights to so many bits. Default: as the target computes.",
        rich_help_panel=PARTS,
    ),
]
DrafterWindowOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Last positions that a DFlash drafter's context keeps; 0 is all. "
        "Default: as many as it was trained on, or 4096.",
        rich_help_panel=PARTS,
    ),
]
DrafterSinksOption = Annotated[
    int | None,
    typer.Option(
        metavar="S",
        help="First positions that it keeps beside them. Default: 64.",
        rich_help_panel=PARTS,
    ),
]
DrafterConfidenceOption = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="End a dspark draft where its confidences together fall below this. Default: off.",
        rich_help_panel=PARTS,
    ),
]
VerifierOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="How a draft is checked. Default: block.", rich_help_panel=PARTS
    ),
]
AcceptanceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="How much of it is kept. Default: auto.", rich_help_panel=PARTS
    ),
]
RollbackOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|KIND=NAME,...",
        help="How caches are taken back, for all kinds of cache or by kind.",
        rich_help_panel=PARTS,
    ),
]
BlockSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens a cycle verifies, the last known one included. Default: the drafter's.",
        rich_help_panel=PARTS,
    ),
]
WidthOption = Annotated[
    str | None,
    typer.Option(
        metavar="POLICY|N",
        help="A width policy (auto, adaptive, fixed), or draft tokens a cycle. Default: auto.",
        rich_help_panel=PARTS,
    ),
]
ParkOption = Annotated[
    bool | None,
    typer.Option(
        "--park/--no-park",
        help="Draft no more once acceptance shows that drafter and target do not belong together. "
        "Default: yes, unless a number of tokens is given by --width or --block-size.",
        rich_help_panel=PARTS,
    ),
]
PipelineOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.toml",
        help="Read the pipeline from a file; other options go before what it says.",
        rich_help_panel=PARTS,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Compute type: auto, stored (as in the file), float32, bfloat16 or float16. "
        "Default: auto.",
        rich_help_panel=PARTS,
    ),
]
KernelOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OPERATION=CHOICE",
        help="Run an operation by this implementation, or off: the stock path. Repeatable. "
        "`draftloom doctor` lists them.",
        rich_help_panel=PARTS,
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(metavar="T", help="0 (default) is greedy.", rich_help_panel=SAMPLING),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="Keep the likeliest tokens of this mass.", rich_help_panel=SAMPLING
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(metavar="K", help="Keep the K likeliest tokens.", rich_help_panel=SAMPLING),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="Drop tokens below this share of the likeliest one.",
        rich_help_panel=SAMPLING,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Reproduces a sampled text.", rich_help_panel=SAMPLING),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End the text before this string. Can be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@attrs.frozen(kw_only=True)
class PipelineFlags:
    """The options that choose a pipeline's parts; None is "not given".

    Attributes:
        target, drafter, verifier, acceptance, dtype: names as the builder takes them.
        drafter_bits, drafter_window, drafter_sinks: options ``bits``, ``window`` and ``sinks`` of
            the drafter.
        drafter_confidence: its option ``confidence_threshold``.
        rollback: ``NAME``, or ``KIND=NAME,KIND=NAME``.
        block_size: tokens a cycle verifies, the anchor included.
        width: a width policy, or draft tokens a cycle.
        park: whether a width stops drafting after the mismatch alarm.
        kernel: ``OPERATION=CHOICE``, each on top of what the file says.
        pipeline: a pipeline file; the other options override what it says.
        kv_bits, kv_group_size, quantized_kv_start: see `KVQuantization`.
        memory_limit, context_length, prefill_step_size: see `MemorySettings`.
        temperature .. logit_bias: sampling parameters; ``ID,ID`` and ``ID=X,ID=X`` as text.
    """

    target: str | None = None
    drafter: str | None = None
    drafter_bits: int | None = None
    drafter_confidence: float | None = None
    drafter_window: int | None = None
    drafter_sinks: int | None = None
    verifier: str | None = None
    acceptance: str | None = None
    rollback: str | None = None
    block_size: int | None = None
    width: str | None = None
    park: bool | None = None
    kernel: list[str] | None = None
    pipeline: Path | None = None
    dtype: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    kv_bits: int | None = None
    kv_group_size: int | None = None
    quantized_kv_start: int | None = None
    memory_limit: float | None = None
    context_length: int | None = None
    prefill_step_size: int | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    xtc_special_tokens: str | None = None
    repetition_penalty: float | None = None
    repetition_context_size: int | None = None
    presence_penalty: float | None = None
    presence_context_size: int | None = None
    frequency_penalty: float | None = None
    frequency_context_size: int | None = None
    logit_bias: str | None = None

    def builder(self, plugins: PluginManager) -> PipelineBuilder:
        """The pipeline file, or the defaults, with what was given on top.

        Raises:
            UsageError: an option that cannot be read, or a block size below 1.
            GraphError: the pipeline file says what is not known.
        """
        from draftloom.builder import PipelineBuilder
        from draftloom.spec import PipelineSpec

        spec = PipelineSpec()
        if self.pipeline is not None:
            text = read_text(self.pipeline, "pipeline file")
            spec = PipelineSpec.from_toml(text, where=str(self.pipeline))
        if self.target is not None:
            spec = attrs.evolve(spec, target=self.target)
        builder = PipelineBuilder(plugins=plugins, spec=spec)
        if self.dtype is not None:
            builder = builder.dtype(self.dtype)
        for part in ("drafter", "verifier", "acceptance"):
            name = getattr(self, part)
            if name is not None:
                builder = getattr(builder, part)(_name(part, name))
        builder = builder.drafter_options(**self._drafter_options())
        if self.rollback is not None:
            builder = builder.rollback(parse_rollback(self.rollback))
        if self.block_size is not None:
            if self.width is not None:
                raise UsageError("both --block-size and --width are given", "give one of them")
            builder = builder.block_size(self.block_size)
        if self.width is not None:
            builder = builder.width(parse_width(self.width))
        builder = self._with_memory(builder, spec)
        if self.kernel:
            builder = builder.kernels(parse_kernels(self.kernel))
        if self.park is not None:
            width = builder.spec.width
            builder = builder.width(width.use, **{**dict(width.options), "park": self.park})
        sampling = {**dict(spec.sampling), **self._sampling()}
        return builder.sampling(**sampling) if sampling else builder

    def _kv_cache(self, spec: PipelineSpec) -> dict[str, int] | None:
        """What the pipeline file says of quantized caches, with what was given on top."""
        names = ("kv_bits", "kv_group_size", "quantized_kv_start")
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        if not given:
            return None
        if spec.kv_cache is not None:
            return {**attrs.asdict(spec.kv_cache), **given}
        if "kv_bits" not in given:
            option = "--" + next(iter(given)).replace("_", "-")
            raise UsageError(f"{option} is given without --kv-bits", "add --kv-bits 8")
        return given

    def _with_memory(self, builder: PipelineBuilder, spec: PipelineSpec) -> PipelineBuilder:
        kv_cache = self._kv_cache(spec)
        if kv_cache is not None:
            builder = builder.kv_cache(**kv_cache)
        options: dict[str, Any] = {
            "limit_gb": self.memory_limit,
            "context_length": self.context_length,
            "prefill_step_size": self.prefill_step_size,
        }
        given = {name: value for name, value in options.items() if value is not None}
        return builder.memory(**{**attrs.asdict(spec.memory), **given}) if given else builder

    def _drafter_options(self) -> dict[str, float]:
        names = ("bits", "window", "sinks")
        given: dict[str, float | None] = {n: getattr(self, f"drafter_{n}") for n in names}
        given["confidence_threshold"] = self.drafter_confidence
        return {name: value for name, value in given.items() if value is not None}

    def _sampling(self) -> dict[str, Any]:
        from draftloom.spec import SAMPLING_KEYS

        given = {name: getattr(self, name) for name in SAMPLING_KEYS}
        if self.xtc_special_tokens is not None:
            given["xtc_special_tokens"] = parse_tokens(self.xtc_special_tokens)
        if self.logit_bias is not None:
            given["logit_bias"] = parse_bias(self.logit_bias)
        return {name: value for name, value in given.items() if value is not None}


def _name(option: str, value: str) -> str:
    if not value.strip():
        raise UsageError(f"--{option} is empty", "leave it out for the default")
    return value


def parse_rollback(text: str) -> str | dict[str, str]:
    """Read ``NAME`` or ``KIND=NAME,KIND=NAME``.

    Raises:
        UsageError: neither of the two, or one kind twice.
    """
    if "=" not in text:
        return _name("rollback", text)
    chosen: dict[str, str] = {}
    for part in text.split(","):
        kind, _, name = (piece.strip() for piece in part.partition("="))
        if not kind or not name:
            raise UsageError(
                f"--rollback cannot be read at {part.strip()!r}",
                "write NAME, or KIND=NAME,KIND=NAME",
            )
        if kind in chosen:
            raise UsageError(f"--rollback names {kind!r} twice", "once a cache kind")
        chosen[kind] = name
    return chosen


def parse_kernels(texts: list[str]) -> dict[str, str]:
    """Read ``OPERATION=CHOICE`` of every text.

    Raises:
        UsageError: another form, or one operation twice.
    """
    chosen: dict[str, str] = {}
    for text in texts:
        operation, _, choice = (piece.strip() for piece in text.partition("="))
        if not operation or not choice:
            raise UsageError(f"--kernel cannot be read: {text!r}", "write OPERATION=CHOICE")
        if operation in chosen:
            raise UsageError(f"--kernel names {operation!r} twice", "once an operation")
        chosen[operation] = choice
    return chosen


def parse_width(text: str) -> str | int:
    """Read a number of draft tokens, or the name of a width policy.

    Raises:
        UsageError: empty, or below 0.
    """
    if not _name("width", text).strip().lstrip("+-").isdecimal():
        return text
    width = int(text)
    if width < 0:
        raise UsageError(f"--width must be at least 0, got {width}", "0 is plain decoding")
    return width


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt: given, from a file (``-`` is stdin), or from stdin where it is piped.

    Bytes are taken as they are: a newline at the end belongs to the prompt.

    Raises:
        UsageError: none of the three, two of them, or one that is empty or not UTF-8.
    """
    if prompt is not None and file is not None:
        raise UsageError("both PROMPT and --prompt-file are given", "give one of them")
    if prompt is not None:
        source, text = "PROMPT", prompt
    elif file is not None and str(file) != "-":
        source, text = f"--prompt-file {file}", read_text(file, "prompt file")
    elif file is None and sys.stdin.isatty():
        raise UsageError("no prompt", "give PROMPT, --prompt-file FILE, or pipe text in")
    else:
        source, text = "stdin", _decode(sys.stdin.buffer.read(), "stdin")
    if not text:
        raise UsageError(f"the prompt is empty ({source})", "give some text")
    return text


def read_text(path: Path, what: str) -> str:
    """A UTF-8 file with its line ends as they are.

    Raises:
        UsageError: it cannot be read, or is not UTF-8; names it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{what} {path} cannot be read: {error.strerror or error}", "check path and permissions"
        ) from error
    return _decode(data, f"{what} {path}")


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{what} is not UTF-8: {error.reason} at byte {error.start}", "convert it to UTF-8"
        ) from error


def text_options(max_tokens: int, stop: list[str] | None) -> dict[str, Any]:
    """Where a text ends, as fields of `GenerateOptions`; checked before anything is loaded.

    Raises:
        UsageError: no token to generate, or an empty stop string.
    """
    if max_tokens < 1:
        raise UsageError(
            f"--max-tokens must be at least 1, got {max_tokens}", "256 is a good start"
        )
    if any(not text for text in stop or ()):
        raise UsageError("a --stop string is empty", "leave it out")
    return {"max_tokens": max_tokens, "stop": tuple(stop or ())}
