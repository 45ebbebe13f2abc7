"""What a model says of itself in its config, read before any weight."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import mlx.nn as nn

from draftloom.errors import ModelError

__all__ = ["ModelInfo"]


@attrs.frozen
class ModelInfo:
    """A model's config and where it lies.

    Attributes:
        name: what the user called it (hub name or folder).
        path: local folder; None for a model that is in memory already.
        config: config.json as read (for a model in memory, its `args`).
    """

    name: str
    path: Path | None
    config: Mapping[str, Any] = attrs.field(repr=False)

    @property
    def model_type(self) -> str:
        """`model_type` of the config."""
        return str(self.config.get("model_type", ""))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config (the whole of it where it has no parts)."""
        return self.config.get("text_config") or self.config

    @property
    def architectures(self) -> tuple[str, ...]:
        """`architectures` of the config, () where absent."""
        value = self.config.get("architectures") or ()
        return (value,) if isinstance(value, str) else tuple(value)

    @property
    def stated_length(self) -> float | None:
        """The acceptance length that a drafter's checkpoint states
        (``"draftloom": {"acceptance_length": 3.3}`` in its config); None where it states none.

        Raises:
            ModelError: something else than a number of at least 1.
        """
        table = self.config.get("draftloom")
        value = table.get("acceptance_length") if isinstance(table, Mapping) else None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 1e4:
            raise ModelError(
                f"config.json of {self.name}: draftloom.acceptance_length must be a number of at "
                f"least 1, got {value!r}",
                "it is what the mismatch alarm compares with; leave it out if it is not known",
            )
        return float(value)

    @property
    def trained_context(self) -> int | None:
        """Tokens of the longest sequences that a drafter was trained on, as its checkpoint states
        them (``"draftloom": {"context_length": 2048}`` in its config); None where it states none.

        Raises:
            ModelError: something else than a whole number of at least 1.
        """
        table = self.config.get("draftloom")
        value = table.get("context_length") if isinstance(table, Mapping) else None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(
                f"config.json of {self.name}: draftloom.context_length must be a whole number of "
                f"at least 1, got {value!r}",
                "it is the drafter's default window; leave it out if it is not known",
            )
        return value

    @classmethod
    def from_path(cls, path: Path, name: str = "") -> ModelInfo:
        """Read config.json of a model folder.

        Args:
            path: the folder.
            name: what the user called it; the folder where empty.

        Raises:
            ModelError: no such folder, no config.json, or one that cannot be read.
        """
        name = name or str(path)
        if not path.is_dir():
            raise ModelError(f"no model folder at {path}", "give a folder or a hub repository")
        file = path / "config.json"
        if not file.is_file():
            raise ModelError(
                f"{path} has no config.json", "is the download complete, and is it a model folder?"
            )
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read: {error}", "download it again") from error
        named = isinstance(config, dict) and (
            config.get("model_type") or config.get("architectures")
        )
        if not named:
            raise ModelError(f"{file} has no model_type", "is it a model's config.json?")
        return cls(name, path, config)

    @classmethod
    def from_model(cls, model: nn.Module) -> ModelInfo:
        """Describe a model that mlx-lm has loaded, from its `args` (some keep them as `config`).

        Raises:
            ModelError: the module carries no mlx-lm `args`.
        """
        args = getattr(model, "args", None) or getattr(model, "config", None)
        config = dict(vars(args)) if args is not None and hasattr(args, "__dict__") else {}
        for key, value in config.items():  # parts that mlx-lm has made arguments of
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                config[key] = dict(vars(value))
        config.setdefault("model_type", getattr(model, "model_type", ""))
        if not config["model_type"]:
            raise ModelError(
                f"{type(model).__name__} has no args with a model_type",
                "pass a model loaded by mlx_lm.load",
            )
        return cls(type(model).__module__.rpartition(".")[2], None, config)
