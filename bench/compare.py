"""Compare two files of figures, row by row: `python bench/compare.py OLD NEW`.

Prints NEW's median over OLD's for every row of both. Exit status 1 where a row is slower than the threshold allows by more than its spread
(NEW's 10th percentile over OLD's 90th is above 1), where one that was ok is not any more, or where one is missing; 2 where the files can't
be compared.
"""

import argparse
import sys
from pathlib import Path

from rich.table import Table

from fused_resnet.bench.schema import Results, Row, SchemaError, read_results
from fused_resnet.bench.table import console, number

Key = tuple[str, str, str, str, int | None, tuple[int, ...]]


def key(row: Row) -> Key:
    """What makes two rows the same measurement."""
    return row.suite, row.case, row.impl, row.dtype, row.batch, tuple(row.shape or ())


def verdict(old: Row, new: Row | None, threshold: float) -> tuple[float | None, str]:
    """(NEW's median over OLD's, what is wrong; nothing where nothing is)."""
    if new is None:
        return None, "missing" if old.status == "ok" else ""
    if old.status != "ok" or new.status != "ok":
        return None, new.status if old.status == "ok" else ""
    ratio = new.median_ms / old.median_ms
    if ratio > threshold and new.p10_ms > old.p90_ms:
        return ratio, "slower"
    return ratio, ""


def compare(old: Results, new: Results, threshold: float) -> tuple[Table, list[str]]:
    """(the table, the rows that fail)."""
    table = Table(title=f"{old.meta.commit[:12]} → {new.meta.commit[:12]} on {new.meta.device}", title_justify="left")
    for head in ("case", "impl", "dtype", "batch", "shape", "old ms", "new ms", "new / old", ""):
        table.add_column(head, justify="right" if head in ("old ms", "new ms", "new / old", "batch") else "left", no_wrap=True)
    found, failures = {key(row): row for row in new.rows}, []
    for row in old.rows:
        other = found.get(key(row))
        ratio, words = verdict(row, other, threshold)
        shape = "x".join(map(str, row.shape or ()))
        told = number(other.median_ms) if other else ""
        table.add_row(row.case, row.impl, row.dtype, str(row.batch or ""), shape, number(row.median_ms), told,
                      "" if ratio is None else f"{ratio:.3f}", words)  # fmt: skip
        if words:
            failures.append(f"{row.case} {row.impl} {row.dtype} {row.batch or ''} {shape}: {words}")
    return table, failures


def main(arguments: list[str] | None = None) -> int:
    """The program; gives its exit status."""
    parser = argparse.ArgumentParser(
        description="Compare two files of figures.", epilog="example: python bench/compare.py before.json after.json --threshold 1.03"
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--threshold", type=float, default=1.05, metavar="RATIO", help="the largest NEW over OLD (default: 1.05)")
    args = parser.parse_args(arguments)
    if not args.threshold > 0:
        parser.error(f"argument --threshold: expected a number above 0; got {args.threshold}")
    try:
        old, new = read_results(args.old), read_results(args.new)
    except (SchemaError, OSError) as error:
        parser.error(str(error))
    if old.meta.device != new.meta.device:
        parser.error(f"OLD, NEW: expected the same device; got {old.meta.device!r} and {new.meta.device!r}")
    if not {key(row) for row in old.rows} & {key(row) for row in new.rows}:
        parser.error("OLD, NEW: expected rows of the same cases; they share none")
    table, failures = compare(old, new, args.threshold)
    console().print(table)
    for failure in failures:
        print(failure, file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
