"""Every construct is converted, and then equal to eager execution."""

import pytest

from tests.differential import compare, eager, run
from tests.unit.convert.speculation.constructs import CONSTRUCTS, STEPS, factory
from tests.unit.convert.speculation.executing import Speculating


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_construct_is_converted_and_equals_eager(name: str) -> None:
    speculating = Speculating(warm_up=6)
    expected = run(factory(name), STEPS, eager)
    found = run(factory(name), STEPS, speculating)
    assert not compare(expected, found), (compare(expected, found)[:5], speculating)
    assert not speculating.refusals, speculating.refusals
    assert speculating.speculated == STEPS - 6, speculating
