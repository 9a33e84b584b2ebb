"""Profiles: times by layer are those of the layer, and the page shows them, offline, in a browser."""

import gzip
import itertools
import json
import re

import pytest
import torch
from support import browser
from support.profiles import gpu_trace, profile
from torch import nn

from fused_resnet.bench.machine import Ceilings
from fused_resnet.bench.schema import SINCE_2
from fused_resnet.bench.steps import Subject
from fused_resnet.bench.timing import Times
from fused_resnet.cli import main
from fused_resnet.models import resnet18
from fused_resnet.profile import picture, record, report
from fused_resnet.profile.analysis import ProfileError, analyse, read_profile, spread, typical, write_profile
from fused_resnet.profile.record import Work
from fused_resnet.roofline import resnet

CPU = torch.device("cpu")
SUBJECT = Subject("resnet18", resnet18, (3, 64, 64))
UNITS = {layer.name for layer in resnet("resnet18", 1).layers}


# ---- recording --------------------------------------------------------------------------------------------------------------


# ---- analysis ---------------------------------------------------------------------------------------------------------------


def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def test_a_compiled_model_is_one_layer_with_all_its_flops():
    """Autograd sees one node; only its kernels can be told apart."""
    works = record.attributed(gpu_trace(), {}, on_gpu=True, nowhere=record.COMPILED)
    assert {(work.layer, work.phase) for work in works} == {
        ("compiled", "forward"), ("compiled", "backward"), ("optimizer", "optimizer"),
    }  # fmt: skip
    ceilings = Ceilings(Times(1.0, 1.0, 1.0), 10**9, Times(1.0, 1.0, 1.0), 10**11)
    parts, _ = analyse([record.Recording(works, [], "", True)], tiny, (2, 3, 16, 16), torch.float32, ceilings, "passes")
    first, second = 2 * 2 * 14 * 14 * 8 * 3 * 9, 2 * 2 * 12 * 12 * 4 * 8 * 9
    assert [part.flops for part in parts] == [first + second, first + 2 * second, 0]


def test_rates_and_floors_of_a_layer():
    recording = record.Recording([Work("k", "layer1.0.conv2", phase, 0, 1000) for phase in record.PHASES[:2]], [], "", True)
    ceilings = Ceilings(Times(1.0, 1.0, 1.0), 10**9, Times(1.0, 1.0, 1.0), 10**11)  # 1 TB/s, 100 TFLOP/s
    parts, floors = analyse([recording], resnet18, (8, 3, 64, 64), torch.float32, ceilings, "eager")
    forward, backward = parts
    conv = next(layer.conv for layer in resnet("resnet18", 8, 64).layers if layer.name == "layer1.0.conv2")
    assert forward.flops == conv.flops and backward.flops == 2 * conv.flops
    assert forward.tflops == pytest.approx(conv.flops / 1e-3 / 1e12)
    tensor = conv.output_bytes(4)
    # Convolution, statistics, apply, addition, ReLU.
    assert forward.bytes == pytest.approx((2 + 1 + 2 + 3 + 2) * tensor + conv.weight_bytes(4), rel=1e-3)
    assert 0 < forward.fraction < 1 and list(floors) == ["eager", "passes", "fused"]
    assert floors["eager"] > floors["passes"] > floors["fused"]


