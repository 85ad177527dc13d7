"""Statements that random programs are made of, beside those that `random_programs` writes by rules of their own.

In each, `{tensor}`, `{scalar}`, `{vector}`, `{number}` and `{condition}` stand for expressions that are drawn. What
they bind is not relied on: `n` is a small int, `parts` a list of tensors that is not empty, and `x` f32[rows, 3]
throughout.
"""

import re
from collections.abc import Callable
from typing import Any

DEFINITIONS = """
import dataclasses
import functools
from collections import OrderedDict, defaultdict, deque, namedtuple

Pair = namedtuple("Pair", "left right")
RECENT = deque(maxlen=3)
COUNTS = defaultdict(int)
CACHE = {}


@dataclasses.dataclass
class Point:
    place: int
    weight: object = None
    seen: list = dataclasses.field(default_factory=list)


class Base:
    made = 0
    rate = 0.5

    def __init__(self, start):
        self.total = start
        self._level = 1
        type(self).made += 1

    @property
    def level(self):
        return self._level

    @level.setter
    def level(self, value):
        self._level = value % 4

    @classmethod
    def make(cls, start=0):
        return cls(start)

    @staticmethod
    def half(t):
        return t * 0.5

    def apply(self, t):
        self.total += 1
        return t * self.rate

    def __len__(self):
        return self._level

    def __call__(self, t, *others, **named):
        return self.apply(t) + sum(others) + len(named)


class Derived(Base):
    def apply(self, t):
        if self.total % 2:
            return super().apply(t) + self.level
        self.rate = 0.25
        return super().apply(t)


def counter():
    count = 0
    kept = []

    def tick(t=None, by=1):
        nonlocal count
        count += by
        kept.append(count)
        del kept[:-2]
        return count if t is None else t * (count % 3)

    return tick


def remembering(n, seen=[]):
    seen.append(n)
    del seen[:-3]
    return sum(seen) % 5


def deeper(t, n):
    if n <= 0:
        return t
    return deeper(t * 0.5 + n, n - 1)


def doubled(function):
    @functools.wraps(function)
    def called(*arguments, **keywords):
        return function(*arguments, **keywords) * 2

    return called


@doubled
def shifted(t, by=1):
    return t + by


def early(ts, limit):
    for place, t in enumerate(ts):
        if place >= limit:
            return t, place
        try:
            if t.dim() == 0:
                continue
        finally:
            COUNTS["early"] += 1
    else:
        return ts[0], -1


tick = counter()
derived = Derived.make(1)
point = Point(2)
triple = functools.partial(shifted, by=3)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
"""

ASSIGNMENTS = (
    "a = b = {tensor}; b = b + 1; parts.append(a); parts.append(b)",
    "a = b = [{tensor}]; b.append(x); n = len(a)",
    "(a, (b, *c)), d = ({tensor}, ({number}, x, x * 2)), n; parts += c; n = (b + d) % 5",
    "*a, b = parts; parts = [b, *a]",
    "parts[0], parts[-1] = parts[-1], parts[0]",
    "n: int = {number}",
    "holder.table['a'] *= 0.5; holder.table['a'] += {number}",
    "holder.items[-1] += 1; holder.items[0] -= n",
    "holder.count, n = n, holder.count % 5",
    "holder.items[1:2] = [{number}, n]; del holder.items[4:]",
    "for holder.count in range(n % 3): pass",
    "for i, (j, k) in enumerate([(1, n), ({number}, 2)]): n = (n + i * j + k) % 5",
    "if (m := {number}) > 1: n = m % 5",
    "n = n and {number} or 1",
    "n = 1 if n < {number} < 4 else 0",
    "n, m = divmod(n + 7, {number} + 2)",
    "n ^= 3; n &= 7; n = (n << 1) % 5; n |= 1",
    "n = -n % 5; n = ~n % 4; n **= 2; n %= 5",
    "t = {tensor}; t = t if t is not x else x * 2; parts.append(t)",
    "t = {tensor}; del t",
    "global TOTAL_SUM; TOTAL_SUM = globals().get('TOTAL_SUM', 0) + n",
)

