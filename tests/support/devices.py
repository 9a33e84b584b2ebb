"""Which tests launch Triton's kernels on whatever device there is: all that launch any must, or they would fail wherever a GPU is.

Without a GPU the interpreter runs the kernels on a CPU's tensors; with one nothing runs them there. So a test that launches has to get its
device from the fixtures `device` or `on_device`, or from `support.chains.DEVICE`, itself or by what it calls; or to say where it runs, by the
marker `cpu` or by `skipif`.
"""

from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

from . import chains

FIXTURES = {"device", "on_device"}
#: Modules whose functions make tensors there.
HELPERS = {f"support.{name}" for name in ("chains", "convolutions", "epilogues", "passes", "rule")}


class Launches:
    """Counts the launches of this process, from now on."""

    def __init__(self, launch: ModuleType) -> None:
        self.count = 0
        by_itself = launch.PreparedLaunch._launched_by_triton

        def counted(prepared, device, tensors):
            self.count += 1
            return by_itself(prepared, device, tensors)

        launch.PreparedLaunch._launched_by_triton = counted


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function refers to, and those within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def takes_the_device(function: FunctionType, fixtures: list[str], module: ModuleType) -> bool:
    """Whether a test, with these fixtures, gets a device that is a GPU where there is one."""
    if FIXTURES & set(fixtures):
        return True
    here, seen = vars(module), set()
    left = [getattr(value, "__wrapped__", None) for name in fixtures if (value := here.get(name)) is not None]
    left.append(function)
    while left:
        code = getattr(left.pop(), "__code__", None)
        for name in () if code is None or code in seen else _names(code):
            value = here.get(name)
            if value is chains.DEVICE or (callable(value) and getattr(value, "__module__", None) in HELPERS):
                return True
            if getattr(value, "__module__", None) == module.__name__:
                left += [value, *(vars(value).values() if isinstance(value, type) else ())]
        seen.add(code)
    return False
