"""Runs: stopped, killed, resumed, refused, shared among ranks; and what they learn."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from proteinbert_fast import ProteinBert
from proteinbert_fast.data.corpus import Corpus
from proteinbert_fast.data.disk import take_lock
from proteinbert_fast.errors import CheckpointError, InputError, NonFiniteError
from proteinbert_fast.pretraining import run_state, trainer
from proteinbert_fast.pretraining.config import PretrainingConfig, read_config
from proteinbert_fast.pretraining.trainer import pretrain

from .runs import MODERN, SMALL, log, same, stop_after, weights

KINDS = {
    "paper": SMALL,
    "modern": replace(MODERN, log_every=3, validate_every=4),
    "wsd, 16 bits": replace(MODERN, schedule="wsd", decay_steps=4, precision="bfloat16"),
    # CPUs take long for products of this precision.
    "loss scaling": replace(SMALL, precision="float16", steps=8, tokens_per_batch=250, window=60),
}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_bitwise_the_same(small_corpus, tmp_path, kind):
    config = KINDS[kind]
    whole = pretrain(small_corpus, tmp_path / "whole", config)
    assert whole.is_complete
    assert whole.model_folder == tmp_path / "whole" / "model"
    for at in (1, 7):
        folder = tmp_path / f"stopped{at}"
        done = pretrain(small_corpus, folder, config, should_stop=stop_after(at))
        assert (done.step, done.is_complete, done.model_folder) == (at, False, None)
        done = pretrain(small_corpus, folder, config, resume=True)
        assert done.is_complete
        assert done.validation == whole.validation
        assert same(weights(folder), weights(tmp_path / "whole"))
        assert log(folder) == log(tmp_path / "whole")


@pytest.mark.usefixtures("two_threads")
def test_two_runs_differ_by_their_seed_alone(small_corpus, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(small_corpus, tmp_path / name, replace(SMALL, seed=seed, steps=3))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.slow
def test_it_learns(small_corpus, tmp_path):
    config = replace(
        MODERN, steps=150, learning_rate=1e-2, warmup_steps=10, validate_every=0, annotation_weight=10.0, ema=0.0
    )
    done = pretrain(small_corpus, tmp_path / "run", config)
    rows = [row for row in log(tmp_path / "run") if row["kind"] == "train"]
    assert rows[0]["token_loss"] > 2.5
    assert done.validation["token_loss"] < 0.7, "it has learned that most tokens are what they seem"
    assert done.validation["annotation_loss"] < 0.4
    assert rows[-1]["annotation_loss"] < rows[0]["annotation_loss"] / 2
    model = ProteinBert.from_pretrained(done.model_folder)
    with Corpus(small_corpus) as corpus:
        assert [term.accession for term in model.go_terms] == [term.id for term in corpus.terms]


def test_validation_does_not_depend_on_how_it_is_cut(small_corpus, tmp_path, monkeypatch):
    from proteinbert_fast.pretraining import validation

    model = ProteinBert(SMALL.model(len(Corpus(small_corpus).terms)), "reference")
    found = []
    for tokens, n_ranks in ((16_384, 1), (700, 1)):
        monkeypatch.setattr(validation, "TOKENS_PER_PASS", tokens)
        with Corpus(small_corpus) as corpus:
            found.append(validation.validate(model, corpus, SMALL, torch.device("cpu"), 0, n_ranks))
    first, second = found
    assert first["classes"].keys() == second["classes"].keys()
    assert sum(c["proteins"] for c in first["classes"].values()) == first["proteins"] == 10
    for name in ("token_loss", "annotation_loss"):
        assert first[name] == pytest.approx(second[name], rel=1e-5)
        for kind, numbers in first["classes"].items():
            assert numbers[name] == pytest.approx(second["classes"][kind][name], rel=1e-5)
    assert first["go"]["fmax"] == pytest.approx(second["go"]["fmax"], rel=1e-6)
    assert model.training


def test_accumulation_is_the_whole_batchs_step(small_corpus, tmp_path):
    """Passes of few tokens add up to the same step within rounding."""
    for name, tokens in (("one", 0), ("many", 400)):
        config = replace(MODERN, optimizer="keras-adam", epsilon=1e-3, tokens_per_pass=tokens, steps=4, ema=0.0)
        pretrain(small_corpus, tmp_path / name, config)
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    for name in one:
        assert torch.allclose(one[name], many[name], atol=2e-5), name
    assert log(tmp_path / "one")[-1]["token_loss"] == pytest.approx(log(tmp_path / "many")[-1]["token_loss"], rel=1e-4)


def command(corpus: Path, folder: Path, *more: str) -> list[str]:
    sizes = {name: value for name, value in SMALL.to_dict().items() if value != getattr(PretrainingConfig(), name)}
    flags = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["-m", "proteinbert_fast", "pretrain", str(corpus), "-o", str(folder), *flags, "--device", "cpu", *more]


@pytest.mark.slow
def test_killed_at_any_moment(small_corpus, tmp_path):
    steps = ["--steps", "60", "--checkpoint-every", "4", "--validate-every", "15"]
    subprocess.run([sys.executable, *command(small_corpus, tmp_path / "whole", *steps)], check=True, timeout=300)
    draw, kills = random.Random(3), 0
    folder = tmp_path / "killed"
    while True:
        run = subprocess.Popen([sys.executable, *command(small_corpus, folder, *steps, "--resume")])
        before = newest(folder)
        give_up = time.monotonic() + 120
        # Killed some time after the next checkpoint began to be written.
        while run.poll() is None and newest(folder) == before and time.monotonic() < give_up:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.15)
        if kills < 4 and run.poll() is None:
            run.kill()
            kills += 1
            run.wait()
            continue
        assert run.wait(300) == 0
        break
    assert kills >= 3
    assert same(weights(folder), weights(tmp_path / "whole"))
    assert log(folder) == log(tmp_path / "whole")
    assert not list((folder / "checkpoints").glob("*.partial"))


def newest(folder: Path) -> int:
    names = [p.name for p in folder.glob("checkpoints/step-*")]
    return max((int(name.split("-")[1].split(".")[0]) for name in names), default=-1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_signals_stop_with_a_checkpoint(small_corpus, tmp_path, number, code):
    folder = tmp_path / "run"
    run = subprocess.Popen(
        [sys.executable, *command(small_corpus, folder, "--steps", "100000", "--validate-every", "0")],
        stdout=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    give_up = time.monotonic() + 120
    while newest(folder) < 5 and time.monotonic() < give_up:
        time.sleep(0.05)
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == code
    step, path = run_state.checkpoints(folder / "checkpoints")[-1]
    assert f"step {step:,} of 100,000" in out
    assert str(path) in out
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"] <= step


def launcher(n: int, restarts: int = 0) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}",
        f"--max-restarts={restarts}",
    ]  # fmt: skip


def torchrun(n: int, *arguments: str, restarts: int = 0, env: dict[str, str] | None = None) -> None:
    subprocess.run(
        [*launcher(n, restarts), *arguments], check=True, timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )  # fmt: skip


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_ranks_with_a_checkpoint(small_corpus, tmp_path):
    folder = tmp_path / "run"
    more = ["--steps", "100000", "--validate-every", "0", "--checkpoint-every", "100000", "--checkpoint-minutes", "0"]
    run = subprocess.Popen(
        [*launcher(2), *command(small_corpus, folder, *more)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    give_up = time.monotonic() + 120
    while not ((folder / "log.jsonl").exists() and len(log_lines(folder)) > 5) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert newest(folder) == -1
    run.send_signal(signal.SIGTERM)
    try:
        out, _ = run.communicate(timeout=60)
    finally:
        subprocess.run(["pkill", "-KILL", "-P", str(run.pid)], check=False)
        run.kill()
    ((step, path),) = run_state.checkpoints(folder / "checkpoints")
    assert step == json.loads(log_lines(folder)[-1])["step"] > 5
    assert f"stopped with a checkpoint, {path}: --resume goes on" in out


def log_lines(folder: Path) -> list[str]:
    return (folder / "log.jsonl").read_text().splitlines()


# A thread of the process group that outlives it may abort the process while the interpreter ends. One that has just
# ended may still be listed.
WITHOUT_THREADS = """
import time
from pathlib import Path

