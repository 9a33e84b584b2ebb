"""`fused-resnet evaluate`, `predict` and `export`: what they make of a trained network, beside what it makes itself."""

import json

import pytest
import torch
from support.commands import refused
from support.trainings import one_thread

from fused_resnet import data, models
from fused_resnet.cli import main
from fused_resnet.train import CHECKPOINT, METRICS, export
from fused_resnet.train.export import METADATA

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
QUICK = ("--epochs", "1", "--batch-size", "8", "--limit-train", "16", "--device", "cpu", "--no-progress")


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A run of resnet20 on Fashion-MNIST, with a moving average."""
    folder = tmp_path_factory.mktemp("grey")
    assert (
        main(["train", *QUICK, "--limit-eval", "24", "--backend", "off", "--warmup-epochs", "0", "--ema", "0.5", "--out", str(folder)]) == 0
    )
    return folder


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """A run of resnet18 on a folder of photographs of two colours, and that folder."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    folder = tmp_path_factory.mktemp("colour")
    for split, count in (("train", 4), ("val", 3)):
        for name, pixel in (("blue", (10, 20, 200)), ("red", (200, 20, 10))):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture = image.new("RGB", (40 + i, 50), pixel)
                picture.paste((i * 50, 90, 90), (3, 3, 20, 25))
                picture.save(folder / split / name / f"{i}.png")
    size = ("--model", "resnet18", "--data", f"imagefolder:{folder}", "--image-size", "32", "--workers", "0", "--backend", "off")
    assert main(["train", *QUICK[:2], "--batch-size", "4", *QUICK[6:], *size, "--out", str(folder / "run")]) == 0
    return folder / "run", folder


def network(run) -> torch.nn.Module:
    """The trained network, by other code than the command's."""
    state = torch.load(run / CHECKPOINT, weights_only=True)
    options = {"num_classes": len(state["data"]["classes"])} | ({"in_channels": 1} if state["data"]["image_shape"][0] == 1 else {})
    model = getattr(models, state["config"]["model"])(**options)
    average = {key.removeprefix("module."): value for key, value in state["ema"].items() if key.startswith("module.")}
    model.load_state_dict(average or state["model"])
    return model.eval()


