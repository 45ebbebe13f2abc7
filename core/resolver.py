"""From a spec to a checked blueprint: names resolved, components made, every problem collected.

Nothing here loads a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from draftloom.abilities import Checkable
from draftloom.blueprint import Blueprint, names_of, rollback_name, width_name
from draftloom.checkpoint import DrafterDescription
from draftloom.contracts import (
    CacheKind,
    CacheRollback,
    ComponentInfo,
    CycleNode,
    DraftLaw,
    LoadedModel,
    Need,
    Preserves,
    TargetInfo,
)
from draftloom.errors import (
    DraftloomError,
    GraphError,
    Problem,
    UnknownNameError,
    UsageError,
    did_you_mean,
)
from draftloom.graph import Graph, Node, standard_nodes
from draftloom.kernel_settings import KernelSettings, resolve_kernels, without_use
from draftloom.kv_cache import QuantizesKV
from draftloom.model_info import ModelInfo
from draftloom.plugins import PluginManager, canonical
from draftloom.sampling import SamplingParams
from draftloom.spec import SAMPLING_KEYS, ComponentSpec, PipelineSpec

__all__ = ["DTYPES", "Resolver"]

DTYPES = ("auto", "stored", "float32", "bfloat16", "float16")


class Resolver:
    """Turns a spec into a blueprint, collecting problems instead of stopping at the first."""

    def __init__(
        self, plugins: PluginManager, spec: PipelineSpec, loaded: LoadedModel | None
    ) -> None:
        self.plugins = plugins
        self.spec = spec
        self.loaded = loaded
        self.problems: list[Problem] = []
        self._auto: ComponentSpec | None = None
        self._folders: list[Path] = []
        self._kernels = KernelSettings()
        self._without_use: list[str] = []

    def blueprint(self) -> Blueprint:
        model = self._model()
        component = self.plugins.adapter_for(model)
        adapter = component.load()
        target: TargetInfo = attrs.evolve(adapter.describe(model), adapter=component.name)
        self._check_dtype()
        self._check_kv_cache(adapter, component.name, model)
        self._attempt("kernels", partial(self._resolve_kernels, target))
        sampling = self._attempt("sampling", partial(self._sampling, target.vocab_size))
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
            spec=self.spec,
            graph=graph,
            model=model,
            target=target,
            adapter=adapter,
            drafter=drafter,
            verifier=verifier,
            acceptance=acceptance,
            width=width,
            rollbacks=rollbacks,
            nodes=nodes,
            sampling=sampling or SamplingParams(),
            folders=tuple(dict.fromkeys(self._folders)),
            kernels=self._kernels,
            names=names_of(target, drafter, verifier, acceptance, rollbacks, width),
        )

    def _problem(self, where: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(where, message, hint))

    def _attempt(self, where: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except GraphError as error:
            self.problems += error.problems
        except DraftloomError as error:
            self._problem(where, error.message, error.hint)
        return None

    # --- target ------------------------------------------------------------------------------

    def _model(self) -> ModelInfo:
        if self.loaded is not None:
            return ModelInfo.from_model(self.loaded.model)
        path = self.plugins.locate_model(self.spec.target)
        return ModelInfo.from_path(path, self.spec.target or path.parent.name)

    def _check_dtype(self) -> None:
        if self.spec.dtype not in DTYPES:
            self._problem(
                "dtype", f"unknown type {self.spec.dtype!r}", did_you_mean(self.spec.dtype, DTYPES)
            )

    def _check_kv_cache(self, adapter: Any, name: str, model: ModelInfo) -> None:
        settings = self.spec.kv_cache
        if settings is None:
            return
        if not isinstance(adapter, QuantizesKV):
            reason = f"adapter {name!r} does not say whether it serves them"
        else:
            reason = adapter.why_not_quantized_kv(model, settings)
        if reason:
            message = f"{model.model_type} cannot run on quantized caches: {reason}"
            self._problem("kv_cache", message, "leave kv_bits out")

    def _resolve_kernels(self, target: TargetInfo) -> None:
        self._kernels, problems = resolve_kernels(self.spec.kernels, self.plugins)
        self.problems += problems
        if not problems:
            self._without_use = without_use(self._kernels, self.plugins, target)

    def _sampling(self, vocab_size: int) -> SamplingParams:
        known = (*SAMPLING_KEYS, "logits_processors")
        unknown = [name for name, _ in self.spec.sampling if name not in known]
        if unknown:
            raise UsageError(
                f"unknown parameter {unknown[0]!r}", did_you_mean(unknown[0], SAMPLING_KEYS)
            )
        params = SamplingParams(**dict(self.spec.sampling))
        params.check_vocabulary(vocab_size)
        return params

    # --- components --------------------------------------------------------------------------

    def _make(self, kind: str, spec: ComponentSpec | None) -> Any:
        if spec is None:
            return None

        def make() -> Any:
            component = self.plugins.component(kind, spec.use)
            options = self._options(component.info, dict(spec.options))
            return None if options is None else component.make(options)

        return self._attempt(kind, make)

    def _options(self, info: ComponentInfo, options: dict[str, Any]) -> dict[str, Any] | None:
        """Options as the factory takes them: models located, nested drafters made. None where a
        nested one has problems, which are noted."""
        for name in info.model_options:
            given = options.get(name)
            if isinstance(given, str):
                options[name] = self.plugins.locate_model(given)
                self._folders.append(options[name])
            if name in info.checkpoint_options and isinstance(options.get(name), Path):
                model = ModelInfo.from_path(options[name], str(given))
                options[name] = self.plugins.describe_checkpoint(model) or options[name]
        for name in info.nested_options:
            if name in options:
                stages = options[name]
                stages = stages if isinstance(stages, tuple | list) else (stages,)
                made = [self._attempt("drafter", partial(self._nested, s)) for s in stages]
                if None in made:
                    return None
                options[name] = tuple(made)
        return options

    def _nested(self, stage: Any) -> Any:
        if not isinstance(stage, str | ComponentSpec | Mapping):
            return stage
        spec = ComponentSpec.of(stage)
        if spec.use == "auto" and self._auto is not None:
            spec = self._auto
        spec = self._with_checkpoint(self._known_drafter(spec))
        return self._make("drafter", spec)

    def _drafter(self, target: TargetInfo, model: ModelInfo) -> Any:
        self._auto = self.plugins.drafter_for(target, model)
        spec = self.spec.drafter
        if spec.use == "auto":
            if self._auto is None:
                self._problem(
                    "drafter",
                    f"no drafter is known for {target.name}",
                    "name one: --drafter CHECKPOINT, prompt-lookup or none",
                )
                return None
            spec = _joined(self._auto, spec)
        resolved = self._attempt("drafter", lambda: self._known_drafter(spec))
        if resolved is None:
            return None
        resolved = self._with_checkpoint(resolved)
        self.spec = attrs.evolve(self.spec, drafter=resolved)
        return self._make("drafter", resolved)

    def _with_checkpoint(self, spec: ComponentSpec) -> ComponentSpec:
        """`dflash` without a checkpoint, for a target whose checkpoint is known, means that one."""
        known = self._auto
        return _joined(known, spec) if known is not None and spec.use == known.use else spec

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
        return _joined(found, spec)

    def _width_spec(self, drafter: Any) -> ComponentSpec | None:
        spec = self.spec.width
        if drafter is None and spec.use == "auto":
            return None
        if drafter is None and spec.use == "fixed" and "tokens" not in dict(spec.options):
            return None
        if spec.use == "auto" and not drafter.info.default_width:
            spec = ComponentSpec.make("fixed", {"tokens": 0})  # there is nothing to choose
            self.spec = attrs.evolve(self.spec, width=spec)
        elif spec.use == "auto":
            options = {"default": drafter.info.default_width, **dict(spec.options)}
            spec = ComponentSpec.make("auto", options)
            self.spec = attrs.evolve(self.spec, width=spec)
        elif spec.use == "fixed" and "tokens" not in dict(spec.options):
            options = {"tokens": drafter.info.default_width, **dict(spec.options)}
            if drafter.info.paired:  # a width that nobody chose need not be kept
                options.setdefault("park", True)
            spec = ComponentSpec.make("fixed", options)
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
                    self._problem("rollback", f"none known for {kind}", hint)
                    continue
                spec = ComponentSpec(name)
            rollback = self._make("rollback", spec)
            if rollback is None:
                continue
            if kind not in rollback.info.cache_kinds:
                serves = ", ".join(rollback.info.cache_kinds)
                self._problem(
                    "rollback",
                    f"{rollback.info.name!r} cannot take back {kind} caches",
                    f"it serves {serves}",
                )
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
                self._problem(
                    "rollback",
                    f"{spec.use!r} serves no cache of this target",
                    f"it has {', '.join(kinds)} caches",
                )
            return dict.fromkeys(served, spec)
        chosen = {}
        for name, component_spec in spec:
            kind = canonical(name)
            if kind not in set(CacheKind):
                hint = did_you_mean(kind, [str(k) for k in CacheKind])
                self._problem("rollback", f"unknown cache kind {name!r}", hint)
            elif kind in kinds:
                chosen[CacheKind(kind)] = component_spec
        return chosen

    # --- graph -------------------------------------------------------------------------------

    def _graph(
        self, target: TargetInfo, made: tuple[Any, ...], rollbacks: Mapping[CacheKind, Any]
    ) -> tuple[Graph | None, dict[str, CycleNode]]:
        nodes: dict[str, CycleNode] = {}
        if any(component is None for component in made):
            self._check_inserts()
            return None, nodes
        drafter, verifier, acceptance, width = made[:4]
        notes: tuple[tuple[str, str], ...] = (
            ("target", f"{target.name} ({target.model_type}, {target.num_layers} layers)"),
            ("adapter", target.adapter),
            ("dtype", self.spec.dtype),
            *_checkpoint_note(drafter),
            *((c.info.name, c.info.details) for c in made if c.info.details),
        )
        if self.spec.kv_cache is not None:
            notes += (("kv cache", str(self.spec.kv_cache)),)
        if self._kernels.choices:
            notes += (("kernels", str(self._kernels)),)
        notes += tuple(("kernels", note) for note in self._without_use)
        notes += tuple(("self-test", note) for note in self._kernels.notes)
        if not acceptance.info.lossless:
            notes += (
                (
                    "output",
                    f"lossy: acceptance {acceptance.info.name!r} may leave the target's own text",
                ),
            )
        standard = standard_nodes(
            width_name(width),
            drafter.info.name,
            verifier.info.name,
            acceptance.info.name,
            rollback_name(rollbacks),
        )
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

    def _check_inserts(self) -> None:
        """Without a whole graph, still say what is wrong with the inserted nodes and places."""
        places = {node.name for node in standard_nodes("", "", "", "", "")}
        places |= {insert.component.use for insert in self.spec.inserts}
        for insert in self.spec.inserts:
            self._make("node", insert.component)
            place = insert.after or insert.before
            if place not in places:
                hint = did_you_mean(place, places)
                self._problem("insert", f"no node named {place!r} to insert at", hint)

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
            info: ComponentInfo = component.info
            if isinstance(component, Checkable):
                check = partial(_all_problems, component, target)
                self.problems += self._attempt(info.name, check) or ()
            if Need.TAPE in info.needs and not any(
                kind in target.tape_kinds for kind in info.cache_kinds
            ):
                self._problem(
                    info.name,
                    "needs a tape, which no layer can record",
                    f"adapter {target.adapter!r} records none; use snapshot",
                )
        if drafter is not None:
            self._check_drafter(target, drafter, acceptance, width)
        greedy_only = acceptance is not None and acceptance.info.preserves is Preserves.GREEDY
        if greedy_only and sampling is not None and not sampling.greedy:
            message = f"{acceptance.info.name!r} is greedy, temperature is not 0"
            self._problem("acceptance", message, "use speculative-sampling")

    def _check_drafter(self, target: TargetInfo, drafter: Any, acceptance: Any, width: Any) -> None:
        info = drafter.info
        if info.tap_layers and not target.can_tap:
            message = f"needs hidden states, adapter {target.adapter!r} has no taps"
            why = target.why_no_taps and f"{target.model_type}: {target.why_no_taps}"
            self._problem(info.name, message, why)
        outside = [layer for layer in info.tap_layers if not 0 <= layer < target.num_layers]
        if outside:
            self._problem(
                info.name,
                f"reads layers {outside}, the target has {target.num_layers}",
                "is this the drafter of another target?",
            )
        wants_law = acceptance is not None and Need.DRAFT_PROBS in acceptance.info.needs
        if wants_law and info.law is DraftLaw.DETERMINISTIC:
            message = f"needs q, drafter {info.name!r} has none"
            self._problem(acceptance.info.name, message)
        tokens = getattr(width, "tokens", None)
        if tokens is not None and info.max_width is not None and tokens > info.max_width:
            message = f"block size {tokens + 1} is above the drafter's {info.max_width + 1}"
            hint = f"{info.name!r} proposes at most {info.max_width} tokens"
            self._problem("width", message, hint)


def _checkpoint_note(drafter: Any) -> tuple[tuple[str, str], ...]:
    """What the drafter's checkpoint is, where it has one that a format read."""
    found = getattr(drafter, "description", None)
    if not isinstance(found, DrafterDescription):
        return ()
    note = f"{found.name} (format {found.format}, block {found.block_size})"
    if found.unread:
        note += f", keys not read: {', '.join(found.unread)}"
    return (("checkpoint", note),)


def _joined(known: ComponentSpec, given: ComponentSpec) -> ComponentSpec:
    """A known component with the options that were given on top."""
    return ComponentSpec.make(known.use, {**dict(known.options), **dict(given.options)})


def _all_problems(component: Checkable, target: TargetInfo) -> list[Problem]:
    return list(component.check(target))
