"""What the options of a run do: corruption, episodes, hidden GO terms, running mean, clipping, decay, clocks, log."""

import math
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from proteinbert_fast import ProteinBert
from proteinbert_fast.cli.main import main
from proteinbert_fast.data.corpus import Corpus
from proteinbert_fast.data.loader import Loader
from proteinbert_fast.data.sampling import Episodes
from proteinbert_fast.errors import InputError
from proteinbert_fast.pretraining import progress, run_state, trainer
from proteinbert_fast.pretraining.objective import Task, divisors, make_task
from proteinbert_fast.pretraining.trainer import pretrain

from .runs import MODERN, SMALL, log, same, stop_after, weights

EXAMPLES = Path(__file__).parents[2] / "examples"
ONE = replace(SMALL, steps=1, validate_every=0, log_every=1)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """What options do is the same everywhere; on CPUs, small models have kernels that repeat to the bit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def tasks_of(corpus: Path, config: Any, steps: int, hide: float | None = None) -> list[Task]:
    with Corpus(corpus) as opened:
        loader = Loader(opened, config.cutting(), seed=config.seed, gap=config.model(1).reach)
        stream = loader.steps()
        parts = [part for _ in range(steps) for part in next(stream).parts]
        return [make_task(part, len(opened.terms), config, torch.device("cpu"), hide) for part in parts]


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.3])
def test_tokens_are_replaced_with_the_probability_of_the_run(small_corpus, probability):
    tasks = tasks_of(small_corpus, replace(SMALL, replace_probability=probability), 40)
    changed = sum(int((task.noisy.tokens != task.clean.tokens).sum()) for task in tasks)
    n = sum(task.clean.n_tokens for task in tasks)
    expected = probability * 25 / 26  # one in 26 is replaced by itself
    assert changed / n == pytest.approx(expected, abs=4 * math.sqrt(expected / n) + 1e-12)


def test_go_terms_are_corrupted_with_the_probabilities_of_the_run(small_corpus):
    def shown(**options: float) -> tuple[int, int, int]:
        """Terms that are true and shown, true, and shown though false."""
        config = replace(
            SMALL, **{"hide_probability": 0.0, "remove_probability": 0.0, "add_probability": 0.0, **options}
        )
        kept = true = added = 0
        for task in tasks_of(small_corpus, config, 40):
            n, n_terms = len(task.annotation_weights), 1 << 20
            sets = []
            for indices, offsets in (task.shown, task.terms):
                counts = torch.diff(offsets, append=torch.tensor([len(indices)]))
                rows = torch.repeat_interleave(torch.arange(n), counts)
                sets.append(set((rows * n_terms + indices).tolist()))
            kept += len(sets[0] & sets[1])
            true += len(sets[1])
            added += len(sets[0] - sets[1])
        return kept, true, added

    kept, true, added = shown()
    assert (kept, added) == (true, 0)
    assert shown(hide_probability=1.0)[0] == shown(remove_probability=1.0)[0] == 0
    assert shown(remove_probability=0.25)[0] / true == pytest.approx(0.75, abs=0.05)
    assert shown(hide_probability=0.5)[0] / true == pytest.approx(0.5, abs=0.12)  # whole proteins
    assert shown(add_probability=0.05)[2] > 0


@pytest.mark.parametrize("form", ["original", "weighted_mean"])
@pytest.mark.usefixtures("two_threads")
def test_a_run_in_episodes(small_corpus, tmp_path, monkeypatch, form):
    """Batches of one window at a time; stopped and resumed to the same bits; losses divided as said."""
    monkeypatch.setattr(
        "proteinbert_fast.pretraining.config.Episodes",
        lambda batches: Episodes(sizes=((200, 6), (400, 4)), batches=batches),
    )
    config = replace(SMALL, batches="episodes", episode_batches=3, steps=12, validate_every=0, loss=form)
    with Corpus(small_corpus) as corpus:
        stream = Loader(corpus, config.cutting(), seed=0, gap=config.model(1).reach).steps()
        steps = [next(stream) for _ in range(12)]
    for step in steps:
        longest = max(int(part.tokens.lengths.max()) for part in step.parts)
        assert longest <= step.window
        whole = (step.n_proteins * step.window, step.n_proteins)
        assert divisors(config, step) == (whole if form == "original" else (step.n_tokens, max(step.n_annotated, 1)))
    pretrain(small_corpus, tmp_path / "whole", config)
    pretrain(small_corpus, tmp_path / "stopped", config, should_stop=stop_after(4))
    pretrain(small_corpus, tmp_path / "stopped", config, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    rows = [row for row in log(tmp_path / "whole") if row["kind"] == "train"]
    assert [row["window"] for row in rows] == [step.window for step in steps]
    assert {200, 400} == {row["window"] for row in rows}


def test_residues_are_counted_without_starts_and_ends(small_corpus, tmp_path):
    with Corpus(small_corpus) as corpus:
        loader = Loader(corpus, SMALL.cutting(), seed=0, gap=SMALL.model(1).reach)
        stream = loader.steps()
        step = next(stream)
    residues = 0
    for part in step.parts:
        tokens = part.tokens.tokens[part.tokens.segments >= 0]
        residues += int((tokens < 23).sum()) if len(tokens) else 0
    assert 0 < step.n_residues == residues < step.n_tokens
    pretrain(small_corpus, tmp_path / "run", ONE)
    assert log(tmp_path / "run")[0]["residues"] == residues


def gradients_of_terms(corpus: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> float:
    """The largest gradient of the GO head in the first step of a run from the command line."""
    found = []

    def looking(model: Any) -> Any:
        found.append(max(float(p.grad.abs().max()) for p in model.annotation_head.parameters()))
        return largest(model)

    largest = trainer.largest_gradients
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "largest_gradients", looking)
        names = ("d_local", "d_global", "n_blocks", "n_heads", "d_key", "kernel_size", "tokens_per_batch", "window",
                 "precision", "steps", "validate_every")  # fmt: skip
        flags = [word for n in names for word in (f"--{n.replace('_', '-')}", str(getattr(ONE, n)))]
        assert main(["pretrain", str(corpus), "-o", str(folder), *flags, "--device", "cpu", "--quiet", *more]) == 0
    return found[0]


def test_hidden_terms_are_not_in_the_loss(small_corpus, tmp_path, monkeypatch):
    """From the file of ids to the gradient: where all proteins are hidden, the GO head learns nothing."""
    with Corpus(small_corpus) as corpus:
        ids = [name.decode() for some in corpus.ids() for name in some.tolist()]
    hidden = tmp_path / "hidden.txt"
    hidden.write_text("# a benchmark's\n" + "\n".join(f"{name}  # why" for name in ids) + "\n\n")
    assert gradients_of_terms(small_corpus, tmp_path / "a", monkeypatch) > 0
    assert gradients_of_terms(
        small_corpus, tmp_path / "b", monkeypatch, "--hidden-annotations", str(hidden)
    ) == 0  # fmt: skip
    row = log(tmp_path / "b")[0]
    assert row["annotation_loss"] == 0 < row["token_loss"]


def test_the_running_mean_is_what_is_saved_and_validated(small_corpus, tmp_path, monkeypatch):
    """The mean of the weights after each step, as its definition says; the run itself goes on with its own."""
    config = replace(SMALL, ema=0.75, steps=4, validate_every=4)
    seen: list[dict[str, torch.Tensor]] = []
    validated: list[dict[str, torch.Tensor]] = []

    def looking(run: Any, nonfinite: list[str]) -> bool:
        if not seen:
            seen.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
        made = move(run, nonfinite)
        seen.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
        return made

    def validating(model: ProteinBert, *args: Any) -> Any:
        validated.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return validate(model, *args)

    move, validate = trainer._Run._move_weights, trainer.validate
    monkeypatch.setattr(trainer._Run, "_move_weights", looking)
    monkeypatch.setattr(trainer, "validate", validating)
    done = pretrain(small_corpus, tmp_path / "run", config)
    saved = weights(tmp_path / "run")
    for name, mean in seen[0].items():
        for after in seen[1:]:
            mean = torch.lerp(mean, after[name], 0.25)
        assert torch.allclose(saved[name], mean, atol=1e-7), name
        assert torch.equal(validated[-1][name], saved[name])
    assert not torch.equal(saved["token_head.weight"], seen[-1]["token_head.weight"])
    kept = load_file(next(done.checkpoint.glob("*.safetensors")))
    assert torch.equal(kept["model.token_head.weight"], seen[-1]["token_head.weight"])
    assert torch.equal(kept["ema.token_head.weight"], saved["token_head.weight"])


def test_clipping_bounds_the_gradients(small_corpus, tmp_path, monkeypatch):
    norms = []

    def looking(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step(optimizer, *args, **kwargs)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", looking)
    for clip in (0.0, 0.01):
        pretrain(small_corpus, tmp_path / str(clip), replace(ONE, optimizer="adamw", clip=clip))
    assert norms[0] > 0.02
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "lamb", "keras-adam"])
def test_biases_and_norms_do_not_decay(name):
    config = replace(SMALL, optimizer=name, weight_decay=0.5, learning_rate=0.1)
    torch.manual_seed(0)
    model = ProteinBert(config.model(3))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    optimizer = trainer.make_optimizer(model, config)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5, 0.0}
    optimizer.step()
    for parameter, p in model.named_parameters():
        if p.dim() <= 1:
            assert (p == 1).all(), parameter
        else:
            assert (p < 1).all(), parameter


def test_float16_steps_that_are_skipped_count_nowhere(small_corpus, tmp_path, monkeypatch):
    """Gradients overflow with a loss that does not: the plateau, the running mean and the log's means hear nothing."""
    heard = []
    monkeypatch.setattr(trainer.LearningRate, "after", lambda rate, loss: heard.append(loss))
    plain = trainer.Objective.forward

    def spoiled(objective: Any, task: Any) -> Any:
        if not objective.model.token_head.bias._backward_hooks:
            objective.model.token_head.bias.register_hook(lambda g: g * math.inf)
        return plain(objective, task)

    monkeypatch.setattr(trainer.Objective, "forward", spoiled)
    config = replace(
        SMALL, precision="float16", nonfinite="skip", steps=3, tokens_per_batch=250, window=60, validate_every=0,
        log_every=3, ema=0.5,
    )  # fmt: skip
    done = pretrain(small_corpus, tmp_path / "run", config)
    row = log(tmp_path / "run")[0]
    assert heard == []
    assert row["skipped"] == 3
    assert row["token_loss"] is None
    assert math.isfinite(row["loss"])
    torch.manual_seed(config.seed)
    with Corpus(small_corpus) as corpus:
        untouched = ProteinBert(config.model(len(corpus.terms))).state_dict()
    assert same(load_file(done.model_folder / "model.safetensors"), untouched)


