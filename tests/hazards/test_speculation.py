"""Calls that run without their Python: each kind of assumption is broken, and nobody can tell from eager."""

import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import twofold
from tests.hazards.programs import Parts, runs_as_graph, same, summary, training
from twofold.convert.speculation import schedule
from twofold.run.builder import Builder
from twofold.run.graph_runner import GraphRunner
from twofold.run.speculation import cache

Step = Callable[..., Any]


def speculates(factory: Any, steps: int = 20, at_least: int = 8, **options: Any) -> dict[str, Any]:
    """As eager, and at least so many calls ran without their Python."""
    report = same(factory, steps, engine="speculation", **options)
    assert report["speculated_iterations"] >= at_least, {**summary(report), "refusals": report["refusals"]}
    return report


def failed(report: dict[str, Any]) -> dict[str, int]:
    """The kinds of assumptions that failed, and how often."""
    kinds: dict[str, int] = {}
    for entry in report["assumptions"]:
        if entry["failed"] and entry["subject"] != "number":  # the harness hands it in
            kinds[entry["kind"]] = kinds.get(entry["kind"], 0) + entry["failed"]
    return kinds


def run_often(function: Step, x: torch.Tensor) -> None:
    for _ in range(12):
        function(x)


def plain(parts: Parts) -> Step:
    return lambda number, x, y: parts.train(x, y)


def test_steady_state_runs_no_python() -> None:
    ran: list[int] = []

    def make(parts: Parts) -> Step:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train(x, y)

        return step

    report = speculates(training(make), 20, at_least=12)
    assert report["engine"] == "speculation"
    assert report["discards"] == 0
    assert not ran


# ---- one test for each kind of assumption ----------------------------------------------------------------


def test_value_that_changes_is_read_anew_from_then_on() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["scale"] = 1.0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            parts.seen["last"] = parts.seen["scale"] * 3
            return loss

        return step

    def between(number: int, parts: Parts) -> None:
        if number >= 10:
            parts.seen["scale"] = 1.0 / number

    report = speculates(training(make, between=between), 24, at_least=16)
    assert failed(report) == {"value": 1}
    assert all(entry["relaxed"] for entry in report["assumptions"] if entry["failed"])


def test_type_that_changes() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["scale"] = 1

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            parts.seen["last"] = parts.seen["scale"] * 3
            return loss

        return step

    def between(number: int, parts: Parts) -> None:
        parts.seen["scale"] = number * (1 if number < 12 else 0.5)

    report = speculates(training(make, between=between), 24)
    assert failed(report)["type"] == 1


def test_object_that_is_replaced() -> None:
    def between(number: int, parts: Parts) -> None:
        if number == 10:
            parts.model[1] = nn.ReLU()

    report = speculates(training(plain, between=between), 24)
    assert failed(report).get("identity") or failed(report).get("type") or failed(report).get("value")


def test_parameter_that_is_replaced() -> None:
    def between(number: int, parts: Parts) -> None:
        if number == 10:
            with torch.no_grad():
                parts.model[0].weight = nn.Parameter(parts.model[0].weight * 0.5)
            parts.optimizer.param_groups[0]["params"] = list(parts.model.parameters())

    report = speculates(training(plain, between=between), 28)
    assert failed(report) or report["misses"]


def of_an_object(parts: Parts) -> None:
    parts.seen["worker"].weigh = lambda x: x * 3


def of_the_optimizer(parts: Parts) -> None:
    parts.optimizer.zero_grad = lambda: parts.seen.update(cleared=True)


def of_the_model(parts: Parts) -> None:
    parts.model.parameters = lambda: iter(list(nn.Module.parameters(parts.model))[1:])


@pytest.mark.parametrize("give", [of_an_object, of_the_optimizer, of_the_model])
def test_method_that_an_object_is_given_of_its_own(give: Callable[[Parts], None]) -> None:
    class Worker:
        def weigh(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    def make(parts: Parts) -> Step:
        worker = parts.seen["worker"] = Worker()

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(worker.weigh(x), y)
            return loss, sum(p.detach().sum() for p in parts.model.parameters())

        return step

    def between(number: int, parts: Parts) -> None:
        if number == 14:
            give(parts)

    report = speculates(training(make, between=between), 24)
    assert failed(report) == {"identity": 1}


def trains_again(layers: Any) -> None:
    layers.train()


def is_watched(layers: Any) -> None:
    layers.layers[1].register_forward_hook(lambda module, given, made: made * 2)


def requires_gradients(layers: Any) -> None:
    layers.requires_grad_(True)


@pytest.mark.parametrize("disturb", [None, trains_again, is_watched, requires_gradients])
def test_fused_layers_of_a_transformer(disturb: Callable[[Any], None] | None) -> None:
    """In evaluation they ask whether somebody hears their calls, which nobody does in a call without its Python."""

    def make(parts: Parts) -> Step:
        layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 2).eval()
        layers.requires_grad_(False)
        parts.seen["layers"] = [layers]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train(layers(x.unsqueeze(0))[0], y)

        return step

    def between(number: int, parts: Parts) -> None:
        if number == 14 and disturb is not None:
            disturb(parts.seen["layers"][0])

    speculates(training(make, between=between), 28, at_least=20 if disturb is None else 8)


