"""A third party's distribution, installed beside the wheel in a fresh environment and used there.

The environment sees this one's third-party packages and neither checkout nor editable install, so
that everything draftloom and draftloom-lab need must come out of their own wheels.
"""

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import phi
from mlx_lm.utils import load

from draftloom.adapters.bundled import default_pair

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "docs" / "examples" / "draftloom-lab"
PROMPT = "for i in range(10):\n    for j in"
TOKENS = 12


def load_script(path: Path):
    """Import a script that is no module of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_wheel = load_script(ROOT / "tests" / "packaging" / "check_wheel.py")


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with both wheels."""
    work = tmp_path_factory.mktemp("third-party")
    check_wheel.copy_sources(ROOT, work / "source")
    wheel = check_wheel.build_wheel(work / "source", work / "dist")
    bin_ = check_wheel.fresh_environment(work / "venv", wheel)
    shutil.copytree(LAB, work / "lab")  # a build leaves its traces where it runs
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    pip += ["--python", str(bin_ / "python"), "install", "--quiet"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *offline, str(work / "lab")], check=True)
    return bin_


def draftloom(bin_folder: Path, folder: Path, *arguments: str) -> str:
    """Run the command line in `folder`; return what it prints."""
    command = [str(bin_folder / "draftloom"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def target_alone(folder: Path) -> list[int]:
    """What plain mlx-lm writes, in float32 as draftloom computes small models on a CPU."""
    model, tokenizer = load(str(folder))[:2]
    model.set_dtype(mx.float32)
    prompt = mx.array(tokenizer.encode(PROMPT))
    return [token for token, _ in generate_step(prompt, model, max_tokens=TOKENS)]


def make_phi(folder: Path) -> Path:
    """A random model of a type that only lab.phi claims, with the bundled pair's tokenizer."""
    config = {
        "model_type": "phi",
        "vocab_size": 8192,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "partial_rotary_factor": 0.5,
        "eos_token_id": 8191,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = phi.Model(phi.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    # A head that leans towards the embedding repeats tokens: something to accept.
    lean = 0.4 * weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = weights["lm_head.weight"] + lean
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_pair().target / name, folder)
    return folder


def readme_commands() -> list[list[str]]:
    """The `draftloom` commands of the distribution's README, without the program's name."""
    lines = (LAB / "README.md").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("$ draftloom ")]


def readme_pipeline() -> str:
    """The pipeline file of the README."""
    text = (LAB / "README.md").read_text(encoding="utf-8")
    return text.partition("```toml\n")[2].partition("```")[0]


def test_installed_and_used_by_name(bin_folder: Path, tmp_path: Path) -> None:
    where = "import draftloom, draftloom_lab as lab; print(draftloom.__file__, lab.__file__)"
    python = [str(bin_folder / "python"), "-c", where]
    files = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert all(Path(f).is_relative_to(bin_folder.parent) for f in files.split()), files

    listing = draftloom(bin_folder, tmp_path, "plugins")
    assert "draftloom-lab 0.1.0" in listing
    for name in ("repeat-last", "strict-margin", "copy", "phi", "ban-tokens"):
        assert f"lab.{name}" in listing

    arguments = ["generate", PROMPT, "--max-tokens", str(TOKENS), "--json", "--dtype", "float32"]
    lab = ["--drafter", "lab.repeat-last", "--acceptance", "lab.strict-margin"]
    lab += ["--rollback", "lab.copy"]
    result = json.loads(draftloom(bin_folder, tmp_path, *arguments, *lab))
    named = {kind: result["pipeline"][kind] for kind in ("drafter", "acceptance", "rollback")}
    assert named == {
        "drafter": "lab.repeat-last",
        "acceptance": "lab.strict-margin",
        "rollback": "lab.copy",
    }
    assert result["cycles"] > 0
    assert not result["fell_back"]
    bundled = json.loads(draftloom(bin_folder, tmp_path, *arguments, "--drafter", "none"))
    assert result["token_ids"] == bundled["token_ids"]


def test_target_that_only_its_adapter_claims(bin_folder: Path, tmp_path: Path) -> None:
    folder = make_phi(tmp_path / "tiny-phi")
    arguments = ["--target", str(folder), "--drafter", "lab.repeat-last", "--json"]
    arguments += ["--max-tokens", str(TOKENS), "--width", "fixed"]
    result = json.loads(draftloom(bin_folder, tmp_path, "generate", PROMPT, *arguments))
    assert result["pipeline"]["adapter"] == "lab.phi"
    assert result["token_ids"] == target_alone(folder)
    assert result["acceptance_length"] > 1, "choose a seed whose text repeats a token"


def test_readme(bin_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lab.toml").write_text(readme_pipeline(), encoding="utf-8")
    make_phi(tmp_path / "tiny-phi")
    for command in readme_commands():
        assert draftloom(bin_folder, tmp_path, *command)
