"""Random whole programs are under `twofold.program` what they are in eager execution, in all that can be observed."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import Phase, find, given, settings

from tests.differential import Runner, Twofold, compare, eager, exact_backend, program, run
from tests.properties.random_loops import PARTS, build, loops
from tests.properties.random_programs import Source, written
from tests.properties.test_random_programs import relaxed
from twofold.run.graph_runner import GraphRunner

EXAMPLES = 15
"""About 7 s on one core. `--hypothesis-profile=explore` tries new ones."""


def exact() -> Twofold:
    return program(backend=exact_backend(), numerics="exact", background=False)


def differences(source: Source, runner: Runner, folder: Path) -> list[str]:
    """Return what a user could tell apart in two calls of `main`, at which nobody looks in between."""
    with written(source, folder) as path:
        factory = partial(build, source, path)
        return compare(run(factory, PARTS, eager, observe="end"), run(factory, PARTS, runner, observe="end"))


@pytest.mark.slow
def test_random_loops_are_exact(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()

    @settings(relaxed, max_examples=EXAMPLES)
    @given(loops())
    def check(source: Source) -> None:
        runner = exact()
        found = differences(source, runner, tmp_path)
        assert found == [], f"{source}\n" + "\n".join(found[:8])
        for name in ("iterations", "graph_iterations", "eager_iterations"):
            counts[name] += runner.report[name]

    check()
    assert counts["graph_iterations"] > counts["iterations"] * 0.4, counts


@pytest.mark.slow
def test_gradients_that_are_left_behind_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs and the oracle together."""
    monkeypatch.setattr(GraphRunner, "commit_gradients", lambda self: None)
    found = settings(relaxed, max_examples=100, phases=[Phase.generate])
    find(loops(), lambda source: bool(differences(source, exact(), tmp_path)), settings=found)
