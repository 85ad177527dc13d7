"""The corpus: small imperative training programs, one feature each, in ordinary PyTorch.

`PROGRAMS[name](size, device, compile_model)` builds one; its module is imported at that moment.
The tests run every program at size "small" against eager execution, the benchmarks at size "full".
"""

from benchmarks.programs.program import Build, CompileModel, Program, Size, identity, load

NAMES = (
    "mlp",
    "lenet",
    "resnet18",
    "lstm_loop",
    "gpt",
    "bert",
    "dcgan",
    "vae",
    "grad_accumulation",
    "mixed_precision",
    "logging_net",
    "coin_flip",
    "actor_critic",
    "varying_loop",
    "lr_schedule",
    "multi_path",
    "resnet50",
    "inception_v3",
    "lstm",
    "lm",
    "a3c",
    "ppo",
    "adversarial",
    "pix2pix",
)

# Recursive programs: `benchmarks.trees` measures them; `decorate=` of a build stands on the recursive function.
RECURSIVE_NAMES = ("tree_rnn", "tree_rntn", "tree_lstm", "tree_child_sum", "tree_top_down", "tree_dag")

# The programs of speculative graph execution (Jeong et al. 2019, "JANUS"): `benchmarks.speculation` measures them.
JANUS_NAMES = (
    "lenet",
    "resnet50",
    "inception_v3",
    "lstm",
    "lm",
    "tree_rnn",
    "tree_lstm",
    "a3c",
    "ppo",
    "adversarial",
    "pix2pix",
)

PROGRAMS: dict[str, Build] = {name: load(name) for name in NAMES + RECURSIVE_NAMES}

__all__ = [
    "JANUS_NAMES",
    "NAMES",
    "PROGRAMS",
    "RECURSIVE_NAMES",
    "Build",
    "CompileModel",
    "Program",
    "Size",
    "identity",
    "load",
]
