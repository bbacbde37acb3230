"""Checks and measures the kernels on this machine's GPU, in under eight minutes on an H100.

    python benchmarks/gpu_report.py                              # everything, into benchmarks/results/DATE-DEVICE/
    python benchmarks/gpu_report.py --sections checks,kernels --precisions bfloat16
    python benchmarks/gpu_report.py --interpreter                # every step once, in tiny sizes, without a GPU

docs/benchmarks.md says what the rows mean.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Runs the report of this checkout."""
    sys.path.insert(0, str(ROOT))
    interpreted = "--interpreter" in sys.argv[1:]
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    try:
        from proteinbert_fast.benchmark.gpu.command import main as report
    except ImportError as error:
        print(f"gpu_report: error: {error}; build the package first: pip install -e . (without a network: "
              "python setup.py build_ext --inplace)", file=sys.stderr)  # fmt: skip
        return 1
    if interpreted:
        mend_interpreter()
    return report()


def mend_interpreter() -> None:
    """The interpreter computes bfloat16 wrongly; the tests know how to mend it."""
    try:
        from tests.ops.kernels import interpreter
    except ImportError:
        return  # no triton: the report says so
    interpreter.mend()


if __name__ == "__main__":
    sys.exit(main())
