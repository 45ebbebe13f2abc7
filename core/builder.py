"""The pipeline builder: fills in defaults, checks everything, then loads weights and wires."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx

from draftloom.composite import CompositeRollback
from draftloom.contracts import (
    AcceptancePolicy,
    Bindable,
    BindContext,
    CacheKind,
    CacheRollback,
    Checkable,
    CycleNode,
    Drafter,
    DraftLaw,
    LoadedModel,
    Need,
    Preserves,
    Speculation,
    TargetAdapter,
    TargetInfo,
    Verifier,
    WidthPolicy,
)
from draftloom.engine import EngineParts
from draftloom.errors import (
    DraftloomError,
    GraphError,
    Problem,
    UnknownNameError,
    UsageError,
    did_you_mean,
)
from draftloom.graph import Graph, Node, standard_nodes
from draftloom.model_info import ModelInfo
from draftloom.pipeline import Pipeline
from draftloom.plugins import PluginManager, canonical
from draftloom.sampling import SamplingParams
from draftloom.spec import ComponentSpec, InsertSpec, PipelineSpec

__all__ = ["DTYPES", "Blueprint", "PipelineBuilder"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@attrs.frozen(eq=False)
class Blueprint:
    """A checked pipeline whose weights are not loaded yet.

    Attributes:
        spec: with every ``auto`` resolved.
        graph: the checked cycle.
        model: the target's config.
        target: what the target is.
        adapter, drafter, verifier, acceptance, width, rollbacks, nodes: the components made
            (adapter: its class; rollbacks: by cache kind; nodes: by node name).
        names: names of target, adapter, drafter, verifier, acceptance, rollback, width.
        sampling: default sampling parameters.
    """

    spec: PipelineSpec
    graph: Graph
    model: ModelInfo
    target: TargetInfo
    adapter: Any
    drafter: Drafter
    verifier: Verifier
    acceptance: AcceptancePolicy
    width: WidthPolicy
    rollbacks: Mapping[CacheKind, CacheRollback]
    nodes: Mapping[str, CycleNode]
    names: dict[str, str]
    sampling: SamplingParams


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
        """Compute type: ``auto``, ``float32``, ``bfloat16`` or ``float16``."""
        return self._with(dtype=name)

    def drafter(self, use: str | ComponentSpec, **options: Any) -> PipelineBuilder:
        """A registered drafter with its options, or a checkpoint (folder or repository)."""
        return self._with(drafter=_component(use, options))

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
        """A number of draft tokens a cycle, or a registered width policy with its options."""
        if isinstance(use, int):
            return self._with(width=ComponentSpec.make("fixed", {"tokens": use}))
        return self._with(width=_component(use, options))

    def block_size(self, size: int) -> PipelineBuilder:
        """Draft `size` - 1 tokens a cycle: the block counts the anchor, as in DFlash.

        Raises:
            UsageError: below 1.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(
                f"block size must be at least 1, got {size}", "1 is plain decoding; it counts the anchor"
            )  # fmt: skip
        return self.width(size - 1)

    def sampling(self, **params: float) -> PipelineBuilder:
        """Default sampling parameters: temperature, top_p, top_k, min_p, seed."""
        return self._with(sampling=tuple(sorted(params.items())))

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
        return _Resolver(self.plugins, self.spec, self._loaded).blueprint()

    def build(self) -> Pipeline:
        """Check, load the weights, bind the components.

        Raises:
            ModelError, GraphError: see `check`; also weights that are missing or corrupt.
        """
        plan = self.check()
        loaded = self._loaded or self.plugins.load_model(plan.model, plan.spec.dtype)
        target: TargetAdapter = plan.adapter(loaded.model, plan.target)
        try:
            target.tap(plan.drafter.info.tap_layers)
            parts = self._bind(plan, target)
        except BaseException:
            target.close()
            raise
        return Pipeline(plan.spec, parts, loaded.tokenizer, plan.sampling, plan.names)

    def _bind(self, plan: Blueprint, target: TargetAdapter) -> EngineParts:
        context = BindContext(
            target=target,
            dtype=plan.spec.dtype,
            open_model=partial(_open_model, self.plugins, plan.spec.dtype),
            open_rollback=partial(_open_rollback, self.plugins),
        )
        rollback = CompositeRollback(plan.rollbacks, target)
        components: Iterable[Any] = (
            plan.drafter, plan.verifier, plan.acceptance, plan.width,
            *plan.rollbacks.values(), *plan.nodes.values(),
        )  # fmt: skip
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
        )


