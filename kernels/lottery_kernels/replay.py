"""Functions of tensors, as whole training steps, recorded once and then replayed: the operators that they came to,
called again without the Python that called them and without autograd.

It is on a CPU what a CUDA graph is on a GPU. A step of a small sparse net is over sooner than PyTorch has found out
what to do: the modules' calls, autograd's nodes, the optimizer's loops. What they decide is the same in every step.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .stepped import Stepped

CALLS_BEFORE = 2  # that run as they are: a first one may do more than the others, as make an optimizer's state
PROGRAMS = 8  # kept at most: one a kind of input
LEAVING = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}

_exchanges = 0  # of layers or their arrays, so far


def forget() -> None:
    """Has every :class:`Replayed` begin anew: for where layers, or arrays that programs hold, are exchanged."""
    global _exchanges
    _exchanges += 1


class Replayed:
    """A function of tensors that from its third call on is replayed: the same operators on the same memory.

        step = Replayed(step)  # step(x, target): zero_grad, forward, backward, update; returns the loss
        for x, target in batches:
            loss = step(x, target)

    The first two calls run as they are, the third is recorded while it runs, and later ones replay it, to the same
    bits. That holds for inputs of one kind (shapes, strides, types, `requires_grad`), with gradients and autocast on or
    off as they were; for another kind, as a last, smaller batch, they begin anew.

    Tensors that the function reaches otherwise, as parameters and an optimizer's state, are read and written where they
    are. Where others take their place, all begins anew after `set_mask`, `sparsify`, the loading of another mask and an
    optimizer's `load_state_dict`; after anything else make a new `Replayed`. All that Python decides is decided when
    the function is recorded: branches, numbers, the mode of a model, random numbers that are not torch's, hooks. `key`
    tells of what may change. Options of an optimizer that takes a step in the function, as its rate, are noticed
    without it; the schedule that sets them is stepped between the calls. Results have no gradient graph, and `.grad` of
    parameters stays what the recorded call left: return the gradients to see them.

    A function that asks for a value (`.item()`), makes shapes from one or talks to other processes is not replayed:
    every call runs as it is, and `refusal` says why.

    Attributes:
        refusal: why nothing is replayed; None if nothing speaks against it so far.
    """

    def __init__(self, function: Callable[..., Any], key: Callable[[], Hashable] = lambda: None) -> None:
        """
        Args:
            function: takes tensors; returns tensors, also in tuples, lists and dicts.
            key: called before every call; for each value that it returns, the function is recorded anew.
        """
        self.function, self.key = function, key
        self.refusal: str | None = None
        self._seen: dict[Hashable, int | Callable[..., Any]] = {}  # kind of call: how often, or its program
        self._stepped = Stepped()
        self._since = _exchanges

    def __call__(self, *inputs: Tensor) -> Any:
        if self._since != _exchanges or self._stepped.reloaded():
            self._since = _exchanges
            self._seen.clear()
            self._stepped.forget()
        options = self._stepped.options()
        kind = (
            self.key(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            *map(_kind, inputs),
            *_same(inputs),
        )
        seen = self._seen.get((options, kind), 0)
        if callable(seen):
            return seen(*inputs)
        if self.refusal is not None:
            return self.function(*inputs)
        if len(self._seen) >= PROGRAMS and (options, kind) not in self._seen:
            self._seen.clear()
        if seen < CALLS_BEFORE:
            with self._stepped.looked_for():
                result = self.function(*inputs)
            self._seen[self._stepped.options(), kind] = seen + 1  # of those that it has met too
            return result
        # Other tensors than those that the function may reach otherwise: what it takes from where must be seen.
        given = [tensor if tensor.requires_grad else tensor.detach() for tensor in inputs]
        recorder = Recorder(given)
        with self._stepped.looked_for(), recorder:
            result = self.function(*given)
        self.refusal = recorder.refusal
        if self.refusal is None and self._stepped.options() == options:
            self._seen[options, kind] = recorder.program(result)
        return result


def is_recording() -> bool:
    """Whether a :class:`Recorder`, and no other mode, looks on: operators are to be chosen as without one."""
    stacks = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    return Recorder.active > 0 and stacks == (Recorder.active, Recorder.active)


class Recorder(TorchDispatchMode):
    """Records the operators called inside of it, below autograd, as a program of assignments.

    Attributes:
        refusal: why what was recorded cannot be replayed; None if it can.
        bound: what names in the program stand for: operators, and values that are the same in every replay.
    """

    active = 0

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.refusal: str | None = None
        self._watch = _Watch(self)
        # Names, not tensors: autograd takes a gradient over only while nobody else holds it, and copies it otherwise.
        self._names = WeakTensorKeyDictionary()
        self._inputs = [f"x{i}" for i in range(len(inputs))]
        for tensor, name in zip(inputs, self._inputs, strict=True):
            self._names[tensor] = name
        self._memory = {_allocation(tensor) for tensor in inputs}  # of inputs and results: not the same in every replay
        self._lasting: set[int] = set()  # allocations that were there before
        self.bound: dict[str, Any] = {}
        self._bound_names: dict[int, str] = {}  # by id of what is bound
        self._lines: list[_Line] = []
        self._variables = 0

    def __enter__(self) -> Recorder:
        Recorder.active += 1
        self._watch.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._watch.__exit__(*error)
        Recorder.active -= 1

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace == "profiler":
            return op(*args, **kwargs)
        if torch.Tag.data_dependent_output in op.tags:
            self.refuse(f"{op} asks for a value")
        if torch.Tag.dynamic_output_shape in op.tags and not _is_indexed_by_numbers(op, args):
            self.refuse(f"{op} asks for a shape that depends on values")
        if "c10d" in op.namespace:
            self.refuse(f"{op} talks to other processes")
        if op is torch.ops.aten.lift_fresh.default:  # of a tensor made from numbers, which the function may write into
            op, args = torch.ops.aten.clone.default, (args[0].clone(),)
            self._bind(args[0])  # it may take the place of a result that is gone
        reads: set[str] = set()
        parts = [self._expression(value, reads) for value in args]
        parts += [f"{name}={self._expression(value, reads)}" for name, value in kwargs.items()]
        result = op(*args, **kwargs)
        if op is torch.ops.aten.detach.default and args[0] in self._names:
            self._names[result] = self._names[args[0]]  # without autograd they are the same
            return result
        results: list[str] = []
        target = self._target(result, results)
        call = self._bind(op._op, str(op).replace(".", "_").replace("::", "_"))
        self._lines.append(_Line(target, results, f"{call}({', '.join(parts)})", reads))
        return result

    def program(self, result: Any) -> Callable[..., Any]:
        """A function of the inputs that does what was recorded and returns what was returned."""
        live: set[str] = set()
        lines = [f"    return {self._expression(result, live)}"]
        for line in reversed(self._lines):
            # A variable lives until its last use, as a tensor does in autograd.
            if dropped := sorted(line.reads - live) + [name for name in line.results if name not in live]:
                lines.append(f"    del {', '.join(dropped)}")
            lines.append(f"    {line.target} = {line.call}" if line.results else f"    {line.call}")
            live |= line.reads
        source = "\n".join([f"def program({', '.join(self._inputs)}):", *reversed(lines)])
        names = dict(self.bound)
        exec(compile(source, "<recorded operators>", "exec"), names)
        program = names["program"]

        def replay(*inputs: Tensor) -> Any:
            with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
                return program(*inputs)

        replay.source = source  # type: ignore[attr-defined]
        return replay

    def refuse(self, why: str) -> None:
        """What is recorded is not to be replayed; the first reason stays."""
        self.refusal = self.refusal or why

    def _expression(self, value: Any, reads: set[str]) -> str:
        """Python that makes `value` when replayed; adds the variables in it to `reads`."""
        inner: set[str] = set()
        match value:
            case Tensor():
                if (name := self._names.get(value)) is not None:
                    reads.add(name)
                    return name
                if id(value) not in self._bound_names:
                    self._check_lasting(value)
                return self._bind(value)
            case builtins.list():
                text = f"[{', '.join(self._expression(part, inner) for part in value)}]"
            case builtins.tuple():
                text = f"({''.join(self._expression(part, inner) + ', ' for part in value)})"
            case builtins.dict():
                parts = (f"{self._bind(key)}: {self._expression(part, inner)}" for key, part in value.items())
                text = f"{{{', '.join(parts)}}}"
            case _:
                return self._bind(value)
        reads |= inner
        return text if inner else self._bind(value)

    def _bind(self, value: Any, name: str = "") -> str:
        """A name for what is the same in every replay; `name` or one that is made."""
        if id(value) not in self._bound_names:
            name = name or f"c{len(self.bound)}"
            self.bound[name], self._bound_names[id(value)] = value, name
        return self._bound_names[id(value)]

    def _check_lasting(self, tensor: Tensor) -> None:
        """A tensor that no recorded operator made was there before, unless it lies where a result does or did."""
        if _allocation(tensor) in self._memory:
            self.refuse("a tensor is used that is neither an input nor an operator's result, but lies where one does")
        self._lasting.add(_allocation(tensor))

    def _target(self, result: Any, names: list[str]) -> str:
        """What an operator's result is assigned to; adds the variables in it to `names`. "_" is what needs none: no
        tensor, or one that has a name or was there before, as what an operator wrote into."""
        if isinstance(result, tuple | list):
            return f"({''.join(self._target(part, names) + ', ' for part in result)})"
        if not isinstance(result, Tensor) or result in self._names or id(result) in self._bound_names:
            return "_"
        name = f"t{self._variables}"
        self._variables += 1
        self._names[result] = name
        if _allocation(result) not in self._lasting:
            self._memory.add(_allocation(result))
        names.append(name)
        return name


class _Watch(TorchFunctionMode):
    """Sees values leave for Python without an operator."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in LEAVING:
            self._recorder.refuse(f"{function.__name__} asks for values")
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Line:
    """A call in a program: what it is assigned to, the variables in that, the call, the variables that it reads."""

    target: str
    results: list[str]
    call: str
    reads: set[str]


def _is_indexed_by_numbers(op: Any, args: Any) -> bool:
    """Whether `op` indexes a tensor by numbers alone: then no shape depends on a value, whatever its tags say."""
    masks = (torch.bool, torch.uint8)
    return op is torch.ops.aten.index.Tensor and not any(one is not None and one.dtype in masks for one in args[1])


def _allocation(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _kind(tensor: Tensor) -> Hashable:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a replayed function takes tensors, got a {type(tensor).__name__}: bind it with partial()")
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _same(inputs: Sequence[Tensor]) -> Sequence[int]:
    """For each input the number of the first that is the same tensor."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id(tensor), i) for i, tensor in enumerate(inputs)]
