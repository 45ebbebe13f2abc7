"""Third-party plugins: what they may do, what is refused and how it is said, who is asked first."""

import importlib.util
import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import pytest

import draftloom
from draftloom import (
    CacheKind,
    ComponentInfo,
    ComponentSpec,
    Draft,
    Drafter,
    DrafterDescription,
    DrafterMismatchWarning,
    DraftLaw,
    GenerationError,
    GraphError,
    LoadedModel,
    ModelInfo,
    PipelineBuilder,
    PluginError,
    PluginManager,
    Problem,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
    hookimpl,
    hookspecs,
)
from draftloom.drafters.formats import describe_checkpoint
from draftloom.drafters.none import NoDrafter

from .fakes import ATTENTION, DFLASH, PROMPT, Offer, model, plain, plugins, write_config


class Options:
    """A drafter with a required and an optional option."""

    info = ComponentInfo("options")

    def __init__(self, folder: str, depth: int = 3) -> None:
        if depth < 1:
            raise ValueError("depth must be positive")
        self.folder, self.depth = folder, depth


class Bare(NoDrafter):
    """A drafter without options."""

    info = ComponentInfo("bare", "drafts nothing")


class Stranger(NoDrafter):
    """Made for another target."""

    info = ComponentInfo(
        "stranger", law=DraftLaw.DETERMINISTIC, paired=("stranger",), model_options=("folder",)
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def propose(self, anchor: Any, width: int, sampling: Any) -> Draft:
        return Draft.deterministic(mx.zeros((1, 1), dtype=mx.int32))


# --- names -----------------------------------------------------------------------------------


def test_plugins_are_listed_without_mlx_lm() -> None:
    """It takes long to import, above all where torch is installed."""
    program = (
        "import sys\n"
        "from draftloom.plugins import PluginManager\n"
        "assert PluginManager().names('kernel')\n"
        "print({'mlx_lm', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_a_registered_component_is_found_by_either_spelling() -> None:
    manager = plugins(Offer(drafter={"my-lab.bare-one": Bare}))
    assert manager.component("drafter", "my-lab.bare-one").load() is Bare
    assert manager.component("drafter", " My_Lab.Bare_One ").load() is Bare
    assert "my-lab.bare-one" in manager.names("drafter")


def test_kinds_have_name_spaces_of_their_own() -> None:
    manager = plugins(Offer(drafter={"greedy": Bare}))
    assert manager.component("drafter", "greedy").plugin == "offer"
    assert manager.component("acceptance", "greedy").plugin == "draftloom.verifiers.plugin"


def test_a_taken_name_is_refused_and_both_plugins_are_named() -> None:
    with pytest.raises(PluginError) as caught:
        plugins(Offer("second-lab", drafter={"dflash": Bare}))
    message = str(caught.value)
    assert "'second-lab'" in message
    assert "'draftloom.drafters.plugin'" in message
    assert "my-lab.dflash" in message, "and a way out is shown"


def test_two_third_parties_cannot_share_a_name() -> None:
    one, two = (Offer(name, node={"probe": Bare}) for name in ("lab-one", "lab-two"))
    with pytest.raises(PluginError, match=r"'lab-two'.*'probe'.*'lab-one'"):
        plugins(one, two)


@pytest.mark.parametrize("name", ["MyDrafter", "my_drafter", " padded", "x "])
def test_a_name_in_another_spelling_is_refused(name: str) -> None:
    with pytest.raises(PluginError, match="names are lower case with hyphens"):
        plugins(Offer(drafter={name: Bare}))


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no drafter named 'dflsh' \(did you mean 'dflash'"):
        plugins().component("drafter", "dflsh")


def test_the_same_plugin_twice_is_refused() -> None:
    with pytest.raises(PluginError, match="offer"):
        plugins(Offer(), Offer())


# --- hooks that do not fit -------------------------------------------------------------------


class ExtraArgument:
    @hookimpl
    def cycle_finished(self, event: Any, pipeline: Any) -> None: ...


class UnknownHook:
    @hookimpl
    def register_drafter(self, register: Any) -> None: ...


class NoArgument:
    @hookimpl
    def register_drafters(self) -> None: ...


class FailingRegister:
    @hookimpl
    def register_drafters(self, register: Any) -> None:
        raise ZeroDivisionError("the lab is closed")


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (ExtraArgument, "pipeline"),
        (UnknownHook, "register_drafter"),
        (NoArgument, "register_drafters"),
        (FailingRegister, "ZeroDivisionError: the lab is closed"),
    ],
)
def test_a_plugin_that_does_not_fit_is_an_error_that_names_it(plugin: type, expected: str) -> None:
    with pytest.raises(PluginError) as caught:
        plugins(plugin())
    assert plugin.__name__ in str(caught.value)
    assert expected in str(caught.value)


# --- making components -----------------------------------------------------------------------


def test_a_factory_named_by_text_is_imported_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "antigravity_of_my_lab"
    monkeypatch.setitem(sys.modules, name, None)  # importing it now would fail
    manager = plugins(Offer(drafter={"lazy": f"{name}:Lab"}))
    component = manager.component("drafter", "lazy")
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, None))
    module.Lab = Bare
    monkeypatch.setitem(sys.modules, name, module)
    assert isinstance(component.make({}), Bare)
    assert component.info.name == "bare"


