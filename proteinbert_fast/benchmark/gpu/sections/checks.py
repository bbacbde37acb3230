"""Every kernel checked on the device. What fails here is not timed later."""

from proteinbert_fast.benchmark.cases import Case, Ready, Unavailable, Work
from proteinbert_fast.benchmark.gpu import checks
from proteinbert_fast.benchmark.gpu.bench import Bench
from proteinbert_fast.benchmark.gpu.checks import Outcome
from proteinbert_fast.benchmark.gpu.precision import Precision
from proteinbert_fast.benchmark.setup import OURS
from proteinbert_fast.benchmark.timing import Row

TITLE = "Checks on the device"


def rows(bench: Bench) -> list[Row]:
    """A row per check and precision."""
    found: dict[str, list[Outcome]] = {}
    if not bench.obstacle:
        if bench.settings.apart:
            bench.say(f"all of {', '.join(bench.settings.precisions)}, each in a process of its own")
            found = checks.run_apart(bench.settings, bench.precisions, bench.device)
        else:
            for precision in bench.precisions:
                bench.say(f"all in {precision.name}")
                outcomes = checks.run(bench.settings, precision, bench.device)
                found[precision.name] = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
    result = []
    for precision in bench.precisions:
        outcomes_by_name = {outcome.name: outcome for outcome in found.get(precision.name, [])}
        for name, what in checks.CHECKS.items():
            row = Row(_case(name, what, precision), "unavailable", bench.obstacle or "a check before it ended the run")
            outcome = outcomes_by_name.get(name)
            if outcome is not None:
                row.status, row.check, row.note = ("measured" if outcome.passed else "wrong"), outcome.found, ""
            if not bench.obstacle and row.status != "measured" and name not in checks.APART:
                bench.failed[name, precision.name] = row.check or row.note
                bench.say(f"WRONG: {name} in {precision.name}: {row.check or row.note}")
            result.append(row)
    bench.tidy()
    return result


def _case(name: str, what: str, precision: Precision) -> Case:
    def prepare() -> Ready[None]:
        raise Unavailable("checked with all others of its precision")

    return Case(
        table="checks",
        name=name,
        what=what,
        owner=OURS,
        ours=True,
        work=Work(),
        unit="tokens/s",
        prepare=prepare,
        dtype=precision.name,
    )
