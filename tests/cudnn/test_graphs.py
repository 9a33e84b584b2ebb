"""cuDNN's graphs as the real package builds and prints them; on a GPU, that they are accepted and right.

Without a GPU the package builds nodes and prints them; it proposes no plan.
"""

import json
from dataclasses import replace

import cudnn as package  # noqa: E402
import pytest
from support.chains import DEVICE
from support.cudnn_problems import CASES, CONV, problem

from fused_resnet.cudnn import probe, work
from fused_resnet.cudnn.graphs import ROLES, GraphProblem, build
from fused_resnet.tuning import Task


def printed(asked: GraphProblem) -> dict:
    """The graph as the package prints it."""
    return json.loads(str(build(asked)))


#: Each graph's nodes in order, by the package's own names.
NODES = {
    ("conv_genstats", "act"): "conv_fprop genstats",
    ("conv_sums", "act"): "conv_fprop reduction mul reduction",
    ("scale_bias_relu_conv_genstats", "norm"): "mul add relu conv_fprop genstats",
    ("scale_bias_relu_wgrad", "norm"): "mul add relu conv_wgrad",
    ("dgrad", "act"): "conv_dgrad add",
    ("dgrad", "norm"): "conv_dgrad add mul add relu_backward reduction sub mul mul reduction",
    ("dgrad", "norm_add"): "conv_dgrad add mul reduction sub mul mul reduction",
    ("dgrad", "norm_add_raw"): "conv_dgrad add mul reduction sub mul mul reduction sub mul mul reduction",
    ("scale_bias_add_relu", "norm_add"): "mul add add relu cmp_neq",
    ("scale_bias_add_relu", "norm_add_raw"): "mul add mul add add relu cmp_neq",
    ("dbn_apply", "norm"): "mul add mul add",
    ("conv_scale_bias_add_relu", "norm"): "conv_fprop mul add relu",
    ("conv_scale_bias_add_relu", "norm_add"): "conv_fprop mul add add relu",
}
WRITTEN = {
    "conv_genstats": {"y", "sum", "square_sum"}, "conv_sums": {"y", "sum", "square_sum"}, "scale_bias_relu_wgrad": {"dw"},
    "scale_bias_relu_conv_genstats": {"y", "sum", "square_sum"}, "scale_bias_add_relu": {"act", "mask"}, "dbn_apply": {"dy"},
    "conv_scale_bias_add_relu": {"act"}, ("dgrad", "act"): {"dz"}, ("dgrad", "norm"): {"dz", "s1", "s2"},
    ("dgrad", "norm_add"): {"dz", "s1", "s2"}, ("dgrad", "norm_add_raw"): {"dz", "s1", "s2", "residual_s2"},
}  # fmt: skip


@pytest.mark.parametrize("name, source", CASES)
def test_a_graph_has_its_nodes_and_its_tensors(name, source):
    content = printed(problem(name, source))
    assert " ".join(node["name"].partition(".")[0] for node in content["nodes"]) == NODES[name, source]
    tensors = {key: t for key, t in content["tensors"].items() if not t["is_virtual"]}
    assert set(tensors) <= set(ROLES)
    assert {key: t["uid"] for key, t in tensors.items()} == {key: ROLES.index(key) + 1 for key in tensors}
    written = {t.get_name() for t in build(problem(name, source)).get_outputs()}
    assert written == (WRITTEN[name, source] if name == "dgrad" else WRITTEN[name])


