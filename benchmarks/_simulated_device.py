"""A simulated device for device.py: PyTorch knows it as `simulated`, and accelerate trains on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.cpp_extension import load, verify_ninja_availability

from trimllm.errors import InputError

NAME = "simulated"
SOURCE = Path(__file__).with_suffix(".cpp")


def build(folder: str | Path) -> None:
    """Compile it into `folder` (half a minute), or do nothing where that has been done.

    Raises:
        InputError: if there is no compiler.
    """
    try:
        verify_ninja_availability()
        load("simulated_device", [str(SOURCE)], build_directory=str(folder), extra_cflags=["-O1"])
    except (OSError, RuntimeError) as error:
        why = str(error).partition(":")[0]
        raise InputError(f"no simulated device: {why}: install a C++ compiler and ninja, or give --device") from None


def register(folder: str | Path) -> None:
    """Make this process know the device that `build` has compiled into `folder`."""
    torch.utils.rename_privateuse1_backend(NAME)
    build(folder)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.nn.Module._apply = _tied(torch.nn.Module._apply)  # type: ignore[method-assign]
    PartialState.default_device = property(lambda _: torch.device(NAME, 0))  # type: ignore[assignment]


def _module() -> ModuleType:
    """What PyTorch and accelerate ask of `torch.simulated`."""
    module: Any = ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = module.synchronize = module.manual_seed = module.manual_seed_all = lambda *_: None
    module.empty_cache = lambda: None
    module.get_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8)
    module.set_rng_state = lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module


def _tied(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Parameters that modules share stay shared when they move, as on CUDA; PyTorch does not see to it for devices that
    come from outside."""

    def moved(module: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
        places: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    places.setdefault(parameter, []).append((part, name))
        result = apply(module, *arguments, **named)
        for (first, name), *others in places.values():
            for part, its in others:
                part._parameters[its] = first._parameters[name]
        return result

    return moved
