"""Writes a page of one profile, or of two side by side: one HTML file that loads nothing from elsewhere."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ..bench.table import number
from ..files import replace_file
from .analysis import UNSTEADY, Part, Profile
from .record import PHASES
from .svg import BOTTOM, LEFT, RIGHT, TOP, Drawing, Scale

#: What a floor is that of: "the least that a step can take …".
DESIGN_WORDS = {
    "eager": "with a kernel for each operator", "passes": "with a pass for element-wise operators that follow one another",
    "fused": "with such passes inside convolutions",
}  # fmt: skip
#: A click on a head sorts the layers, what is typed leaves those that hold it; a second click turns the order.
SCRIPT = """
const table = document.getElementById('table'), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
const order = [...body.rows];
heads.forEach((head, column) => head.addEventListener('click', () => {
  const down = head.getAttribute('aria-sort') === 'descending' ? 1 : -1;
  heads.forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down > 0 ? 'ascending' : 'descending');
  const value = row => parseFloat(row.cells[column].textContent.replace(/,/g, ''));
  const figure = row => Number.isNaN(value(row)) ? -Infinity : value(row);
  const compare = column ? (a, b) => down * (figure(a) - figure(b)) : (a, b) => -down * (order.indexOf(a) - order.indexOf(b));
  body.append(...[...order].sort(compare));
}));
document.getElementById('filter').addEventListener('input', event => {
  const words = event.target.value.toLowerCase();
  order.forEach(row => { row.hidden = !row.cells[0].textContent.toLowerCase().includes(words); });
});
"""
WIDTH = 1000  # pixels of a drawing's own coordinates
SHAPES, LETTERS = ("circle", "square"), ("A", "B")
KERNELS = 25  # longest ones that are listed
#: Okabe and Ito's colours, which the colour-blind tell apart; on a dark ground the lighter of them.
STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c1e21; --faint: #5b6168; --grid: #d9dde2; --card: #f3f5f7;
  --forward: #0072b2; --backward: #d55e00; --optimizer: #009e73; --roof: #1c1e21; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --ink: #e8eaed; --faint: #a4abb3; --grid: #343a40; --card: #1f2428;
  --forward: #56b4e9; --backward: #e69f00; --optimizer: #009e73; --roof: #e8eaed; } }
* { box-sizing: border-box; }
body { background: var(--ground); color: var(--ink); font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; max-width: 1120px;
  margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 4px; } p { margin: 4px 0 8px; color: var(--faint); }
.note { border-left: 4px solid var(--backward); padding: 6px 12px; background: var(--card); color: var(--ink); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: 13px; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 15em; }
th { color: var(--faint); font-weight: 600; position: sticky; top: 0; background: var(--ground); }
.wide { overflow-x: auto; }
svg { width: 100%; height: auto; display: block; }
.wide > svg { min-width: 860px; }
input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--grid); padding: 4px 8px; margin: 4px 0;
  width: min(100%, 24em); }
#table th { cursor: pointer; }
#table th[aria-sort=ascending]::after { content: " ▲"; } #table th[aria-sort=descending]::after { content: " ▼"; }
text { fill: var(--ink); font-size: 13px; } .tick { fill: var(--faint); font-size: 12px; }
.grid { stroke: var(--grid); stroke-width: 1; fill: none; } .axis { stroke: var(--faint); stroke-width: 1; fill: none; }
.roof { stroke: var(--roof); stroke-width: 2; fill: none; } .dashed { stroke-dasharray: 7 5; }
.forward { fill: var(--forward); } .backward { fill: var(--backward); } .optimizer { fill: var(--optimizer); }
circle, rect.mark { stroke: var(--ground); stroke-width: 1; fill-opacity: 0.85; }
.floor { fill: var(--roof); }
.memory0 { stroke: var(--forward); fill: none; stroke-width: 2; } .memory1 { stroke: var(--backward); fill: none; stroke-width: 2; }
.fill0 { fill: var(--forward); fill-opacity: 0.2; } .fill1 { fill: var(--backward); fill-opacity: 0.15; }
.legend { display: flex; gap: 20px; flex-wrap: wrap; font-size: 13px; color: var(--ink); margin: 6px 0; }
.legend svg { width: 14px; height: 14px; display: inline-block; vertical-align: -2px; margin-right: 6px; }
"""


