"""On a CPU, fused: thousands of steps keep to their memory and handles, threads train at once, and forked workers go on where a process has begun.

Each by the backend `passes_cpu`; what it computes is other tests' business.
"""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.checkout import ROOT, TESTS
from support.small import SIZE, network
from torch.utils.data import DataLoader, Dataset

import fused_resnet
from fused_resnet import derived
from fused_resnet.backends import BACKENDS

CPU = torch.device("cpu")
WHY = BACKENDS["passes_cpu"].why_not(CPU, torch.float32)
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))
PROCESS = Path("/proc/self")
needs_proc = pytest.mark.skipif(not PROCESS.exists(), reason="reads /proc")
#: Bytes that a process may grow by for its own reasons, such as the pools of Python and of glibc: of 2,000 steps, two KiB each.
SLACK = 4 * 2**20


class Held(NamedTuple):
    """What a process holds."""

    resident_bytes: int
    files: int
    threads: int
    derived: int  #: parameters of which something was made


def held() -> Held:
    """Now, without what nobody refers to."""
    gc.collect()
    resident = next(1024 * int(line.split()[1]) for line in (PROCESS / "status").read_text().splitlines() if line.startswith("VmRSS:"))
    return Held(resident, len(os.listdir(PROCESS / "fd")), len(os.listdir(PROCESS / "task")), len(derived._KEPT))


def growth(step, warm: int, steps: int) -> Held:
    """What the process holds more than before, after `steps` calls, before which there were `warm`."""
    for _ in range(warm):
        step()
    before = held()
    for _ in range(steps):
        step()
    return Held(*(after - then for after, then in zip(held(), before, strict=True)))


class Training:
    """Steps of a small network, under autocast or not."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.model = network(dtype=torch.float32, width=1 if dtype == torch.float32 else 4).train()  # wide enough for AMX
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        self.images, self.labels = torch.randn(SIZE), torch.arange(SIZE[0])
        self.dtype = dtype

    def step(self) -> float:
        """The loss."""
        with fused_resnet.backend("passes_cpu"), torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = torch.nn.functional.cross_entropy(self.model(self.images).float(), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_thousand_steps_keep_to_their_memory(dtype):
    more = growth(Training(dtype).step, 200, 2000)
    print(more)
    assert more.resident_bytes <= SLACK and more[1:] == (0, 0, 0)


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_images_keep_to_their_memory():
    """In inference, also where a weight changes at every call, and where sizes do."""
    folded, sizes = fused_resnet.fold(network(dtype=torch.float32).eval()), []

    def step():
        sizes.append(len(sizes) % 11 + 1)
        with torch.no_grad():
            folded.conv1.weight.mul_(1.0)
            folded(torch.randn(sizes[-1], *SIZE[1:]))

    with fused_resnet.backend("passes_cpu"):
        more = growth(step, 200, 2000)
    print(more)
    assert more.resident_bytes <= SLACK and more[1:] == (0, 0, 0)


@needs_proc
def test_fifty_steps_leave_no_handles():
    assert growth(Training().step, 5, 50)[1:] == (0, 0, 0)


@needs_proc
@pytest.mark.full
def test_what_is_not_let_go_of_is_seen():
    training, kept = Training(), []
    more = growth(lambda: (training.step(), kept.append((torch.ones(2**14), open(os.devnull)))), 5, 500)  # noqa: SIM115
    for _, file in kept:
        file.close()
    assert more.resident_bytes > SLACK and more.files == 500


@pytest.mark.parametrize("of_each", [1, 2])
def test_four_threads_train_at_once_with_the_same_bits(of_each):
    """Each its own network, as it would alone: every parameter and running statistic."""
    before = torch.get_num_threads()
    torch.set_num_threads(of_each)
    try:
        torch.manual_seed(0)
        trainings = [Training(dtype) for dtype in (torch.float32, torch.bfloat16) * 2]
        states = [{k: v.clone() for k, v in t.model.state_dict().items()} for t in trainings]

        def run(training: Training) -> None:
            for _ in range(10):
                training.step()

        threads = [threading.Thread(target=run, args=(training,)) for training in trainings]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = [{k: v.clone() for k, v in t.model.state_dict().items()} for t in trainings]
        for training, state, found in zip(trainings, states, together, strict=True):
            training.model.load_state_dict(state)
            training.optimizer.state.clear()
            run(training)
            for name, alone in training.model.state_dict().items():
                assert torch.equal(found[name], alone), (training.dtype, name)
            assert not torch.equal(found["fc.weight"], state["fc.weight"])
    finally:
        torch.set_num_threads(before)


class Scores(Dataset):
    """What a network makes of images, in the worker that loads them."""

    def __init__(self, model: torch.nn.Module, images: torch.Tensor):
        self.model, self.images = model, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with torch.no_grad(), fused_resnet.backend("passes_cpu"):
            return self.model(self.images[index : index + 1])[0], os.getpid()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["fused", "folded"])
def test_forked_workers_go_on(kind):
    """The process has used its threads before: a worker that waited for them would hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        training = Training()
        training.step()
        model = training.model.eval() if kind == "fused" else fused_resnet.fold(training.model.eval())
        with torch.no_grad(), fused_resnet.backend("passes_cpu"):
            expected = model(training.images)
        loader = DataLoader(Scores(model, training.images), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=120)
        found, workers = zip(*loader, strict=True)
        assert os.getpid() not in torch.cat(workers).tolist() and len(set(torch.cat(workers).tolist())) == 2
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)
        training.model.train()
        training.step()
    finally:
        torch.set_num_threads(before)


def train_forked() -> None:
    """Forked behind the first step, with one thread and the parent's state, a child makes the parent's second step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    training = Training(torch.bfloat16)
    training.step()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writer, training.step().hex().encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    assert os.waitpid(child, 0)[1] == 0
    assert float.fromhex(answer) == training.step()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_trains_with_the_same_bits():
    """In a process of its own: PyTorch refuses a backward in a fork of one in which autograd has had threads, as other tests let it."""
    paths = os.pathsep.join(map(str, (Path(__file__).parent, TESTS, ROOT)))
    command = [sys.executable, "-c", "import test_cpu_robustness; test_cpu_robustness.train_forked()"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