def test_what_is_written_is_read_back(tmp_path):
    write_profile(profile(), tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == profile()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(version=4), "version: expected at most 3; got 4: a newer fused_resnet wrote this file"),
        (lambda c: c.pop("version"), "expected a profile, an object with a version"),
        (lambda c: c.pop("step_ms"), "expected the fields of a profile; missing or unknown: step_ms"),
        (lambda c: c.pop("parts"), "expected a profile: 'parts'"),
        (lambda c: c["meta"].update(commit="../"), "expected a profile: commit: expected letters"),
    ],
)
def test_what_is_no_profile_is_refused_by_name(change, message, tmp_path):
    path = tmp_path / "p.json"
    write_profile(profile(), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ProfileError) as error:
        read_profile(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_an_older_profile_is_read(tmp_path):
    write_profile(profile(), tmp_path / "p.json")
    content = json.loads((tmp_path / "p.json").read_text())
    content["version"] = 2
    del content["primitives"]
    for name in SINCE_2:
        del content["meta"][name]
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert read_profile(tmp_path / "p.json") == profile()


# ---- the page ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the command on a CPU, and the two compared."""
    folder = tmp_path_factory.mktemp("profiles")
    common = ["--model", "resnet18", "--batch", "4", "--size", "64", "--device", "cpu", "--commit", "c0ffee"]
    for impl in ("eager", "ours"):
        assert main(["profile", *common, "--impl", impl, "--out", str(folder / impl)]) == 0
    assert main(["profile", "--compare", str(folder / "eager"), str(folder / "ours" / "profile.json"), "--out", str(folder / "both")]) == 0
    return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.find() is None:
        pytest.skip(f"no browser is installed: {', '.join(browser.NAMES)}")
    with browser.Browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def test_the_command_writes_all_its_files(runs):
    for name in ("eager", "ours"):
        assert (runs / name / "report.png").read_bytes().startswith(b"\x89PNG")
        found = read_profile(runs / name / "profile.json")
        assert (found.model, found.impl, found.batch, found.meta.device) == ("resnet18", name, 4, "cpu")
        assert found.gap_ms is None and found.step_ms > 0 and found.meta.cpu in (runs / name / "report.html").read_text()
        if torch.backends.mkldnn.is_available():
            assert any(what == "convolution backward of the weight" for _, what, *_ in found.primitives)
            assert "oneDNN&#x27;s primitives" in (runs / name / "report.html").read_text()
        with gzip.open(runs / name / "trace.json.gz", "rt") as file:
            trace = json.load(file)["traceEvents"]
        assert {"layer", "cpu_op"} <= {e.get("cat") for e in trace}
    assert {path.name for path in (runs / "both").iterdir()} == {"report.html", "report.png"}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["ours", "both"])
def test_the_page_shows_its_plots_and_asks_nobody(runs, chromium, name, dark):
    chromium.open(runs / name / "report.html", dark)
    assert chromium.requests() == []
    assert chromium.complaints() == []
    boxes = {
        plot: chromium.evaluate(f"(({plot!r}, document.getElementById({plot!r}).getBoundingClientRect().width))")
        for plot in ("roofline", "layers", "memory")
    }
    assert all(800 < width < 1280 for width in boxes.values()), boxes
    runs_shown = 2 if name == "both" else 1
    assert chromium.evaluate("document.querySelectorAll('#roofline .mark').length") >= 30 * runs_shown
    assert chromium.evaluate("document.querySelectorAll('#layers rect.forward').length") >= 20 * runs_shown
    assert chromium.evaluate("document.querySelectorAll('#memory polyline[class^=memory]').length") == runs_shown
    text = chromium.evaluate("document.body.innerText")
    # Every axis says what it shows, and in which unit.
    for words in (
        "arithmetic intensity (FLOP/byte)",
        "rate (TFLOP/s)",
        "time in one training step (ms)",
        "allocated (MB)",
        "times of a CPU",
    ):
        assert words in text
    ground = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is wider than a laptop's window"


def test_no_mark_lies_outside_its_axes(runs, chromium):
    chromium.open(runs / "both" / "report.html")
    outside = """[...document.querySelectorAll('section .wide > svg')].flatMap(svg => { const s = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('circle, rect, text, polyline')].map(e => e.getBoundingClientRect()).filter(
        b => b.left < s.left - 1 || b.right > s.right + 1 || b.top < s.top - 1 || b.bottom > s.bottom + 1) }).length"""
    assert chromium.evaluate(outside) == 0


@pytest.mark.parametrize(
    "fault", ["<img src='http://127.0.0.1:9/x.png'>", "<script>console.error('no')</script>", "<script>nothing()</script>"]
)
def test_a_page_that_asks_or_complains_is_seen(runs, chromium, tmp_path, fault):
    text = (runs / "ours" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "faulty.html").write_text(text.replace("</body>", fault + "</body>"), encoding="utf-8")
    chromium.open(tmp_path / "faulty.html")
    assert chromium.requests() + chromium.complaints()


