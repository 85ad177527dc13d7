"""Text form: what `show` prints, `parse` reads back, and what neither accepts."""

import textwrap

import pytest
import torch

from twofold.graph import (
    Ambient,
    Constant,
    GraphBuilder,
    GraphSyntaxError,
    MalformedGraphError,
    Origin,
    TensorSpec,
    equivalent,
    parse,
    show,
)
from twofold.graph.parse import parse_spec

VECTOR = TensorSpec((3,), torch.float32)

EVERY_OP = textwrap.dedent("""\
    graph step(%x: f32[3], %flag: bool[], %model: object):
      %0: f32[3] = feed(name="batch")
      %1: f32[3]! = get_attr(%model, "weight")
      %2: f32[3] = if(%flag):  # train.py:3
        then():
          %3: f32[3]! = call torch.add(%x, %1, alpha=2)  # train.py:4 in forward
          return %3
        else():
          return %x
      %4: f32[3], %5: object = while(%2, 0):
        condition(%6: f32[3], %7: object):
          %8: object = call operator.lt(%7, 3)
          return %8
        body(%9: f32[3], %10: object):
          %11: object = call operator.add(%10, 1)
          return %9, %11
      %12: f32[3] = switch(%5, %4) {no_grad}:
        first(%13: f32[3]):
          return %13
        second(%14: f32[3]):
          return %14
      %15: f32[3] = loop(3, %12):
        body(%16: object, %17: f32[3]):
          return %17
      %18: f32[3] = invoke twice(%15)
      set_attr(%model, "last", %18)
      %19: f32[2] = get_item(%18, slice(None, 2, None))
      set_item(%18, (..., 0), 1.5)
      assert(%flag, message="flag \\u00e9")
      fetch(%18, name="loss")
      return %19, (1, [%x])

    subgraph twice(%a: f32[3]):
      %20: f32[3] = call torch.Tensor.mul_(%a, 2)
      return %20
    """)


def test_text_with_every_op_is_read_and_printed_as_it_was():
    assert show(parse(EVERY_OP)) == EVERY_OP


def test_common_indentation_and_blank_lines_are_ignored():
    assert equivalent(parse(textwrap.indent(EVERY_OP, "    ").replace("\n", "\n\n")), parse(EVERY_OP))


ARGUMENTS = [
    None,
    True,
    7,
    -3,
    1.5,
    -1e-07,
    1e22,
    float("inf"),
    float("-inf"),
    float("nan"),
    complex(0.0, -2.5),
    'quote " comma, paren) # not a comment \n \u2028 %x',
    torch.float32,
    torch.channels_last,
    torch.sparse_coo,
    torch.float8_e4m3fn,
    torch.device("cuda:1"),
    slice(None, 3, -1),
    ...,
    range(1, 9, 2),
    torch.Size([2, 3]),
    torch.Size([]),
    (),
    (1,),
    [1, (2, [])],
    {},
    {"a": 1, 2: {"b": None}, (1, 2): [3.0]},
]


@pytest.mark.parametrize("argument", ARGUMENTS, ids=repr)
def test_argument_survives_the_round_trip(argument: object):
    builder = GraphBuilder("g")
    result = builder.call(torch.add, argument, result=VECTOR, key=[argument])
    graph = builder.finish([result, argument])
    assert equivalent(parse(show(graph)), graph)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (TensorSpec((), torch.bool), "bool[]"),
        (TensorSpec((8, None), torch.bfloat16), "bf16[8,?]"),
        (TensorSpec((8, 2), torch.float32, torch.device("cuda:0"), True), "f32[8,2]@cuda:0!"),
        (TensorSpec((2, 3), torch.int64, stride=(1, 2)), "i64[2,3]{1,2}"),
        (TensorSpec((2, 3), torch.int64, stride=(3, 1)), "i64[2,3]"),
        (TensorSpec((4,), torch.float8_e4m3fn), "float8_e4m3fn[4]"),
        (TensorSpec.of(torch.zeros(4, 2, dtype=torch.complex64).t()), "c64[2,4]{1,2}"),
        (TensorSpec.of(torch.zeros(3, requires_grad=True).expand(2, 3)), "f32[2,3]{0,1}!"),
    ],
)
def test_spec_prints_and_reads(spec: TensorSpec, text: str):
    assert str(spec) == text
    assert parse_spec(text) == spec


