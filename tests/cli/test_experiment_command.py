"""`fused-resnet experiment`: its pages, what it refuses, and how it goes on."""

import json
import shutil

import pytest
from support import browser
from support.trainings import lines, one_thread, undrawn

from fused_resnet.cli import main
from fused_resnet.experiment import degradation, reports
from fused_resnet.experiment.degradation import read_outcome
from fused_resnet.experiment.findings import ended
from fused_resnet.experiment.plan import read_plan
from fused_resnet.train import Trainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__, undrawn.__name__)
DEGRADES = "Do deeper plain networks have a higher training error?"
SMALL = ("--limit-train", "32", "--limit-eval", "16", "--batch-size", "16", "--width", "2", "--device", "cpu", "--no-progress")
CHEAP = ("--depths", "20", "32", "--seeds", "1", "--epochs", "1", *SMALL)


def refused(capsys, *args) -> str:
    try:
        code = main(["experiment", *map(str, args)])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """What both commands write."""
    folder = tmp_path_factory.mktemp("pages")
    assert main(["experiment", "degradation", *CHEAP, "--commit", "c0ffee", "--out", str(folder / "degradation")]) == 0
    assert main(["experiment", "gradients", "--depths", "8", "--seeds", "1", "--device", "cpu", "--out", str(folder / "gradients")]) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("degradation", ["What is seen", "by one seed alone", "commit c0ffee", "2 channels in the first stage (the paper: 16)", "1 of 1"]),
        ("gradients", ["8 layers, plain, no norm, weights by Glorot", "What is seen", "How it was run"]),
    ],
)
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_opens_offline(pages, tmp_path, name, words, dark):
    if browser.find() is None:
        pytest.skip(f"no browser is installed: {', '.join(browser.NAMES)}")
    with browser.Browser(tmp_path / "chromium") as page:
        page.open(pages / name / "report.html", dark)
        assert page.requests() == [] and page.complaints() == []
        text = page.evaluate("document.body.innerText")
        assert all(word in text for word in words)
        sizes = page.evaluate("[...document.images].map(image => [image.naturalWidth, image.alt.length])")
        assert len(sizes) == (3 if name == "degradation" else 2) and all(width > 400 and alt > 20 for width, alt in sizes)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("name", ["degradation/errors", "degradation/gradients", "degradation/responses", "gradients/gradients-he"])
def test_the_pictures_show_every_network(pages, name):
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(pages / f"{name}.png")[..., :3]
    for colour in (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00):
        near = (abs(pixels - [value / 255 for value in colour]) < 0.01).all(-1)
        assert near.sum() > 20, colour


def test_the_figures_are_there_for_programs(pages):
    found = json.loads((pages / "gradients" / "figures.json").read_text())
    assert len(found) == 8 and {"depth", "shortcut", "norm", "init", "seed", "layers", "weights", "outputs"} <= found[0].keys()


def test_a_finished_experiment_is_shown_again(pages, capsys):
    assert main(["experiment", "degradation", "--resume", str(pages / "degradation"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "run 1 of" not in out and DEGRADES.replace("56", "32") in out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--depths", "20"), "argument --depths: expected two or more"),
        (("--depths", "18", "34"), "argument --depths: expected some of 20 32 44 56 for the 1-channel images of fashion-mnist-mini"),
        (("--width", "5"), "argument --width: expected an even number"),
        (("--epochs", "3", "--minutes", "2"), "argument --minutes: not allowed with argument --epochs"),
        (("--minutes", "0"), "argument --minutes: expected a number above 0"),
        (("--lr", "-1"), "argument --lr: expected a number above 0"),
        (("--limit-train", "64"), "argument --batch-size: expected at most 64, the images of the training split; got 128"),
        (("--data", "mnist"), "argument --data: expected one of"),
        (("--resume", "nowhere"), "argument --resume: nowhere/plan.json: no such file"),
    ],
)
def test_arguments_out_of_range_are_named(capsys, tmp_path, monkeypatch, args, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, "degradation", "--device", "cpu", *args)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_used_is_refused(pages, capsys):
    folder = pages / "degradation"
    line = refused(capsys, "degradation", *CHEAP, "--out", folder)
    assert f"argument --out: expected a folder that is new or empty; {folder} is not: go on with --resume {folder}" in line
    for option in (("--epochs", "2"), ("--minutes", "2"), ("--depths", "20", "56")):
        assert f"argument {option[0]}: expected none beside --resume" in refused(capsys, "degradation", "--resume", folder, *option)
    assert "argument --out: expected none beside --resume" in refused(capsys, "degradation", "--resume", folder, "--out", "other")


@pytest.mark.parametrize(
    "name", ["machines.json", "plain20-seed0/probe-1.json", "plain20-seed0/metrics.jsonl", "resnet32-seed0/checkpoint.pt"]
)
def test_a_damaged_file_of_an_experiment_is_named(pages, tmp_path, capsys, name):
    folder = shutil.copytree(pages / "degradation", tmp_path / "copy")
    (folder / name).write_bytes(b'{"layers": \n')
    if name.endswith(".pt"):  # of a finished run it is not read
        (folder / name).with_name("probe-1.json").unlink()
    line = refused(capsys, "degradation", "--resume", folder, "--device", "cpu")
    assert "argument --resume: " in line and str((folder / name).parent) in line


def test_gradients_refuses_depths_that_there_are_not(capsys, tmp_path):
    assert "argument --depths: expected depths of 6n + 2, 8 or more; got 21" in refused(capsys, "gradients", "--depths", "20", "21")


@pytest.fixture
def unreported(monkeypatch):
    """Pictures take longer than these trainings."""
    monkeypatch.setattr(reports, "write_degradation", lambda *args: [])


def test_an_interrupted_experiment_says_how_it_goes_on(capsys, monkeypatch, tmp_path, unreported):
    folder = tmp_path / "a b"

    def interrupted(self, progress, pause):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_epoch", interrupted)
        assert main(["experiment", "degradation", *CHEAP, "--out", str(folder)]) == 130
    assert f"interrupted; go on with: fused-resnet experiment degradation --resume '{folder}'" in capsys.readouterr().err
    assert main(["experiment", "degradation", "--resume", str(folder), "--device", "cpu", "--no-progress"]) == 0
    assert all(len(lines(folder / run.folder)) == 1 for run in read_plan(folder).runs)
    assert read_plan(folder).command.startswith("fused-resnet experiment degradation --depths 20 32")


def test_minutes_are_kept_in_the_plan(capsys, monkeypatch, tmp_path, unreported):
    monkeypatch.setattr(degradation, "epoch_seconds", lambda plan, data, device: 60.0)
    args = ["experiment", "degradation", *SMALL, "--depths", "20", "32", "--seeds", "1", "--minutes", "2", "--out", str(tmp_path / "run")]
    assert main(args) == 0
    plan = read_plan(tmp_path / "run")
    assert (plan.settings.epochs, plan.seeds) == (2, 1)
    assert plan.picked in capsys.readouterr().out
    assert ended(plan, [read_outcome(plan, tmp_path / "run", run) for run in plan.runs]).error("plain20", "training").values
