"""Keeps what inference makes of parameters, such as a weight in another layout or dtype, and makes it anew once a parameter changes."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Made = TypeVar("Made")
_PLAIN = (Tensor, torch.nn.Parameter)
_is_freed = torch.UntypedStorage._expired
#: How many of a kind are kept for one parameter: one for each size of image, say.
LIMIT = 8


class _Kept:
    """What was made of a tensor as it was then."""

    def __init__(self, source: Tensor):
        number = id(source)
        self.source = weakref.ref(source, lambda _: _KEPT.pop(number, None))
        self.version, self.address, self.dtype = source._version, source.data_ptr(), source.dtype
        # Of memory that was freed, another tensor may have the address. While a weak reference is held, no storage is taken for another.
        self.storage = StorageWeakRef(source.untyped_storage())
        self.made: dict[Hashable, Any] = {}

    def holds(self, source: Tensor) -> bool:
        """Whether that tensor is still what it was."""
        return (
            self.version == source._version
            and self.address == source.data_ptr()
            and self.dtype is source.dtype
            and self.source() is source
            and not _is_freed(self.storage.cdata)
        )


#: By `id`. None of it belongs to a module: a state_dict, a copy or a pickle of one knows nothing of it.
_KEPT: dict[int, _Kept] = {}


def derived(source: Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
    """`make()`, kept under `key` for as long as `source` lives and holds what it holds.

    A write is seen by PyTorch's count of writes, or by other memory: `load_state_dict`, an optimizer, `copy_`, `to`, `p.data = …`. A
    write through `p.data`, such as `p.data.mul_(2)`, PyTorch does not count, and this does not see. Of a tensor that was made in inference
    mode no writes are counted: nothing is kept. What is made must not be `source` itself, which would then live for ever.
    """
    if source.is_inference() or type(source) not in _PLAIN:
        return make()
    kept = _KEPT.get(id(source))
    if kept is None or not kept.holds(source):
        kept = _KEPT[id(source)] = _Kept(source)
    made = kept.made
    try:
        return made[key]
    except KeyError:
        with torch.inference_mode(False), torch.no_grad():  # so that writes to what was made are counted in turn
            result = make()
    if len(made) >= LIMIT:
        made.pop(next(iter(made)), None)  # the oldest
    made[key] = result
    return result
