"""The training run: it goes on from where it was killed, stops when told, and keeps what it has."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from draftloom.apps.train import checkpoint, pace
from draftloom.apps.train.curves import curves_html
from draftloom.apps.train.data import read_corpus
from draftloom.apps.train.design import DrafterDesign
from draftloom.apps.train.features import FeatureError
from draftloom.apps.train.loop import Trainer, TrainRequest
from draftloom.apps.train.responses import ResponseSettings
from draftloom.apps.train.settings import TrainSettings
from draftloom.apps.train.toy import make_toy
from draftloom.errors import DraftloomError, ModelError, UsageError
from draftloom.plugins import PluginManager

STEPS = 6


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that learned nothing: these tests look at the machinery."""
    return make_toy(tmp_path_factory.mktemp("toy"), steps=1)


@pytest.fixture(scope="module")
def plugins() -> PluginManager:
    return PluginManager(entry_points=False)


def request_for(toy: Path, out: Path, **changes: Any) -> TrainRequest:
    names = {a.name for a in attrs.fields(TrainSettings)}
    settings = TrainSettings(
        **{
            "steps": STEPS, "batch": 2, "accumulate": 2, "context": 24, "anchors": 4,
            "eval_prompts": 1, "eval_tokens": 4, "eval_every": 0, "save_every": 3, "log_every": 1,
            **{k: v for k, v in changes.items() if k in names},
        }
    )  # fmt: skip
    return TrainRequest(
        target=str(toy / "target"),
        data=(toy / "texts.jsonl",),
        out=out,
        settings=settings,
        design=DrafterDesign() if "init" in changes else DrafterDesign(block_size=4, layers=1),
        **{k: v for k, v in changes.items() if k not in names},
    )


def train(request: TrainRequest, plugins: PluginManager, stop_at: int = 0) -> list[dict[str, Any]]:
    """Run, until step `stop_at` where one is given; the records."""
    records: list[dict[str, Any]] = []
    trainer = Trainer(request, plugins, records.append)
    try:
        finished = trainer.run(lambda: trainer.state.step == stop_at)
        assert finished == (stop_at == 0)
    finally:
        trainer.close()
    return records


