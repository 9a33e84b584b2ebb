"""Training steps on a CPU, for the programs here that measure them: the same network, images and optimizer in all."""

import argparse

import torch

import fused_resnet
from fused_resnet import models

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parser(description: str) -> argparse.ArgumentParser:
    """Of a program that measures steps: which network, in which dtype, of how many images of which size."""
    made = argparse.ArgumentParser(description=description.partition("\n")[0])
    made.add_argument("model", choices=models.list_models())
    made.add_argument("dtype", choices=DTYPES)
    made.add_argument("--size", type=int, default=224)
    made.add_argument("--batch", type=int, default=16)
    return made


class Training:
    """A network of this package in NHWC and SGD with momentum, under autocast where the dtype is fp16 or bf16.

    `args`: as `parser` reads them.
    """

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(0)
        self.model = getattr(models, args.model)().to(memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.images = torch.randn(args.batch, 3, args.size, args.size).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, 10, (args.batch,))
        self.dtype = DTYPES[args.dtype]
        self.words = f"{args.model}, {args.dtype}, batch {args.batch} at {args.size}x{args.size}, PyTorch {torch.__version__}"

    def loss(self) -> torch.Tensor:
        """Forward: a scalar."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return torch.nn.functional.cross_entropy(self.model(self.images).float(), self.labels)

    def step(self, backend: str) -> None:
        """Forward, backward and the optimizer."""
        with fused_resnet.backend(backend):
            loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
