"""What bounds a launch: instructions counted in machine code, and how often they are issued. Nothing is compiled but one kernel."""

import json

import pytest

pytest.importorskip("triton")
import torch
from support.compiled import run
from support.compiled import tested_triton as of_a_known_triton

from fused_resnet.kernels import bounds, networks, sass
from fused_resnet.kernels.launch import Launch
from fused_resnet.problem import ConvProblem
from fused_resnet.tuning import Configuration, Task


def listing(*instructions: str) -> str:
    """As cuobjdump writes them, 16 bytes each; {i} in an instruction is the address of the i-th."""
    addresses = [f"0x{16 * i:x}" for i in range(len(instructions))]
    return "".join(f"        /*{16 * i:04x}*/    {text.format(*addresses)} ;   /* 0x00 */\n" for i, text in enumerate(instructions))


LOOP = ("MOV R1, c[0x0][0x28]", "@!P0 BRA {6}", "LDG.E.128 R4, [R2]", "HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4]", "IADD3 R1, R1, 1", "@P1 BRA {2}",
        "STG.E [R2], R24", "EXIT", "BRA {8}")  # fmt: skip


def test_a_loop_and_what_is_outside_of_it():
    """The way past the loop, which a guard before it allows, is none that a launch takes. What follows EXIT is padding."""
    assert sass.read(listing(*LOOP)) == sass.Issued(outside=4, loop=4, aside=0, products=16 * 128 * 16, products_outside=0)


def test_the_shortest_way_is_counted():
    """Of a branch in the loop, of one behind it, and of a call: two instructions there and a return."""
    code = ["MOV R1, R2", "IADD3 R1, R1, 1", "@P2 BRA {5}", "STG.E [R2], R1", "FADD R1, R1, R2", "@P1 BRA {1}", "@P3 BRA {8}", "FMUL R1, R1, R1",
            "CALL.REL.NOINC {10}", "EXIT", "FADD R1, R1, R1", "RET.REL.NODEC R4 0x0"]  # fmt: skip
    assert sass.read(listing(*code)) == sass.Issued(outside=1 + 1 + 1 + 2 + 1, loop=3, aside=2, products=0, products_outside=0)


def test_loops_that_follow_each_other_and_versions_of_one():
    once = ("IADD3 R1, R1, 1", "@P1 BRA {%d}")
    code = [text % 0 if "%" in text else text for text in once] + [text % 2 if "%" in text else text for text in once] + ["EXIT"]
    assert sass.read(listing(*code)) == sass.Issued(1, 4, 0, 0, 0)
    # With matrix instructions they are versions of one loop: one with and one without borders, say.
    code = [
        "@P0 BRA {4}",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "FADD R1, R1, R1",
        "@P1 BRA {1}",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@P1 BRA {4}",
        "EXIT",
    ]
    assert sass.read(listing(*code)) == sass.Issued(outside=2, loop=2, aside=0, products=16 * 8 * 16, products_outside=0)


def test_what_is_no_machine_code_is_refused():
    with pytest.raises(ValueError, match="expected the machine code of a kernel"):
        sass.read("nothing")


def test_the_busiest_multiprocessor_issues_all_of_its_programs():
    launch = Launch(None, 133, {"STEPS": 10}, 8, 3)  # 132 multiprocessors: one has two programs
    gpu = bounds.ASSUMED[90]
    assert bounds.issue_seconds(launch, sass.Issued(100, 50, 0, 0, 0), gpu) == pytest.approx(2 * 8 * (100 + 10 * 50) / 4 / gpu.clock)


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("stride", [1, 2])
def test_floors_are_those_of_the_problem_and_trips_those_of_the_products(kind, stride):
    """Trips times programs times a step's products are the convolution's own where tiles divide it; bytes are each tensor's, once."""
    conv = ConvProblem(4, 64, 16, 16, 128, 3, 3, (stride, stride), (1, 1))
    tiles = Configuration(64, 64, 64, warps=4, stages=3, splits=2 if kind == "wgrad" else 1)
    launch = networks.record(Task(kind, conv, "bfloat16", "act"), tiles)
    assert launch.programs * bounds.trips(launch) * 2 * 64**3 == conv.flops
    assert bounds.convolution(launch) == conv
    found = bounds.bounds(launch, sass.Issued(10, 10, 0, 64**3 // 4, 0), 90)
    assert found.products == pytest.approx(conv.flops / 800e12)
    assert found.bytes == pytest.approx((conv.input_bytes(2) + conv.output_bytes(2) + conv.weight_bytes(2)) / 3e12, rel=0.02)
    if kind == "wgrad":  # of both splits, written and read
        assert found.workspace == pytest.approx(2 * 2 * 4 * conv.weight_elements / 3e12)
    twice = sass.Issued(10, 20, 0, 64**3 // 2, 0)  # a trip of two steps, which has twice the instructions
    assert bounds.instructions(launch, twice) == pytest.approx(bounds.instructions(launch, sass.Issued(10, 10, 0, 64**3 // 4, 0)))


def test_a_strided_1x1_reads_a_quarter():
    conv = ConvProblem(4, 64, 16, 16, 128, 1, 1, (2, 2))
    launch = networks.record(Task("fprop", conv, "bfloat16", "act"), Configuration(64, 64, 64, warps=4, stages=2))
    moved, _ = bounds.moved(launch)
    assert moved == pytest.approx(conv.input_bytes(2) / 4 + conv.output_bytes(2) + conv.weight_bytes(2), abs=64)


def test_passes_have_the_trips_that_they_are_launched_with():
    assert bounds.trips(Launch(None, 1, {"STEPS": 7}, 4, 3)) == 7
    assert bounds.trips(Launch(None, 1, {"x_ptr": torch.empty(1, device="meta")}, 4, 3)) == 0


REAL = """
import json
from dataclasses import astuple
from fused_resnet.kernels import bounds, inspect, networks
from fused_resnet.problem import ConvProblem
from fused_resnet.tuning import Configuration, Task
tiles = Configuration(64, 64, 64, warps=4, stages=3)
launch = networks.record(Task("fprop", ConvProblem(8, 256, 16, 16, 64, 1, 1), "bfloat16", "act"), tiles)
for architecture in (80, 90):
    print(json.dumps(astuple(inspect.compile_launch(launch, "", architecture).issued)))
"""


@of_a_known_triton
def test_a_compiled_convolution_has_the_products_of_its_tile():
    for line in run("-c", REAL).splitlines():
        issued = sass.Issued(*json.loads(line))
        steps = 4 * (issued.products + issued.products_outside) / 64**3  # of four warps, in one trip and around the loop
        assert steps == int(steps) >= 1 and issued.loop > 30 and issued.outside > 100, issued
