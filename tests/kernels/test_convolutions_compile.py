"""What the rules of thumb choose for convolutions, forward and backward, is compiled ahead of time for sm_80 and sm_90. No GPU is needed."""

import json
import re
from dataclasses import asdict, replace

import pytest
from support.compiled import LOSES_NAN, run, tested_triton
from support.convolutions import network_problems

from fused_resnet.kernels.networks import Epilogue, inference, tasks
from fused_resnet.roofline import resnet
from fused_resnet.tuning import Task

pytestmark = tested_triton
SLOW = pytest.mark.slow

#: Bytes that a program may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
#: Each different launch of the tasks in a file, compiled; of those with an epilogue in its stead.
COMPILE = """
import dataclasses, json, sys
from pathlib import Path
from fused_resnet.kernels import inspect, networks
from fused_resnet.tuning import heuristics, table
seen = set()
for fields, epilogue in json.loads(Path(sys.argv[1]).read_text()):
    task, allow_tf32 = table.task_of(fields, sys.argv[1]), sys.argv[2] == "tf32"
    for architecture in inspect.ARCHITECTURES:
        tiles = heuristics.configuration(task, divmod(architecture, 10))
        if epilogue:
            epilogue = networks.Epilogue(*epilogue)
            launch = networks.record_inference(task, epilogue, tiles, allow_tf32)
        else:
            launch = networks.record(task, tiles, allow_tf32)
        key = architecture, *inspect.launch_key(launch)
        if key not in seen:
            seen.add(key)
            print(json.dumps(dataclasses.asdict(inspect.compile_launch(launch, f"{task} {epilogue or ''}; {tiles}", architecture, disassemble=False))))
"""


#: As they are where a block's inside is made again: no statistics, and of an activation that the forward's prologue has written.
AGAIN = COMPILE.replace(
    "networks.record(task, tiles, allow_tf32)",
    """networks.record(
                dataclasses.replace(task, source=task.source.replace("norm_add_raw", "act").replace("norm_add", "act")), tiles, statistics=False)""",
)


def compiled(wanted: list[Task | tuple[Task, Epilogue]], precision: str, tmp_path, program: str = COMPILE) -> list[dict]:
    """Each different launch of `wanted` on each architecture, as `inspect.Compiled` has it."""
    path = tmp_path / "tasks.json"
    pairs = [(task, None) if isinstance(task, Task) else task for task in dict.fromkeys(wanted)]
    path.write_text(json.dumps([(asdict(task), epilogue) for task, epilogue in pairs]))
    return [json.loads(line) for line in run("-c", program, str(path), precision).splitlines()]


def check(found: list[dict], precision: str = "tf32"):
    """No spill, within shared memory, NaN kept, matrix instructions, loads that do not wait."""
    assert {c["architecture"] for c in found} == {80, 90}
    for c in found:
        where = c["variant"], c["architecture"]
        assert c["spilled"] == 0, where
        assert c["shared"] <= SHARED[c["architecture"]], where
        assert not LOSES_NAN.search(c["ptx"]), where
        # Of 16 bytes; of four where an image's three channels are what is read, and where TF32's operands change places on sm_90.
        kind = c["variant"].split()[0]
        narrow = (kind == "fprop" and " 3x" in c["variant"].partition(",")[0].replace(" 3x3 ", " ")) or (
            kind == "wgrad" and "float32" in c["variant"] and c["architecture"] == 90
        )
        # Where the compiler knows that a loop has one step, there is no next one whose loads could be under way.
        found_step = re.match(r"fprop (\d+)x\d+x\d+ 1x1 .* stride .*; \d+x\d+x(\d+),", c["variant"])
        if not (found_step and int(found_step[1]) <= int(found_step[2])):
            assert ("cp.async.ca" if narrow else "cp.async.cg.shared.global") in c["ptx"], where
        if precision == "tf32":
            assert ("wgmma.mma_async" if c["architecture"] == 90 else "mma.sync") in c["ptx"], where


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # float16's code is bfloat16's, but for the names of its instructions
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_what_the_heuristic_chooses_for_resnets_compiles(name, dtype, kind, tmp_path):
    wanted = [t for batch in (256, 32) for t in tasks(resnet(name, batch), dtype) if t.kind == kind]
    found = compiled(wanted, "tf32", tmp_path)
    check(found)
    if (kind, dtype) == ("wgrad", "bfloat16"):  # which splits its sum for two programs of eight warps on a multiprocessor
        registers = [c["registers"] for c in found if c["architecture"] == 90 and c["threads"] == 256]
        assert registers and max(registers) <= 128


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    "dtype, precision",
    [("bfloat16", "tf32"), pytest.param("float16", "tf32", marks=SLOW), ("float32", "tf32"), pytest.param("float32", "ieee", marks=SLOW)],
)
def test_folded_networks_compile(dtype, precision, name, tmp_path):
    wanted = [pair for batch in (256, 32, 1) for pair in inference(resnet(name, batch), dtype)]
    found = compiled(wanted, precision, tmp_path)
    check(found, precision)
    assert {c["variant"].partition(" with ")[2].partition(";")[0] for c in found} == {"bias, ReLU", "bias, residual, ReLU", "bias"}


