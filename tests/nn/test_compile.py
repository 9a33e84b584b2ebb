"""torch.compile of a network on the operators: one graph, no recompilation, any batch size, the same numbers; CUDA graphs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.small import SIZE, network, nodes
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fused_resnet


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def images(batch: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    return torch.randn(batch, *SIZE[1:], dtype=dtype, device=device)


def assert_trains_alike(compiled, ours: nn.Module, plain: nn.Module, batches: list[torch.Tensor], backend: str, tolerance: float) -> None:
    """Steps of SGD by the compiled network, and by PyTorch's modules: losses, parameters and buffers."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (ours, plain)]
    for x in batches:
        losses = []
        for model, optimizer, name in zip((compiled, plain), optimizers, (backend, "off"), strict=True):
            with fused_resnet.backend(name):
                loss = F.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=100 * tolerance, atol=100 * tolerance, msg=name)


@pytest.mark.parametrize("engine", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_for_every_step_and_batch_size(engine):
    """The first batch size, then one graph for any other; the operators are in it, and PyTorch's batch norm is not."""
    ours = network()
    plain, counter = copy.deepcopy(ours), CompileCounterWithBackend(engine)
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    batches = [images(n) for n in (4, 4, 6, 3, 4)]
    assert_trains_alike(compiled, ours, plain, batches, "eager", 1e-9)
    assert counter.frame_count == 2
    targets = [str(node.target) for node in counter.graphs[-1].graph.nodes]
    assert sum("fused_resnet" in t and "conv" in t for t in targets) == nodes(ours)
    assert not any("batch_norm" in t for t in targets)


@pytest.mark.slow
def test_a_batch_that_is_dynamic_from_the_start_takes_one_graph():
    ours = network()
    plain, counter = copy.deepcopy(ours), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter, dynamic=True)
    assert_trains_alike(compiled, ours, plain, [images(7)], "eager", 1e-9)  # sizes that no other dimension has
    graphs = counter.frame_count  # the first one may be made twice: a ratio of sizes is a number that the graph computes
    assert_trains_alike(compiled, ours, plain, [images(11), images(9)], "eager", 1e-9)
    assert counter.frame_count == graphs <= 2


@pytest.mark.parametrize(
    "norm",
    [lambda c: nn.BatchNorm2d(c, momentum=None), lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False)],
    ids=["momentum None", "bare"],
)
def test_norms_of_other_kinds_break_no_graph(norm):
    ours = network(norm)
    plain, counter = copy.deepcopy(ours), CompileCounterWithBackend("eager")
    assert_trains_alike(torch.compile(ours, fullgraph=True, backend=counter), ours, plain, [images(4)] * 3, "eager", 1e-9)
    assert counter.frame_count == 1


def test_evaluation_and_training_have_a_graph_each():
    ours = network()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for _ in range(3):
        for mode in (True, False):
            ours.train(mode)
            with fused_resnet.backend("eager"), torch.set_grad_enabled(mode):
                compiled(images(4))
    assert counter.frame_count == 2


def test_a_backend_of_another_name_is_another_graph():
    """The choice in force is guarded: a compiled network does not stay with the one that it was compiled under."""
    ours = network()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for name in ("eager", "off", "eager", "off"):
        with fused_resnet.backend(name):
            compiled(images(4))
    found = [any("fused_resnet" in str(node.target) for node in graph.graph.nodes) for graph in counter.graphs]
    assert found == [True, False]


@pytest.mark.usefixtures("on_device")
def test_kernels_that_choose_by_size_take_any_batch_size():
    """Whether the activation is kept depends on the batch; a graph for any batch asks for it."""
    ours = network(dtype=torch.float32)
    plain, counter, graphs = copy.deepcopy(ours), CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(ours.layer3, fullgraph=True, backend=counter, dynamic=True)
    for batch in (5, 6):  # sizes that no other dimension has
        x = torch.randn(batch, 32, 3, 4)
        with fused_resnet.backend("triton"):
            out = compiled(x)
        expected = plain.layer3(x)
        out.square().sum().backward(), expected.square().sum().backward()
        graphs.append(counter.frame_count)
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    for (name, p), q in zip(ours.layer3.named_parameters(), plain.layer3.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-2 * q.grad.norm(), name
    assert graphs[0] == graphs[1] <= 2


def test_a_hook_in_a_compiled_network_falls_back_for_its_block():
    ours, seen = network(), []
    ours.layer1[1].bn2.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    plain = copy.deepcopy(ours)
    assert_trains_alike(torch.compile(ours, backend="eager"), ours, plain, [images(4)] * 2, "eager", 1e-9)
    assert len(seen) == 4


def test_a_compiled_block_is_called_as_a_module():
    """`block.compile()`, one by one, as people do for large networks."""
    ours = network()
    plain, counter = copy.deepcopy(ours), CompileCounterWithBackend("eager")
    for stage in ours.stages():
        for block in stage:
            block.compile(fullgraph=True, backend=counter)
    assert_trains_alike(ours, ours, plain, [images(4)] * 2, "eager", 1e-9)
    assert counter.frame_count == 4  # once each


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_a_gpu(mode, device):
    ours = network(dtype=torch.float32).to(device)
    plain = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, mode=mode)
    batches = [images(8, torch.float32, "cuda") for _ in range(5)]
    assert_trains_alike(compiled, ours, plain, batches, "passes", 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["passes", "triton", "tuned"])
def test_a_whole_step_in_a_cuda_graph(backend, device):
    """Forward, backward and SGD are captured once and replayed; statistics and counters go on, as without a graph."""
    ours = network(dtype=torch.float32).to(device)
    batches = [images(8, torch.float32, "cuda") for _ in range(6)]
    labels, loss_fn, expected, found = torch.arange(8, device=device) % 5, F.cross_entropy, [], []

    def step(model, optimizer, x):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    with fused_resnet.backend(backend):
        stream, static = torch.cuda.Stream(), batches[0].clone()
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.01, momentum=0.9)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(ours, optimizer, static)
        torch.cuda.current_stream().wait_stream(stream)
        plain = copy.deepcopy(ours)
        plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
        plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step(ours, optimizer, static)
        for x in batches:
            static.copy_(x)
            graph.replay()
            found.append(loss.clone())
            expected.append(step(plain, plain_optimizer, x))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-3, atol=1e-3)
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)
    assert ours.bn1.num_batches_tracked == 3 + len(batches)