def _component(use: str | ComponentSpec, options: Mapping[str, Any]) -> ComponentSpec:
    return use if isinstance(use, ComponentSpec) else ComponentSpec.make(use, options)


def _open_model(plugins: PluginManager, dtype: str, path: Path) -> TargetAdapter:
    model = ModelInfo.from_path(path)
    factory = plugins.adapter_for(model).load()
    info = factory.describe(model)
    adapter: TargetAdapter = factory(plugins.load_model(model, dtype).model, info)
    return adapter


def _open_rollback(
    plugins: PluginManager, target: TargetAdapter
) -> Callable[[list[Any], mx.array], Speculation]:
    rollbacks: dict[CacheKind, CacheRollback] = {}
    for kind in set(target.info.cache_kinds):
        name = plugins.rollback_for(kind, target.info)
        if name is None:
            raise UsageError(f"no rollback for {kind} caches of {target.info.name}")
        rollbacks[kind] = plugins.component("rollback", name).make({})
    return CompositeRollback(rollbacks, target).begin


class _Resolver:
    """Turns a spec into a blueprint, collecting problems instead of stopping at the first."""

    def __init__(
        self, plugins: PluginManager, spec: PipelineSpec, loaded: LoadedModel | None
    ) -> None:
        self.plugins = plugins
        self.spec = spec
        self.loaded = loaded
        self.problems: list[Problem] = []
        self._auto: ComponentSpec | None = None

    def blueprint(self) -> Blueprint:
        model = self._model()
        adapter = self.plugins.adapter_for(model).load()
        target: TargetInfo = adapter.describe(model)
        self._check_dtype()
        sampling = self._attempt("sampling", self._sampling)
        drafter = self._drafter(target, model)
        verifier = self._make("verifier", self.spec.verifier)
        acceptance = self._make("acceptance", self.spec.acceptance)
        rollbacks = self._rollbacks(target)
        width = self._make("width", self._width_spec(drafter))
        made = (drafter, verifier, acceptance, width, *rollbacks.values())
        graph, nodes = self._graph(target, made, rollbacks)
        self._check_needs(target, made, nodes, sampling)
        if graph is not None:
            self.problems += graph.problems()
            self.problems += self.plugins.check_graph(graph)
        if self.problems or graph is None:
            raise GraphError(self.problems)
        return Blueprint(
            spec=self.spec, graph=graph, model=model, target=target, adapter=adapter,
            drafter=drafter, verifier=verifier, acceptance=acceptance, width=width,
            rollbacks=rollbacks, nodes=nodes, sampling=sampling or SamplingParams(),
            names=_names(target, drafter, verifier, acceptance, rollbacks, width),
        )  # fmt: skip

    def _attempt(self, where: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except GraphError as error:
            self.problems += error.problems
        except DraftloomError as error:
            self.problems.append(Problem(where, error.message, error.hint))
        return None

    # --- target ------------------------------------------------------------------------------

    def _model(self) -> ModelInfo:
        if self.loaded is not None:
            return ModelInfo.from_model(self.loaded.model)
        path = self.plugins.locate_model(self.spec.target)
        return ModelInfo.from_path(path, self.spec.target or path.parent.name)

    def _check_dtype(self) -> None:
        if self.spec.dtype not in DTYPES:
            self.problems.append(
                Problem("dtype", f"unknown type {self.spec.dtype!r}",
                        did_you_mean(self.spec.dtype, DTYPES))
            )  # fmt: skip

    def _sampling(self) -> SamplingParams:
        return SamplingParams(**dict(self.spec.sampling))  # type: ignore[arg-type]

    # --- components --------------------------------------------------------------------------

    def _make(self, kind: str, spec: ComponentSpec | None) -> Any:
        if spec is None:
            return None

        def make() -> Any:
            component = self.plugins.component(kind, spec.use)
            return component.make(self._options(component.info, dict(spec.options)))

        return self._attempt(kind, make)

    def _options(self, info: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Options as the factory takes them: models located, nested drafters made."""
        for name in info.model_options:
            if isinstance(options.get(name), str):
                options[name] = self.plugins.locate_model(options[name])
        for name in info.nested_options:
            if name in options:
                stages = options[name]
                stages = stages if isinstance(stages, tuple | list) else (stages,)
                options[name] = tuple(self._nested(stage) for stage in stages)
        return options

    def _nested(self, stage: Any) -> Any:
        if not isinstance(stage, str | ComponentSpec | Mapping):
            return stage
        spec = ComponentSpec.of(stage)
        if spec.use == "auto" and self._auto is not None:
            spec = self._auto
        spec = self._known_drafter(spec)
        component = self.plugins.component("drafter", spec.use)
        return component.make(self._options(component.info, dict(spec.options)))

    def _drafter(self, target: TargetInfo, model: ModelInfo) -> Any:
        self._auto = self.plugins.drafter_for(target, model)
        spec = self.spec.drafter
        if spec.use == "auto":
            if self._auto is None:
                self.problems.append(
                    Problem("drafter", f"no drafter is known for {target.name}",
                            "name one: --drafter CHECKPOINT, prompt-lookup or none")
                )  # fmt: skip
                return None
            spec = ComponentSpec(self._auto.use, self._auto.options + spec.options)
        resolved = self._attempt("drafter", lambda: self._known_drafter(spec))
        if resolved is None:
            return None
        if self._auto is not None and resolved.use == self._auto.use and not resolved.options:
            resolved = self._auto  # `--drafter dflash` for a target whose checkpoint is known
        self.spec = attrs.evolve(self.spec, drafter=resolved)
        return self._make("drafter", resolved)

    def _known_drafter(self, spec: ComponentSpec) -> ComponentSpec:
        """A registered name as it is; a folder or repository as the drafter that serves it."""
        if canonical(spec.use) in self.plugins.names("drafter"):
            return attrs.evolve(spec, use=canonical(spec.use))
        if "/" not in spec.use and not Path(spec.use).exists():
            raise UnknownNameError("drafter", spec.use, self.plugins.names("drafter"))
        path = self.plugins.locate_model(spec.use)
        found = self.plugins.drafter_for_checkpoint(ModelInfo.from_path(path, spec.use))
        if found is None:
            raise UsageError(f"no drafter serves the checkpoint {spec.use}")
        return ComponentSpec(found.use, found.options + spec.options)

    def _width_spec(self, drafter: Any) -> ComponentSpec | None:
        spec = self.spec.width
        if drafter is None and spec.use == "auto":
            return None
        if spec.use == "auto":
            spec = ComponentSpec.make("fixed", {"tokens": drafter.info.default_width})
            self.spec = attrs.evolve(self.spec, width=spec)
        return spec

    def _rollbacks(self, target: TargetInfo) -> dict[CacheKind, CacheRollback]:
        kinds = tuple(dict.fromkeys(target.cache_kinds))
        chosen = self._chosen_rollbacks(kinds)
        made: dict[CacheKind, CacheRollback] = {}
        for kind in kinds:
            spec = chosen.get(kind)
            if spec is None:
                name = self.plugins.rollback_for(kind, target)
                if name is None:
                    hint = "name one that serves it"
                    self.problems.append(Problem("rollback", f"none known for {kind}", hint))
                    continue
                spec = ComponentSpec(name)
            rollback = self._make("rollback", spec)
            if rollback is None:
                continue
            if kind not in rollback.info.cache_kinds:
                serves = ", ".join(rollback.info.cache_kinds)
                self.problems.append(
                    Problem("rollback", f"{rollback.info.name!r} cannot take back {kind} caches",
                            f"it serves {serves}")
                )  # fmt: skip
            made[kind] = rollback
        return made

    def _chosen_rollbacks(self, kinds: tuple[CacheKind, ...]) -> dict[CacheKind, ComponentSpec]:
        spec = self.spec.rollback
        if isinstance(spec, ComponentSpec):
            if spec.use == "auto":
                return {}
            component = self._attempt(
                "rollback", lambda: self.plugins.component("rollback", spec.use)
            )
            if component is None:
                return {}
            served = [kind for kind in kinds if kind in component.info.cache_kinds]
            if not served:
                self.problems.append(
                    Problem("rollback", f"{spec.use!r} serves no cache of this target",
                            f"it has {', '.join(kinds)} caches")
                )  # fmt: skip
            return dict.fromkeys(served, spec)
        chosen = {}
        for name, component_spec in spec:
            kind = canonical(name)
            if kind not in set(CacheKind):
                hint = did_you_mean(kind, [str(k) for k in CacheKind])
                self.problems.append(Problem("rollback", f"unknown cache kind {name!r}", hint))
            elif kind in kinds:
                chosen[CacheKind(kind)] = component_spec
        return chosen

    # --- graph -------------------------------------------------------------------------------

    def _graph(
        self, target: TargetInfo, made: tuple[Any, ...], rollbacks: Mapping[CacheKind, Any]
    ) -> tuple[Graph | None, dict[str, CycleNode]]:
        nodes: dict[str, CycleNode] = {}
        if any(component is None for component in made):
            for insert in self.spec.inserts:  # still say what is wrong with these
                self._make("node", insert.component)
            return None, nodes
        drafter, verifier, acceptance, width = made[:4]
        notes = (
            ("target", f"{target.name} ({target.model_type}, {target.num_layers} layers)"),
            ("adapter", target.adapter),
            ("dtype", self.spec.dtype),
        )
        standard = standard_nodes(
            _width_name(width), drafter.info.name, verifier.info.name, acceptance.info.name,
            _rollback_name(rollbacks),
        )  # fmt: skip
        graph = Graph(tuple(standard), title=f"pipeline for {target.name}", notes=notes)
        for insert in self.spec.inserts:
            component = self._make("node", insert.component)
            if component is None:
                continue
            info = component.info
            node = Node(info.name, info.name, info.inputs, info.outputs, custom=True)
            before = set(graph.names)
            place = partial(graph.insert, node, after=insert.after, before=insert.before)
            graph = self._attempt("insert", place) or graph
            nodes.update(dict.fromkeys(set(graph.names) - before, component))
        return graph, nodes

    def _check_needs(
        self,
        target: TargetInfo,
        made: tuple[Any, ...],
        nodes: Mapping[str, CycleNode],
        sampling: SamplingParams | None,
    ) -> None:
        drafter, _, acceptance, width = made[:4]
        for component in (*made, *nodes.values()):
            if component is None:
                continue
            if isinstance(component, Checkable):
                self.problems += component.check(target)
            if Need.TAPE in component.info.needs and not any(
                kind in target.tape_kinds for kind in component.info.cache_kinds
            ):
                self.problems.append(
                    Problem(component.info.name, "needs a tape, which no layer can record",
                            f"adapter {target.adapter!r} records none; use snapshot")
                )  # fmt: skip
        if drafter is not None:
            self._check_drafter(target, drafter, acceptance, width)
        if acceptance is not None and sampling is not None and not sampling.greedy:
            if acceptance.info.preserves is Preserves.GREEDY:
                self.problems.append(
                    Problem("acceptance", f"{acceptance.info.name!r} is greedy, temperature is not 0",
                            "use speculative-sampling")
                )  # fmt: skip

    def _check_drafter(self, target: TargetInfo, drafter: Any, acceptance: Any, width: Any) -> None:
        info = drafter.info
        if info.tap_layers and not target.can_tap:
            self.problems.append(
                Problem(info.name, f"needs hidden states, adapter {target.adapter!r} has no taps")
            )
        outside = [layer for layer in info.tap_layers if not 0 <= layer < target.num_layers]
        if outside:
            self.problems.append(
                Problem(info.name, f"reads layers {outside}, the target has {target.num_layers}",
                        "is this the drafter of another target?")
            )  # fmt: skip
        if acceptance is not None and Need.DRAFT_PROBS in acceptance.info.needs:
            if info.law is DraftLaw.DETERMINISTIC:
                self.problems.append(
                    Problem(acceptance.info.name, f"needs q, drafter {info.name!r} has none")
                )
        tokens = getattr(width, "tokens", None)
        if tokens is not None and info.max_width is not None and tokens > info.max_width:
            self.problems.append(
                Problem("width", f"block size {tokens + 1} is above the drafter's {info.max_width + 1}",
                        f"{info.name!r} proposes at most {info.max_width} tokens")
            )  # fmt: skip


def _rollback_name(rollbacks: Mapping[CacheKind, CacheRollback]) -> str:
    return " + ".join(sorted({r.info.name for r in rollbacks.values()})) or "none"


def _width_name(width: WidthPolicy) -> str:
    tokens = getattr(width, "tokens", None)
    return width.info.name if tokens is None else f"{width.info.name} {tokens}"


def _names(
    target: TargetInfo,
    drafter: Drafter,
    verifier: Verifier,
    acceptance: AcceptancePolicy,
    rollbacks: Mapping[CacheKind, CacheRollback],
    width: WidthPolicy,
) -> dict[str, str]:
    return {
        "target": target.name,
        "adapter": target.adapter,
        "drafter": drafter.info.name,
        "verifier": verifier.info.name,
        "acceptance": acceptance.info.name,
        "rollback": _rollback_name(rollbacks),
        "width": _width_name(width),
    }
