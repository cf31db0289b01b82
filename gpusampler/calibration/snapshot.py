"""Save the state that a training step changes, and restore it exactly afterwards."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpusampler.core.devices import loaded_module
from gpusampler.core.text import short_repr

_PLAIN_TYPES = (bool, int, float, str, type(None))
Restorer = Callable[[], None]


class StateSnapshot:
    """Host copies of the state of objects (see `check_state`) and of all global generators."""

    def __init__(self, objects: Sequence[Any]) -> None:
        self._restorers: list[Restorer] = []
        for index, obj in enumerate(objects):
            try:
                self._restorers.append(_saver_of(obj)(obj))
            except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                raise TypeError(
                    f"cannot copy state[{index}] ({type(obj).__name__}): {error}. Pass an object "
                    "whose state_dict() can be copied."
                ) from error
        # Restored last, so that restoring the objects cannot advance the generators.
        self._restorers.append(_save_global_generators())

    def restore(self) -> None:
        """Restore all saved state; may be called repeatedly."""
        for restore in self._restorers:
            restore()


def check_state(objects: Any) -> tuple[Any, ...]:
    """Return the objects as a tuple; raise if one cannot be restored."""
    if not isinstance(objects, (tuple, list)):
        raise TypeError(
            f"state must be a tuple such as (model, optimizer), got {short_repr(type(objects))}"
        )
    for index, obj in enumerate(objects):
        if _saver_of(obj) is None:
            raise TypeError(
                f"state[{index}] must have state_dict() and load_state_dict(), or be a tensor or a "
                f"random generator, got {short_repr(obj)}"
            )
    torch = loaded_module("torch")
    for index, obj in enumerate(objects):
        if torch is None or not isinstance(obj, torch.nn.Module):
            continue
        if any(map(torch.nn.parameter.is_lazy, obj.parameters())):
            raise ValueError(
                f"state[{index}] has uninitialized lazy parameters. Run one forward pass first."
            )
    return tuple(objects)


def tensors_of(objects: Sequence[Any]) -> Iterator[Any]:
    """Yield the tensors among the objects, and those of modules and optimizers."""
    torch = loaded_module("torch")
    if torch is None:
        return
    for obj in objects:
        if isinstance(obj, torch.Tensor):
            yield obj
        elif isinstance(obj, torch.nn.Module):
            yield from obj.parameters()
            yield from obj.buffers()
        elif isinstance(obj, torch.optim.Optimizer):
            for group in obj.param_groups:
                yield from group["params"]


def _saver_of(obj: Any) -> Any:
    """Return the function that saves an object; None if there is none."""
    torch = loaded_module("torch")
    savers: list[tuple[Any, Callable[[Any], Restorer]]] = [
        (np.random.Generator, _save_numpy_generator),
        (random.Random, _save_python_generator),
    ]
    if torch is not None:
        savers += [
            (torch.nn.Module, _save_module),
            (torch.optim.Optimizer, _save_optimizer),
            (torch.Tensor, _save_tensor),
            (torch.Generator, _save_torch_generator),
        ]
    for saved_type, saver in savers:
        if isinstance(obj, saved_type):
            return saver
    has_state = all(
        callable(getattr(obj, name, None)) for name in ("state_dict", "load_state_dict")
    )
    return _save_state_dict if has_state else None


class _TensorCopy:
    """A tensor's values on the host, and its device."""

    def __init__(self, tensor: Any) -> None:
        self._values = tensor.detach().cpu().clone()
        self._device = tensor.device

    def restore(self, tensor: Any) -> Any:
        """Return a tensor with the saved values.

        This is ``tensor`` itself if its shape, dtype and device match, else a new tensor.
        """
        import torch

        values = self._values
        if (
            isinstance(tensor, torch.Tensor)
            and tensor.shape == values.shape
            and (tensor.dtype, tensor.layout) == (values.dtype, values.layout)
            and tensor.device == self._device
        ):
            # .data allows an in-place copy into leaves and keeps it out of the autograd graph.
            tensor.data.copy_(values)
            return tensor
        return values.to(self._device, copy=True)


