"""Which gradients from before a unit matter to it, and at which of its events.

What a unit does depends on whether a leaf has a gradient when it begins: a backward adds to one or makes one, an
optimizer leaves a parameter without one alone. But most units drop gradients before anything looks at them, and then
what the unit before has left is nothing to them. So each event of a trace says which leaves it is the first to look at,
and the check of that event compares their gradients with those of the trace: until a unit is committed, `.grad` is
what it was when the unit began.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable

import torch

from .trace import External, Gradient, Leaf, Presence

DROPS = frozenset({torch.Tensor.grad.__set__, torch.Tensor.grad.__delete__})  # type: ignore[attr-defined]
"""Functions that put something else, or nothing, in the place of the gradient of their first argument."""

READS = frozenset({torch.Tensor.grad.__get__, torch.Tensor.__deepcopy__})  # type: ignore[attr-defined]
"""Functions whose result depends on the gradient of their first argument, backwards and optimizers left out."""

COPIES = frozenset({torch.Tensor.__deepcopy__})
"""Those of them that Python runs on the leaf itself, whose gradient is that from before the unit as long as it runs."""

_grad = operator.attrgetter("grad")


def presence_holds(leaves: tuple[torch.Tensor, ...], present: tuple[bool, ...]) -> bool:
    """Whether just those of `leaves` have a gradient now that had one then."""
    return tuple(map(operator.is_not, map(_grad, leaves), itertools.repeat(None))) == present


def has_hooks(leaf: torch.Tensor) -> bool:
    """Whether Python runs where a gradient of a leaf is made."""
    return bool(leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None))


class EntryGradients:
    """The gradients that leaves have before a unit that is recorded. Mutable; `plans` ends its life."""

    def __init__(
        self,
        refuse: Callable[[str, str], None],
        lasting: dict[int, tuple[torch.Tensor, bool]],
        external: Callable[[torch.Tensor], int | None],
    ) -> None:
        """Start with no leaf known. `lasting`: see `Trace`. `external` gives the index of what the unit was given."""
        self._refuse = refuse
        self._lasting = lasting
        self._external = external
        self._leaves: dict[int, torch.Tensor] = {}
        self._before: dict[int, torch.Tensor | None] = {}
        self._looked_at: dict[int, bool] = {}
        """Leaves whose gradient the unit has looked at, or replaced before anything did (False)."""
        self._first_looks: list[tuple[Leaf, bool]] = []

    def note(self, tensors: Iterable[torch.Tensor], are_owned: bool = False, are_asked: bool = False) -> None:
        """Take note of the gradients that leaves have before a call uses them for the first time.

        `are_owned`: they belong to an optimizer or a module, which deal with all that they own. `are_asked`: their
        gradients are asked for or set, whether or not they require any.
        """
        for tensor in tensors:
            identity = id(tensor)
            is_lasting = are_owned or isinstance(tensor, torch.nn.Parameter)
            if not tensor.is_leaf or not (tensor.requires_grad or is_lasting or are_asked):
                continue
            if identity not in self._leaves:
                self._leaves[identity] = tensor
                self._before[identity] = tensor.grad
            if is_lasting:
                self._lasting.setdefault(identity, (tensor, tensor.requires_grad))
            if tensor.requires_grad and has_hooks(tensor):
                self._refuse("tensor_hook", "a parameter has a gradient hook")

    def is_of_unit(self, tensor: torch.Tensor) -> bool:
        """Whether the gradient of a leaf may be another than before the unit."""
        return id(tensor) in self._looked_at

    def look_at(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take note that what happens now depends on the gradients of those among `tensors` that were noted."""
        for tensor in tensors:
            identity = id(tensor)
            if identity in self._leaves and identity not in self._looked_at:
                self._looked_at[identity] = True
                self._first_looks.append((self._name(tensor), self._before[identity] is not None))

    def drop(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take note that gradients were replaced by what does not depend on them."""
        for tensor in tensors:
            if id(tensor) in self._leaves:
                self._looked_at.setdefault(id(tensor), False)

    def take_first_looks(self) -> Presence:
        """Return the leaves that were looked at for the first time since this was asked last."""
        presence, self._first_looks = tuple(self._first_looks), []
        return presence

    def _name(self, tensor: torch.Tensor) -> Leaf:
        index = None if isinstance(tensor, torch.nn.Parameter) else self._external(tensor)
        return tensor if index is None else External(index)

    def object_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return a tensor if it was the gradient of a leaf before the unit."""
        return next((gradient for gradient in self._before.values() if gradient is tensor), None)

    def plans(self, number: Callable[[torch.Tensor | None], int | None]) -> list[Gradient]:
        """Return what became of all gradients. `number` gives value numbers, -1 for memory that the unit never saw."""
        if self._first_looks:
            self._refuse("unsupported_call", "a gradient is looked at by what is no event of the unit")
        return [self._plan(leaf, number) for leaf in self._leaves.values()]

    def _plan(self, leaf: torch.Tensor, number: Callable[[torch.Tensor | None], int | None]) -> Gradient:
        before, gradient, name = self._before[id(leaf)], leaf.grad, self._name(leaf)
        was_looked_at = self._looked_at.get(id(leaf))
        if was_looked_at is None:
            if gradient is not before:
                self._refuse("unsupported_call", "a gradient changed although nothing was seen to change it")
            return Gradient(name, None, None, keeps=True)
        exits = number(gradient)
        if exits == -1 and not (was_looked_at and gradient is before):
            self._refuse("unsupported_call", "a gradient came from outside the unit")
        given = None if gradient is None else self._external(gradient)
        if not was_looked_at:
            return Gradient(name, None, exits, False, given)
        entry = number(before)
        # No gradient at both ends is none that is kept: an optimizer that steps outside of the graph is given one.
        return Gradient(name, entry, exits, exits is not None and exits == entry, given)