def of_group():
    found = []
    for path in Path("/proc/self/task").glob("*/comm"):
        try:
            found.append(path.read_text().strip())
        except OSError:
            pass
    return [name for name in found if "gloo" in name]

code = main()
deadline = time.monotonic() + 10
while of_group() and time.monotonic() < deadline:
    time.sleep(0.1)
sys.exit(f"left: {of_group()}" if of_group() else code)
"""


@pytest.mark.slow
def test_a_run_that_fails_on_many_ranks_ends_with_its_error(small_corpus, tmp_path, capfd):
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys\n"
        "from proteinbert_fast.cli.main import main\n"
        "from proteinbert_fast.errors import NonFiniteError\n"
        "from proteinbert_fast.pretraining import optimizers\n"
        "def failing(*args):\n"
        "    raise NonFiniteError('gradients of 1 parameters hold NaN or infinity: planted')\n"
        "optimizers.check_gradients = failing\n" + WITHOUT_THREADS  # before the trainer is imported
    )
    with pytest.raises(subprocess.CalledProcessError):
        torchrun(2, str(script), *command(small_corpus, tmp_path / "run")[2:])
    said = capfd.readouterr().err
    assert "error: gradients of 1 parameters hold NaN or infinity: planted" in said
    assert "exitcode  : 1 " in said
    assert "left: " not in said
    assert "terminate called" not in said


@pytest.mark.slow
def test_any_number_of_ranks(small_corpus, tmp_path):
    more = ["--steps", "6", "--optimizer", "keras-adam", "--epsilon", "0.001", "--tokens-per-pass", "600"]
    alone = replace(SMALL, steps=6, optimizer="keras-adam", epsilon=1e-3, tokens_per_pass=600)
    pretrain(small_corpus, tmp_path / "1", alone, device="cpu")
    found = {1: weights(tmp_path / "1")}
    for n in (2, 4):
        torchrun(n, *command(small_corpus, tmp_path / str(n), *more))
        found[n] = weights(tmp_path / str(n))
    for n in (2, 4):
        for name, value in found[1].items():
            assert torch.allclose(value, found[n][name], atol=2e-5), (n, name)
        for row, other in zip(log(tmp_path / "1"), log(tmp_path / str(n)), strict=True):
            assert row["records"] == other["records"]
            assert row["token_loss"] == pytest.approx(other["token_loss"], rel=1e-4)


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again(small_corpus, tmp_path):
    """One of four ranks kills itself at a step, once; torchrun starts all again, and they end with the same bits.

    Of two ranks it would show little: a sum of two does not depend on the order in which it is formed.
    """
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal, sys\n"
        "from proteinbert_fast.cli.main import main\n"
        "def dying(run, step, tasks):\n"
        "    if run.rank == 1 and run.step == 8 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    train(run, step, tasks)\n"
        "if 'DIES' in os.environ:\n"
        "    from proteinbert_fast.pretraining import trainer\n"
        "    train = trainer._Run._train\n"
        "    trainer._Run._train = dying\n" + WITHOUT_THREADS
    )
    for name, env in (("whole", {}), ("died", {"DIES": "1"})):
        arguments = command(small_corpus, tmp_path / name, "--resume")[2:]
        torchrun(4, str(script), *arguments, restarts=3, env=env)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "died"))
    assert log(tmp_path / "whole") == log(tmp_path / "died")


def test_another_run_is_refused(small_corpus, tmp_path):
    folder = tmp_path / "run"
    pretrain(small_corpus, folder, SMALL, should_stop=stop_after(2))
    for config, message in (
        (replace(SMALL, seed=1), "is of another run: seed is 1, was 0"),
        (replace(SMALL, optimizer="adamw"), "is of another run: optimizer is adamw, was lamb"),
        (replace(SMALL, d_global=64), "is of another run: d_global is 64, was 32"),
    ):
        with pytest.raises(InputError, match=message):
            pretrain(small_corpus, folder, config, resume=True)
    with pytest.raises(InputError, match="holds a run already, with a checkpoint of step 2: go on"):
        pretrain(small_corpus, folder, SMALL)
    with Corpus(small_corpus) as corpus, pytest.raises(InputError, match="other proteins had their GO terms hidden"):
        pretrain(small_corpus, folder, SMALL, hidden_ids=[corpus[0].id], resume=True)
    # What changes no weight may change, the end too.
    done = pretrain(small_corpus, folder, replace(SMALL, steps=3, log_every=2, keep_last=1), resume=True)
    assert done.step == 3


def test_another_corpus_is_refused(small_corpus, tmp_path):
    from proteinbert_fast.data.corpus import build_corpus

    (tmp_path / "other.fasta").write_text("".join(f">P{i}\n{'MKTAYIAKQRQISFVKSHFSRQ' * 5}\n" for i in range(40)))
    build_corpus([tmp_path / "other.fasta"], tmp_path / "other.h5", progress=False)
    pretrain(small_corpus, tmp_path / "run", SMALL, should_stop=stop_after(2))
    with pytest.raises(InputError, match=r"trained on another corpus, of fingerprint [0-9a-f]{16}; .*other\.h5 has"):
        pretrain(tmp_path / "other.h5", tmp_path / "run", SMALL, resume=True)


def test_without_any_go_term(tmp_path):
    from proteinbert_fast.data.corpus import build_corpus

    (tmp_path / "p.fasta").write_text("".join(f">P{i}\n{'MKTAYIAKQRQISFVKSHFSRQ' * 5}\n" for i in range(60)))
    build_corpus([tmp_path / "p.fasta"], tmp_path / "p.h5", validation=0.2, progress=False)
    done = pretrain(tmp_path / "p.h5", tmp_path / "run", replace(SMALL, steps=4))
    assert done.is_complete
    assert "go" not in done.validation
    assert done.validation["annotation_loss"] == 0
    assert ProteinBert.from_pretrained(done.model_folder).go_terms is None


def test_the_end_of_wsd_may_be_moved_before_the_decay(small_corpus, tmp_path):
    config = replace(MODERN, schedule="wsd", steps=12, decay_steps=4)
    pretrain(small_corpus, tmp_path / "run", config, should_stop=stop_after(6))
    pretrain(small_corpus, tmp_path / "run", replace(config, steps=9, decay_steps=2), resume=True)
    with pytest.raises(InputError, match="steps is 12, was 9"):
        pretrain(small_corpus, tmp_path / "run", config, resume=True)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (kept["steps"], kept["decay_steps"]) == (9, 2)


def test_checkpoints_that_are_kept(small_corpus, tmp_path):
    config = replace(SMALL, steps=12, checkpoint_every=2, keep_last=2, keep_every=6, validate_every=4)
    done = pretrain(small_corpus, tmp_path / "run", config)
    steps = {step for step, _ in run_state.checkpoints(tmp_path / "run" / "checkpoints")}
    rows = [row for row in log(tmp_path / "run") if row["kind"] == "validation"]
    best = [row["step"] for row in rows if row["is_best"]][-1]
    assert steps == {6, 10, 12, best}
    assert done.checkpoint.name == "step-00000012"


def test_a_full_disk_loses_nothing(small_corpus, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    pretrain(small_corpus, folder, SMALL, should_stop=stop_after(3))
    write = run_state.save

    def full(*args: object, **kwargs: object) -> None:
        write(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_state, "save", full)
    with pytest.raises(CheckpointError, match=r"step-00000005: cannot be written: No space left on device"):
        pretrain(small_corpus, folder, SMALL, resume=True)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    assert pretrain(small_corpus, folder, SMALL, resume=True).is_complete


@pytest.mark.parametrize("name", ["run.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_refused(small_corpus, tmp_path, name, harm):
    folder = tmp_path / "run"
    done = pretrain(small_corpus, folder, replace(SMALL, validate_every=0), should_stop=stop_after(1))
    path = done.checkpoint / name
    data = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if harm == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    if name == "run.json" and harm == "gone":
        # Then it is none, as one that was never finished.
        assert run_state.checkpoints(folder / "checkpoints") == []
        return
    with pytest.raises(CheckpointError, match=str(done.checkpoint)):
        pretrain(small_corpus, folder, SMALL, resume=True)


def test_gradients_that_are_not_finite(small_corpus, tmp_path, monkeypatch):
    def spoiled(model: Any, task: Any) -> Any:
        tokens, annotations = forward(model, task)
        return tokens * float("nan"), annotations

    forward = trainer.Objective.forward
    monkeypatch.setattr(trainer.Objective, "forward", spoiled)
    with pytest.raises(NonFiniteError, match=r"gradients of .* parameters hold NaN or infinity: "):
        pretrain(small_corpus, tmp_path / "stop", replace(SMALL, steps=2))
    done = pretrain(small_corpus, tmp_path / "skip", replace(SMALL, steps=2, nonfinite="skip", validate_every=0))
    assert done.is_complete
    assert log(tmp_path / "skip")[1]["skipped"] == 2


def test_the_parameter_that_is_not_finite_is_named(small_corpus, tmp_path, monkeypatch):
    """Clipping, which divides all gradients by a norm that is NaN then, must not hide it."""
    plain = trainer.Objective.forward

    def spoiled(objective: Any, task: Any) -> Any:
        tokens, annotations = plain(objective, task)
        bias = objective.model.token_head.bias
        return tokens + (bias * float("inf")).sum() * 0, annotations

    monkeypatch.setattr(trainer.Objective, "forward", spoiled)
    with pytest.raises(NonFiniteError, match=r"gradients of 1 parameters hold NaN or infinity: token_head\.bias$"):
        pretrain(small_corpus, tmp_path / "run", replace(SMALL, steps=2, clip=1.0))


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_loss_scaling_counts_what_it_skips_and_gives_up(small_corpus, tmp_path, monkeypatch, nonfinite):
    """Infinities lower the scale; where it reaches 1 without an end to them, "stop" stops."""
    plain = trainer.Objective.forward

    def spoiled(objective: Any, task: Any) -> Any:
        tokens, annotations = plain(objective, task)
        return tokens * float("inf"), annotations

    monkeypatch.setattr(trainer.Objective, "forward", spoiled)
    config = replace(
        SMALL, precision="float16", nonfinite=nonfinite, clip=1.0, steps=20, tokens_per_batch=250, window=60,
        schedule="plateau", validate_every=0, log_every=20,
    )  # fmt: skip
    if nonfinite == "stop":
        with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
            pretrain(small_corpus, tmp_path / "run", config)
    else:
        assert pretrain(small_corpus, tmp_path / "run", config).is_complete
        row = log(tmp_path / "run")[0]
        assert row["skipped"] == 20
        assert (row["loss"], row["token_loss"]) == (None, None)


def test_two_processes_never_write_one_run(small_corpus, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        take_lock(str(folder / "lock")),
        pytest.raises(InputError, match=r"run: another process is training there now"),
    ):
        pretrain(small_corpus, folder, SMALL, resume=True)
    assert pretrain(small_corpus, folder, replace(SMALL, steps=1, validate_every=0)).is_complete
    assert not (folder / "lock").exists()


def test_what_a_folder_holds_is_never_overwritten(small_corpus, tmp_path):
    folder = tmp_path / "run"
    config = replace(SMALL, steps=1, validate_every=0)
    pretrain(small_corpus, folder, config)
    before = (folder / "log.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    for resume in (False, True):
        with pytest.raises(InputError, match="holds best and model of a run whose checkpoints are gone"):
            pretrain(small_corpus, folder, config, resume=resume)
    shutil.rmtree(folder / "model")
    with pytest.raises(InputError, match="holds best of a run whose checkpoints are gone"):
        pretrain(small_corpus, folder, config, resume=True)
    shutil.rmtree(folder / "best")
    with pytest.raises(InputError, match="was stopped before its first checkpoint: begin it again"):
        pretrain(small_corpus, folder, config)
    assert (folder / "log.jsonl").read_bytes() == before
    assert pretrain(small_corpus, folder, config, resume=True).is_complete


def test_a_log_that_is_none_is_left_alone(small_corpus, tmp_path):
    pretrain(small_corpus, tmp_path / "run", SMALL, should_stop=stop_after(2))
    (tmp_path / "run" / "log.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match=r"log\.jsonl:1: is no row of a pretraining log; move the file away"):
        pretrain(small_corpus, tmp_path / "run", SMALL, resume=True)
    assert (tmp_path / "run" / "log.jsonl").read_text() == "my notes\n"


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta"])
def test_unknown_devices(small_corpus, tmp_path, device):
    with pytest.raises(InputError, match=f"^device '?{device}'?"):
        pretrain(small_corpus, tmp_path / "run", SMALL, device=device)
    assert not (tmp_path / "run").exists()


def test_flags_win_over_the_file_before_it_is_checked(tmp_path):
    (tmp_path / "run.toml").write_text("schedule = 'wsd'\nsteps = 100\n")
    assert read_config(tmp_path / "run.toml", decay_steps=10).decay_steps == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 'ten'", "steps must be a whole number, got 'ten'"),
        ("stepz = 3", "unknown option stepz; known are d_local, "),
        ("steps = ", "is not TOML"),
        ("optimizer = 'sgd'", "optimizer 'sgd' is unknown; choose one of lamb, adamw, keras-adam"),
        ("schedule = 'wsd'", "schedule wsd needs decay_steps from 1 to 100000"),
        ("learning_rate = nan", "learning_rate must be a number, got nan"),
        ("lowest_learning_rate = 1.0", r"lowest_learning_rate \(1.0\) is above learning_rate"),
        ("ema = 1.0", "ema must be from 0 to below 1"),
        ("hide_probability = 1.5", "hide_probability must be from 0 to 1"),
        ("warmup_steps = 100000", r"warmup_steps \(100000\) must be below steps"),
        ("tokens_per_batch = 0", "tokens_per_batch must be from 1"),
        ("d_global = 30", r"d_global \(30\) must be a multiple of n_heads"),
        ("tensorboard = 1", "tensorboard must be true or false"),
    ],
)
def test_bad_options(tmp_path, text, message):
    (tmp_path / "run.toml").write_text(text + "\n")
    with pytest.raises(InputError, match=rf"run\.toml: .*{message}"):
        read_config(tmp_path / "run.toml")


def test_too_large_batches_are_refused(small_corpus, tmp_path):
    with pytest.raises(
        InputError, match=r"corpus\.h5: its \d+ training proteins fill [\d,]+ rows, fewer than one batch"
    ):
        pretrain(small_corpus, tmp_path / "run", replace(SMALL, tokens_per_batch=10**7))
    assert not (tmp_path / "run").exists()
