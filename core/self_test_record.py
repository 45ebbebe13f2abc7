"""What `draftloom doctor --self-test` found on this device, kept in a small file of the user's.

A kernel that failed there is not run by ``auto`` and cannot be chosen. The file counts for the
device and the versions that it was made with, and is left aside elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx

from draftloom.device import backend_name
from draftloom.errors import UsageError
from draftloom.user_files import user_folder, write_whole
from draftloom.versions import version_of

__all__ = ["SelfTestRecord", "fingerprint", "record_file"]

FORMAT = 1


def record_file() -> Path:
    """Where the record is: ``draftloom/self-test.json`` in XDG_CONFIG_HOME or ~/.config."""
    return user_folder() / "self-test.json"


def fingerprint() -> dict[str, str]:
    """What a record counts for: the device, its backend, and the versions that kernels rest on."""
    details = mx.device_info()
    device = details.get("device_name") or details.get("architecture") or "?"
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return {
        "device": str(device),
        "backend": "cpu" if on_cpu else backend_name(),
        **{name: version_of(name) for name in ("draftloom", "mlx", "mlx-lm")},
    }


@attrs.frozen
class SelfTestRecord:
    """A finished self-test.

    Attributes:
        made_for: its `fingerprint`.
        date: when, ISO 8601.
        failed: why, by ``operation/implementation``; empty where everything passed.
        ignored: why the record does not count here; empty where it does.
    """

    made_for: Mapping[str, str]
    date: str
    failed: Mapping[str, str]
    ignored: str = ""

    @classmethod
    def load(cls, file: Path | None = None) -> SelfTestRecord | None:
        """The record of this user; None where there is none. One that cannot be read, or that was
        made elsewhere, says so in `ignored` and holds no failures.

        Args:
            file: by default `record_file()`.
        """
        file = record_file() if file is None else file
        if not file.is_file():
            return None
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            record = cls(dict(data["made_for"]), str(data["date"]), dict(data["failed"]))
            if data["format"] != FORMAT or not all(map(_is_text, record.failed.items())):
                raise ValueError("it has another format")
        except (OSError, ValueError, KeyError, TypeError) as error:
            return cls({}, "", {}, f"{file} cannot be read: {type(error).__name__}: {error}")
        here = fingerprint()
        for key, value in here.items():
            if record.made_for.get(key) != value:
                reason = f"it was made for {key} {record.made_for.get(key)}, this is {value}"
                return attrs.evolve(record, failed={}, ignored=reason)
        return record

    def save(self, file: Path | None = None) -> Path:
        """Write the record; gives the file.

        Raises:
            UsageError: the file cannot be written.
        """
        file = record_file() if file is None else file
        data: dict[str, Any] = {
            "format": FORMAT,
            "made_for": dict(self.made_for),
            "date": self.date,
            "failed": dict(self.failed),
        }
        try:
            write_whole(file, json.dumps(data, indent=1) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"{file} cannot be written: {reason}", "check permissions") from error
        return file


def _is_text(pair: tuple[Any, Any]) -> bool:
    return all(isinstance(part, str) for part in pair)