def test_list_that_grows() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["weights"] = [1.0, 2.0]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            parts.seen["total"] = 0.0
            for weight in parts.seen["weights"]:
                parts.seen["total"] += weight
            return loss

        return step

    def between(number: int, parts: Parts) -> None:
        if number == 10:
            parts.seen["weights"].append(0.5)

    report = speculates(training(make, between=between), 24)
    assert failed(report).get("length") == 1


def test_branch_on_python_state_that_goes_the_other_way() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["calls"] = 0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["calls"] += 1
            if parts.seen["calls"] % 5 == 0:
                x = x * 2
            return parts.train(x, y)

        return step

    speculates(training(make), 40, at_least=15)


def test_batch_of_another_size() -> None:
    report = speculates(training(plain, sizes=lambda number: 6 if number % 10 else 3), 40, at_least=15)
    assert report["misses"]


@pytest.mark.parametrize("where", ["before backward", "before the step", "after the step"])
@pytest.mark.parametrize("at", [9, 10, 15])
def test_branch_on_a_tensor_that_goes_the_other_way(where: str, at: int) -> None:
    """Work has been launched by then: all of it is undone, and the call runs again from its start."""

    def make(parts: Parts) -> Step:
        parts.seen["high"] = 0
        parts.seen["calls"] = 0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["calls"] += 1
            parts.optimizer.zero_grad()
            noise = torch.rand_like(x) * 0.01
            loss = F.mse_loss(parts.model(x + noise), y)
            if where == "before backward" and loss.item() > 50:
                parts.seen["high"] += 1
            loss.backward()
            if where == "before the step" and loss.item() > 50:
                parts.seen["high"] += 1
            parts.optimizer.step()
            if where == "after the step" and loss.item() > 50:
                parts.seen["high"] += 1
            print("loss", round(loss.item(), 3))
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        parts.model[2].bias.data.fill_(40.0 if number == at else 0.0)

    report = same(training(make, between=between), 24, engine="speculation")
    if where != "after the step":
        assert report["speculated_iterations"] >= 8, {**summary(report), "refusals": report["refusals"]}
        assert report["discards"] >= 1
        assert failed(report)["branch"] >= 1


def decided_by_a_tensor(calls: int, is_high: Callable[[int], bool]) -> dict[str, Any]:
    """Train with a decision on a fetched value before the step, which is high in some calls."""

    def make(parts: Parts) -> Step:
        parts.seen["high"] = 0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x + torch.rand_like(x) * 0.01, y)
            if parts.model[2].bias.mean().item() > 20:
                parts.seen["high"] += 1
                loss = loss * 1e-3
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        parts.model[2].bias.data.fill_(40.0 if is_high(number) else 0.0)

    return same(training(make, between=between), calls, engine="speculation")


