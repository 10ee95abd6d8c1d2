"""The attention kernels: one table, chosen by what is installed and what the call needs.

Shapes: B batch, S query rows, K key rows, H query heads, G key heads, D head dimension.
Tensors are (B, S, H, D). A kernel returns the output and, where it can, the log-sum-exp of
each row of scores, (B, H, S), natural logarithm, in fp32 (fp64 for fp64 inputs); ring
attention merges blocks by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xfuser_runtime.attention import kernels
from xfuser_runtime.attention.kernels import Kernel, KernelCall
from xfuser_runtime.errors import ConfigError


@dataclass(frozen=True)
class AttentionBackend:
    """One kernel and what it can take.

    Args:
        name: the name for `attention_backend`.
        kernel: computes (out, lse); lse is None where `returns_lse` is False.
        package: the module that must be importable, None for torch's own.
        devices: device types that it runs on.
        dtypes: data types that it takes, None for all.
        returns_lse: it can return the log-sum-exp, so ring attention can use it.
        takes_mask: it takes a mask.
        head_dim_multiple: the head dimension must be a multiple of it.
        max_head_dim: largest head dimension, None for any.
        min_capability: lowest CUDA compute capability.
        exact: computes in the data type of its inputs; False for quantised kernels, which
            are used only when named.
        timed: unless named it is used only where it is faster than torch's own choice, which
            the first call of a shape finds out.
    """

    name: str
    kernel: Kernel
    package: str | None = None
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] | None = (torch.float16, torch.bfloat16)
    returns_lse: bool = True
    takes_mask: bool = False
    head_dim_multiple: int = 1
    max_head_dim: int | None = None
    min_capability: tuple[int, int] = (0, 0)
    exact: bool = True
    timed: bool = False

    def is_available(self) -> bool:
        """Whether the package that holds the kernel is installed."""
        return self.package is None or kernels.is_importable(self.package)

    def reason_against(self, call: KernelCall, *, need_lse: bool) -> str | None:
        """Why the kernel cannot take this call, None when it can."""
        query, value = call.query, call.value
        head_dim = query.shape[-1]
        if query.device.type not in self.devices:
            return f"the tensors are on {query.device.type}"
        if not self.is_available():
            return f"the package {self.package} is not installed"
        if self.dtypes is not None and query.dtype not in self.dtypes:
            return f"the tensors are {query.dtype}"
        if need_lse and not self.returns_lse:
            return "ring attention needs the log-sum-exp"
        if call.mask is not None and not self.takes_mask:
            return "the call has a mask"
        if head_dim % self.head_dim_multiple or (
            self.max_head_dim is not None and head_dim > self.max_head_dim
        ):
            return f"the head dimension is {head_dim}"
        if value.shape[-1] != head_dim and self.dtypes is not None:
            return f"keys have {head_dim} channels, values {value.shape[-1]}"
        if query.device.type == "cuda" and self.min_capability > (0, 0):
            capability = torch.cuda.get_device_capability(query.device)
            if capability < self.min_capability:
                return f"the device has compute capability {capability}"
        return None


_BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        AttentionBackend(
            "sdpa",
            kernels.sdpa,
            devices=("cpu", "cuda"),
            dtypes=None,
            returns_lse=False,
            takes_mask=True,
        ),
        AttentionBackend(
            "sdpa_math",
            kernels.math,
            devices=("cpu", "cuda"),
            dtypes=None,
            takes_mask=True,
        ),
        AttentionBackend(
            "sdpa_cpu",
            kernels.cpu_flash,
            devices=("cpu",),
            dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
            takes_mask=True,
        ),
        AttentionBackend(
            "sdpa_flash",
            kernels.cuda_flash,
            head_dim_multiple=8,
            max_head_dim=256,
            min_capability=(8, 0),
        ),
        AttentionBackend(
            "sdpa_cudnn",
            kernels.cuda_cudnn,
            takes_mask=True,
            head_dim_multiple=8,
            max_head_dim=128,
            min_capability=(8, 0),
        ),
        AttentionBackend(
            "sdpa_efficient",
            kernels.cuda_efficient,
            dtypes=(torch.float16, torch.bfloat16, torch.float32),
            takes_mask=True,
            head_dim_multiple=8,
        ),
        AttentionBackend(
            "flash",
            kernels.flash_2,
            package="flash_attn.flash_attn_interface",
            head_dim_multiple=8,
            max_head_dim=256,
            min_capability=(8, 0),
        ),
        AttentionBackend(
            "flash_3",
            kernels.flash_3,
            package="flash_attn_interface",
            head_dim_multiple=8,
            max_head_dim=256,
            min_capability=(9, 0),
        ),
        AttentionBackend(
            "flash_4",
            kernels.flash_4,
            package="flash_attn.cute",
            head_dim_multiple=8,
            max_head_dim=128,
            min_capability=(9, 0),
            timed=True,
        ),
        AttentionBackend(
            "sage",
            kernels.sage,
            package="sageattention",
            max_head_dim=128,
            min_capability=(8, 0),
            exact=False,
        ),
    )
}

# Fastest first. Without a need for the log-sum-exp torch's own choice is what upstream
# runs on one device, so it comes right after the kernels that beat it on Hopper.
_AUTOMATIC = ("flash_3", "flash_4", "sdpa")
_AUTOMATIC_WITH_LSE = (
    "flash_3",
    "sdpa_cudnn",
    "flash",
    "sdpa_flash",
    "sdpa_cpu",
    "sdpa_efficient",
    "sdpa_math",
)

# diffusers' names of the same kernels (`set_attention_backend`); None is our own choice.
_DIFFUSERS_NAMES: dict[str, str | None] = {
    "native": None,
    "_native_math": "sdpa_math",
    "_native_flash": "sdpa_flash",
    "_native_cudnn": "sdpa_cudnn",
    "_native_efficient": "sdpa_efficient",
    "flash": "flash",
    "_flash_3": "flash_3",
    "sage": "sage",
}


def backend_names() -> tuple[str, ...]:
    """The names that `attention_backend` takes."""
    return tuple(_BACKENDS)


def timed_backends() -> tuple[str, ...]:
    """The installed kernels that are taken where they prove faster than torch's own choice."""
    return tuple(x.name for x in _BACKENDS.values() if x.timed and x.is_available())


