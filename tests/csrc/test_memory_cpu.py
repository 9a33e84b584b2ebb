"""The memory of activations on a CPU: kept for the next of its size, never shared by two tensors, and given back."""

import gc
import multiprocessing
import os
import pickle
import threading

import pytest
import torch

import fused_resnet
from fused_resnet.backends import BACKENDS

PASSES = BACKENDS["passes_cpu"]
MIB = 2**20


@pytest.fixture(autouse=True)
def alone():
    """Nothing is kept from before, nor after."""
    if reason := PASSES.why_not(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    gc.collect()
    fused_resnet.release_memory()
    yield
    fused_resnet.release_memory()


def activation(mib: int, value: float = 1.0) -> torch.Tensor:
    """act = relu(value) of so many MiB, made by a pass."""
    x = torch.ones(mib, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    return PASSES.operators.norm_add_act(x, torch.full((64,), value), torch.zeros(64), None, None, None, True, False)[0]


def resident() -> int:
    """Bytes that the process has in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_next_of_a_size_takes_the_memory_of_the_last():
    act = activation(8)
    assert act.is_contiguous(memory_format=torch.channels_last) and act.shape == (8, 64, 64, 64)
    place = act.data_ptr()
    assert place % (2 * MIB) == 0
    del act
    again = activation(8, 2.0)
    assert again.data_ptr() == place and bool((again == 2.0).all())


def test_memory_lives_as_long_as_any_view_of_it():
    act = activation(4, 3.0)
    view = act[1:, :, 3].detach()
    del act
    others = [activation(4, 5.0) for _ in range(3)]
    assert bool((view == 3.0).all())
    assert len({other.data_ptr() for other in others}) == 3


def test_small_tensors_are_pytorch_s_own():
    x = torch.ones(1, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    PASSES.operators.norm_add_act(x, torch.ones(64), torch.zeros(64), None, None, None, True, False)
    assert fused_resnet.release_memory() == 0


def test_release_gives_memory_back_to_the_system():
    acts = [activation(16) for _ in range(6)]
    before = resident()
    assert fused_resnet.release_memory() == 0  # all are in use
    del acts
    assert fused_resnet.release_memory() == 6 * 16 * MIB
    assert before - resident() > 80 * MIB
    assert fused_resnet.release_memory() == 0


def test_sizes_that_are_no_longer_made_go_back_by_themselves():
    activation(64)
    for size in (4, 6, 8, 10) * 60:  # of several sizes, as a step makes
        activation(size)
    assert fused_resnet.release_memory() <= 2 * (4 + 6 + 8 + 10) * MIB


def test_a_steady_loop_holds_as_much_as_it_uses():
    held = []
    for _ in range(30):
        kept = [activation(size) for size in (4, 8, 4, 12)]
        held.append(kept)
        if len(held) > 2:
            held.pop(0)
    held.clear()
    del kept
    assert fused_resnet.release_memory() <= 3 * 28 * MIB


def test_threads_never_share_memory():
    wrong = []

    def make(number: int) -> None:
        for round_ in range(20):
            acts = [activation(4, number + round_ / 32) for _ in range(3)]
            if not all(bool((act == number + round_ / 32).all()) for act in acts):
                wrong.append(number)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(queue) -> None:
    torch.set_num_threads(1)
    queue.put(float(activation(4, 2.0).sum()) / (4 * MIB / 4))


def test_a_process_that_forks_while_threads_make_tensors():
    stop = threading.Event()

    def make() -> None:
        while not stop.is_set():
            activation(2)

    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    thread = threading.Thread(target=make)
    thread.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(5):
            queue = context.Queue()
            child = context.Process(target=_in_child, args=(queue,))
            child.start()
            assert queue.get(timeout=60) == 2.0
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        thread.join()


def test_what_else_is_done_with_tensors():
    act = activation(4, 2.0)
    assert act.numpy().sum() == 2.0 * 4 * MIB / 4
    assert torch.equal(pickle.loads(pickle.dumps(act)), act)
    assert torch.equal(act.clone().share_memory_(), act)
    act.share_memory_()
    assert act.is_shared() and bool((act == 2.0).all())
    leaf = activation(4).requires_grad_()
    (leaf * 2).sum().backward()
    assert bool((leaf.grad == 2.0).all())