# ---- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_repeats_the_runs_own_scores(capsys, grey):
    last = json.loads((grey / METRICS).read_text().splitlines()[-1])
    assert main(["evaluate", str(grey), "--limit", "24", "--backend", "off", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["loss"], found["top1"], found["top5"]) == (last["eval_loss"], last["eval_accuracy"], last["eval_top5_accuracy"])
    assert (found["images"], found["epoch"], found["backend"]) == (24, 1, "off")
    assert found["top1"] < found["top5"] < 1


def test_top_five_are_counted_by_their_scores(capsys, grey):
    """With a batch size of its own, on the training split."""
    assert (
        main(["evaluate", str(grey / CHECKPOINT), "--split", "train", "--limit", "30", "--batch-size", "7", "--device", "cpu", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    images = data.load("fashion-mnist-mini")
    split = images.train.first(30)
    with torch.no_grad():
        scores = network(grey)(((split.images.permute(0, 3, 1, 2) / 255) - images.mean[:, None, None]) / images.std[:, None, None])
    places = (scores > scores.gather(1, split.labels[:, None])).sum(1)  # of the right class, 0 the first
    assert (found["top1"], found["top5"]) == ((places < 1).double().mean().item(), (places < 5).double().mean().item())
    assert main(["evaluate", str(grey), "--limit", "8", "--device", "cpu"]) == 0
    assert "resnet20 after 1 epochs on fashion-mnist-mini, eval: 8 images" in capsys.readouterr().out


def test_of_five_classes_or_fewer_top_five_are_all(capsys, colour):
    run, folder = colour
    assert main(["evaluate", str(run), "--data", f"imagefolder:{folder}", "--workers", "0", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top5"] == 1


def test_other_classes_are_refused(capsys, grey, colour):
    line = refused(capsys, "evaluate", grey, "--data", f"imagefolder:{colour[1]}", "--device", "cpu")
    assert (
        "argument --data: expected the 10 classes of fashion-mnist-mini, T-shirt/top to ankle boot; " in line
        and "has 2, blue to red" in line
    )
    assert "argument --data: expected the 2 classes" in refused(
        capsys, "evaluate", colour[0], "--data", "fashion-mnist-mini", "--device", "cpu"
    )


def test_what_is_no_run_is_named(capsys, tmp_path, grey):
    assert f"error: RUN: {tmp_path / CHECKPOINT}: no such file" in refused(capsys, "evaluate", tmp_path)
    state = torch.load(grey / CHECKPOINT, weights_only=True)
    for change, expected in (
        ({"data": {**state["data"], "classes": ("a", 3)}}, "data: classes: expected strs in a tuple; got ('a', 3)"),
        ({"data": {**state["data"], "std": (0.0,)}}, "data: mean and std: expected a number for each of 1 channels"),
        ({"data": {**state["data"], "classes": ("a", "b")}}, "model: fc.weight: expected float32 [2, 64]; got float32 [10, 64]"),
        ({"config": {**state["config"], "model": "my.module:make"}}, "argument --model: expected my.module:make beside RUN"),
    ):
        torch.save(state | change, tmp_path / CHECKPOINT)
        assert expected in refused(capsys, "export", tmp_path, tmp_path / "x.pth")
    assert "argument --model: expected resnet20, which was trained; got resnet32" in refused(
        capsys, "predict", grey, "x.png", "--model", "resnet32"
    )


# ---- predict ---------------------------------------------------------------------------------------------------------


def test_predict_sees_an_image_as_an_evaluation_does(capsys, colour):
    run, folder = colour
    images = data.load(f"imagefolder:{folder}", image_size=32, workers=0)
    loader = data.make_loader(images, images.eval, 1, torch.device("cpu"), False)
    with torch.no_grad():
        expected = [network(run)(image).double().softmax(1)[0].tolist() for image, _ in loader.batches(0)]
    assert main(["predict", str(run), *images.eval.paths, "--backend", "off", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2 * len(expected) == 12
    for i, values in enumerate(expected):
        found = {row["class"]: row["probability"] for row in rows if row["image"] == images.eval.paths[i]}
        assert found == pytest.approx(dict(zip(("blue", "red"), values, strict=True)), rel=1e-6) and sum(found.values()) == pytest.approx(1)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_colour_image_is_made_grey(capsys, tmp_path, grey):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    image.new("RGB", (60, 56), (255, 0, 0)).save(tmp_path / "red.png")
    assert main(["predict", str(grey), str(tmp_path / "red.png"), "--top", "3", "--device", "cpu", "--csv"]) == 0
    _, head, *lines = capsys.readouterr().out.splitlines()
    assert head == "image,class,probability" and len(lines) == 3
    images = data.load("fashion-mnist-mini")
    level = (round(255 * 0.299) / 255 - images.mean) / images.std  # ITU-R 601
    with torch.no_grad():
        best = network(grey)(level.expand(1, 1, 28, 28)).softmax(1)[0].topk(3)
    assert [line.split(",")[1] for line in lines] == [images.classes[i] for i in best.indices]
    assert [float(line.split(",")[2]) for line in lines] == pytest.approx(best.values.tolist(), abs=2e-6)
    assert main(["predict", str(grey), str(tmp_path / "red.png"), "--device", "cpu"]) == 0
    assert "%" in capsys.readouterr().out


def test_what_is_no_image_is_named(capsys, tmp_path, grey):
    pytest.importorskip("torchvision")
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "absent.png"):
        assert f"error: IMAGE: {tmp_path / name}: expected an image (" in refused(
            capsys, "predict", grey, tmp_path / name, "--device", "cpu"
        )


# ---- export ----------------------------------------------------------------------------------------------------------


def test_weights_are_torchvisions(capsys, tmp_path, colour, torchvision_models):
    assert main(["export", str(colour[0]), str(tmp_path / "a.pth")]) == 0
    assert "Checked by torchvision's network with these weights." in capsys.readouterr().out
    theirs = torchvision_models.resnet18(num_classes=2)
    theirs.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images), network(colour[0])(images))


def test_weights_of_a_network_that_torchvision_has_not(capsys, tmp_path, grey):
    assert main(["export", str(grey), str(tmp_path / "a.pth")]) == 0
    assert "Not checked by another program: torchvision has no such network" in capsys.readouterr().out
    found = torch.load(tmp_path / "a.pth", weights_only=True)
    assert all(torch.equal(found[key], tensor) for key, tensor in network(grey).state_dict().items())


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_program_takes_any_number_of_images_and_knows_its_classes(capsys, tmp_path, grey, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".onnx":
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    assert main(["export", str(grey), str(path)]) == 0
    assert "Checked by" in (out := capsys.readouterr().out) and "images of N x 1 x 28 x 28 and gives scores of 10 classes" in out
    if suffix == ".onnx":
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        run, told = lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), session.get_modelmeta().custom_metadata_map
    else:
        program = torch.export.load(path, extra_files=(told := {METADATA: ""}))
        run = program.module()
    assert json.loads(told[METADATA])["classes"] == list(data.load("fashion-mnist-mini").classes)
    for count in (1, 5):
        images = torch.randn(count, 1, 28, 28)
        with torch.no_grad():
            torch.testing.assert_close(run(images), network(grey)(images), rtol=1e-4, atol=1e-5)


def test_a_file_that_gives_other_scores_is_not_written(capsys, monkeypatch, tmp_path, grey):
    def wrong(name):
        return lambda model, description: (b"content", ("a wrong program", lambda images: model(images) * 1.001))

    monkeypatch.setitem(export.FORMATS, ".pt2", ("a program", wrong))
    assert main(["export", str(grey), str(tmp_path / "a.pt2")]) == 1
    assert "a.pt2: not written, since a wrong program gives other scores than the network" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_name_that_says_no_format_is_refused(capsys, grey):
    assert "error: FILE: expected a name that ends in .pth, .pt2, .onnx; got 'a.h5'" in refused(capsys, "export", grey, "a.h5")
    line = refused(capsys, "export", grey, grey / "absent" / "a.pth")
    assert "error: FILE: " in line and "No such file" in line
