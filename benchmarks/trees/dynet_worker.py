"""The binary TreeLSTM in DyNet with automatic batching, in a process of its own.

    python dynet_worker.py FOLDER

FOLDER holds `parameters.npz` (torch's layouts) and `trees.json` (`[label, word]` or `[label, left, right]`).
Commands come as lines of JSON on the standard input, answers go to the standard output the same way; the
standard error is DyNet's. Needs only dynet and numpy, so that any interpreter which has them will do.

The cell is that of DyNet's own benchmarks: one affine transform a gate, which automatic batching likes best.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import dynet_config

dynet_config.set(mem=1024, autobatch=1, random_seed=1)

import dynet as dy  # noqa: E402 reads the configuration when it is imported
import numpy as np  # noqa: E402

LEAF_GATES = ("i", "o", "u")
INNER_GATES = ("i", "o", "fl", "fr", "u")


class TreeLSTM:
    """Parameters start from torch's; the embedding is frozen."""

    def __init__(self, arrays):
        self.collection = dy.ParameterCollection()
        self.embedding = self.collection.lookup_parameters_from_numpy(arrays["embedding.weight"])
        self.hidden = arrays["leaf.weight"].shape[0] // len(LEAF_GATES)
        self.leaf = self._gates(LEAF_GATES, arrays["leaf.weight"], arrays["leaf.bias"], parts=1)
        self.inner = self._gates(INNER_GATES, arrays["inner.weight"], arrays["inner.bias"], parts=2)
        self.classify = self._affine(arrays["classify.weight"], arrays["classify.bias"], parts=1)

    def _gates(self, names, weight, bias, parts):
        weights, biases = np.split(weight, len(names)), np.split(bias, len(names))
        return {name: self._affine(w, b, parts) for name, w, b in zip(names, weights, biases, strict=True)}

    def _affine(self, weight, bias, parts):
        """Bias, then the weight of each argument."""
        add = self.collection.parameters_from_numpy
        return [add(bias), *(add(np.ascontiguousarray(part)) for part in np.split(weight, parts, axis=1))]

    def encode(self, tree, losses):
        label, *rest = tree
        if len(rest) == 1:
            x = dy.lookup(self.embedding, rest[0], update=False)
            i, o, u = (self._apply(self.leaf[gate], x) for gate in LEAF_GATES)
            c = dy.cmult(dy.logistic(i), dy.tanh(u))
        else:
            (hl, cl), (hr, cr) = (self.encode(child, losses) for child in rest)
            i, o, fl, fr, u = (self._apply(self.inner[gate], hl, hr) for gate in INNER_GATES)
            c = dy.cmult(dy.logistic(i), dy.tanh(u)) + dy.cmult(dy.logistic(fl), cl) + dy.cmult(dy.logistic(fr), cr)
        h = dy.cmult(dy.logistic(o), dy.tanh(c))
        losses.append(dy.pickneglogsoftmax(self._apply(self.classify, h), label))
        return h, c

    @staticmethod
    def _apply(affine, *arguments):
        bias, *weights = affine
        terms = [term for pair in zip(weights, arguments, strict=True) for term in pair]
        return dy.affine_transform([bias, *terms])

    def loss(self, batch):
        dy.renew_cg()
        losses = []
        for tree in batch:
            self.encode(tree, losses)
        return dy.esum(losses)

    def gradients(self):
        """Return the gradients of the last backward pass in torch's layouts."""
        found = {}
        for name, affines in (
            ("leaf", list(self.leaf.values())),
            ("inner", list(self.inner.values())),
            ("classify", [self.classify]),
        ):
            found[f"{name}.bias"] = np.concatenate([affine[0].grad_as_array() for affine in affines])
            rows = [np.concatenate([w.grad_as_array() for w in affine[1:]], axis=1) for affine in affines]
            found[f"{name}.weight"] = np.concatenate(rows)
        return found


class Worker:
    def __init__(self, folder):
        self.folder = folder
        self.trees = json.loads((folder / "trees.json").read_text())
        self.model = TreeLSTM(np.load(folder / "parameters.npz"))

    def version(self):
        return f"dyNET38 {importlib.metadata.version('dyNET38')}"

    def seconds(self, kind, batches, passes, lr):
        """Time `passes` over the batches, each a first and a last tree."""
        trainer = dy.SimpleSGDTrainer(self.model.collection, lr)
        trainer.set_clip_threshold(-1)
        batches = [self.trees[first:last] for first, last in batches]
        begin = time.perf_counter()
        for _ in range(passes):
            for batch in batches:
                loss = self.model.loss(batch)
                loss.value()
                if kind == "train":
                    loss.backward()
                    trainer.update()
        return time.perf_counter() - begin

    def gradients(self, first, last):
        """Return the loss of a batch; the gradients go to a file in the folder."""
        loss = self.model.loss(self.trees[first:last])
        value = loss.value()
        loss.backward()
        np.savez(self.folder / "gradients.npz", **self.model.gradients())
        for parameter in self.model.collection.parameters_list():
            parameter.scale_gradient(0.0)
        return value


def main():
    sys.setrecursionlimit(10_000)
    worker = Worker(Path(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(worker, command.pop("call"))(**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
