"""Trains a model on the kernels and as float32 reference, and compares the loss curves.

    python benchmarks/loss_curves.py --output FOLDER             # on the GPU, or in Triton's interpreter
    python benchmarks/loss_curves.py --output FOLDER --redraw    # only the picture, of results that are there

With a GPU the model has the published sizes; without one the kernels run in Triton's interpreter, and the model is
small. The exit code is 1 if a curve leaves the band. docs/training.md shows what came of it.
"""

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROTEINS = ROOT / "tests" / "data" / "swissprot_200.tsv"


def main() -> int:
    """Runs the comparison of this checkout."""
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description="Loss curves of training on the kernels beside the float32 reference.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for tables, numbers and picture")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU, unless said")
    parser.add_argument("--redraw", action="store_true", help="draw the results in FOLDER; train nothing")
    arguments = parser.parse_args()

    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not arguments.redraw:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        try:
            from tests.ops.kernels import interpreter
        except ImportError as error:
            print(f"loss_curves: error: {error}: pip install 'proteinbert-fast[kernels]'", file=sys.stderr)
            return 1
        interpreter.mend()
    from proteinbert_fast.benchmark import loss_curves
    from proteinbert_fast.errors import ProteinBertError

    folder = arguments.output
    try:
        if not arguments.redraw:
            found = compared(device, arguments.steps)
            loss_curves.write(found, folder)
        found = json.loads((folder / loss_curves.JSON_NAME).read_text())
        print(loss_curves.to_markdown(found))
        outside = loss_curves.outside(found)
        if outside:
            print(f"loss_curves: OUTSIDE the band: {', '.join(outside)}", file=sys.stderr)
        if arguments.redraw or importlib.util.find_spec("matplotlib"):
            loss_curves.draw(found, folder / loss_curves.PICTURE_NAME)
        else:
            print("loss_curves: no picture without matplotlib; --redraw draws one later", file=sys.stderr)
    except (ProteinBertError, OSError) as error:
        print(f"loss_curves: error: {error}", file=sys.stderr)
        return 1
    return 1 if outside else 0


def compared(device: str, steps: int) -> dict[str, object]:
    """Trains in all ways."""
    import torch
    import triton

    from proteinbert_fast import ProteinBertConfig
    from proteinbert_fast.benchmark import loss_curves, machine
    from proteinbert_fast.benchmark.loss_curves import SMALL, Plan

    proteins = loss_curves.read_proteins(PROTEINS)
    on_gpu = device == "cuda"
    environment = machine.environment() | {
        "triton": triton.__version__,
        "interpreted": not on_gpu,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
    }
    plan = Plan(ProteinBertConfig(n_annotations=proteins.n_terms, **({} if on_gpu else SMALL)), steps, device=device)
    plan = replace(plan, batch=64, residues=510) if on_gpu else replace(plan, ways=(*plan.ways, loss_curves.ON_CPU))
    source = f"{len(proteins.sequences)} of Swiss-Prot ({PROTEINS.relative_to(ROOT)})"
    return loss_curves.compare(plan, proteins, environment, source, lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    sys.exit(main())
