"""DistributedDataParallel around a fused ResNet: an ordinary loop, a process for each GPU.

    torchrun --nproc-per-node 8 examples/train_ddp.py --model resnet50 --batch-size 128 --sync-bn

On machines without a GPU the processes meet by gloo. The images are random; put your own DataSet in their place.
"""

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import fused_resnet


class RandomImages(Dataset):
    """Noise and labels, the same ones in every process."""

    def __init__(self, count: int, size: int, classes: int):
        self.count, self.size, self.classes = count, size, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(i)
        return torch.randn(3, self.size, self.size, generator=generator), i % self.classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--sync-bn", action="store_true", help="batch norms over the batches of all processes; on GPUs")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)

    model = fused_resnet.models.get_model(args.model, num_classes=10).to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = DistributedDataParallel(model, device_ids=[device.index] if cuda else None, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)

    images = RandomImages(args.steps * args.batch_size * dist.get_world_size(), args.image_size, classes=10)
    sampler = DistributedSampler(images, shuffle=True, drop_last=True)
    for step, (x, y) in enumerate(DataLoader(images, args.batch_size, sampler=sampler, pin_memory=cuda), start=1):
        x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = nn.functional.cross_entropy(model(x).float(), y.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and (step % 10 == 0 or step == args.steps):
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # DistributedDataParallel is part of reference cycles, and keeps gloo's threads. They must end before the interpreter does: one that
    # lets go of a tensor later aborts the process (pytorch#179291).
    gc.collect()