def test_labels_of_two_ceilings_do_not_overprint(runs, chromium):
    chromium.open(runs / "both" / "report.html")
    overprinted = """(() => { const boxes = [...document.querySelectorAll('#roofline text')].filter(e => e.textContent.includes('GB/s')).map(
      e => e.getBoundingClientRect()); return [boxes.length, boxes.length > 1 && boxes[0].bottom > boxes[1].top && boxes[1].bottom > boxes[0].top] })()"""
    assert chromium.evaluate(overprinted) in ([2, False], [1, False])


def test_on_a_phone_texts_stay_readable_and_columns_wide(runs, chromium):
    chromium.call("Emulation.setDeviceMetricsOverride", width=500, height=900, deviceScaleFactor=1, mobile=False)
    try:
        chromium.open(runs / "both" / "report.html")
        assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth"), "charts and tables scroll by themselves"
        assert (
            chromium.evaluate(
                "Math.min(...[...document.querySelectorAll('.wide > svg text')].map(e => e.getBoundingClientRect().height || 99))"
            )
            >= 9
        )
        assert (
            chromium.evaluate("Math.min(...[...document.querySelectorAll('td:first-child')].map(e => e.getBoundingClientRect().width))")
            > 150
        )
    finally:
        chromium.call("Emulation.clearDeviceMetricsOverride")


def test_layers_are_sorted_and_filtered(runs, chromium):
    chromium.open(runs / "ours" / "report.html")
    first = "[...document.querySelectorAll('#table tbody tr')].filter(r => !r.hidden).map(r => r.cells[{}].textContent)"
    names = chromium.evaluate(first.format(0))
    chromium.evaluate("document.querySelectorAll('#table th')[1].click()")
    times = [float(text.replace(",", "")) for text in chromium.evaluate(first.format(1))]
    assert len(times) > 30 and times == sorted(times, reverse=True)
    chromium.evaluate("document.querySelectorAll('#table th')[1].click()")
    assert [float(text.replace(",", "")) for text in chromium.evaluate(first.format(1))] == times[::-1]
    chromium.evaluate("document.querySelectorAll('#table th')[0].click()")
    assert chromium.evaluate(first.format(0)) == names
    chromium.evaluate("(() => { const f = document.getElementById('filter'); f.value = 'layer2'; f.dispatchEvent(new Event('input')); })()")
    assert chromium.evaluate(first.format(0)) == [name for name in names if "layer2" in name]


def test_times_of_layers_are_medians_and_unsteady_steps_are_told(tmp_path):
    def recording(us):
        return record.Recording([Work("k", "3", "forward", 0, us), *([Work("j", "0", "forward", 9, 1)] if us < 50 else [])], [], "", True)

    recordings = [recording(us) for us in (10, 12, 500)]
    ceilings = Ceilings(Times(1.0, 1.0, 1.0), 10**9, Times(1.0, 1.0, 1.0), 10**11)
    parts, _ = analyse(recordings, tiny, (2, 3, 16, 16), torch.float32, ceilings, "eager")
    assert {part.layer: part.ms for part in parts} == {"3": 0.012, "0": 0.001}
    assert spread(recordings) > 10 and typical(recordings) is recordings[1]
    assert "lie 300% of their median apart" in report.page([profile(steps=5, spread=3.0)])
    assert "median apart" not in report.page([profile(steps=5, spread=0.01)])
    write_profile(profile(), path := tmp_path / "p.json")
    content = json.loads(path.read_text())
    content["version"] = 1
    del content["steps"], content["spread"]
    path.write_text(json.dumps(content))
    assert read_profile(path) == profile()


