"""A process whose peak memory is measured: embeds a short protein, then a long one. Run by the memory group.

Prints what it found as JSON: peak resident bytes after the short protein (libraries, weights and workspaces are
there then) and after the long one.
"""

import json
import sys
import time
from pathlib import Path

from proteinbert_fast.benchmark.competitors import PaddedProteinBert
from proteinbert_fast.benchmark.groups.embed import embed_ours, embed_script
from proteinbert_fast.benchmark.setup import random_model
from proteinbert_fast.config import ProteinBertConfig


def peak_bytes() -> int:
    """Most resident memory this process has had.

    Not getrusage's: that one begins with the parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main(job_text: str) -> None:
    """Does the job that `groups.memory` describes."""
    job = json.loads(job_text)
    folder = Path(job["folder"])
    ours = random_model(ProteinBertConfig.from_dict(job["config"]))
    model = ours if job["name"] == "ours" else PaddedProteinBert(ours)
    del ours

    def embed(which: str) -> Path:
        fasta, output = Path(job[which]), folder / f"{which}.h5"
        if isinstance(model, PaddedProteinBert):
            return embed_script(model, fasta, output, job["per"], 1)
        return embed_ours(model, fasta, output, job["per"])

    short = embed("short")
    baseline = peak_bytes()
    started = time.perf_counter()
    long = embed("long")
    seconds = time.perf_counter() - started
    found = {
        "short": str(short),
        "long": str(long),
        "baseline_bytes": baseline,
        "peak_bytes": peak_bytes(),
        "seconds": seconds,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
