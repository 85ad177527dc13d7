"""What the recorder and the skeleton must know of PyTorch's functions: closed tables.

Everything not named here is an ordinary tensor call: it is recorded, checked and computed in the graph.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
from torch.utils import dlpack


def _members(names: str) -> set[Any]:
    return {getattr(torch.Tensor, name) for name in names.split() if hasattr(torch.Tensor, name)}


def _getters(names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names.split() if hasattr(torch.Tensor, name)}


METADATA: Final[frozenset[Any]] = frozenset(
    _getters(
        "shape dtype device layout ndim itemsize nbytes is_cuda is_cpu is_sparse is_meta is_quantized is_nested"
        " is_mkldnn is_mps is_xpu is_xla is_ipu is_vulkan is_maia is_mtia is_sparse_csr names"
    )
    | _members(
        "size dim stride numel nelement storage_offset is_contiguous is_floating_point is_complex element_size"
        " __len__ __hash__ is_conj is_neg is_inference get_device is_signed ndimension has_names __dir__"
        " sparse_dim dense_dim"
    )
    | {
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
        torch.is_conj,
        torch.is_neg,
        torch.is_inference,
        torch.is_signed,
        torch.result_type,
        torch.can_cast,
        torch.promote_types,
        torch._C._set_grad_enabled,
        torch.device,
        torch.ops.profiler._record_function_enter_new,
        torch.ops.profiler._record_function_exit._RecordFunction,
    }
)
"""Answered at once, by a placeholder too: its shape, dtype, device and strides are true. Also mode switches."""

HISTORY: Final[dict[Any, str]] = {
    getter: name
    for name in ("requires_grad", "is_leaf", "grad_fn", "retains_grad", "_version", "output_nr", "_base")
    for getter in [getattr(torch.Tensor, name).__get__]
}
"""Reads of autograd's view of a tensor, which a placeholder does not have and the trace does."""

FROM_HOST_DATA: Final[frozenset[Any]] = frozenset(
    {
        torch.tensor,
        torch.as_tensor,
        torch.asarray,
        torch.from_numpy,
        torch.frombuffer,
        torch.from_file,
        torch.from_dlpack,
        dlpack.from_dlpack,
        torch.Tensor.new_tensor,
        torch.sparse_coo_tensor,
    }
)
"""Make a tensor from Python or NumPy data. Python keeps doing that; what they return is brought in as a feed."""

VALUE_READS: Final[frozenset[Any]] = frozenset(
    _members("__deepcopy__ __reduce_ex__ __reduce__ __array__ numpy tolist item __repr__ __format__ __str__")
)
"""Make Python objects from a tensor's contents: the tensors they return are new and none of the unit's."""

NUMBER_READS: Final[frozenset[Any]] = frozenset(_members("item tolist __bool__ __int__ __float__ __index__"))
"""Make Python numbers from a tensor, the same wherever the tensor lives."""

MEMORY_READS: Final[frozenset[Any]] = frozenset(
    _members("data_ptr untyped_storage storage _typed_storage __dlpack__ share_memory_ const_data_ptr")
    | {dlpack.to_dlpack}
)
"""Show where a tensor's memory is, through which it can be read and written unseen."""

READ_GRADIENT: Final[Any] = torch.Tensor.grad.__get__  # type: ignore[attr-defined]
"""The one call whose result is an object that was there before and is not among its arguments."""

HOOKS: Final[frozenset[Any]] = frozenset(_members("register_hook register_post_accumulate_grad_hook retain_grad"))
"""Attach Python to the backward pass: a unit that calls one stays eager."""

SETTERS: Final[frozenset[Any]] = frozenset(
    {torch.Tensor.requires_grad.__set__, torch.Tensor.requires_grad_, torch.Tensor.data.__set__, torch.Tensor.set_}  # type: ignore[attr-defined]
    | _members("swap share_memory_ pin_memory detach_ rename_ resize_ resize_as_ module_load")
)
"""Change what a tensor is, not what it holds. Harmless on new tensors, not recordable on those of the unit."""