def test_the_best_model_is_there_while_the_run_goes_on(small_corpus, tmp_path, monkeypatch):
    """Its weights are those of the step with the lowest validation loss, and stay when later ones are worse."""
    losses = iter([3.0, 1.0, 2.0, 2.5])
    at = {}

    def validating(model: ProteinBert, *args: Any) -> Any:
        found = validate(model, *args)
        found["token_loss"] = next(losses)
        at[found["token_loss"]] = {name: p.detach().clone() for name, p in model.state_dict().items()}
        return found

    validate = trainer.validate
    monkeypatch.setattr(trainer, "validate", validating)
    config = replace(MODERN, steps=8, validate_every=2, annotation_weight=0.0)
    done = pretrain(small_corpus, tmp_path / "run", config, should_stop=stop_after(7))
    assert (done.model_folder, done.best_folder) == (None, tmp_path / "run" / "best")
    best = load_file(done.best_folder / "model.safetensors")
    assert same(best, at[1.0])
    done = pretrain(small_corpus, tmp_path / "run", config, resume=True)
    assert same(load_file(done.best_folder / "model.safetensors"), at[1.0])
    assert same(weights(tmp_path / "run"), at[2.5])
    assert ProteinBert.from_pretrained(done.best_folder).go_terms is not None
    assert 4 in {step for step, _ in run_state.checkpoints(tmp_path / "run" / "checkpoints")}