@pytest.mark.parametrize(
    "text", ["no_such_module_of_mine:Lab", "draftloom.spec:NoSuchClass", "draftloom.spec", ":Lab"]
)
def test_a_text_that_names_nothing_says_plugin_and_text(text: str) -> None:
    component = plugins(Offer("my-lab", drafter={"lazy": text})).component("drafter", "lazy")
    with pytest.raises(PluginError, match="cannot be imported") as caught:
        component.make({})
    assert "'my-lab'" in str(caught.value)
    assert repr(text) in str(caught.value)


def test_options_reach_the_factory() -> None:
    component = plugins(Offer(drafter={"options": Options})).component("drafter", "options")
    assert vars(component.make({"folder": "x", "depth": 5})) == {"folder": "x", "depth": 5}
    assert component.make({"folder": "x"}).depth == 3
    assert list(component.options) == ["folder", "depth"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": "x", "dept": 1}, "has no option 'dept' (did you mean 'depth'? known: "),
        ({}, "drafter 'options' needs the option 'folder'"),
        ({"folder": "x", "depth": 0}, "drafter 'options': depth must be positive"),
    ],
)
def test_wrong_options_are_a_user_error(options: dict[str, Any], message: str) -> None:
    component = plugins(Offer(drafter={"options": Options})).component("drafter", "options")
    with pytest.raises(UsageError) as caught:
        component.make(options)
    assert message in str(caught.value)


def test_a_class_without_constructor_takes_no_option() -> None:
    class Inherits(Drafter):
        info = ComponentInfo("inherits")

        def open(self, request: Any) -> Any:
            return self

    component = plugins(Offer(drafter={"inherits": Inherits})).component("drafter", "inherits")
    assert isinstance(component.make({}), Inherits)
    with pytest.raises(UsageError, match="has no option 'depth'"):
        component.make({"depth": 1})


def test_a_component_without_info_is_refused() -> None:
    component = plugins(Offer("my-lab", drafter={"x": object})).component("drafter", "x")
    with pytest.raises(PluginError, match=r"drafter 'x' of plugin 'my-lab' has no ComponentInfo"):
        _ = component.info


# --- installed plugins -----------------------------------------------------------------------

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution with one entry point; its module is gone after the test."""

    def install(distribution: str, entry: str, module: str, source: str) -> None:
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
        )
        (info / "entry_points.txt").write_text(f"[draftloom]\n{entry} = {module}\n")
        (folder / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(folder)

    before = set(sys.modules)
    yield install
    for name in set(sys.modules) - before:
        if name.startswith("acme"):
            del sys.modules[name]


GOOD = """
from draftloom import hookimpl
from draftloom.drafters.none import NoDrafter

