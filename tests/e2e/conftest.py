"""Running the command line: as a process, as a user does, and in this process, where that is
enough; and tiny models with a tokenizer, made on the fly."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen3

from draftloom.adapters.bundled import default_pair
from draftloom.apps.cli import run
from draftloom.apps.cli.state import CliState
from draftloom.plugins import PluginManager

VOCAB = 8192
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %} quietly{% endif %}{% endif %}"
)


@attrs.frozen
class Finished:
    """A command that has ended.

    Attributes:
        code: exit code.
        out: stdout.
        err: stderr.
    """

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as exactly one JSON value on one line."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)

    def assert_mistake(self, *words: str, hint: bool = True) -> None:
        """A user's mistake: exit code 2, nothing on stdout, one line on stderr that says what is
        wrong and, in parentheses, what to do."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.out == ""
        assert "Traceback" not in self.err
        (line,) = self.err.splitlines()
        assert line.startswith("draftloom: error: "), line
        assert line.endswith(")") or not hint, f"no hint: {line}"
        for word in words:
            assert word in line, line


@pytest.fixture(scope="session")
def program() -> str:
    """The installed `draftloom`."""
    path = Path(sys.executable).with_name("draftloom")
    assert path.is_file(), "the package is not installed"
    return str(path)


@pytest.fixture
def process(program: str, tmp_path: Path) -> Callable[..., Finished]:
    """Runs `draftloom ARGUMENTS` as a process of its own, in an empty folder."""

    def call(*arguments: object, stdin: str | bytes = b"") -> Finished:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [program, *map(str, arguments)],
            input=given,
            capture_output=True,
            cwd=tmp_path,
            timeout=300,
            check=False,
        )
        return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())

    return call


@pytest.fixture
def cli(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Finished]:
    """Runs `draftloom ARGUMENTS` in this process, where starting one would add nothing."""

    def call(*arguments: object, stdin: bytes = b"", plugins: Sequence[object] = ()) -> Finished:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        manager = PluginManager(entry_points=False, extra=plugins)
        capfd.readouterr()
        code = run([str(a) for a in arguments], CliState(manager))
        out, err = capfd.readouterr()
        return Finished(code, out, err)

    return call


def write_target(folder: Path, *, chat: bool = False, **changes: Any) -> Path:
    """Write a random two-layer qwen3 with the bundled tokenizer, in float32.

    Args:
        folder: made if needed.
        chat: give the tokenizer a chat template.
        **changes: of the config.
    """
    config = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    keys = iter(mx.random.split(mx.random.key(7), 64))
    weights = {
        name: mx.random.normal(value.shape, key=next(keys)) * (0.4 if value.ndim > 1 else 1.0)
        for name, value in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    source = default_pair().target
    shutil.copy(source / "tokenizer.json", folder)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    if chat:
        settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target without a chat template."""
    return write_target(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same target with a chat template."""
    return write_target(tmp_path_factory.mktemp("models") / "tiny-chat", chat=True)


@pytest.fixture(scope="session")
def own_tokens() -> Callable[..., list[int]]:
    """What a target writes alone, through plain mlx-lm: (model, prompt ids, tokens) -> ids."""

    def decode(model: Any, prompt: Sequence[int], max_tokens: int) -> list[int]:
        stream = mx.default_stream(mx.cpu)
        steps = generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens, stream=stream)
        return [int(token) for token, _ in steps]

    return decode
