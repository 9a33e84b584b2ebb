"""`fused-resnet evaluate`: the accuracy of a trained network, on the images that its run evaluated or on others."""

import argparse
import json
from contextlib import nullcontext
from dataclasses import replace

from .. import backends, data
from ..train import PRECISIONS, evaluate
from .arguments import UsageError, blaming, chosen_backend, data_name, device, one_of, positive, whole_number
from .trained import Trained, add_computation, add_trained, trained

DESCRIPTION = """Top-1 and top-5 accuracy and the loss of a trained network on the evaluation split
of a data set: that of its run, or another one with the same classes."""
EXAMPLES = """example:
  fused-resnet evaluate runs/first
  fused-resnet evaluate runs/first/best.pt --precision bf16 --json
  fused-resnet evaluate runs/flowers --data imagefolder:/data/other-flowers
"""
SPLITS = ("eval", "train")


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("evaluate", help="accuracy of a trained network", description=DESCRIPTION, epilog=EXAMPLES)
    add_trained(parser)
    parser.add_argument(
        "--data", type=data_name, metavar="DATA", help=f"one of {', '.join(data.NAMES)}; or {data.SCHEME}PATH (default: the run's)"
    )
    parser.add_argument("--split", type=one_of(*SPLITS), default="eval", metavar="S", help="eval (default), train: without augmentation")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images a batch (default: the run's)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images; of a folder, N spread over its classes")
    parser.add_argument("--precision", type=one_of(*PRECISIONS), metavar="P", help=f"one of {', '.join(PRECISIONS)} (default: the run's)")
    parser.add_argument(
        "--corrupt", type=one_of(*data.CORRUPT), default="refuse", metavar="WHAT",
        help="what becomes of a folder's image that can't be decoded: refuse, skip",
    )  # fmt: skip
    parser.add_argument("--workers", type=whole_number, metavar="N", help="processes that decode a folder's images")
    add_computation(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    found = trained(args)
    where, precision = device(args.device), args.precision or found.config.precision
    with backends.backend(args.backend) if args.backend else nullcontext():
        chosen = chosen_backend(where, precision, args.backend)
        images = _images(args, found)
        loader = data.make_loader(images, getattr(images, args.split), args.batch_size or found.config.batch_size, where, False)
        with blaming("--data", data.DataError):
            scores = evaluate(found.model.to(where), loader, where, precision)
    record = {
        "model": found.config.model, "epoch": found.epoch, "data": images.name, "split": args.split, "images": scores.images,
        "precision": precision, "device": str(where), "backend": chosen, "loss": scores.loss, "top1": scores.top1, "top5": scores.top5,
        "images_per_second": scores.images_per_second,
    }  # fmt: skip
    if args.json:
        print(json.dumps(record))
        return 0
    print(f"{found.config.model} after {found.epoch} epochs on {images.name}, {args.split}: {scores.images:,} images")
    print(f"{where}, {precision}, backend {chosen}, {scores.images_per_second:,.0f} images/s")
    for note in loader.notes():
        print(note)
    print(f"top-1 {100 * scores.top1:.2f}%, top-5 {100 * scores.top5:.2f}%, loss {scores.loss:.4f}")
    return 0


def _images(args: argparse.Namespace, found: Trained) -> data.DataSet | data.FolderDataSet:
    """The data set, normalised as in training. Raises `UsageError` where it has other classes or images of another kind."""
    name = args.data or found.config.data
    of_folder = name.startswith(data.SCHEME)
    preparation = data.Preparation(shorter_side=found.data.shorter_side if of_folder else None)
    sized = of_folder or name == "synthetic"
    with blaming("--data", data.DataError):
        images = data.load(
            name, image_size=found.data.image_shape[1] if sized else None, corrupt=args.corrupt, workers=args.workers,
            preparation=preparation,
            **{"limit_train" if args.split == "train" else "limit_eval": args.limit},
        )  # fmt: skip
    if images.classes != found.data.classes:
        told = f"the {len(found.data.classes)} classes of {found.data.name}, {found.data.classes[0]} to {found.data.classes[-1]}"
        raise UsageError("--data", f"expected {told}; {images.name} has {len(images.classes)}, {images.classes[0]} to {images.classes[-1]}")
    if images.channels != found.data.channels:
        raise UsageError("--data", f"expected images of {found.data.channels} channels; those of {images.name} have {images.channels}")
    if isinstance(images, data.DataSet):
        return replace(images, **found.data.statistics())
    return images
