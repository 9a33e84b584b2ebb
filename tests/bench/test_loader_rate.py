"""The loader beside torchvision's: what the command prints."""

import re

import pytest
from support.checkout import script


def test_both_loaders_bring_all_images(capsys):
    pytest.importorskip("torchvision")
    program = script("bench/loader_rate.py")
    assert program.main(["--images", "12", "--batch", "4", "--rounds", "2", "--workers", "0"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("12 JPEGs, 0 workers, load ")
    rates = dict(re.findall(r"^(torchvision|ours) +([\d.]+) images/s", told, re.MULTILINE))
    assert set(rates) == {"torchvision", "ours"} and all(float(rate) > 0 for rate in rates.values())
    assert re.search(r"^ours / torchvision [\d.]+ \(", told, re.MULTILINE)


def test_fewer_images_than_a_batch_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        script("bench/loader_rate.py").main(["--images", "13", "--batch", "14"])
    assert (
        stopped.value.code == 2
        and "argument --images: expected at least 14, a batch and an image a class; got 13" in capsys.readouterr().err
    )