CONTAINERS = (
    "holder.table.setdefault('c', n); n = int(holder.table['c']) % 5",
    "holder.table.update(a=0.5, d=n); n = len(holder.table)",
    "holder.table.pop('d', None); n = int('d' in holder.table)",
    "holder.table = {**holder.table, 'e': {number}}",
    "holder.table |= {'f': n}; del holder.table['f']",
    "n = sum(v > 0.3 for v in holder.table.values()) % 5",
    "d = {k: v for k, v in holder.table.items() if v > 0}; d['x'] = n; n = len(d)",
    "d = {'in': {'t': {tensor}}}; d['in']['t'] = d['in']['t'] * 2; parts.append(d['in']['t'])",
    "d = {}; d.setdefault('ts', []).append({tensor}); parts.extend(d['ts'])",
    "d = dict(zip('ab', parts)); parts = [d[k] for k in sorted(d)]",
    "s = {1, n, {number}}; s.add(3); n = len(s | {n}) % 5",
    "RECENT.append(n); n = sum(RECENT) % 5",
    "COUNTS[n] += 1; n = COUNTS[n] % 5",
    "CACHE.setdefault(n, {vector}); parts.append(CACHE[n])",
    "CACHE.clear() if len(CACHE) > 2 else None",
    "o = OrderedDict(b=x, a={tensor}); o.move_to_end('b'); parts.append(next(iter(o.values())))",
    "grid = [[i * j for j in range(3)] for i in range(n % 3 + 1)]; n = sum(map(sum, grid)) % 5",
    "rows = [[p, p * 2] for p in parts[:2]]; parts = [p for row in rows for p in row]",
    "same = [parts] * 2; same[0].append(x); n = len(same[1])",
    "copy = list(parts); copy[0] = x; n = int(parts[0] is copy[0])",
    "parts.extend(p + 1 for p in parts[:2]); del parts[4:]",
    "parts.append(parts.pop(0))",
    "parts = sorted(parts, key=lambda p: p.dim())",
    "parts = [p for i, p in enumerate(parts) if i % 2 == 0 or i > n]",
    "parts = parts[::-1]; parts[::2] = [p * 2 for p in parts[::2]]",
    "pair = Pair({tensor}, n); pair = pair._replace(right=n + 1); parts.append(pair.left); n = pair[1] % 5",
    "n = len(list(filter(lambda p: p.dim() > 1, parts))); n = max(n, *holder.items) % 5",
    "n = (any(p.dim() == 1 for p in parts) + all(p.dim() for p in parts)) % 5",
    "holder.items.sort(reverse=True); holder.items.insert(1, n); del holder.items[5:]",
    "n = holder.items.index(holder.items[-1]); holder.items.remove(holder.items[0]); holder.items.append(n)",
    "t = (n, *holder.items); n = t[-1] % 5 if 7 in t else t.count(1)",
)

OBJECTS = (
    "point.place += 1; n = point.place % 5",
    "point.weight = {vector}",
    "parts.append(x if point.weight is None else point.weight)",
    "point.seen.append(n); point.seen = point.seen[-2:]; n = len(point.seen)",
    "p = Point({number}, {tensor}); p.place += n; parts.append(p.weight * p.place)",
    "p = q = Point(n); q.place = {number}; n = p.place % 5",
    "p = dataclasses.replace(point, place=n); n = p.place % 5",
    "parts.append(derived({tensor}, n, by=1))",
    "derived.level = {number}; n = derived.level",
    "derived.total, derived.level = n, derived.total; n = len(derived)",
    "Base.rate = {number} / 4; parts.append(Base.half({tensor}))",
    "derived.rate = 0.75; parts.append(derived.apply({tensor}))",
    "d = Derived(n); n = (d.made + Derived.made) % 5",
    "n = isinstance(derived, Base) + hasattr(derived, 'extra') + (type(x) is torch.Tensor)",
    "derived.extra = {vector}; parts.append(derived.extra); del derived.extra",
    "if hasattr(holder, 'more'): del holder.more\nelse: holder.more = n",
    "holder.point = point; holder.point.place = n; n = point.place % 5",
    "holder.inner = {'p': point}; holder.inner['p'].seen.append(n); point.seen = point.seen[-2:]",
    "vars(holder)['count'] = n; n = holder.__dict__['count']",
)

