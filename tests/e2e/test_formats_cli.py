"""`generate` and `pipeline show` with a drafter folder of every format, and with spoilt ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.support.checkpoints import Golden, rewrite, write

from .conftest import VOCAB

GENERATE = ("generate", "x = 1", "--max-tokens", 12, "--json")
SIZES: dict[str, Any] = {"hidden": 32, "vocab": VOCAB, "taps": (0, 1), "block": 6}
SLIDING = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
FOLDERS: dict[str, tuple[str, Golden]] = {
    "z-lab-old": ("z-lab", Golden(**SIZES)),
    "z-lab-new": ("z-lab", Golden(config=SLIDING, **SIZES)),
    "specforge": ("specforge", Golden(first_slot=0, markov="vanilla", **SIZES)),
    "dspark": ("dspark", Golden(first_slot=0, markov="vanilla", confidence=True, **SIZES)),
    "speculators": (
        "speculators",
        Golden(config=SLIDING, from_anchor=True, draft_ids=tuple(range(0, VOCAB, 5)), **SIZES),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random drafter of the tiny target in every format."""
    root = tmp_path_factory.mktemp("formats")
    return {name: write(root / name, name, golden) for name, (_, golden) in FOLDERS.items()}


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("name", FOLDERS)
def test_generate(
    cli: Callable[..., Any], tiny: Path, folders: dict[str, Path], name: str, temperature: int
) -> None:
    golden = FOLDERS[name][1]
    options = (*GENERATE, "--target", tiny, "--temperature", temperature, "--seed", 1)
    found = cli(*options, "--drafter", folders[name])
    assert found.err == ""
    assert found.json["pipeline"]["drafter"] == ("dspark" if golden.markov else "dflash")
    assert found.json["cycles"] > 1
    assert not found.json["fell_back"]
    if not temperature:
        alone = cli(*GENERATE, "--target", tiny, "--drafter", "none")
        assert found.json["token_ids"] == alone.json["token_ids"]