PROPERTY_NAMES: Final[dict[Any, str]] = {
    getattr(getattr(torch.Tensor, name), method): name
    for name in ("grad", "data", "T", "mT", "H", "mH", "real", "imag")
    for method in ("__get__", "__set__", "__delete__")
    if hasattr(getattr(torch.Tensor, name), method)
}


REQUIRES_GRAD: Final[frozenset[Any]] = frozenset(
    {torch.Tensor.requires_grad.__set__, torch.Tensor.requires_grad_}  # type: ignore[attr-defined]
)
"""The setters that can be recorded."""


def display_name(function: Any) -> str:
    """Return a short name of a function for people, `grad` rather than `__get__`."""
    return PROPERTY_NAMES.get(function) or getattr(function, "__name__", str(function))


PLAIN_TENSORS: Final[frozenset[type[torch.Tensor]]] = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""The types, exact, of tensors whose behaviour is PyTorch's own."""


def is_strided(tensor: torch.Tensor) -> bool:
    """Whether it shows memory by strides: none that is sparse, nested or laid out by oneDNN."""
    return tensor.layout is torch.strided and not tensor.is_nested


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor that PyTorch made, shows memory, and has a history that autograd tells.

    None of another layout, and no part of a split tensor that was changed in place since.
    """
    if type(tensor) not in PLAIN_TENSORS or not is_strided(tensor):
        return False
    try:
        _ = tensor.is_leaf
    except RuntimeError:
        return False
    return True


CONTENT_QUESTIONS: Final[frozenset[Any]] = frozenset(
    {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default}
)
"""ATen operations that answer with a number. Beneath a call that makes tensors, as `alpha=tensor` puts them, that
number would be a constant of the graph."""

_aten = torch.ops.aten

SHOWN_ANEW: Final[dict[Any, Any]] = {
    _aten.as_strided_.default: _aten.as_strided.default,
    _aten.squeeze_.default: _aten.squeeze.default,
    _aten.squeeze_.dim: _aten.squeeze.dim,
    _aten.squeeze_.dims: _aten.squeeze.dims,
    _aten.t_.default: _aten.t.default,
    _aten.transpose_.default: _aten.transpose.int,
    _aten.unsqueeze_.default: _aten.unsqueeze.default,
}
"""ATen operations that change how a tensor shows its memory, each with the one that makes such a view of it."""


def asks_to_check(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether a call takes numbers out of a tensor only to raise where what it computes then raises as well.

    `one_hot` of a given number of classes, which else is itself such a number, sets items by class.
    """
    if function is not torch.nn.functional.one_hot:
        return False
    return (arguments[1] if len(arguments) > 1 else keywords.get("num_classes", -1)) != -1


_DYNAMIC_TAGS: Final = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})


@cache
def is_mutable(target: Any) -> bool:
    """Whether an ATen operation changes a tensor that it is given, by its schema.

    Asked of each operation that is recorded: what PyTorch answers in 0.5 µs is kept, here and below.
    """
    return target._schema.is_mutable


@cache
def is_random(target: Any) -> bool:
    """Whether an ATen operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in target.tags


def leaves_out_results(target: Any, result: Any) -> bool:
    """Whether an ATen operation that returns tensors and a list left some out, so that the rest cannot be told apart.

    cuDNN's backward of recurrent layers without a cell state does.
    """
    is_mixed = isinstance(result, tuple) and any(type(item) is list for item in result)
    return is_mixed and any(item is None or (type(item) is list and None in item) for item in result)


@cache
def keeps_workspace(target: Any) -> bool:
    """Whether an ATen operation keeps what its backward needs out of sight."""
    return "mkldnn_rnn" in target.name()


@cache
def _is_tagged_dynamic(target: Any) -> bool:
    return not _DYNAMIC_TAGS.isdisjoint(target.tags)


def has_dynamic_shape(target: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether the shape that an ATen operation yields depends on values."""
    if target is not torch.ops.aten.index.Tensor:  # tagged so, but only a mask makes it so
        return _is_tagged_dynamic(target)
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
