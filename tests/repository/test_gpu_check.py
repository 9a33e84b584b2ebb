"""bench/gpu_check.sh: its arguments, and that a part goes on where it stopped. A small script stands for the Python that it calls."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.chains import DEVICE
from support.checkout import ROOT, TESTS, script

from fused_resnet.bench import convolutions, kernels, passes
from fused_resnet.bench.steps import implementations
from fused_resnet.cli import bench, profile, tune
from fused_resnet.cli.arguments import Parser
from fused_resnet.roofline import resnet

SCRIPT = ROOT / "bench" / "gpu_check.sh"
GROUPS = ("whole", "forward", "backward")
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def gpu_check(*arguments, python="python3"):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture
def python(tmp_path):
    """A program that writes down what it is called with, and fails where a file `fail` beside it names an argument of the call."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/sh\ncd "$(dirname "$0")"\necho "$@" >> calls\n[ -e fail ] || exit 0\n'
        'for argument in "$@"; do [ "$argument" = "$(cat fail)" ] && echo "no $argument today" && exit 7; done\nexit 0\n'
    )
    path.chmod(0o755)
    return path


def calls(python):
    return (python.parent / "calls").read_text().splitlines()


def test_bash_accepts_it():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "PART: expected one of first test sanitize kernels convolutions blocks tune train inference profile cudnn; got ''"),
        (
            ["tests", "out"],
            "PART: expected one of first test sanitize kernels convolutions blocks tune train inference profile cudnn; got 'tests'",
        ),
        (["test sanitize", "out"], "PART: expected one of"),
        (["kernels"], "OUT: expected a folder"),
        (["kernels", "/dev/null/out", "c0ffee"], "OUT: /dev/null/out can't be made"),
        (["kernels", "{tmp}", "../x"], "COMMIT: expected letters"),
        (["kernels", "{tmp}", "c0ffee", "more"], "expected PART OUT [COMMIT]; got 4 arguments"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, tmp_path):
    done = gpu_check(*(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gpu_check.sh: " + message), done.stderr


def test_a_part_runs_its_steps_once(tmp_path, python):
    first = gpu_check("kernels", tmp_path / "out", "c0ffee", python=python)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.endswith("kernels: done\n")
    steps = [f"{dtype}-{batch}-{group}" for dtype in ("bf16", "fp16") for batch in (256, 64) for group in GROUPS]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.done")) == sorted(f"kernels-{step}.done" for step in steps)
    assert len(calls(python)) == len(steps)
    for call, step in zip(calls(python), steps, strict=True):
        dtype, batch, _ = step.split("-")
        assert call.startswith(
            f"-m fused_resnet bench kernels --limit 300 --model resnet18 resnet50 --dtype {dtype} --batch {batch} --case "
        )
        assert call.endswith(f"--commit c0ffee --out {tmp_path / 'out' / 'results'} --plot")
    assert gpu_check("kernels", tmp_path / "out", "c0ffee", python=python).returncode == 0
    assert len(calls(python)) == len(steps)


def test_the_groups_hold_every_pass_once(tmp_path, python):
    gpu_check("kernels", tmp_path / "out", "c0ffee", python=python)
    cases = [call.partition("--case ")[2].partition(" --device")[0].split() for call in calls(python)[: len(GROUPS)]]
    assert sorted(name for group in cases for name in group) == sorted(passes.NAMES)


def test_the_convolutions_are_timed_a_kind_a_step(tmp_path, python):
    """Every case of every network once, by all that there is; no step has so many shapes that a minute's compiler each would take it long."""
    assert gpu_check("convolutions", tmp_path / "out", "c0ffee", python=python).returncode == 0
    expected, timed = [], []
    for model in ("resnet50", "resnet18"):
        expected += [(model, name) for name in dict.fromkeys(name for name, _ in convolutions.plan([resnet(model, 256)]))]
    for call in calls(python):
        words = call.split()
        case = words[words.index("--case") + 1]
        assert words[words.index("--batch") + 1] == "256" and words[words.index("--dtype") + 1] == "bf16"
        chosen = words[words.index("--impl") + 1 : words.index("--device")]
        assert set(chosen) == set(kernels.IMPLEMENTATIONS) - {"compile_max", "cudnn", "ours:passes_cpu"}
        model = words[words.index("--model") + 1]
        timed.append((model, case))
        assert len(list(convolutions.plan([resnet(model, 256)], [case]))) <= 12
    assert sorted(timed) == sorted(expected)


def test_a_step_that_failed_is_shown_and_the_others_run(tmp_path, python):
    (tmp_path / "fail").write_text("resnet18")
    done = gpu_check("blocks", tmp_path / "out", "c0ffee", python=python)
    assert done.returncode == 1
    assert "blocks-resnet18-plain: failed with exit status 7" in done.stdout
    assert "no resnet18 today" in done.stdout
    assert (tmp_path / "out" / "blocks-resnet50-plain.done").exists()
    again = gpu_check("blocks", tmp_path / "out", "c0ffee", python=python)
    assert again.returncode == 1, "a failure is not forgotten"
    assert len(calls(python)) == 4
    (tmp_path / "fail").unlink()
    for mark in (tmp_path / "out").glob("blocks-resnet18-*.failed"):
        mark.unlink()
    assert gpu_check("blocks", tmp_path / "out", "c0ffee", python=python).returncode == 0
    assert len(calls(python)) == 6


def test_the_training_part_times_three_networks_at_three_batches_with_all_peers(tmp_path, python):
    assert gpu_check("train", tmp_path / "out", "c0ffee", python=python).returncode == 0
    timed = set()
    for call in calls(python):
        words = call.split()
        if "bf16" in words and "--largest" not in words:
            chosen = words[words.index("--impl") + 1 : words.index("--device")]
            timed |= {(words[words.index("--model") + 1], words[words.index("--batch") + 1], impl) for impl in chosen}
    peers = set(implementations("train")) - {
        "ours:passes_cpu",
        "ours:cudnn",
    }  # which the part of its name times: its package may be missing
    assert timed == {(m, b, i) for m in ("resnet18", "resnet50", "resnet152") for b in ("64", "128", "256") for i in peers}
    largest = [call.split() for call in calls(python) if "--largest" in call]
    assert {words[words.index("--impl") + 1] for words in largest} == peers


def test_the_inference_part_times_a_folded_network_and_all_peers(tmp_path, python):
    assert gpu_check("inference", tmp_path / "out", "c0ffee", python=python).returncode == 0
    made = Parser()
    bench.add_parser(made.add_subparsers())
    steps = [made.parse_args(call.split()[2:]) for call in calls(python)]
    assert {(step.suite, *step.model, step.dtype, *step.batch) for step in steps} == {
        ("inference", "resnet50", "bf16", 256),
        ("inference", "resnet50", "bf16", 1),
    }
    for batch in (1, 256):
        timed = {impl for step in steps if step.batch == [batch] for impl in step.impl}
        of_cpus = {"ours:passes_cpu", "compile_frozen", "onnxruntime"}
        assert timed == set(implementations("inference")) - of_cpus - {"ours:cudnn"}


def test_the_tuning_part_goes_on_where_it_stopped_and_its_table_lies_in_the_folder(tmp_path, python):
    python.write_text(python.read_text().replace('echo "$@" >> calls', 'echo "$FUSED_RESNET_CACHE: $@" >> calls'))
    assert gpu_check("tune", tmp_path / "out", "c0ffee", python=python).returncode == 0
    found = calls(python)
    assert len(found) == 12 and all(call.startswith(f"{tmp_path / 'out' / 'cache'}: -m fused_resnet tune ") for call in found)
    assert {call.split()[call.split().index("--batch") + 1] for call in found} == {"64", "256"}


def test_no_step_may_take_eight_minutes():
    """Each is cut off before; and what has a limit of its own ends by itself, with its results, before it is cut off."""
    text = SCRIPT.read_text()
    limit = int(re.search(r"^LIMIT=(\d+)", text, re.MULTILINE)[1])
    assert limit + 10 < 8 * 60, "with the ten seconds that a process has to end"
    assert all(int(seconds) < limit for seconds in re.findall(r"--limit (\d+)", text))


@pytest.mark.parametrize("part", ["kernels", "convolutions", "blocks", "tune", "train", "inference", "profile"])
def test_every_command_is_one_that_the_program_takes(part, tmp_path, python):
    gpu_check(part, tmp_path / "out", "c0ffee", python=python)
    parser = Parser()
    commands = parser.add_subparsers()
    for command in (bench, profile, tune):
        command.add_parser(commands)
    expected = {"profile": profile.profile, "tune": tune.run}.get(part, bench.bench)
    for call in calls(python):
        assert call.startswith("-m fused_resnet ")
        assert parser.parse_args(call.split()[2:]).run is expected


def test_the_cudnn_part_probes_tests_times_and_tunes(tmp_path, python):
    assert gpu_check("cudnn", tmp_path / "out", "c0ffee", python=python).returncode == 0
    made = Parser()
    commands = made.add_subparsers()
    for command in (bench, tune):
        command.add_parser(commands)
    kinds = []
    for call in calls(python):
        words = call.split()
        if words[0] == "bench/cudnn_graphs.py":
            arguments = script("bench/cudnn_graphs.py").parser().parse_args(words[1:])
            kinds.append((words[1], getattr(arguments, "batch", None)))
        elif words[:2] == ["-m", "fused_resnet"]:
            arguments = made.parse_args(words[2:])
            kinds.append((words[2], arguments.batch))
            assert arguments.dtype == "fp16" and (words[2] == "tune" or {"ours:cudnn", "ours"} <= set(arguments.impl))
        else:
            kinds.append((words[2], None))
    expected = [
        ("probe", None),
        *((path, None) for path in ("tests/cudnn", "tests/ops/test_operators.py", "tests/backends/test_backends.py")),
    ]
    expected += [("shapes", [batch]) for batch in (64, 256, 400)]
    for batch in (64, 256, 400):
        expected += [("tune", [batch]), ("train", [batch])]
    assert [(kind if kind != "bench" else "train", batch) for kind, batch in kinds] == expected


def test_the_test_part_goes_on_without_a_native_library(tmp_path, python):
    (tmp_path / "fail").write_text("setup.py")
    done = gpu_check("test", tmp_path / "out", "c0ffee", python=python)
    assert done.returncode == 0
    assert "native library: not built, going on without it: no setup.py today" in done.stdout


def asks_for_a_gpu(path):
    """Whether a test file holds tests of another device than the CPU, where there is one."""
    source = path.read_text()
    fixtures = re.search(r"^def \w+\([^)]*\b(on_)?device\b", source, re.MULTILINE)
    return bool(fixtures or "mark.gpu" in source or "from support.chains import" in source)


#: What has a part of its own, and what asks a GPU for nothing but that it is not taken.
ELSEWHERE = {"cudnn", "repository", "instruments", "profile", "data", "train", "experiment"}
CPU_ONLY = {
    "test_onednn.py",
    "test_fuse_timm.py",
    "test_timing.py",
    "test_bench_convolutions.py",
    "test_networks_by_name.py",
    "test_cpu_robustness.py",
}


def test_the_test_part_runs_what_a_gpu_changes(tmp_path, python):
    """Each file once; the kernels' first, since all others rest on them."""
    assert gpu_check("test", tmp_path / "out", "c0ffee", python=python).returncode == 0
    called = [call.split()[2] for call in calls(python) if call.startswith("-m pytest")]
    wanted = {path for path in TESTS.rglob("test_*.py") if asks_for_a_gpu(path) and path.parent.name not in ELSEWHERE}
    assert sorted(called) == sorted(str(p.relative_to(ROOT)) for p in wanted if p.name not in CPU_ONLY)
    assert {"tests/backends/test_passes.py", "tests/kernels/test_fprop.py", "tests/ops/test_operators.py"} <= set(called[:8])


def test_a_first_look_takes_the_most_wanted_first(tmp_path, python):
    """What is right before what is fast; one call goes on where the one before stopped."""
    if not (shutil.which("compute-sanitizer") or Path("/usr/local/cuda/bin/compute-sanitizer").exists()):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "first-memcheck.done").write_text("")
    done = gpu_check("first", tmp_path / "out", "c0ffee", python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    words = [call.split() for call in calls(python)]
    kinds = [next(w for w in call if not w.startswith("-") and w != "fused_resnet") for call in words]
    assert set(kinds[:2]) == {"bench/kernel_cache.py", "setup.py"}
    files = [call[2] for call in words if "pytest" in call]
    assert kinds[2:] == ["bench/sanitize_passes.py", *["pytest"] * len(files), "bench", "profile", *["tune"] * 4]
    assert len(files) == len(set(files)) == 7 and all("--quick" in call for call in words if "pytest" in call)
    assert {"eager_nhwc", "compile", "ours:passes_cuda", "ours:triton"} < set(words[kinds.index("bench")])
    assert gpu_check("first", tmp_path / "out", "c0ffee", python=python).returncode == 0
    assert [call for call in calls(python)[len(words) :] if "setup.py" not in call] == []


def test_a_cache_that_was_carried_is_not_filled(tmp_path, python):
    """The command refuses one of another Triton, and then one is filled."""
    (tmp_path / "fail").write_text("adopt")
    gpu_check("first", tmp_path / "out", "c0ffee", python=python)
    told = [call.split()[1] for call in calls(python) if call.startswith("bench/kernel_cache.py")]
    assert told == ["adopt", "fill"]
    arguments = next(call for call in calls(python) if " fill " in call).split()
    kernel_cache = pytest.importorskip("triton") and script("bench/kernel_cache.py")
    with pytest.raises(SystemExit) as refused:
        kernel_cache.main([*arguments[1:], "--jobs", "none"])
    assert refused.value.code == 2, "all but the last argument is known"


def test_a_step_that_takes_too_long_leaves_time_for_others(tmp_path, python):
    """Of a first look: its mark says that it failed, and the steps behind it run."""
    text = python.read_text().replace("exit 0\n", '[ "$1" = bench/sanitize_passes.py ] && sleep 60\nexit 0\n')
    python.write_text(text)
    copy = tmp_path / "bench" / "gpu_check.sh"
    copy.parent.mkdir()
    copy.write_text(SCRIPT.read_text().replace("MOST=90 step plain", "MOST=1 step plain"))
    done = subprocess.run(
        ["bash", str(copy), "first", str(tmp_path / "out"), "c0ffee"],
        capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "first-plain: failed with exit status 124" in done.stdout
    assert (tmp_path / "out" / "first-train.done").exists()


def test_a_missing_sanitizer_is_a_failure(tmp_path, python):
    if shutil.which("compute-sanitizer") or Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("compute-sanitizer is here")
    done = gpu_check("sanitize", tmp_path / "out", "c0ffee", python=python)
    assert done.returncode == 1
    assert sorted(p.name for p in (tmp_path / "out").glob("*.failed")) == [
        f"sanitize-{step}.failed"
        for step in (
            *(f"convolutions-{tool}" for tool in ("memcheck", "racecheck", "synccheck")),
            *(f"inference-{tool}" for tool in ("memcheck", "racecheck", "synccheck")),
            "initcheck",
            "memcheck",
            "operators-memcheck",
            "operators-racecheck",
            "operators-synccheck",
            "racecheck",
            "synccheck",
        )
    ]
    assert "compute-sanitizer" in (tmp_path / "out" / "sanitize-memcheck.log").read_text()


def test_the_sanitized_operator_tests_are_there():
    """An expression that chooses nothing would pass unseen. Here `emulated` stands for the GPU's library."""
    wanted = {
        "tests/ops/test_operators.py": r"test_error_is_at_most_twice_eagers\[.*float16.*training",
        "tests/backends/test_conv_affine_act.py": r"test_the_kernel_agrees\[.*float16",
    }
    chosen = re.findall(r'-m pytest (\S+)[^"]*-k "([^"]*float16[^"]*)"', SCRIPT.read_text())
    assert [path for path, _ in chosen] == ["tests/ops/test_operators.py"] * 2 + ["tests/backends/test_conv_affine_act.py"]
    for path, expression in chosen:
        expression = expression.replace("passes_cuda", "emulated" if DEVICE.type == "cpu" else "passes_cuda")
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", path, "-k", expression]
        done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True, check=False)
        assert len(re.findall(wanted[path], done.stdout)) > 5, done.stdout


def test_every_program_that_it_calls_is_there():
    assert "bench/sanitize_passes.py" in SCRIPT.read_text()
    assert (SCRIPT.parent / "sanitize_passes.py").exists()
