"""Training on the kernels goes the way of the float32 reference: 20 steps; benchmarks/loss_curves.py makes 200."""

from pathlib import Path

import pytest

from proteinbert_fast import ProteinBertConfig
from proteinbert_fast.benchmark import loss_curves
from proteinbert_fast.benchmark.loss_curves import KERNELS, REFERENCE, SMALL, Plan, Way

pytestmark = pytest.mark.slow

PROTEINS = loss_curves.read_proteins(Path(__file__).parents[2] / "data" / "swissprot_200.tsv")


@pytest.fixture(scope="module")
def plan(device) -> Plan:
    return Plan(ProteinBertConfig(n_annotations=PROTEINS.n_terms, **SMALL), 20, batch=2, device=device.type)


@pytest.fixture(scope="module")
def reference(plan):
    curve = loss_curves.train(plan, PROTEINS, REFERENCE)
    assert curve.smooth[-1] < 0.8 * curve.smooth[0], "training gets somewhere"
    return curve


@pytest.mark.parametrize("way", KERNELS, ids=lambda way: way.name)
def test_mixed_precision_follows_the_float32_reference(plan, reference, way: Way):
    curve = loss_curves.train(plan, PROTEINS, way)
    # Two thousandths: rounding to bfloat16 makes two ten-thousandths in 20 steps, a slope left out seven thousandths.
    assert curve.keeps_to(reference)
    assert abs(curve.off(reference)).max() < 0.002
    assert not curve.skipped
    assert len(curve.scale) == (20 if way.is_scaled else 0)
    # Every parameter goes the same way: the loss would hardly tell of one whose gradient is wrong.
    cosine, name = curve.direction(reference)
    assert cosine > 0.9, f"{name} goes another way: cosine {cosine:.3f}"