def write_report(profiles: Sequence[Profile], path: Path) -> None:
    """Write the page of one profile, or of two."""
    text = page(profiles)
    replace_file(path, lambda file: file.write(text.encode()))


def page(profiles: Sequence[Profile]) -> str:
    """The page."""
    title = " and ".join(f"{p.model}, {p.impl}" for p in profiles)
    body = [f"<h1>{escape(title)}</h1>", *_heads(profiles), _summary(profiles)]
    for name, head, words, drawing in (
        ("roofline", "Roofline", _roofline_words(profiles), _roofline(profiles)),
        ("layers", "Time by layer", _layers_words(profiles), _bars(profiles)),
        ("memory", "Memory", _memory_words(profiles), _memory(profiles)),
    ):
        legend = _memory_legend(profiles) if name == "memory" else _legend(profiles, floors=name == "layers")
        body.append(f"<section><h2>{head}</h2><p>{escape(words)}</p>{legend}<div class='wide'>{drawing}</div></section>")
    body += [_layer_table(profiles), *(_kernel_table(p, letter) for p, letter in _lettered(profiles))]
    body += [_primitive_table(p, letter) for p, letter in _lettered(profiles) if p.primitives]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # No icon: a browser would ask a server for one.
        f'<link rel="icon" href="data:,"><title>{escape(title)}: profile</title>\n<style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _lettered(profiles: Sequence[Profile]) -> Iterable[tuple[Profile, str]]:
    return zip(profiles, LETTERS if len(profiles) > 1 else ("",), strict=False)


def _heads(profiles: Sequence[Profile]) -> Iterable[str]:
    for p, letter in _lettered(profiles):
        shape = " × ".join(map(str, p.shape))
        words = f"{p.model}, {p.impl}, {p.dtype}, {p.batch} images of {shape}, on {p.meta.device}; {p.how}. "
        cpu = [p.meta.cpu, p.meta.isa, p.meta.threads and f"{p.meta.threads} threads", p.meta.onednn and f"oneDNN {p.meta.onednn}"]
        words += "".join(f"{fact}, " for fact in cpu if fact)
        versions = f"PyTorch {p.meta.torch}, commit {p.meta.commit[:12]}, {p.meta.date}"
        yield f"<p>{f'<b>{letter}</b>: ' if letter else ''}{escape(words + versions)}</p>"
    for p, letter in _lettered(profiles):
        if p.spread > UNSTEADY:
            yield (
                f'<p class="note">{f"<b>{letter}</b>: " if letter else ""}The {p.steps} steps that were recorded lie {p.spread:.0%} of '
                "their median apart: something else kept the machine busy, and times of layers are to be taken with care.</p>"
            )
    for p, letter in _lettered(profiles):
        if above := [f"{part.layer} {part.phase}" for part in p.parts if part.fraction is not None and part.fraction > 1]:
            yield (
                f'<p class="note">{f"<b>{letter}</b>: " if letter else ""}{len(above)} of {len(p.parts)} parts pass the roof, '
                f"first {escape(above[0])}: the machine was busier while its ceilings were measured.</p>"
            )
    if any(p.meta.device == "cpu" for p in profiles):
        yield (
            '<p class="note">These are times of a <b>CPU</b>. Ceilings are the fastest copy, which its caches hold as they hold small '
            "tensors, and the fastest product on this machine. They say nothing about a GPU.</p>"
        )


