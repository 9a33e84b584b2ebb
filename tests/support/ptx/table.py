"""The executor's table: what was run, the largest errors, the faults, planted ones, sectors and bank conflicts. docs/executed.md is its output.

    python -m tests.support.ptx.table                      # all of it: about an hour of one core, a piece after another
    python -m tests.support.ptx.table --every 5            # of the cases one in five
    python -m tests.support.ptx.table 90-bfloat16 mutants  # the pieces whose names hold one of these words, and the table of all that there are

A piece that has run stays in build/ptx/table until it is removed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "ptx" / "table"
ARCHITECTURES, ARITHMETIC = (80, 90), ("bfloat16", "float16", "float32", "tf32")
#: Sectors of which less is used have a line of their own.
WELL_USED = 0.9


def pieces(every: int) -> Iterator[tuple[str, str, int, list[str]]]:
    """(table, name, architecture, arguments of `measure`)."""
    for architecture in ARCHITECTURES:
        for arithmetic in ARITHMETIC:
            yield "values", f"{architecture}-{arithmetic}-every-{every}", architecture, [arithmetic, "--every", str(every)]
    for architecture in ARCHITECTURES:
        yield "mutants", f"{architecture}-mutants", architecture, ["bfloat16", "--mutants"]
        for arithmetic in ARITHMETIC:
            yield "traffic", f"{architecture}-{arithmetic}-traffic", architecture, [arithmetic, "--traffic"]


def path(name: str) -> Path:
    """Of what a piece has printed."""
    return FOLDER / f"{triton.__version__}-{name}.jsonl"


def lines(name: str, architecture: int, arguments: list[str]) -> list[dict]:
    """A piece, from its file or run. Raises CalledProcessError where it does not end well."""
    if not path(name).exists():
        print(f"running {name}", file=sys.stderr, flush=True)
        environment = os.environ | {"PTX_ARCHITECTURE": str(architecture), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.support.ptx.measure", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        FOLDER.mkdir(parents=True, exist_ok=True)
        path(name).write_text(done.stdout)
    return [json.loads(line) for line in path(name).read_text().splitlines()]


def row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def values(outcomes: list[dict]) -> Iterator[str]:
    """A line for each kernel or pass and arithmetic, both architectures together."""
    groups = defaultdict(list)
    for outcome in outcomes:
        groups[outcome["kernel"], outcome["arithmetic"]].append(outcome)
    yield row("kernel or pass", "arithmetic", "codes", "results", "largest error", "faults", "other bits when run again")
    yield row("---", "---", *["---:"] * 5)
    for (kernel, arithmetic), found in sorted(groups.items(), key=lambda g: (g[0][0], ARITHMETIC.index(g[0][1]))):
        codes = {(outcome["architecture"], code) for outcome in found for code in outcome["codes"]}
        ratios = [ratio for outcome in found for ratio in outcome["ratios"].values()]
        yield row(
            f"`{kernel}`", arithmetic, len(codes), len(ratios), f"{max(ratios):.2f}", sum(len(o["faults"]) for o in found),
            sum(not o["same_bits"] for o in found),
        )  # fmt: skip
    ratios = [ratio for outcome in outcomes for ratio in outcome["ratios"].values()]
    codes = {(outcome["architecture"], code) for outcome in outcomes for code in outcome["codes"]}
    yield row(
        "all", "", len(codes), len(ratios), f"{max(ratios):.2f}", sum(len(o["faults"]) for o in outcomes),
        sum(not o["same_bits"] for o in outcomes),
    )  # fmt: skip


def planted(mutants: list[dict]) -> Iterator[str]:
    """Of hand-written kernels, then a line for each compiled one."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.ptx import faults

    caught = sum(faults.caught(fault) for fault in faults.FAULTS.values())
    yield f"Planted by hand: {caught} of {len(faults.FAULTS)} faults reported, {len(faults.UNKNOWN)} unknown instructions refused."
    yield ""
    yield row(
        "compiled kernel", "sm", "lines taken out, one at a time", "reported", "masks that values show", "unseen", "harmless: the same bits"
    )
    yield row("---", "---", *["---:"] * 5)
    for mutant in mutants:
        counts = [len(mutant[key]) for key in ("reported", "compared", "silent", "harmless")]
        yield row(f"`{mutant['kernel']}`, {mutant['words']}", mutant["architecture"], sum(counts), *counts)


def traffic(found: list[dict]) -> Iterator[str]:
    """Of each kernel the sectors of all arguments, those badly used by name, and conflicts where there are any."""
    yield row(
        "kernel", "sm", "arithmetic", "used of the sectors touched", f"arguments under {WELL_USED}", "wavefronts over the fewest possible"
    )
    yield row("---", "---", "---", "---:", "---", "---")
    for one in sorted(found, key=lambda o: (o["kernel"], o["architecture"], ARITHMETIC.index(o["arithmetic"]))):
        sectors = Counter({name: count for name, (_, count) in one["arguments"].items()})
        used = sum(share * sectors[name] for name, (share, _) in one["arguments"].items()) / max(1, sectors.total())
        bad = [f"{name.removesuffix('_ptr')} {share:.2f}" for name, (share, _) in one["arguments"].items() if share < WELL_USED]
        conflicts = [f"{what} {ratio:.2f}" for what, ratio in one["conflicts"].items() if ratio > 1.005]
        yield row(f"`{one['kernel']}`", one["architecture"], one["arithmetic"], f"{used:.2f}", ", ".join(bad), ", ".join(conflicts) or "1")


def main() -> None:
    """Run what is missing of the pieces that are asked for, and print the table of all that there are."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    asked = parser.parse_args()
    found: dict[str, list[dict]] = defaultdict(list)
    missing = []
    for table, name, architecture, arguments in pieces(asked.every):
        if not asked.words or any(word in name for word in asked.words) or path(name).exists():
            found[table] += lines(name, architecture, arguments)
        else:
            missing.append(name)
    print(f"Triton {triton.__version__}" + (f"; not run: {', '.join(missing)}" if missing else "") + "\n")
    for title, table in (("Values", values), ("Planted faults", planted), ("Sectors and bank conflicts", traffic)):
        if rows := found[{values: "values", planted: "mutants", traffic: "traffic"}[table]]:
            print(f"### {title}\n\n" + "\n".join(table(rows)) + "\n")
    unfenced = sum(outcome["unfenced"] for outcome in found["values"])
    print(f"A wgmma read what cp.async had written with no fence.proxy.async behind it in {unfenced} of {len(found['values'])} cases.")
    wrong = [
        o for o in found["values"] if o["faults"] or not o["same_bits"] or max(o["ratios"].values()) > 1
    ] + [m for m in found["mutants"] if m["silent"]]  # fmt: skip
    for each in wrong:
        print("WRONG:", json.dumps(each))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
