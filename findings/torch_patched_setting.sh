#!/usr/bin/env bash
# Guess: torch.backends.cudnn.benchmark and torch.backends.mkldnn.conv.fp32_precision are attributes. A test that patches one by
#     unittest.mock.patch.object, or by pytest's monkeypatch, has the old value back at its end.
# Fact: patch.object raises an AttributeError at the end of its block, and the patched value stays for the rest of the process; monkeypatch does
#     the same with fp32_precision, and not with cudnn's. The settings are descriptors of a class: they can be written, not deleted, and a patch
#     deletes what the object itself does not hold.
# Matters: the test that fails did what it should, and every later test of the process runs with its precision or its choice of algorithms.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh env torch==2.13.0 pytest==9.2.0

cat >"$folder/program.py" <<'PYTHON'
from unittest.mock import patch

import pytest
import torch

print("PyTorch", torch.__version__.partition("+")[0])
backends = torch.backends
for name, settings, attribute, value in (
    ("cudnn", backends.cudnn, "benchmark", True),
    ("cudnn", backends.cudnn, "deterministic", True),
    ("mkldnn.conv", backends.mkldnn.conv, "fp32_precision", "bf16"),
):
    before = getattr(settings, attribute)
    for way in ("mock", "monkeypatch"):
        raised = None
        try:
            if way == "mock":
                with patch.object(settings, attribute, value):
                    assert getattr(settings, attribute) == value
            else:
                with pytest.MonkeyPatch.context() as context:
                    context.setattr(settings, attribute, value)
        except AttributeError as error:
            raised = error
        after = getattr(settings, attribute)
        print(f"  torch.backends.{name}.{attribute} by {way}: before {before!r}, after {after!r}, raised {raised and type(raised).__name__}")
        stays = way == "mock" or attribute == "fp32_precision"
        assert (raised is not None) == stays and after == (value if stays else before), "it is put back otherwise now"
        setattr(settings, attribute, before)
with backends.cudnn.flags(enabled=True, benchmark=True):
    assert backends.cudnn.benchmark
assert not backends.cudnn.benchmark
print("  torch.backends.cudnn.flags(benchmark=True) puts it back")
PYTHON
"$folder/env/bin/python" -W ignore "$folder/program.py"
