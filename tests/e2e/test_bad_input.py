"""Every mistake a user can make: exit code 2, one line with a hint, no traceback, nothing left."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from draftloom.adapters.bundled import default_pair
from draftloom.apps.cli.options import read_prompt
from draftloom.errors import UsageError

GENERATE = ("generate", "x = 1", "--max-tokens", "4")
LOOKUP = ("--drafter", "prompt-lookup")


def copy_model(source: Path, to: Path, **config: Any) -> Path:
    """A copy of a model folder with a changed config."""
    shutil.copytree(source, to)
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**settings, **config}))
    return to


@pytest.fixture
def target(tiny: Path, tmp_path: Path) -> Path:
    """A target that a test may break."""
    return copy_model(tiny, tmp_path / "target")


def write_drafter(folder: Path, **changes: Any) -> Path:
    """The config of the bundled drafter, changed; its weights are never reached."""
    config = json.loads((default_pair().draft / "config.json").read_text())
    dflash = {**config["dflash_config"], **changes.pop("dflash_config", {})}
    folder.mkdir()
    changed = {**config, **changes, "dflash_config": dflash}
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


@pytest.mark.slow
def test_mistakes_of_a_real_process(
    process: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    """A few of them as processes; the rest below, in this one."""
    trace = tmp_path / "trace.jsonl"
    cases: list[tuple[Sequence[object], Sequence[str]]] = [
        (("generate", "x", "--temperature", -1), ("temperature", "0")),
        (("generate", "x", "--no-such-option"), ("--no-such-option", "--help")),
        (("generate", "x", "--target", tmp_path / "missing"), ("missing",)),
        (("generate", "x", "--target", tiny, *LOOKUP, "--chat", "--trace", trace), ("template",)),
        (("generate",), ("prompt is empty", "stdin")),
        (("chat", "--target", tiny, *LOOKUP), ("chat template",)),
        (("pipeline", "check", tmp_path / "missing.toml"), ("missing.toml",)),
        (("no-such-command",), ("no-such-command",)),
    ]
    for arguments, words in cases:
        process(*arguments).assert_mistake(*words)
    assert not list(tmp_path.iterdir()), "something was left behind"


# --- the prompt ------------------------------------------------------------------------------


def test_empty_prompts(cli: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    options = ("--target", tiny, *LOOKUP)
    cli("generate", "", *options).assert_mistake("prompt is empty", "PROMPT")
    cli("generate", "--prompt-file", empty, *options).assert_mistake("prompt is empty", str(empty))
    cli("generate", *options).assert_mistake("prompt is empty", "stdin")


class _Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


def test_no_prompt_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is kept waiting for a prompt that nobody types."""
    monkeypatch.setattr(sys, "stdin", _Terminal())
    with pytest.raises(UsageError, match="no prompt"):
        read_prompt(None, None)


