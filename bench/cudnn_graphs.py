"""What cuDNN's fused graphs can do: which it accepts, and how fast they are on a network's shapes. See docs/backends.md.

python bench/cudnn_graphs.py probe OUT                     on a GPU: each graph, each dtype, tried and checked
python bench/cudnn_graphs.py probe OUT --properties FILE   on none: what cuDNN proposes for the GPU that FILE describes
python bench/cudnn_graphs.py table                         docs/backends.md's tables, of the files in bench/cudnn_graphs/
python bench/cudnn_graphs.py shapes OUT --batch 64 256 400 on a GPU: eager, passes, triton and cudnn on ResNet-50's shapes
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import models
from fused_resnet.backends.triton import capability
from fused_resnet.bench.machine import collect_meta, current_commit, measure_ceilings
from fused_resnet.bench.schema import DATE_FORMAT, Results, Row, results_path, write_results
from fused_resnet.bench.table import console, results_table
from fused_resnet.bench.timing import Times, attempt, measure
from fused_resnet.bench.tune import EPS, Trial, in_order, tasks_of
from fused_resnet.cudnn import library, probe
from fused_resnet.files import with_section
from fused_resnet.problem import NormProblem
from fused_resnet.tuning import CUDNN, Entry, Table, Task, heuristics

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "bench" / "cudnn_graphs"
PAGE = ROOT / "docs" / "backends.md"
DTYPES = ("float16", "bfloat16", "float32")
NOTHING = "\n**Not measured.** `bench/gpu_check.sh cudnn OUT` writes the files that this table is made of.\n"


# ---- which graphs are accepted ---------------------------------------------------------------------------------------


def answers(properties: dict | None, commit: str) -> dict:
    """A file's content: cuDNN's answer for each dtype and graph, null where it is accepted."""
    if properties is None:
        device = torch.device("cuda")
        name, version = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        found = {dtype: probe.why_not_graphs(dtype, device) for dtype in DTYPES}
    else:
        name, version = properties["deviceName"], divmod(properties["deviceVer"] // 10, 10)
        found = {dtype: probe.acceptance(dtype, json.dumps(properties), version[0] * 10 + version[1]) for dtype in DTYPES}
    return {
        "device": name, "capability": list(version), "ran": properties is None,
        "cudnn": ".".join(map(str, library.library_version())), "frontend": library.frontend().__version__,
        "torch": torch.__version__, "commit": commit, "date": datetime.now(timezone.utc).strftime(DATE_FORMAT), "answers": found,
    }  # fmt: skip


def run_probe(args: argparse.Namespace) -> int:
    """Writes a file of answers."""
    if reason := library.why_not():
        print(f"cudnn_graphs.py: {reason}", file=sys.stderr)
        return 1
    content = answers(json.loads(args.properties.read_bytes()) if args.properties else None, args.commit or current_commit())
    args.out.mkdir(parents=True, exist_ok=True)
    how = "ran" if content["ran"] else "proposed"
    words = f"{content['device']} cudnn {content['cudnn']} {how}".lower()
    path = args.out / ("-".join("".join(c if c.isalnum() else " " for c in words).split()) + ".json")
    path.write_text(json.dumps(content, indent=1) + "\n")
    for dtype, found in content["answers"].items():
        for graph, reason in found.items():
            print(f"{dtype} {graph}: {reason or 'accepted'}")
    print(f"written to {path}")
    return 0


def tables(folder: Path) -> str:
    """The tables of the files of answers in `folder`, as Markdown."""
    files = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    lines = []
    for content in sorted(files, key=lambda c: (not c["ran"], c["device"], c["cudnn"])):
        version = ".".join(map(str, content["capability"]))
        how = "each graph ran on it and was checked" if content["ran"] else "**no such GPU was there**: plans proposed, none run"
        lines += [
            "", f"{content['device']} ({version}), cuDNN {content['cudnn']}, frontend {content['frontend']}: {how}; "
            f"{content['date'][:10]}, commit {content['commit'][:12]}:", "",
            f"| graph | source | {' | '.join(DTYPES)} |", f"|---|---|{'---|' * len(DTYPES)}",
        ]  # fmt: skip
        for graph in content["answers"][DTYPES[0]]:
            cells = [_cell(content["answers"][dtype][graph], content["ran"]) for dtype in DTYPES]
            lines.append(f"| {' | '.join([*(f'`{word}`' for word in graph.split()), *cells])} |")
    if not any(content["ran"] for content in files):
        lines = [NOTHING.rstrip(), *lines]
    return "\n".join(lines) + "\n"


def _cell(reason: str | None, ran: bool) -> str:
    if reason is None:
        return "yes" if ran else "proposed"
    return "wrong" if reason.startswith("wrong") else "not written" if "written for" in reason else "refused"


def page(text: str, folder: Path) -> str:
    """docs/backends.md with the tables of the files in `folder`."""
    return with_section(text, "python bench/cudnn_graphs.py table", tables(folder))


def run_table(args: argparse.Namespace) -> int:
    """Writes docs/backends.md."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), FILES), encoding="utf-8")
    return 0


