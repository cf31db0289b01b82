"""What a training step changes, copied to the host, and put back bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpusampler.core import devices as devices_module
from gpusampler.core.text import shown

_PLAIN = (bool, int, float, str, type(None))


class StateSnapshot:
    """Copies of objects' state on the host, and of all random generators.

    Parameters
    ----------
    objects : sequence
        What `check_state` lets through.

    Raises
    ------
    TypeError
        If the state of one cannot be copied.
    """

    def __init__(self, objects: Sequence[Any]) -> None:
        self._puts: list[Callable[[], None]] = []
        for place, one in enumerate(objects):
            try:
                self._puts.append(_keeper(one)(one))
            except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                raise TypeError(
                    f"state[{place}] must be something that can be copied, got a "
                    f"{type(one).__name__}: {error}"
                ) from error
        # Last, so that nothing that is put back draws from them.
        self._puts.append(_keep_generators())

    def put_back(self) -> None:
        """Make everything what it was; as often as one likes."""
        for put in self._puts:
            put()


def check_state(objects: Any) -> tuple[Any, ...]:
    """Return the objects whose state is to be put back.

    Raises
    ------
    TypeError
        If they are no tuple or list, or one is of a kind whose state cannot be had.
    ValueError
        If a module's parameters are not there yet.
    """
    if not isinstance(objects, (tuple, list)):
        raise TypeError(
            f"state must be a tuple such as (model, optimizer), got {shown(type(objects))}"
        )
    for place, one in enumerate(objects):
        if _keeper(one) is None:
            raise TypeError(
                f"state[{place}] must have state_dict() and load_state_dict(), or be a tensor or a "
                f"random generator, to be put back, got {shown(one)}"
            )
    torch = devices_module.loaded("torch")
    for place, one in enumerate(objects):
        if torch is not None and isinstance(one, torch.nn.Module):
            for name, parameter in one.named_parameters():
                if torch.nn.parameter.is_lazy(parameter):
                    raise ValueError(
                        f"state[{place}] must have its parameters, got {name}, which its first "
                        "batch makes: run the model once before"
                    )
    return tuple(objects)


def tensors_of(objects: Sequence[Any]) -> Iterator[Any]:
    """Yield the tensors that modules and optimizers work on."""
    torch = devices_module.loaded("torch")
    if torch is None:
        return
    for one in objects:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, torch.nn.Module):
            yield from one.parameters()
            yield from one.buffers()
        elif isinstance(one, torch.optim.Optimizer):
            for group in one.param_groups:
                yield from group["params"]


def _keeper(one: Any) -> Any:
    """Return what keeps an object of some kind, None if nothing does."""
    torch = devices_module.loaded("torch")
    if torch is not None:
        kinds: tuple[tuple[Any, Any], ...] = (
            (torch.nn.Module, _keep_module),
            (torch.optim.Optimizer, _keep_optimizer),
            (torch.Tensor, _keep_tensor),
            (torch.Generator, _keep_torch_generator),
        )
        for kind, keeper in kinds:
            if isinstance(one, kind):
                return keeper
    if isinstance(one, np.random.Generator):
        return _keep_numpy_generator
    if isinstance(one, random.Random):
        return _keep_python_generator
    if callable(getattr(one, "state_dict", None)) and callable(
        getattr(one, "load_state_dict", None)
    ):
        return _keep_by_state_dict
    return None


class _Copy:
    """A tensor's values on the host, and where they are from."""

    def __init__(self, tensor: Any) -> None:
        self._host = tensor.detach().cpu().clone()
        self._device = tensor.device

    def into(self, tensor: Any) -> Any:
        """Return a tensor of these values: the one given, if it has room for them."""
        torch = devices_module.loaded("torch")
        assert torch is not None
        host = self._host
        if (
            isinstance(tensor, torch.Tensor)
            and (tensor.shape, tensor.dtype, tensor.layout) == (host.shape, host.dtype, host.layout)
            and tensor.device == self._device
        ):
            # Of .data: in place, whatever autograd thinks of leaves, and in no history.
            tensor.data.copy_(host)
            return tensor
        return host.to(self._device, copy=True)


def _copied(value: Any) -> Any:
    torch = devices_module.loaded("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _Copy(value)
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, dict):
        # A dict of any kind becomes a plain one: who loads a state looks into it only.
        return {key: _copied(item) for key, item in value.items()}
    return copy.deepcopy(value)


