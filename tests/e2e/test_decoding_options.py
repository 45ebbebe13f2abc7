"""Decoding parameters through the command line, a pipeline file, `audit` and `bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.utils import load

PROMPT = "def add(a, b): return a + b\ndef add(a, b):"
LOOKUP = ("--drafter", "prompt-lookup", "--block-size", 4, "--raw", "--max-tokens", 14)
PENALTIES = (
    "--repetition-penalty", 1.3, "--repetition-context-size", 9, "--presence-penalty", 0.4,
    "--frequency-penalty", 0.2, "--frequency-context-size", 0, "--logit-bias", "5=1.5,17=-inf",
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "repetition_context_size": 9,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
    "frequency_context_size": 0,
    "logit_bias": {5: 1.5, 17: float("-inf")},
}
FILE = """
drafter = "prompt-lookup"
width = 3

[sampling]
repetition_penalty = 1.3
repetition_context_size = 9
presence_penalty = 0.4
frequency_penalty = 0.2
frequency_context_size = 0
logit_bias = { 5 = 1.5, 17 = -inf }
"""


@pytest.fixture
def own(tiny: Path) -> tuple[list[int], list[mx.array]]:
    """What plain mlx-lm writes with its own processors, and its log-probabilities."""
    model, tokenizer, *_ = load(str(tiny))
    prompt = mx.array(tokenizer.encode(PROMPT))
    processors = make_logits_processors(**SETTINGS)
    steps = list(generate_step(prompt, model, max_tokens=14, logits_processors=processors))
    return [int(token) for token, _ in steps], [row for _, row in steps]


def test_options_and_a_pipeline_file_give_mlx_lms_tokens(
    cli: Callable[..., Any], tiny: Path, own: tuple[list[int], list[mx.array]], tmp_path: Path
) -> None:
    given = cli("generate", PROMPT, "--target", tiny, *LOOKUP, *PENALTIES, "--json").json
    assert given["token_ids"] == own[0]
    assert given["lossless"] is True
    assert "logprobs" not in given
    file = tmp_path / "pipeline.toml"
    file.write_text(FILE)
    as_file = ("--target", tiny, "--pipeline", file, "--raw", "--max-tokens", 14, "--json")
    assert cli("generate", PROMPT, *as_file).json["token_ids"] == own[0]
    off = ("--repetition-penalty", 1, "--presence-penalty", 0, "--frequency-penalty", 0)
    plain = cli("generate", PROMPT, "--target", tiny, *LOOKUP, "--json").json["token_ids"]
    assert plain != own[0]
    assert cli("generate", PROMPT, *as_file, *off, "--logit-bias", "5=0").json["token_ids"] == plain


def test_log_probabilities_in_json_and_trace(
    cli: Callable[..., Any], tiny: Path, own: tuple[list[int], list[mx.array]], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    arguments = ("generate", PROMPT, "--target", tiny, *LOOKUP, *PENALTIES)
    found = cli(*arguments, "--json", "--top-logprobs", 2, "--trace", trace).json
    assert [record["token_id"] for record in found["logprobs"]] == own[0]
    for record, row in zip(found["logprobs"], own[1], strict=True):
        assert record["logprob"] == row[record["token_id"]].item()
        assert record["top"][0] == {"token_id": record["token_id"], "logprob": record["logprob"]}
        assert len(record["top"]) == 2
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    traced = [record for line in lines for record in line["logprobs"]]
    assert traced == found["logprobs"][1:], "the prompt's own token belongs to no cycle"
    alone = cli(*arguments, "--json", "--logprobs").json["logprobs"]
    assert [record["logprob"] for record in alone] == [r["logprob"] for r in found["logprobs"]]
    assert all(record["top"] == [] for record in alone)
    text = found["text"]
    for end in (text[2:6], text[len(text) // 2 :][:3]):  # a stop string ends inside a block
        cut = cli(*arguments, "--json", "--logprobs", "--stop", end).json
        count = len(cut["token_ids"])
        assert count < len(own[0])
        assert cut["logprobs"] == alone[:count]
    done = cli(*arguments, "--logprobs")
    done.assert_mistake("--logprobs has no place in plain text", "--json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--xtc-probability", 0.5), ("xtc_probability needs a temperature above 0",)),
        (("--xtc-probability", 2, "--temperature", 1), ("xtc_probability must be in [0, 1]",)),
        (("--xtc-threshold", 0.7), ("xtc_threshold must be in [0, 0.5]",)),
        (("--xtc-special-tokens", "1,x"), ("--xtc-special-tokens cannot be read at 'x'",)),
        (("--xtc-special-tokens", "99999"), ("xtc_special_tokens names token 99999", "8192")),
        (("--repetition-penalty", -1), ("repetition_penalty must be 0 or more",)),
        (("--repetition-context-size", -1), ("repetition_context_size must be a whole number",)),
        (("--presence-penalty", "nan"), ("presence_penalty must be a finite number",)),
        (("--logit-bias", "5"), ("--logit-bias cannot be read at '5'", "ID=NUMBER")),
        (("--logit-bias", "5=1,5=2"), ("--logit-bias names token 5 twice",)),
        (("--logit-bias", "8192=1"), ("logit_bias names token 8192, the vocabulary has 8192",)),
        (("--logit-bias", "5=inf"), ("logit_bias of token 5 must be a finite number",)),
        (("--top-logprobs", -1, "--json"), ("top_logprobs must be in 0..8191, got -1",)),
        (("--acceptance", "greedy", "--temperature", 1), ("is greedy, temperature is not 0",)),
    ],
    ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "",
)
def test_what_cannot_be_honoured_is_refused(
    cli: Callable[..., Any], tiny: Path, options: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    cli("generate", "x", "--target", tiny, *LOOKUP, *options).assert_mistake(*words)


def test_a_file_with_mistakes_names_them_all(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text('sampling = { logit_bias = 3, xtc_special_tokens = "x", xtc_propability = 1 }')
    done = cli("pipeline", "check", file)
    assert done.code == 2
    for words in (
        "logit_bias must be a table of token ids and numbers, got 3",
        "xtc_special_tokens must be a list of token ids, got 'x'",
        "unknown key 'xtc_propability' (did you mean 'xtc_probability'?",
    ):
        assert words in done.err


def test_a_lossy_policy_says_so_everywhere(
    cli: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    arguments = ("generate", PROMPT, "--target", tiny, *LOOKUP, "--json")
    lossy = cli(*arguments, "--acceptance", "typical", "--temperature", 1, "--seed", 1)
    assert lossy.json["lossless"] is False
    assert lossy.json["pipeline"]["acceptance"] == "typical"
    note = "draftloom: acceptance typical is lossy: the text may not be the target's own\n"
    assert lossy.err == note
    for policy in ("block-verification", "speculative-sampling"):
        exact = cli(*arguments, "--acceptance", policy, "--temperature", 1, "--seed", 1)
        assert exact.json["lossless"] is True
        assert exact.err == ""
    file = tmp_path / "pipeline.toml"
    file.write_text('acceptance = { use = "typical", epsilon = 0.2 }\ndrafter = "prompt-lookup"\n')
    shown = cli("pipeline", "show", file).out
    assert "output   lossy: acceptance 'typical' may leave the target's own text" in shown
    assert "lossy" not in cli("pipeline", "show", "--mermaid", file).out
    file.write_text('acceptance = { use = "typical", epsilon = 2 }\n')
    cli("pipeline", "check", file).assert_mistake("epsilon must be in (0, 1), got 2", hint=False)


def test_audit_gives_mlx_lm_the_same_parameters(
    cli: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(FILE + "temperature = 0.7\nxtc_probability = 0.5\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def add(a, b): return a + b\nx x x x x x\n")
    done = cli(
        "audit", "--target", tiny, "--pipeline", file, "--prompts", prompts,
        "--max-tokens", 12, "--json",
    )  # fmt: skip
    assert (done.code, done.json["verdict"], done.json["identical"]) == (0, "identical", 2)


def test_bench_refuses_what_the_target_alone_is_not_given(
    cli: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(FILE)
    done = cli("bench", "--target", tiny, "--pipeline", file, "--limit", 1, "--lengths", 4)
    done.assert_mistake("changes logits (bias, penalties or processors)", "leave them out")