def test_a_folded_network_has_these_convolutions():
    """ResNet-50's 53: 16 blocks end with a residual, 4 have a projection without a ReLU."""
    epilogues = [epilogue for _, epilogue in inference(resnet("resnet50", 8), "bfloat16")]
    assert epilogues.count(Epilogue(True, True)) == 16 and epilogues.count(Epilogue(False, False)) == 4 and len(epilogues) == 53


@pytest.mark.full
@pytest.mark.timeout(600)
def test_what_is_made_again_compiles(tmp_path):
    """Of ResNet-50 the convolutions of a block but the last, as tiled for the norm, ReLU and residual of their input."""
    network = resnet("resnet50", 256)
    inner = {layer.conv for block in network.blocks for layer in block.branch[:-1]}
    check(compiled([t for t in tasks(network, "bfloat16") if t.kind == "fprop" and t.conv in inner], "tf32", tmp_path, AGAIN))


#: Of a kernel's PTX: sums of two lanes' values in one operation with the product that one of them is.
UNEQUAL = """
import re
from fused_resnet.kernels import inspect, networks
from fused_resnet.problem import ConvProblem
from fused_resnet.tuning import Task, heuristics
task = Task("dgrad", ConvProblem(8, 16, 16, 16, 16, 3, 3, (1, 1), (1, 1)), "bfloat16", "norm")
for architecture in inspect.ARCHITECTURES:
    launch = networks.record(task, heuristics.configuration(task, divmod(architecture, 10)))
    ptx = inspect.compile_launch(launch, "", architecture, disassemble=False).ptx
    shuffled = set(re.findall(r"shfl[.]sync[.]bfly[.]b32\\s+(%r[0-9]+)", ptx))
    sums = re.findall(r"fma[.]rn[.]f32\\s+[^;]*, (%r[0-9]+);", ptx)
    print(len(shuffled), sum(value in shuffled for value in sums))
"""


def test_lanes_that_exchange_a_sum_agree_on_it(tmp_path):
    """With 16 channels a thread has one row of each: contracted, a·b + c·d would be fma(a, b, c·d) in one lane and fma(c, d, a·b) in another."""
    script = tmp_path / "unequal.py"
    script.write_text(UNEQUAL)
    for line in run(str(script)).splitlines():
        shuffles, contracted = map(int, line.split())
        assert shuffles > 0 and contracted == 0


def all_tasks(dtype: str):
    """Every kind of work on every convolution of ResNets, wide ResNets and CIFAR nets."""
    for conv in dict.fromkeys(network_problems((1, 32, 256))):
        for source in ("act", "norm", "norm_add", "norm_add_raw"):
            yield Task("fprop", conv, dtype, source)
            yield Task("dgrad", conv, dtype, source)
            yield Task("dgrad", conv, dtype, source, dact=True)
        for residual, relu in ((False, True), (True, True), (False, False)):
            yield Task("fprop", conv, dtype, "act"), Epilogue(residual, relu)
        yield Task("wgrad", conv, dtype, "act")
        yield Task("wgrad", conv, dtype, "norm")
        if max(conv.stride) == 1:
            yield Task("dgrad", conv, dtype, "norm_add", compact=2, compact_k=2 * conv.k)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("dtype, precision", [("bfloat16", "tf32"), ("float16", "tf32"), ("float32", "tf32"), ("float32", "ieee")])
def test_whatever_the_heuristic_chooses_compiles(dtype, precision, tmp_path):
    check(compiled(list(all_tasks(dtype)), precision, tmp_path), precision)


def test_a_network_asks_for_these_tasks():
    """ResNet-50's, by the paper's table: 53 convolutions, of which the stem needs no gradient of its input."""
    found = list(tasks(resnet("resnet50", 8), "bfloat16"))
    count = {kind: sum(task.kind == kind for task in found) for kind in ("fprop", "dgrad", "wgrad")}
    assert count == {"fprop": 53, "dgrad": 52, "wgrad": 53}
    first = [t for t in found if t.kind == "dgrad" and t.source == "norm_add_raw"]
    assert len(first) == 4 and all(t.dact for t in first)  # of the second block of each stage
    assert [t.compact for t in found if t.compact] == [1, 2, 2, 2]
    assert replace(found[0], kind="wgrad") == found[1]
