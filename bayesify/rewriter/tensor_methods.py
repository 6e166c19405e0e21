"""What a trace does with the members of torch.Tensor, and how code spells a call of one."""

from __future__ import annotations

import inspect
import operator
from typing import Any

from torch import Tensor

from .writer import call_of, resolves

CONCRETE_ATTRIBUTES = {
    "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda", "is_cpu",
    "is_meta", "is_mps", "is_xpu", "is_quantized", "is_sparse", "is_sparse_csr", "is_mkldnn",
    "is_nested", "is_vulkan", "is_ipu", "is_maia", "is_mtia", "is_xla", "itemsize", "names",
    "output_nr", "retains_grad", "_is_view", "is_inference",
}  # fmt: skip
"""Answered by the example: the key of a variant holds what they depend on."""

CONCRETE_METHODS = {
    "dim", "ndimension", "element_size", "is_floating_point", "is_complex", "is_signed",
    "get_device", "is_inference", "is_conj", "is_neg", "has_names", "is_same_size", "type",
    "_is_view",
}  # fmt: skip
"""The same of what is called."""

TYPES = {
    "dtype", "device", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu",
    "itemsize", "element_size", "is_floating_point", "is_complex", "is_signed", "get_device",
    "type",
}  # fmt: skip
"""Of these, what a cast, a move or a freeze of the module's own tensors changes: guarded."""

VALUE_METHODS = {
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "numpy",
    "__array__", "__contains__", "is_nonzero", "equal", "allclose", "__repr__", "__format__",
    "__deepcopy__", "__reduce_ex__", "data_ptr", "storage", "untyped_storage", "__dlpack__",
    "nonzero_static", "backward", "register_hook", "__setstate__", "_typed_storage",
}  # fmt: skip
"""Refused: they need data, which an example does not have, or leave something on a tensor."""

PARTS = {"unbind", "split", "chunk", "tensor_split", "split_with_sizes", "unsafe_chunk",
         "unsafe_split", "hsplit", "vsplit", "dsplit"}  # fmt: skip
"""What gives as many tensors as a shape says."""

_OPERATORS = {
    f"__{name}__": getattr(operator, name)
    for name in (
        "add sub mul truediv floordiv mod pow matmul neg eq ne lt le gt ge and_ or_ xor getitem "
        "setitem iadd isub imul itruediv abs invert"
    ).split()
    if hasattr(operator, name)
}
_OPERATORS.update({"__and__": operator.and_, "__or__": operator.or_})
_REVERSED = {"__radd__": operator.add, "__rmul__": operator.mul, "__rsub__": operator.sub,
             "__rtruediv__": operator.truediv, "__rpow__": operator.pow,
             "__rmatmul__": operator.matmul, "__rfloordiv__": operator.floordiv,
             "__rmod__": operator.mod}  # fmt: skip

# the name of each method of Tensor, operators under their own: Tensor.__pow__ calls itself "pow"
_METHODS: dict[Any, str] = {}
for _name in (*(n for n in dir(Tensor) if n not in _OPERATORS), *_OPERATORS):
    if callable(_member := inspect.getattr_static(Tensor, _name, None)):
        _METHODS[_member] = _name


def spelled(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Kind, target and operands of the fx node for a call: an operator, a method or a function."""
    method = _METHODS.get(func, "") if isinstance(args[0] if args else None, Tensor) else ""
    if method in _OPERATORS:
        return "call_function", _OPERATORS[method], args
    if method in _REVERSED:
        return "call_function", _REVERSED[method], (args[1], args[0])
    if method:
        return "call_method", method, args
    if resolves(func):
        return "call_function", func, args
    return "call_function", call_of, (func, *args)  # its name does not lead to it
