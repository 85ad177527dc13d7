"""Host graphs in program order, and the order in which a call does their nodes: text in, text out."""

import textwrap

import pytest

from twofold.convert.speculation.schedule import Unschedulable, schedule
from twofold.graph import parse, show

UNIT = "twofold.convert.speculation.speculation"
HEAD = "graph step(%unit: object, %arguments: object, %keywords: object, %self: object):"


def graph_text(body: str) -> str:
    """Write a host graph: `give(`, `read(` and their like stand for the calls on the unit."""
    lines = [HEAD, *textwrap.indent(textwrap.dedent(body).strip(), "  ").splitlines()]
    text = "\n".join(lines)
    for name in ("draw", "give", "read", "step", "tensor", "launch", "commit"):
        text = text.replace(f"call {name}(", f"call {UNIT}:{name}(")
    return text + "\n"


def scheduled(body: str, in_place: tuple[int, ...] = ()) -> str:
    return show(schedule(parse(graph_text(body)), in_place)).strip()


def as_given(body: str) -> str:
    return show(parse(graph_text(body))).strip()


def test_checks_and_feeds_come_first_and_effects_last() -> None:
    before = """
        %count: object = get_attr(%self, "count")
        %more: object = call operator.add(%count, 1)
        set_attr(%self, "count", %more)
        call builtins:print("step", %more)
        %training: object = get_attr(%self, "training")
        %same: object = call operator.is_(%training, True)
        assert(%same, message="0")
        %x: object = get_item(%arguments, 0)
        call give(%unit, 0, %x)
        %loss: object = call tensor(%unit, 3)
        return %loss
    """
    after = """
        %count: object = get_attr(%self, "count")
        %training: object = get_attr(%self, "training")
        %same: object = call operator.is_(%training, True)
        assert(%same, message="0")
        %x: object = get_item(%arguments, 0)
        call give(%unit, 0, %x)
        call launch(%unit, False)
        %loss: object = call tensor(%unit, 3)
        call commit(%unit)
        %more: object = call operator.add(%count, 1)
        set_attr(%self, "count", %more)
        call builtins:print("step", %more)
        return %loss
    """
    assert scheduled(before) == as_given(after)


def test_a_fetched_value_that_decides_is_read_on_the_way_and_others_at_the_end() -> None:
    before = """
        %norm: object = call read(%unit, 2, "item")
        call builtins:print(%norm)
        %loss: object = call read(%unit, 5, "item")
        %high: object = call operator.gt(%loss, 3)
        %not: object = call operator.not_(%high)
        assert(%not, message="0")
        return %norm
    """
    after = """
        %loss: object = call read(%unit, 5, "item")
        %high: object = call operator.gt(%loss, 3)
        %not: object = call operator.not_(%high)
        assert(%not, message="0")
        call launch(%unit, False)
        call commit(%unit)
        %norm: object = call read(%unit, 2, "item")
        call builtins:print(%norm)
        return %norm
    """
    assert scheduled(before) == as_given(after)


def test_a_read_of_memory_that_is_written_later_does_not_wait() -> None:
    before = """
        %norm: object = call read(%unit, 2, "item")
        return %norm
    """
    after = """
        %norm: object = call read(%unit, 2, "item")
        call launch(%unit, False)
        call commit(%unit)
        return %norm
    """
    assert scheduled(before, in_place=(2,)) == as_given(after)


def test_draws_keep_their_order_and_come_before_effects() -> None:
    """The second waits for a fetch, and so does the third behind it; that makes the last segment undoable."""
    before = """
        %rng: object = get_attr(%self, "rng")
        %first: object = call draw(%unit, 0, %rng, "random")
        set_attr(%self, "first", %first)
        %loss: object = call tensor(%unit, 3)
        %number: object = call builtins:float(%loss)
        %second: object = call draw(%unit, 1, %rng, "uniform", 0, %number)
        %third: object = call draw(%unit, 2, %rng, "random")
        return %third
    """
    after = """
        %rng: object = get_attr(%self, "rng")
        %first: object = call draw(%unit, 0, %rng, "random")
        call launch(%unit, True)
        %loss: object = call tensor(%unit, 3)
        %number: object = call builtins:float(%loss)
        %second: object = call draw(%unit, 1, %rng, "uniform", 0, %number)
        %third: object = call draw(%unit, 2, %rng, "random")
        call commit(%unit)
        set_attr(%self, "first", %first)
        return %third
    """
    assert scheduled(before) == as_given(after)