def losses(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every logged step."""
    lines = (out / "training" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in records if r["kind"] == "step"]


def weights(out: Path) -> dict[str, Any]:
    arrays = mx.load(str(out / "training" / "state.safetensors"))
    assert isinstance(arrays, dict)
    return {name: value.tolist() for name, value in arrays.items()}


class KilledError(Exception):
    """Stands for the process being killed."""


@pytest.fixture(scope="module")
def whole(toy: Path, plugins: PluginManager, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted."""
    mx.set_default_device(mx.cpu)
    out = tmp_path_factory.mktemp("whole") / "out"
    train(request_for(toy, out), plugins)
    return out


@pytest.mark.parametrize("killed_after", [4, 5])
def test_killed_run_resumes_to_the_same_losses(
    toy: Path, plugins: PluginManager, whole: Path, tmp_path: Path, killed_after: int
) -> None:
    """Killed one and two steps after the last save: what was not saved is made again."""
    out = tmp_path / "out"

    def kill() -> bool:
        if trainer.state.step == killed_after:
            raise KilledError
        return False

    trainer = Trainer(request_for(toy, out), plugins)
    try:
        with pytest.raises(KilledError):
            trainer.run(kill)
    finally:
        trainer.close()
    assert len(losses(out)) == killed_after
    mx.random.seed(12345)  # nothing may depend on the global state
    train(request_for(toy, out, resume=True), plugins)
    assert losses(out) == losses(whole)
    assert [step for step, *_ in losses(out)] == list(range(1, STEPS + 1))
    assert weights(out) == weights(whole)
    drafter = (out / "model.safetensors", whole / "model.safetensors")
    assert drafter[0].read_bytes() == drafter[1].read_bytes()


def test_stopped_run_is_saved_and_goes_on(
    toy: Path, plugins: PluginManager, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(request_for(toy, out), plugins, stop_at=2)
    assert [step for step, *_ in losses(out)] == [1, 2]
    train(request_for(toy, out, resume=True), plugins)
    assert losses(out) == losses(whole)


def test_cached_features_give_the_same_losses(
    toy: Path, plugins: PluginManager, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(request_for(toy, out, cache=tmp_path / "features"), plugins)
    for mine, theirs in zip(losses(out), losses(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_run_on_own_responses_resumes_to_the_same_losses(
    toy: Path, plugins: PluginManager, tmp_path: Path
) -> None:
    def request(name: str, **changes: Any) -> TrainRequest:
        written = ResponseSettings(tokens=8, prompt_tokens=3, limit=12, batch=4)
        return request_for(toy, tmp_path / name, responses=written, steps=4, **changes)

    told = train(request("whole"), plugins)
    assert [r["done"] for r in told if r["kind"] == "responses"] == [4, 8, 12]
    train(request("stopped"), plugins, stop_at=3)
    told = train(request("stopped", resume=True), plugins)
    assert "responses" not in {r["kind"] for r in told}  # they are there
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    kept = tmp_path / "whole" / "training" / "responses"
    lines = [x for f in kept.glob("*.jsonl") for x in f.read_text().splitlines()]
    assert len(lines) == 12
    with pytest.raises(UsageError, match="other settings: responses"):
        train(request_for(toy, tmp_path / "whole", steps=4, resume=True), plugins)


def test_cut_log_line_of_a_killed_run_is_dropped(
    toy: Path, plugins: PluginManager, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(request_for(toy, out), plugins, stop_at=3)
    with (out / "training" / "log.jsonl").open("a") as file:
        file.write('{"kind": "st')
    train(request_for(toy, out, resume=True), plugins)
    assert losses(out) == losses(whole)


def test_checkpoint_is_in_the_public_layout(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["block_size"] == 4
    assert config["draftloom"]["context_length"] == 24
    assert config["dflash_config"] == {"target_layer_ids": [1, 2], "mask_token_id": 31}
    arrays = mx.load(str(whole / "model.safetensors"))
    assert isinstance(arrays, dict)
    layer = [
        "input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
        "post_attention_layernorm", "self_attn.k_norm", "self_attn.k_proj", "self_attn.o_proj",
        "self_attn.q_norm", "self_attn.q_proj", "self_attn.v_proj",
    ]  # fmt: skip
    names = {"fc.weight", "hidden_norm.weight", "norm.weight"}
    assert arrays.keys() == names | {f"layers.0.{n}.weight" for n in layer}
    assert {value.dtype for value in arrays.values()} == {mx.bfloat16}
    assert "Acceptance length" in (whole / "README.md").read_text()


def test_log_becomes_curves_and_held_out_prompts_are_kept(whole: Path) -> None:
    page = (whole / "training" / "curves.html").read_text()
    for title in ("Loss by step", "Right in training, by slot", "Acceptance length on held-out"):
        assert title in page
    assert "<script" not in page
    assert "src=" not in page
    lines = (whole / "training" / "held-out.jsonl").read_text().splitlines()
    assert len(lines) > 5  # of about 200
    corpus = read_corpus([whole / "training" / "held-out.jsonl"], None, 33, held_out=0.0, seed=0)
    assert len(corpus.train) == len(lines)
    assert "| data | `texts.jsonl` |" in (whole / "README.md").read_text()


def test_curves_of_a_long_log_stay_small() -> None:
    step = {"kind": "step", "right_by_position": [0.5, 0.25, 0.1], "tokens_per_second": 9.0}
    records = [{**step, "step": n, "loss": 1 / n} for n in range(1, 5001)]
    page = curves_html("long", records)
    assert page.count("<circle") <= 5 * 120
    assert "slot 2" in page
    assert "Acceptance" not in page


def test_run_starts_from_another_drafter(
    toy: Path, plugins: PluginManager, whole: Path, tmp_path: Path
) -> None:
    trainer = Trainer(request_for(toy, tmp_path / "out", init=whole), plugins)
    try:
        trainer.folder.save(trainer.state, trainer.drafter, "card")
    finally:
        trainer.close()
    model = "model.safetensors"
    assert (tmp_path / "out" / model).read_bytes() == (whole / model).read_bytes()


def test_init_with_another_shape_is_refused(
    toy: Path, plugins: PluginManager, whole: Path, tmp_path: Path
) -> None:
    request = request_for(toy, tmp_path / "out", init=whole)
    with pytest.raises(UsageError, match="own shape: layers, heads cannot be asked for"):
        Trainer(attrs.evolve(request, design=DrafterDesign(layers=1, heads=2)), plugins)


def test_init_of_another_target_is_refused(
    toy: Path, plugins: PluginManager, whole: Path, tmp_path: Path
) -> None:
    other = tmp_path / "init"
    other.mkdir()
    config = json.loads((whole / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))
    with pytest.raises(UsageError, match="made for vocab_size 99, the target has 33"):
        Trainer(request_for(toy, tmp_path / "out", init=other), plugins)


def test_failed_save_leaves_the_one_before(
    toy: Path, plugins: PluginManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(request_for(toy, out), plugins, stop_at=3)
    before = (out / "training" / "state.safetensors").read_bytes()
    full = OSError(28, "No space left on device")

    def refuse(*arguments: Any) -> None:
        raise full

    monkeypatch.setattr(checkpoint.mx, "save_safetensors", refuse)
    with pytest.raises(DraftloomError, match=r"step 6 cannot be saved .*No space left"):
        train(request_for(toy, out, resume=True), plugins)
    assert (out / "training" / "state.safetensors").read_bytes() == before


def test_log_that_cannot_be_written_is_told(
    toy: Path, plugins: PluginManager, tmp_path: Path
) -> None:
    trainer = Trainer(request_for(toy, tmp_path / "out", eval_prompts=0), plugins)
    try:
        trainer.run(lambda: trainer.state.step == 2)
        (tmp_path / "out" / "training" / "log.jsonl").unlink()
        (tmp_path / "out" / "training" / "log.jsonl").mkdir()
        with pytest.raises(DraftloomError, match=r"log\.jsonl cannot be written"):
            trainer.run()
    finally:
        trainer.close()


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 9}, {"learning_rate": 1.0}])
def test_resume_with_other_settings_is_refused(
    toy: Path, plugins: PluginManager, whole: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=f"other settings: {next(iter(change))}"):
        Trainer(request_for(toy, whole, resume=True, **change), plugins)


def test_folders_in_use_and_nothing_to_resume(
    toy: Path, plugins: PluginManager, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="holds a training run"):
        Trainer(request_for(toy, whole), plugins)
    with pytest.raises(UsageError, match="holds a model"):
        Trainer(request_for(toy, toy / "target"), plugins)
    with pytest.raises(UsageError, match="no training run to resume"):
        Trainer(request_for(toy, tmp_path / "out", resume=True), plugins)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        Trainer(request_for(toy, tmp_path / "file"), plugins)


def test_damaged_state_is_named(toy: Path, plugins: PluginManager, tmp_path: Path) -> None:
    state = tmp_path / "out" / "training" / "state.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"state\.safetensors cannot be read"):
        Trainer(request_for(toy, tmp_path / "out", resume=True), plugins)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context": 4}, "a context of 4 tokens is shorter than a block of 4"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"steps": None}, "a run needs an end"),
        ({"max_minutes": 0.0}, "max_minutes must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"loss": "mse"}, "no loss 'mse'"),
        ({"optimizer": "sgd"}, "no optimizer 'sgd'"),
        ({"held_out": 1.5}, "held_out is a share"),
        ({"warmup": -0.1}, "warmup is a share"),
        ({"alpha": 2.0}, "alpha lies"),
    ],
)
def test_settings_that_make_no_sense(
    toy: Path, plugins: PluginManager, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Trainer(request_for(toy, tmp_path / "out", **change), plugins)
    assert not (tmp_path / "out").exists()


def test_kl_needs_logits_that_a_cache_does_not_hold(
    toy: Path, plugins: PluginManager, tmp_path: Path
) -> None:
    with pytest.raises(FeatureError, match="KL"):
        Trainer(request_for(toy, tmp_path / "out", loss="kl", cache=tmp_path / "c"), plugins)


@pytest.mark.parametrize("change", [{"loss": "kl"}, {"weighting": "d-pace"}], ids=str)
def test_other_losses_run(
    toy: Path, plugins: PluginManager, tmp_path: Path, change: dict[str, Any]
) -> None:
    records = train(request_for(toy, tmp_path / "out", steps=2, **change), plugins)
    assert records[-1]["kind"] == "held-out"


def test_bfloat16_keeps_float32_masters(toy: Path, plugins: PluginManager, tmp_path: Path) -> None:
    trainer = Trainer(request_for(toy, tmp_path / "out", steps=1, compute="bfloat16"), plugins)
    try:
        trainer.run()
        flat: Any = tree_flatten(trainer.state.parameters)
        assert {value.dtype for _, value in flat} == {mx.float32}
    finally:
        trainer.close()


def test_loss_that_is_not_finite_ends_the_run(
    toy: Path, plugins: PluginManager, tmp_path: Path
) -> None:
    trainer = Trainer(request_for(toy, tmp_path / "out", steps=3), plugins)
    try:
        trainer.run(lambda: True)
        saved = (tmp_path / "out" / "training" / "state.safetensors").read_bytes()
        trainer.state.parameters["fc"]["weight"] *= float("nan")
        with pytest.raises(DraftloomError, match="at step 2 are not finite"):
            trainer.run()
    finally:
        trainer.close()
    assert (tmp_path / "out" / "training" / "state.safetensors").read_bytes() == saved


def test_target_is_put_back(toy: Path, plugins: PluginManager, tmp_path: Path) -> None:
    trainer = Trainer(request_for(toy, tmp_path / "out", steps=1), plugins)
    trainer.run()
    layers = trainer.target.model.model.layers
    tapped = [layer for layer in layers if type(layer).__name__ != "TransformerBlock"]
    assert len(tapped) == 2
    trainer.close()
    assert [type(layer).__name__ for layer in layers] == ["TransformerBlock"] * 3


def rates(settings: TrainSettings) -> Iterator[float]:
    return (settings.rate(step) for step in range(settings.steps))


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    settings = TrainSettings(steps=100, warmup=0.1, learning_rate=1.0, min_rate=0.1)
    found = list(rates(settings))
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert found[55] == pytest.approx(0.55)
    assert found[-1] < 0.11
    assert sorted(found[10:], reverse=True) == found[10:]


@pytest.mark.parametrize("change", [{}, {"loss": "kl"}, {"weighting": "d-pace"}], ids=str)
def test_recomputing_trains_alike(
    toy: Path, plugins: PluginManager, tmp_path: Path, change: dict[str, Any]
) -> None:
    for recompute in (False, True):
        out = tmp_path / str(recompute)
        train(request_for(toy, out, steps=3, recompute=recompute, **change), plugins)
    for mine, theirs in zip(losses(tmp_path / "True"), losses(tmp_path / "False"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_muon_turns_updates_of_matrices_orthogonal_and_resumes(
    toy: Path, plugins: PluginManager, tmp_path: Path
) -> None:
    def request(name: str, **changes: Any) -> TrainRequest:
        return request_for(toy, tmp_path / name, optimizer="muon", steps=4, save_every=0, **changes)

    trainer = Trainer(request("first", warmup=0.0), plugins)
    try:
        before: dict[str, mx.array] = dict(tree_flatten(trainer.state.parameters))
        trainer.run(lambda: True)
        after: dict[str, mx.array] = dict(tree_flatten(trainer.state.parameters))
    finally:
        trainer.close()
    name = "layers.0.self_attn.q_proj.weight"
    moved = (after[name] - before[name]) / 0.02
    singular: Any = mx.linalg.svd(moved, compute_uv=False, stream=mx.cpu).tolist()
    assert max(singular) < 1.5  # five steps of Newton and Schulz bring them near 1
    assert sorted(singular)[len(singular) // 2] > 0.5
    norm = "layers.0.input_layernorm.weight"
    assert mx.abs(after[norm] - before[norm]).max().item() < 1e-3  # by AdamW, at its own rate
    train(request("whole"), plugins)
    train(request("resumed"), plugins, stop_at=2)
    train(request("resumed", resume=True), plugins)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_compiled_step_trains_alike(
    toy: Path, plugins: PluginManager, whole: Path, tmp_path: Path
) -> None:
    """Fixed shapes and fused operations: other orders of summation, the same losses."""
    train(request_for(toy, tmp_path / "out", compile=True), plugins)
    for mine, theirs in zip(losses(tmp_path / "out"), losses(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_run_ends_with_its_time(
    toy: Path, plugins: PluginManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        """Every look at it takes a tenth of a second."""

        now = 0.0

        def perf_counter(self) -> float:
            self.now += 0.1
            return self.now

    monkeypatch.setattr(pace, "time", Clock())
    out = tmp_path / "out"
    request = request_for(toy, out, steps=None, max_minutes=1 / 60, eval_first=False)
    records = train(request, plugins)
    steps = [r for r in records if r["kind"] == "step"]
    assert len(steps) > 5
    assert steps[-1]["progress"] == 1
    assert steps[-2]["progress"] < 1
    assert 1.0 <= steps[-1]["seconds"] < 1.2
    assert steps[-1]["seconds_left"] == 0
    assert steps[-1]["learning_rate"] < 0.2 * max(r["learning_rate"] for r in steps)
    assert [r["step"] for r in records if r["kind"] == "held-out"] == [steps[-1]["step"]]
    assert (out / "model.safetensors").is_file()


def test_nothing_is_measured_where_that_is_not_wanted(
    toy: Path, plugins: PluginManager, tmp_path: Path
) -> None:
    records = train(request_for(toy, tmp_path / "out", steps=2, eval_prompts=0), plugins)
    assert {r["kind"] for r in records} == {"first-step", "step"}
    assert "Nothing was measured" in (tmp_path / "out" / "README.md").read_text()


def test_schedule_over_steps_and_over_time() -> None:
    by_steps = TrainSettings(steps=100, warmup=0.1, learning_rate=1.0)
    assert [by_steps.rate(n) for n in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert by_steps.rate(55) == pytest.approx(0.5)
    by_time = TrainSettings(steps=None, max_minutes=1.0, warmup=0.1, learning_rate=1.0)
    clocks = [by_time.rate(7, seconds) for seconds in (3.0, 6.0, 33.0, 60.0)]
    assert clocks == pytest.approx([0.5, 1.0, 0.5, 0.0])
    both = TrainSettings(steps=100, max_minutes=1.0)
    assert both.progress(30, 6.0) == pytest.approx(0.3)
    assert both.progress(30, 42.0) == pytest.approx(0.7)


def test_adamw_over_one_array_is_adamw_over_each_and_old_states_go_on():
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten, tree_map

    from draftloom.apps.train.update import Updates, begin_state, make_optimizer

    settings = TrainSettings(steps=10, clip=0.5, weight_decay=0.1)
    keys = mx.random.split(mx.random.key(0), 6)
    parameters = {"a": {"weight": mx.random.normal((5, 3), key=keys[0])}, "b": mx.ones(7)}
    gradients = [
        {
            "a": {"weight": mx.random.normal((5, 3), key=key)},
            "b": mx.random.normal((7,), key=key) + 1,
        }
        for key in keys[1:]
    ]

    each, expected, old = optim.AdamW(0.1, [0.9, 0.95], weight_decay=0.1), parameters, None
    each.bias_correction = True
    each.init(expected)
    for gradient in gradients:
        if gradient is gradients[2]:
            old = tree_map(lambda value: value, each.state)
        clipped, norm = optim.clip_grad_norm(gradient, 0.5)
        expected = each.apply_gradients(clipped, expected)

    optimizer = make_optimizer(settings)
    state, found = begin_state(optimizer, parameters, optimizer.state), parameters
    updates = Updates(None, optimizer, settings)
    for number, gradient in enumerate(gradients):
        if number == 2:
            state = begin_state(make_optimizer(settings), found, old)  # an older run's
        found, state, norm_now = updates.apply(found, state, gradient, 0.1)
    assert norm_now.item() == pytest.approx(norm.item(), rel=1e-6)
    assert [name for name, _ in tree_flatten(found)] == ["a.weight", "b"]
    for (_, value), (_, right) in zip(tree_flatten(found), tree_flatten(expected), strict=True):
        assert mx.allclose(value, right, rtol=1e-5, atol=1e-6), (value, right)