def _restored(kept: Any, now: Any) -> Any:
    """Return what `_copied` kept, in the tensors that are there now where those fit."""
    if isinstance(kept, _Copy):
        return kept.into(now)
    if type(kept) in (list, tuple):
        alike = type(now) is type(kept) and len(now) == len(kept)
        places = now if alike else [None] * len(kept)
        return type(kept)(_restored(*pair) for pair in zip(kept, places, strict=True))
    if type(kept) is dict:
        there = now if isinstance(now, dict) else {}
        return {key: _restored(item, there.get(key)) for key, item in kept.items()}
    return copy.deepcopy(kept)


def _keep_tensor(tensor: Any) -> Callable[[], None]:
    values, needs_grad = _Copy(tensor), tensor.requires_grad
    # No reference to the gradient itself: it would be held on where the step drops it.
    grad = _Copy(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None

    def put() -> None:
        now = values.into(tensor)
        if now is not tensor:
            tensor.data = now
        if tensor.is_leaf:
            tensor.requires_grad_(needs_grad)
            tensor.grad = None if grad is None else grad.into(tensor.grad)

    return put


def _keep_module(module: Any) -> Callable[[], None]:
    puts: list[Callable[[], None]] = []
    seen: set[int] = set()
    for part in module.modules():
        puts.append(_keep_part(part))
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                puts.append(_keep_tensor(tensor))

    def put() -> None:
        for one in puts:
            one()

    return put


def _keep_part(part: Any) -> Callable[[], None]:
    torch = devices_module.loaded("torch")
    assert torch is not None
    training = part.training
    tables = [(table, dict(table)) for table in (part._parameters, part._buffers)]
    extra = None
    has_extra = type(part).get_extra_state is not torch.nn.Module.get_extra_state
    if has_extra:
        extra = _copied(part.get_extra_state())

    def put() -> None:
        part.training = training
        for table, was in tables:
            table.clear()
            table.update(was)
        if has_extra:
            part.set_extra_state(_restored(extra, None))

    return put


def _keep_optimizer(optimizer: Any) -> Callable[[], None]:
    # Not by load_state_dict, which casts what it is given to the type of the parameters.
    state = {parameter: _copied(dict(kept)) for parameter, kept in optimizer.state.items()}
    groups = [
        (group, list(group["params"]), _copied({k: v for k, v in group.items() if k != "params"}))
        for group in optimizer.param_groups
    ]
    plain = {key: value for key, value in vars(optimizer).items() if isinstance(value, _PLAIN)}

    def put() -> None:
        for parameter in [there for there in optimizer.state if there not in state]:
            del optimizer.state[parameter]
        for parameter, kept in state.items():
            optimizer.state[parameter] = _restored(kept, optimizer.state.get(parameter))
        optimizer.param_groups[:] = [group for group, _, _ in groups]
        for group, parameters, rest in groups:
            settings = _restored(rest, dict(group))
            group.clear()
            group.update(params=parameters, **settings)
        there = vars(optimizer)
        for key in [k for k, v in there.items() if isinstance(v, _PLAIN) and k not in plain]:
            del there[key]
        there.update(plain)

    return put


def _keep_by_state_dict(one: Any) -> Callable[[], None]:
    kept = _copied(one.state_dict())

    def put() -> None:
        # A step that ended half way leaves a GradScaler's gradients unscaled, in its own books.
        books = getattr(one, "_per_optimizer_states", None)
        if books is not None:
            books.clear()
        one.load_state_dict(_restored(kept, None))

    return put


def _keep_torch_generator(generator: Any) -> Callable[[], None]:
    kept = generator.get_state().clone()
    return lambda: generator.set_state(kept)


def _keep_numpy_generator(generator: Any) -> Callable[[], None]:
    kept = copy.deepcopy(generator.bit_generator.state)

    def put() -> None:
        generator.bit_generator.state = kept

    return put


def _keep_python_generator(generator: Any) -> Callable[[], None]:
    kept = generator.getstate()
    return lambda: generator.setstate(kept)


def _keep_generators() -> Callable[[], None]:
    # NumPy's old generator, the global one, is what is asked for.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch: Any = devices_module.loaded("torch")
    host = None if torch is None else torch.get_rng_state()
    there = torch is not None and torch.cuda.is_initialized()
    devices = torch.cuda.get_rng_state_all() if there else None

    def put() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if torch is not None:
            torch.set_rng_state(host)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)

    return put
