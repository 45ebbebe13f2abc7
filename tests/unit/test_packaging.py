"""The package as pyproject.toml declares it: every module listed, every import declared."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ["core", "drafters", "verifiers", "caches", "kernels", "adapters", "apps"]
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))


def modules() -> Iterator[Path]:
    """Yield the modules of all packages, relative to the root."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = path.relative_to(ROOT)
            yield module


def package_name(folder: Path) -> str:
    """Return the import name of a folder: core is draftloom, x/y is draftloom.x.y."""
    return ".".join(("draftloom", *(part for part in folder.parts if part != "core")))


def normalized(requirement: str) -> str:
    """Return the name of a requirement as the package index compares names."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def test_every_folder_with_modules_is_a_listed_package() -> None:
    found = {package_name(folder): str(folder) for folder in {m.parent for m in modules()}}
    assert found == PYPROJECT["tool"]["setuptools"]["package-dir"]


def test_package_dir_and_packages_agree() -> None:
    declared = PYPROJECT["tool"]["setuptools"]
    assert sorted(declared["packages"]) == sorted(declared["package-dir"])


def test_every_package_folder_has_an_init() -> None:
    folders = {module.parent for module in modules()}
    assert [str(f) for f in sorted(folders) if not (ROOT / f / "__init__.py").is_file()] == []


def imported_names(module: Path) -> set[str]:
    """Return the top-level names that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


def test_every_import_is_a_declared_dependency() -> None:
    declared = {normalized(r) for r in PYPROJECT["project"]["dependencies"]}
    distributions = metadata.packages_distributions()
    undeclared = [
        f"{module}: {name}"
        for module in modules()
        for name in sorted(imported_names(module) - set(sys.stdlib_module_names) - {"draftloom"})
        if not declared & {normalized(d) for d in distributions.get(name, [])}
    ]
    assert undeclared == []


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.name)
def test_constraints_name_no_host_and_no_path(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert lines
    pin = r"[a-z0-9-]+==[0-9][^ /:@]*( ; [^/:@\\]+)? \\"
    pin_or_hash = re.compile(rf"{pin}|    --hash=sha256:[0-9a-f]{{64}}( \\)?")
    assert [line for line in lines if not pin_or_hash.fullmatch(line)] == []


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.name)
def test_every_pin_has_a_hash(path: Path) -> None:
    pins = re.split(r"^(?=[a-z0-9])", path.read_text(), flags=re.MULTILINE)[1:]
    assert pins
    assert [pin.partition("\n")[0] for pin in pins if "--hash=sha256:" not in pin] == []


def test_direct_dependencies_are_pinned() -> None:
    pinned = {
        normalized(line)
        for line in (ROOT / "constraints/base.txt").read_text().splitlines()
        if re.match(r"[a-z0-9]", line)
    }
    wanted = PYPROJECT["project"]["dependencies"] + PYPROJECT["dependency-groups"]["dev"]
    assert {normalized(requirement) for requirement in wanted} <= pinned


def test_backends_of_mlx_are_pinned_at_its_version() -> None:
    version = re.search(r"^mlx==(\S+)", (ROOT / "constraints/base.txt").read_text(), re.MULTILINE)
    assert version
    assert f"mlx-cpu=={version[1]} " in (ROOT / "constraints/cpu.txt").read_text()
    assert f"mlx-cuda-13=={version[1]} " in (ROOT / "constraints/cuda.txt").read_text()


def test_no_lock_file_with_hosts_is_committed() -> None:
    assert "uv.lock" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """`make test-oldest` runs on what pyproject.toml claims."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = (ROOT / "constraints/oldest.txt").read_text()
    for name in ("mlx", "mlx-lm"):
        (bound,) = [n for n in needs if re.match(rf"{name}>=", n)]
        lowest = re.search(r">=([\d.]+)", bound)
        assert lowest is not None
        assert re.search(rf"^{name}=={re.escape(lowest[1])} ", pins, re.MULTILINE), bound
