"""Measures the model with each instruction set of this CPU, beside others that are held to the same set.

    python benchmarks/instruction_sets.py                        # every set, about 25 minutes on two cores
    python benchmarks/instruction_sets.py --sets avx2 --keras    # one set, the original Keras model beside it
    python benchmarks/instruction_sets.py --quick                # every set, small sizes: to see that all works

docs/benchmarks.md says how each is held to its set, and how that is verified.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, whose modules would go by other names
    from benchmarks.sets.command import main

    sys.exit(main())
