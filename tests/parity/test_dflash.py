"""The DFlash drafter against an independent NumPy implementation of the same description.

Hidden states agree within 2e-5 of their size (float32 against float64); draft tokens are the same
wherever the reference's two best logits are further apart than that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from draftloom.abilities import BindContext
from draftloom.contracts import CacheKind, DraftRequest, TargetInfo
from draftloom.drafters.dflash import DFlashDrafter
from draftloom.errors import ModelError
from draftloom.pipeline import GenerateOptions
from draftloom.sampling import SamplingParams, SamplingState
from tests.support import cases, models, pipelines
from tests.support.cases import Case
from tests.support.dflash_numpy import DFlashReference
from tests.support.oracle import text_model
from tests.support.pipelines import dflash_checkpoint, dflash_weights

HIDDEN, VOCAB, TAPS = 32, 40, (1, 3, 4)
TOLERANCE = 2e-5
SAMPLING = SamplingState(SamplingParams())
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "one-layer": {"num_hidden_layers": 1},
    "five-layers": {"num_hidden_layers": 5},
    "no-sharing-of-heads": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1, "head_dim": 16},
    "sliding": {"num_hidden_layers": 3, "sliding_window": 5, **SLIDING},
    "sliding-narrower-than-the-block": {"num_hidden_layers": 3, "sliding_window": 2, **SLIDING},
    "sliding-not-causal": {
        "num_hidden_layers": 3, "sliding_window": 5, "is_causal": False, **SLIDING,
    },
    "all-causal": {"is_causal": True},
    "none-causal": {"is_causal": False},
    "rope-parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "yarn-scaling": {"rope_theta": 500.0, "rope_scaling": YARN},
    "yarn-parameters": {"rope_parameters": {**YARN, "rope_theta": 500.0}},
    "newer-keys": {
        "block_size": None,
        "dflash_config": {
            "mask_token_id": 5, "target_layer_ids": list(TAPS), "block_size": 12,
            "input_embedding_scale": 5.5, "output_multiplier": 0.3,
            "final_logit_softcapping": 3.0,
        },
    },
    "epsilon": {"rms_norm_eps": 0.05},
}  # fmt: skip


class FakeTarget:
    """Embedding and head of a target, and nothing else; keeps the last hidden states."""

    def __init__(self, seed: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.embedding = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
        self.weight = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
        self.info = TargetInfo("fake", "fake", "fake", HIDDEN, VOCAB, 6, (CacheKind.ATTENTION,))
        self.hidden = np.zeros(0)

    def embed(self, tokens: mx.array) -> mx.array:
        return mx.array(self.embedding)[tokens]

    def head(self, hidden: mx.array) -> mx.array:
        self.hidden = np.array(hidden)
        return hidden @ mx.array(self.weight).T


def open_drafter(folder: Path, target: Any) -> tuple[DFlashDrafter, Any]:
    drafter = DFlashDrafter(folder)
    assert not list(drafter.check(target.info))
    drafter.bind(BindContext(target, "float32", lambda path: None, lambda target: None))  # type: ignore[arg-type, return-value]
    return drafter, drafter.open(DraftRequest(((0,),), SAMPLING, VOCAB))


def write(folder: Path, **config: Any) -> tuple[Path, DFlashReference]:
    """A checkpoint and the reference of the same."""
    drop = tuple(k for k, v in config.items() if v is None)
    dflash_checkpoint(folder, hidden=HIDDEN, vocab=VOCAB, taps=TAPS, drop=drop, **config)
    return folder, reference(folder)


def reference(folder: Path) -> DFlashReference:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = mx.load(str(folder / "model.safetensors"))
    return DFlashReference(settings, {k: np.array(v) for k, v in weights.items()})


def features(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    shape = (rows, tokens, len(TAPS) * HIDDEN)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check_draft(
    session: Any, target: FakeTarget, exact: DFlashReference, taps: np.ndarray, width: int
) -> None:
    """One proposal of every row against the reference."""
    anchors = [(7 * row + width) % VOCAB for row in range(len(taps))]
    draft = session.propose(mx.array(anchors, dtype=mx.int32), width, SAMPLING)
    assert draft.tokens.shape == (len(taps), width)
    assert draft.healthy.tolist() == [True] * len(taps)
    found, hidden = np.array(draft.tokens), target.hidden
    for row, anchor in enumerate(anchors):
        block = [anchor] + [exact.config["mask_token_id"]] * width
        wanted = exact.hidden(target.embedding[block], taps[row])[1:]
        assert np.abs(hidden[row] - wanted).max() < TOLERANCE * np.abs(wanted).max()
        logits = exact.logits(anchor, width, taps[row], target.embedding, target.weight)
        best = np.sort(logits, axis=-1)
        clear = best[:, -1] - best[:, -2] > 10 * TOLERANCE * np.abs(best).max()
        assert clear.mean() > 0.7, "the case decides nothing"
        assert np.array_equal(found[row][clear], logits.argmax(-1)[clear])


@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_equal_the_reference(name: str, tmp_path: Path) -> None:
    folder, exact = write(tmp_path / name, **CONFIGS[name])
    for context, width in [(1, 1), (3, 11), (9, 4), (24, 11), (40, 7)]:
        target = FakeTarget()
        drafter, session = open_drafter(folder, target)
        assert drafter.info.tap_layers == TAPS
        assert (
            drafter.info.max_width == drafter.info.default_width == exact.config["block_size"] - 1
        )
        taps = features(1, context, seed=context)
        session.observe(([0] * context,), mx.array(taps))
        check_draft(session, target, exact, taps, width)


def test_the_cases_differ(tmp_path: Path) -> None:
    """Windows, causality, positions and factors each change what is drafted."""
    taps = features(1, 24)
    hidden = {}
    for name, config in CONFIGS.items():
        exact = write(tmp_path / name, **{"num_hidden_layers": 3, **config})[1]
        if exact.config["head_dim"] == 8 and exact.config["num_key_value_heads"] == 2:
            embeddings = FakeTarget().embedding[[7] + [39] * 6]
            hidden[name] = exact.hidden(embeddings, taps[0])
    names = list(hidden)
    equal = [
        {a, b}
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if hidden[a].shape == hidden[b].shape and np.abs(hidden[a] - hidden[b]).max() < 1e-3
    ]
    assert all(
        pair <= {"one-layer", "none-causal", "yarn-scaling", "yarn-parameters"} for pair in equal
    )


def test_rows_of_a_batch_are_drafted_each_by_itself(tmp_path: Path) -> None:
    folder, exact = write(tmp_path, num_hidden_layers=3, sliding_window=5, **SLIDING)
    target = FakeTarget()
    session = open_drafter(folder, target)[1]
    taps = features(3, 10)
    session.observe(([0] * 10,) * 3, mx.array(taps))
    check_draft(session, target, exact, taps, 8)


@pytest.mark.parametrize("sizes", [(30,), (1,) * 30, (12, 3, 1, 9, 5), (29, 1)])
def test_features_in_several_parts_equal_all_at_once(
    sizes: tuple[int, ...], tmp_path: Path
) -> None:
    """Bit for bit, with drafts between the parts that leave nothing behind."""
    folder, exact = write(tmp_path, num_hidden_layers=3, sliding_window=7, **SLIDING)
    taps, anchor = mx.array(features(1, 30)), mx.array([4], dtype=mx.int32)
    target = FakeTarget()
    whole = open_drafter(folder, target)[1]
    whole.observe(([0] * 30,), taps)
    tokens, hidden = np.array(whole.propose(anchor, 9, SAMPLING).tokens), target.hidden
    parts, start = open_drafter(folder, target)[1], 0
    for index, size in enumerate(sizes):
        # More rows than were committed, as a verified block has.
        beyond = mx.concatenate([taps[:, start : start + size], 9 * taps[:, :2]], axis=1)
        parts.observe(([0] * size,), beyond)
        start += size
        if index % 2:
            check_draft(parts, target, exact, np.array(taps[:, :start]), 6)
    assert np.array_equal(np.array(parts.propose(anchor, 9, SAMPLING).tokens), tokens)
    assert np.array_equal(target.hidden, hidden)


def test_a_long_context_is_kept_whole(tmp_path: Path) -> None:
    """More rows than a key/value cache allocates at once, and than are kept back unprojected."""
    folder, exact = write(tmp_path, num_hidden_layers=1)
    target = FakeTarget()
    session = open_drafter(folder, target)[1]
    taps = features(1, 620)
    for start in range(0, 620, 155):
        session.observe(([0] * 155,), mx.array(taps[:, start : start + 155]))
    check_draft(session, target, exact, taps, 5)
    more = features(1, 10, seed=1)
    session.observe(([0] * 10,), mx.array(more))
    check_draft(session, target, exact, np.concatenate([taps, more], axis=1), 5)


@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3"])
def test_drafts_inside_a_generation_equal_the_reference(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anchor, features and positions as the engine hands them over, cycle by cycle."""
    case = Case(family, "dflash", "auto", "block", 6, (1, 2, 3, 4))
    trace, stock = case.trace, text_model(models.stock(family))
    embedding, head = np.array(stock.model.embed_tokens.weight), np.array(stock.lm_head.weight)
    proposed: list[list[int]] = []
    with cases.build(case, tmp_path).build() as pipeline:
        drafter: Any = pipeline._parts.drafter
        opened = drafter.open

        def open_and_listen(request: DraftRequest) -> Any:
            session = opened(request)
            propose = session.propose

            def listen(*args: Any) -> Any:
                draft = propose(*args)
                proposed.extend(draft.tokens.tolist())
                return draft

            session.propose = listen
            return session

        monkeypatch.setattr(drafter, "open", open_and_listen)
        engine = pipeline.engine(case.prompt, GenerateOptions(max_tokens=16, prefill_chunk=2))
        counts = np.cumsum([len(case.prompt)] + [len(e.token_ids) for e in engine.cycles()])
        assert not engine.stats.fell_back
    exact, agreeing = reference(tmp_path / "dflash"), 0
    for count, tokens in zip(counts[1:], proposed, strict=False):
        taps = trace.taps(cases.TAPS, count - 1)
        logits = exact.logits(trace.tokens[count - 1], 5, taps, embedding, head)
        best = np.sort(logits, axis=-1)
        clear = best[:, -1] - best[:, -2] > 1e-3
        assert np.array_equal(np.array(tokens)[clear], logits.argmax(-1)[clear])
        agreeing += int(clear.sum())
    assert len(proposed) >= 5
    assert agreeing > 20


