"""The names that torch does not promise to keep, and in which versions each is there.

Nothing else in bayesify or its recipes names one. Where nothing else is said, a name is there in
torch 2.6, the oldest that bayesify supports, and in 2.14. A torch without one is refused here, when
bayesify is imported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.overrides
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from . import requirements, torch_support
from .errors import UnsupportedVersionError

__all__ = [
    "BatchNormBase",
    "ConvBase",
    "DeviceContext",
    "DisableTorchFunction",
    "EnableTorchFunction",
    "FakeTensor",
    "FakeTensorMode",
    "NormBase",
    "ScriptFunction",
    "active_ddp_module",
    "current_autograd_node",
    "current_graph_task_keep_graph",
    "device_constructors",
    "disable_current_modes",
    "dispatch_mode_stack",
    "foreach_addcmul_",
    "foreach_copy_",
    "foreach_lerp_",
    "foreach_mul_",
    "foreach_sub",
    "forget_example_inputs",
    "forget_workers",
    "forward_ad_level",
    "function_mode_stack",
    "functorch_level",
    "hooks_may_be_set",
    "is_any_autocast_enabled",
    "is_functorch_wrapped_tensor",
    "is_legacy_batchedtensor",
    "is_vmap_fallback_enabled",
    "load_from_state_dict",
    "make_wrapper_subclass",
    "packs_by_cutlass",
    "parametrization_cache",
    "peek_interpreter_stack",
    "pytree",
    "saves_to_hooks",
    "semi_structured_constraints",
    "set_grad_enabled",
    "set_parametrization_cache",
    "set_vmap_fallback_enabled",
    "storage_use_count",
]

torch_support.check("bayesify")
requirements.check("numpy")  # its types are plain values to a trace

try:
    # switches of torch functions: what bayesify itself computes must not be seen as a model's read
    from torch._C import DisableTorchFunction, ScriptFunction
    from torch._C import _current_autograd_node as current_autograd_node
    from torch._C import _EnableTorchFunction as EnableTorchFunction
    from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
    from torch._C import _set_grad_enabled as set_grad_enabled
    from torch._C import _storage_Use_Count as storage_use_count

    # the backward that runs
    from torch._C._autograd import (
        _get_current_graph_task_keep_graph as current_graph_task_keep_graph,
    )

    # transforms of torch.func
    from torch._C._functorch import (
        is_functorch_wrapped_tensor,
        is_legacy_batchedtensor,
        peek_interpreter_stack,
    )
    from torch._C._functorch import maybe_current_level as functorch_level

    # tensors without memory, of which a trace knows shape and dtype
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    # classes that several public ones have as their base
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.conv import _ConvNd as ConvBase
    from torch.utils import _pytree as pytree
    from torch.utils._device import DeviceContext
    from torch.utils._device import _device_constructors as device_constructors
    from torch.utils._python_dispatch import (
        _disable_current_modes as disable_current_modes,
    )
    from torch.utils._python_dispatch import (
        _get_current_dispatch_mode_stack as dispatch_mode_stack,
    )
    from torch.utils.data._utils import signal_handling

    # the stubs leave these out
    hooks_may_be_set: Any = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
    is_vmap_fallback_enabled: Any = torch._C._functorch._is_vmap_fallback_enabled  # type: ignore[attr-defined]
    set_vmap_fallback_enabled: Any = torch._C._functorch._set_vmap_fallback_enabled  # type: ignore[attr-defined]

    foreach_addcmul_ = torch._foreach_addcmul_
    foreach_copy_ = torch._foreach_copy_
    foreach_lerp_ = torch._foreach_lerp_
    foreach_mul_ = torch._foreach_mul_
    foreach_sub = torch._foreach_sub
    # after it the end of a loader's workers is no failure
    forget_workers: Any = signal_handling._remove_worker_pids  # type: ignore[attr-defined]
    load_from_state_dict: Any = nn.Module._load_from_state_dict
    function_mode_stack: Any = torch.overrides._get_current_function_mode_stack
    make_wrapper_subclass: Any = torch.Tensor._make_wrapper_subclass
except (AttributeError, ImportError) as error:
    raise UnsupportedVersionError(torch_support.lacks(error)) from error


def forward_ad_level() -> int:
    """How deep in levels of forward-mode differentiation; -1 outside."""
    return forward_ad._current_level


def saves_to_hooks() -> bool:
    """Whether hooks may get what autograd saves. Torch 2.6 knows only whether there can be any."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks_may_be_set() if top is None else top(True) is not None


def active_ddp_module() -> Any:
    """The DistributedDataParallel wrapper that runs, or None."""
    return DistributedDataParallel._active_ddp_module


def parametrization_cache() -> int:
    """How many ``torch.nn.utils.parametrize.cached`` are entered."""
    return parametrize._cache_enabled


def set_parametrization_cache(entered: int) -> None:
    """Let torch see as many ``torch.nn.utils.parametrize.cached`` entered."""
    parametrize._cache_enabled = entered


def forget_example_inputs(program: Any) -> None:
    """Take the example inputs out of an exported program; torch 2.6 has no public way."""
    program._example_inputs = None


def packs_by_cutlass() -> bool:
    """Whether semi-structured weights are packed for CUTLASS rather than cuSPARSELt."""
    from torch.sparse import SparseSemiStructuredTensor

    return SparseSemiStructuredTensor._FORCE_CUTLASS


def semi_structured_constraints(kind: Any) -> Any:
    """By dtype, the least numbers of rows and columns that a class of packed weights takes."""
    return kind._DTYPE_SHAPE_CONSTRAINTS
