"""The training run: from files to a checkpoint that `draftloom generate --drafter` takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx

from draftloom.drafters.dflash import DFlashModel, load_network
from draftloom.errors import DraftloomError, UsageError
from draftloom.model_info import ModelInfo
from draftloom.plugins import PluginManager

from .batches import Batches, Features
from .card import model_card
from .checkpoint import RunFolder, TrainState
from .data import Corpus, pack, read_corpus
from .design import DrafterDesign, design_drafter, load_init, read_config, trainable
from .document import repr_digest
from .evaluate import measure
from .features import FeatureCache, FeatureError, OnlineFeatures
from .group import Group, Signals
from .pace import Launched, Since
from .responses import Responses, ResponseSettings, prompts_of
from .settings import TrainSettings
from .step import BlockBatch, DrafterLoss
from .target import FrozenTarget
from .update import Updates, begin_state, make_optimizer
from .weights import in_order, initial_parameters
from .work import drafter_operations, target_operations

__all__ = ["TrainRequest", "Trainer"]


@attrs.frozen(kw_only=True)
class TrainRequest:
    """What is to be trained, on what, and where it goes.

    Attributes:
        target: folder, hub repository or bundled name; empty is the bundled one.
        data: files and folders.
        out: folder of the checkpoint.
        settings: of the training.
        design: of a new drafter.
        init: checkpoint to start from instead.
        responses: how the target writes responses first, which are then trained on in place of
            the data's own; None trains on the data as it is.
        responses_folder: where they are kept; None is within `out`.
        cache: folder for features; None computes them as they are needed.
        cache_bytes: budget of the cache; None is what the disk has.
        dtype: compute type of the target.
        resume: go on with the run in `out`.
    """

    target: str
    data: tuple[Path, ...]
    out: Path
    settings: TrainSettings
    design: DrafterDesign = attrs.Factory(DrafterDesign)
    init: Path | None = None
    responses: ResponseSettings | None = None
    responses_folder: Path | None = None
    cache: Path | None = None
    cache_bytes: int | None = None
    dtype: str = "auto"
    resume: bool = False


class Trainer:
    """One run. Made, everything is checked and loaded; `run` trains.

    Args:
        request: what is asked for.
        plugins: for the target and for measuring.
        on_record: told every record of the log, as it is written, and of features being kept; in
            a group, by process 0 only.
        group: the processes that train together; by default the one that the environment tells of.

    Raises:
        UsageError: settings, data or folders that cannot be used, or processes that do not come
            together or do not begin alike.
        ModelError: a target or checkpoint that cannot be loaded.
        FeatureError: the feature cache does not fit, or holds something else.
    """

    def __init__(
        self,
        request: TrainRequest,
        plugins: PluginManager,
        on_record: Callable[[dict[str, Any]], None] = lambda record: None,
        group: Group | None = None,
    ) -> None:
        self.group = Group.join() if group is None else group
        self.request, self.settings, self._plugins = request, request.settings, plugins
        self._on_record = on_record
        try:
            begun = self._load()
        except BaseException:
            self.group.agree(None)
            raise
        try:
            self.group.agree(begun)
        except BaseException:
            self.target.close()
            raise

    def _load(self) -> tuple[Any, Any]:
        self.settings.check(self.request.design.block_size or 2)
        self._check_group()
        self.target = FrozenTarget(self.request.target, self._plugins, self.request.dtype)
        try:
            return self._prepare()
        except BaseException:
            self.target.close()
            raise

    def _check_group(self) -> None:
        request = self.request
        if self.group.size > 1 and (request.cache is not None or request.responses is not None):
            what = "a feature cache" if request.responses is None else "responses of the target"
            raise UsageError(
                f"{what} cannot be made by {self.group.size} processes together",
                "leave the cache out: features are computed as they are needed"
                if request.responses is None
                else "let one process write them first, and give its files as data",
            )

    def _prepare(self) -> tuple[Any, Any]:
        """Load and check everything.

        Returns:
            What all processes must have alike: JSON data and parameters.
        """
        request, target, settings = self.request, self.target, self.settings
        if not target.info.can_tap:
            raise UsageError(
                f"{target.info.name} gives no hidden states, which DFlash reads",
                f"adapter {target.info.adapter} has no taps for {target.info.model_type}",
            )
        if request.init is not None:
            asked = attrs.asdict(request.design, filter=lambda _, value: value is not None)
            if asked:
                raise UsageError(
                    f"a drafter to start from has its own shape: {', '.join(asked)} cannot be "
                    "asked for",
                    "leave these out, or train a new drafter without init",
                )
            self.drafter = load_init(request.init, target.info)
        else:
            self.drafter = design_drafter(
                target.source, target.info, target.tokenizer, request.design
            )
        self.config = read_config(self.drafter, "the drafter")
        settings.check(self.config.block_size)
        self.corpus = read_corpus(
            request.data,
            target.tokenizer,
            target.info.vocab_size,
            held_out=settings.held_out,
            seed=settings.seed,
        )
        fingerprint = target.fingerprint()
        shaping = {
            **settings.shaping(),
            "target": fingerprint,
            "data": self.corpus.fingerprint,
            "drafter": self.drafter,
            "cached": request.cache is not None,
            "responses": None if request.responses is None else attrs.asdict(request.responses),
            "processes": self.group.size,
        }
        self.folder = RunFolder(request.out, shaping, writes=self.group.leads)
        self.folder.check(request.resume)
        if request.responses is not None:
            self.corpus = self._let_target_write(request.responses, fingerprint)
        separator = getattr(target.tokenizer, "eos_token_id", None)
        self.sequences = pack(self.corpus.train, settings.context, separator)
        target.tap(self.config.tap_layers)
        self.model = DFlashModel(self.config)
        self._loss = DrafterLoss(self.model, self.config, target, settings)
        self._of_target_token = 0  # kept features cost nothing
        if request.cache is None:
            self._of_target_token = target_operations(target, self.config.tap_layers, 1)
        begin = self._initial()
        # Before the folder is made: a cache that does not fit must leave nothing behind.
        features = self._features(fingerprint)
        self._batches = Batches(
            self.sequences,
            features,
            settings,
            slots=self.config.block_size - 1,
            part=(self.group.rank, self.group.size),
        )
        self.optimizer = make_optimizer(settings)
        self.state = self.folder.begin(request.resume) or TrainState(
            step=0, parameters=begin, optimizer=self.optimizer.state
        )
        self.state.parameters = in_order(self.state.parameters)
        self.state.optimizer = begin_state(
            self.optimizer, self.state.parameters, self.state.optimizer
        )
        self._updates = Updates(self._loss, self.optimizer, settings)
        self._launched: Launched | None = None
        self._since = Since()
        self._begun = False
        self._heard = Signals(clock=self.state.seconds)
        self._stopped: Callable[[], bool] = lambda: False
        return [shaping, self.state.step, self.state.seconds], self.state.parameters

    def _let_target_write(self, settings: ResponseSettings, fingerprint: str) -> Corpus:
        """The corpus with the target's own responses to train on; what is held out stays."""
        request, target = self.request, self.target
        prompts = prompts_of(self.corpus.train, settings, self.settings.context)
        folder = request.responses_folder or request.out / "training" / "responses"
        files = Responses(folder, target, fingerprint, prompts, settings).write(self._on_record)
        own = read_corpus(files, None, target.info.vocab_size, held_out=0.0, seed=0)
        return attrs.evolve(own, held_out=self.corpus.held_out, duplicates=self.corpus.duplicates)

    def _features(self, fingerprint: str) -> Features:
        with_logits = self.settings.loss == "kl"
        width = max(len(s) for s in self.sequences) if self.settings.compile else 0
        if self.request.cache is None:
            return OnlineFeatures(self.target, self.sequences, with_logits=with_logits, width=width)
        if with_logits:
            raise FeatureError(
                "the KL loss needs the target's logits, which a feature cache does not hold",
                "leave the cache out, or use cross-entropy",
            )
        sample = self.target.embed(mx.array([[0]]))
        key = {
            "target": fingerprint,
            "taps": list(self.config.tap_layers),
            "data": repr_digest(self.sequences),
            "dtype": str(sample.dtype).removeprefix("mlx.core."),
            "width": len(self.config.tap_layers) * self.target.info.hidden_size,
            "itemsize": sample.dtype.size,
        }
        lengths = [len(s) for s in self.sequences]
        cache = FeatureCache(self.request.cache, key, lengths, width=width)
        online = OnlineFeatures(self.target, self.sequences)
        cache.build(online, self.request.cache_bytes, self._tell_features)
        return cache

    def _tell_features(self, done: int, total: int) -> None:
        """Said, not logged: there may be no folder yet."""
        self._on_record({"kind": "features", "done": done, "total": total})

    def _initial(self) -> Any:
        if self.request.init is None:
            return initial_parameters(self.model, self.settings.seed)
        own = trainable(ModelInfo.from_path(self.request.init))
        return load_network(own, mx.float32)[0].parameters()

    @property
    def clock(self) -> float:
        """Seconds trained. The first step of a process, which compiles, is not counted. In a group
        what process 0 said of itself in the last step that was read: the same everywhere."""
        return self.state.seconds if self.group.size == 1 else self._heard.clock

    @property
    def finished(self) -> bool:
        """Whether the steps are done, or the time is over."""
        return self.settings.progress(self.state.step, self.clock) >= 1

    def run(self, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end, or until `stopped` says so after a step; what there is, is saved.

        In a group, a step or two after any process's `stopped` said so; all of them return when
        the last one has ended.

        Returns:
            Whether the end was reached.

        Raises:
            DraftloomError: a loss that is not finite, a disk that refuses, or another process that
                failed. The last saved step is whole.
        """
        self._stopped = stopped
        told = self.config.block_size
        try:
            finished = self._run()
        except BaseException as error:
            if not self.group.was_lost(error):
                self.group.leave(self.state.parameters, told, failed=True)
            if self.group.size > 1 and isinstance(error, RuntimeError):
                raise DraftloomError(
                    f"step {self.state.step + 1} failed, here or by the loss of another process: "
                    f"{error}",
                    f"{self.request.out} holds the last saved step: --resume goes on from there",
                ) from error
            raise
        if not self.group.leave(self.state.parameters, told, failed=False):
            raise _another_failed(self.request.out)
        return finished

    def _run(self) -> bool:
        settings, state = self.settings, self.state
        if state.step == 0 and not state.measured:
            self.folder.keep_held_out(self.corpus.held_out)
            self._save()
            if settings.eval_first:
                self._measure()
        self._since = Since()
        finished = self.finished
        while not finished:
            self._step()
            # One step stays in flight: its numbers are read when the next one is launched.
            if _due(state.step, settings.log_every):
                self._settle()
                self._log()
            finished = self.finished
            if finished:
                self._settle()
                self._log()
            halted = not finished and self._is_stopped()
            if finished or _due(state.step, settings.eval_every):
                self._save(measure_too=not halted)
            elif halted or _due(state.step, settings.save_every):
                self._save()
            else:
                continue
            self._since = Since()
            if halted:
                return False
        return True

    def _is_stopped(self) -> bool:
        return self._stopped() if self.group.size == 1 else self._heard.stop

    def _step(self) -> None:
        """Launch a step, and read the numbers of the one before."""
        settings, state = self.settings, self.state
        gradients, losses, shares = [], [], []
        blocks = tokens = operations = 0
        for part in range(settings.accumulate):
            batch, count = self._batches.batch(state.step * settings.accumulate + part)
            loss, share, gradient = self._updates.gradients(state.parameters, batch)
            if settings.accumulate > 1:  # else the memory of all of them is needed at once
                mx.async_eval(loss, share, gradient)
            gradients.append(gradient)
            losses.append(loss)
            shares.append(share)
            tokens, blocks = tokens + count, blocks + batch.anchors.size * self.group.size
            operations += self._operations(batch)
        rate = settings.rate(state.step, self.clock)
        gradient, loss, shares_now, signals = self._together(
            self._updates.mean(gradients), mx.stack(losses).mean(), mx.stack(shares).mean(axis=0)
        )
        state.parameters, state.optimizer, norm = self._updates.apply(
            state.parameters, state.optimizer, gradient, rate
        )
        numbers = mx.stack([loss, norm.astype(mx.float32), *signals])
        mx.async_eval(numbers, shares_now, state.parameters, state.optimizer)
        state.step, state.tokens = state.step + 1, state.tokens + tokens
        before, self._launched = self._launched, None
        if before is not None:
            self._read(before)
        self._launched = Launched(state.step, numbers, shares_now, rate, tokens, blocks, operations)
        if not self._begun:
            self._begun, seconds = True, state.seconds
            self._settle()
            took, state.seconds = state.seconds - seconds, seconds
            self._record({"kind": "first-step", "step": state.step, "seconds": took})
            if not (self.finished or _due(state.step, settings.log_every)):
                self._since = Since()

    def _together(
        self, gradient: Any, loss: mx.array, shares: mx.array
    ) -> tuple[Any, mx.array, mx.array, list[mx.array]]:
        """Gradient, loss and [K] shares of all processes, and what they signal."""
        if self.group.size == 1:
            return gradient, loss, shares, []
        mine = Signals(clock=self.state.seconds, stop=self._stopped())
        told = mx.concatenate([loss[None], shares]).astype(mx.float32)
        gradient, told, signals = self.group.average(gradient, told, mine)
        return gradient, told[0], told[1:], list(signals)

    def _operations(self, batch: BlockBatch) -> int:
        found = drafter_operations(self.config, batch)
        rows, context = batch.features.shape[:2]
        return (found + rows * context * self._of_target_token) * self.group.size

    def _settle(self) -> None:
        """Wait for the step in flight."""
        if self._launched is not None:
            launched, self._launched = self._launched, None
            self._read(launched)

    def _read(self, launched: Launched) -> None:
        numbers: Any = launched.numbers.tolist()
        loss, norm, *signals = numbers
        if signals:
            self._heard = self.group.heard(signals)
            if self._heard.failed:
                raise _another_failed(self.request.out)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DraftloomError(
                f"loss {loss} and gradient norm {norm} at step {launched.step} are not finite",
                f"try a lower learning rate; {self.request.out} holds the last saved step",
            )
        self.state.seconds += self._since.add(launched)

    def _log(self) -> None:
        since, state = self._since, self.state
        launched = since.last
        if launched is None:
            return
        numbers: Any = launched.numbers.tolist()
        loss, norm, *_ = numbers
        progress = self.settings.progress(state.step, self.clock)
        seconds = max(since.seconds, 1e-9)
        self._record(
            {
                "kind": "step",
                "step": state.step,
                "loss": loss,
                "gradient_norm": norm,
                "learning_rate": launched.rate,
                "right_by_position": launched.shares.tolist(),
                "tokens_per_second": since.tokens / seconds,
                "blocks_per_second": since.blocks / seconds,
                "operations_per_second": since.operations / seconds,
                "progress": progress,
                "seconds": state.seconds,
                "seconds_left": self._seconds_left(progress, since.seconds / since.steps),
            }
        )
        self._since = Since()

    def _seconds_left(self, progress: float, of_a_step: float) -> float:
        settings = self.settings
        ends = []
        if settings.steps is not None:
            ends.append((settings.steps - self.state.step) * of_a_step)
        if settings.max_minutes is not None:
            ends.append(60 * settings.max_minutes - self.clock)
        return max(0.0, min(ends))

    def _record(self, record: dict[str, Any]) -> None:
        if self.group.leads:
            self.folder.log(record)
            self._on_record(record)

    def _save(self, measure_too: bool = False) -> None:
        self._settle()
        if not self.group.leads:
            return
        # The window that a drafter of it takes unless told otherwise.
        config = {**self.drafter, "draftloom": {"context_length": self.settings.context}}
        self.folder.save(self.state, config, self._card())
        if measure_too:
            self._measure()

    def _measure(self) -> None:
        """Tau of what was just saved; then saved again, so that the card tells."""
        settings, state = self.settings, self.state
        documents = self.corpus.held_out[: settings.eval_prompts]
        if not documents or not self.group.leads:
            return
        self._settle()
        limit = settings.context - 1
        if self.target.info.context_limit:
            limit = max(1, min(limit, self.target.info.context_limit - settings.eval_tokens))
        measured = measure(
            self.target,
            self._plugins,
            self.request.out,
            documents,
            max_tokens=settings.eval_tokens,
            context=limit,
        )
        record = {"kind": "held-out", "step": state.step, **measured.as_dict()}
        state.measured.append(record)
        self._record(record)
        self._save()

    def _card(self) -> str:
        name = self.request.target or self.target.info.name
        return model_card(
            name, self.drafter, self.settings, self.corpus, self.state, self.group.size
        )

    def close(self) -> None:
        """Put the target back as mlx-lm loaded it."""
        self.target.close()


def _another_failed(out: Path) -> DraftloomError:
    return DraftloomError("another process failed, and says why", f"{out} holds what was saved")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