def test_a_best_model_that_was_not_written_is_written_when_resumed(small_corpus, tmp_path, monkeypatch):
    def killed(run: Any, name: str) -> Path:
        raise KeyboardInterrupt

    config = replace(SMALL, validate_every=3)
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "_export", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(small_corpus, tmp_path / "run", config)
    assert not (tmp_path / "run" / "best").exists()
    done = pretrain(small_corpus, tmp_path / "run", config, resume=True, should_stop=stop_after(1))
    kept = load_file(next((tmp_path / "run" / "checkpoints" / "step-00000003").glob("*.safetensors")))
    best = load_file(done.best_folder / "model.safetensors")
    assert all(torch.equal(value, kept[f"model.{name}"]) for name, value in best.items())


def test_a_best_model_that_is_old_or_missing_is_made_from_its_checkpoint(small_corpus, tmp_path, monkeypatch):
    """As after a run with --no-keep-best, or one of an earlier version."""
    losses = iter([3.0, 1.0, 2.0, 2.5])

    def validating(model: ProteinBert, *args: Any) -> Any:
        return {**validate(model, *args), "token_loss": next(losses)}

    validate = trainer.validate
    monkeypatch.setattr(trainer, "validate", validating)
    config = replace(MODERN, steps=8, validate_every=2, annotation_weight=0.0, keep_last=9)
    done = pretrain(small_corpus, tmp_path / "run", config, should_stop=stop_after(3))
    old = load_file(done.best_folder / "model.safetensors")  # of step 2
    without = replace(config, keep_best=False, checkpoint_every=1)
    assert pretrain(small_corpus, tmp_path / "run", without, resume=True, should_stop=stop_after(2)).best_folder is None
    done = pretrain(small_corpus, tmp_path / "run", config, resume=True, should_stop=stop_after(1))
    new = load_file(done.best_folder / "model.safetensors")
    kept = load_file(next((tmp_path / "run" / "checkpoints" / "step-00000004").glob("*.safetensors")))
    assert not same(new, old)
    assert all(torch.equal(value, kept[f"ema.{name}"]) for name, value in new.items())
    shutil.rmtree(done.best_folder)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    done = pretrain(small_corpus, tmp_path / "run", config, resume=True)
    assert done.best_folder is None, "its weights are gone"


