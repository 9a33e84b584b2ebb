"""The command line: real processes for what it does, `main` in this process for what it refuses."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch
from support.checkout import ROOT
from support.commands import command, refused

import fused_resnet
from fused_resnet import __version__, backends, models, native
from fused_resnet.cli import main
from fused_resnet.data import NAMES


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in `command`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- help, version, refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "train", "demo", "experiment", "info", "kernels", "summary"])
def test_help_has_an_example(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main([*filter(None, [name]), "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"example:\n  fused-resnet {name}" in out


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fused_resnet {__version__}\n"


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("--model", "resnet19", [*models.list_models(), "torchvision:NAME", "timm:NAME", "MODULE:FUNCTION"]),
        ("--data", "mnist", [*NAMES, "imagefolder:PATH"]),
        ("--backend", "fastest", backends.choices()),
        ("--precision", "fp8", ("fp32", "bf16", "fp16")),
        ("--device", "tpu", ("auto", "cpu", "cuda")),
    ],
)
def test_unknown_names_list_the_known_ones(capsys, option, value, known):
    line = refused(capsys, "train", option, value)
    assert f"argument {option}: expected one of {', '.join(known)}; got '{value}'" in line


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("train", "--model", "resnet-50"), "did you mean resnet50?"),
        (("train", "--model", "Resnet20"), "did you mean resnet20?"),
        (("train", "--data", "cifar-10"), "did you mean cifar10?"),
        (("roofline", "--model", "resnet-101"), "did you mean resnet101?"),
    ],
)
def test_a_word_that_is_nearly_known_is_named(capsys, args, expected):
    assert refused(capsys, *args).endswith(expected + "\n")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--epochs", "many"), "argument --epochs: expected a whole number; got 'many'"),
        (("--lr", "high"), "argument --lr: expected a number; got 'high'"),
        (("--epochs", "0"), "argument --epochs: expected a whole number of at least 1; got 0"),
        (("--lr", "-1"), "argument --lr: expected a number above 0; got -1.0"),
        (("--label-smoothing", "2"), "argument --label-smoothing: expected at least 0 and below 1"),
        (("--batch-size", "64", "--limit-train", "32"), "argument --batch-size: expected at most 32"),
        (("--stop-after", "0"), "argument --stop-after: expected an epoch"),
        (("--image-size", "32"), "argument --image-size: expected none"),
        (("--model", "resnet50"), "argument --model: expected a network for 1-channel images"),
        (("--colour", "red"), "unrecognized arguments: --colour red"),
        (("--out", "x" * 300), "argument --out: [Errno 36] File name too long"),
    ],
)
def test_arguments_out_of_range_are_named(capsys, tmp_path, monkeypatch, args, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, "train", "--device", "cpu", *args)
    assert list(tmp_path.iterdir()) == [], "nothing is written before the arguments are known to be good"


def test_no_command_is_refused(capsys):
    assert "COMMAND" in refused(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_so(capsys):
    assert "argument --device: cuda was asked for, but PyTorch" in refused(capsys, "train", "--device", "cuda")


def test_a_forced_backend_that_can_not_run_says_why(capsys, answers):
    for name in backends.PASSES:
        answers(name, lambda device, dtype: "it rains")
    line = refused(capsys, "train", "--backend", "passes", "--device", "cpu")
    assert "argument --backend:" in line
    assert "passes_cuda: it rains; passes_cpu: it rains; passes_triton: it rains" in line


@pytest.mark.parametrize("name", ["info", "train", "demo"])
def test_a_folder_of_data_that_is_not_there_is_named(capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSED_RESNET_DATA", "nowhere")
    assert "FUSED_RESNET_DATA: expected a folder that exists; got nowhere" in refused(capsys, name)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_is_gone_is_no_error():
    """As `| head` leaves it: quiet, with the shell's exit code."""
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "fused_resnet", "info"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=buffered, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("name", ["train", "demo"])
def test_an_unknown_backend_in_the_environment_is_named(capsys, monkeypatch, tmp_path, name):
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "fastest")
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, name)
    assert "FUSED_RESNET_BACKEND" in line
    assert "expected one of " + ", ".join(backends.choices()) in line