@hookimpl
def register_drafters(register):
    register("NAME.drafter", NoDrafter)
"""


def test_an_installed_plugin_is_found_and_listed(install: Install) -> None:
    install("acme-lab", "acme", "acme_good", GOOD.replace("NAME", "acme"))
    manager = PluginManager()
    assert "acme.drafter" in manager.names("drafter")
    listed = {plugin.name: plugin for plugin in manager.plugins()}
    assert (listed["acme"].distribution, listed["acme"].version) == ("acme-lab", "1.2")
    assert listed["acme"].hooks == ("register_drafters",)
    assert listed["acme"].components == (("drafter", "acme.drafter"),)
    assert "acme.drafter" not in PluginManager(entry_points=False).names("drafter")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("raise RuntimeError('needs a licence')", "needs a licence"),
        (GOOD.replace("NAME.drafter", "dflash"), "'dflash'"),
        (GOOD.replace("register(", "undefined("), "NameError"),
        (GOOD.replace("(register)", "(register, more)"), "more"),
    ],
    ids=["import", "syntax", "raises", "taken name", "failing hook", "wrong signature"],
)
def test_a_broken_plugin_names_its_distribution(install: Install, source: str, reason: str) -> None:
    install("acme-broken", "acme", "acme_broken", source)
    with pytest.raises(PluginError) as caught:
        PluginManager()
    assert "acme-broken" in str(caught.value)
    assert reason in str(caught.value)


def test_two_distributions_with_one_entry_point_name_are_both_named(install: Install) -> None:
    install("acme-one", "acme", "acme_one", GOOD.replace("NAME", "one"))
    install("acme-two", "acme", "acme_two", GOOD.replace("NAME", "two"))
    with pytest.raises(PluginError) as caught:
        PluginManager()
    assert "acme-one" in str(caught.value)
    assert "acme-two" in str(caught.value)


def test_one_distribution_found_twice_is_loaded_once(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme-lab", "acme", "acme_good", GOOD.replace("NAME", "acme"))
    shutil.copytree(tmp_path / "acme-lab", tmp_path / "copy")
    monkeypatch.syspath_prepend(tmp_path / "copy")
    assert "acme.drafter" in PluginManager().names("drafter")


def test_listing_of_built_ins() -> None:
    listed = plugins().plugins()
    assert {plugin.distribution for plugin in listed} == {"draftloom"}
    components = {component for plugin in listed for component in plugin.components}
    assert {("drafter", "dflash"), ("rollback", "trim"), ("acceptance", "greedy")} <= components


# --- who is asked first ----------------------------------------------------------------------


def description(**changes: Any) -> DrafterDescription:
    """A checkpoint of a third party's own format."""
    found = describe_checkpoint(ModelInfo("theirs", None, DFLASH))
    assert found is not None
    return attrs.evolve(found, format="my-lab", **changes)


class Claims:
    """An adapter that claims every model."""

    @classmethod
    def claims(cls, model: ModelInfo) -> bool:
        return True

    @classmethod
    def describe(cls, model: ModelInfo) -> Any:
        raise UsageError("described by a third party")


