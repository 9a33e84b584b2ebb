"""Plans of cuDNN's graphs: built, kept, refused and remembered."""

import json
import types
from dataclasses import replace

import pytest
import torch
from support.chains import DEVICE
from support.cudnn_problems import problem

from fused_resnet.cudnn import library, plans
from fused_resnet.cudnn.graphs import GraphProblem
from fused_resnet.problem import ConvProblem
from fused_resnet.values import nhwc

NO_CUDA = pytest.mark.skipif(DEVICE.type == "cuda", reason="says what happens where no GPU is")


@pytest.fixture
def on_no_gpu(tmp_path, monkeypatch):
    """Plans of a GPU that is not there: the package itself refuses, for want of a library."""
    monkeypatch.setattr(library, "handle", lambda device: None)
    return plans.Plans(torch.device("cuda", 0), "a GPU, cudnn 9.9.9", tmp_path)


@NO_CUDA
def test_a_refusal_is_remembered_with_its_reason(on_no_gpu, tmp_path, monkeypatch):
    asked = problem("conv_genstats", "act")
    reason = on_no_gpu.get(asked)
    assert isinstance(reason, str) and "cudnn" in reason.lower()
    (file,) = tmp_path.iterdir()
    assert file.suffix == plans.REFUSAL and json.loads(file.read_text())["reason"] == reason

    def asked_again(*args, **options):
        raise AssertionError("cuDNN is asked again")

    monkeypatch.setattr(plans, "compiled", asked_again)
    assert on_no_gpu.get(asked) == reason  # in the process
    assert plans.Plans(on_no_gpu.device, on_no_gpu.versions, tmp_path).get(asked) == reason  # in the next
    with pytest.raises(AssertionError):  # another cuDNN, or another GPU, is asked
        plans.Plans(on_no_gpu.device, "a GPU, cudnn 9.9.10", tmp_path).get(asked)
    with pytest.raises(AssertionError):
        on_no_gpu.get(replace(asked, dtype="bfloat16"))


@NO_CUDA
def test_a_broken_file_of_a_refusal_is_no_refusal(on_no_gpu, tmp_path, monkeypatch):
    asked = problem("conv_genstats", "act")
    for content in ("", "{}", "[1]", '{"reason": 3}', "[" * 100_000):
        on_no_gpu.path(asked, plans.REFUSAL).write_text(content)
        monkeypatch.setattr(plans, "compiled", lambda *args, **options: (_ for _ in ()).throw(plans.Refused("asked")))
        assert plans.Plans(on_no_gpu.device, on_no_gpu.versions, tmp_path).get(asked) == "asked"


def test_what_took_too_long_is_not_kept_for_the_next_process(on_no_gpu, tmp_path, monkeypatch):
    def slow(*args, **options):
        raise plans.Refused("no plan was built within 60 s", lasting=False)

    monkeypatch.setattr(plans, "compiled", slow)
    assert on_no_gpu.get(problem("conv_genstats", "act")) == "no plan was built within 60 s"
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(library, "handle", lambda device: None)
    monkeypatch.setattr(plans, "compiled", lambda *args, **options: (_ for _ in ()).throw(plans.Refused("no")))
    assert plans.Plans(torch.device("cuda", 0), "a GPU", tmp_path / "file" / "below").get(problem("conv_genstats", "act")) == "no"


def test_no_plan_is_built_while_a_cuda_graph_is_captured(on_no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="conv_genstats can't be built while a CUDA graph is captured; run the step once before"):
        on_no_gpu.get(problem("conv_genstats", "act"))


def test_cudnns_words_are_one_line_and_name_the_reason():
    said = RuntimeError(
        "No valid engine configs for __\nWarning: CUDNN_STATUS_NOT_SUPPORTED; Reason: a\tb Error: CUDNN_STATUS_X; Reason: c"
    )
    assert plans.words(said) == "CUDNN_STATUS_NOT_SUPPORTED: a b"
    assert plans.words(RuntimeError("x" * 1000)) == "x" * 200
    assert plans.words(RuntimeError()) == "RuntimeError"


@pytest.mark.gpu
def test_a_plan_comes_back_from_the_cache(tmp_path):
    asked = replace(problem("conv_genstats", "act"), conv=ConvProblem(4, 64, 14, 12, 32, 3, 3, (1, 1), (1, 1)))
    versions = plans.plans_of(DEVICE).versions
    first = plans.Plans(torch.device("cuda", 0), versions, tmp_path)
    assert isinstance(first.get(asked), plans.Plan) and first.get(asked) is first.get(asked)
    assert [path.suffix for path in tmp_path.iterdir()] == [plans.PLAN]
    again = plans.Plans(torch.device("cuda", 0), versions, tmp_path)._restored(asked)
    results = []
    for plan in (first.get(asked), again):
        torch.manual_seed(0)
        x = nhwc(torch.randn(4, 64, 14, 12, device=DEVICE).half())
        tensors = {
            "x": x,
            "weight": nhwc(torch.randn(32, 64, 3, 3, device=DEVICE).half()),
            "y": nhwc(torch.empty(4, 32, 14, 12, device=DEVICE).half()),
        }
        tensors |= {role: torch.zeros(32, device=DEVICE) for role in ("sum", "square_sum")}
        plan.run(tensors)
        results.append(tensors["y"])
    assert torch.equal(*results)


@pytest.mark.gpu
def test_the_time_limit_is_kept_between_plans(tmp_path):
    slow = plans.Plans(torch.device("cuda", 0), "versions", tmp_path, limit_s=0.0)
    assert slow.get(problem("conv_genstats", "act")).startswith("no plan was built within 0 s")


def test_a_plan_is_built_where_its_gpu_is_the_current_one(monkeypatch, tmp_path):
    """cuDNN builds for the current device, which need not be that of the tensors."""
    current = []

    class On:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    def compiled(*_, **__):
        assert current == [torch.device("cuda", 1)]
        return types.SimpleNamespace(serialize=lambda: b"a plan", get_workspace_size=lambda: 7)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(plans, "compiled", compiled)
    monkeypatch.setattr(plans.library, "handle", lambda device: None)
    problem = GraphProblem("conv_genstats", ConvProblem(2, 8, 4, 4, 8, 1, 1), "float16", "act")
    made = plans.Plans(torch.device("cuda", 1), "these versions", tmp_path)._built(problem)
    assert made.workspace_bytes == 7 and not current
