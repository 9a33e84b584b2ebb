"""What processes send each other in a step: by hand, and what PyTorch's DistributedDataParallel hands to its collective."""

import pytest
import torch
from support.commands import refused
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from fused_resnet.cli import main
from fused_resnet.communication import sent
from fused_resnet.models import resnet20


def test_by_hand():
    found = sent(1_000, [10, 6], 4)
    assert found["ddp"].bytes == 2 * 3 / 4 * 4_000 and found["ddp"].messages == 1
    assert found["ddp, 16 bits"].bytes == found["ddp"].bytes / 2
    assert found["fsdp2"].bytes == 3 / 4 * (2_000 + 2_000 + 4_000)
    forward, backward = 3 * 4 * (22 + 14), 2 * 3 / 4 * 4 * (21 + 13)  # as fused_resnet/collectives.py packs them
    assert found["+sync-bn"].bytes == forward + backward and found["+sync-bn"].messages == 4
    assert found["ddp"].seconds(1e3) == 6
    with pytest.raises(ValueError, match="processes: expected at least 2, got 1"):
        sent(1, [], 1)


def test_ddp_hands_over_what_is_counted(tmp_path):
    """Its buckets and their bytes, in a step of a group of one process."""
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model, handed = DistributedDataParallel(resnet20(width=64)), []

        def hook(_, bucket):
            handed.append(bucket.buffer().numel() * bucket.buffer().element_size())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, hook)
        for _ in range(2):  # after the first step the buckets are those of the order in which gradients came
            handed.clear()
            model(torch.randn(2, 3, 8, 8)).sum().backward()
        way = sent(sum(p.numel() for p in model.parameters()), [], 2)["ddp"]
        assert sum(handed) == way.bytes and abs(len(handed) - way.messages) <= 1
    finally:
        distributed.destroy_process_group()


def test_the_command_prints_it(capsys):
    assert main(["roofline", "--model", "resnet50", "--batch", "32", "--device", "h100", "--gpus", "8", "--csv"]) == 0
    lines = {line.split(",")[0]: line.split(",") for line in capsys.readouterr().out.splitlines()}
    assert lines["ddp"][1:4] == ["5", "178.9", "3.58"]  # 2 · 7/8 · 25,557,032 parameters · 4 bytes, at 50 GB/s
    assert lines["+sync-bn"][1] == "106"  # two for each of 53 norms
    assert main(["roofline", "--model", "resnet20", "--size", "32", "--device", "h100", "--gpus", "2", "--link", "0.1", "--csv"]) == 0
    lines = {line.split(",")[0]: line.split(",") for line in capsys.readouterr().out.splitlines()}
    assert lines["ddp"][2:4] == ["1.1", "10.79"]  # 269,722 parameters
    assert "argument --gpus: expected at least 2; got 1" in refused(capsys, "roofline", "--gpus", "1")
    assert "argument --link: expected --gpus beside it" in refused(capsys, "roofline", "--link", "25")
