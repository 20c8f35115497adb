"""Launching Triton kernels: what a specialisation needs is worked out once, and then found by one dictionary look-up.

`triton.JITFunction.run` binds, specialises and formats its arguments again on every call, which at the widths of small
transformers costs more time than the kernel itself. A Kernel does so only for what it has not seen yet.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from . import configs, tune
from .configs import Config

_MISALIGNED = 15  # pointers are told to Triton to be multiples of 16 bytes, or not to be
_INT32_MAX = 2**31 - 1
driver = triton.runtime.driver
_hooks = knobs.runtime


class _Prepared(NamedTuple):
    """A compiled kernel and what each launch of it passes on."""

    compiled: triton.compiler.CompiledKernel
    config: Config
    run: Callable  # loads the kernel and launches it
    constants: tuple


class Kernel:
    """A Triton function with its configurations, and its launches prepared.

    The function's parameters come in three groups: tensors and numbers; constants; the names of its configurations'
    blocks. Integers are specialised as Triton does (by 1, and by divisibility by 16) unless the function's decorator
    says otherwise (`do_not_specialize`, then with an annotation of the type).

    function: the triton.jit function. name: its entry in the tables of configs. problem: the names of the values that
    its configuration is chosen by.
    """

    def __init__(self, function: triton.JITFunction, name: str, problem: tuple[str, ...] = ()):
        self.function, self.name, self.problem = function, name, problem
        params = [param for param in function.params if not param.is_constexpr]
        self._free = tuple(i for i, param in enumerate(params) if not param.do_not_specialize)
        self._prepared: dict[tuple, _Prepared] = {}
        self._configs: dict[tuple, Config] = {}
        self._forced: Config | None = None
        KERNELS[name] = self

    def __call__(
        self,
        grid: Callable[[dict[str, int]], tuple[int, ...]],
        args: tuple[Tensor | int | float | None, ...] | Callable[[dict[str, int]], tuple],
        constants: tuple = (),
        problem: tuple[int, ...] = (),
    ) -> None:
        """Launches on the current stream of the first tensor's device.

        grid: of the configuration's blocks, the number of programs along up to three axes; nothing is launched where
        one is 0. args, constants: in the order of the function's parameters; args may be a function of the
        configuration's blocks. problem: the values by which a configuration is chosen, in the order of their names.
        """
        args_of = None
        if callable(args):
            config = self.config(problem)
            args_of, args = args, args(config.blocks)
        active = driver.active
        device = active.get_current_device()
        place = args[0].get_device()
        if place != device and place >= 0 and args[0].is_cuda:
            with torch.cuda.device(place):
                return self(grid, args_of or args, constants, problem)
        key, addresses = [device, constants, problem], 0
        for i in self._free:
            arg = args[i]
            if isinstance(arg, Tensor):
                key.append(arg.dtype)
                addresses |= arg.data_ptr()
            elif isinstance(arg, int):
                key.append((arg == 1, arg % 16 == 0, abs(arg) > _INT32_MAX))
            else:
                key.append(None)
        if addresses & _MISALIGNED:
            key += [arg.data_ptr() & _MISALIGNED == 0 for arg in args if isinstance(arg, Tensor)]
        key = tuple(key)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = self._prepare(grid, args, args_of, constants, problem)
        if args_of is not None and prepared.config is not config:  # it has just been tuned
            args = args_of(prepared.config.blocks)
        self._launch(prepared, grid, args, active.get_current_stream(device))

    def config(self, problem: tuple[int, ...]) -> Config:
        """The configuration that a launch on the current device would have."""
        key = driver.active.get_current_device(), problem
        known = self._configs.get(key)
        if known is None:
            values = dict(zip(self.problem, problem, strict=True))
            is_forced = self._forced is not None and self._forced.fits(values)
            known = self._forced if is_forced else configs.choose(self.name, current_arch(), values)
            self._configs[key] = known
        return known

    @contextlib.contextmanager
    def using(self, config: Config) -> Iterator[None]:
        """Within this context every launch that the configuration is meant for has it."""
        before = self._forced, self._prepared, self._configs
        self._forced, self._prepared, self._configs = config, {}, {}
        try:
            yield
        finally:
            self._forced, self._prepared, self._configs = before

    def forget(self) -> None:
        """Prepares every launch anew, as after a change of driver or of tuned configurations."""
        self._prepared.clear()
        self._configs.clear()

    def _launch(self, prepared: _Prepared, grid: Callable, args: tuple, stream: int) -> None:
        sizes = grid(prepared.config.blocks)
        if 0 in sizes:
            return
        x, y, z = (*sizes, 1, 1)[:3]
        compiled = prepared.compiled
        if _hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls:
            compiled[x, y, z](*args, *prepared.constants, stream=stream)  # a profiler listens
        else:
            prepared.run(
                x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *args, *prepared.constants,
            )  # fmt: skip

    def _prepare(
        self, grid: Callable, args: tuple, args_of: Callable | None, constants: tuple, problem: tuple[int, ...]
    ) -> _Prepared:
        _load_tuned()
        if self._forced is None and tune.wanted() and not torch.cuda.is_current_stream_capturing():
            given = args_of or (lambda blocks: args)
            self._tune(grid, given, constants, dict(zip(self.problem, problem, strict=True)))
        return self._compile(self.config(problem), args, constants)

    def _tune(self, grid: Callable, args_of: Callable, constants: tuple, problem: dict[str, int]) -> None:
        """Finds the fastest configuration for the problem, unless it is known; launching is free of side effects."""
        arch = current_arch()
        candidates = configs.candidates(self.name, arch, problem)
        if len(candidates) == 1 or (self.name, arch, tuple(problem.items())) in configs.tuned:
            return
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        prepared = {}

        def run(config: Config) -> None:
            if config not in prepared:
                args = args_of(config.blocks)
                prepared[config] = self._compile(config, args, constants), args
            self._launch(prepared[config][0], grid, prepared[config][1], stream)

        best, _ = tune.fastest(candidates, run, active.get_device_interface().synchronize)
        tune.save(self.name, arch, problem, best)
        self._configs.clear()

    def _compile(self, config: Config, args: tuple, constants: tuple) -> _Prepared:
        names = [param.name for param in self.function.params][len(args) + len(constants) :]
        constants = (*constants, *(config.blocks[name] for name in names))
        compiled = self.function.warmup(
            *args, *constants, grid=(1,),
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
        return _Prepared(compiled, config, compiled.run, constants)


_load_tuned = functools.cache(tune.load)

# Every kernel by its name in the tables: what is compiled for all architectures, and what is tuned.
KERNELS: dict[str, Kernel] = {}


def forget() -> None:
    """Prepares every kernel's launches anew."""
    for kernel in KERNELS.values():
        kernel.forget()


def current_arch() -> str:
    """The architecture that kernels are compiled for now, as the tables name it: sm_90, gfx942."""
    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def processors(device: torch.device) -> int:
    """How many multiprocessors a device has: the programs of a persistent grid."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def block_of(width: int) -> int:
    """The power of two that a row of this width fits in, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor as one block of memory, in the order of its dims."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()