def _save_value(value: Any) -> Any:
    torch = loaded_module("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _TensorCopy(value)
    if type(value) in (list, tuple):
        return type(value)(_save_value(item) for item in value)
    if isinstance(value, dict):
        # Subclasses of dict become plain dicts: load_state_dict only reads their items.
        return {key: _save_value(item) for key, item in value.items()}
    return copy.deepcopy(value)


def _restore_value(saved: Any, current: Any) -> Any:
    """Return a value that `_save_value` saved, reusing the current tensors that match."""
    if isinstance(saved, _TensorCopy):
        return saved.restore(current)
    if type(saved) in (list, tuple):
        matches = type(current) is type(saved) and len(current) == len(saved)
        items = current if matches else [None] * len(saved)
        return type(saved)(_restore_value(*pair) for pair in zip(saved, items, strict=True))
    if type(saved) is dict:
        values = current if isinstance(current, dict) else {}
        return {key: _restore_value(item, values.get(key)) for key, item in saved.items()}
    return copy.deepcopy(saved)


def _save_tensor(tensor: Any) -> Restorer:
    values, requires_grad = _TensorCopy(tensor), tensor.requires_grad
    # Copy the gradient: a reference would keep its memory after the step drops it.
    grad = _TensorCopy(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None

    def restore() -> None:
        restored = values.restore(tensor)
        if restored is not tensor:
            tensor.data = restored
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)
            tensor.grad = None if grad is None else grad.restore(tensor.grad)

    return restore


def _save_module(module: Any) -> Restorer:
    submodules = list(module.modules())
    tensors = {
        id(tensor): tensor
        for submodule in submodules
        for tensor in (*submodule._parameters.values(), *submodule._buffers.values())
        if tensor is not None
    }
    restorers = [*map(_save_submodule, submodules), *map(_save_tensor, tensors.values())]

    def restore() -> None:
        for restorer in restorers:
            restorer()

    return restore


def _save_submodule(module: Any) -> Restorer:
    import torch

    training = module.training
    members = [(member, dict(member)) for member in (module._parameters, module._buffers)]
    has_extra = type(module).get_extra_state is not torch.nn.Module.get_extra_state
    extra = _save_value(module.get_extra_state()) if has_extra else None

    def restore() -> None:
        module.training = training
        for member, saved in members:
            member.clear()
            member.update(saved)
        if has_extra:
            module.set_extra_state(_restore_value(extra, None))

    return restore


def _save_optimizer(optimizer: Any) -> Restorer:
    # load_state_dict would cast the state to the dtype of the parameters.
    state = {parameter: _save_value(dict(values)) for parameter, values in optimizer.state.items()}
    groups = [
        (
            group,
            list(group["params"]),
            _save_value({k: v for k, v in group.items() if k != "params"}),
        )
        for group in optimizer.param_groups
    ]
    plain = _plain_attributes(optimizer)

    def restore() -> None:
        for parameter in [current for current in optimizer.state if current not in state]:
            del optimizer.state[parameter]
        for parameter, saved in state.items():
            optimizer.state[parameter] = _restore_value(saved, optimizer.state.get(parameter))
        optimizer.param_groups[:] = [group for group, _, _ in groups]
        for group, parameters, options in groups:
            settings = _restore_value(options, dict(group))
            group.clear()
            group.update(params=parameters, **settings)
        for name in _plain_attributes(optimizer).keys() - plain.keys():
            del vars(optimizer)[name]
        vars(optimizer).update(plain)

    return restore


def _plain_attributes(obj: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(obj).items() if isinstance(value, _PLAIN_TYPES)}


def _save_state_dict(obj: Any) -> Restorer:
    state = _save_value(obj.state_dict())

    def restore() -> None:
        # After an interrupted step, a GradScaler still records the gradients as unscaled.
        optimizer_states = getattr(obj, "_per_optimizer_states", None)
        if optimizer_states is not None:
            optimizer_states.clear()
        obj.load_state_dict(_restore_value(state, None))

    return restore


def _save_torch_generator(generator: Any) -> Restorer:
    state = generator.get_state().clone()
    return lambda: generator.set_state(state)


def _save_numpy_generator(generator: Any) -> Restorer:
    state = copy.deepcopy(generator.bit_generator.state)
    return lambda: setattr(generator.bit_generator, "state", state)


def _save_python_generator(generator: Any) -> Restorer:
    state = generator.getstate()
    return lambda: generator.setstate(state)


def _save_global_generators() -> Restorer:
    # NumPy's legacy global generator must be saved, too.
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch: Any = loaded_module("torch")
    host_state = None if torch is None else torch.get_rng_state()
    has_cuda = torch is not None and torch.cuda.is_initialized()
    cuda_states = torch.cuda.get_rng_state_all() if has_cuda else None

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        if torch is not None:
            torch.set_rng_state(host_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)

    return restore