@pytest.mark.parametrize("name", FOLDERS)
def test_pipeline_show(
    cli: Callable[..., Any], tiny: Path, folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(f'target = "{tiny}"\ndrafter = "{folders[name]}"\n', encoding="utf-8")
    shown = cli("pipeline", "show", file)
    assert f"{folders[name]} (format {FOLDERS[name][0]}, block 6)" in shown.out
    assert cli("pipeline", "check", file).code == 0


def test_a_threshold_in_a_pipeline_file(
    cli: Callable[..., Any], tiny: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    file, options = (
        tmp_path / "pipeline.toml",
        f'use = "dspark", checkpoint = "{folders["dspark"]}"',
    )
    text = f'target = "{tiny}"\ndrafter = {{ {options}, confidence_threshold = %s }}\n'
    file.write_text(text % 0.3, encoding="utf-8")
    assert "drafts end where confidence falls below 0.3" in cli("pipeline", "show", file).out
    found = cli(*GENERATE, "--pipeline", file).json
    alone = cli(*GENERATE, "--target", tiny, "--drafter", "none").json
    assert found["token_ids"] == alone["token_ids"]
    given = ("--target", tiny, "--drafter", folders["dspark"], "--drafter-confidence")
    assert cli(*GENERATE, *given, 0.3).json["token_ids"] == alone["token_ids"]
    cli(*GENERATE, *given, 2).assert_mistake("confidence_threshold must be in [0, 1), got 2")
    lookup = cli(*GENERATE, "--drafter", "prompt-lookup", "--drafter-confidence", 0.5)
    lookup.assert_mistake("has no option 'confidence_threshold'")
    packed = cli(*GENERATE, "--pipeline", file, "--drafter-bits", 8)
    packed.assert_mistake("cannot be packed to 8 bits", "leave drafter bits out")
    file.write_text(text % 1.5, encoding="utf-8")
    cli(*GENERATE, "--pipeline", file).assert_mistake("confidence_threshold must be in [0, 1)")


def test_keys_that_nobody_knows_are_one_line(
    cli: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "d", "z-lab-old", Golden(**SIZES))
    rewrite(folder, lambda config: config.update(curriculum="slow", mood=3))
    done = cli(*GENERATE, "--target", tiny, "--drafter", folder)
    assert done.code == 0
    assert done.json["cycles"]
    (line,) = done.err.splitlines()
    assert line.startswith(f"draftloom: {folder}: config keys that format z-lab does not know")
    assert line.endswith("curriculum, mood")


def outside(tensors: dict[str, mx.array]) -> None:
    tensors["d2t"] = tensors["d2t"] + VOCAB


SPOILT: list[tuple[str, Any, Any, tuple[str, ...]]] = [
    ("speculators", None, outside, ("model.safetensors", "d2t", f"vocabulary of {VOCAB}")),
    (
        "speculators",
        lambda c: c.pop("aux_hidden_state_layer_ids"),
        None,
        ("config.json", "aux_hidden_state_layer_ids"),
    ),
    (
        "dspark",
        None,
        lambda t: t.update({"markov_head.markov_w1.weight": mx.zeros((4, 6))}),
        ("markov_head.markov_w1.weight is (4, 6), not (8192, 6)",),
    ),
    (
        "dspark",
        lambda c: c.update(sample_from_anchor="no"),
        None,
        ("config.json", "sample_from_anchor must be true or false"),
    ),
    ("z-lab-new", None, lambda t: t.pop("hidden_norm.weight"), ("hidden_norm.weight missing",)),
    (
        "specforge",
        lambda c: c["dflash_config"].update(projector_type="domino"),
        None,
        ("config.json", "projector_type 'domino' is not served"),
    ),
]


@pytest.mark.parametrize(("name", "config", "tensors", "words"), SPOILT)
def test_spoilt_folders(
    cli: Callable[..., Any],
    tiny: Path,
    tmp_path: Path,
    name: str,
    config: Any,
    tensors: Any,
    words: tuple[str, ...],
) -> None:
    folder = write(tmp_path / "d", name, FOLDERS[name][1])
    rewrite(folder, config or (lambda c: None), tensors or (lambda t: None))
    done = cli(*GENERATE, "--target", tiny, "--drafter", folder)
    done.assert_mistake(str(folder), *words, hint=False)


# --- inspect ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_inspect(cli: Callable[..., Any], folders: dict[str, Path], name: str) -> None:
    form, golden = FOLDERS[name]
    found = cli("inspect", folders[name], "--json").json
    assert (found["kind"], found["format"]) == ("drafter checkpoint", form)
    assert found["drafter"] == ("dspark" if golden.markov else "dflash")
    assert (found["tap_layers"], found["block_size"]) == ([0, 1], 6)
    assert found["first_slot"] == golden.first_slot
    assert found["window_rule"] == ("block" if golden.from_anchor else "query")
    assert found.get("draft_vocab_size") == (golden.words if golden.draft_ids else None)
    assert found.get("markov") == ({"rank": 6, "kind": "vanilla"} if golden.markov else None)
    lines = cli("inspect", folders[name]).out.splitlines()
    assert [line.split() for line in lines if line.startswith("tap_layers")] == [
        ["tap_layers", "0,", "1"]
    ]


def test_inspect_targets_and_what_is_neither(
    cli: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    found = cli("inspect", tiny, "--json").json
    assert (found["kind"], found["adapter"], found["path"]) == ("target", "attention", str(tiny))
    assert found["cache_kinds"] == ["attention", "attention"]
    cli("inspect", tmp_path / "missing").assert_mistake("missing")
    folder = write(tmp_path / "d", "z-lab-old", Golden(**SIZES))
    rewrite(folder, lambda config: config.update(curriculum="slow"))
    assert "curriculum" in cli("inspect", folder).out
    rewrite(folder, lambda config: config.pop("block_size"))
    cli("inspect", folder).assert_mistake(str(folder), "block_size", hint=False)