CALLS = (
    "n = tick() % 5",
    "parts.append(tick({tensor}))",
    "tick(by={number})",
    "n = remembering(n)",
    "parts.append(deeper({tensor}, n % 3))",
    "parts.append(shifted({tensor})); parts.append(triple(x))",
    "t, n = early(parts, {number}); parts.append(t)",
    "local = counter(); local(); n = (local() + local(by=n)) % 5",
    "fs = [lambda t, k=k: t * k for k in range(n % 3)]; parts.extend(f(x) for f in fs)",
    "fs = [lambda: i for i in range(3)]; n = (fs[0]() + i if 'i' in locals() else fs[0]()) % 5",
    "f = (lambda *ts, **ks: sum(ts) * ks.get('by', 1)); parts.append(f(x, {tensor}, by=n))",
    "args, keys = [{tensor}], {'shift': n}; parts.append(scaled(*args, **keys))",
    "parts.append(functools.reduce(lambda a, b: a + b.sum(), parts, x))",
    "def add(t, amount=n): return t + amount\nn = {number}\nparts.append(add({tensor}))",
    "total = 0\ndef put(v):\n    nonlocal total\n    total += v\nfor k in range(n % 4): put(k)\nn = total % 5",
    "def outer(t):\n    def inner(k):\n        return t * k + n\n    return inner\nparts.append(outer({tensor})(2))",
)

TEXTS = (
    "print(f'{n:03d}|{n!r:>4}|{flag!s:<6}|{holder.table}')",
    "print('%d of %s' % (n, holder.items), end=';\\n')",
    "print('a', n, sep='-'); print(*holder.items, sep=', ')",
    "print(' '.join(str(k) for k in holder.items).replace('1', 'one').upper())",
    "print(f'{ {scalar}.item():.2f}', tuple(parts[0].shape))",
    "print('{:>5}'.format(n), len('abc' * n), 'yes' if 'b' in 'abc'[n % 3:] else 'no')",
    "name = f'k{n}'; holder.table[name] = n; print(sorted(holder.table)); del holder.table[name]",
    "print(Pair(n, flag), point.place, Point(n))",
    "print(x.shape, x.dtype, {tensor}.requires_grad)",
    "LOG.append(f'{n}{flag}'); del LOG[:-4]",
)

SHAPES = (
    "parts.append(x[: n % 3 + 1])",
    "parts.append(torch.cat([x, {vector}.unsqueeze(0)]).mean(0))",
    "parts.append(torch.stack([p.sum() for p in parts]).sum() * x)",
    "parts.append(x[x.sum(1) > 0].sum(0))",
    "parts.append(x[torch.arange(len(x)) % 2 == 0].mean(0))",
    "parts.append(x[{scalar}.abs().long() % len(x)])",
    "a, *b = x.split(1); parts.append(sum(b, a))",
    "for row in x.chunk(2): parts.append(row.sum(0))",
    "parts.append(x.t().reshape(-1, 3)[-1]); n = x.numel() % 5",
    "parts.append(torch.zeros(n % 3 + 1, 3) + {vector})",
    "n = int(x.argmax()) % 5",
    "n = len(x[x > 0].tolist()) % 5",
    "k = {scalar}.item()\nwhile k > 0.1: k = k / 2 - 0.1\nn = int(k * 10) % 3",
    "for v in x[0].tolist(): n = (n + int(v > 0)) % 5",
    "parts.append(torch.tensor([n, 1.0, float(flag)]) * x)",
    "parts.append(torch.from_numpy(x.detach().numpy().copy() * n))",
    "a = np.arange(3, dtype=np.float32) * n; a[0] = 5; parts.append(torch.from_numpy(a) + x)",
    "y = x.clone(); y[0] = n; y[1:] *= 2; parts.append(y)",
    "y = torch.zeros(4, 3)\nfor k in range(len(x)): y[k % 4] += x[k]\nparts.append(y.mean(0))",
)