def test_third_parties_are_asked_before_the_built_ins(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "theirs")

    class Theirs:
        @hookimpl
        def locate_model(self, reference: str) -> Path | None:
            return folder if reference == "python-17m" else None

        @hookimpl
        def resolve_cache_rollback(self, cache_kind: CacheKind, target: Any) -> str:
            return "snapshot"

        @hookimpl
        def resolve_drafter_checkpoint(self, model: ModelInfo) -> ComponentSpec:
            return ComponentSpec("none")

        @hookimpl
        def read_drafter_checkpoint(self, model: ModelInfo) -> DrafterDescription:
            return description(drafter="my-lab.missing")

    ours, theirs = plugins(), plugins(Theirs())
    info = ModelInfo.from_path(folder)
    assert ours.locate_model("python-17m") != folder
    assert theirs.locate_model("python-17m") == folder
    assert theirs.locate_model("") == ours.locate_model(""), "None passes the question on"
    assert ours.rollback_for(CacheKind.ATTENTION, None) == "trim"
    assert theirs.rollback_for(CacheKind.ATTENTION, None) == "snapshot"
    assert ours.drafter_for_checkpoint(info).use == "autoregressive"
    assert theirs.drafter_for_checkpoint(info).use == "none"
    assert ours.describe_checkpoint(info) is None
    with pytest.raises(UnsupportedModelError, match=r"'my-lab\.missing', which nobody registers"):
        theirs.describe_checkpoint(info)


def test_a_third_partys_adapter_may_claim_a_model_that_a_built_in_serves(tmp_path: Path) -> None:
    info = ModelInfo.from_path(write_config(tmp_path / "m"))
    assert plugins().adapter_for(info).name == "attention"
    assert plugins(Offer(adapter={"my-lab.all": Claims})).adapter_for(info).name == "my-lab.all"


def test_resolving_an_adapter_beats_claiming(tmp_path: Path) -> None:
    class Resolves:
        @hookimpl
        def resolve_target_adapter(self, model: ModelInfo) -> str:
            return "attention"

    info = ModelInfo.from_path(write_config(tmp_path / "m"))
    manager = plugins(Offer(adapter={"my-lab.all": Claims}), Resolves())
    assert manager.adapter_for(info).name == "attention"


def test_a_model_that_nobody_claims_names_the_adapters_asked(tmp_path: Path) -> None:
    info = ModelInfo.from_path(write_config(tmp_path / "m", model_type="mamba9"), "me/mamba")
    with pytest.raises(UnsupportedModelError) as caught:
        plugins().adapter_for(info)
    assert "no adapter claims model type 'mamba9' of me/mamba" in str(caught.value)
    for name in plugins().names("adapter"):
        assert name in str(caught.value)
    assert "write-an-adapter" in str(caught.value)


def test_a_reference_that_nobody_knows() -> None:
    with pytest.raises(UnsupportedModelError, match="'no-such-pair' is neither a model folder"):
        plugins().locate_model("no-such-pair")


def test_managers_share_nothing() -> None:
    plugins(Offer(drafter={"my-lab.bare": Bare}))
    assert "my-lab.bare" not in plugins().names("drafter")


# --- every hook ------------------------------------------------------------------------------

HOOKS = {
    name: function
    for name, function in vars(hookspecs).items()
    if inspect.isfunction(function) and hasattr(function, "draftloom_spec")
}


