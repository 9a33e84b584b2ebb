"""The table of errors in docs/reliability.md: what its command compares, and that one which is too large is shown."""

import errors
import torch
from support.chains import norm_act_conv
from support.checkout import ROOT
from support.rule import PAIRS, SHAPES

from fused_resnet.backends import BACKENDS
from fused_resnet.reference import Reference


def test_a_row_counts_what_it_compared_and_shows_the_worst(monkeypatch):
    monkeypatch.setattr(errors, "CHAINS", [norm_act_conv])
    monkeypatch.setattr(errors, "SHAPES", SHAPES[:1])
    right = errors.row("eager", torch.float32)
    assert (right.backend, right.dtype) == ("eager", "float32") and right.results > 10 and 0 < right.most <= 1

    class Off(Reference):
        def norm_backward_apply(self, *args):
            return super().norm_backward_apply(*args) * 1.001

    monkeypatch.setitem(BACKENDS, "off by a thousandth", Off())
    wrong = errors.row("off by a thousandth", torch.float32)
    assert wrong.most > 1 and wrong.worst.startswith("d") and wrong.worst.endswith(" of norm_act_conv")
    assert list(errors.table([wrong]))[-1].startswith("| `off by a thousandth` | float32 | ")


def test_the_page_has_a_row_for_each_backend_that_runs_on_a_cpu():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    page = text.partition("<!-- made by: python tests/errors.py -->\n")[2].partition("<!-- end -->")[0]
    rows = {tuple(line.split("|")[1:3]) for line in page.splitlines()[2:]}
    on_cpus = {(f" `{name}` ", f" {str(dtype).removeprefix('torch.')} ") for name, dtype in PAIRS if name not in ("passes_cuda", "cudnn")}
    assert rows >= on_cpus  # fewer run where there is no Triton or no compiler
