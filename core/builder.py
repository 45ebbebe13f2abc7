"""The pipeline builder: fills in defaults, checks everything, then loads weights and wires."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx

from draftloom.abilities import Bindable, BindContext, Tunable
from draftloom.blueprint import Blueprint
from draftloom.composite import CompositeRollback
from draftloom.contracts import CacheKind, CacheRollback, LoadedModel, Speculation, TargetAdapter
from draftloom.errors import UsageError
from draftloom.estimate import MemoryEstimate, costs_of, estimate, weights_fit
from draftloom.kernel_settings import KernelSettings
from draftloom.kv_cache import KVQuantization
from draftloom.memory import MemorySettings
from draftloom.mismatch import MismatchMonitor
from draftloom.model_info import ModelInfo
from draftloom.parts import EngineParts
from draftloom.pipeline import Pipeline
from draftloom.plugins import PluginManager
from draftloom.resolver import Resolver
from draftloom.spec import ComponentSpec, InsertSpec, PipelineSpec, freeze_sampling

__all__ = ["PipelineBuilder"]


class PipelineBuilder:
    """Wires components into a pipeline; every method returns a new builder.

    Args:
        target: folder, hub repository or bundled name; empty is the bundled pair.
        plugins: a plugin manager; by default one with all installed plugins.

    Example:
        ``PipelineBuilder("Qwen/Qwen3.5-9B").drafter("prompt-lookup").width(8).build()``
    """

    def __init__(
        self,
        target: str | Path = "",
        *,
        plugins: PluginManager | None = None,
        spec: PipelineSpec | None = None,
    ) -> None:
        base = PipelineSpec() if spec is None else spec
        self.spec = attrs.evolve(base, target=str(target)) if target else base
        self.plugins = PluginManager() if plugins is None else plugins
        self._loaded: LoadedModel | None = None

    @classmethod
    def from_file(
        cls, path: str | Path, *, plugins: PluginManager | None = None
    ) -> PipelineBuilder:
        """A builder for a pipeline file (TOML).

        Raises:
            UsageError, GraphError: the file cannot be read or says what is not known.
        """
        return cls(plugins=plugins, spec=PipelineSpec.from_file(Path(path)))

    def _with(self, **changes: Any) -> PipelineBuilder:
        builder = PipelineBuilder(plugins=self.plugins, spec=attrs.evolve(self.spec, **changes))
        builder._loaded = self._loaded
        return builder

    # --- choices -----------------------------------------------------------------------------

    def model(self, model: Any, tokenizer: Any = None) -> PipelineBuilder:
        """Use a target that mlx-lm has loaded already, instead of loading one."""
        builder = self._with()
        builder._loaded = LoadedModel(model, tokenizer)
        return builder

    def dtype(self, name: str) -> PipelineBuilder:
        """Compute type: ``auto``, ``stored`` (nothing cast or unpacked), ``float32``, ``bfloat16``
        or ``float16``."""
        return self._with(dtype=name)

    def drafter(self, use: str | ComponentSpec, **options: Any) -> PipelineBuilder:
        """A registered drafter with its options, or a checkpoint (folder or repository)."""
        return self._with(drafter=_component(use, options))

    def drafter_options(self, **options: Any) -> PipelineBuilder:
        """Options on top of those that the chosen drafter has, whichever that is."""
        chosen = self.spec.drafter
        merged = ComponentSpec.make(chosen.use, {**dict(chosen.options), **options})
        return self._with(drafter=merged) if options else self._with()

    def verifier(self, use: str, **options: Any) -> PipelineBuilder:
        """A registered verifier with its options."""
        return self._with(verifier=_component(use, options))

    def acceptance(self, use: str, **options: Any) -> PipelineBuilder:
        """A registered acceptance policy with its options."""
        return self._with(acceptance=_component(use, options))

    def rollback(self, use: str | Mapping[str, str], **options: Any) -> PipelineBuilder:
        """A rollback for every cache kind it serves, or a mapping from kind to rollback."""
        if isinstance(use, Mapping):
            pairs = tuple(sorted((kind, ComponentSpec.of(name)) for kind, name in use.items()))
            return self._with(rollback=pairs)
        return self._with(rollback=_component(use, options))

    def width(self, use: str | int, **options: Any) -> PipelineBuilder:
        """A number of draft tokens a cycle, or a registered width policy; with its options."""
        if isinstance(use, int):
            return self._with(width=ComponentSpec.make("fixed", {"tokens": use, **options}))
        return self._with(width=_component(use, options))

    def block_size(self, size: int, **options: Any) -> PipelineBuilder:
        """Draft `size` - 1 tokens a cycle: the block counts the anchor, as in DFlash. Options as
        those of `width`.

        Raises:
            UsageError: below 1.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(
                f"block size must be at least 1, got {size}",
                "1 is plain decoding; it counts the anchor",
            )
        return self.width(size - 1, **options)

    def own_width(self) -> PipelineBuilder:
        """The drafter's own width, every cycle, where no width was chosen: for measurements of
        drafting, which the default would cut short where drafting does not pay."""
        chosen = self.spec.width
        if chosen.use != "auto":
            return self
        return self.width("fixed", **dict(chosen.options))

    def sampling(self, **params: Any) -> PipelineBuilder:
        """Default sampling parameters: the fields of `SamplingParams`."""
        frozen = ((name, freeze_sampling(value)) for name, value in params.items())
        return self._with(sampling=tuple(sorted(frozen, key=lambda pair: pair[0])))

    def kv_cache(
        self, kv_bits: int | None, kv_group_size: int = 64, quantized_kv_start: int = 5000
    ) -> PipelineBuilder:
        """Pack the target's key/value caches: bits of a number (None leaves them plain), numbers
        that share a scale, tokens from which on. Names and meanings are mlx-lm's.

        Raises:
            UsageError: a value that mlx-lm does not take.
        """
        if kv_bits is None:
            return self._with(kv_cache=None)
        return self._with(kv_cache=KVQuantization(kv_bits, kv_group_size, quantized_kv_start))

    def kernels(self, choices: Mapping[str, str] | KernelSettings) -> PipelineBuilder:
        """Which implementation kernel operations run: ``off`` (the stock path), a registered name,
        or ``auto``, which takes an earlier choice back. Goes on top of earlier choices.

        Raises:
            UsageError: no mapping of names.
        """
        return self._with(kernels=self.spec.kernels.on_top(choices))

    def memory(
        self,
        limit_gb: float | None = None,
        context_length: int | None = None,
        prefill_step_size: int = 2048,
    ) -> PipelineBuilder:
        """How much memory may be taken (GB of 10^9 bytes; by default what the device or the host
        has), for how many tokens there must be room before weights are loaded, and prompt tokens
        run at once.

        Raises:
            UsageError: a value out of range.
        """
        return self._with(memory=MemorySettings(limit_gb, context_length, prefill_step_size))

    def insert(
        self, use: str, *, after: str = "", before: str = "", **options: Any
    ) -> PipelineBuilder:
        """Insert a registered node after or before another.

        Raises:
            UsageError: both or neither of `after` and `before`.
        """
        if bool(after) == bool(before):
            raise UsageError("insert needs one of after= and before=")
        insert = InsertSpec(_component(use, options), after, before)
        return self._with(inserts=(*self.spec.inserts, insert))

    # --- check -------------------------------------------------------------------------------

    def check(self) -> Blueprint:
        """Resolve every name, make every component, check the graph. Loads no weight.

        Raises:
            ModelError: the target cannot be found or read, or nobody serves it.
            GraphError: all problems of the pipeline at once.
        """
        return Resolver(self.plugins, self.spec, self._loaded).blueprint()

    def build(self) -> Pipeline:
        """Check, load the weights, bind the components.

        Raises:
            ModelError, GraphError: see `check`; also weights that are missing or corrupt.
        MemoryLimitError: the target would not fit in memory; has the numbers.
        """
        plan = self.check()
        if self._loaded is None and not weights_fit(self.plugins, plan):
            alone = attrs.evolve(plan.spec, drafter=ComponentSpec("none"), width=ComponentSpec())
            plan = self._with(**attrs.asdict(alone, recurse=False)).check()
        for folder in plan.folders:
            self.plugins.fetch_weights(folder)
        loaded = self._loaded or self.plugins.load_model(plan.model, plan.spec.dtype)
        target: TargetAdapter = plan.adapter(loaded.model, plan.target)
        try:
            if isinstance(target, Tunable):
                target.tune(plan.kernels)
            target.tap(plan.drafter.info.tap_layers)
            parts = self._bind(plan, target)
        except BaseException:
            target.close()
            raise
        return Pipeline(plan.spec, parts, loaded.tokenizer, plan.sampling, plan.names)

    def memory_estimate(self) -> MemoryEstimate:
        """What the pipeline would take at its `context_length`, before any weight is loaded.

        Raises:
            ModelError, GraphError: see `check`.
        """
        return estimate(self.plugins, self.check())

    def _bind(self, plan: Blueprint, target: TargetAdapter) -> EngineParts:
        context = BindContext(
            target=target,
            dtype=plan.spec.dtype,
            open_model=partial(_open_model, self.plugins, plan),
            open_rollback=partial(_open_rollback, self.plugins, plan.kernels),
            kernels=plan.kernels,
        )
        rollback = CompositeRollback(plan.rollbacks, target)
        components: Sequence[Any] = (
            plan.drafter,
            plan.verifier,
            plan.acceptance,
            plan.width,
            *plan.rollbacks.values(),
            *plan.nodes.values(),
        )
        for component in components:
            if isinstance(component, Tunable):
                component.tune(plan.kernels)
        for component in components:
            if isinstance(component, Bindable):
                component.bind(context)
        return EngineParts(
            graph=plan.graph,
            target=target,
            drafter=plan.drafter,
            verifier=plan.verifier,
            acceptance=plan.acceptance,
            width=plan.width,
            open_speculation=rollback.begin,
            nodes=plan.nodes,
            hook=self.plugins.hook,
            kv_quantization=plan.spec.kv_cache,
            monitor=MismatchMonitor(plan.drafter.info),
            memory=plan.spec.memory,
            costs=cache(partial(costs_of, plan, target)),
        )


def _component(use: str | ComponentSpec, options: Mapping[str, Any]) -> ComponentSpec:
    return use if isinstance(use, ComponentSpec) else ComponentSpec.make(use, options)


def _open_model(plugins: PluginManager, plan: Blueprint, path: Path) -> TargetAdapter:
    model = ModelInfo.from_path(path)
    factory = plugins.adapter_for(model).load()
    info = factory.describe(model)
    adapter: TargetAdapter = factory(plugins.load_model(model, plan.spec.dtype).model, info)
    if isinstance(adapter, Tunable):
        adapter.tune(plan.kernels)
    return adapter


def _open_rollback(
    plugins: PluginManager, kernels: KernelSettings, target: TargetAdapter
) -> Callable[[list[Any], mx.array], Speculation]:
    rollbacks: dict[CacheKind, CacheRollback] = {}
    for kind in set(target.info.cache_kinds):
        name = plugins.rollback_for(kind, target.info)
        if name is None:
            raise UsageError(f"no rollback for {kind} caches of {target.info.name}")
        rollback = plugins.component("rollback", name).make({})
        if isinstance(rollback, Tunable):
            rollback.tune(kernels)
        rollbacks[kind] = rollback
    return CompositeRollback(rollbacks, target).begin
