"""What stands in the place of a section that could not be run to its end."""

import traceback

from proteinbert_fast.benchmark.cases import Case, Ready, Unavailable, Work
from proteinbert_fast.benchmark.setup import OURS
from proteinbert_fast.benchmark.timing import Row
from proteinbert_fast.errors import first_line


def row(section: str, error: Exception) -> Row:
    """One row, wrong: nobody should take the report for complete."""

    def prepare() -> Ready[None]:
        raise Unavailable("failed")

    case = Case(table=f"{section} failed", name="the whole section", what="", owner=OURS, ours=True, work=Work(),
                unit="tokens/s", prepare=prepare)  # fmt: skip
    place = traceback.extract_tb(error.__traceback__)[-1]
    return Row(case, "wrong", check=f"{first_line(error)} ({place.filename.rpartition('/')[2]}:{place.lineno})")
