"""A pipeline as data: what is written in a TOML file and what the builder fills in.

Reading and writing are inverse: ``PipelineSpec.from_toml(spec.to_toml()) == spec``.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from draftloom.errors import GraphError, Problem, UsageError, did_you_mean
from draftloom.kernel_settings import KernelSettings
from draftloom.kv_cache import KVQuantization
from draftloom.memory import MemorySettings

__all__ = ["ComponentSpec", "InsertSpec", "PipelineSpec"]

AUTO = "auto"
SAMPLING_KEYS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "xtc_probability",
    "xtc_threshold",
    "xtc_special_tokens",
    "repetition_penalty",
    "repetition_context_size",
    "presence_penalty",
    "presence_context_size",
    "frequency_penalty",
    "frequency_context_size",
    "logit_bias",
)
"""What a file can say: all of `SamplingParams` but processors, which are code."""


def _freeze(value: Any) -> Any:
    """Options as hashable, comparable data: lists become tuples, components become specs (a
    component without options becomes its name, as it is written)."""
    if isinstance(value, ComponentSpec | Mapping):
        if isinstance(value, Mapping) and "use" not in value:
            raise UsageError(f"a table among options needs 'use', got {dict(value)!r}")
        spec = ComponentSpec.of(value)
        return spec if spec.options else spec.use
    if isinstance(value, list | tuple):
        return tuple(_freeze(v) for v in value)
    return value


@attrs.frozen
class ComponentSpec:
    """A component by name, with options.

    Attributes:
        use: registered name; ``auto`` lets the builder choose.
        options: keyword arguments of its factory, sorted by name.
    """

    use: str = AUTO
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | ComponentSpec) -> ComponentSpec:
        """Read ``"name"`` or ``{use = "name", option = ...}``.

        Raises:
            UsageError: neither of the two.
        """
        if isinstance(value, ComponentSpec):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping):
            use = value.get("use", AUTO)
            if not isinstance(use, str):
                raise UsageError(f"'use' must be a name, got {use!r}")
            return cls.make(use, {k: v for k, v in value.items() if k != "use"})
        raise UsageError(f"a component is a name or a table with 'use', got {value!r}")

    @classmethod
    def make(cls, use: str, options: Mapping[str, Any]) -> ComponentSpec:
        """A component by name and options."""
        return cls(use, tuple(sorted((k, _freeze(v)) for k, v in options.items())))

    def as_data(self) -> Any:
        """The name alone, or a table."""
        if not self.options:
            return self.use
        return {"use": self.use, **{k: _thaw(v) for k, v in self.options}}


def _thaw(value: Any) -> Any:
    if isinstance(value, ComponentSpec):
        return value.as_data()
    if isinstance(value, tuple):
        return [_thaw(v) for v in value]
    return str(value) if isinstance(value, Path) else value


@attrs.frozen
class InsertSpec:
    """A node of the user's own, and where it goes.

    Attributes:
        component: the node.
        after: name of the node it follows; empty if `before` is given.
        before: name of the node it precedes.
    """

    component: ComponentSpec
    after: str = ""
    before: str = ""


@attrs.frozen
class PipelineSpec:
    """Everything that makes a pipeline.

    Attributes:
        target: folder, hub repository, or name of a bundled pair; empty is the bundled one.
        dtype: ``auto``, ``stored``, ``float32``, ``bfloat16`` or ``float16``.
        drafter: ``auto``, a registered name, or a checkpoint (folder or repository).
        verifier: registered name.
        acceptance: registered name.
        rollback: one name for all kinds it serves, or pairs (cache kind, name).
        width: registered name; an int is ``fixed`` with that many draft tokens; ``fixed``
            without a number is the drafter's own; ``auto`` follows what pays.
        sampling: default sampling parameters, pairs of name and value.
        kv_cache: how the target's key/value caches are packed; None leaves them plain.
        memory: the limit, the length to make room for, prompt tokens run at once.
        inserts: nodes of the user's own.
        kernels: which implementation each kernel operation runs; ``auto`` where it is not named.
    """

    target: str = ""
    dtype: str = AUTO
    drafter: ComponentSpec = ComponentSpec()
    verifier: ComponentSpec = ComponentSpec("block")
    acceptance: ComponentSpec = ComponentSpec()
    rollback: ComponentSpec | tuple[tuple[str, ComponentSpec], ...] = ComponentSpec()
    width: ComponentSpec = ComponentSpec()
    kv_cache: KVQuantization | None = None
    sampling: tuple[tuple[str, Any], ...] = ()
    memory: MemorySettings = attrs.Factory(MemorySettings)
    inserts: tuple[InsertSpec, ...] = ()
    kernels: KernelSettings = attrs.Factory(KernelSettings)

    @classmethod
    def from_file(cls, path: Path) -> PipelineSpec:
        """Read a TOML file.

        Raises:
            UsageError: no such file, or not UTF-8.
            GraphError: not TOML, unknown keys, values of the wrong kind; all of them listed.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"pipeline file {path} cannot be read: {error}") from error
        return cls.from_toml(text, where=str(path))

    @classmethod
    def from_toml(cls, text: str, where: str = "pipeline") -> PipelineSpec:
        """Read TOML text.

        Raises:
            GraphError: not TOML, unknown keys, values of the wrong kind; all of them listed.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise GraphError([Problem(where, f"not valid TOML: {error}")]) from error
        problems: list[Problem] = []
        fields: dict[str, Any] = {}
        for key, value in data.items():
            reader = _READERS.get(key)
            if reader is None:
                problems.append(Problem(where, f"unknown key {key!r}", did_you_mean(key, _READERS)))
                continue
            try:
                fields["inserts" if key == "insert" else key] = reader(value)
            except GraphError as error:
                problems += [attrs.evolve(p, where=f"{where}: {key}") for p in error.problems]
            except UsageError as error:
                problems.append(Problem(f"{where}: {key}", error.message, error.hint))
        if problems:
            raise GraphError(problems)
        return cls(**fields)

    def to_toml(self) -> str:
        """The pipeline as TOML; what has its default value is left out."""
        default = PipelineSpec()
        lines = []
        for name in ("target", "dtype", "drafter", "verifier", "acceptance", "width"):
            value = getattr(self, name)
            if value != getattr(default, name):
                lines.append(f"{name} = {_toml(_data(value))}")
        if self.rollback != default.rollback:
            lines.append(f"rollback = {_toml(_data(self.rollback))}")
        if self.sampling:
            lines.append(f"sampling = {_toml(_sampling_table(self.sampling))}")
        if self.kv_cache is not None:
            lines.append(f"kv_cache = {_toml(self.kv_cache.as_data())}")
        if self.memory != default.memory:
            lines.append(f"memory = {_toml(self.memory.as_data())}")
        if self.kernels.choices:
            lines.append(f"kernels = {_toml(self.kernels.as_data())}")
        for insert in self.inserts:
            table = insert.component.as_data()
            table = {"use": table} if isinstance(table, str) else table
            place = {"after": insert.after} if insert.after else {"before": insert.before}
            lines += ["", "[[insert]]", *(f"{_key(k)} = {_toml(v)}" for k, v in table.items())]
            lines += [f"{k} = {_toml(v)}" for k, v in place.items()]
        return "\n".join(lines).strip() + "\n"


def _data(value: Any) -> Any:
    if isinstance(value, ComponentSpec):
        return value.as_data()
    if isinstance(value, tuple):
        return {kind: component.as_data() for kind, component in value}
    return value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    raise UsageError(f"{value!r} cannot be written to TOML", "options are text, numbers, tables")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    """A TOML string: JSON's escapes, and the one control character that JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


