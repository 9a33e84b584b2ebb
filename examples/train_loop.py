"""A plain training loop on a fused ResNet.

    python examples/train_loop.py --steps 2 --image 64 --batch 8

Images are random: this shows the loop, not the data.
"""

import argparse

import torch
from torch import nn

import fused_resnet


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the losses, step by step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--model", default="resnet50", help="one of fused_resnet.models.list_models()")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = fused_resnet.models.get_model(options.model, num_classes=options.classes)  # fused from the start
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(options.steps):
        images = torch.randn(options.batch, 3, options.image, options.image, device=device)
        labels = torch.randint(options.classes, (options.batch,), device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for number, loss in enumerate(main(), 1):
        print(f"step {number}: loss {loss:.4f}")