def test_without_keep_best_there_is_none(small_corpus, tmp_path):
    done = pretrain(small_corpus, tmp_path / "run", replace(SMALL, steps=2, keep_best=False))
    assert done.best_folder is None
    assert not (tmp_path / "run" / "best").exists()


class Clock:
    """Each look at it, a second has gone by."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


def test_it_stops_when_its_minutes_are_over(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "time", Clock())
    config = replace(
        SMALL, steps=1000, max_minutes=0.2, checkpoint_minutes=0.0, checkpoint_every=1000, validate_every=0
    )
    done = pretrain(small_corpus, tmp_path / "run", config)
    assert 0 < done.step < 1000
    assert done.checkpoint.name == f"step-{done.step:08d}"


def test_checkpoints_by_the_clock(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "time", Clock())
    config = replace(SMALL, steps=12, checkpoint_minutes=0.1, checkpoint_every=1000, validate_every=0, keep_last=100)
    pretrain(small_corpus, tmp_path / "run", config)
    steps = [step for step, _ in run_state.checkpoints(tmp_path / "run" / "checkpoints")]
    assert 1 < len(steps) < 12
    assert steps[-1] == 12


def test_another_back_end_is_said_when_a_run_goes_on(small_corpus, tmp_path, caplog):
    config = replace(SMALL, steps=3, validate_every=0)
    pretrain(small_corpus, tmp_path / "run", config, backend="reference", should_stop=stop_after(1))
    caplog.clear()
    pretrain(small_corpus, tmp_path / "run", config, backend="reference", resume=True, should_stop=stop_after(1))
    assert "sums may round otherwise" not in caplog.text
    pretrain(small_corpus, tmp_path / "run", config, backend="cpu", resume=True)
    assert "backend was reference, is cpu: sums may round otherwise" in caplog.text


def test_curves_for_tensorboard(small_corpus, tmp_path, monkeypatch):
    """Every number of the log, at its step; and a line that says what is missing where the package is."""
    written: dict[str, dict[int, float]] = {}
    purged = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            purged.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.setdefault(name, {})[step] = value

        def flush(self) -> None:
            pass

        close = flush

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    config = replace(SMALL, steps=6, validate_every=3, log_every=2, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    pretrain(small_corpus, tmp_path / "run", config, should_stop=stop_after(4))
    pretrain(small_corpus, tmp_path / "run", config, resume=True)
    folder = str(tmp_path / "run" / "tensorboard")
    assert purged == [(folder, 1), (folder, 5)]
    rows = log(tmp_path / "run")
    for kind, name in (("train", "token_loss"), ("train", "learning_rate"), ("validation", "annotation_loss")):
        assert written[f"{kind}/{name}"] == {row["step"]: row[name] for row in rows if row["kind"] == kind}
    assert set(written["validation/go/fmax/P"]) == {3, 6}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="need the package tensorboard: pip install tensorboard"):
        pretrain(small_corpus, tmp_path / "other", config)


def test_flops_are_those_of_the_products(small_config):
    """Three times torch's own count of the forward pass, whose plain operations take gap rows as tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    from proteinbert_fast import Tokenizer

    model = ProteinBert(small_config, "reference").eval()
    per_token = progress.training_flops_per_token(small_config)
    per_protein = progress.training_flops_per_protein(small_config)
    for lengths in ((50, 70), (50, 170), (50, 70, 60)):
        batch = Tokenizer()(["M" * n for n in lengths])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = model(batch)
            for logits in (out.token_logits, out.go_logits):  # computed when asked for
                assert logits.isfinite().all()
        assert 3 * counter.get_total_flops() == batch.n_rows * per_token + len(batch) * per_protein


