"""When a program may be kept waiting, by a clock of the test's own."""

from collections.abc import Callable

import pytest

from twofold.run.account import Account
from twofold.run.pace import HEAD_START, RECORDED_AT_MOST, RECORDED_IN_EAGER_UNITS, SHARE, Pace, Work

ROUNDING = 1e-9


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Program:
    """One whose units take `unit` seconds eagerly; counts what it was kept waiting for, and when."""

    def __init__(self, unit: float, *, is_kept: bool = True, uses_accelerator: bool = False) -> None:
        self.clock = Clock()
        self.account = Account("test", "coexecution")
        self.pace = Pace(self.account, is_kept, self.clock, lambda: uses_accelerator)
        self.unit = unit
        self.eager = 0.0
        """Seconds that eager execution would have taken so far, without the first unit."""
        self.units = 0

    def run_eagerly(self) -> None:
        self.clock.now += self.unit
        self.pace.ran_eagerly(self.unit)
        self.eager += self.unit if self.units else 0.0
        self.units += 1

    def record(self, seconds: float, *, is_whole: bool = True, goes_on: bool = False) -> None:
        """Record a unit, which takes so much longer than eagerly."""
        taken = seconds if goes_on else self.unit + seconds
        self.clock.now += taken
        self.pace.recorded(taken, is_whole, goes_on)
        self.eager += 0.0 if goes_on else self.unit
        self.units += 1

    def do(self, work: Work, seconds: float) -> None:
        with self.pace.taking(work):
            self.clock.now += seconds

    def run_until(self, *works: Work) -> int:
        """Run units eagerly until there is time for these; return how many."""
        began = self.units
        while not self.pace.fits(*works):
            assert self.units < 100_000, "it never comes"
            self.run_eagerly()
        return self.units - began

    @property
    def share(self) -> float:
        return self.account.stall_seconds / self.eager if self.eager else 0.0


def test_nothing_is_done_before_eager_time_has_passed() -> None:
    program = Program(unit=0.001)
    assert not program.pace.fits(Work.RECORD)
    program.run_eagerly()
    assert not program.pace.fits(Work.RECORD)


@pytest.mark.parametrize("recording", [0.2, 1.0])
@pytest.mark.parametrize("unit", [0.0001, 0.0007, 0.02, 1.0])
def test_at_every_moment_what_was_taken_is_a_share_of_eager_time(unit: float, recording: float) -> None:
    """Whatever comes, as long as a recording takes no longer than it is estimated to."""
    program = Program(unit)
    seconds = recording * min(RECORDED_IN_EAGER_UNITS * unit, RECORDED_AT_MOST)
    for _ in range(3):
        program.run_until(Work.RECORD)
        program.record(seconds)
        assert program.share <= SHARE + ROUNDING
    for work in (Work.BUILD, Work.CONVERT):
        program.run_until(work)
        program.do(work, work.value * seconds)
        assert program.share <= SHARE + ROUNDING
    assert program.share > SHARE / 4, "more was postponed than had to be"


def test_a_longer_unit_waits_for_fewer() -> None:
    waits = [Program(unit).run_until(Work.RECORD) for unit in (0.001, 0.1, 1.0, 10.0)]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] == pytest.approx(RECORDED_IN_EAGER_UNITS / SHARE, abs=2)
    assert waits[-1] == 2, "the first, whose time does not count, and one more"


def test_what_was_measured_is_taken_instead_of_the_estimate() -> None:
    program = Program(unit=0.001)
    program.run_until(Work.RECORD)
    program.record(0.002)
    assert program.pace.fits(Work.RECORD), "a fifth of the estimate"
    dear = Program(unit=0.001)
    dear.run_until(Work.RECORD)
    dear.record(0.050)
    assert dear.share > SHARE, "this once"
    dear.run_until(Work.RECORD)
    dear.record(0.050)
    assert SHARE - 0.01 < dear.share <= SHARE + ROUNDING


