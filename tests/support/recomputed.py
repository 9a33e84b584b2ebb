"""Steps of networks whose blocks make their activations again."""

import gc

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_resnet
from support.small import SIZE

#: (backend, dtype): where the framework's convolution or our kernels run, on a CPU. Each gives the same bits every time.
WAYS = [("eager", torch.float64), ("passes_triton", torch.float32), ("triton", torch.float32)]


def images(dtype=torch.float64, size=SIZE):
    return torch.randn(size, dtype=dtype)


def loss_of(model, x, backend):
    with fused_resnet.backend(backend):
        out = model(x)
    return F.cross_entropy(out, torch.arange(len(x)) % 5) if out.dim() == 2 else out.float().square().mean()


class Alive(TorchDispatchMode):
    """Bytes of what was made inside and is still held, but for `known` tensors."""

    sees_fused_operators = True

    def __init__(self, *known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self):
        return sum(size for key, (storage, size) in self.made.items() if key not in self.known and not storage.expired())


def held(model, x, backend="eager"):
    """(bytes that the graph holds after a forward, its loss)."""
    with Alive(x, *model.parameters(), *model.buffers()) as alive:
        loss = loss_of(model, x, backend)
    gc.collect()  # the interpreter's own circles
    return alive.bytes(), loss