# --- packed weights ---------------------------------------------------------------------------


def pack(weight: np.ndarray, bits: int, group: int) -> tuple[dict[str, mx.array], np.ndarray]:
    """Affine quantization as mlx-lm stores it, and the weight it stands for."""
    rows = weight.reshape(weight.shape[0], -1, group)
    low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
    scale = (high - low) / (2**bits - 1)
    codes = np.clip(np.round((rows - low) / scale), 0, 2**bits - 1).astype(np.uint32)
    plain = codes * scale.astype(np.float32) + low
    codes = codes.reshape(weight.shape[0], -1, 32 // bits)
    shifts = bits * np.arange(32 // bits, dtype=np.uint32)
    packed = (codes << shifts).sum(-1).astype(np.uint32)
    stored = {"weight": packed, "scales": scale[..., 0], "biases": low[..., 0]}
    return {k: mx.array(v) for k, v in stored.items()}, plain.reshape(weight.shape)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_draft_as_what_they_stand_for(bits: int, tmp_path: Path) -> None:
    """Quantized triplets, one projection with settings of its own."""
    quantization = {"group_size": 32, "bits": bits, "fc": {"group_size": 32, "bits": 8}}
    folder, _ = write(tmp_path, intermediate_size=64, quantization=quantization)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = dflash_weights(settings, len(TAPS), np.random.default_rng(0))
    stored: dict[str, mx.array] = {}
    for name, value in weights.items():
        if value.ndim == 1:
            stored[name] = mx.array(value)
            continue
        packed, weights[name] = pack(value, 8 if name == "fc.weight" else bits, 32)
        stem = name.removesuffix(".weight")
        stored |= {f"{stem}.{part}": array for part, array in packed.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    target = FakeTarget()
    session = open_drafter(folder, target)[1]
    taps = features(1, 12)
    session.observe(([0] * 12,), mx.array(taps))
    check_draft(session, target, DFlashReference(settings, weights), taps, 9)


# --- what does not fit ------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_reported_by_the_draft(tmp_path: Path) -> None:
    folder, _ = write(tmp_path)
    session = open_drafter(folder, FakeTarget())[1]
    taps = features(2, 4)
    taps[1, 2, 5] = np.nan
    session.observe(([0] * 4,) * 2, mx.array(taps))
    draft = session.propose(mx.array([1, 2], dtype=mx.int32), 3, SAMPLING)
    assert draft.healthy.tolist() == [True, False]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 64}, "hidden_size 64, the target has 32"),
        ({"vocab_size": 41}, "vocab_size 41, the target has 40"),
        ({"num_target_layers": 28}, "num_target_layers 28, the target has 6"),
    ],
)
def test_a_drafter_of_another_target_is_told(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    dflash_checkpoint(tmp_path, hidden=HIDDEN, vocab=VOCAB, taps=TAPS, **change)
    problems = list(DFlashDrafter(tmp_path).check(FakeTarget().info))
    assert says in str(problems[0])


def test_weights_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    folder, _ = write(tmp_path)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    del weights["layers.1.mlp.up_proj.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        open_drafter(folder, FakeTarget())
    assert pipelines.plugins().component("drafter", "dflash").info.needs
