"""A drafter trained here, loaded by the public `dflash` package: the same proposals.

The package comes from the registry into a folder of its own, without what it asks for: its MLX
loader needs mlx and mlx-lm alone, which are here. Where no registry answers, these tests are
skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from draftloom import PipelineBuilder
from draftloom.abilities import BindContext
from draftloom.apps.train.design import DrafterDesign
from draftloom.apps.train.loop import Trainer, TrainRequest
from draftloom.apps.train.settings import TrainSettings
from draftloom.apps.train.target import FrozenTarget
from draftloom.apps.train.toy import make_toy
from draftloom.contracts import DraftRequest
from draftloom.drafters.dflash import DFlashDrafter
from draftloom.plugins import PluginManager
from draftloom.sampling import SamplingParams, SamplingState

PACKAGE = "dflash==0.1.0"
BLOCK, TOKENS = 6, 24
PROMPTS = ("one two three four", "friday saturday", "may june july august september october")

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from dflash.model_mlx import load_draft, stream_generate
from mlx_lm import load
given = json.loads(Path(sys.argv[1]).read_text())
model, tokenizer = load(given["target"])
model.set_dtype(mx.float32)
draft = load_draft(given["drafter"])
draft.set_dtype(mx.float32)
proposed = []
features = mx.load(given["features"])
for name, anchor in given["anchors"].items():
    draft.bind(model)
    block = mx.array([[anchor] + [draft.config.mask_token_id] * (draft.config.block_size - 1)])
    logits = draft(block, features[name], draft.make_cache(), logits_start=1)
    proposed.append(mx.argmax(logits, axis=-1)[0].tolist())
committed = []
for ids in given["prompts"]:
    stream = stream_generate(model, draft, tokenizer, mx.array(ids), max_tokens=given["tokens"])
    committed.append([list(map(int, r.tokens)) for r in stream if r.tokens])
print(json.dumps({"proposed": proposed, "committed": committed}))
"""


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the public package."""
    folder = tmp_path_factory.mktemp("public")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    pip += ["--quiet", "--no-deps", "--retries", "1", "--timeout", "20", "--target", str(folder)]
    done = subprocess.run([*pip, PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["?"])[-1]
        pytest.skip(f"{PACKAGE} cannot be installed here: {reason}")
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module", params=["full", "sliding"])
def trained(request: Any, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mx.set_default_device(mx.cpu)
    out = tmp_path_factory.mktemp("trained") / "drafter"
    settings = TrainSettings(
        steps=60, batch=4, context=48, anchors=12, learning_rate=3e-3, eval_prompts=0, save_every=0
    )
    window = 8 if request.param == "sliding" else None
    design = DrafterDesign(block_size=BLOCK, layers=2, sliding_window=window)
    trainer = Trainer(
        TrainRequest(
            target=str(toy / "target"), data=(toy / "texts.jsonl",), out=out, settings=settings,
            design=design,
        ),
        PluginManager(entry_points=False),
    )  # fmt: skip
    try:
        assert trainer.run()
    finally:
        trainer.close()
    return out


def in_hub_cache(folder: Path, drafter: Path) -> None:
    """The drafter as a repository of the hub that has been downloaded: the public loader takes
    names, not folders."""
    repository, revision = folder / "models--own--drafter", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(drafter / name)


def ours(toy: Path, drafter: Path, folder: Path) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """What the script is given; our proposals after each prompt; our cycles' committed tokens."""
    target = FrozenTarget(str(toy / "target"), PluginManager(entry_points=False))
    loaded = DFlashDrafter(drafter)
    target.tap(loaded.info.tap_layers)
    loaded.bind(BindContext(target, "auto", None, None))  # type: ignore[arg-type]
    sampling = SamplingState(SamplingParams())
    features, anchors, proposed, prompts = {}, {}, [], []
    for text in PROMPTS:
        ids = target.tokenizer.encode(text)
        output = target.forward(mx.array([ids]), target.make_cache())
        assert output.features is not None
        anchor = mx.argmax(output.logits[:, -1], axis=-1)
        features[text], anchors[text] = output.features, anchor.item()
        session = loaded.open(DraftRequest((tuple(ids),), sampling, target.info.vocab_size))
        session.observe([ids], output.features)
        proposed.append(session.propose(anchor, BLOCK - 1, sampling).tokens[0].tolist())
        prompts.append(ids)
    mx.save_safetensors(str(folder / "features.safetensors"), features)
    committed = []
    with target.released() as model:
        builder = PipelineBuilder().model(model, target.tokenizer).own_width()
        with builder.drafter("dflash", checkpoint=str(drafter)).build() as pipeline:
            for ids in prompts:
                stream = pipeline.stream(ids, max_tokens=TOKENS, temperature=0.0)
                committed.append([list(chunk.cycle.token_ids) for chunk in stream])
    target.close()
    given = {
        "target": str(toy / "target"), "drafter": "own/drafter", "prompts": prompts,
        "features": str(folder / "features.safetensors"), "anchors": anchors, "tokens": TOKENS,
    }  # fmt: skip
    return given, proposed, committed


def test_public_loader_proposes_the_same_tokens(
    public: Path, toy: Path, trained: Path, tmp_path: Path
) -> None:
    given, proposed, committed = ours(toy, trained, tmp_path)
    (tmp_path / "given.json").write_text(json.dumps(given))
    in_hub_cache(tmp_path / "hub", trained)
    environment = {
        **os.environ, "PYTHONPATH": str(public), "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "given.json")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs["proposed"] == proposed
    assert any(len(cycle) > 2 for cycles in committed for cycle in cycles)  # it learned something
    for mine, other in zip(committed, theirs["committed"], strict=True):
        assert sum(mine, []) == sum(other, [])  # noqa: RUF017
        assert mine[:-1] == other[:-1]  # the last cycle ends where the limit is, each in its way
