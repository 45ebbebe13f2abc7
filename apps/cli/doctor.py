"""`draftloom doctor`: versions, device, compute types, kernels, and what a target would use."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from draftloom.errors import UsageError
from draftloom.versions import NOT_INSTALLED, version_of

from .memory_options import (
    ContextLengthOption,
    KvBitsOption,
    KvGroupSizeOption,
    MemoryLimitOption,
    PrefillStepSizeOption,
    QuantizedKvStartOption,
)
from .offline import OfflineOption
from .options import (
    DrafterOption,
    DtypeOption,
    JsonOption,
    KernelOption,
    PipelineFlags,
    TargetOption,
)
from .state import state_of

if TYPE_CHECKING:
    from draftloom.kernel_settings import Implementation, KernelSettings
    from draftloom.model_info import ModelInfo
    from draftloom.plugins import PluginManager

__all__ = ["KernelChoice", "doctor", "kernel_choices"]

DISTRIBUTIONS = (
    "draftloom", "mlx", "mlx-cpu", "mlx-cuda-13", "mlx-metal", "mlx-lm", "transformers", "pluggy",
)  # fmt: skip
OPERATIONS = ("verify", "replay", "replay_verify", "prefill")
BLOCK, PROMPT = 16, 512
CONTEXT = 4096
"""Tokens that memory is counted for where nobody says."""


@attrs.frozen
class KernelChoice:
    """Which kernel an operation would use.

    Attributes:
        operation: such as ``gated-delta verify``.
        kernel: the implementation chosen.
        reason: why.
        rejected: the others that were asked, and why not.
    """

    operation: str
    kernel: str
    reason: str
    rejected: dict[str, str]


def doctor(
    context: typer.Context,
    target: TargetOption = None,
    drafter: DrafterOption = None,
    offline: OfflineOption = False,
    dtype: DtypeOption = None,
    kernel: KernelOption = None,
    kv_bits: KvBitsOption = None,
    kv_group_size: KvGroupSizeOption = None,
    quantized_kv_start: QuantizedKvStartOption = None,
    memory_limit: MemoryLimitOption = None,
    context_length: ContextLengthOption = None,
    prefill_step_size: PrefillStepSizeOption = None,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Run all parity checks of kernels on this device, turn off what fails, and print "
            "a report to paste into an issue.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, what runs here, which kernels a target would use, and why, and how
    much memory each part would take at a context length. Loads no weights."""
    state = state_of(context)
    plugins = state.plugins
    if self_test:
        from .self_test import self_test as run

        given = (target, drafter, dtype, kernel, kv_bits, kv_group_size, quantized_kv_start)
        if any(given) or memory_limit or context_length or prefill_step_size:
            raise UsageError(
                "--self-test tests kernels, not a target", "leave out all options but --json"
            )
        run(plugins, _versions(), state.begin, as_json=as_json)
        return
    flags = PipelineFlags(
        target=target, drafter=drafter, dtype=dtype, kernel=kernel, kv_bits=kv_bits,
        kv_group_size=kv_group_size, quantized_kv_start=quantized_kv_start,
        memory_limit=memory_limit,
        context_length=context_length or CONTEXT, prefill_step_size=prefill_step_size,
    )  # fmt: skip
    report = _report(plugins, target or "", flags)
    typer.echo(json.dumps(report, indent=2) if as_json else _describe(report))