def test_two_prompts(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("hello")
    done = cli("generate", "hello", "--prompt-file", file)
    done.assert_mistake("both PROMPT and --prompt-file")


def test_unreadable_prompt_files(cli: Callable[..., Any], tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"caf\xe9")
    cli("generate", "--prompt-file", tmp_path / "missing").assert_mistake("missing", "No such file")
    cli("generate", "--prompt-file", tmp_path).assert_mistake("directory")
    cli("generate", "--prompt-file", binary).assert_mistake("not UTF-8", "byte 3")
    cli("generate", stdin=b"\xff\xfe").assert_mistake("stdin is not UTF-8")


def test_prompt_past_the_context(process: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    """And transformers' own remark about long sequences does not appear."""
    trace = tmp_path / "trace.jsonl"
    done = process("generate", "x = 1\n" * 3000, "--target", tiny, *LOOKUP, "--trace", trace)
    done.assert_mistake("the target's context holds 256", "shorten")
    assert not trace.exists()


@pytest.mark.slow
def test_prompt_past_the_context_as_a_process(process: Callable[..., Any], tiny: Path) -> None:
    done = process("generate", "--target", tiny, *LOOKUP, stdin="x = 1\n" * 3000)
    done.assert_mistake("the target's context holds 256", "shorten")


# --- models ----------------------------------------------------------------------------------


def test_missing_targets(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    cli(*GENERATE, "--target", tmp_path / "missing").assert_mistake("missing")
    cli(*GENERATE, "--target", "no-such-name").assert_mistake("no-such-name")
    cli(*GENERATE, "--target", file).assert_mistake("is a file", "folder")


def test_half_a_target(cli: Callable[..., Any], target: Path) -> None:
    options = (*GENERATE, *LOOKUP, "--target", target)
    weights = target / "model.safetensors"
    weights.rename(target / "elsewhere")
    cli(*options).assert_mistake("has no model*.safetensors", "download")
    index = {"weight_map": {"a": "model-00001.safetensors"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    cli(*options).assert_mistake("lacks model-00001.safetensors")
    (target / "config.json").unlink()
    cli(*options).assert_mistake("has no config.json", "download")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": 3, "hidden_size": "x"}'])
def test_broken_configs(cli: Callable[..., Any], target: Path, content: str) -> None:
    (target / "config.json").write_text(content)
    cli(*GENERATE, *LOOKUP, "--target", target).assert_mistake("config")


def test_config_without_a_size(cli: Callable[..., Any], target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    del config["hidden_size"]
    (target / "config.json").write_text(json.dumps(config))
    cli(*GENERATE, *LOOKUP, "--target", target).assert_mistake("hidden_size")


def test_unknown_model_type(cli: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    target = copy_model(tiny, tmp_path / "other", model_type="rwkv12")
    done = cli(*GENERATE, *LOOKUP, "--target", target)
    done.assert_mistake("no adapter claims", "rwkv12", "qwen3-5", "write-an-adapter")


@pytest.mark.parametrize("how", ["cut short", "no header", "empty", "another model's"])
def test_corrupt_weights(cli: Callable[..., Any], tiny: Path, tmp_path: Path, how: str) -> None:
    target = copy_model(tiny, tmp_path / "target")
    file = target / "model.safetensors"
    data = file.read_bytes()
    if how == "another model's":
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    else:
        broken = {"cut short": data[:-1000], "no header": b"\0" * 5000, "empty": b""}
        file.write_bytes(broken[how])
    trace = tmp_path / "trace.jsonl"
    done = cli(*GENERATE, *LOOKUP, "--target", target, "--trace", trace)
    done.assert_mistake(str(target))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_corrupt_tokenizers(cli: Callable[..., Any], target: Path, name: str) -> None:
    (target / name).write_text('{"half": ')
    cli(*GENERATE, *LOOKUP, "--target", target).assert_mistake("tokenizer")


def test_target_without_a_tokenizer(cli: Callable[..., Any], target: Path) -> None:
    for file in target.glob("tokenizer*"):
        file.unlink()
    cli(*GENERATE, *LOOKUP, "--target", target).assert_mistake("no tokenizer")


# --- the drafter -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 999}, ("vocab_size 999", "another target")),
        ({"hidden_size": 999}, ("hidden_size 999", "another target")),
        ({"num_target_layers": 36}, ("num_target_layers 36", "another target")),
        ({"dflash_config": {"target_layer_ids": [1, 99]}}, ("[99]", "another target")),
        ({"dflash_config": {"target_layer_ids": []}}, ("target_layer_ids",)),
        ({"dflash_config": {"mask_token_id": 9999}, "mask_token_id": 9999}, ("9999",)),
        ({"block_size": None}, ("block_size",)),
    ],
)
def test_drafter_of_another_target(
    cli: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    drafter = write_drafter(tmp_path / "drafter", **changes)
    hint = "another target" in words or "9999" in words
    cli(*GENERATE, "--drafter", drafter).assert_mistake(*words, hint=hint)


def test_draft_model_of_another_vocabulary(
    cli: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    other = copy_model(tiny, tmp_path / "other", vocab_size=100)
    done = cli(*GENERATE, "--target", tiny, "--drafter", other)
    done.assert_mistake("100 tokens", "8192", "family")


def test_missing_drafters(cli: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    options = (*GENERATE, "--target", tiny)
    cli(*options).assert_mistake("no drafter is known", "--drafter")
    cli(*options, "--drafter", tmp_path / "missing").assert_mistake("missing")
    cli(*options, "--drafter", "prompt-lokup").assert_mistake("did you mean 'prompt-lookup'")
    cli(*options, "--drafter", "").assert_mistake("--drafter is empty")
    cli(*GENERATE, "--drafter", write_drafter(tmp_path / "half")).assert_mistake(
        "model.safetensors"
    )


# --- numbers and names -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--block-size", 0), ("block size must be at least 1, got 0",)),
        (("--block-size", -3), ("block size must be at least 1, got -3",)),
        (("--block-size", 17), ("block size 17 is above the drafter's 16",)),
        (("--block-size", "four"), ("--block-size", "integer")),
        (("--temperature", -0.1), ("temperature must be 0 or more", "greedy")),
        (("--temperature", "nan"), ("temperature must be a finite number",)),
        (("--top-p", 0), ("top_p",)),
        (("--top-p", 1.5), ("top_p",)),
        (("--min-p", -1), ("min_p",)),
        (("--top-k", -1), ("top_k",)),
        (("--max-tokens", 0), ("--max-tokens", "got 0")),
        (("--stop", ""), ("--stop",)),
        (("--verifier", "blok"), ("did you mean 'block'",)),
        (("--acceptance", "gredy"), ("did you mean 'greedy'",)),
        (("--acceptance", "greedy", "--temperature", 1), ("speculative-sampling",)),
        (("--rollback", "snapsot"), ("did you mean 'snapshot'",)),
        (("--rollback", "attention=trim,attention=trim"), ("'attention' twice",)),
        (("--rollback", "attention="), ("KIND=NAME",)),
        (("--rollback", "atention=trim"), ("did you mean 'attention'",)),
        (("--rollback", "gated-delta=trim"), ("cannot take back gated-delta", "attention")),
        (("--dtype", "float8"), ("float8", "bfloat16")),
        (("--drafter-window", -1), ("window must be a whole number >= 0, got -1",)),
        (("--drafter-window", 0, "--drafter-sinks", 4), ("sinks are 4", "above 0")),
        (("--drafter-sinks", 4, "--drafter", "none"), ("has no option 'sinks'",)),
        (("--drafter-bits", 5), ("4 or 8 bits, got 5",)),
        (("--drafter-bits", 8, "--drafter", "prompt-lookup"), ("has no option 'bits'",)),
        (("--memory-limit", 0), ("limit_gb must be above 0, got 0",)),
        (("--memory-limit", 0.00001), ("of weights", "the limit is", "--memory-limit")),
        (("--memory-limit", 0.5, "--context-length", 10**9), ("of caches", "--context-length")),
        (("--context-length", 0), ("context_length must be at least 1",)),
        (("--prefill-step-size", 0), ("prefill_step_size must be at least 1",)),
        (("--kv-bits", 7), ("kv_bits cannot be 7", "8")),
        (("--kernel", "gated-delta"), ("--kernel cannot be read", "OPERATION=CHOICE")),
        (("--kernel", "ssm=off", "--kernel", "ssm=block"), ("'ssm' twice",)),
        (("--kernel", "gated-dela=off"), ("did you mean 'gated-delta'",)),
        (("--kernel", "gated-delta=chunk"), ("did you mean 'chunked'",)),
        (("--kernel", "gated-delta=metal"), ("cannot run here", "auto or off")),
        (("--kv-group-size", 32), ("--kv-group-size is given without --kv-bits",)),
        (("--quantized-kv-start", 9), ("--quantized-kv-start is given without --kv-bits",)),
        (("--kv-bits", 8, "--quantized-kv-start", -1), ("quantized_kv_start", "got -1")),
        (("--pipeline", "missing.toml"), ("missing.toml",)),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_bad_values(
    cli: Callable[..., Any], options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    cli(*GENERATE, *options).assert_mistake(*words, hint="nan" not in options)


def test_top_k_above_the_vocabulary(cli: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    options = ("--target", tiny, *LOOKUP, "--temperature", 1, "--top-k", 8192, "--trace", trace)
    cli(*GENERATE, *options).assert_mistake("top_k 8192", "8192", "off")
    assert not trace.exists()


def test_unwritable_trace_files(cli: Callable[..., Any], tmp_path: Path) -> None:
    cli(*GENERATE, "--trace", tmp_path).assert_mistake("is a folder")
    missing = tmp_path / "missing" / "trace.jsonl"
    cli(*GENERATE, "--trace", missing).assert_mistake("there is no folder")
    assert not missing.parent.exists()


def test_existing_trace_survives_a_mistake(cli: Callable[..., Any], tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("of an earlier run\n")
    cli(*GENERATE, "--trace", trace, "--drafter", "no-such").assert_mistake("no-such")
    assert trace.read_text() == "of an earlier run\n"


def test_pipeline_files_with_a_typo(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "pipeline.toml"
    for text, words in {
        'draftr = "none"': ("unknown key 'draftr'", "did you mean 'drafter'"),
        "drafter = ": ("not valid TOML",),
        "drafter = 3": ("drafter", "a name"),
        'drafter = { use = "prompt-lookup", max_ngrm = 3 }': ("did you mean 'max_ngram'",),
        "sampling = { temprature = 1 }": ("did you mean 'temperature'",),
        'sampling = { temperature = "hot" }': ("temperature",),
        '[[insert]]\nuse = "x"': ("after",),
    }.items():
        file.write_text(text)
        done = cli(*GENERATE, "--pipeline", file)
        assert done.code == 2, done
        (line,) = done.err.splitlines()
        assert all(word in line for word in words), line
    file.write_bytes(b"\xff")
    assert cli(*GENERATE, "--pipeline", file).code == 2


def test_all_problems_at_once(cli: Callable[..., Any]) -> None:
    """A first line with their number, then a line each."""
    done = cli(
        *GENERATE, "--verifier", "blok", "--rollback", "snapsot", "--temperature", -1,
        "--block-size", 99,
    )  # fmt: skip
    assert (done.code, done.out) == (2, "")
    first, *rest = done.err.splitlines()
    assert first == "draftloom: error: the pipeline has 4 problems:"
    assert len(rest) == 4
    assert all(line.startswith("  ") for line in rest)
