"""What the programs in bench/ share: their arguments, and how their rows go out."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .machine import collect_meta, current_commit
from .schema import Results, Row, results_path, write_results

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BAD_ARGUMENT, NO_GPU = 2, 3  # exit statuses; the second where there is nothing to measure on


def positive(text: str) -> int:
    """A command line's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def arguments(description: str, example: str, implementations: Sequence[str], default_dtype: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all programs take."""
    parser = argparse.ArgumentParser(description=description, epilog=f"example: {example}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a small run by the wall clock")
    parser.add_argument("--dtype", choices=DTYPES, default=default_dtype)
    parser.add_argument("--batch", type=positive, help="images in a batch; 256, few on a CPU")
    parser.add_argument("--size", type=positive, help="height and width of an image in pixels; 224, less on a CPU")
    parser.add_argument("--impl", nargs="+", choices=implementations, help="what to run; all, or on a CPU all but compile")
    parser.add_argument("--commit", help="of this repository; by default git is asked")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="the folder that the JSON goes under")
    return parser


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of programs that time."""
    parser.add_argument("--repeats", type=positive, default=50, help="timed calls of each implementation")
    parser.add_argument("--limit", type=positive, default=60, metavar="SECONDS", help="for one implementation of one case")


def settle(args: argparse.Namespace, implementations: Sequence[str], small: tuple[int, int]) -> torch.device:
    """Fill in what depends on the device, and the commit, and give the device. `small`: batch and image size on a CPU.

    Ends the program, before anything is measured, with `NO_GPU` where there is none, and with `BAD_ARGUMENT` where neither the
    user nor git tells the commit.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU is available: nothing is measured (--device cpu runs a small case)", file=sys.stderr)
        raise SystemExit(NO_GPU)
    try:
        args.commit = args.commit or current_commit()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        raise SystemExit(BAD_ARGUMENT) from None
    on_gpu = args.device == "cuda"
    batch, size = (256, 224) if on_gpu else small
    args.batch, args.size = args.batch or batch, args.size or size
    args.impl = args.impl or [impl for impl in implementations if on_gpu or impl != "compile"]
    return torch.device(args.device)


def report(rows: list[Row], device: torch.device, commit: str, out: Path) -> int:
    """Write the rows as JSON under `out`, print them, and give the exit status: 1 where one is wrong, or ours did not run on a GPU."""
    results = Results(collect_meta(device, commit), rows)
    path = results_path(out, results)
    write_results(results, path)
    print(f"\n{results.meta.device}, {rows[0].dtype}, batch {rows[0].batch}" + (", by the wall clock" if device.type == "cpu" else ""))
    print(f"{'case':<32}{'shape':<16}{'impl':<14}{'ms':>10}{'p10':>10}{'p90':>10}{'images/s':>10}{'GB/s':>8}{'of copy':>9}{'of floor':>9}")
    for row in rows:
        shape = "x".join(map(str, row.shape or ()))
        line = f"{row.case:<32}{shape:<16}{row.impl:<14}"
        if row.status != "ok":
            print(f"{line}  {row.status}")
            continue
        figures = ((row.median_ms, "10.4f"), (row.p10_ms, "10.4f"), (row.p90_ms, "10.4f"), (row.images_per_s, "10,.1f"),
                   (row.gbytes_per_s, "8,.0f"), (row.copy_fraction, "9.2f"), (row.roofline_fraction, "9.2f"))  # fmt: skip
        print(line + "".join(" " * int(form.partition(".")[0].rstrip(",")) if v is None else f"{v:{form}}" for v, form in figures))
    print(f"written to {path}")
    needed = device.type == "cuda"  # of ours, which has kernels for it
    return int(any(row.status.startswith("wrong") or (needed and row.impl.startswith("ours") and row.status != "ok") for row in rows))