class RecordingPlugin:
    """Implements every hook and notes each call."""

    def __init__(self, folder: Path) -> None:
        self.calls: dict[str, list[Any]] = {}
        self._folder = folder

    def _note(self, value: Any = None) -> None:
        caller = sys._getframe(1).f_code.co_name
        self.calls.setdefault(caller, []).append(value)

    @hookimpl
    def register_target_adapters(self, register: Any) -> None:
        self._note(register("recording.adapter", Claims))

    @hookimpl
    def register_drafters(self, register: Any) -> None:
        register("recording.stranger", Stranger)
        self._note(register("recording.drafter", Bare))

    @hookimpl
    def register_verifiers(self, register: Any) -> None:
        self._note(register("recording.verifier", Bare))

    @hookimpl
    def register_acceptance_policies(self, register: Any) -> None:
        self._note(register("recording.acceptance", Bare))

    @hookimpl
    def register_cache_rollbacks(self, register: Any) -> None:
        self._note(register("recording.rollback", Bare))

    @hookimpl
    def register_width_policies(self, register: Any) -> None:
        self._note(register("recording.width", Bare))

    @hookimpl
    def register_nodes(self, register: Any) -> None:
        self._note(register("recording.node", FailsAfter))

    @hookimpl
    def register_kernels(self, register: Any) -> None:
        self._note(register("recording/kernel", Bare))

    @hookimpl
    def register_commands(self, cli: Any) -> None:
        self._note(cli.command("recording-command")(lambda: None))

    @hookimpl
    def locate_model(self, reference: str) -> Path | None:
        self._note(reference)
        return self._folder if reference == "recording:tiny" else None

    @hookimpl
    def fetch_weights(self, path: Path) -> None:
        self._note(path)

    @hookimpl
    def load_model(self, model: ModelInfo, dtype: str) -> LoadedModel:
        self._note((model.name, dtype))
        from .fakes import model as tiny

        return LoadedModel(tiny(), None)

    @hookimpl
    def estimate_weights(self, model: ModelInfo, dtype: str) -> draftloom.WeightEstimate:
        self._note((model.name, dtype))
        return draftloom.WeightEstimate(1000, mx.float32)

    @hookimpl
    def resolve_target_adapter(self, model: ModelInfo) -> str:
        self._note(model.model_type)
        return "attention"

    @hookimpl
    def resolve_cache_rollback(self, cache_kind: CacheKind, target: Any) -> str:
        self._note(cache_kind)
        return "snapshot"

    @hookimpl
    def resolve_drafter(self, target: Any, model: ModelInfo) -> ComponentSpec:
        self._note(target.name)
        return ComponentSpec("recording.drafter")

    @hookimpl
    def read_drafter_checkpoint(self, model: ModelInfo) -> DrafterDescription:
        self._note(model.name)
        return description()

    @hookimpl
    def resolve_drafter_checkpoint(
        self, model: ModelInfo, describe: Callable[[], DrafterDescription | None]
    ) -> ComponentSpec:
        self._note((model.name, describe()))
        return ComponentSpec("recording.drafter")

    @hookimpl
    def check_graph(self, graph: Any) -> list[Problem]:
        self._note(graph.names)
        return [Problem("recording", "too quiet")] if "recording.node#2" in graph.names else []

    @hookimpl
    def prefill_finished(self, event: Any) -> None:
        self._note(event)

    @hookimpl
    def cycle_finished(self, event: Any) -> None:
        self._note(event)

    @hookimpl
    def drafter_mismatched(self, event: Any) -> None:
        self._note(event)

    @hookimpl
    def generation_finished(self, event: Any) -> None:
        self._note(event)

    @hookimpl
    def generation_failed(self, event: Any) -> None:
        self._note(event)


