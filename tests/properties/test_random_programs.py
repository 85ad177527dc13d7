"""Random imperative programs are under every engine what they are in eager execution, in all that can be observed."""

import inspect
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings

from tests.differential import Runner, compare, eager, exact_backend, function, run
from tests.plain_replay import plain_replay
from tests.properties.random_programs import CALLS, Source, build, load, programs, written

ENGINES = ("auto", "coexecution", "speculation")
EXAMPLES = 15
UNTIL_SPECULATED = 24
"""Calls, of which the first are recorded and co-executed: of 60 programs, 38 were speculated on in so many."""
relaxed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def differences(source: Source, runner: Runner, folder: Path, calls: int = CALLS) -> list[str]:
    """Return what a user could tell apart in some calls."""
    with written(source, folder) as path:
        factory = partial(build, source, path)
        return compare(run(factory, calls, eager), run(factory, calls, runner))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_random_programs_are_exact(engine: str, tmp_path: Path) -> None:
    @relaxed
    @given(programs())
    def check(source: Source) -> None:
        runner = function(engine=engine, backend=exact_backend(), numerics="exact", background=False)
        found = differences(source, runner, tmp_path, UNTIL_SPECULATED if engine == "speculation" else CALLS)
        assert found == [], f"{source}\n" + "\n".join(found[:8])

    check()


@relaxed
@given(source=programs())
def test_eager_equals_eager_and_the_source_can_be_read(source: Source, tmp_path: Path) -> None:
    assert differences(source, eager, tmp_path) == []
    with written(source, tmp_path) as path:
        assert "global TOTAL" in inspect.getsource(load(path).step)


def exception_free(source: Source, folder: Path) -> bool:
    with written(source, folder) as path:
        return all(
            observed.facts.get("exception") is None for observed in run(partial(build, source, path), CALLS, eager)
        )


@pytest.mark.parametrize("what", ["printed", "observed globals", "result", "random of Python"])
def test_plain_tracing_is_caught(what: str, tmp_path: Path) -> None:
    """The oracle and the programs together: a recorder that takes one call for all calls is found out."""

    def is_caught(source: Source) -> bool:
        if not exception_free(source, tmp_path):
            return False
        return any(f": {what}" in difference for difference in differences(source, plain_replay, tmp_path))

    find(programs(), is_caught, settings=settings(relaxed, max_examples=300, phases=[Phase.generate]))
