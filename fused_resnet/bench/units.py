"""Layers of a model as its operators see them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

OUTSIDE = "loss"  #: the unit of what runs outside the model


class Units:
    """Which part of a model an operator belongs to: a convolution with the norm, the activation and the addition behind it, a pool, ….

    A unit is called after its first module. Of a model that calls its modules, an operator belongs to the unit of the module that is
    being called; what no unit claims, such as an activation or an addition, belongs to the unit before it. An operator that stands for
    several modules, as a fused one does, belongs to the unit whose parameters it reads.
    """

    def __init__(self, model: nn.Module):
        self._units: dict[nn.Module, str] = {}
        self._owners: dict[int, str] = {}
        self._pools: dict[str, str] = {}
        before = None
        for name, module in model.named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if own:
                follows = "Norm" in type(module).__name__ and "Conv" in type(before).__name__
                self._units[module] = self._units[before] if follows else name
                self._owners |= {t.data_ptr(): self._units[module] for t in own if not isinstance(t, FakeTensor)}
                before = module
            elif kind := next((k for k in ("MaxPool", "AvgPool") if k in type(module).__name__), None):
                self._units[module] = name
                self._pools[f"{kind[:3].lower()}_pool"] = name
        self.called: list[str] = []
        self.last = OUTSIDE

    def parameters(self) -> dict[str, int]:
        """Trained numbers of each unit; what several share counts to the first."""
        found, counted = dict.fromkeys(self._units.values(), 0), set()
        for module, unit in self._units.items():
            for p in module.parameters(recurse=False):
                if p.requires_grad and id(p) not in counted:
                    found[unit] += p.numel()
                    counted.add(id(p))
        return found

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, calls of the model's modules are seen.

        Not by hooks, nor by another `nn.Module.__call__`: a block whose modules are hooked is not fused, and none is while PyTorch's
        classes are changed. So what `__call__` calls is changed.
        """
        original = nn.Module._call_impl

        def call(module, *args, **kwargs):
            if module not in self._units:
                return original(module, *args, **kwargs)
            self.called.append(self._units[module])
            try:
                return original(module, *args, **kwargs)
            finally:
                self.called.pop()

        nn.Module._call_impl = call
        try:
            yield
        finally:
            nn.Module._call_impl = original

    def of(self, function: torch._ops.OpOverload, inputs: Iterable[Tensor]) -> str:
        """The unit of an operator that runs now, in forward."""
        if self.called:
            self.last = self.called[-1]
        elif pool := next((name for kind, name in self._pools.items() if kind in function._schema.name), None):
            self.last = pool
        elif self._owners:
            # Convolutions' weights may have been cast; norms' vectors never are.
            self.last = next((unit for t in inputs if (unit := self._owners.get(t.data_ptr()))), self.last)
        return self.last
