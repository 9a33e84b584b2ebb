"""Two processes on gloo, by torchrun, against one process with the whole batch. Each script in tests/distributed/ holds its own checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package")


def torchrun(*command: str, processes: int = 2, **environment: str) -> str:
    """What the processes printed; the test fails with it where one of them did."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=500, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-10000:]
    return result.stdout


@pytest.mark.parametrize("script", ["ddp", "sync_bn", "fsdp"])
def test_two_processes_train_as_one(script, seed):
    torchrun(str(ROOT / "tests" / "distributed" / f"{script}.py"), str(seed))
