"""oneDNN's primitives in a profile: summed by implementation, and read from what oneDNN writes."""

import pytest
import torch

from fused_resnet.profile import onednn

VERBOSE = """onednn_verbose,v1,info,cpu,isa:Intel AVX-512 with Intel AMX
onednn_verbose,v1,primitive,exec,cpu,convolution,brgconv_bwd_w:avx512_core_amx,backward_weights,src:bf16 wei:bf16,,alg:direct,mb2_ic3oc8,1.5
onednn_verbose,v1,primitive,exec,cpu,convolution,brgconv_bwd_w:avx512_core_amx,backward_weights,src:bf16 wei:bf16,,alg:direct,mb2_ic3oc8,2.5
onednn_verbose,v1,primitive,exec,cpu,convolution,ref:any,forward_training,src:f16,,alg:direct,mb2_ic3oc8,9
onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:f32 dst:bf16,,,8x3x3x3,0.5
onednn_verbose,v1,primitive,exec,cpu,reorder
"""


def test_primitives_are_summed_by_implementation():
    assert onednn.summed(VERBOSE.splitlines(keepends=True)) == [
        ["ref:any", "convolution forward", "mb2_ic3oc8", 1, 9.0],
        ["brgconv_bwd_w:avx512_core_amx", "convolution backward of the weight", "mb2_ic3oc8", 2, 4.0],
        ["jit:uni", "reorder", "8x3x3x3", 1, 0.5],
    ]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_primitives_of_a_call_are_those_that_ran(capfd):
    x, weight = torch.randn(4, 64, 20, 20, requires_grad=True), torch.randn(32, 64, 3, 3, requires_grad=True)
    print("before")
    found = onednn.primitives(lambda: (print("within"), torch.conv2d(x, weight).sum().backward()))
    print("behind")
    convolutions = {what: (calls, ms) for _, what, sizes, calls, ms in found if what.startswith("convolution") and "ic64oc32" in sizes}
    assert {f"convolution {way}" for way in ("forward", "backward of the input", "backward of the weight")} == set(convolutions)
    assert all(calls == 1 and ms > 0 for calls, ms in convolutions.values())
    assert capfd.readouterr().out == "before\nwithin\nbehind\n"
