"""The order of straight-line graphs: what may pass what."""

import textwrap

from twofold.convert.order import dependencies
from twofold.graph import parse


def test_draws_in_place_keep_their_order_among_others() -> None:
    graph = parse(
        textwrap.dedent("""\
        graph g(%x: f32[4]):
          %0: f32[4] = call aten.rand_like.default(%x)
          %1: f32[4] = call aten.empty_like.default(%x)
          %2: f32[4] = call aten.uniform_.default(%1)
          %3: f32[4] = call aten.rand_like.default(%x)
          return %0, %2, %3
        """)
    )
    follows = dependencies(graph)
    assert 0 in follows[2]
    assert 2 in follows[3]
