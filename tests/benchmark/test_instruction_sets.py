"""The benchmark by instruction set: how a process is watched, what counts as held, the tables, and a tiny run."""

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sets import command, holding, keras_model, keras_peer, products, summary
from benchmarks.sets.encodings import AMX, C_LIBRARY, EVEX, OTHER, SSE, VEX, NotSampled, kind, sample
from benchmarks.sets.holding import X86, InstructionSet
from benchmarks.sets.keras_peer import KerasPeer
from benchmarks.sets.plan import FEW, MODEL_ALONE
from benchmarks.sets.process import Failed, Run
from benchmarks.sets.summary import Numbers
from benchmarks.sets.watch import BEYOND, Alone, instructions
from proteinbert_fast.benchmark import machine, timing
from proteinbert_fast.benchmark.cases import Unavailable
from proteinbert_fast.benchmark.competitors import OTHER_PACKAGE, other_package_version
from proteinbert_fast.benchmark.groups import forward, train
from proteinbert_fast.benchmark.setup import Setup

from .conftest import TINY

IS_X86 = platform.machine() == "x86_64"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("0f 28 c1", SSE),  # movaps xmm0, xmm1
        ("f3 44 0f 58 c9", SSE),  # addss xmm9, xmm1
        ("66 0f 38 40 c1", SSE),  # pmulld xmm0, xmm1
        ("c5 fc 28 c1", VEX),  # vmovaps ymm0, ymm1
        ("c4 e2 75 b8 c2", VEX),  # vfmadd231ps ymm0, ymm1, ymm2
        ("62 f2 75 48 b8 c2", EVEX),  # vfmadd231ps zmm0, zmm1, zmm2
        ("62 f2 76 48 52 c2", EVEX),  # vdpbf16ps zmm0, zmm1, zmm2
        ("c5 f8 92 c8", EVEX),  # kmovw k1, eax
        ("c4 e2 72 5c c2", AMX),  # tdpbf16ps tmm0, tmm2, tmm1
        ("c4 e2 7b 4b 04 08", AMX),  # tileloadd tmm0, [rax+rcx]
        ("c4 e2 7b f7 c1", OTHER),  # shrx
        ("0f 18 08", OTHER),  # prefetcht0
        ("0f 84 00 01 00 00", OTHER),  # je
        ("48 83 c0 40", OTHER),  # add rax, 64
    ],
)
def test_encodings(code: str, found: str):
    assert kind(bytes.fromhex(code) + b"\x90" * 12) == found


LOOP = "for (int i = 0; i < 64; i++) x[i] = x[i] * 1.5f + 2.0f;"
COPY = "memcpy(y, x, n);"