def check_backend_name(name: str | None) -> None:
    """Check a configured `attention_backend`; None leaves the choice to the runtime.

    Raises:
        ConfigError: no such kernel, or its package is not installed.
    """
    if name is None:
        return
    if name not in _BACKENDS:
        raise ConfigError(
            f"attention_backend {name!r}, expected one of: {', '.join(_BACKENDS)}"
        )
    backend = _BACKENDS[name]
    if not backend.is_available():
        raise ConfigError(
            f"attention_backend {name!r} needs the package {backend.package}, which is not "
            f"installed; install it or choose one of: {', '.join(_available_names())}"
        )


def from_diffusers_name(name: str) -> str | None:
    """Our name of the kernel that diffusers calls `name`.

    Raises:
        ConfigError: a kernel that parallel attention does not have.
    """
    if name not in _DIFFUSERS_NAMES:
        raise ConfigError(
            f"diffusers' attention backend {name!r} under parallel attention, expected one "
            f"of: {', '.join(_DIFFUSERS_NAMES)}; reset it or set attention_backend"
        )
    return _DIFFUSERS_NAMES[name]


def run_kernel(
    call: KernelCall, *, name: str | None = None, need_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention with the named kernel, or the best that fits the call.

    Args:
        call: the tensors and options.
        name: a name out of `backend_names`, None to choose.
        need_lse: also return the log-sum-exp; rows whose keys are all masked have -inf.

    Returns:
        The output (B, S, H, D) and the log-sum-exp (B, H, S), None unless needed. Rows
        without any key to attend to are zeros.

    Raises:
        ConfigError: unknown name, or the named kernel cannot take the call.
    """
    check_backend_name(name)
    if call.query.numel() == 0 or call.key.shape[1] == 0:
        return kernels.empty(call)
    backend = select_backend(call, name=name, need_lse=need_lse)
    out, lse = backend.kernel(call, need_lse)
    return kernels.clear_masked_rows(call, out, lse) if need_lse else (out, None)


def select_backend(
    call: KernelCall, *, name: str | None = None, need_lse: bool = False
) -> AttentionBackend:
    """The kernel that `run_kernel` runs; the first call of a shape may time kernels on CUDA.

    Args:
        call: the tensors and options.
        name: a name out of `backend_names`, None to choose.
        need_lse: also return the log-sum-exp.

    Raises:
        ConfigError: the named kernel cannot take the call.
    """
    if name is not None:
        reason = _BACKENDS[name].reason_against(call, need_lse=need_lse)
        if reason is not None:
            fitting = [
                other
                for other, backend in _BACKENDS.items()
                if backend.reason_against(call, need_lse=need_lse) is None
            ]
            raise ConfigError(
                f"attention_backend {name!r} cannot run: {reason}; "
                f"choose one of: {', '.join(fitting)}"
            )
        return _BACKENDS[name]
    order = _AUTOMATIC_WITH_LSE if need_lse else _AUTOMATIC
    for candidate in order:
        backend = _BACKENDS[candidate]
        if backend.reason_against(call, need_lse=need_lse) is not None:
            continue
        if not backend.timed or _is_faster(backend, call):
            return backend
    # The kernel in plain tensor operations takes every call, on every kind of device.
    return _BACKENDS["sdpa_math"]


def _is_faster(backend: AttentionBackend, call: KernelCall) -> bool:
    """Whether a kernel is faster than torch's own choice; in compiled code nobody can time."""
    if torch.compiler.is_compiling():
        return False
    from xfuser_runtime.cuda.choice import is_faster

    return is_faster(backend, _BACKENDS["sdpa"], call)


def _available_names() -> list[str]:
    return [name for name, backend in _BACKENDS.items() if backend.is_available()]
