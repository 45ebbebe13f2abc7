"""The documentation names everything there is, links to what exists, and uses words as defined."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer

import draftloom
from draftloom import errors, hookspecs
from draftloom.adapters import attention, qwen3_5
from draftloom.apps.cli import build_app
from draftloom.apps.cli.state import CliState
from draftloom.plugins import KINDS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def hook_names() -> list[str]:
    functions = inspect.getmembers(hookspecs, inspect.isfunction)
    return [name for name, function in functions if hasattr(function, "draftloom_spec")]


def error_names() -> list[str]:
    classes = inspect.getmembers(errors, inspect.isclass)
    return [n for n, c in classes if issubclass(c, Exception) and c.__module__ == errors.__name__]


def commands(command: object, path: str = "draftloom") -> Iterator[tuple[str, object]]:
    """Every command with its path; a group is followed into its commands."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, child in inner.items():
        yield from commands(child, f"{path} {name}")


def options(command: object) -> list[str]:
    """The long options of a command, `--no-x` included."""
    names: list[str] = []
    for parameter in command.params:  # type: ignore[attr-defined]
        names += [n for n in (*parameter.opts, *parameter.secondary_opts) if n.startswith("--")]
    return [name for name in names if name != "--help"]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def broken_links(page: Path, root: Path = ROOT) -> list[str]:
    """Relative links of a page that lead nowhere, or out of the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        gone = not target.exists() or not target.is_relative_to(root)
        if gone or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("hook", hook_names())
def test_hook_is_documented(hook: str) -> None:
    parameters = list(inspect.signature(getattr(hookspecs, hook)).parameters)
    assert f"`{hook}({', '.join(parameters)})`" in read("reference/hooks.md")


def test_hooks_are_found() -> None:
    assert set(KINDS.values()) < set(hook_names())
    assert "generation_failed" in hook_names()


@pytest.mark.parametrize("error", error_names())
def test_error_is_documented(error: str) -> None:
    assert f"`{error}`" in read("reference/errors.md")


@pytest.mark.parametrize("name", draftloom.__all__)
def test_public_name_is_documented(name: str) -> None:
    assert re.search(rf"`{name}[`(]", read("reference/python-api.md"))


def test_every_command_and_option_is_documented() -> None:
    page = read("reference/cli.md")
    application = typer.main.get_command(build_app(CliState()))
    assert "`draftloom --version`" in page
    found = dict(commands(application))
    assert "draftloom pipeline show" in found
    missing = [f"## {path}" for path in found if f"## {path}" not in page]
    for path, command in found.items():
        missing += [
            f"{path} {option}"
            for option in options(command)
            if not re.search(rf"`{option}[` \\]", page)
        ]
    assert missing == []


def test_defaults_that_the_page_states() -> None:
    page = read("reference/cli.md")
    application = typer.main.get_command(build_app(CliState()))
    for path, command in commands(application):
        for parameter in command.params:  # type: ignore[attr-defined]
            if parameter.name == "max_tokens":
                section = page.partition(f"## {path}")[2].partition("\n## ")[0]
                assert f"({parameter.default})" in section, path


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n[a](missing.md) [b](#two) [c](#one) [d](../..) [e](https://example.com)\n"
    )
    assert broken_links(page, tmp_path) == ["missing.md", "#two", "../.."]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_acceptance_is_not_accepted_over_generated(page: Path) -> None:
    """Acceptance rate is accepted over drafted; acceptance length, tokens a cycle."""
    text = page.read_text(encoding="utf-8").lower()
    wrong = re.findall(r"accept\w*[^\n|.]{0,40}(?:/|over|per|divided by) *generated", text)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_no_path_of_one_machine(page: Path) -> None:
    assert re.findall(r"(?:/home/|/root/|/Users/)\S*", page.read_text("utf-8")) == []


def test_supported_families_are_named() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    types = {*attention.MODEL_TYPES, *qwen3_5.MODEL_TYPES}
    assert {name for name in types if f"`{name}`" not in page} == set()


def test_index_leads_to_every_page() -> None:
    index = read("index.md")
    links = {(DOCS / link).resolve() for link in LINK.findall(index)}
    parts = ("tutorial", "how-to", "reference", "explanation")
    pages = {page.resolve() for part in parts for page in (DOCS / part).glob("*.md")}
    assert pages - links == set()
