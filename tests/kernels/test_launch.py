"""Prepared launches: that what is called past Triton's binder is what Triton would have called, by a driver without a GPU.

In a process of its own: where Triton's interpreter has taken the kernels, as it has in this one on a CPU, nothing is bound.
"""

import json

import pytest

pytest.importorskip("triton")
from support.checkout import ROOT
from support.compiled import run
from support.compiled import tested_triton as of_a_known_triton

from fused_resnet.kernels.launch import PreparedLaunch
from fused_resnet.kernels.norm_add_act import norm_add_act_kernel

#: Counts what goes through Triton's binder.
BEGINNING = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, triton
from unittest import mock
from fused_resnet.kernels import launch
from fake_driver import install

calls, bound = install(90), []
by_triton = triton.runtime.JITFunction.run
mock.patch.object(triton.runtime.JITFunction, "run", lambda *args, **named: bound.append(1) or by_triton(*args, **named)).start()

def told(since=0):
    return [[c.kernel, c.function, c.grid, c.stream, c.packed, [described(a) for a in c.arguments]] for c in calls[since:]]

def described(a):
    return [a.data_ptr(), a.dtype.itemsize, list(a.shape), list(a.stride())] if isinstance(a, torch.Tensor) else a
"""
ONE = (
    BEGINNING
    + """
from fused_resnet.kernels.norm_add_act import norm_add_act_kernel
made = launch.PreparedLaunch(norm_add_act_kernel, 4, 2, rows=64, C=16, RELU=True, BLOCK_M=16, BLOCK_C=16)
storage, vector, other = torch.zeros(2048, dtype=torch.bfloat16), torch.zeros(16), torch.zeros(1024)
found = {}

def launches(name, x, **more):
    before, bound_before = len(calls), len(bound)
    for _ in range(3):
        made(x.device, x_ptr=x, scale_ptr=vector, bias_ptr=vector, act_ptr=storage[1024:], **more)
    found[name] = [told(before), len(bound) - bound_before]

launches("aligned", storage[:1024])
launches("off 16 bytes", storage[1:1025])
launches("off 8 bytes", storage[4:1028])
launches("another dtype", other)
launches("another pointer", storage[:1024], residual_ptr=storage[:1024])
launches("aligned again", storage[:1024])
launches("off 16 bytes again", storage[1:1025])
hook, hooked = triton.knobs.runtime.launch_enter_hook, []
hook.add(hooked.append)
launches("watched", storage[:1024])
hook.remove(hooked.append)
launches("no longer watched", storage[:1024])
triton.knobs.runtime.debug = True
launches("debugged", storage[:1024])
triton.knobs.runtime.debug = False
launches("no longer debugged", storage[:1024])
with mock.patch.object(launch, "DIRECT", False):
    made = launch.PreparedLaunch(norm_add_act_kernel, 4, 2, rows=64, C=16, RELU=True, BLOCK_M=16, BLOCK_C=16)
    launches("untested release", storage[:1024])
try:
    launches("wrong", storage[:1024], y_ptr=vector)
except TypeError as error:
    refused = str(error)
print(json.dumps([found, [h.get()["name"] for h in hooked], refused]))
"""
)
STEPS = (
    BEGINNING
    + """
import fused_resnet
torch.manual_seed(0)
model = fused_resnet.models.resnet18(num_classes=10).to(torch.bfloat16).to(memory_format=torch.channels_last)
images = torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
steps = []
with fused_resnet.backend("launched"):
    for direct in (False, False, True, True, True):
        before, bound_before = len(calls), len(bound)
        with mock.patch.object(launch, "DIRECT", direct):
            result = model(images)
            result.backward(result)
        steps.append([[call[:5] + [[a if not isinstance(a, list) else [a[0] % 16, *a[1:]] for a in call[5]]] for call in told(before)],
                      len(bound) - bound_before])
print(json.dumps(steps))
"""
)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """{what was launched three times: (the calls, how many of them Triton bound)}, what a hook was told, and an error."""
    return json.loads(run("-c", ONE, str(ROOT / "bench")).splitlines()[-1])


@of_a_known_triton
def test_a_variant_is_bound_once(one):
    bound = {name: count for name, (_, count) in one[0].items()}
    once = {"aligned": 1, "off 16 bytes": 1, "another dtype": 1, "another pointer": 1, "off 8 bytes": 0}
    again = {"aligned again": 0, "off 16 bytes again": 0, "no longer watched": 0, "no longer debugged": 0}
    assert bound == once | again | {"watched": 3, "debugged": 3, "untested release": 3}


@of_a_known_triton
def test_the_call_is_that_of_triton(one):
    """Function, grid, stream, warps and all arguments, by number and by address: of the bound launch and of the two behind it."""
    for name, (calls, _) in one[0].items():
        assert len(calls) == 3 and calls[0] == calls[1] == calls[2], name
    assert one[0]["aligned"][0] == one[0]["aligned again"][0] == one[0]["watched"][0] == one[0]["untested release"][0]
    assert one[0]["off 16 bytes"][0] == one[0]["off 16 bytes again"][0]


@of_a_known_triton
def test_views_off_16_bytes_take_the_other_variant(one):
    function = {name: value[0][0][1] for name, value in one[0].items()}
    assert function["off 16 bytes"] == function["off 8 bytes"]
    names = "aligned", "off 16 bytes", "another dtype", "another pointer", "debugged"
    assert len({function[name] for name in names}) == len(names)


@of_a_known_triton
def test_a_hook_is_told_of_each_launch(one):
    assert one[1] == ["norm_add_act_kernel"] * 3


def test_names_that_the_kernel_has_not_are_refused(one):
    assert one[2] == "tensors: expected pointers of norm_add_act_kernel; got y_ptr"
    with pytest.raises(
        TypeError, match="numbers: expected the last parameters of norm_add_act_kernel; got C, RELU, BLOCK_M, ROWS of x_ptr"
    ):
        PreparedLaunch(norm_add_act_kernel, 1, 4, C=1, RELU=True, BLOCK_M=16, ROWS=1)


@of_a_known_triton
@pytest.mark.full
def test_a_whole_step_calls_what_triton_would_call():
    """Every kernel of a network: its first two steps are bound, the others are not. Tensors by shape, strides and place within 16 bytes."""
    (first, bound), (second, bound_again), (third, bound_once_more), (fourth, direct), (fifth, last) = json.loads(
        run("-c", STEPS, str(ROOT / "bench")).splitlines()[-1]
    )
    assert first == second == third == fourth == fifth
    assert bound == bound_again == len(first) > 100 and 0 < bound_once_more <= len(first) and direct == last == 0