def _summary(profiles: Sequence[Profile]) -> str:
    rows: list[tuple[str, list[float | None], str]] = [
        ("training step, ms (median, without profiler)", [p.step_ms for p in profiles], ""),
        ("images/s", [p.images_per_s for p in profiles], ""),
        ("sum of all kernels, ms" if all(p.gap_ms is not None for p in profiles) else "sum of all operators, ms",
         [p.busy_ms for p in profiles], ""),
        ("gaps between kernels, ms", [p.gap_ms for p in profiles], "not measured"),
        ("launches" if all(p.gap_ms is not None for p in profiles) else "operators", [float(p.launches) for p in profiles], ""),
        ("highest memory, MB", [p.peak_bytes / 1e6 for p in profiles], ""),
        ("ceilings: TFLOP/s", [p.flops_per_s / 1e12 for p in profiles], ""),
        ("ceilings: GB/s", [p.bytes_per_s / 1e9 for p in profiles], ""),
    ]  # fmt: skip
    for design in profiles[0].floors_ms:
        words = DESIGN_WORDS.get(design, design)
        rows.append((f"floor of {design}, ms: the least that a step can take {words}", [p.floors_ms.get(design) for p in profiles], ""))
        rows.append((f"speed reached, % of that floor's ({design})", [100 * p.floors_ms.get(design, 0) / p.step_ms for p in profiles], ""))
    heads = [letter or "value" for _, letter in _lettered(profiles)] + (["B / A"] if len(profiles) > 1 else [])
    lines = []
    for name, values, absent in rows:
        cells = [number(v) if v is not None else absent for v in values]
        if len(values) > 1:
            cells.append(f"{values[1] / values[0]:.3f}" if values[0] and values[1] is not None else "")
        lines.append([name, *cells])
    return _table(["the step", *heads], lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], name: str = "") -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table{f" id={name!r}" if name else ""}><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'


def _legend(profiles: Sequence[Profile], floors: bool) -> str:
    entries = [('<rect width="14" height="14" class="{}"/>'.format(phase), phase) for phase in PHASES]  # noqa: UP032
    if floors:
        entries.append(('<rect x="6" width="3" height="14" class="floor"/>', "floor of the layer"))
    elif len(profiles) > 1:
        entries.append(('<circle class="floor" cx="7" cy="7" r="5"/>', "A"))
        entries.append(('<rect class="floor" x="2.5" y="2.5" width="9" height="9"/>', "B"))
    if not floors:
        entries = [entry for entry in entries if entry[1] != PHASES[2]]
    return _entries(entries)


def _memory_legend(profiles: Sequence[Profile]) -> str:
    return "" if len(profiles) == 1 else _entries(
        (f'<rect width="14" height="5" y="5" class="{phase}"/>', f"{letter}: {p.impl}")
        for phase, (p, letter) in zip(PHASES, _lettered(profiles), strict=False)
    )  # fmt: skip


def _entries(entries: Iterable[tuple[str, str]]) -> str:
    inner = "".join(f'<span><svg viewBox="0 0 14 14">{mark}</svg>{escape(words)}</span>' for mark, words in entries)
    return f'<div class="legend">{inner}</div>'


def _part_words(part: Part, letter: str) -> str:
    figures = [f"{number(part.ms)} ms", f"{part.launches} launches"]
    figures += [f"{number(v)} {unit}" for v, unit in ((part.tflops, "TFLOP/s"), (part.gbytes_per_s, "GB/s")) if v is not None]
    figures += [f"{part.fraction:.0%} of the floor"] if part.fraction is not None else []
    return f"{letter + ': ' if letter else ''}{part.layer}, {part.phase}: " + ", ".join(figures)


# ---- roofline ---------------------------------------------------------------------------------------------------------------


def _roofline_words(profiles: Sequence[Profile]) -> str:
    return (
        "Each mark is a layer, forward or backward: FLOPs for each byte that the kernels must move "
        f"(design {' and '.join(dict.fromkeys(p.design for p in profiles))}), and the rate that was reached. The line is the ceiling "
        "that was measured in the same run: a copy, a large matrix product."
    )


