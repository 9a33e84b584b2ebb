"""Print what each kernel of a training step moves, counted from what the operators launch. Needs no GPU: see fused_resnet.bench.traffic.

python bench/count_traffic.py --model resnet50 --batch 256
"""

import argparse
import itertools

import torch

import fused_resnet
from fused_resnet import models
from fused_resnet.bench.traffic import by_name, training_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=models.list_models(), default="resnet50", metavar="MODEL")
    parser.add_argument("--batch", type=int, default=256, metavar="N")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS")
    args = parser.parse_args()
    shape = (args.batch, 3, args.size, args.size)
    for backend, again in itertools.product(("passes_triton", "triton"), (False, True)):

        def make(again=again):
            return fused_resnet.recompute(models.get_model(args.model), again)

        step = training_step(make, shape, torch.bfloat16, backend)
        rows = by_name(step.moved)
        total = tuple(sum(row[i] for row in rows.values()) for i in range(3))
        words = f"{backend}, recompute" if again else backend
        print(
            f"\n{words}, {args.model}, batch {args.batch} of {args.size}x{args.size}, bfloat16; MB an image; "
            f"{step.saved / args.batch / 1e6:.2f} held for backward\n"
        )
        print(f"{'kernel':<42} {'launches':>8} {'moved':>8} {'workspace':>10}")
        for name, (launches, moved, workspace) in {**rows, "all": total}.items():
            print(f"{name:<42} {launches:>8} {moved / args.batch / 1e6:>8.2f} {workspace / args.batch / 1e6:>10.2f}")


if __name__ == "__main__":
    main()