def _report(plugins: PluginManager, target: str, flags: PipelineFlags) -> dict[str, Any]:
    from draftloom.errors import GraphError
    from draftloom.kernel_settings import implementations, resolve_kernels, without_use
    from draftloom.model_info import ModelInfo

    settings, problems = resolve_kernels(flags.builder(plugins).spec.kernels, plugins)
    if problems:
        raise GraphError(problems)
    found = implementations(plugins)
    path = plugins.locate_model(target)
    model = ModelInfo.from_path(path, target or path.parent.name)
    info = plugins.adapter_for(model).load().describe(model)
    drafter = plugins.drafter_for(info, model)
    kinds = sorted(set(info.cache_kinds))
    dtype, advice = _dtype_advice()
    return {
        "versions": _versions(),
        "device": _device(),
        "dtype": {"auto": dtype, "advice": advice},
        "target": {
            "name": info.name,
            "model_type": info.model_type,
            "adapter": info.adapter,
            "cache_kinds": [str(kind) for kind in kinds],
            "context_limit": info.context_limit,
            "drafter": None if drafter is None else drafter.as_data(),
            "rollbacks": {
                str(kind): plugins.rollback_for(kind, info)
                for kind in sorted(set(info.cache_kinds))
            },
        },
        "memory": _memory(plugins, flags, known=drafter is not None),
        "kernels": {
            "self_test": _self_test(),
            "compiled": _compiled(),
            "notes": [*settings.notes, *without_use(settings, plugins, info)],
            "registered": {one.full_name: one.summary for one in found},
            "operations": {
                one.operation: _operation(one.operation, settings, found) for one in found
            },
            "choices": [attrs.asdict(choice) for choice in kernel_choices(model, settings)],
        },
        "plugins": [
            f"{p.name} ({p.distribution} {p.version})".replace(" )", ")")
            for p in plugins.plugins()
            if p.distribution != "draftloom"
        ],
    }


def _operation(name: str, settings: KernelSettings, known: list[Implementation]) -> dict[str, Any]:
    """What is chosen for an operation, what `auto` runs here, and what cannot run here."""
    own = [one for one in known if one.operation == name]
    return {
        "choice": settings.choice(name),
        "implementations": [one.name for one in own],
        "auto": [one.name for one in own if one.by_default],
        "not_here": {one.name: one.why_not_here for one in own if one.why_not_here is not None},
    }


def _self_test() -> str:
    """How the last self-test went, in words."""
    from draftloom.self_test_record import SelfTestRecord

    record = SelfTestRecord.load()
    if record is None:
        return "not run yet on this device: draftloom doctor --self-test"
    if record.ignored:
        return f"not run yet on this device: {record.ignored}"
    failed = "; ".join(f"{kernel} ({reason})" for kernel, reason in record.failed.items())
    return f"{record.date}: {f'FAILED {failed}' if failed else 'all passed'}"


def _compiled() -> str | None:
    """Who compiles CUDA kernels, where they run here."""
    import mlx.core as mx

    from draftloom.kernels.compiled_cuda import cuda_kernel

    return cuda_kernel.how() if mx.cuda.is_available() else None


def _memory(plugins: PluginManager, flags: PipelineFlags, *, known: bool) -> dict[str, Any]:
    """What the target would take with its drafter, or alone where none is known."""
    if flags.drafter is None and not known:
        flags = attrs.evolve(flags, drafter="none")
    return flags.builder(plugins).memory_estimate().as_dict()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in DISTRIBUTIONS:
        shown = version_of(name)
        if shown != NOT_INSTALLED or name == "draftloom":  # not so: a backend of another platform
            found[name] = shown
    return found


def _device() -> dict[str, Any]:
    import mlx.core as mx

    from draftloom.device import backend_name

    details = mx.device_info()
    kept = ("device_name", "architecture", "memory_size", "max_recommended_working_set_size")
    return {
        "backend": backend_name(),
        "default": str(mx.default_device()),
        **{key: details[key] for key in kept if key in details},
    }