# ---- train -----------------------------------------------------------------------------------------------------------


# ---- info, kernels ---------------------------------------------------------------------------------------------------


def test_info_as_json(tmp_path):
    done = command("info", "--json", env={"FUSED_RESNET_CACHE": str(tmp_path), "FUSED_RESNET_NO_SKIPS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["fused_resnet"] == __version__
    assert found["versions"]["torch"] == torch.__version__
    assert {"triton", "torchvision", "python", "platform", "cuda", "cudnn", "driver"} <= set(found["versions"])
    assert found["cache"] == str(tmp_path)
    assert all(found["native_libraries"][kind]["loaded"] == (found["native_libraries"][kind]["reason"] is None) for kind in ("GPU", "CPU"))
    assert set(found["backends"]) == {"eager", *backends.PASSES, *backends.TUNED, "triton", "cudnn"}
    assert found["backends"]["eager"] == {"float32": None, "float16": None, "bfloat16": None}
    where = torch.device(found["device"])
    assert found["active"] == {str(dtype)[6:]: backends.resolve(where, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    assert found["environment"] == {"FUSED_RESNET_CACHE": str(tmp_path), "FUSED_RESNET_NO_SKIPS": "1"}
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_info_for_people(capsys, monkeypatch, answers):
    monkeypatch.setattr(native.CUDA, "why_not", lambda: "nvcc was not there")
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "eager")
    monkeypatch.setenv("FUSED_RESNET_BACKENDS", "eager")
    answers("passes_cuda", lambda device, dtype: "it rains")
    assert main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    found = {name: value.strip() for name, value in lines.items()}
    assert found["torch"] == torch.__version__
    assert found["native library, GPU"] == "not loaded: nvcc was not there"
    assert found["backend passes_cuda"] == "can't run here: it rains"
    assert found["backend eager"].startswith("runs on")
    assert "cache folder" in found
    assert found["active backend"] == f"eager for float32, float16, bfloat16 on {'cuda' if torch.cuda.is_available() else 'cpu'}"
    assert found["FUSED_RESNET_BACKENDS"] == "eager (unknown, ignored)"
    assert "driver" in found


def test_kernels_prints_the_table_and_compiles_it_once(capsys, monkeypatch, tmp_path):
    inspect = pytest.importorskip("fused_resnet.kernels.inspect")
    from fused_resnet.kernels.bounds import Bounds
    from fused_resnet.kernels.sass import Issued

    monkeypatch.setattr(inspect, "INTERPRETED", False)
    kernel = types.SimpleNamespace(__name__="norm_add_act_kernel")
    compiled, launches = [], [(types.SimpleNamespace(kernel=kernel, number=number), f"float32 C={number}") for number in (8, 10)]
    monkeypatch.setattr(inspect, "launch_key", lambda launch: (f"source {launch.number}", 4, 3))
    monkeypatch.setattr(
        inspect, "variants", lambda name="", dtypes=(): [launch for launch in launches if name in launch[0].kernel.__name__]
    )
    monkeypatch.setattr(inspect, "convolutions", lambda *args, **options: ())

    def compile_launch(launch, variant, architecture):
        compiled.append(variant)
        return inspect.Compiled("k", variant, architecture, 40, 16, 512, 128, 3, 4, "", Issued(90, 0, 0, 0, 0))

    monkeypatch.setattr(inspect, "compile_launch", compile_launch)
    monkeypatch.setattr(inspect, "bounds", lambda launch, issued, architecture: Bounds(issued.outside * 1e-6, 0.0, 135e-6))
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["kernels", "--arch", "90"]) == 0
    told = capsys.readouterr().out
    assert "4 variants" not in told and "2 variants of 1 kernels; 2 spill, 32 bytes in all; at most 40 registers." in told
    assert "occupancy: the part of a" in told and "512" in told and "3/4" in told and max(map(len, told.splitlines())) <= 80
    assert "135.0" in told and "1.50" in told and "A bound" not in told and "not measurements" in " ".join(told.split())
    assert main(["kernels", "--arch", "90", "--csv"]) == 0
    assert len(compiled) == 2, "what is known of a kernel's source, launch and compiler is not compiled again"
    assert len(capsys.readouterr().out.splitlines()) == 4
    (kept,) = (tmp_path / "kernels").iterdir()
    kept.write_text("[[")
    assert main(["kernels", "--arch", "80", "90"]) == 0
    assert len(compiled) == 6, "a damaged file is written anew"
    capsys.readouterr()
    assert "argument --arch: expected some of 80, 90; got 70" in refused(capsys, "kernels", "--arch", "70")
    assert "argument --name: expected a part of a kernel's name" in refused(capsys, "kernels", "--name", "nothing")
    monkeypatch.setattr(inspect, "INTERPRETED", True)
    assert "TRITON_INTERPRET: expected to be unset" in refused(capsys, "kernels")


def test_the_sum_of_a_step_and_roofline_with_its_instructions(capsys, monkeypatch, tmp_path):
    """Without a compiler: every kernel has ten thousand instructions a warp outside of its loop, so the issue bound is known by hand."""
    inspect = pytest.importorskip("fused_resnet.kernels.inspect")
    from fused_resnet.kernels.sass import Issued

    monkeypatch.setattr(inspect, "INTERPRETED", False)
    monkeypatch.setattr(inspect, "launch_key", lambda launch: (launch.programs, launch.warps, launch.stages))
    monkeypatch.setattr(
        inspect, "compile_launch", lambda *_: inspect.Compiled("k", "", 90, 40, 0, 0, 128, 0, 0, "", Issued(10_000, 0, 0, 0, 0))
    )
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    assert main(["kernels", "--sum", "resnet18", "--batch", "8", "--csv"]) == 0
    lines = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert sum(line[0].endswith("x") for line in lines) > 30
    (stem,) = (line for line in lines if len(line) > 1 and line[1].startswith("fprop 3x224x224"))
    programs, issue = int(stem[-6]), float(stem[-3])  # four warps of 10,000 instructions, four schedulers
    assert issue == pytest.approx(-(-programs // 132) * 10_000 / 1.755e3, abs=0.06)
    totals = {line[0]: [float(value) for value in line[1:]] for line in lines if line[0] in ("fprop", "dgrad", "wgrad", "all")}
    assert len(totals) == 4 and all(larger >= max(floor, issue) - 0.011 for floor, issue, larger, *_ in totals.values())
    assert totals["all"][1] == pytest.approx(sum(totals[kind][1] for kind in ("fprop", "dgrad", "wgrad")), abs=0.02)
    assert main(["roofline", "--model", "resnet18", "--batch", "8", "--device", "h100", "--issue", "--csv"]) == 0
    told = capsys.readouterr().out
    (row,) = (line.split(",") for line in told.splitlines() if line.startswith("triton,") and line.count(",") > 8)
    assert float(row[-1]) > float(row[7]), "instructions take longer than the floor of a small batch"
    assert "argument --issue: expected --model to be one of" in refused(
        capsys, "roofline", "--model", "resnet20", "--size", "32", "--issue"
    )
    assert "argument --sum: expected --language triton" in refused(capsys, "kernels", "--language", "cuda", "--sum", "resnet18")
    assert "argument --arch: expected one with --sum" in refused(capsys, "kernels", "--arch", "80", "90", "--sum", "resnet18")


def test_kernels_without_triton_says_so(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fused_resnet.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fused_resnet, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert main(["kernels"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "the kernels need Triton" in err


# ---- demo ------------------------------------------------------------------------------------------------------------