class FailsAfter:
    """A node that fails at its n-th call."""

    info = ComponentInfo("recording.node")

    def __init__(self, calls: int) -> None:
        self._left = calls

    def __call__(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("the probe is broken")


@pytest.fixture
def recording(tmp_path: Path) -> RecordingPlugin:
    return RecordingPlugin(write_config(tmp_path / "tiny"))


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_every_hook_is_documented(name: str) -> None:
    documentation = inspect.getdoc(HOOKS[name])
    assert documentation, f"{name} needs a docstring"
    assert documentation.partition("\n")[0].endswith((".", ")."))


def test_the_recording_plugin_implements_every_hook() -> None:
    assert len(HOOKS) >= 20
    implemented = {
        name
        for name, function in vars(RecordingPlugin).items()
        if hasattr(function, "draftloom_impl")
    }
    assert implemented == set(HOOKS)
    for name, specification in HOOKS.items():
        ours = inspect.signature(getattr(RecordingPlugin, name)).parameters
        assert [n for n in ours if n != "self"] == list(
            inspect.signature(specification).parameters
        ), name


def test_every_hook_is_called(recording: RecordingPlugin, tmp_path: Path) -> None:
    calls = recording.calls
    manager = plugins(recording)
    builder = PipelineBuilder("recording:tiny", plugins=manager).own_width()
    with builder.build() as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=4)
    assert result.token_ids == plain(model(), PROMPT, 4)
    assert pipeline.names["drafter"] == "bare"
    assert pipeline.names["rollback"] == "snapshot"

    checkpoint = write_config(tmp_path / "checkpoint")
    failing = builder.drafter(str(checkpoint)).insert("recording.node", after="verify", calls=2)
    with failing.build() as pipeline, pytest.raises(GenerationError, match="the probe is broken"):
        pipeline.generate(PROMPT, max_tokens=6)
    with builder.drafter("recording.stranger", folder=str(checkpoint)).build() as pipeline:
        pipeline._parts.monitor._evidence = 20.0  # rings whatever the first cycle brings
        with pytest.warns(DrafterMismatchWarning):
            pipeline.generate(PROMPT, max_tokens=3)

    with pytest.raises(GraphError, match="recording: too quiet"):
        failing.insert("recording.node", after="read", calls=1).check()

    if importlib.util.find_spec("draftloom.apps.cli"):
        from draftloom.apps.cli import build_app
        from draftloom.apps.cli.state import CliState

        app = build_app(CliState(manager))
        assert "recording-command" in [command.name for command in app.registered_commands]

    assert set(calls) == set(HOOKS)
    assert calls["locate_model"][0] == "recording:tiny"
    assert calls["load_model"][0] == ("recording:tiny", "auto")
    assert calls["estimate_weights"][0] == ("recording:tiny", "auto")
    assert calls["fetch_weights"] == [checkpoint]
    assert calls["resolve_target_adapter"][0] == ATTENTION["model_type"]
    assert set(calls["resolve_cache_rollback"]) == {CacheKind.ATTENTION}
    assert calls["resolve_drafter"][0] == "recording:tiny"
    assert calls["resolve_drafter_checkpoint"] == [(str(checkpoint), description())] * 2
    assert calls["read_drafter_checkpoint"] == [str(checkpoint)] * 2
    assert [event.prompt_tokens for event in calls["prefill_finished"]] == [len(PROMPT)] * 3
    assert [event.index for event in calls["cycle_finished"]][:5] == [1, 2, 3, 1, 1]
    assert [stats.generated_tokens for stats in calls["generation_finished"]] == [4, 3]
    assert [event.drafter for event in calls["drafter_mismatched"]] == ["stranger"]
    (failure,) = calls["generation_failed"]
    assert failure.generated_tokens == 2
    assert "the probe is broken" in failure.message


class Anything:
    """An adapter that serves everything, or nothing."""

    info = ComponentInfo("claims")
    claimed = True

    @classmethod
    def claims(cls, model: ModelInfo) -> bool:
        return cls.claimed


class Lazy(Anything):
    claimed = False


def test_two_plugins_that_claim_one_model_are_named() -> None:
    one = Offer(adapter={"one.adapter": Anything}, name="one")
    two = Offer(adapter={"two.adapter": Anything}, name="two")
    info = ModelInfo("lab/model", None, {"model_type": "qwen3"})
    for alone in (one, two):
        assert plugins(alone).adapter_for(info).plugin == alone.__name__, "before the built-in ones"
    idle = Offer(adapter={"idle.adapter": Lazy}, name="idle")
    assert plugins(idle, one).adapter_for(info).name == "one.adapter"
    assert plugins(idle).adapter_for(info).name == "attention"
    with pytest.raises(
        PluginError, match="model type 'qwen3' of lab/model is claimed by two"
    ) as no:
        plugins(one, idle, two).adapter_for(info)
    for word in ("'one.adapter' of plugin 'one'", "'two.adapter' of plugin 'two'"):
        assert word in no.value.message
    assert "resolve_target_adapter" in no.value.hint


def test_registered_components_of_every_kind(recording: RecordingPlugin) -> None:
    manager = plugins(recording)
    from draftloom.plugins import KINDS

    for kind in KINDS:
        assert any(name.startswith("recording") for name in manager.names(kind)), kind


def test_the_version_is_that_of_the_package() -> None:
    from importlib import metadata

    assert draftloom.__version__ == metadata.version("draftloom")
