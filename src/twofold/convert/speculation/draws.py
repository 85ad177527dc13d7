"""Draws from random generators of Python and NumPy: made for real in each call, and taken back if the call is undone.

A draw is a node of the host graph that asks the unit, which knows whether the call is undone. The dry run draws from
copies of the generators: it sees what the call will draw, and moves no stream.
"""

from __future__ import annotations

import random
from typing import Any, Final

import numpy as np

from .containers import Containers
from .heap import is_value
from .items import NONE, Dynamic, Item, Known, Method, Outside, Place, Sequence
from .library import find_in_class
from .objects import Raised, is_data

_OF_PYTHON = (
    "random uniform triangular randint randrange getrandbits choice choices sample shuffle gauss normalvariate"
    " lognormvariate expovariate betavariate gammavariate paretovariate vonmisesvariate weibullvariate"
)
_OF_NUMPY = (
    "beta binomial chisquare choice dirichlet exponential f gamma geometric gumbel hypergeometric integers laplace"
    " logistic lognormal logseries multinomial multivariate_normal negative_binomial normal pareto permutation permuted"
    " poisson power rand randint randn random random_integers random_sample rayleigh standard_cauchy"
    " standard_exponential standard_gamma standard_normal standard_t tomaxint triangular uniform vonmises wald weibull"
    " zipf"
)
DRAWS: Final[dict[type, frozenset[str]]] = {
    random.Random: frozenset(_OF_PYTHON.split()),
    np.random.RandomState: frozenset(_OF_NUMPY.split()),
    np.random.Generator: frozenset(_OF_NUMPY.split()),
}
"""What may be drawn from a generator of exactly one of these types. All else, `seed` too, is refused."""
_FROM_ITEMS: Final = frozenset({"choice", "choices", "sample", "shuffle"})
"""Methods of `random.Random` that take items of a list: where these are no values, positions are drawn."""


class Draws(Containers):
    """Calls of methods of random generators."""

    _drawn = 0

    def generator_of(self, function: Any) -> Outside | None:
        """Return the generator that a bound method draws from, as those of the modules `random` and `numpy.random`."""
        owner = getattr(function, "__self__", None)
        if type(owner) not in DRAWS:
            return None
        return Outside(owner, self.host.root("generator", owner), Place(type(owner).__name__, id(owner), False))

    def method_of_generator(self, item: Item, name: str) -> Method | None:
        """Return a method to draw by: none of them is written in Python as other methods are."""
        if not isinstance(item, Outside) or type(item.object) not in DRAWS:
            return None
        found = find_in_class(type(item.object), name)
        return None if found is None or not callable(found[1]) else Method(Known(found[1]), item)

    def draw(self, generator: Outside, name: str, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Draw from a generator, anew in each call of the program."""
        kind = type(generator.object)
        if name not in DRAWS[kind] or "out" in keywords:
            raise self.refuse("foreign_function", f"calls {name} of a generator of random numbers")
        if kind is random.Random and name in _FROM_ITEMS and arguments:
            return self._draw_items(generator, name, arguments[0], arguments[1:], keywords)
        return self._draw(generator, name, arguments, keywords)

    def _draw(self, generator: Outside, name: str, arguments: list[Item], keywords: dict[str, Item]) -> Dynamic:
        given = [*arguments, *keywords.values()]
        if not all(map(self._is_data, given)):
            raise self.refuse("unsupported_object", f"{name} draws from objects")
        if self._is_changed(given):
            raise self.refuse("late_decision", "draws by something that the call itself changes in place")
        samples = [self.sample(item) for item in arguments]
        named = {key: self.sample(item) for key, item in keywords.items()}
        drawn = self.dry_run(getattr(self.heap.copy_of(generator.object), name), samples, named)
        sample = samples[0] if name == "shuffle" else drawn
        nested = {key: self.host.nested(item) for key, item in keywords.items()}
        value = self.host.draw(self._drawn, generator.value, name, [self.host.nested(i) for i in arguments], nested)
        self._drawn += 1
        return Dynamic(sample, value)

    def _is_data(self, item: Item) -> bool:
        match item:
            case Known():
                return is_data(item.object) or isinstance(item.object, type | np.dtype)
            case Dynamic():
                return is_data(item.sample)
            case Sequence():
                return all(map(self._is_data, item.items))
            case Outside():
                return is_data(item.object)
            case _:
                return False

    # ---- from lists --------------------------------------------------------------------------------------

    def _draw_items(
        self, generator: Outside, name: str, population: Item, rest: list[Item], keywords: dict[str, Item]
    ) -> Item:
        """Draw items of a list. Which values these are changes freely; which other objects, steers the call."""
        if name == "shuffle":
            if not isinstance(population, Sequence) or population.kind is not list or population.value is not None:
                raise self.refuse("unsupported_object", "shuffles a list that others have")
            population.items[:] = self._items_drawn(generator, name, population, rest, keywords)
            return NONE
        if name != "choice":
            return Sequence(list, self._items_drawn(generator, name, population, rest, keywords))
        if self._is_data(population):
            return self._draw(generator, name, [population, *rest], keywords)
        items = list(self.iterate(population))
        return self._at(items, self._draw(generator, name, [Known(range(len(items))), *rest], keywords))

    def _items_drawn(
        self, generator: Outside, name: str, population: Item, rest: list[Item], keywords: dict[str, Item]
    ) -> list[Item]:
        if self._is_data(population):
            return list(self.iterate(self._draw_list(generator, name, population, rest, keywords)))
        items = list(self.iterate(population))
        positions = Sequence(list, [Known(index) for index in range(len(items))])
        drawn = self._draw_list(generator, name, positions, rest, keywords)
        return [self._at(items, position) for position in drawn.items]

    def _draw_list(
        self, generator: Outside, name: str, population: Item, rest: list[Item], keywords: dict[str, Item]
    ) -> Sequence:
        drawn = self._draw(generator, name, [population, *rest], keywords)
        if not all(map(is_value, drawn.sample)):
            raise self.refuse("unsupported_object", f"{name} draws from containers")
        fetched = [self.host.fetch("get_item", drawn.value, index) for index in range(len(drawn.sample))]
        return Sequence(list, [Dynamic(one, value) for one, value in zip(drawn.sample, fetched, strict=True)])

    def _at(self, items: list[Item], position: Item) -> Item:
        try:
            return items[self.known(position)]
        except IndexError as error:
            raise Raised(error) from None
