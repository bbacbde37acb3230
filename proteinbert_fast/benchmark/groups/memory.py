"""Peak resident memory while one long protein is embedded, each length in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from proteinbert_fast.benchmark import inputs
from proteinbert_fast.benchmark.cases import Case, Check, Ready, Unavailable, Work
from proteinbert_fast.benchmark.groups.embed import Per, stored_states
from proteinbert_fast.benchmark.setup import OURS, PLAIN, Setup
from proteinbert_fast.benchmark.timing import Row, checked

LIMIT = 2500  # bytes per residue, float32
DTYPE = "float32"
_SCRIPT_LONGEST = 250_000  # residues; beyond, the script needs too much memory for small machines

Peaks = dict[str, Any]


def cases(setup: Setup) -> list[Case]:
    """Ours per residue and per protein at every length, and the script per protein at the shorter ones."""
    found = []
    for name, owner, per in (("ours", OURS, "residue"), ("ours", OURS, "protein"), ("script", PLAIN, "protein")):
        for length in setup.settings.memory_lengths:
            if name == "script" and length > _SCRIPT_LONGEST:
                continue
            found.append(
                Case(
                    table=f"{name}, per {per}",
                    name=f"{length:,} residues",
                    what="FASTA to HDF5 in a new process",
                    owner=owner,
                    ours=owner == OURS,
                    work=Work(proteins=1, residues=length, tokens=length + 2),
                    unit="residues/s",
                    prepare=lambda n=length, name=name, per=per: _prepare(setup, name, per, n),  # type: ignore[misc]
                    dtype=DTYPE,
                )
            )
    return found


def _prepare(setup: Setup, name: str, per: Per, length: int) -> Ready[Peaks]:
    if not Path("/proc/self/status").exists():
        raise Unavailable("needs Linux's /proc/self/status")
    folder = setup.folder
    fasta = folder / "long.fasta"
    fasta.write_bytes(b">long\n" + inputs.of_length(length) + b"\n")
    job = {
        "name": name,
        "per": per,
        "short": str(setup.typical_fasta),
        "long": str(fasta),
        "folder": str(folder),
        "config": setup.settings.config.to_dict(),
    }

    def run() -> Peaks:
        command = [sys.executable, "-m", "proteinbert_fast.benchmark.peak", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode < 0:
            raise Unavailable(f"killed by signal {-done.returncode}: not enough memory?")
        if done.returncode:
            raise RuntimeError(f"the process of {length:,} residues failed:\n{done.stderr}")
        peaks: Peaks = json.loads(done.stdout)
        return peaks

    def check(peaks: Peaks) -> Check:
        with h5py.File(peaks["long"]) as file:
            rows = file["embeddings"].shape[0]
            finite = all(np.isfinite(file["embeddings"][k : k + 65_536]).all() for k in range(0, rows, 65_536))
        if rows != (length if per == "residue" else 1) or not finite:
            return Check(False, f"{rows:,} rows for {length:,} residues, {'' if finite else 'not '}finite")
        # The process embeds a protein with a known answer too, before the long one.
        return setup.check(stored_states(Path(peaks["short"]), per), DTYPE, expected=1, stored=True)

    return Ready(run, check)


def measure(cases: Sequence[Case], rounds: int, say: Callable[[str], None]) -> list[Row]:
    """One process per case: its peak hardly varies, so there are no rounds."""
    del rounds
    rows = []
    for case in cases:
        say(f"measuring {case.label}")
        row, _, peaks = checked(case)
        if peaks is not None:
            grown = peaks["peak_bytes"] - peaks["baseline_bytes"]
            row.seconds = [peaks["seconds"]]
            row.bytes = {
                "baseline": peaks["baseline_bytes"],
                "peak": peaks["peak_bytes"],
                "per_residue": grown / case.work.residues,
            }
        rows.append(row)
    return rows


def fit(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A straight line through the peaks of each table, with what is left over at each length.

    Returns:
        For each table of at least two lengths: bytes per residue, bytes at 0 residues, the residuals, and the largest
        of them as a fraction of the highest peak (each peak above its baseline).
    """
    lines = []
    for table in dict.fromkeys(row.case.table for row in rows):
        points = [(r.case.work.residues, r.bytes["peak"] - r.bytes["baseline"]) for r in rows
                  if r.case.table == table and r.bytes]  # fmt: skip
        if len(points) < 2:
            continue
        residues, grown = np.array(points, float).T
        slope, intercept = np.polyfit(residues, grown, 1)
        residuals = grown - (slope * residues + intercept)
        lines.append(
            {
                "table": table,
                "bytes_per_residue": float(slope),
                "bytes_at_0": float(intercept),
                "residuals_bytes": residuals.tolist(),
                "largest_residual": float(np.abs(residuals).max() / max(grown.max(), 1.0)),
                "limit": LIMIT,
                "within_limit": bool(slope < LIMIT and (grown / residues < LIMIT).all()),
            }
        )
    return lines
