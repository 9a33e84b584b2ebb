"""Training a network of torchvision, with its transforms; one line makes it fused.

    python examples/train_torchvision.py --model resnet50 --steps 2 --data folder/of/class/folders

Without --data the images are random. torchvision's own script takes the same line: docs/drop-in.md.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fused_resnet


def batches(options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and labels: of a folder, or random."""
    if options.data is None:
        while True:
            yield torch.rand(options.batch, 3, options.image, options.image), torch.randint(options.classes, (options.batch,))
    from torchvision import datasets, transforms

    data = datasets.ImageFolder(
        options.data,
        transforms.Compose(
            [
                transforms.RandomResizedCrop(options.image),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        ),
    )
    while True:
        yield from torch.utils.data.DataLoader(data, options.batch, shuffle=True, drop_last=True)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the losses, step by step."""
    from torchvision import models

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", help='torchvision\'s, such as "DEFAULT"')
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.get_model(options.model, weights=options.weights, num_classes=options.classes)
    fused_resnet.fuse(model)  # the one line
    model = model.to(device)
    print(fused_resnet.report(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _, (images, labels) in zip(range(options.steps), batches(options), strict=False):
        loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for number, loss in enumerate(main(), 1):
        print(f"step {number}: loss {loss:.4f}")
