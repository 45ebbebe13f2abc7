"""The training forward of all blocks at once against the drafter that users run."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from draftloom.abilities import BindContext
from draftloom.adapters.attention import AttentionAdapter
from draftloom.adapters.qwen3_5 import HybridAdapter
from draftloom.apps.train.checkpoint import RunFolder
from draftloom.apps.train.design import DrafterDesign, design_drafter, read_config
from draftloom.apps.train.settings import TrainSettings
from draftloom.apps.train.step import BlockBatch, DrafterLoss, block_logits
from draftloom.apps.train.weights import initial_parameters
from draftloom.contracts import DraftRequest
from draftloom.drafters.dflash import DFlashDrafter
from draftloom.drafters.dflash.model import DFlashModel
from draftloom.model_info import ModelInfo
from draftloom.sampling import SamplingParams, SamplingState
from tests.support.models import VOCAB, build

BLOCK = 5
ANCHORS = [[3, 9, 10, 21], [1, 6, 17, 30]]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {
        "dflash_config": {
            "input_embedding_scale": 1.7,
            "output_multiplier": 0.8,
            "final_logit_softcapping": 3.0,
        }
    },
    "sliding": {"sliding_window": 6},
    "causal": {"is_causal": True},
    "sliding-bidirectional": {"sliding_window": 6, "is_causal": False},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        }
    },
}  # fmt: skip


def target_of(family: str) -> Any:
    model = build(family)
    kind = HybridAdapter if family.startswith("qwen3_5") else AttentionAdapter
    source = ModelInfo.from_model(model)
    return kind(model, kind.describe(source)), source


def drafter_of(target: Any, source: ModelInfo, changes: dict[str, Any]) -> dict[str, Any]:
    design = DrafterDesign(block_size=BLOCK, layers=2, sliding_window=changes.get("sliding_window"))
    drafter = design_drafter(source, target.info, None, design)
    inner = {**drafter["dflash_config"], **changes.get("dflash_config", {})}
    return {**drafter, **changes, "dflash_config": inner, "dtype": "float32"}


def batch_of(tokens: mx.array, features: mx.array) -> BlockBatch:
    anchors = mx.array(ANCHORS, dtype=mx.int32)
    slots = anchors[..., None] + mx.arange(1, BLOCK)
    labels = mx.take_along_axis(tokens, slots.reshape(2, -1), axis=1).reshape(slots.shape)
    return BlockBatch(
        features=features,
        anchors=anchors,
        anchor_tokens=mx.take_along_axis(tokens, anchors, axis=1),
        labels=labels,
        valid=mx.ones(labels.shape),
    )


def propose(drafter: DFlashDrafter, batch: BlockBatch, tokens: mx.array, row: int, n: int) -> Any:
    """Draft tokens of the drafter itself for block n of a row."""
    position = ANCHORS[row][n]
    prompt: Any = tokens[row, :position].tolist()
    sampling = SamplingState(SamplingParams())
    session = drafter.open(DraftRequest((tuple(prompt),), sampling, VOCAB))
    session.observe([prompt], batch.features[row : row + 1, :position])
    anchor = batch.anchor_tokens[row, n][None]
    return session.propose(anchor, BLOCK - 1, sampling).tokens[0].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_training_forward_equals_the_drafter(family: str, variant: str, tmp_path: Path) -> None:
    target, source = target_of(family)
    try:
        config = drafter_of(target, source, VARIANTS[variant])
        read = read_config(config, "the drafter")
        model = DFlashModel(read)
        parameters = initial_parameters(model, 3)
        model.update(parameters)
        target.tap(read.tap_layers)
        tokens = mx.random.randint(0, VOCAB, (2, 40), key=mx.random.key(1)).astype(mx.int32)
        features = target.forward(tokens, target.make_cache()).features
        batch = batch_of(tokens, features)
        logits = block_logits(model, read, target, batch)

        RunFolder(tmp_path / "out", {}).begin(resume=False)
        RunFolder(tmp_path / "out", {}).save_drafter(parameters, config, "card")
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
        drafter = DFlashDrafter(tmp_path / "out")
        assert list(drafter.check(target.info)) == []
        drafter.bind(BindContext(target, "auto", None, None))  # type: ignore[arg-type]
        for row in range(2):
            for n in range(4):
                expected = logits_alone(model, read, target, batch, row, n)
                assert mx.allclose(logits[row, n], expected, rtol=1e-4, atol=2e-5), (row, n)
                best = mx.argmax(logits[row, n], axis=-1).tolist()
                assert propose(drafter, batch, tokens, row, n) == best
    finally:
        target.close()


def logits_alone(
    model: DFlashModel, config: Any, target: Any, batch: BlockBatch, row: int, n: int
) -> mx.array:
    """Logits of one block, through the context caches of inference."""
    position, cache = ANCHORS[row][n], model.make_cache()
    model.extend(batch.features[row : row + 1, :position], cache)
    block = [batch.anchor_tokens[row, n].item(), *[config.mask_token_id] * (BLOCK - 1)]
    embeddings = target.embed(mx.array([block])) * config.embedding_scale
    return target.head(model(embeddings, cache)[0, 1:] * config.output_multiplier)


@pytest.mark.parametrize("loss", ["cross-entropy", "kl"])
@pytest.mark.parametrize("weighting", ["decay", "d-pace"])
def test_gradients_are_finite_and_of_the_drafter_only(loss: str, weighting: str) -> None:
    target, source = target_of("qwen3_5")
    try:
        config = drafter_of(target, source, {})
        read = read_config(config, "the drafter")
        model = DFlashModel(read)
        parameters = initial_parameters(model, 3)
        target.tap(read.tap_layers)
        before = dict(tree_flatten(target.model.parameters()))
        tokens = mx.random.randint(0, VOCAB, (2, 40), key=mx.random.key(1)).astype(mx.int32)
        batch = batch_of(tokens, target.forward(tokens, target.make_cache()).features)
        if loss == "kl":
            teacher = mx.random.normal((*batch.labels.shape, VOCAB), key=mx.random.key(2))
            batch = BlockBatch(
                batch.features, batch.anchors, batch.anchor_tokens, batch.labels, batch.valid,
                teacher,
            )  # fmt: skip
        settings = TrainSettings(loss=loss, weighting=weighting)
        (value, _), gradient = DrafterLoss(model, read, target, settings).gradients(
            parameters, batch
        )
        flat = dict(tree_flatten(gradient))
        assert flat.keys() == dict(tree_flatten(parameters)).keys()
        assert mx.isfinite(value).item()
        for name, value in flat.items():
            assert mx.isfinite(value).all().item(), name
            assert mx.abs(value).max().item() > 0, name
        after = dict(tree_flatten(target.model.parameters()))
        assert all(after[name] is value for name, value in before.items())
    finally:
        target.close()


def test_kl_of_a_perfect_drafter_is_zero() -> None:
    target, source = target_of("qwen3")
    try:
        config = drafter_of(target, source, {})
        read = read_config(config, "the drafter")
        model = DFlashModel(read)
        parameters = initial_parameters(model, 3)
        model.update(parameters)
        target.tap(read.tap_layers)
        tokens = mx.random.randint(0, VOCAB, (2, 40), key=mx.random.key(1)).astype(mx.int32)
        batch = batch_of(tokens, target.forward(tokens, target.make_cache()).features)
        own = block_logits(model, read, target, batch)
        perfect = BlockBatch(
            batch.features, batch.anchors, batch.anchor_tokens, batch.labels, batch.valid, own
        )
        loss = DrafterLoss(model, read, target, TrainSettings(loss="kl"))
        assert abs(loss(parameters, perfect)[0].item()) < 1e-5
    finally:
        target.close()