def test_modes_and_origin_survive_the_round_trip():
    builder = GraphBuilder("g")
    ambient = Ambient(False, True, (("cpu", torch.bfloat16), ("cuda", torch.float16)), autocast_cache=False)
    origin = Origin("/a b/train.py", 12, "<lambda>")
    builder.call(torch.rand, 3, result=VECTOR, ambient=ambient, origin=origin)
    graph = builder.finish([])
    assert "{no_grad inference autocast:cpu=bf16 autocast:cuda=f16 no_autocast_cache}" in show(graph)
    node = parse(show(graph)).nodes[0]
    assert (node.ambient, node.origin, str(node.origin)) == (ambient, origin, "/a b/train.py:12")


def test_constant_prints_for_people_and_is_refused_by_parse():
    builder = GraphBuilder("g")
    builder.call(torch.add, Constant(torch.zeros(2)), Constant(textwrap), result=VECTOR)
    text = show(builder.finish([]))
    assert "<Tensor f32[2]>" in text
    with pytest.raises(GraphSyntaxError, match=r"line 2: expected an argument \(an object shown as"):
        parse(text)


def test_callable_without_a_name_prints_for_people_and_is_refused_by_parse():
    builder = GraphBuilder("g")
    builder.call(lambda: None)
    text = show(builder.finish([]))
    assert "<lambda>" in text
    with pytest.raises(GraphSyntaxError, match="no name by which it can be found again"):
        parse(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%0: f32[2 = call torch.neg(%x)", "expected a spec like"),
        ("%0: f99[2] = call torch.neg(%x)", "expected a spec like"),
        ("%0: f32[2] = call torch.nothing(%x)", "expected a known callable, got 'torch.nothing'"),
        ("%0: f32[2] = frobnicate(%x)", "expected one of the ops"),
        ("%0: f32[2] = call torch.neg(%y)", "%y is not defined before its use"),
        ("%0: f32[2] = call torch.neg(%x) {strange}", "expected a mode, got 'strange'"),
        ("%0: f32[2] = call torch.neg(%x) trailing", "expected the end of the line"),
        ("%0: f32[2] = call torch.neg(word)", "expected an argument, got 'word'"),
        ("fetch(%x)  # nowhere", "expected an origin"),
    ],
)
def test_syntax_error_names_the_line(line: str, message: str):
    with pytest.raises(GraphSyntaxError, match=r"line 2: ") as caught:
        parse(f"graph g(%x: f32[2]):\n  {line}\n  return %x\n")
    assert message in str(caught.value)


def test_body_without_return_is_a_syntax_error():
    with pytest.raises(GraphSyntaxError, match="expected return of g, got the end of the text"):
        parse("graph g(%x: f32[2]):\n  fetch(%x)\n")


def test_parse_verifies():
    with pytest.raises(MalformedGraphError, match="expected a SubGraph of the table"):
        parse("graph g(%x: f32[2]):\n  %0: f32[2] = invoke f(%x)\n  return %0\n")


SMALL = "graph g(%x: f32[3]):\n  %y: f32[3] = call torch.add(%x, 1)  # a.py:1\n  return %y\n"


def test_names_of_values_do_not_matter_for_equivalence():
    assert equivalent(parse(SMALL), parse(SMALL.replace("%y", "%z")))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.add", "torch.sub"),
        ("(%x, 1)", "(%x, 1.0)"),
        ("(%x, 1)", "(%x, True)"),
        ("(%x, 1)", "(%x, other=1)"),
        ("%y: f32[3]", "%y: f32[3]!"),
        ("# a.py:1", "# a.py:2"),
        ("  # a.py:1", " {no_grad}  # a.py:1"),
        ("return %y", "return %x"),
        ("return %y", "return (%y,)"),
        ("graph g", "graph h"),
    ],
)
def test_anything_else_matters_for_equivalence(old: str, new: str):
    assert not equivalent(parse(SMALL), parse(SMALL.replace(old, new)))
