"""Make docs/results.md from all files under bench/results: `python bench/write_results.py`."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from fused_resnet.bench.schema import SUITES, Meta, Results, SchemaError, read_results
from fused_resnet.bench.table import Column, tables

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Results

Made by `python bench/write_results.py` from the files under `bench/results/`; how they are measured is in [benchmarks](benchmarks.md).
"""
NOTHING = """
**Not measured.** There is no file of a GPU's figures yet. On a machine with one, `bench/gpu_check.sh kernels OUT` and its parts
`convolutions`, `blocks`, `train` and `inference` write them to `OUT/results`.
"""
EXPLAINED = {
    "kernels": "`of copy`: the bandwidth over that of a device-to-device copy in the same run. Of convolutions a line a shape: ms, and in "
    "brackets the fraction of the floor's speed, at the rates of a copy and a matrix product of the same run.",
    "blocks": "Forward and backward of one residual block in training.",
    "train": "`of floor`: the floor of everything fused, at the rates of a copy and a matrix product of the same run, over the median.",
    "inference": "Forward in evaluation mode, ours folded.",
}


def runs(folder: Path) -> dict[tuple[str, str], list[Results]]:
    """The files under `folder` by (device, suite), the newest first."""
    found: dict[tuple[str, str], list[Results]] = {}
    for path in sorted(folder.rglob("*.json")):
        results = read_results(path)
        found.setdefault((results.meta.device, results.rows[0].suite), []).append(results)
    for files in found.values():
        files.sort(key=lambda results: results.meta.date, reverse=True)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], SUITES.index(item[0][1]))))


def document(folder: Path) -> str:
    """The page: GPUs first. A CPU's times say nothing about a GPU."""
    found = sorted(runs(folder).items(), key=lambda item: item[0][0] == "cpu")
    lines = [HEAD]
    if all(device == "cpu" for (device, _), _ in found):
        lines.append(NOTHING)
    for (device, suite), files in found:
        lines.append(f"\n## {device}: {suite}\n\n{EXPLAINED[suite]}\n")
        for results in files:
            found, notes = tables(results.rows)
            lines.append(f"\n{_words(results.meta)}\n")
            for table in found:
                lines += ["\n", *_table(table)]
            lines += ["\n" * bool(notes), *(f"- {note}\n" for note in notes)]
    return "".join(lines)


def _words(meta: Meta) -> str:
    versions = [("commit", meta.commit[:12]), ("", meta.date), ("PyTorch", meta.torch), ("Triton", meta.triton), ("CUDA", meta.cuda),
                ("cuDNN", meta.cudnn), ("driver", meta.driver), ("", meta.cpu), ("", meta.isa), ("threads:", meta.threads),
                ("oneDNN", meta.onednn), ("load average before:", meta.load)]  # fmt: skip
    clocks = [f"{name} clock {mhz} MHz" for name, mhz in (meta.clocks or {}).items() if not name.endswith("_max")]
    return ", ".join([*(f"{name} {value}".strip() for name, value in versions if value is not None), *clocks]) + ":"


def _table(found: list[Column]) -> Iterator[str]:
    yield "| " + " | ".join(head for head, _, _ in found) + " |\n"
    yield "|" + "|".join("---:" if figure else "---" for _, _, figure in found) + "|\n"
    for cells in zip(*(texts for _, texts, _ in found), strict=True):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main(arguments: list[str] | None = None) -> int:
    """The program; gives its exit status."""
    parser = argparse.ArgumentParser(description="Make docs/results.md from all files under bench/results.")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md", metavar="FILE")
    args = parser.parse_args(arguments)
    try:
        text = document(args.results)
    except SchemaError as error:
        parser.error(str(error))
    args.out.write_text(text, encoding="utf-8")
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
