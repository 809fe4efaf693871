"""Record what a module does when it runs. No graph is built, so its forward may be any Python code.

Hooks record the inputs and outputs of modules; a function mode records which functions read those tensors,
and a dispatch mode below it every product, whatever computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

CONVOLUTIONS = (
    nn.functional.linear,
    *(getattr(torch, f"conv{kind}{rank}d") for kind in ("", "_transpose") for rank in (1, 2, 3)),
)
ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(kw_only=True)
class Call:
    """One call of a module."""

    name: str
    start: int  # counts calls and functions
    end: int = -1
    x: Any = None  # the first argument
    alone: bool = True  # whether there were no other arguments
    y: Any = None
    convolutions: list[tuple[Any, ...]] = field(default_factory=list)  # weight and bias of each in it
    weights: tuple[Any, ...] = ()  # weight and bias of the one convolution in it, if there was one
    convolved: Any = (
        None  # copies of input and output, which later operations cannot change, if there was one
    )


@dataclass(frozen=True)
class Use:
    """A function that read a tensor."""

    at: int
    name: str
    arguments: tuple[Any, ...]  # all of them, named ones at the end


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product, as PyTorch's own operators computed it."""

    at: int
    module: str  # the innermost one that ran
    function: str  # that was called in it
    macs: int
    parameters: frozenset[str]  # that it read


class Trace(TorchFunctionMode):
    """One forward pass: every module's calls, the functions that read the modules' outputs, all products."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.products: list[Product] = []
        self._function = ""  # that runs
        self._now = 0
        self._uses: dict[int, list[Use]] = {}  # by tensors' ids; `calls` keeps these tensors
        self._changed: set[int] = set()
        self._open: list[Call] = []

    @classmethod
    def of(cls, root: nn.Module, run: Callable[[], Any]) -> tuple[Trace, Any]:
        """Trace ``run``, which calls ``root``; return its result, too."""
        trace = cls()
        with hooked(root, trace._enter, trace._leave), trace, _Products(trace._add_product, root):
            return trace, run()

    def uses(self, tensor: torch.Tensor) -> list[Use]:
        """The functions that read a module's output."""
        return self._uses.get(id(tensor), [])

    def _enter(self, name: str, arguments: tuple[Any, ...]) -> None:
        self._now += 1
        x = arguments[0] if arguments else None
        self._open.append(Call(name=name, start=self._now, x=x, alone=len(arguments) == 1))

    def _leave(self, name: str, arguments: tuple[Any, ...], output: Any) -> None:
        self._now += 1
        call = self._open.pop()
        call.end, call.y = self._now, output
        if len(call.convolutions) == 1 and isinstance(call.x, torch.Tensor):
            (call.weights,), call.convolved = call.convolutions, (call.x.clone(), output.clone())
        self.calls.append(call)
        if isinstance(output, torch.Tensor):
            self._uses.setdefault(id(output), [])

    def _add_product(self, operator: str, macs: int, parameters: frozenset[str]) -> None:
        module = self._open[-1].name if self._open else ""
        self.products.append(Product(self._now, module, self._function or operator, macs, parameters))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        self._function = getattr(func, "__name__", "").partition(".")[0]
        output = func(*args, **named)
        self._function = ""
        self._now += 1
        if func in CONVOLUTIONS and self._open:
            numbers = (*args[1:3], *(named.get(name) for name in ("weight", "bias")[max(len(args) - 1, 0) :]))
            self._open[-1].convolutions.append(numbers)
        if next(tensors(output), None) is None:
            return output  # it read a shape or the like
        for tensor in tensors((args, kwargs)):
            if id(tensor) in self._uses and id(tensor) not in self._changed:
                self._uses[id(tensor)].append(
                    Use(self._now, getattr(func, "__name__", ""), (*args, *named.values()))
                )
                if tensor is output:  # in place: the values are others now
                    self._changed.add(id(tensor))
        return output


class _Products(TorchDispatchMode):
    """Reports the MACs of every operator that multiplies, and the parameters that it reads."""

    def __init__(self, report: Callable[[str, int, frozenset[str]], None], root: nn.Module) -> None:
        super().__init__()
        self._report = report
        self._names = {_place(parameter): name for name, parameter in root.named_parameters()}
        self._names.pop(0, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        output = func(*args, **named)
        operator = func.overloadpacket
        if operator in _RECURRENT:
            macs = _RECURRENT[operator](*args)
        elif operator in flop_registry:
            macs = flop_registry[operator](*args, **named, out_val=output) // 2
        elif operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            macs = sdpa_flop_count(*(tensor.shape for tensor in args[:3])) // 2
        else:
            return output
        read = frozenset(self._names[p] for p in map(_place, tensors((args, kwargs))) if p in self._names)
        self._report(operator.__name__, macs, read)
        return output


def _place(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers are in memory; 0 if it has none there, or not in one place."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse ones, and some subclasses
        return 0


def _recurrent(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> int:
    """MACs of some recurrent layers on (t, n, c), all weights (·, ·) once per step."""
    return math.prod(x.shape[:2]) * sum(weight.numel() for weight in weights if weight.ndim == 2)


# operators whose floating-point operations PyTorch does not count
_RECURRENT: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mkldnn_rnn_layer: lambda x, *rest: _recurrent(x, rest[:2]),
    torch.ops.aten._cudnn_rnn: lambda x, weights, *rest: _recurrent(x, weights),
}


class StopForward(BaseException):
    """Unwinds a forward pass that is no longer needed; not an Exception, which modules may catch."""


def _ignore(*arguments: Any) -> None:
    pass


def _call(
    function: Callable[..., None], name: str, module: nn.Module, args: Any, named: Any, *output: Any
) -> None:
    """Forward a hook's call to a function that takes the module's name."""
    function(name, (*args, *named.values()), *output)


@contextmanager
def hooked(
    root: nn.Module,
    before: Callable[[str, tuple[Any, ...]], None] = _ignore,
    after: Callable[[str, tuple[Any, ...], Any], None] = _ignore,
    names: Container[str] | None = None,
) -> Iterator[None]:
    """Call functions before and after some modules' forward passes; the hooks are removed at the end.

    They take the module's name and its arguments, named ones at the end; ``after`` takes the output as well.
    Without ``names`` all modules are meant.
    """
    with ExitStack() as stack:
        for name, module in root.named_modules():
            if names is not None and name not in names:
                continue
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            enter, leave = partial(_call, before, name), partial(_call, after, name)
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        yield


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a nest of containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors([getattr(value, entry.name) for entry in fields(value)])
    elif isinstance(value, list | tuple | set):
        yield from chain.from_iterable(map(tensors, value))