def test_the_page_of_a_gpu_tells_gaps_and_escapes_names():
    page = report.page([profile(), profile(impl="compile<x>", step_ms=5.0)])
    assert "gaps between kernels, ms</td><td>0.3000</td>" in page
    assert "sgemm&lt;int, float&gt;" in page and "compile<x>" not in page
    assert "times of a <b>CPU</b>" not in page
    assert "<td>1.250</td>" in page  # the step, B over A
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "resnet51"], "argument --model: expected one of resnet18, resnet34, "),
        (["--compare", "{tmp}/a", "{tmp}/b"], "argument --compare: "),
    ],
)
def test_the_command_refuses_by_name(arguments, words, tmp_path, capsys):
    try:
        status = main(["profile", "--device", "cpu", "--commit", "x", *(a.replace("{tmp}", str(tmp_path)) for a in arguments)])
    except SystemExit as ended:  # by the parser of arguments
        status = ended.code
    assert status == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("what", [["--batch", "2", "--size", "8"], ["--compare", "{run}", "{run}"]])
def test_a_profile_is_not_written_over(what, tmp_path, capsys):
    write_profile(profile(), tmp_path / "profile.json")
    before = (tmp_path / "profile.json").read_bytes()
    command = ["profile", *(a.replace("{run}", str(tmp_path)) for a in what), "--device", "cpu", "--commit", "x", "--out", str(tmp_path)]
    assert main(command) == 2
    assert f"argument --out: expected a folder without a profile; {tmp_path} has a profile.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"] and (tmp_path / "profile.json").read_bytes() == before


def test_a_users_network_from_the_folder_at_hand(tmp_path, monkeypatch):
    (tmp_path / "tiny_net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    command = [
        "profile",
        "--model",
        "tiny_net:make",
        "--impl",
        "eager_nhwc",
        "--size",
        "16",
        "--batch",
        "2",
        "--device",
        "cpu",
        "--commit",
        "x",
        "--out",
        "out",
    ]
    assert main(command) == 0
    assert {part.layer for part in read_profile(tmp_path / "out" / "profile.json").parts} == {"0", "3", "loss", "optimizer"}


def test_torchvisions_network_by_its_name(torchvision_models, tmp_path):
    command = [
        *[
            "profile",
            "--model",
            "torchvision:resnet18",
            "--impl",
            "eager_nhwc",
            "--size",
            "32",
            "--batch",
            "2",
            "--device",
            "cpu",
            "--commit",
            "x",
            "--out",
        ],
        str(tmp_path),
    ]
    assert main(command) == 0
    found = read_profile(tmp_path / "profile.json")
    assert (found.impl, found.design) == ("eager_nhwc", "eager")
    assert {part.layer for part in found.parts} == UNITS | {"maxpool", "avgpool", "fc", "loss", "optimizer"}


#: Machado, Oliveira & Fernandes 2009: what is left of linear RGB without one kind of cones.
BLINDNESS = {
    "none": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
#: Linear RGB to XYZ over the white point.
XYZ = [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1094, 0.8728]]


def lab(colour: str, sight: str) -> torch.Tensor:
    """CIELAB of "#rrggbb", as it is seen."""
    rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = (torch.tensor(XYZ) @ (torch.tensor(BLINDNESS[sight]) @ linear).clamp(0, 1)).clamp_min(1e-6) ** (1 / 3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", BLINDNESS)
def test_the_phases_colours_differ_whoever_looks_at_them(sight):
    """Of the page, light and dark, and of the pictures: from each other and from the ground. An eye can just tell 2.3 apart."""
    palettes = [dict(re.findall(r"--(\w+): (#\w{6})", rule)) for rule in report.STYLE.split("@media")[:2]]
    palettes = [[p[name] for name in (*record.PHASES, "ground")] for p in palettes] + [[*picture.COLOURS.values(), "#ffffff"]]
    for palette in palettes:
        seen = [lab(colour, sight) for colour in palette]
        distances = [(a - b).norm().item() for a, b in itertools.combinations(seen, 2)]
        assert min(distances) > 15, (palette, distances)
    grey = [lab(colour, sight) for colour in ("#777777", "#787878")]
    assert (grey[0] - grey[1]).norm() < 2.3