def compiled(folder: Path, body: str, *flags: str) -> str:
    """A program that does something with 64 floats, again and again."""
    source = folder / "loop.c"
    variables = "#include <string.h>\nfloat x[64], y[64]; volatile size_t n = sizeof x;"
    source.write_text(f'{variables} int main(void) {{ for (;;) {{ {body} __asm__ volatile("" ::: "memory"); }} }}\n')
    program = folder / f"loop{len(flags)}"
    try:
        subprocess.run(["cc", *flags, str(source), "-o", str(program)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no C compiler: {error}")
    return str(program)


@pytest.mark.skipif(not IS_X86 or sys.platform != "linux", reason="x86-64 under Linux only")
@pytest.mark.parametrize(
    ("body", "flags", "wanted", "others"),
    [
        (LOOP, ("-O2",), SSE, (VEX, EVEX, C_LIBRARY)),
        (LOOP, ("-O2", "-mavx"), VEX, (SSE, EVEX, C_LIBRARY)),
        (COPY, ("-O2",), C_LIBRARY, (VEX, EVEX)),
    ],
)
def test_a_process_is_seen_to_execute_what_it_was_compiled_for(
    tmp_path: Path, body: str, flags: tuple[str, ...], wanted: str, others: tuple[str, ...]
):
    if "avx" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX")
    program = compiled(tmp_path, body, *flags)
    process = subprocess.Popen([program])
    counts: Counter[str] = Counter()
    try:
        for _ in range(3000):  # it may be slow to begin
            time.sleep(0.001)
            counts[sample(process.pid)] += 1
            if counts[wanted] > 30:
                break
    except NotSampled as error:
        pytest.skip(str(error))
    finally:
        process.kill()
        process.wait()
    assert counts[wanted] > 30
    assert not any(counts[other] for other in others)


def test_a_process_that_has_ended_is_not_sampled():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(NotSampled):
        sample(process.pid)


ONEDNN = "onednn_verbose,v1,primitive,exec,cpu,{},{},forward_inference,src:f32,,mb64ic64oc64,0.1"
MKL = "MKL_VERBOSE SGEMM(N,N,64,64,64,0x7f,0x7f,64) 43.83ms CNR:{} Dyn:0 FastMM:1 TID:0  NThr:2"


def test_kernels_are_read_from_what_libraries_print():
    lines = [
        "onednn_verbose,v1,info,cpu,isa:Intel AVX2",
        ONEDNN.format("reorder", "jit:uni"),
        ONEDNN.format("inner_product", "brg_matmul:avx2"),
        ONEDNN.format("inner_product", "brg_matmul:avx2"),
    ]
    assert products.kernel_of(lines) == "oneDNN brg_matmul:avx2"
    assert products.kernel_of([MKL.format("COMPATIBLE")]) == "MKL sgemm CNR:COMPATIBLE"
    assert products.kernel_of(["something else"]) == ""


@pytest.mark.parametrize(
    ("name", "kernel", "counts", "reason"),
    [
        ("baseline", "MKL sgemm CNR:COMPATIBLE", {SSE: 90, OTHER: 10}, ""),
        ("baseline", "MKL sgemm CNR:OFF", {VEX: 90, SSE: 10}, "VEX"),
        ("baseline", "oneDNN x64:gemm:jit", {SSE: 90, C_LIBRARY: 5}, ""),
        ("avx2", "MKL sgemm CNR:OFF", {VEX: 90}, ""),
        ("avx2", "MKL sgemm CNR:OFF", {VEX: 90, EVEX: 1}, "EVEX"),
        ("avx2", "MKL sgemm CNR:OFF", {}, "could not be sampled"),
        ("avx2", "MKL sgemm CNR:OFF", {OTHER: 100}, "could not be sampled"),
        ("avx2", "oneDNN brg_matmul:avx2", {}, ""),
        ("avx2", "oneDNN brg_matmul:avx512_core", {}, "could not be sampled"),
        ("baseline", "oneDNN brg_matmul:avx2", {}, "could not be sampled"),
        ("avx512", "oneDNN brg_matmul:avx512_core", {EVEX: 90}, ""),
        ("avx512_bf16", "oneDNN brg_matmul:avx512_core_bf16", {EVEX: 90, AMX: 1}, "AMX"),
        ("avx512_bf16", "oneDNN brg_matmul:avx512_core_amx", {}, "could not be sampled"),
        ("amx_bf16", "oneDNN brg_matmul:avx512_core_amx", {AMX: 40}, ""),
    ],
)
def test_only_what_verifiably_stays_within_a_set_is_its_peak(
    name: str, kernel: str, counts: dict[str, int], reason: str
):
    found = products.not_held(X86[name], kernel, Counter(counts), frozenset())
    assert reason in found
    assert bool(found) == bool(reason)


def test_nothing_is_known_of_products_on_aarch64_with_wider_vectors():
    neon = InstructionSet("baseline")
    assert "SVE" in products.not_held(neon, "", Counter(), frozenset({"asimd", "sve"}))
    assert products.not_held(neon, "", Counter(), frozenset({"asimd"})) == ""


class FakeWatch(Alone):
    """Sees AVX-512 in whatever runs."""

    def watch(self, run: Any, seconds: float = 0.0) -> tuple[Any, Counter[str], list[str]]:
        return run(), Counter({EVEX: 50}), [MKL.format("OFF")]


def test_a_product_that_is_not_held_is_no_peak():
    evidence: dict[str, str] = {}
    for name, status in (("avx2", "unavailable"), ("avx512", "measured")):
        cases = products.cases(TINY, X86[name], FakeWatch(), evidence, {"torch.mm": products.mm})
        (row,) = timing.measure(cases, 1, lambda _: None)
        assert row.status == status
        assert evidence[row.case.label] == "MKL sgemm CNR:OFF; EVEX 50"


@pytest.mark.parametrize("name", products.PRODUCTS)
def test_products_are_checked(name: str):
    product = products.PRODUCTS[name]
    for tried, status in ((lambda a, b: product(a, b.t().contiguous()), "wrong"), (product, "measured")):
        cases = products.cases(TINY, X86["avx512"], FakeWatch(), {}, {name: tried})
        (row,) = timing.measure(cases, 1, lambda _: None)
        if row.status == "unavailable" and "cannot run" in row.note:
            pytest.skip(row.note)
        assert row.status == status


def test_what_leaves_the_set_is_said():
    within, beyond = (instructions(Counter({VEX: 9, name: 2}), X86["avx2"]) for name in (C_LIBRARY, EVEX))
    assert BEYOND not in within
    assert beyond == "instructions sampled: VEX 9, EVEX 2; BEYOND avx2: EVEX 2"
    assert "not sampled" in instructions(Counter(), X86["avx2"])
    rows = [row(forward.MANY, "ours", "float32", [1.0]) | {"note": note} for note in (within, beyond)]
    lines = summary.lines(Numbers({"groups": [{"rows": rows}]}), False)
    assert lines["cases seen to leave the set"] == f"{forward.MANY} / ours / float32"


def test_compilers_are_held_to_all_sets_but_the_best():
    names = ("baseline", "avx2", "avx512")
    found = [holding.environment(X86[name], names) for name in names]
    assert [e.get("TORCHINDUCTOR_CPP_MARCH") for e in found] == ["x86-64", "x86-64-v3", None]
    assert [e["PROTEINBERT_FAST_ISA"] for e in found] == list(names)
    assert [e["DNNL_MAX_CPU_ISA"] for e in found] == ["SSE41", "AVX2", "AVX512_CORE"]


def row(
    table: str, name: str, dtype: str | None, rounds: list[float], tokens: int = 1000, **more: Any
) -> dict[str, Any]:
    middle = sorted(rounds)[len(rounds) // 2]
    return {
        "table": table, "case": name, "dtype": dtype, "status": "measured", "owner": "torch: oneDNN avx2; VEX 9",
        "note": "", "work": {"tokens": tokens, "residues": tokens}, "seconds": {"p50": middle, "rounds": rounds},
        "rate": {"p50": tokens / middle}, **{key: {"p50": value} for key, value in more.items()},
    }  # fmt: skip


ROWS = [
    row(forward.MANY, "ours", "float32", [1.0, 1.0, 2.0], of_matrix_rate=1.4),
    row(forward.MANY, "padded eager", "float32", [4.0], ours_over_this=4.0),
    row(forward.MANY, "padded compiled", "float32", [2.5], ours_over_this=2.5),
    row(forward.MANY, "protein-bert-pytorch", "float32", [2.0], ours_over_this=2.0),
    row(forward.MANY, "ours", "bfloat16", [1.0, 1.25, 2.0]),
    row(forward.ONE, "ours", "float32", [0.25, 0.5, 1.0], tokens=350),
    row(FEW, "padded eager", "bfloat16", [9.0], ours_over_this=30.0),
    row(train.TABLE, "padded eager", "float32", [3.0], ours_over_this=1.7),
    row("per protein", "ours", "float32", [1.0]),
    row("per residue", "ours", "float32", [1.25]),
    row("per protein", "script", "float32", [3.0], ours_over_this=3.0),
    row("per residue", "script", "float32", [2.5], ours_over_this=2.0),
    row(MODEL_ALONE, "ours", "float32", [1.0]),
    row(machine.TABLE, "torch.mm, 64 x 64", "float32", [2.0]),
    row(machine.TABLE, "oneDNN linear, 64 x 64", "float32", [1.0]),
]


def test_numbers_of_a_set():
    n = Numbers({"groups": [{"rows": [*ROWS, row(forward.MANY, "padded x", "float32", [1.0]) | {"status": "wrong"}]}]})
    assert n.of_peak("float32") == 1.4
    assert n.of_peak("bfloat16") is None
    assert n.over(forward.MANY, "float32", "padded") == 2.5
    assert n.over_padded_bfloat16() == 30.0
    assert n.share_of_batch("float32") == pytest.approx(0.7)
    assert n.bfloat16_over_float32() == pytest.approx(1.0)
    assert n.embed_over_script("float32") == 2.0
    assert n.embed_over_model("float32") == pytest.approx(0.8)
    assert n.embed_over_model("bfloat16") is None
    peak = n.peak("float32")
    assert peak is not None
    assert peak.by == "oneDNN linear, 64 x 64: oneDNN avx2; VEX 9"
    assert peak.rate == 1000


def test_targets_of_a_set():
    numbers = {"avx2": Numbers({"groups": [{"rows": ROWS}]})}
    found = {target.what: target.reached for target in summary.targets("avx2", numbers, False)}
    assert found["float32 over the measured GEMM peak, direct FLOPs"] is True
    assert found["one protein over the batch's rate, float32"] is False
    assert found["embed over the model's own rate, float32"] is False
    assert found["embed over the model's own rate, bfloat16"] is None
    assert found["bfloat16 over float32"] is True
    other = {target.what for target in summary.targets("avx512_bf16", {"avx512_bf16": numbers["avx2"]}, True)}
    assert "bfloat16 over float32" not in other
    assert "bfloat16 over the best padded" in other


FAKE_KERAS = """
import json, sys
job = json.loads(sys.stdin.readline())
print("To enable the following instructions: AVX2 FMA, in other operations, rebuild", file=sys.stderr, flush=True)
widths = [job["sizes"]["d_hidden_seq"], job["sizes"]["d_hidden_global"]]
print(json.dumps({"tensorflow": "2", "batch": 4, "lengths": {"512": len(job["sequences"])}, "finite": FINITE,
                  "widths": widths}), flush=True)
for _ in sys.stdin:
    print("{}", flush=True)
"""


@pytest.mark.parametrize(("finite", "status"), [("True", "measured"), ("False", "wrong")])
def test_the_keras_model_is_a_case_like_others(setup: Setup, tmp_path: Path, finite: str, status: str):
    script = tmp_path / "fake.py"
    script.write_text(FAKE_KERAS.replace("FINITE", finite))
    peer = KerasPeer(sys.executable, tmp_path, script)
    try:
        (found,) = timing.measure(peer.cases(setup), 2, lambda _: None)
    finally:
        peer.close()
    assert found.status == status
    assert len(found.seconds) == (2 if status == "measured" else 0)
    assert "Eigen kernels built without AVX2 FMA" in found.note


def test_a_keras_process_that_dies_is_unavailable(setup: Setup, tmp_path: Path):
    script = tmp_path / "dies.py"
    script.write_text("raise SystemExit('no TensorFlow here')")
    peer = KerasPeer(sys.executable, tmp_path, script)
    try:
        (found,) = timing.measure(peer.cases(setup), 1, lambda _: None)
    finally:
        peer.close()
    assert (found.status, found.note) == ("unavailable", "its process ended: no TensorFlow here")


def test_keras_pads_as_its_package_does():
    assert keras_model.buckets([10, 512, 513, 1024, 2000]) == {512: [0, 1], 1024: [2, 3], 2048: [4]}


def test_an_environment_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(keras_peer, "_python_311", lambda: str(tmp_path / "no-python"))
    with pytest.raises(Unavailable, match="no-python"):
        keras_peer.environment(lambda _: None, tmp_path / "venv")


def test_a_process_that_ends_early_says_how_far_it_came(tmp_path: Path):
    run = Run({"set": "no such set", "folder": str(tmp_path)}, {}, tmp_path / "log", lambda _: None)
    with pytest.raises(Failed, match="its process ended after: it began: KeyError"):
        run.to_end(60)


@pytest.mark.slow
def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    code = command.main(["--sets", "baseline", "--tiny", "--output", str(tmp_path)])
    text, error = capsys.readouterr()
    assert code == 0, error
    values = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "results.md").read_text().strip() == text.strip()
    found = values["sets"]["baseline"]
    assert found["environment"]["instruction_set"] == "baseline"
    if IS_X86:
        assert found["environment"]["cpu_capability"] == "DEFAULT"
        assert found["environment"]["inductor_vectors"] == "none"
    assert [group["name"] for group in found["groups"]] == ["forward", "train", "embed"]
    rows = [row for group in found["groups"] for row in group["rows"]]
    assert {row["table"] for row in rows} >= {forward.MANY, forward.ONE, FEW, train.TABLE, MODEL_ALONE, machine.TABLE}
    here = [row for row in rows if other_package_version() != "not installed" or row["case"] != OTHER_PACKAGE]
    assert {row["status"] for row in here if row["table"] != machine.TABLE} == {"measured"}
    n = Numbers(found)
    assert n.over(forward.MANY, "float32", "padded")
    assert n.over_padded_bfloat16()
    assert n.over(train.TABLE, "float32", "padded")
    assert n.embed_over_script("float32")
    for line in (
        "| measured GEMM peak, float32 |",
        "## Targets",
        "## With baseline",
        "Quick run",
        "### Model: forward",
    ):
        assert line in text
    assert values["targets"]["baseline"]
    assert all(target["reached"] in {True, False, None} for target in values["targets"]["baseline"])


@pytest.mark.parametrize("wrong", [["--sets", "nope"], ["--rounds", "0"]])
def test_wrong_use(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        command.main(wrong)
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err