# ---- how fast they are -----------------------------------------------------------------------------------------------


def floor_bytes(task: Task) -> int:
    """Bytes of a task whose every operand moves once: what is read and written however it is fused."""
    c, item = task.conv, torch.empty(0, dtype=getattr(torch, task.dtype)).element_size()
    x, y, w = c.input_bytes(item), c.output_bytes(item), c.weight_bytes(item)
    mask = NormProblem(c.n, c.c, c.h, c.w).mask_bytes
    residual = task.source.startswith("norm_add")
    if task.kind == "wgrad":
        return c.touched_input_bytes(item) + y + w
    if task.kind == "fprop":  # a residual is read, and the activation and its mask are written
        return x + y + w + (2 * x + mask if residual else 0)
    reads = 0 if task.source == "act" else x + (mask if residual else 0) + (x if task.source == "norm_add_raw" else 0)
    compact = c.n * c.c * -(-c.h // task.compact) * -(-c.w // task.compact) * item if task.compact else 0
    return 2 * y + w + x + reads + (x if task.dact else 0) + compact  # of dy: dz and the raw output


def eager(trial: Trial) -> Callable[[], object]:
    """The task by PyTorch's own operators, each a trip over memory: norm, addition and ReLU apart, and likewise backward."""
    task, s, geometry, c = trial.task, trial.source, trial.geometry, trial.task.conv
    stride, padding, dilation, groups = geometry
    gamma, beta = trial._vectors(c.c)
    dy = torch.randn_like(trial._output(c, trial.weight, geometry).y)

    def norm(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
        return F.batch_norm(x, mean, invstd.reciprocal().square(), gamma, beta, False, 0.0, EPS)

    def activation() -> Tensor:
        if not s.pending:
            return s.x
        z = norm(s.x, s.mean, s.invstd)
        if s.residual is not None:
            z = z + (s.residual if s.residual_mean is None else norm(s.residual, s.residual_mean, s.residual_invstd))
        return F.relu(z)

    act = activation()

    def backward(need_dx: bool, need_dw: bool) -> tuple[Tensor, ...]:
        mask = [need_dx, need_dw, False]
        return torch.ops.aten.convolution_backward(dy, act, trial.weight, None, stride, padding, dilation, False, [0, 0], groups, mask)

    def fprop() -> Tensor:
        y = F.conv2d(activation(), trial.weight, None, *geometry)
        return F.batch_norm(y, None, None, None, None, True, 0.0, EPS)  # the statistics, and the pass that uses them

    def dgrad() -> Tensor:
        d = backward(True, False)[0]
        if task.dact or task.compact:
            d = d + act
        if not s.pending:
            return d
        d = torch.ops.aten.threshold_backward(d, act, 0)
        return torch.ops.aten.native_batch_norm_backward(d, s.x, gamma, None, None, s.mean, s.invstd, True, EPS, [True, True, True])[0]

    return {"fprop": fprop, "dgrad": dgrad, "wgrad": lambda: backward(False, True)}[task.kind]


def rows_of(task: Task, device: torch.device, ceilings, repeats: int, limit_s: float) -> list[Row]:
    """A row of each implementation of a task. Each is checked against the passes before any is timed."""
    table = Table()
    if (task.kind, task.source) == ("wgrad", "norm"):  # whose rounding its forward must share
        table.add(Entry(Task("fprop", task.conv, task.dtype, "norm"), CUDNN, 1.0, 1.0))
    trial = Trial(task, table, device)
    choices = {"ours:passes": None, "ours:triton": heuristics.configuration(task, capability(device)), "ours:cudnn": CUDNN}
    calls: dict[str, Callable[[], object]] = {"eager_nhwc": eager(trial)}
    facts: dict[str, dict] = {impl: {} for impl in ("eager_nhwc", *choices)}
    expected: tuple[Tensor | None, ...] = ()
    for impl, choice in choices.items():
        if impl == "ours:cudnn" and (reason := trial.why_not_cudnn()):
            facts[impl]["status"] = f"unsupported: {reason}"
            continue
        call, results = trial.call(choice), []
        status = attempt(lambda call=call, results=results: results.extend(call()), limit_s)
        if impl == "ours:passes":
            expected = tuple(results)
        if status is None:
            error, status = trial.error(tuple(results), expected)
        if status:
            facts[impl]["status"] = status
        else:
            calls[impl] = call
            facts[impl]["max_rel_error"] = error
    floor_s = max(task.conv.flops / ceilings.flops_per_s, (moved := floor_bytes(task)) / ceilings.bytes_per_s)
    for impl, outcome in measure(calls, device, repeats, limit_s=limit_s).items():
        if isinstance(outcome, Times):
            seconds = outcome.median_ms * 1e-3
            facts[impl] |= vars(outcome) | {
                "tflops": task.conv.flops / seconds / 1e12, "gbytes_per_s": moved / seconds / 1e9, "roofline_fraction": floor_s / seconds,
            }  # fmt: skip
        else:
            facts[impl] = {"status": outcome}
    c = task.conv
    name = str(task).partition(", batch")[0]
    return [Row("kernels", name, impl, task.dtype, c.n, [c.c, c.h, c.w], **fact) for impl, fact in facts.items()]


def run_shapes(args: argparse.Namespace) -> int:
    """Writes results of the suite `kernels`, and prints them. Exit status 1 where cuDNN, or another, was wrong."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    torch.manual_seed(0)
    ceilings, rows = measure_ceilings(device, dtype), []
    for batch in args.batch:
        shape = (batch, 3, args.size, args.size)
        for task in in_order(tasks_of(lambda: models.get_model(args.model), shape, dtype, device))[: args.most]:
            rows += rows_of(task, device, ceilings, args.repeats, args.limit)
            print(f"{task}: " + ", ".join(f"{r.impl} {r.median_ms or r.status}" for r in rows[-4:]), file=sys.stderr, flush=True)
    results = Results(collect_meta(device, args.commit or current_commit()), rows)
    path = results_path(args.out, results)
    write_results(results, path)
    console().print(results_table(rows, f"{args.model}'s convolutions on {asdict(results.meta)['device']}"))
    print(f"written to {path}")
    return int(any(row.status.startswith("wrong") for row in rows))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="cudnn_graphs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True)
    one = commands.add_parser("probe")
    one.add_argument("out", type=Path, help="folder")
    one.add_argument("--properties", type=Path, help="JSON of a GPU's properties, as cuDNN serialises them")
    one.add_argument("--commit")
    one.set_defaults(run=run_probe)
    commands.add_parser("table").set_defaults(run=run_table)
    shapes = commands.add_parser("shapes")
    shapes.add_argument("out", type=Path, help="folder of results")
    shapes.add_argument("--model", default="resnet50")
    shapes.add_argument("--batch", type=int, nargs="+", default=[64, 256, 400])
    shapes.add_argument("--dtype", choices=DTYPES, default="float16")
    shapes.add_argument("--size", type=int, default=224)
    shapes.add_argument("--device", default="cuda")
    shapes.add_argument("--most", type=int, help="tasks of each batch (default: all)")
    shapes.add_argument("--repeats", type=int, default=30)
    shapes.add_argument("--limit", type=float, default=60.0, help="seconds of one task")
    shapes.add_argument("--commit")
    shapes.set_defaults(run=run_shapes)
    return top


if __name__ == "__main__":
    arguments = parser().parse_args()
    sys.exit(arguments.run(arguments))