def test_branch_on_a_tensor_that_goes_either_way_in_runs_has_a_graph_for_each() -> None:
    """What was fetched before the work was undone says which way the conversion has to go."""
    report = decided_by_a_tensor(100, lambda number: number // 10 % 2 == 1)
    assert report["speculated_iterations"] >= 75, {**summary(report), "refusals": report["refusals"]}
    assert 9 <= report["discards"] <= 13
    assert report["engine"] == "speculation"


def test_branch_on_a_tensor_that_goes_another_way_now_and_then_is_launched_twice_only_then() -> None:
    """The way of the call before was tried first, which was wrong twice: in that call, and in the next."""
    report = decided_by_a_tensor(120, lambda number: number % 8 == 7)
    assert report["speculated_iterations"] >= 95, {**summary(report), "refusals": report["refusals"]}
    assert report["discards"] <= 20
    assert report["engine"] == "speculation"


def test_branch_on_a_tensor_that_goes_another_way_in_most_calls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way has a graph, but nearly all calls are launched twice. What was kept is slower without."""
    judged: list[int] = []
    monkeypatch.setattr(Builder, "judge_again", lambda self: judged.append(self.account.iterations))
    report = decided_by_a_tensor(90, lambda number: number % 4 > 1)
    assert len(judged) == 1
    assert "assumption_failed" in {entry["code"] for entry in report["fallbacks"]}
    assert report["engine"] == "coexecution"


def test_a_rare_way_that_is_not_converted_leaves_the_common_one_speculated() -> None:
    """What it does is refused, each time that it comes; so often in a row, a function was given up as a whole."""

    def make(parts: Parts) -> Step:
        parts.seen["states"] = 0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            if parts.model[2].bias.mean().item() > 20:
                parts.seen["states"] += len(random.getstate())
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        parts.model[2].bias.data.fill_(40.0 if number % 25 == 20 else 0.0)

    report = same(training(make, between=between), 160, engine="speculation")
    assert {refusal["code"] for refusal in report["refusals"]} >= {"foreign_function"}
    assert report["engine"] == "speculation"
    assert report["speculated_iterations"] >= 120, {**summary(report), "refusals": report["refusals"]}


def test_a_value_that_is_other_each_time_is_given_up_or_read() -> None:
    def make(parts: Parts) -> Step:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            parts.seen["tag"] = parts.seen["kind"]
            return loss

        return step

    def between(number: int, parts: Parts) -> None:
        parts.seen["kind"] = [number, str(number), float(number), None, (number,)][number % 5]

    same(training(make, between=between), 70, engine="speculation")


# ---- state around the call -------------------------------------------------------------------------------


def test_optimizer_is_set_otherwise_between_calls() -> None:
    def between(number: int, parts: Parts) -> None:
        if number in (8, 14):
            parts.optimizer.param_groups[0]["weight_decay"] = 0.01 * number
        if number == 11:
            parts.optimizer.param_groups[0]["lr"] = 0.01

    speculates(training(plain, between=between), 30, at_least=6)


def test_learning_rate_of_every_step() -> None:
    def between(number: int, parts: Parts) -> None:
        parts.optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)

    speculates(training(plain, between=between), 20, numerics="fused")


def test_hooks_and_frozen_parameters() -> None:
    seen: list[Any] = []

    def between(number: int, parts: Parts) -> None:
        if number == 8:
            parts.seen["handle"] = None
            between.handle = parts.model[1].register_forward_hook(lambda *_: seen.append(1))  # type: ignore[attr-defined]
        if number == 10:
            between.handle.remove()  # type: ignore[attr-defined]
        if number == 13:
            parts.model[0].weight.requires_grad_(False)
        if number == 17:
            parts.model[0].weight.requires_grad_(True)
        if number == 22:
            parts.model[0].bias.register_hook(lambda gradient: gradient * 2)

    same(training(plain, between=between), 28, engine="speculation")
    assert len(seen) == 4  # two calls, in eager and here


def test_autocast_and_modes_around_the_call() -> None:
    def factory() -> Any:
        program = training(plain)()
        step = program.step
        count = [0]

        def outer(*arguments: Any) -> Any:
            return step(*arguments)

        program.step = outer
        count[0] += 1
        return program

    speculates(factory)

    model = nn.Linear(4, 4)
    function = twofold.function(lambda x: model(x), engine="speculation", backend="replay", numerics="exact")
    x = torch.randn(3, 4)
    with torch.no_grad():
        for _ in range(10):
            expected = model(x)
            assert torch.equal(function(x), expected)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            for _ in range(6):
                assert function(x).dtype == torch.bfloat16
        assert torch.equal(function(x), model(x))
    assert function(x).requires_grad


def test_exception_of_the_program_leaves_at_its_own_line() -> None:
    def make(parts: Parts) -> Step:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            parts.seen["share"] = 1 / parts.seen["count"]
            return loss

        return step

    def between(number: int, parts: Parts) -> None:
        parts.seen["count"] = 0 if number == 12 else number + 1

    speculates(training(make, between=between), 24)


def test_forward_whose_backward_is_outside() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    forward = twofold.function(ours, engine="speculation", backend="replay", numerics="exact", background=False)
    kept = []
    for number in range(16):
        x = torch.randn(5, 4)
        for model, call in ((ours, forward), (theirs, theirs)):
            model.zero_grad()
            output = call(x)
            output.square().sum().backward()
            kept.append(output)
        assert torch.equal(kept[-1], kept[-2])
        assert torch.equal(ours.weight.grad, theirs.weight.grad), number
    assert twofold.report(forward).to_dict()["speculated_iterations"] >= 4


def test_outputs_are_fresh_objects() -> None:
    model = nn.Linear(4, 3)
    function = twofold.function(lambda x: model(x).detach(), engine="speculation", backend="replay")
    inputs = [torch.randn(5, 4) for _ in range(12)]
    outputs = [function(x) for x in inputs]
    assert twofold.report(function).to_dict()["speculated_iterations"] >= 4
    assert len({output.data_ptr() for output in outputs}) == len(outputs)
    assert all(torch.equal(output, model(x)) for x, output in zip(inputs, outputs, strict=True))


def test_nothing_grows() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    function = twofold.function(step, engine="speculation", backend="replay")
    x = torch.zeros(1, 2)
    for _ in range(200):
        function(x)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(10_000):
        function(x)
    gc.collect()
    report = twofold.report(function).to_dict()
    assert report["speculated_iterations"] > 10_000
    del report
    # The report's spans are kept up to a bound, each one object.
    assert len(gc.get_objects()) - before < 22_000
    tensors = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
    function(x)
    assert sum(isinstance(one, torch.Tensor) for one in gc.get_objects()) <= tensors + 1


def test_threads_take_turns_or_run_eagerly() -> None:
    model = nn.Linear(4, 3)
    function = twofold.function(lambda x: model(x).detach(), engine="speculation", backend="replay")
    wrong: list[int] = []

    def work() -> None:
        for _ in range(100):
            x = torch.randn(5, 4)
            if not torch.equal(function(x), model(x).detach()):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_method_of_a_class_is_speculated_on_for_each_instance() -> None:
    class Model:
        def __init__(self, scale: float) -> None:
            self.layer = nn.Linear(4, 3)
            self.scale = scale

        @twofold.function(engine="speculation", backend="replay", numerics="exact")
        def run(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).detach() * self.scale

    models = [Model(1.0), Model(2.0)]
    for number in range(12):
        x = torch.randn(5, 4)
        for model in models:
            assert torch.equal(model.run(x), model.layer(x).detach() * model.scale), number
    assert all(twofold.report(model.run).to_dict()["speculated_iterations"] for model in models)


# ---- the oracle sees planted faults ----------------------------------------------------------------------


def counting(parts: Parts) -> Step:
    parts.seen["calls"] = 0
    parts.seen["flag"] = False

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        parts.optimizer.zero_grad()
        loss = parts.loss(x, y)
        parts.seen["calls"] += 1
        print("call", parts.seen["calls"])
        if loss.item() > 50:
            x = x * 2
        if parts.seen["flag"]:
            loss = loss * 2
        loss.backward()
        parts.optimizer.step()
        return loss.detach()

    return step


def disturbed(number: int, parts: Parts) -> None:
    parts.model[2].bias.data.fill_(40.0 if number in (12, 13) else 0.0)
    parts.seen["flag"] = number >= 16


def test_program_of_the_planted_faults_is_as_eager() -> None:
    speculates(training(counting, between=disturbed), 24, at_least=4)


@pytest.fixture(params=["a check is left out", "an effect comes early", "nothing is undone", "writes are lost"])
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    whole = schedule.schedule

    def without(condition: Callable[[Any], bool]) -> Callable[..., Any]:
        def scheduled(graph: Any, in_place: Any = ()) -> Any:
            made = whole(graph, in_place)
            nodes = tuple(node for node in made.nodes if not condition(node))
            return type(made)(made.name, made.inputs, nodes, made.outputs)

        return scheduled

    def early(graph: Any, in_place: Any = ()) -> Any:
        made = whole(graph, in_place)
        prints = [node for node in made.nodes if node.target is print]
        needed = {value for node in prints for value in node.operands}
        moved = [n for n in made.nodes if n.target is print or not needed.isdisjoint(n.results)]
        reads = {value for node in moved for value in node.operands}
        first = [n for n in made.nodes if not reads.isdisjoint(n.results) and n not in moved]
        rest = [node for node in made.nodes if node not in moved and node not in first]
        return type(made)(made.name, made.inputs, (*first, *moved, *rest), made.outputs)

    if request.param == "a check is left out":
        monkeypatch.setattr(cache, "schedule", without(lambda node: node.op == "assert"))
    elif request.param == "writes are lost":
        monkeypatch.setattr(cache, "schedule", without(lambda node: node.op in ("set_attr", "set_item")))
    elif request.param == "an effect comes early":
        monkeypatch.setattr(cache, "schedule", early)
    else:
        monkeypatch.setattr(GraphRunner, "discard", lambda self: None)
    return request.param


def test_oracle_sees_a_planted_fault(fault: str) -> None:
    def make(parts: Parts) -> Step:
        """A dropout ahead of the decision: what is not undone shows in the random stream."""
        inner = counting(parts)
        return lambda number, x, y: inner(number, F.dropout(x, 0.1), y)

    with pytest.raises(AssertionError, match="differences from eager"):
        same(training(make, between=disturbed), 24, engine="speculation")


def test_named_engine_coexecution_never_speculates() -> None:
    report = runs_as_graph(training(plain), 16, engine="coexecution")
    assert report["speculated_iterations"] == 0


def test_strict_refusal_is_structured() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        yielded = sum(item for item in (lambda: (yield 1))())
        return x * yielded

    function = twofold.function(step, engine="speculation", strict=True, backend="replay")
    x = torch.randn(3)
    with pytest.raises(twofold.NotConvertibleError) as caught:
        run_often(function, x)
    assert caught.value.refusal is not None
