"""Optimizer steps as graph nodes.

A recorded `step` can be replayed as it is only if nothing in it is computed by Python from a counter. Where it
cannot, or where fused numerics are allowed, SGD, Adam and AdamW become one fused kernel call over all parameters of
a group, with the learning rate as an input of the graph, so that a schedule needs no new graph. All others step
by themselves after the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from twofold.graph import Value

aten: Any = torch.ops.aten

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Setting:
    """A hyper-parameter that the graph reads at launch: `optimizer.param_groups[group][key]`."""

    optimizer: Optimizer
    group: int
    key: str

    def read(self) -> Any:
        """Return the value of now."""
        return self.optimizer.param_groups[self.group][self.key]


def hyper_parameters(optimizer: Optimizer, free: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return what the groups of an optimizer are set to, less the keys in `free` and the parameters."""
    skipped = {"params", "initial_lr", "params_names", *free}
    return [{key: value for key, value in group.items() if key not in skipped} for group in optimizer.param_groups]


def replays_exactly(optimizer: Optimizer) -> bool:
    """Whether the operations of one `step` are those of the next, numbers included."""
    kind = type(optimizer)
    if any(isinstance(value, torch.Tensor) for group in optimizer.param_groups for value in group.values()):
        return False  # a learning rate in a tensor may be read by Python
    if kind is torch.optim.SGD:
        return True
    return kind in (torch.optim.Adam, torch.optim.AdamW) and all(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )


def lower_step(
    optimizer: Optimizer,
    gradients: dict[int, Value],
    static: Callable[[torch.Tensor], Value],
    setting: Callable[[Setting], Value],
) -> list[Call] | None:
    """Write one `step` as fused kernel calls; None if this optimizer, so set, has no such form.

    `gradients` maps `id(parameter)` to its gradient; parameters without one are left alone, as in eager.
    """
    rule = _RULES.get(type(optimizer))
    if rule is None or getattr(optimizer, "grad_scale", None) is not None:
        return None
    calls: list[Call] = []
    for index, group in enumerate(optimizer.param_groups):
        parameters = [p for p in group["params"] if id(p) in gradients]
        if not parameters:
            continue
        states = [optimizer.state.get(p, {}) for p in parameters]  # reading a missing key would make it
        if not _is_plain(group, parameters) or any(not _has_state(group, state, type(optimizer)) for state in states):
            return None
        rate = setting(Setting(optimizer, index, "lr"))
        lists = [static(p) for p in parameters], [gradients[id(p)] for p in parameters]
        calls += rule(group, states, lists, static, rate)
    return calls


def _is_plain(group: dict[str, Any], parameters: list[torch.Tensor]) -> bool:
    first = parameters[0]
    return (
        not group.get("differentiable")
        and isinstance(group["lr"], float | int)
        and all(p.dtype == first.dtype and p.device == first.device for p in parameters)
        and first.dtype.is_floating_point
    )


def _has_state(group: dict[str, Any], state: dict[str, Any], kind: type) -> bool:
    if kind is torch.optim.SGD:
        return not group["momentum"] or state.get("momentum_buffer") is not None
    step = state.get("step")
    if not isinstance(step, torch.Tensor) or "exp_avg" not in state:
        return False
    return step.device == state["exp_avg"].device


Lists = tuple[list[Value], list[Value]]
Static = Callable[[torch.Tensor], Value]


def _lower_sgd(group: Any, states: Any, lists: Lists, static: Static, rate: Value) -> list[Call]:
    buffers = [static(state["momentum_buffer"]) for state in states] if group["momentum"] else []
    keywords = {
        "weight_decay": float(group["weight_decay"]),
        "momentum": float(group["momentum"]),
        "lr": rate,
        "dampening": float(group["dampening"]),
        "nesterov": bool(group["nesterov"]),
        "maximize": bool(group["maximize"]),
        "is_first_step": False,
    }
    return [(torch._fused_sgd_, (*lists, buffers), keywords)]


def _lower_adam(group: Any, states: Any, lists: Lists, static: Static, rate: Value) -> list[Call]:
    steps = [static(state["step"]) for state in states]
    maxima = [static(state["max_exp_avg_sq"]) for state in states] if group["amsgrad"] else []
    keywords = {
        "lr": rate,
        "beta1": float(group["betas"][0]),
        "beta2": float(group["betas"][1]),
        "weight_decay": float(group["weight_decay"]),
        "eps": float(group["eps"]),
        "amsgrad": bool(group["amsgrad"]),
        "maximize": bool(group["maximize"]),
    }
    moments = ([static(state["exp_avg"]) for state in states], [static(state["exp_avg_sq"]) for state in states])
    kernel = torch._fused_adamw_ if group.get("decoupled_weight_decay") else torch._fused_adam_
    return [
        (aten._foreach_add_.Scalar, (steps, 1), {}),
        (kernel, (*lists, *moments, maxima, steps), keywords),
    ]


_RULES: dict[type, Callable[..., list[Call]]] = {
    torch.optim.SGD: _lower_sgd,
    torch.optim.Adam: _lower_adam,
    torch.optim.AdamW: _lower_adam,
}
