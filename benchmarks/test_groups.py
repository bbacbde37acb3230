"""Every timed case under pytest-benchmark; the memory measurement too, as extra information.

    pytest benchmarks -k "forward and float32"
    pytest benchmarks --benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds

`proteinbert-fast bench` runs the same cases in interleaved rounds and writes reports; this is for looking at one case.
"""

import pytest

from proteinbert_fast.benchmark import timing
from proteinbert_fast.benchmark.cases import Case
from proteinbert_fast.benchmark.registry import GROUPS
from proteinbert_fast.benchmark.settings import Settings
from proteinbert_fast.benchmark.setup import Setup

SETUP = Setup(Settings())
CASES = [(group, case) for group in GROUPS.values() for case in group.cases(SETUP)]


@pytest.mark.parametrize(("group", "case"), [pytest.param(g.name, c, id=f"{g.name}: {c.label}") for g, c in CASES])
@pytest.mark.filterwarnings("default")
def test_case(group: str, case: Case, benchmark):
    row, ready, result = timing.checked(case)
    if row.status == "unavailable":
        pytest.skip(row.note)
    assert row.status == "measured", f"WRONG: {row.check}"
    assert ready is not None
    benchmark.group = f"{group}: {case.table} {case.dtype or ''}"
    benchmark.extra_info.update(owner=case.owner, check=row.check, note=row.note)
    if group == "memory":
        benchmark.extra_info.update(result)
        benchmark.pedantic(lambda: None)
        return
    benchmark.pedantic(ready.run, rounds=SETUP.settings.rounds, iterations=ready.calls)
    benchmark.extra_info[case.unit] = case.work.amount(case.unit) / benchmark.stats.stats.median
