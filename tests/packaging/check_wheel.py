"""Build the wheel, install it in a fresh environment and use it there (`make wheel-check`).

The fresh environment sees this one's third-party packages, so that nothing is downloaded, but not
this one's editable draftloom. That the wheel declares all it imports is a test of its own
(tests/unit/test_packaging.py).
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "core": "draftloom",
    "drafters": "draftloom/drafters",
    "verifiers": "draftloom/verifiers",
    "caches": "draftloom/caches",
    "kernels": "draftloom/kernels",
    "adapters": "draftloom/adapters",
    "apps": "draftloom/apps",
}
DATA_SUFFIXES = {".toml", ".h", ".metal", ".cu", ".cuh"}


def expected_members(root: Path) -> set[str]:
    """Return the paths that a wheel built from `root` must hold: modules, kernels, weights."""
    members = set()
    for folder, package in FOLDERS.items():
        for path in (root / folder).rglob("*"):
            inside = path.relative_to(root / folder)
            if path.is_dir() or "__pycache__" in inside.parts:
                continue
            bundled = folder == "adapters" and inside.parts[0] == "bundled"
            if bundled or path.suffix in {".py", *DATA_SUFFIXES} or path.name == "py.typed":
                members.add(f"{package}/{inside.as_posix()}")
    return members


def missing_members(wheel: Path, root: Path) -> list[str]:
    """Return what the folders under `root` hold and `wheel` does not, sorted."""
    return sorted(expected_members(root) - set(zipfile.ZipFile(wheel).namelist()))


def surplus_members(wheel: Path, root: Path) -> list[str]:
    """Return what `wheel` holds beside its metadata and the folders under `root` do not, sorted."""
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    return sorted(held - expected_members(root))


def copy_sources(root: Path, destination: Path) -> None:
    """Copy what a build reads, so that nothing left over in the checkout gets into the wheel."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in FOLDERS:
        shutil.copytree(root / folder, destination / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(root / name, destination / name)


def build_wheel(source: Path, destination: Path) -> Path:
    """Build an sdist from `source` and the wheel from that sdist; return the wheel's path.

    Raises:
        RuntimeError: the build failed; the message holds its output.
    """
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(destination)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the build failed:\n{done.stdout}{done.stderr}")
    (wheel,) = destination.glob("*.whl")
    return wheel


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """Make an environment in `folder`, install `wheel` there and return its `bin` folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    pip += ["--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    # A plain path: .pth files that lie there, such as the editable install's, are not read.
    (site / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(*command: str, cwd: Path) -> str:
    """Run a command outside the checkout and return its output; stop if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"FAILED ({done.returncode}): {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Run the whole check and say what was seen; exit with a message at the first failure."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary).resolve()
        copy_sources(ROOT, work / "source")
        wheel = build_wheel(work / "source", work / "dist")
        print(f"built {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, from its own sdist")
        if missing := missing_members(wheel, work / "source"):
            sys.exit("FAILED: not in the wheel (is the package listed?): " + ", ".join(missing))
        if surplus := surplus_members(wheel, work / "source"):
            sys.exit("FAILED: in the wheel, but not in the folders: " + ", ".join(surplus))
        print(f"the wheel holds all {len(expected_members(work / 'source'))} files")

        bin_ = fresh_environment(work / "venv", wheel)
        code = "import draftloom as d; print(d.__file__)"
        where = run(str(bin_ / "python"), "-c", code, cwd=work)
        if not Path(where.strip()).resolve().is_relative_to(work / "venv"):
            sys.exit(f"FAILED: draftloom came from {where.strip()}, not from the wheel")
        print("import draftloom: from the fresh environment")
        run(str(bin_ / "draftloom"), "--help", cwd=work)
        print("draftloom --help: works")
        arguments = ["generate", "def add(a, b):", "--max-tokens", "8", "--json"]
        out = run(str(bin_ / "draftloom"), *arguments, cwd=work)
        result = json.loads(out)
        if not 1 <= result["generated_tokens"] <= 8:
            sys.exit(f"FAILED: draftloom generate made {result['generated_tokens']} tokens")
        print(f"draftloom generate: {result['generated_tokens']} tokens, {result['text']!r}")


if __name__ == "__main__":
    main()
