"""Training a network of timm with its optimizer, scheduler, EMA and loss; one line makes it fused.

    python examples/train_timm.py --model resnet50d --steps 2

The images are random. timm's own train.py takes the same line: docs/drop-in.md.
"""

import argparse

import torch

import fused_resnet


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the losses, step by step."""
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet50d")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(options.model, num_classes=options.classes)
    fused_resnet.fuse(model)  # the one line
    model = model.to(device)
    print(fused_resnet.report(model))
    ema = ModelEmaV3(model, decay=0.99)  # a copy: fused as well
    optimizer = create_optimizer_v2(model, opt="lamb", lr=5e-3, weight_decay=0.02)
    scheduler = CosineLRScheduler(optimizer, t_initial=options.steps)
    criterion = LabelSmoothingCrossEntropy()
    losses = []
    for step in range(options.steps):
        images = torch.randn(options.batch, 3, options.image, options.image, device=device)
        labels = torch.randint(options.classes, (options.batch,), device=device)
        loss = criterion(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ema.update(model, step)
        scheduler.step(step)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for number, loss in enumerate(main(), 1):
        print(f"step {number}: loss {loss:.4f}")
