"""The first minutes on a GPU: checks every kernel, times what is right, and loses nothing if a kernel dies or hangs.

    python benchmarks/gpu_first.py --prepare                 # before, without a GPU: what can be built is built
    python benchmarks/gpu_first.py --output first            # on the GPU, in 420 seconds
    python benchmarks/gpu_first.py --dry-run                 # without a GPU: the runner on fakes, small checks

docs/benchmarks.md says what comes back.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, whose modules would go by other names
    from benchmarks.first.command import main

    sys.exit(main())
