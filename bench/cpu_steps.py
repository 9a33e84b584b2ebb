"""Training steps on a CPU that is not alone: CPU time of one thread, fused and eager in turn.

    python bench/cpu_steps.py resnet50 bf16 --size 224 --batch 16

The wall clock of two threads says little while other processes use the cores: threads wait for each other at barriers. The CPU time
of one thread counts this process alone, though others still share caches and memory. `fused-resnet bench train` times a quiet machine.
"""

import argparse
import statistics
import time

import torch

import fused_resnet
from fused_resnet import backends, models

BACKENDS = ("off", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=models.list_models())
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = getattr(models, args.model)().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    images = torch.randn(args.batch, 3, args.size, args.size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (args.batch,))

    def step(backend: str) -> float:
        start = time.process_time()
        with fused_resnet.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return time.process_time() - start

    for backend in BACKENDS:
        step(backend)
    times = list(zip(*([step(backend) for backend in BACKENDS] for _ in range(args.rounds)), strict=True))
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    print(f"{args.model}, {args.dtype}, batch {args.batch} at {args.size}x{args.size}, PyTorch {torch.__version__}, CPU time of one thread")
    print(f"fused: backend {backends.resolve(torch.device('cpu'), dtype)}")
    for name, pick in (("median", statistics.median), ("best", min)):
        eager, fused = (pick(t) * 1e3 for t in times)
        print(f"{name} of {args.rounds}: eager {eager:.0f} ms, fused {fused:.0f} ms, ratio {eager / fused:.2f}")


if __name__ == "__main__":
    main()