def _roofline(profiles: Sequence[Profile]) -> Drawing:
    height = 430
    drawing = Drawing(WIDTH, height, "roofline", "Roofline: TFLOP/s against FLOP/byte, by layer")
    points = [(part, run) for run, p in enumerate(profiles) for part in p.parts if part.tflops and part.bytes]
    ridges = [p.flops_per_s / p.bytes_per_s for p in profiles]
    intensities = [part.flops / part.bytes for part, _ in points]
    rates = [part.tflops for part, _ in points]
    across = Scale(min([*intensities, *ridges]) / 2, 2 * max([*intensities, *ridges]), LEFT, WIDTH - RIGHT, log=True)
    top = max(p.flops_per_s for p in profiles) / 1e12
    up = Scale(min([*rates, top / 10]) / 1.5, 1.5 * max([top, *rates]), height - BOTTOM, TOP, log=True)
    drawing.axes(across, up, "arithmetic intensity (FLOP/byte)", "rate (TFLOP/s)")
    for run, p in enumerate(profiles):
        if run and (p.flops_per_s, p.bytes_per_s) == (profiles[0].flops_per_s, profiles[0].bytes_per_s):
            continue
        ceiling, ridge = p.flops_per_s / 1e12, ridges[run]
        low = max(across.low, up.low / (p.bytes_per_s / 1e12))
        roof = [(low, low * p.bytes_per_s / 1e12), (ridge, ceiling), (across.high, ceiling)]
        drawing.line([(across(x), up(y)) for x, y in roof], "roof" if not run else "roof dashed")
        words = f"{LETTERS[run] + ': ' if len(profiles) > 1 else ''}{number(ceiling)} TFLOP/s, {number(p.bytes_per_s / 1e9)} GB/s"
        drawing.text(LEFT + 10, TOP + 16 + 18 * run, words, "start", "tick")  # above all roofs, one below the other
    for part, run in points:
        letter = LETTERS[run] if len(profiles) > 1 else ""
        x, y = across(part.flops / part.bytes), up(part.tflops)
        drawing.mark(x, y, SHAPES[run], f"mark {part.phase}", _part_words(part, letter))
    return drawing


# ---- time by layer ----------------------------------------------------------------------------------------------------------


def _layers_words(profiles: Sequence[Profile]) -> str:
    words = "Norm, activation and addition count to the convolution before them."
    return words + (" Of each layer the upper bar is A, the lower B." if len(profiles) > 1 else "")


def _bars(profiles: Sequence[Profile]) -> Drawing:
    found = [p.layers() for p in profiles]
    names = list(dict.fromkeys(name for layers in found for name in layers))
    thick, gap = (16, 8) if len(profiles) == 1 else (11, 9)
    pitch = thick * len(profiles) + gap
    height = TOP + BOTTOM + pitch * len(names)
    left = 30 + 7.4 * max(map(len, names))
    drawing = Drawing(WIDTH, height, "layers", "Time of each layer, forward and backward")
    longest = max(max(sum(part.ms for part in parts.values()), sum(part.floor_ms for part in parts.values()))
                  for layers in found for parts in layers.values())  # fmt: skip
    across = Scale(0, 1.05 * longest, left, WIDTH - RIGHT)
    drawing.axes(across, None, "time in one training step (ms)")
    for row, name in enumerate(names):
        top = TOP + gap / 2 + pitch * row
        drawing.text(left - (8 if len(profiles) == 1 else 22), top + thick * len(profiles) / 2 + 4, name, "end")
        for run, layers in enumerate(found):
            y, x = top + thick * run, 0.0
            letter = LETTERS[run] if len(profiles) > 1 else ""
            drawing.text(left - 6, y + 9, letter, "end", "tick")
            for part in layers.get(name, {}).values():
                drawing.bar(across(x), y, across(part.ms) - across(0), thick - 1, part.phase, _part_words(part, letter))
                x += part.ms
            if floor := sum(part.floor_ms for part in layers.get(name, {}).values()):
                words = f"{letter + ': ' if letter else ''}{name}: floor {number(floor)} ms"
                drawing.bar(across(floor) - 1, y - 1, 3, thick + 1, "floor", words)
    return drawing


# ---- memory -----------------------------------------------------------------------------------------------------------------


def _memory_words(profiles: Sequence[Profile]) -> str:
    if all(p.memory_from_zero for p in profiles):
        return "What PyTorch's allocator holds for tensors, in one training step."
    return "Tensors in one training step: bytes allocated beyond those before it, once the gradients of the step before were freed."


