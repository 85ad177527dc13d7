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
)

PROGRAMS: dict[str, Build] = {name: load(name) for name in NAMES}

__all__ = ["NAMES", "PROGRAMS", "Build", "CompileModel", "Program", "Size", "identity", "load"]
