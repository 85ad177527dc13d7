"""Which programs of the corpus run without their Python, and why the others do not: a change of either is noticed."""

import pytest

from benchmarks.programs import JANUS_NAMES, NAMES
from tests.differential import assert_same, function
from tests.equivalence.test_programs import MANY_STEPS, factory

CALLS = 40
MANY_CALLS = {"coin_flip": 100, **dict.fromkeys(JANUS_NAMES, MANY_STEPS)}
SPECULATED = {
    "mlp": 35,
    "lenet": 35,
    "resnet18": 35,
    "lstm_loop": 35,
    "gpt": 35,
    "dcgan": 35,
    "vae": 35,
    "mixed_precision": 35,
    "logging_net": 35,
    "lr_schedule": 34,
    "varying_loop": 31,
    "lstm": 31,
    "pix2pix": 28,
    "grad_accumulation": 29,
    "resnet50": 28,
    "lm": 27,
    "multi_path": 27,
    "inception_v3": 20,
    # Who learns is decided by a loss, late: a call that goes the other way is undone, and tried by another graph.
    "adversarial": 32,
    # A worker gives up its copy of the model for that of the others, and plays in Gymnasium's environment.
    "a3c": 28,
    # Its environment moves pendulums in place. How many of them fall at which move makes a way, and these are many.
    "actor_critic": 12,
    # Each pattern of coins is a way of its own, to be met before it can be recorded, and again before it is converted.
    "coin_flip": 50,
}
"""At least so many of the calls; the first three to thirteen, and one for each way, are eager or co-executed."""
REFUSED = {
    # The configuration of transformers defines how its attributes are read.
    "bert": {"unsupported_object"},
    # Several steps in one call: what comes behind the first unit is decided by tensors, or is one more unit. Which of
    # the two is met first depends on the way that was recorded last: after other tests it is another than alone.
    "ppo": {"late_decision", "several_units"},
}
"""The codes of refusals that stand in the way; `no_graph` alone means that a way was not recorded yet."""


def test_every_program_is_in_the_table() -> None:
    assert SPECULATED.keys() | REFUSED.keys() == set(NAMES)
    assert SPECULATED.keys().isdisjoint(REFUSED)


@pytest.mark.parametrize("name", NAMES)
def test_program_is_speculated_or_refused_as_the_table_says(name: str) -> None:
    configuration = function(engine="speculation", backend="replay", numerics="exact", background=False)
    report = assert_same(factory(name, "cpu"), MANY_CALLS.get(name, CALLS), configuration)
    assert report["iterations"] >= MANY_CALLS.get(name, CALLS), report
    codes = {refusal["code"] for refusal in report["refusals"]} - {"no_graph"}
    if name in REFUSED:
        assert codes, report["refusals"]
        assert codes <= REFUSED[name], report["refusals"]
        assert report["speculated_iterations"] == 0
    else:
        assert not codes, report["refusals"]
        assert report["speculated_iterations"] >= SPECULATED[name], report["refusals"]