GRADIENTS = (
    "g, = torch.autograd.grad(model.scale.sum() * {scalar} + model.scale.sum(), [model.scale]); parts.append(g)",
    "w = {vector}.requires_grad_(); (w * x).sum().backward(); parts.append(w.grad)",
    "with torch.no_grad(): model.scale.mul_(0.99)",
    "with torch.no_grad(), torch.random.fork_rng(): holder.vector = torch.rand(3)",
    "parts.append(x if model.scale.grad is None else model.scale.grad.clone())",
    "model.zero_grad(set_to_none={condition})",
    "optimizer.param_groups[0]['lr'] = 0.1 / (1 + n)",
    "optimizer.param_groups[0]['lr'] *= 0.99",
    "nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
    "n = sum(p.requires_grad for p in model.parameters()) % 5",
    "model.scale.requires_grad_(not model.scale.requires_grad)",
    "model.eval(); parts.append(model({tensor}).detach()); model.train()",
    "model.register_buffer('late', {vector}); parts.append(model.late)",
    "model.linear.weight.data.mul_(0.9)",
    "hook = x.register_hook(print) if x.requires_grad else None",
    "(model(x).sum() * 0.1).backward()",
)

BLOCKS = (
    "try:\n    n = [1, 2][{number}]\nexcept IndexError: n = 0\nelse: n += 1\nfinally: holder.count += 1",
    "for k in range(3):\n    try:\n        if k == n: raise KeyError(k)\n    except KeyError as e:\n        n = 1"
    " + e.args[0]; break\n    else: continue\nelse: n = 4",
    "try:\n    try: {tensor}.nothing\n    finally: n += 1\nexcept AttributeError: n %= 5",
    "for i in range(3):\n    for j in range(3):\n        if i * j > n: break\n        if j == i: continue\n"
    "        n += 1\n    else:\n        parts.append(x)\ndel parts[5:]",
    "k = 0\nwhile True:\n    k += 1\n    if k > n: break\n    if {condition}: continue\n    parts[0] = parts[0] * 0.5",
    "match n:\n    case 0: n = 3\n    case 1 | 2: n -= 1\n    case _: n = {number}",
    "assert n is not None, 'never'",
    "it = iter(parts); parts.append(next(it) * 2); n = len(list(it)) % 5",
    "for p, k in zip(list(parts), range(n % 3)): parts.append(p * k)",
    "for k in reversed(range(0, n, 2)): n = (n + k) % 5",
    "for t in (x, {tensor}):\n    if t.sum() > 0: parts.append(t); break\nelse: parts.append(-x)",
    "if {condition} and ({condition} or not {condition}): n = 1\nelif {condition}: pass\nelse: n = 2",
)

KINDS = (ASSIGNMENTS, CONTAINERS, OBJECTS, CALLS, TEXTS, SHAPES, GRADIENTS, BLOCKS)

_PLACES = re.compile(r"\{(tensor|scalar|vector|number|condition)\}")


def filled(phrase: str, draw: Callable[[str], Any]) -> list[str]:
    """Return the lines of a phrase with an expression drawn for each place in it."""
    return _PLACES.sub(lambda place: draw(place[1]), phrase).split("\n")
