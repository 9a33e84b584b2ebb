"""A choice of backend is the thread's that makes it, and its backward's."""

import threading

import torch

import fused_resnet


def test_a_choice_of_backend_is_the_threads_own():
    """Contexts that overlap in two threads leave no choice behind, and neither thread gets the other's."""
    x, seen = torch.zeros(1), {}
    before = fused_resnet.backends.resolve(x.device, x.dtype)
    barrier = threading.Barrier(2, timeout=20)

    def leave_in_order(name, first):
        context = fused_resnet.backend(name)
        if not first:
            barrier.wait()
        context.__enter__()
        if first:
            barrier.wait()
        barrier.wait()
        seen[name] = fused_resnet.backends.resolve(x.device, x.dtype)
        barrier.wait()
        if not first:
            barrier.wait()
        context.__exit__(None, None, None)
        if first:
            barrier.wait()

    threads = [threading.Thread(target=leave_in_order, args=a) for a in (("eager", True), ("off", False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == {"eager": "eager", "off": "off"}
    assert fused_resnet.backends._forced.name is None
    assert fused_resnet.backends.resolve(x.device, x.dtype) == before


def test_a_second_forward_takes_the_choice_of_its_backward_in_any_thread(monkeypatch):
    """Autograd's threads on a GPU: they are given what PyTorch hands on, and nothing of Python's own threads."""
    x, seen = torch.zeros(1), []
    before = fused_resnet.backends.resolve(x.device, x.dtype)

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, g):
            with monkeypatch.context() as patch:
                patch.setattr(fused_resnet.backends, "_forced", fused_resnet.backends._Forced())  # as in a thread that made no choice
                seen.append(fused_resnet.backends.resolve(x.device, x.dtype))
            return g

    leaf = torch.zeros(1, requires_grad=True)
    out = Asks.apply(leaf)
    with fused_resnet.backend("eager"):
        out.backward(retain_graph=True)
    out.backward()
    assert seen == ["eager", before]
