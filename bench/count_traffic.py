"""Print what each kernel of a training step moves, counted from what the operators launch. Needs no GPU: see fused_resnet.bench.traffic.

    python bench/count_traffic.py --model resnet50 --batch 256
"""

import argparse

import torch

from fused_resnet import models
from fused_resnet.bench.traffic import by_name, training_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=models.list_models(), default="resnet50", metavar="MODEL")
    parser.add_argument("--batch", type=int, default=256, metavar="N")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS")
    args = parser.parse_args()
    shape = (args.batch, 3, args.size, args.size)
    for backend in ("passes_triton", "triton"):
        rows = by_name(training_step(lambda: models.get_model(args.model), shape, torch.bfloat16, backend))
        total = tuple(sum(row[i] for row in rows.values()) for i in range(3))
        print(f"\n{backend}, {args.model}, batch {args.batch} of {args.size}x{args.size}, bfloat16; MB an image\n")
        print(f"{'kernel':<42} {'launches':>8} {'moved':>8} {'workspace':>10}")
        for name, (launches, moved, workspace) in {**rows, "all": total}.items():
            print(f"{name:<42} {launches:>8} {moved / args.batch / 1e6:>8.2f} {workspace / args.batch / 1e6:>10.2f}")


if __name__ == "__main__":
    main()