# --- readers of the top-level keys -----------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"expected text, got {value!r}")
    return value


def _width(value: Any) -> ComponentSpec:
    if isinstance(value, int) and not isinstance(value, bool):
        return ComponentSpec.make("fixed", {"tokens": value})
    return ComponentSpec.of(value)


def _rollback(value: Any) -> ComponentSpec | tuple[tuple[str, ComponentSpec], ...]:
    if isinstance(value, Mapping) and "use" not in value:
        return tuple(sorted((kind, ComponentSpec.of(v)) for kind, v in value.items()))
    return ComponentSpec.of(value)


def _sampling_table(pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Sampling parameters as they are written: the bias as a table of token ids.

    Raises:
        UsageError: a parameter that is code.
    """
    table = dict(pairs)
    unwritable = [name for name in table if name not in SAMPLING_KEYS]
    if unwritable:
        raise UsageError(
            f"{unwritable[0]} cannot be written to TOML", "give it to `generate`, or insert a node"
        )
    bias = table.get("logit_bias")
    if bias is not None:
        table["logit_bias"] = {str(token): number for token, number in dict(bias).items()}
    return table


def _sampling(value: Any) -> tuple[tuple[str, Any], ...]:
    if not isinstance(value, Mapping):
        raise UsageError(f"expected a table, got {value!r}")
    problems = []
    for key, number in value.items():
        if key not in SAMPLING_KEYS:
            hint = did_you_mean(key, SAMPLING_KEYS)
            problems.append(Problem("sampling", f"unknown key {key!r}", hint))
        elif key in _SAMPLING_SHAPES:
            kind, words = _SAMPLING_SHAPES[key]
            if not isinstance(number, kind):
                problems.append(Problem("sampling", f"{key} must be {words}, got {number!r}"))
        elif isinstance(number, bool) or not isinstance(number, int | float):
            problems.append(Problem("sampling", f"{key} must be a number, got {number!r}"))
    if problems:
        raise GraphError(problems)
    return tuple(sorted((key, freeze_sampling(v)) for key, v in value.items()))


_SAMPLING_SHAPES: dict[str, tuple[Any, str]] = {
    "logit_bias": (Mapping, "a table of token ids and numbers"),
    "xtc_special_tokens": (list, "a list of token ids"),
}


def freeze_sampling(value: Any) -> Any:
    """A sampling parameter as comparable data: tables become sorted pairs, lists tuples."""
    if isinstance(value, Mapping):
        pairs = [(_token_id(token), number) for token, number in value.items()]
        return tuple(sorted(pairs, key=lambda pair: str(pair[0])))
    return tuple(value) if isinstance(value, list | set) else value


def _token_id(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.strip().isdecimal() else key


def _inserts(value: Any) -> tuple[InsertSpec, ...]:
    if not isinstance(value, list) or not all(isinstance(v, Mapping) for v in value):
        raise UsageError("write inserted nodes as [[insert]] tables")
    inserts = []
    for table in value:
        rest = {k: v for k, v in table.items() if k not in ("after", "before")}
        after, before = _text(table.get("after", "")), _text(table.get("before", ""))
        if "use" not in table or bool(after) == bool(before):
            raise UsageError("an [[insert]] needs 'use' and one of 'after' and 'before'")
        inserts.append(InsertSpec(ComponentSpec.of(rest), after, before))
    return tuple(inserts)


_READERS = {
    "target": _text,
    "dtype": _text,
    "drafter": ComponentSpec.of,
    "verifier": ComponentSpec.of,
    "acceptance": ComponentSpec.of,
    "rollback": _rollback,
    "width": _width,
    "sampling": _sampling,
    "kv_cache": KVQuantization.of,
    "memory": MemorySettings.of,
    "kernels": KernelSettings.of,
    "insert": _inserts,
}