def test_several_works_have_to_fit_together() -> None:
    program = Program(unit=0.001)
    program.run_until(Work.RECORD)
    assert not program.pace.fits(Work.RECORD, Work.BUILD)
    program.run_until(Work.RECORD, Work.BUILD)
    program.record(0.010)
    program.do(Work.BUILD, 0.030)
    assert program.share <= SHARE + ROUNDING


def test_a_recording_that_broke_off_says_nothing_of_the_next() -> None:
    program = Program(unit=0.001)
    program.run_until(Work.RECORD)
    program.record(0.0001, is_whole=False)
    assert program.account.stall_seconds == pytest.approx(0.0001)
    program.run_until(Work.RECORD)
    assert program.pace.fits(Work.RECORD)
    program.record(0.010)
    assert program.share <= SHARE + ROUNDING


def test_units_of_one_call_are_one_recording() -> None:
    """All have to be recorded in the call in which the first one is."""
    program = Program(unit=0.001)
    program.run_until(Work.RECORD)
    program.record(0.010)
    program.record(0.010, goes_on=True)
    assert program.account.stall_seconds == pytest.approx(0.020)
    program.run_until(Work.RECORD)
    program.record(0.010)
    program.record(0.010, goes_on=True)
    assert program.share <= SHARE + ROUNDING


def test_graphs_that_take_longer_are_not_made_up_for() -> None:
    program = Program(unit=0.001)
    for _ in range(5):
        program.run_eagerly()
    program.pace.ran_otherwise(0.004)
    assert program.account.stall_seconds == 0.0


def test_time_passes_while_units_run_as_graphs() -> None:
    """Conversion comes when all units do."""
    program = Program(unit=0.001)
    program.run_until(Work.RECORD)
    program.record(0.010)
    assert not program.pace.fits(Work.CONVERT)
    for _ in range(1000):
        program.pace.ran_otherwise(0.0005)
    assert program.pace.fits(Work.CONVERT)


def test_what_graphs_save_may_be_taken_for_more_of_them() -> None:
    program = Program(unit=0.001)
    program.run_until(Work.RECORD)
    program.record(0.010)
    graphs = 0
    while not program.pace.fits(Work.CONVERT):
        program.pace.ran_otherwise(0.0001)
        graphs += 1
    slower = Program(unit=0.001)
    slower.run_until(Work.RECORD)
    slower.record(0.010)
    assert graphs < slower.run_until(Work.CONVERT) / 3
    # 0.9 ms saved by each and a third of the 1 ms that it would have taken.
    assert graphs == pytest.approx(Work.CONVERT.value * 0.010 / (0.0009 + SHARE * 0.001), abs=2)


def test_programs_of_an_accelerator_have_a_head_start() -> None:
    program = Program(unit=0.001, uses_accelerator=True)
    assert program.pace.fits(Work.RECORD)
    program.run_eagerly()
    program.run_eagerly()
    program.record(HEAD_START)
    assert not program.pace.fits(Work.RECORD)


def test_a_unit_that_is_much_longer_once_does_not_count() -> None:
    program = Program(unit=0.001)
    for seconds in (0.001, 0.001, 5.0, 0.001, 0.001):
        program.clock.now += seconds
        program.pace.ran_eagerly(seconds)
    assert not program.pace.fits(Work.RECORD)
    program.clock.now += 0.011
    program.pace.recorded(0.011, True, False)
    assert program.account.stall_seconds == pytest.approx(0.010)


def test_where_no_pace_is_kept_all_is_done_at_once() -> None:
    program = Program(unit=0.001, is_kept=False)
    assert program.pace.fits(*Work)
    program.record(1.0)
    assert program.account.stall_seconds == 0.0, "what a unit takes eagerly is not known"
    assert program.pace.fits(*Work)
    assert not program.account.decisions


def said(act: Callable[[Program], object]) -> list[str]:
    program = Program(unit=0.001)
    act(program)
    return [decision.text for decision in program.account.decisions]


def test_the_report_says_once_that_graphs_wait() -> None:
    (text,) = said(
        lambda program: [program.run_until(Work.RECORD), program.record(0.01), program.run_until(Work.BUILD)]
    )
    assert text == "eager until graphs take at most 33% more time: the next needs about 10.0 ms"