def test_a_draw_that_needs_what_an_effect_returns_is_refused() -> None:
    body = """
        %count: object = call torch.ops.aten.add_.Tensor(%self, 1)
        %drawn: object = call draw(%unit, 0, %self, "randrange", %count)
        return %drawn
    """
    with pytest.raises(Unschedulable, match="effect"):
        scheduled(body)


def test_checks_that_need_no_fetch_come_before_every_launch() -> None:
    before = """
        %norm: object = call read(%unit, 2, "item")
        %factor: object = call operator.mul(%norm, 2)
        call give(%unit, 1, %factor)
        %flag: object = get_attr(%self, "flag")
        assert(%flag, message="0")
        return None
    """
    after = """
        %flag: object = get_attr(%self, "flag")
        assert(%flag, message="0")
        %norm: object = call read(%unit, 2, "item")
        %factor: object = call operator.mul(%norm, 2)
        call give(%unit, 1, %factor)
        call launch(%unit, False)
        call commit(%unit)
        return None
    """
    assert scheduled(before) == as_given(after)


def test_what_may_raise_is_done_while_the_call_can_still_be_given_back() -> None:
    before = """
        %norm: object = call read(%unit, 2, "item")
        %share: object = call operator.truediv(1, %norm)
        %half: object = call operator.truediv(%norm, 2)
        call builtins:print(%share, %half)
        return None
    """
    after = """
        %norm: object = call read(%unit, 2, "item")
        %share: object = call operator.truediv(1, %norm)
        call launch(%unit, False)
        call commit(%unit)
        %half: object = call operator.truediv(%norm, 2)
        call builtins:print(%share, %half)
        return None
    """
    assert scheduled(before) == as_given(after)


def test_what_may_raise_does_not_pass_an_effect_that_it_may_notice() -> None:
    before = """
        %log: object = get_attr(%self, "log")
        call builtins:setattr(%log, "x", 1)
        %mean: object = call statistics:mean(%log)
        set_attr(%self, "mean", %mean)
        return None
    """
    after = """
        %log: object = get_attr(%self, "log")
        call launch(%unit, False)
        call commit(%unit)
        call builtins:setattr(%log, "x", 1)
        %mean: object = call statistics:mean(%log)
        set_attr(%self, "mean", %mean)
        return None
    """
    assert scheduled(before) == as_given(after)


def test_a_check_of_what_an_effect_has_changed_is_refused() -> None:
    with pytest.raises(Unschedulable, match="has changed"):
        scheduled(
            """
            %log: object = get_attr(%self, "log")
            call builtins:setattr(%log, "x", 1)
            %length: object = call builtins:len(%log)
            %same: object = call operator.eq(%length, 3)
            assert(%same, message="0")
            return None
            """
        )


def test_a_check_of_another_attribute_than_was_written_is_not() -> None:
    text = scheduled(
        """
        set_attr(%self, "count", 3)
        %flag: object = get_attr(%self, "flag")
        assert(%flag, message="0")
        return None
        """
    )
    assert text.index("assert") < text.index("set_attr")


def test_a_check_that_needs_what_the_unit_hands_out_can_undo_all_of_it() -> None:
    before = """
        %loss: object = call tensor(%unit, 3)
        %number: object = call torch.Tensor.item(%loss)
        %low: object = call operator.lt(%number, 3)
        assert(%low, message="0")
        call builtins:print(%number)
        return %loss
    """
    after = """
        call launch(%unit, True)
        %loss: object = call tensor(%unit, 3)
        %number: object = call torch.Tensor.item(%loss)
        %low: object = call operator.lt(%number, 3)
        assert(%low, message="0")
        call commit(%unit)
        call builtins:print(%number)
        return %loss
    """
    assert scheduled(before) == as_given(after)


def test_tensor_work_cannot_need_what_the_unit_hands_out() -> None:
    with pytest.raises(Unschedulable, match="hands out"):
        scheduled(
            """
            %loss: object = call tensor(%unit, 3)
            call give(%unit, 0, %loss)
            return None
            """
        )


def test_an_optimizer_that_steps_by_itself_keeps_its_place_among_fetches() -> None:
    before = """
        call step(%unit, 4)
        call builtins:print("stepped")
        %loss: object = call read(%unit, 5, "item")
        %low: object = call operator.lt(%loss, 3)
        assert(%low, message="0")
        return None
    """
    after = """
        call step(%unit, 4)
        %loss: object = call read(%unit, 5, "item")
        %low: object = call operator.lt(%loss, 3)
        assert(%low, message="0")
        call launch(%unit, False)
        call commit(%unit)
        call builtins:print("stepped")
        return None
    """
    assert scheduled(before) == as_given(after)
