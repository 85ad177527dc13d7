"""The closed set of operations, as one table.

====================  ===========================================  =========================================
form                  nested bodies                                meaning
====================  ===========================================  =========================================
call f(a…, k=…)                                                    a torch function, method, property getter
                                                                   or ATen overload
feed(name=s)                                                       a value that Python gives during the run
fetch(v)                                                           reports v to Python
if(p, a…)             then(a…), else(a…)                           one of two bodies
switch(i, a…)         one for each index                           the body that Python chose
while(c…)             condition(c…) -> bool, body(c…) -> c…        runs body as long as condition holds
loop(n, c…)           body(i, c…) -> c…                            runs body n times, i = 0 … n-1
invoke name(a…)                                                    a SubGraph of the graph's table
assert(p)                                                          fails the run if p is false
get_attr(o, s)                                                     o.s
set_attr(o, s, v)                                                  o.s = v
get_item(o, k)                                                     o[k]
set_item(o, k, v)                                                  o[k] = v
====================  ===========================================  =========================================

The results of a `call` are the tensors in what it returns, in the order of `torch.utils._pytree`; a single
result without a tensor spec is instead the returned object itself, and a call without results discards what
it returns. A call may return one of its arguments, as in-place operations do: the result is a new value for
the same tensor. `fetch` may carry `name=…` and `assert` may carry `message=…`, both strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Count:
    """How many of something an operation takes."""

    least: int
    most: int | None = None

    def __contains__(self, number: int) -> bool:
        return self.least <= number and (self.most is None or number <= self.most)

    def __str__(self) -> str:
        if self.most is None:
            return f"at least {self.least}"
        return str(self.least) if self.least == self.most else f"{self.least} to {self.most}"


def _exactly(number: int) -> Count:
    return Count(number, number)


_ANY = Count(0)
_NONE = _exactly(0)
_ONE = _exactly(1)


@dataclass(frozen=True, slots=True)
class Op:
    """What a node of one operation must look like, and whether running it can be noticed.

    `effect`: always, never, or `depends` on the target or on what the bodies do (`effects.has_effect`
    decides).
    """

    arguments: Count
    results: Count
    effect: Literal["always", "never", "depends"]
    subgraphs: Count = _NONE
    target: Literal["callable", "name", "none"] = "none"
    keywords: frozenset[str] | None = frozenset()


OPS: dict[str, Op] = {
    "call": Op(_ANY, _ANY, "depends", target="callable", keywords=None),
    "feed": Op(_NONE, _ONE, "never", keywords=frozenset({"name"})),
    "fetch": Op(_ONE, _NONE, "always", keywords=frozenset({"name"})),
    "if": Op(Count(1), _ANY, "depends", subgraphs=_exactly(2)),
    "while": Op(_ANY, _ANY, "depends", subgraphs=_exactly(2)),
    "switch": Op(Count(1), _ANY, "depends", subgraphs=Count(1)),
    "loop": Op(Count(1), _ANY, "depends", subgraphs=_ONE),
    "invoke": Op(_ANY, _ANY, "depends", target="name"),
    "assert": Op(_ONE, _NONE, "always", keywords=frozenset({"message"})),
    "get_attr": Op(_exactly(2), _ONE, "never"),
    "set_attr": Op(_exactly(3), _NONE, "always"),
    "get_item": Op(_exactly(2), _ONE, "never"),
    "set_item": Op(_exactly(3), _NONE, "always"),
}

CONTROL_FLOW: frozenset[str] = frozenset({"if", "while", "switch", "loop", "invoke"})
"""The operations that run other bodies."""
