"""The command line in tests: a process as a user's shell would start it, and what `main` refuses."""

import os
import subprocess
import sys

from fused_resnet.cli import main
from support.checkout import ROOT

SMALL = ("--epochs", "2", "--batch-size", "16", "--limit-train", "48", "--limit-eval", "32", "--no-progress")


def command(*args, env=(), cwd=None) -> subprocess.CompletedProcess:
    """`python -m fused_resnet ARGS`, as a user's shell would run it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FUSED_RESNET_BACKEND")}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    line = [sys.executable, "-m", "fused_resnet", *map(str, args)]
    # These runs are tiny: a second thread would only wait, and dearly where other tests run beside them.
    kept["OMP_NUM_THREADS"] = "1"
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=540, env=kept | dict(env), cwd=cwd)


def refused(capsys, *args) -> str:
    """The one line with which `main` refuses these arguments."""
    try:
        code = main([*map(str, args)])
    except SystemExit as exit:  # argparse's way
        code = exit.code
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1, "one line"
    assert "Traceback" not in err
    return err


TINY = ("--epochs", "2", "--batch-size", "2", "--limit-train", "2", "--limit-eval", "2", "--device", "cpu", "--no-progress")