def _memory(profiles: Sequence[Profile]) -> Drawing:
    height = 300
    drawing = Drawing(WIDTH, height, "memory", "Allocated memory against time in one training step")
    points = [point for p in profiles for point in p.memory] or [(1.0, 1.0)]
    across = Scale(0, max(at for at, _ in points), LEFT + 8, WIDTH - RIGHT)
    up = Scale(min(0.0, *(level / 1e6 for _, level in points)), 1.08 * max(level for _, level in points) / 1e6, height - BOTTOM, TOP)
    drawing.axes(across, up, "time (ms, with the profiler)", "allocated (MB)")
    for run, p in enumerate(profiles):
        corners = [(max(at, 0), level / 1e6) for at, level in p.memory]
        line = _steps(corners, across, up)
        if line:
            drawing.area([(line[0][0], up(0)), *line, (line[-1][0], up(0))], f"fill{run}")
            drawing.line(line, f"memory{run}")
    return drawing


def _steps(corners: Sequence[tuple[float, float]], across: Scale, up: Scale) -> list[tuple[float, float]]:
    """A level holds until it changes."""
    line, before = [], 0.0
    for at, level in corners:
        line += [(across(at), up(before)), (across(at), up(level))]
        before = level
    return line


# ---- tables -----------------------------------------------------------------------------------------------------------------


def _layer_table(profiles: Sequence[Profile]) -> str:
    figures = ("ms", "TFLOP/s", "GB/s", "of floor", "launches")
    heads = [f"{letter + ' ' if letter else ''}{figure}" for _, letter in _lettered(profiles) for figure in figures]
    heads += ["B / A"] if len(profiles) > 1 else []
    found = [{(part.layer, part.phase): part for part in p.parts} for p in profiles]
    lines = []
    for place in dict.fromkeys(place for parts in found for place in parts):
        line, times = [", ".join(dict.fromkeys(place))], []
        for parts in found:
            part = parts.get(place)
            times.append(part.ms if part else None)
            line += [
                number(part.ms), number(part.tflops), number(part.gbytes_per_s),
                "" if part.fraction is None else f"{part.fraction:.0%}", str(part.launches),
            ] if part else [""] * len(figures)  # fmt: skip
        if len(profiles) > 1:
            line.append(f"{times[1] / times[0]:.2f}" if times[0] and times[1] else "")
        lines.append(line)
    note = "Medians of several steps. " * any(p.steps > 1 for p in profiles) + "Click on a head to sort by it."
    field = '<input id="filter" type="search" placeholder="show layers that hold …" aria-label="show layers that hold">'
    return f"<section><h2>Layers</h2><p>{note}</p>{field}{_table(['layer', *heads], lines, 'table')}</section>"


def _kernel_table(p: Profile, letter: str) -> str:
    whole = sum(ms for *_, ms in p.kernels)
    lines = [[name, str(calls), number(ms), f"{ms / whole:.1%}"] for name, calls, ms in p.kernels[:KERNELS]]
    head = f"{letter + ': ' if letter else ''}{'Kernels' if p.gap_ms is not None else 'Operators'}, the longest {len(lines)}"
    return f"<section><h2>{escape(head)}</h2>{_table(['name', 'calls', 'ms', 'part'], lines)}</section>"


def _primitive_table(p: Profile, letter: str) -> str:
    """oneDNN's primitives by the implementation's name, which tells whether a matrix unit or a slow fallback did the work."""
    whole = sum(ms for *_, ms in p.primitives)
    lines = [[*words, str(calls), number(ms), f"{ms / whole:.1%}"] for *words, calls, ms in p.primitives[:KERNELS]]
    head = f"{letter + ': ' if letter else ''}oneDNN's primitives, the longest {len(lines)}"
    note = "By implementation, in a step of their own; times are oneDNN's. mb: images, ic and oc: channels, kh and sh: window and stride."
    table = _table(["implementation", "what", "sizes", "calls", "ms", "part"], lines)
    return f"<section><h2>{escape(head)}</h2><p>{note}</p>{table}</section>"