def test_speed_counts_residues_and_leaves_validation_out(small_corpus, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(
        progress, "time", types.SimpleNamespace(monotonic=lambda: clock.now, perf_counter=clock.monotonic)
    )
    monkeypatch.setattr(progress, "matrix_rate", lambda device, precision: 1e6)
    sizes = SMALL.model(5)
    meter = progress.Meter(SMALL, sizes, torch.device("cpu"), 2, False, 0)
    with Corpus(small_corpus) as corpus:
        step = next(Loader(corpus, SMALL.cutting(), seed=0, gap=sizes.reach).steps())
    meter.add(step, 2.0, 0.5, True)
    meter.add(step, 9.0, 9.0, False)
    clock.now += 14.0
    meter.leave_out(10.0)
    row = meter.row()
    assert row["residues_per_second"] == pytest.approx(2 * step.n_residues / 4.0, rel=1e-3)
    flops = step.n_tokens * progress.training_flops_per_token(sizes)
    flops += step.n_proteins * progress.training_flops_per_protein(sizes)
    assert row["share_of_matrix_peak"] == pytest.approx(2 * flops / 4.0 / 2e6, rel=1e-3)
    assert (row["token_loss"], row["annotation_loss"]) == (2.0, 0.5)
    assert meter.row()["token_loss"] is None


def test_the_slurm_example_is_a_script_of_bash():
    path = EXAMPLES / "pretrain.slurm"
    subprocess.run(["bash", "-n", str(path)], check=True)
    command = path.read_text().split("srun ")[1].split("&\n")[0]
    words = command.replace("\\\n", " ").split()
    assert words[words.index("-m") + 1 : words.index("-m") + 3] == ["proteinbert_fast", "pretrain"]
    assert "--resume" in words
