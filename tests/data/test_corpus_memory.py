"""Memory while a corpus is built does not depend on how much is read."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastobo")

# Peaks in KB: of the same build on one, two and eight parts; runs and ranges are small, so that there are many of them.
PEAKS = """
import resource, sys, zlib
from proteinbert_fast.data.corpus import build, build_corpus, runs, verify_corpus
import numpy as np

folder = sys.argv[1]
runs.RUN_BYTES, build.RANGE_BYTES = 1 << 21, 1 << 20
draw = np.random.default_rng(0)
letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)


def peak(entries):
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    with open(f"{folder}/x.xml.gz", "wb") as file:
        file.write(packer.compress(b'<UniRef90 xmlns="http://uniprot.org/uniref">'))
        for i in range(entries):
            residues = letters[draw.integers(0, 20, 400)].tobytes()
            entry = (
                b'<entry id="U%d"><name>x</name><property type="GO Function" value="GO:%07d"/><representativeMember>'
                b'<dbReference type="x" id="y"/><sequence length="400" checksum="0">%s</sequence>'
                b'</representativeMember><member><dbReference type="x" id="%s"/></member></entry>\\n'
            )
            file.write(packer.compress(entry % (i, i % 3 + 1, residues, residues * 2)))
        file.write(packer.compress(b"</UniRef90>") + packer.flush())
    build_corpus(f"{folder}/x.xml.gz", f"{folder}/x.h5", ontology=f"{folder}/go.obo", min_count=1, overwrite=True,
                 workers=1, progress=False)
    assert verify_corpus(f"{folder}/x.h5") == []
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


print(peak(8_000), peak(16_000), peak(64_000))
"""


def test_peak_memory_does_not_grow(tmp_path: Path, obo: Path) -> None:
    assert obo.parent == tmp_path
    command = [sys.executable, "-c", PEAKS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    first, second, last = (int(word) for word in done.stdout.split())
    # 64,000 entries are 100 MB of XML and 26 MB of residues.
    assert last - second < 8_000, (first, second, last)
