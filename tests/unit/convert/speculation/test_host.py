"""Passes over host graphs: text in, text out."""

import operator

from tests.unit.convert.test_from_traces import block, text
from twofold.convert.speculation.host import drop_overwritten, drop_unread
from twofold.graph import GraphBuilder


def test_only_the_last_write_to_a_place_stays_where_nothing_sees_the_others():
    builder = GraphBuilder("g")
    items, other = builder.input("items", None), builder.input("other", None)
    for key, value in ((0, 1), (1, 2), (0, 3)):
        builder.node("set_item", None, (items, key, value))
    builder.node("call", print, (other,))
    for value in (4, 5):
        builder.node("set_item", None, (items, 0, value))
        builder.node("set_attr", None, (other, "new", value))
    graph = drop_overwritten(builder.finish([None]), {("set_item", items, 0), ("set_item", items, 1)})
    assert text(graph) == block("""
        graph g(%items: object, %other: object):
          set_item(%items, 1, 2)
          set_item(%items, 0, 3)
          call builtins:print(%other)
          set_attr(%other, "new", 4)
          set_item(%items, 0, 5)
          set_attr(%other, "new", 5)
          return None
    """)


def test_a_read_in_between_keeps_the_write_before_it():
    builder = GraphBuilder("g")
    items = builder.input("items", None)
    builder.node("set_item", None, (items, 0, 1))
    (found,) = builder.node("get_item", None, (items, 0), results=(None,))
    builder.node("set_item", None, (items, 0, 2))
    graph = builder.finish([found])
    assert drop_overwritten(graph, {("set_item", items, 0)}).nodes == graph.nodes


def test_what_nobody_asks_for_is_not_computed():
    builder = GraphBuilder("g")
    x = builder.input("x", None)
    (unread,) = builder.node("get_attr", None, (x, "a"), results=(None,))
    builder.call(operator.add, unread, 1, result=None)
    read = builder.call(operator.mul, x, 2, result=None)
    builder.call(print, read, result=None)
    assert text(drop_unread(builder.finish([read]))) == block("""
        graph g(%x: object):
          %2: object = call operator.mul(%x, 2)
          %3: object = call builtins:print(%2)
          return %2
    """)