@pytest.mark.parametrize("dtype, word", [("float16", "HALF"), ("bfloat16", "BFLOAT16"), ("float32", "FLOAT")])
def test_tensors_are_nhwc_and_vectors_float32_but_for_the_prologues(dtype, word):
    half, full = f"data_type.{word}", "data_type.FLOAT"
    tensors = printed(problem("scale_bias_relu_conv_genstats", "norm", dtype))["tensors"]
    layouts = {key: (t["dim"], t["stride"], t["dtype"]) for key, t in tensors.items() if key in ROLES}
    assert layouts == {
        "x": ([4, 64, 14, 12], [64 * 14 * 12, 1, 64 * 12, 64], half),
        "scale": ([1, 64, 1, 1], [64, 1, 64, 64], half),
        "bias": ([1, 64, 1, 1], [64, 1, 64, 64], half),
        "weight": ([32, 64, 3, 3], [64 * 9, 1, 64 * 3, 64], half),
        "y": ([4, 32, 7, 6], [32 * 7 * 6, 1, 32 * 6, 32], half),
        "sum": ([1, 32, 1, 1], [32, 1, 32, 32], full),
        "square_sum": ([1, 32, 1, 1], [32, 1, 32, 32], full),
    }
    tensors = printed(problem("dgrad", "norm_add_raw", dtype))["tensors"]
    assert tensors["mask"]["dtype"] == "data_type.BOOLEAN" and tensors["mask"]["stride"] == [64 * 14 * 12, 1, 64 * 12, 64]
    assert {tensors[key]["dtype"] for key in ("mean", "invstd", "residual_mean", "s1", "s2", "residual_s2")} == {full}
    assert tensors["dy"]["dim"] == [4, 32, 7, 6] and tensors["dz"]["dim"] == [4, 64, 14, 12]


def test_a_convolution_moves_as_the_problem_says():
    (node,) = (n for n in printed(problem("dgrad", "norm"))["nodes"] if n["name"].startswith("conv_dgrad"))
    assert node["params"] == {"padding": [1, 1], "stride": [2, 2], "dilation": [1, 1]}


def test_arithmetic_between_nodes_is_in_float32():
    graph = build(problem("scale_bias_relu_wgrad", "norm"))
    assert graph.context.compute_data_type == graph.context.intermediate_data_type == package.data_type.FLOAT


@pytest.mark.parametrize(
    "values, words",
    [
        ({"graph": "gemm"}, "graph: expected one of conv_genstats, "),
        ({"dtype": "float64"}, "dtype: expected one of float32, float16, bfloat16; got 'float64'"),
        ({"source": "norm"}, "source: conv_genstats expected one of act; got 'norm'"),
        ({"dact": True}, "dact: expected nothing to be added in conv_genstats"),
    ],
)
def test_a_problem_that_there_is_no_graph_for_is_refused(values, words):
    with pytest.raises(ValueError) as error:
        replace(problem("conv_genstats", "act"), **values)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    "asked, words",
    [
        (problem("conv_genstats", "act", conv=replace(CONV, c=3)), "channels in multiples of 8; the convolution has 3 and 32"),
        (problem("conv_genstats", "act", conv=replace(CONV, groups=2)), "takes no grouped convolution"),
        (problem("scale_bias_relu_wgrad", "norm", "float32"), "written for 2-byte ones"),
        (problem("dgrad", "act", dact=False), "the framework's convolution"),
    ],
)
def test_some_problems_are_ruled_out_before_cudnn_is_asked(asked, words):
    assert words in asked.why_not()


def test_each_task_has_its_graph_or_a_reason():
    def of(kind, source, dtype="float16", **more):
        found = work.problem_of_task(Task(kind, CONV, dtype, source, **more))
        return found if isinstance(found, str) else (found.graph, found.source, found.dact)

    assert of("fprop", "act") == ("conv_genstats", "act", False)
    assert of("fprop", "act", "bfloat16") == ("conv_sums", "act", False)
    assert of("fprop", "norm") == ("scale_bias_relu_conv_genstats", "norm", False)
    assert "hands out no mask" in of("fprop", "norm_add") and "hands out no mask" in of("fprop", "norm_add_raw")
    assert of("wgrad", "norm") == ("scale_bias_relu_wgrad", "norm", False)
    assert "the framework's convolution" in of("wgrad", "act")
    assert of("dgrad", "norm_add") == ("dgrad", "norm_add", False)
    assert of("dgrad", "norm_add_raw", compact=2, compact_k=64) == ("dgrad", "norm_add_raw", True)


@pytest.mark.gpu
@pytest.mark.parametrize("name, source", CASES)
def test_float16_graphs_are_accepted_and_right(name, source):
    assert probe.why_not_graph(name, source, "float16", DEVICE) is None