def _dtype_advice() -> tuple[str, list[str]]:
    """What `--dtype auto` does here, and what to know about the types of this device."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        auto = "float32 (unquantized) below 1B parameters, above that the stored type"
        return auto, [
            "verification is bit-equal to plain decoding in every type",
            "matrix products cost in proportion to the block: speculation saves no time on a CPU; "
            "small blocks (--block-size 4) lose the least",
        ]
    auto = "the stored type"
    if mx.cuda.is_available():
        return auto, [
            "bfloat16 is the fastest; its products depend on the number of rows, so that two "
            "nearly equal logits may change places: `draftloom audit` tells ties from bugs, "
            "--verifier sequential is exact",
            "float32 products use TF32 unless MLX_ENABLE_TF32=0 is set",
        ]
    return auto, [
        "bfloat16 and quantized weights as stored; two nearly equal logits may change places: "
        "`draftloom audit` tells ties from bugs, --verifier sequential is exact",
    ]


def kernel_choices(model: ModelInfo, settings: KernelSettings | None = None) -> list[KernelChoice]:
    """Which kernels the layers of a model would use here.

    Asks for a block of `BLOCK` tokens and a prompt chunk of `PROMPT`, B = 1.

    Args:
        model: the target's config.
        settings: checked choices; None is ``auto``.
    """
    around = _around_gated_delta(model, settings)
    return _gated_delta(model, settings) + around + _attention(model, settings)


def _attention(model: ModelInfo, settings: KernelSettings | None) -> list[KernelChoice]:
    """Verify attention; none where the config does not tell the heads."""
    import mlx.core as mx

    from draftloom.kernels.verify_attention import Request, choose

    config, name = model.text_config, "verify-attention"
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        return []
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    request = Request(
        dtype=mx.float32 if on_cpu else _stored_dtype(model),
        batch=1,
        queries=BLOCK,
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        size=config.get("head_dim") or hidden // heads,
        device="cpu" if on_cpu else "gpu",
    )
    if settings is not None and settings.is_off(name):
        return [KernelChoice(name, "array", "mlx-lm's own: it is switched off", {})]
    choice = choose(request, None if settings is None else settings.use(name))
    return [KernelChoice(name, choice.name, choice.reason, dict(choice.rejected))]


def _gated_delta(model: ModelInfo, settings: KernelSettings | None) -> list[KernelChoice]:
    """The operations of gated-delta layers; none without such layers."""
    import mlx.core as mx

    from draftloom.kernels.gated_delta import Request, choose, prefer

    sizes = _linear_sizes(model)
    if sizes is None:
        return []
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    choices, name = [], "gated-delta"
    for operation in OPERATIONS:
        request = Request(
            operation=operation,
            dtype=mx.float32 if on_cpu else _stored_dtype(model),
            batch=1,
            tokens=PROMPT if operation == "prefill" else BLOCK,
            key_heads=sizes[0],
            value_heads=sizes[1],
            key_size=sizes[2],
            value_size=sizes[3],
            device="cpu" if on_cpu else "gpu",
        )
        choice = choose(request, None if settings is None else prefer(settings.use(name)))
        choices.append(
            KernelChoice(f"{name} {operation}", choice.name, choice.reason, dict(choice.rejected))
        )
    return choices


def _around_gated_delta(model: ModelInfo, settings: KernelSettings | None) -> list[KernelChoice]:
    """What stands before and behind the recurrence; none without such layers."""
    import mlx.core as mx

    from draftloom.kernels import gated_delta_inputs, gated_norm

    sizes = _linear_sizes(model)
    if sizes is None:
        return []
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    dtype, device = mx.float32 if on_cpu else _stored_dtype(model), "cpu" if on_cpu else "gpu"
    taps = model.text_config.get("linear_conv_kernel_dim", 4)
    requests: list[tuple[Any, Any]] = [
        (
            gated_delta_inputs.OPERATION,
            gated_delta_inputs.Request(dtype, dtype, taps, False, *sizes, device),
        ),
        (gated_norm.OPERATION, gated_norm.Request(dtype, sizes[3], True, device)),
    ]
    found = []
    for operation, request in requests:
        use = None if settings is None else settings.use(operation.name)
        choice = operation.choose(request, use)
        rejected = dict(choice.rejected)
        found.append(KernelChoice(operation.name, choice.name, choice.reason, rejected))
    return found


def _linear_sizes(model: ModelInfo) -> tuple[int, int, int, int] | None:
    """Hk, Hv, Dk, Dv of gated-delta layers; None where the config tells none."""
    keys = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    found = [model.text_config.get(f"linear_{key}") for key in keys]
    sizes = [size for size in found if isinstance(size, int) and size > 0]
    return None if len(sizes) < len(keys) else (sizes[0], sizes[1], sizes[2], sizes[3])


def _stored_dtype(model: ModelInfo) -> Any:
    import mlx.core as mx

    names = (
        model.config.get(key) or model.text_config.get(key) for key in ("dtype", "torch_dtype")
    )
    name = next((str(n) for n in names if n), "bfloat16")
    return {"float32": mx.float32, "float16": mx.float16}.get(name, mx.bfloat16)


def _describe(report: dict[str, Any]) -> str:
    lines = ["versions"]
    lines += [f"  {name:<14}{value}" for name, value in report["versions"].items()]
    lines.append("device")
    for name, value in report["device"].items():
        shown = f"{value / 2**30:.1f} GiB" if "size" in name else value
        lines.append(f"  {name.replace('_', ' '):<14}{shown}")
    lines += ["compute type", f"  auto          {report['dtype']['auto']}"]
    lines += [f"  note          {note}" for note in report["dtype"]["advice"]]
    target = report["target"]
    rollbacks = ", ".join(f"{kind} by {name}" for kind, name in target["rollbacks"].items())
    lines += [
        "target",
        f"  name          {target['name']} ({target['model_type']})",
        f"  adapter       {target['adapter']}",
        f"  drafter       {_drafter(target['drafter'])}",
        f"  rollback      {rollbacks}",
        f"  context       {target['context_limit'] or 'not stated'}",
        *_memory_lines(report["memory"]),
        "kernels",
    ]
    for choice in report["kernels"]["choices"]:
        lines.append(f"  {choice['operation']}: {choice['kernel']} ({choice['reason']})")
        lines += [f"    not {name}: {why}" for name, why in choice["rejected"].items()]
    if not report["kernels"]["choices"]:
        lines.append("  this target needs none")
    for name, found in report["kernels"]["operations"].items():
        lines.append(f"  operation {name}: {found['choice']}; --kernel {name}=CHOICE, or off")
        for choice in found["implementations"]:
            auto = "; auto may run it" if choice in found["auto"] else ""
            reason = found["not_here"].get(choice)
            why_not = f"; not here: {reason}" if reason else ""
            summary = report["kernels"]["registered"][f"{name}/{choice}"]
            lines.append(f"    {choice}: {summary}{auto}{why_not}")
    if report["kernels"]["compiled"]:
        lines.append(f"  CUDA kernels are compiled {report['kernels']['compiled']}")
    lines.append(f"  self-test: {report['kernels']['self_test']}")
    lines += [f"    {note}" for note in report["kernels"]["notes"]]
    lines += ["third-party plugins", *(f"  {p}" for p in report["plugins"] or ["none"])]
    return "\n".join(lines)


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    from draftloom.memory import size_text

    names = {
        "target_weights": "target",
        "drafter_weights": "drafter",
        "caches": "caches",
        "drafter_context": "context",
        "prefill": "prompt chunk",
        "total": "total",
        "limit": "limit",
    }
    lines = [f"memory, at {memory['context_length']} tokens"]
    for key, name in names.items():
        shown = "not known" if memory[key] is None else size_text(memory[key])
        lines.append(f"  {name:<14}{shown}")
    return lines


def _drafter(found: Any) -> str:
    if found is None:
        return "none known: name one with --drafter (prompt-lookup needs no second model)"
    if isinstance(found, str):
        return found
    rest = ", ".join(f"{k} {v}" for k, v in found.items() if k != "use")
    return f"{found['use']} ({rest})"
