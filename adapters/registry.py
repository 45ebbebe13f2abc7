"""Which drafter belongs to which target: tables of exact names, the package's and the user's own.

A name is compared whole. Quantizations of a target are derived name by name from the listed owners
and suffixes, never by looking for one name inside another.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import attrs

from draftloom.errors import ModelError, did_you_mean
from draftloom.spec import ComponentSpec
from draftloom.user_files import user_folder

__all__ = ["PACKAGE_FILE", "Pair", "Registry", "user_file"]

PACKAGE_FILE = Path(__file__).parent / "pairs.toml"
"""The public pairs."""
PAIR_KEYS = {"target", "drafter", "kind", "block_size", "note"}
TABLE_KEYS = {"owners", "suffixes"}


def user_file() -> Path:
    """Where a user's own pairs are: ``draftloom/pairs.toml`` in XDG_CONFIG_HOME or ~/.config."""
    return user_folder() / "pairs.toml"


@attrs.frozen
class Pair:
    """Targets and the drafter that serves them.

    Attributes:
        targets: hub names; in a user's file also folders.
        drafter: hub name or folder.
        kind: the registered drafter that reads it.
        note: for people.
        source: the file that says so.
    """

    targets: tuple[str, ...]
    drafter: str
    kind: str
    note: str
    source: Path

    def spec(self) -> ComponentSpec:
        """The drafter as a component."""
        option = "model" if self.kind == "autoregressive" else "checkpoint"
        return ComponentSpec.make(self.kind, {option: self.drafter})


@attrs.frozen
class Registry:
    """All pairs, the user's own first.

    Attributes:
        pairs: in the order in which they are looked up.
        owners: who publishes quantizations of others' models under ``OWNER/NAME-SUFFIX``.
        suffixes: what their names end in.
    """

    pairs: tuple[Pair, ...]
    owners: tuple[str, ...]
    suffixes: tuple[str, ...]

    @classmethod
    def load(cls, own: Path | None = None) -> Registry:
        """The package's pairs behind those of the user.

        Args:
            own: the user's file, by default `user_file()`; it need not be there.

        Raises:
            ModelError: the file cannot be read; names file and key.
        """
        public = _public()
        own = user_file() if own is None else own
        if not own.is_file():
            return public
        mine = _read(own)
        return cls(
            mine.pairs + public.pairs,
            tuple(dict.fromkeys(mine.owners + public.owners)),
            tuple(dict.fromkeys(mine.suffixes + public.suffixes)),
        )

    def quantizations(self, target: str) -> tuple[str, ...]:
        """The names under which quantizations of a hub target are published."""
        owner, slash, name = target.partition("/")
        if not slash or not owner or "/" in name or owner.startswith((".", "~")):
            return ()
        owners = dict.fromkeys((owner, *self.owners))
        return tuple(f"{o}/{name}{suffix}" for o in owners for suffix in self.suffixes)

    def find(self, name: str, folder: Path | None = None) -> Pair | None:
        """The pair of a target.

        Args:
            name: hub name without revision, or what else the user called it.
            folder: where it lies.
        """
        for pair in self.pairs:
            if name in pair.targets or any(_is_folder(t, folder) for t in pair.targets):
                return pair
        for pair in self.pairs:
            if any(name in self.quantizations(target) for target in pair.targets):
                return pair
        return None


def _is_folder(target: str, folder: Path | None) -> bool:
    if folder is None or not target.startswith(("/", "~", ".")):
        return False
    return Path(target).expanduser().resolve() == folder.resolve()


@cache
def _public() -> Registry:
    """The package's own table, which does not change while a program runs."""
    return _read(PACKAGE_FILE)


def _read(file: Path) -> Registry:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "repair or remove it") from error
    _check_keys(file, "", data, {"pair", "quantizations"})
    tables = data.get("pair", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise ModelError(f"{file}: `pair` is not a list of tables", "write [[pair]]")
    rules = data.get("quantizations", {})
    if not isinstance(rules, dict):
        raise ModelError(f"{file}: `quantizations` is not a table", "write [quantizations]")
    _check_keys(file, "quantizations.", rules, TABLE_KEYS)
    return Registry(
        tuple(_pair(file, position, table) for position, table in enumerate(tables, 1)),
        _names(file, "quantizations.owners", rules.get("owners", [])),
        _names(file, "quantizations.suffixes", rules.get("suffixes", [])),
    )


def _pair(file: Path, position: int, table: Mapping[str, Any]) -> Pair:
    where = f"pair {position}: "
    _check_keys(file, where, table, PAIR_KEYS)
    targets = _names(file, where + "target", table.get("target", []))
    if not targets:
        raise ModelError(f"{file}: {where}target names nothing", 'write target = ["OWNER/NAME"]')
    for key in ("drafter", "kind", "note"):
        if not isinstance(table.get(key, ""), str):
            raise ModelError(f"{file}: {where}{key} is not a text", f'write {key} = "..."')
    if not table.get("drafter"):
        raise ModelError(f"{file}: {where}drafter is missing", 'write drafter = "OWNER/NAME"')
    return Pair(targets, table["drafter"], table.get("kind", "dflash"), table.get("note", ""), file)


def _names(file: Path, where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise ModelError(f"{file}: {where} is not a list of names", 'write ["...", "..."]')
    return tuple(value)


def _check_keys(file: Path, where: str, table: Iterable[str], known: set[str]) -> None:
    for key in table:
        if key not in known:
            raise ModelError(f"{file}: unknown key {where}{key}", did_you_mean(key, known))
