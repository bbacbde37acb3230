"""Checks come before times; ratios are formed within rounds."""

from collections.abc import Callable
from typing import Any

from proteinbert_fast.benchmark import timing
from proteinbert_fast.benchmark.cases import Case, Check, Ready, Unavailable, Work
from proteinbert_fast.benchmark.timing import Row, percentiles, relate


def case(name: str, prepare: Callable[[], Ready[Any]], **rest: Any) -> Case:
    values: dict[str, Any] = {
        "table": "t",
        "what": "",
        "owner": "",
        "ours": False,
        "work": Work(tokens=10, flops=100.0, bytes=50.0),
        "unit": "tokens/s",
        "dtype": "float32",
    }
    return Case(name=name, prepare=prepare, **(values | rest))


def unprepared() -> Ready[Any]:
    raise AssertionError("not to be prepared")


def test_percentiles():
    assert percentiles(range(11)) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert percentiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}


def test_a_wrong_result_is_run_once_and_gets_no_time():
    calls: list[str] = []

    def ready(name: str, passed: bool) -> Ready[None]:
        return Ready(lambda: calls.append(name), lambda _: Check(passed, "found"))

    rows = timing.measure(
        [case("right", lambda: ready("right", True)), case("wrong", lambda: ready("wrong", False))], 3, lambda _: None
    )
    assert [(row.status, len(row.seconds), row.check) for row in rows] == [
        ("measured", 3, "found"),
        ("wrong", 0, "found"),
    ]
    assert calls.count("wrong") == 1
    assert calls.count("right") == 4


def test_nothing_is_timed_before_everything_is_checked():
    events: list[str] = []

    def prepare(name: str) -> Ready[None]:
        def check(_: None) -> Check:
            events.append(f"check {name}")
            return Check(True, "")

        return Ready(lambda: events.append(f"run {name}"), check)

    timing.measure([case(n, lambda n=n: prepare(n)) for n in ("a", "b")], 2, lambda _: None)
    assert events[:4] == ["run a", "check a", "run b", "check b"]
    # Rounds are interleaved, and each starts with another case.
    assert events[4:] == ["run a", "run b", "run b", "run a"]


def test_what_cannot_run_says_why():
    def prepare() -> Ready[Any]:
        raise Unavailable("not installed")

    (row,) = timing.measure([case("x", prepare)], 2, lambda _: None)
    assert (row.status, row.note, row.seconds) == ("unavailable", "not installed", [])


def test_calls_are_timed_together():
    calls: list[int] = []
    (row,) = timing.measure([case("x", lambda: Ready(lambda: calls.append(1), None, calls=5))], 2, lambda _: None)
    assert len(calls) == 1 + 2 * 5
    assert len(row.seconds) == 2


def test_fractions_and_ratios_are_formed_within_rounds():
    # The machine is twice as slow in the second round: no fraction or ratio changes.
    ours = Row(case("ours", unprepared, ours=True), "measured", seconds=[1.0, 2.0])
    other = Row(case("other", unprepared), "measured", seconds=[3.0, 6.0])
    elsewhere = Row(case("elsewhere", unprepared, dtype="bfloat16"), "measured", seconds=[1.0, 1.0])
    slow = Row(
        case("slow", unprepared, unit="GFLOP/s", probe="matrix", work=Work(flops=200.0)), "measured", seconds=[2.0, 4.0]
    )
    fast = Row(
        case("fast", unprepared, unit="GFLOP/s", probe="matrix", work=Work(flops=200.0)), "measured", seconds=[0.5, 1.0]
    )
    copy = Row(
        case("copy", unprepared, unit="GB/s", probe="copy", work=Work(bytes=100.0)), "measured", seconds=[1.0, 2.0]
    )
    relate([ours, other, elsewhere, slow, fast, copy])
    assert ours.of_matrix_rate == [0.25, 0.25]
    assert ours.of_copy_rate == [0.5, 0.5]
    assert other.ours_over_this == [3.0, 3.0]
    assert ours.ours_over_this == []
    assert elsewhere.ours_over_this == []
    assert elsewhere.of_matrix_rate == []


def test_one_core_is_compared_with_copying_on_one_core():
    one = Row(
        case("one", unprepared, unit="GB/s", probe="copy", cores="one", work=Work(bytes=100.0)),
        "measured",
        seconds=[1.0],
    )
    every = Row(case("all", unprepared, unit="GB/s", probe="copy", work=Work(bytes=100.0)), "measured", seconds=[0.25])
    single = Row(case("single", unprepared, cores="one"), "measured", seconds=[1.0])
    many = Row(case("many", unprepared), "measured", seconds=[1.0])
    relate([one, every, single, many])
    assert single.of_copy_rate == [0.5]
    assert many.of_copy_rate == [0.125]
