"""Files of a training run. Each is written under another name and renamed: a reader finds the old
one or the new one, whatever happens in between.

    OUT/config.json, model.safetensors, README.md    the drafter, in the z-lab layout
    OUT/training/state.safetensors                   float32 weights, optimizer, step
    OUT/training/log.jsonl                           one record a logged step or measurement
    OUT/training/curves.html                         the log as curves
    OUT/training/held-out.jsonl                      what was held out, for `eval drafter --data`
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from draftloom.errors import DraftloomError, ModelError, UsageError

from .curves import curves_html, read_log
from .data import Document

__all__ = ["RunFolder", "TrainState"]


@attrs.define(eq=False)
class TrainState:
    """What a run goes on from.

    Attributes:
        step: updates done.
        parameters: of the drafter, float32.
        optimizer: the optimizer's state.
        seconds: trained so far, without the first step of each process.
        tokens: context tokens seen so far.
        measured: measurements of tau so far, as logged.
    """

    step: int
    parameters: Any
    optimizer: Any
    seconds: float = 0.0
    tokens: int = 0
    measured: list[dict[str, Any]] = attrs.Factory(list)


class RunFolder:
    """The output folder.

    Args:
        out: the folder.
        shaping: what the losses depend on; a run is resumed with the same only.
        writes: whether this process writes; else it reads the state, and nothing else happens.
    """

    def __init__(self, out: Path, shaping: dict[str, Any], writes: bool = True) -> None:
        self.out, self._writes = out, writes
        self._shaping = {"processes": 1, **json.loads(json.dumps(shaping))}
        self.state_file = out / "training" / "state.safetensors"
        self.log_file = out / "training" / "log.jsonl"

    def check(self, resume: bool) -> None:
        """See that the folder can be used; changes nothing.

        Raises:
            UsageError: a folder in use without `resume`, or nothing to resume.
        """
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out} is a file", "give a folder")
        if resume and not self.state_file.exists():
            raise UsageError(f"{self.out} holds no training run to resume", "leave out --resume")
        if resume:
            return
        if self.state_file.exists():
            raise UsageError(
                f"{self.out} holds a training run", "--resume goes on with it, or give another"
            )
        if (self.out / "config.json").exists() or (self.out / "model.safetensors").exists():
            raise UsageError(f"{self.out} holds a model", "give another folder")

    def begin(self, resume: bool) -> TrainState | None:
        """Make the folder, or read the state to go on from.

        Raises:
            UsageError: as `check`, or other settings.
            ModelError: a state that cannot be read.
        """
        self.check(resume)
        if not resume:
            if self._writes:
                self._make()
            return None
        state = self._read()
        if self._writes:
            self._cut_log(state.step)
        return state

    def _make(self) -> None:
        try:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            self.log_file.write_text("", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"--out {self.out} cannot be made: {error.strerror or error}", "check the path"
            ) from error

    def _read(self) -> TrainState:
        try:
            loaded: Any = mx.load(str(self.state_file), return_metadata=True)
            arrays, metadata = loaded
            facts = json.loads(metadata["draftloom"])
            mx.eval(arrays)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ModelError(
                f"{self.state_file} cannot be read: {' '.join(str(error).split())[:200]}",
                "start again with another --out",
            ) from error
        theirs = {"processes": 1, **facts["shaping"]}
        names = {*theirs, *self._shaping}
        other = sorted(n for n in names if theirs.get(n) != self._shaping.get(n))
        if other:
            raise UsageError(
                f"{self.out} was trained with other settings: {', '.join(other)} "
                f"({other[0]}: {str(theirs.get(other[0]))[:40]}, "
                f"now {str(self._shaping.get(other[0]))[:40]})",
                "resume with the same, or give another --out",
            )

        def part(prefix: str) -> Any:
            items = [(k[len(prefix) :], v) for k, v in arrays.items() if k.startswith(prefix)]
            return tree_unflatten(items)

        return TrainState(
            step=facts["step"],
            parameters=part("parameters."),
            optimizer=part("optimizer."),
            seconds=facts["seconds"],
            tokens=facts["tokens"],
            measured=facts["measured"],
        )

    def save(self, state: TrainState, config: dict[str, Any], card: str) -> None:
        """Write state and drafter.

        Raises:
            DraftloomError: the disk refuses; what was there before is whole.
        """
        if not self._writes:
            return
        arrays: dict[str, mx.array] = {}
        for prefix, tree in (("parameters.", state.parameters), ("optimizer.", state.optimizer)):
            flat: Any = tree_flatten(tree)
            arrays.update({prefix + name: value for name, value in flat})
        facts = {
            "step": state.step,
            "seconds": state.seconds,
            "tokens": state.tokens,
            "measured": state.measured,
            "shaping": self._shaping,
        }
        try:
            self._arrays(self.state_file, arrays, {"draftloom": json.dumps(facts)})
            if state.measured:  # what the mismatch alarm compares with
                stated = round(max(state.measured[-1]["tau"], 1.0), 3)
                known = config.get("draftloom") or {}
                config = {**config, "draftloom": {**known, "acceptance_length": stated}}
            self.save_drafter(state.parameters, config, card)
            curves = curves_html(f"draftloom train: {self.out.name}", read_log(self.log_file))
            self._text(self.out / "training" / "curves.html", curves)
        except (OSError, RuntimeError) as error:
            raise DraftloomError(
                f"step {state.step} cannot be saved in {self.out}: {error}",
                "make room; --resume goes on from the step saved before",
            ) from error

    def save_drafter(self, parameters: Any, config: dict[str, Any], card: str) -> None:
        """Write the drafter, in the type that its config names."""
        dtype = getattr(mx, config.get("dtype") or "bfloat16")
        flat: Any = tree_flatten(parameters)
        weights = {name: value.astype(dtype) for name, value in flat}
        self._text(self.out / "config.json", json.dumps(config, indent=1) + "\n")
        self._arrays(self.out / "model.safetensors", weights, {"format": "mlx"})
        self._text(self.out / "README.md", card)

    @staticmethod
    def _arrays(file: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
        temporary = file.with_name(f".writing-{file.name}")
        mx.save_safetensors(str(temporary), arrays, metadata)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)

    @staticmethod
    def _text(file: Path, text: str) -> None:
        temporary = file.with_name(f".writing-{file.name}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)

    def keep_held_out(self, documents: Sequence[Document]) -> None:
        """Write what is held out, in a form that `--data` reads."""
        if not self._writes:
            return
        lines = (
            json.dumps({"tokens": d.tokens, "prompt_tokens": d.prompt}) + "\n" for d in documents
        )
        file = self.out / "training" / "held-out.jsonl"
        try:
            self._text(file, "".join(lines))
        except OSError as error:
            raise DraftloomError(f"{file} cannot be written: {error}", "make room") from error

    def log(self, record: dict[str, Any]) -> None:
        """Append a record.

        Raises:
            DraftloomError: the disk refuses; what was saved before is whole.
        """
        if not self._writes:
            return
        try:
            with self.log_file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise DraftloomError(
                f"{self.log_file} cannot be written: {error}",
                "make room; --resume goes on from the step saved before",
            ) from error

    def _cut_log(self, step: int) -> None:
        """Drop records of steps after the one saved: they are made again."""
        lines = []
        if self.log_file.exists():
            lines = self.log_file.read_text(encoding="utf-8").splitlines()
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:  # the last line of a killed run may be cut short
                continue
        self._text(self.log_file, "".join(kept))
