"""A pretraining run in a folder: trains, validates, keeps checkpoints and a log, and goes on where it was stopped.

The weights after N steps are a function of corpus, configuration, versions and number of ranks: whoever kills the run,
and however often, resumes it to the same bits. On another number of ranks it differs by rounding.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from proteinbert_fast import _cpu_kernels
from proteinbert_fast.checkpoints import GoTerm
from proteinbert_fast.checkpoints.files import one_line, write_atomically
from proteinbert_fast.data.corpus import Corpus
from proteinbert_fast.data.disk import take_lock
from proteinbert_fast.data.loader import Loader, Step, numbers_of
from proteinbert_fast.data.prefetch import Prefetched
from proteinbert_fast.data.sampling import Cursor
from proteinbert_fast.devices import checked_device
from proteinbert_fast.errors import BackendError, CheckpointError, InputError
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.ops.backends import Backend
from proteinbert_fast.ops.instruction_sets import MIXED, UNKNOWN, check_ranks, check_resumed, joined, kernels_in_use
from proteinbert_fast.pretraining.config import PretrainingConfig
from proteinbert_fast.pretraining.objective import Objective, Task, divisors, make_task
from proteinbert_fast.pretraining.optimizers import KerasAdam, Lamb, check_gradients, largest_gradients
from proteinbert_fast.pretraining.progress import Log, Meter, TensorBoard
from proteinbert_fast.pretraining.run_state import (
    RunState,
    checkpoints,
    from_first,
    is_distributed,
    is_first,
    load_state,
    save_state,
    sweep,
)
from proteinbert_fast.pretraining.schedules import LearningRate
from proteinbert_fast.pretraining.validation import validate

logger = logging.getLogger(__name__)

CONFIG_FILE, LOG_FILE, CHECKPOINTS, LOCK = "config.json", "log.jsonl", "checkpoints", "lock"
MODEL_FOLDER, BEST_FOLDER = "model", "best"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Pretrained:
    """How a run stands.

    Attributes:
        step: steps made.
        is_complete: whether these are all.
        model_folder: with the trained model, for ``ProteinBert.from_pretrained``; None if it was stopped before.
        best_folder: with that of the lowest validation loss so far; None without ``keep_best``, without a
            validation, or where its weights are gone.
        checkpoint: the newest.
        validation: the last validation's numbers, {} if there was none.
    """

    step: int
    is_complete: bool
    model_folder: Path | None
    best_folder: Path | None
    checkpoint: Path
    validation: dict[str, Any]


def pretrain(
    corpus: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    config: PretrainingConfig | None = None,
    *,
    hidden_ids: Iterable[str] = (),
    device: torch.device | str | None = None,
    backend: Backend = "auto",
    resume: bool = False,
    allow_different_kernels: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
) -> Pretrained:
    """Pretrains a model on a corpus. Under torchrun, every rank calls this.

    Args:
        corpus: file of ``build_corpus``.
        folder: of the run: log, checkpoints, and the trained model at the end.
        config: options; the defaults when None.
        hidden_ids: proteins whose GO terms are neither shown nor learned, for instance those of a benchmark.
        device: to train on; the GPU if there is one when None.
        backend: of the model, see ProteinBert.
        resume: go on from the newest checkpoint in the folder, or start if there is none.
        allow_different_kernels: resume also where the CPU kernels of another instruction set or version have trained,
            and let ranks run different ones. Bits differ from there on; checkpoints name all that took part.
        should_stop: asked after each step; when true, the run stops with a checkpoint.
        progress: show a line of progress on stderr.

    Raises:
        InputError: the corpus cannot be read or has too few proteins; the folder holds another run, or another process
            is training there; other kernels have trained it, or ranks run different ones, and that was not allowed.
        CheckpointError: a checkpoint is damaged or cannot be written.
        NonFiniteError: gradients hold NaN or infinity; names the parameters.
        BackendError: the device's memory does not suffice.
    """
    config = config or PretrainingConfig()
    with Corpus(corpus) as opened, _claimed(Path(folder)):
        try:
            run = _Run(
                opened, Path(folder), config, tuple(hidden_ids), _device(device), backend, resume,
                allow_different_kernels, progress,
            )  # fmt: skip
            return run.run(should_stop)
        except torch.OutOfMemoryError as error:
            most = config.tokens_per_pass or config.tokens_per_batch
            raise BackendError(
                f"the GPU's memory does not suffice for {most:,} tokens at a time: a smaller tokens_per_pass gives the "
                'same step in more parts, and save = "inputs" keeps less'
            ) from error


class _Run:
    def __init__(
        self,
        corpus: Corpus,
        folder: Path,
        config: PretrainingConfig,
        hidden_ids: tuple[str, ...],
        device: torch.device,
        backend: Backend,
        resume: bool,
        allow_different_kernels: bool,
        progress: bool,
    ) -> None:
        self.corpus, self.folder, self.config, self.device = corpus, folder, config, device
        self.rank, self.n_ranks = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        self.n_terms = len(corpus.terms)
        self.hidden = self._hidden(hidden_ids)
        self.loader = Loader(
            corpus, config.cutting(), seed=config.seed, gap=config.model(1).reach, hidden=self.hidden,
            rank=self.rank, n_ranks=self.n_ranks, tokens_per_pass=config.tokens_per_pass or None,
        )  # fmt: skip
        torch.manual_seed(config.seed)
        self.model = ProteinBert(config.model(self.n_terms), backend, config.save).to(device).train()
        self.model.go_terms = tuple(GoTerm(t.id, t.name) for t in corpus.terms) or None
        self.ema = [p.detach().clone() for p in self.model.parameters()] if config.ema else []
        self.optimizer = make_optimizer(self.model, config)
        self.rate = LearningRate(self.optimizer, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.step, self.cursor = 0, Cursor()
        self.counts = {"records": 0, "residues": 0, "skipped": 0, "seconds": 0.0}
        self.best: dict[str, Any] = {"step": -1, "loss": math.inf}
        self.best_folder: Path | None = None
        self.validation: dict[str, Any] = {}
        self.sums: dict[str, Any] = {}  # the meter's, of the steps since the last row of the log
        # Of all that took part; each rank knows those of all.
        self.kernels = self._kernels_of_ranks(allow_different_kernels)
        self._start_or_resume(resume, allow_different_kernels)
        self.objective: nn.Module = Objective(self.model)
        if self.n_ranks > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.objective = nn.parallel.DistributedDataParallel(
                self.objective, device_ids=ids, gradient_as_bucket_view=True
            )
        self.is_settled = self.n_ranks == 1
        self.board = TensorBoard(folder, self.step) if is_first() and config.tensorboard else None
        self.log = Log(folder / LOG_FILE, self.step) if is_first() else None
        self.meter = Meter(config, self.model.config, device, self.n_ranks, progress and is_first(), self.step)
        if self.sums:
            self.meter.load_state_dict(self.sums)

    def run(self, should_stop: Callable[[], bool]) -> Pretrained:
        config = self.config
        started = time.monotonic()
        saved_at, saved_step = started, self.step if self.step else -1
        with ExitStack() as stack:
            for thing in (self.meter, self.log, self.board):
                if thing is not None:
                    stack.callback(thing.close)
            if config.keep_best and self.best["step"] >= 0:
                self._restore_best()
            if self.step < config.steps:
                stream = Prefetched(self._tasks(), ahead=2)
                for step, tasks in stack.enter_context(stream):
                    self._train(step, tasks)
                    if config.validate_every and self.step % config.validate_every == 0:
                        self._validate()
                    now = time.monotonic()
                    minutes = (now - started) / 60
                    stop = self._agreed(
                        should_stop() or (config.max_minutes > 0 and minutes >= config.max_minutes),
                        config.checkpoint_minutes > 0 and (now - saved_at) / 60 >= config.checkpoint_minutes,
                    )
                    is_last = self.step >= config.steps or stop[0]
                    if is_last and self.step == config.steps and self.validation.get("step") != self.step:
                        self._validate()
                    is_best = config.keep_best and self.best["step"] == self.step
                    if is_last or is_best or stop[1] or self.step % config.checkpoint_every == 0:
                        self._save()
                        saved_at, saved_step = time.monotonic(), self.step
                    if is_best:
                        self.best_folder = self._export(BEST_FOLDER)
                    if is_last:
                        break
            if saved_step != self.step:
                self._save()
            saved = self._newest()
        is_complete = self.step >= config.steps
        model_folder = self._export(MODEL_FOLDER) if is_complete else None
        return Pretrained(self.step, is_complete, model_folder, self.best_folder, saved[1], self.validation)

    def _restore_best(self) -> None:
        """Writes the best model anew when a run goes on: it may have been killed before, or may not have kept it."""
        step = self.best["step"]
        if step == self.step:
            self.best_folder = self._export(BEST_FOLDER)
        elif path := dict(from_first(checkpoints(self.folder / CHECKPOINTS))).get(step):
            tensors = load_state(path).tensors
            prefix = "ema." if self.ema else "model."
            weights = [tensors[prefix + name].to(self.device) for name, _ in self.model.named_parameters()]
            self.best_folder = self._export(BEST_FOLDER, weights)

    def _export(self, name: str, weights: list[Tensor] | None = None) -> Path:
        """Writes the model, its running mean where there is one, or with other weights; all ranks wait for it."""
        folder = self.folder / name
        error = None
        if is_first():
            try:
                with self._averaged() if weights is None else _swapped(self.model, weights):
                    self.model.save_pretrained(folder)
            except CheckpointError as failure:
                error = str(failure)
        if error := from_first(error):
            raise CheckpointError(error)
        return folder

    def _tasks(self) -> Iterator[tuple[Step, list[Task]]]:
        """Steps with their corrupted batches; runs ahead in a thread."""
        n = self.model.config.n_annotations
        for step in self.loader.steps(self.cursor):
            yield step, [make_task(part, n, self.config, self.device) for part in step.parts]

    def _train(self, step: Step, tasks: list[Task]) -> None:
        config = self.config
        rate = self.rate.before(self.step)
        over_tokens, over_proteins = divisors(config, step)
        if not self.is_settled:
            self._settle(tasks[0])
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for i, (part, task) in enumerate(zip(step.parts, tasks, strict=True)):
            with self._unsynced(i < len(tasks) - 1):
                with self._autocast():
                    tokens, annotations = self.objective(task)
                    counts = float(part.is_real)
                    loss = tokens * (counts / over_tokens)
                    loss = loss + annotations * (counts * config.annotation_weight / over_proteins)
                # DistributedDataParallel takes the mean over ranks, where the sum is meant.
                self.scaler.scale(loss * self.n_ranks).backward()
            sums += torch.stack([tokens.detach(), annotations.detach()]).double() * counts
        # All that the host needs to know of the step, so that it waits for a GPU once.
        if is_distributed():
            dist.all_reduce(sums)
        self.scaler.unscale_(self.optimizer)
        ((names, largest),) = largest_gradients(self.model).values()
        token_sum, annotation_sum, *sizes = torch.cat([sums, largest.double()]).tolist()
        nonfinite = [name for name, size in zip(names, sizes, strict=True) if not math.isfinite(size)]
        is_made = self._move_weights(nonfinite)
        token_loss, annotation_loss = token_sum / over_tokens, annotation_sum / over_proteins
        loss_value = token_loss + config.annotation_weight * annotation_loss
        if is_made:
            self.rate.after(loss_value)
            for mean, p in zip(self.ema, self.model.parameters(), strict=bool(self.ema)):
                mean.lerp_(p.detach(), 1 - config.ema)
        self.step, self.cursor = self.step + 1, step.following
        self.counts["records"] += step.n_proteins
        self.counts["residues"] += step.n_residues
        self.meter.add(step, token_loss, annotation_loss, is_made)
        if self.step % config.log_every == 0 or self.step == config.steps:
            self._record(
                {"kind": "train", "epoch": step.epoch, "loss": loss_value if math.isfinite(loss_value) else None}
                | {"learning_rate": rate}
                | ({"window": step.window} if config.batches == "episodes" else {})
                | self.meter.row()
            )

    def _settle(self, task: Task) -> None:
        """Lets DistributedDataParallel arrange gradients as it will in every step.

        The places of gradients in its buckets decide the order in which ranks are summed, and so the rounding. It
        chooses them by the order in which its first backward pass completes them, and that pass has others. Without
        this one, from which nothing is kept, a run that is resumed would round a step as one that goes on does not.
        """
        with self._autocast():
            tokens, annotations = self.objective(task)
            loss = (tokens + annotations) * 0
        loss.backward()
        self.is_settled = True

    def _move_weights(self, nonfinite: list[str]) -> bool:
        """The optimiser's step, or none where some parameters' gradients are not finite; whether it was made.

        Infinities are part of finding a loss scale: they end a run only where no smaller scale would help.
        """
        config = self.config
        may_stop = not self.scaler.is_enabled() or self.scaler.get_scale() <= 1
        is_finite = check_gradients(self.model, config.nonfinite if may_stop else "skip", nonfinite)
        if not is_finite:
            self.counts["skipped"] += 1
        elif config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if is_finite or self.scaler.is_enabled():  # the scaler has seen the same, and will lower the scale
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return is_finite

    def _validate(self) -> None:
        began = time.monotonic()
        with self._averaged(), self._autocast():
            found = validate(self.model, self.corpus, self.config, self.device, self.rank, self.n_ranks)
        self.meter.leave_out(time.monotonic() - began)
        if found is None:
            return
        self.validation = {"step": self.step, **found}
        loss = found["token_loss"] + self.config.annotation_weight * found["annotation_loss"]
        if loss < self.best["loss"]:
            self.best = {"step": self.step, "loss": loss}
        self._record({"kind": "validation", "is_best": self.best["step"] == self.step, **found})

    def _record(self, row: dict[str, Any]) -> None:
        seconds = self.counts["seconds"] + self.meter.seconds
        place = {"step": self.step, "records": self.counts["records"], "residues": self.counts["residues"]}
        row = {"kind": row["kind"], **place, **row, "skipped": self.counts["skipped"], "seconds": round(seconds, 3)}
        if self.log is not None:
            self.log.write(row)
        if self.board is not None:
            self.board.write(row)

    def _save(self) -> None:
        if self.log is not None:
            self.log.flush()
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        names = [name for name, _ in self.model.named_parameters()]
        tensors |= {f"ema.{name}": mean for name, mean in zip(names, self.ema, strict=bool(self.ema))}
        of = {id(p): name for name, p in self.model.named_parameters()}
        for p, state in self.optimizer.state.items():
            tensors |= {f"optimizer.{of[id(p)]}.{key}": value for key, value in state.items()}
        counts = self.counts | {"seconds": round(self.counts["seconds"] + self.meter.seconds, 3)}
        facts = {
            "corpus": self.corpus.fingerprint,
            "hidden": _digest(self.hidden),
            "config": self.config.to_dict(),
            "cursor": self.cursor.to_json(),
            "counts": counts,
            "learning_rate": self.rate.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "validation": self.validation,
            "meter": self.meter.state_dict(),
            **self._machine(),
        }
        on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()} if is_first() else {}
        save_state(self.folder / CHECKPOINTS, self.step, RunState(on_host, facts))
        if is_first():
            keep = {self.best["step"]} if self.config.keep_best else set()
            sweep(self.folder / CHECKPOINTS, self.config.keep_last, self.config.keep_every, keep)

    def _start_or_resume(self, resume: bool, allow_different_kernels: bool) -> None:
        found = from_first(checkpoints(self.folder / CHECKPOINTS))
        there = from_first({name for name in (CONFIG_FILE, MODEL_FOLDER, BEST_FOLDER) if (self.folder / name).exists()})
        if found and not resume:
            raise InputError(
                f"{self.folder}: holds a run already, with a checkpoint of step {found[-1][0]:,}: go on with it "
                "(--resume), or choose another folder"
            )
        if not found and (models := sorted(there - {CONFIG_FILE})):
            raise InputError(
                f"{self.folder}: holds {' and '.join(models)} of a run whose checkpoints are gone: choose another "
                "folder, or move this one away"
            )
        if there and not found and not resume:
            raise InputError(
                f"{self.folder}: holds a run that was stopped before its first checkpoint: begin it again (--resume), "
                "or choose another folder"
            )
        if found:
            self._load(found[-1][1], allow_different_kernels)
        if is_first():
            facts = {"corpus": self.corpus.fingerprint, "config": self.config.to_dict(), "kernels": self.kernels}
            write_atomically(self.folder / CONFIG_FILE, [(json.dumps(facts, indent=1) + "\n").encode()])

    def _load(self, path: Path, allow_different_kernels: bool) -> None:
        state = load_state(path)
        facts = state.facts
        try:
            theirs = PretrainingConfig.from_dict(facts["config"], str(path))
            step = facts["step"]
            if facts["corpus"] != self.corpus.fingerprint:
                raise InputError(
                    f"{path}: was trained on another corpus, of fingerprint {facts['corpus'][:16]}; "
                    f"{self.corpus.path} has {self.corpus.fingerprint[:16]}"
                )
            if difference := self.config.difference(theirs, step):
                raise InputError(f"{path}: is of another run: {difference}")
            if facts["hidden"] != _digest(self.hidden):
                raise InputError(f"{path}: is of another run: other proteins had their GO terms hidden")
            self._continue_kernels(path, facts, allow_different_kernels)
            self.step, self.cursor = step, Cursor.from_json(facts["cursor"])
            self.counts, self.best, self.validation = facts["counts"], facts["best"], facts["validation"]
            self.sums = facts["meter"]
            self.rate.load_state_dict(facts["learning_rate"])
            self.scaler.load_state_dict(facts["scaler"])
            self._load_tensors(state.tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {error}") from error
        for name, now in self._machine().items():
            before = facts.get(name, now)
            if before != now and name != "kernels" and is_first():
                logger.warning("%s: %s was %s, is %s: sums may round otherwise", path, name, before, now)

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        def below(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(below("model."))
        named = dict(self.model.named_parameters())
        if self.ema:
            means = below("ema.")
            self.ema = [means[name].to(self.device) for name in named]
        moments: dict[str, dict[str, Tensor]] = {}
        for name, value in below("optimizer.").items():
            parameter, _, key = name.rpartition(".")
            moments.setdefault(parameter, {})[key] = value
        number = {id(p): i for i, p in enumerate(p for g in self.optimizer.param_groups for p in g["params"])}
        state = {number[id(named[name])]: values for name, values in moments.items()}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def _machine(self) -> dict[str, Any]:
        """What else than corpus and options may decide how sums round."""
        threads = torch.get_num_threads() if self.device.type == "cpu" else None
        return {
            "ranks": self.n_ranks, "device": self.device.type, "threads": threads, "backend": self._backend(),
            "kernels": self.kernels, "torch": torch.__version__,
        }  # fmt: skip

    def _backend(self) -> str:
        with self._autocast():
            return self.model.backend_report().partition(" ")[0]

    def _kernels_of_ranks(self, allow_different_kernels: bool) -> str | None:
        """The record of what all ranks run; None where no rank runs the CPU kernels."""
        backend = self._backend()
        mine = kernels_in_use() if backend == "cpu" else backend
        held: list[Any] = [(mine, _cpu_kernels.instruction_sets())]
        if is_distributed():
            held = [None] * self.n_ranks
            dist.all_gather_object(held, (mine, _cpu_kernels.instruction_sets()))
        records, sets = zip(*held, strict=True)
        record = check_ranks(records, sets, str(self.folder), allow_different_kernels)
        if len(set(records)) > 1 and is_first():
            logger.warning("%s: ranks run different kernels (%s): bits differ", self.folder, record)
        return None if record == backend else record

    def _continue_kernels(self, path: Path, facts: dict[str, Any], allow_different_kernels: bool) -> None:
        is_complete = facts["step"] >= self.config.steps  # so that nothing more is computed
        if is_complete or self.kernels is None:
            self.kernels = facts.get("kernels")
            return
        backend = self._backend()
        if facts.get("backend", backend) != backend:  # of which a warning tells
            self.kernels = joined([*filter(None, [facts.get("kernels")]), self.kernels])
            return
        before = facts.get("kernels") or UNKNOWN
        self.kernels = check_resumed(before, self.kernels, str(path), allow_different_kernels)
        if self.kernels != before and is_first():
            logger.warning(MIXED, path, self.kernels)

    def _newest(self) -> tuple[int, Path]:
        return from_first(checkpoints(self.folder / CHECKPOINTS))[-1]

    def _agreed(self, *wishes: bool) -> tuple[bool, ...]:
        """What any rank wishes: clocks and signals reach them at different times."""
        if not is_distributed():
            return wishes
        # On the host where a back end for it was named, as the command does: that waits for no GPU.
        device = "cpu" if "cpu:" in dist.get_backend_config() else self.device
        wanted = torch.tensor([float(w) for w in wishes], device=device)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        return tuple(bool(w) for w in wanted.tolist())

    def _hidden(self, ids: tuple[str, ...]) -> npt.NDArray[np.bool_] | None:
        if not ids:
            return None
        hidden, missing = numbers_of(self.corpus, ids)
        if missing and is_first():
            logger.warning("%s: has no protein for %d of %d hidden ids", self.corpus.path, missing, len(set(ids)))
        return hidden

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _DTYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _unsynced(self, more_follow: bool) -> AbstractContextManager[Any]:
        if more_follow and isinstance(self.objective, nn.parallel.DistributedDataParallel):
            return self.objective.no_sync()
        return nullcontext()

    def _averaged(self) -> AbstractContextManager[None]:
        return _swapped(self.model, self.ema) if self.ema else nullcontext()


class _swapped(AbstractContextManager[None]):
    """The model with other weights, for a while."""

    def __init__(self, model: ProteinBert, weights: list[Tensor]) -> None:
        self._model, self._weights = model, weights

    def __enter__(self) -> None:
        self._own = [p.detach().clone() for p in self._model.parameters()]
        self._set(self._weights)

    def __exit__(self, *_: object) -> None:
        self._set(self._own)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for p, value in zip(self._model.parameters(), values, strict=True):
            p.copy_(value)


def make_optimizer(model: nn.Module, config: PretrainingConfig) -> torch.optim.Optimizer:
    """The optimiser that a configuration names. Weight decay is for matrices and convolutions only."""
    named = list(model.named_parameters())
    decays = [p for _, p in named if p.dim() > 1]
    others = [p for _, p in named if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
    options: dict[str, Any] = {
        "lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }  # fmt: skip
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    return (Lamb if config.optimizer == "lamb" else KerasAdam)(groups, **options)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Two processes never write one run. Under torchrun, the first rank has it for all."""
    lock: TextIO | None = None
    complaint = None
    if is_first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(str(folder / LOCK))
        except BlockingIOError:
            complaint = f"{folder}: another process is training there now"
        except OSError as error:
            complaint = f"{folder}: cannot be used as the folder of a run: {one_line(error)}"
    if complaint := from_first(complaint):
        raise InputError(complaint)
    try:
        yield
    finally:
        if lock is not None:
            (folder / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # it is empty only where nothing was begun
                folder.rmdir()
            lock.close()


def _device(wanted: torch.device | str | None) -> torch.device:
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = checked_device(wanted)
    if str(device) == "cuda":
        device = checked_device(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _digest(hidden: npt.NDArray[np.bool_] | None) -> str:
    import hashlib

    return "" if hidden is None else hashlib.sha256(np.packbits(hidden).tobytes()).hexdigest()
