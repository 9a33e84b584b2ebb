"""What a stopwatch does on a GPU, in which order, and what becomes of one that fails: with PyTorch's calls written down instead of made."""

import contextlib

import pytest
import torch

from fused_resnet.bench import timing


@pytest.fixture
def told(monkeypatch):
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end):
            return 1.5

    class Scratch:
        def zero_(self):
            calls.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(f"hold {cycles >= 1_000_000}"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Scratch())
    return calls


def test_launches_queue_up_before_the_clock_starts(told):
    """The GPU is held until Python has launched the call, else what is timed is Python."""
    stopwatch = timing.Stopwatch(torch.device("cuda"), flush=True)
    assert stopwatch(lambda: told.append("call")) == 1.5
    assert told == ["idle", "flush", "hold True", "record", "call", "record", "wait"]


def test_a_long_call_is_not_held(told):
    timing.Stopwatch(torch.device("cuda"), flush=False)(lambda: told.append("call"))
    assert told == ["idle", "record", "call", "record", "wait"]


def test_an_error_that_lasts_is_a_status_and_not_the_end(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    assert timing.attempt(broken, 10) == "unsupported: CUDA error: an illegal memory access was encountered"


def test_an_alarm_that_rings_when_the_call_has_ended_is_a_timeout(monkeypatch):
    @contextlib.contextmanager
    def late(seconds):
        yield lambda: True
        raise timing.Deadline

    monkeypatch.setattr(timing, "deadline", late)
    assert timing.attempt(lambda: None, 3) == "timeout: not done in 3 s"


def test_a_summary_is_of_medians_and_percentiles():
    assert timing.summary([5.0, 1.0, 11.0, *range(2, 5), *range(6, 11)]) == timing.Times(6.0, 2.0, 10.0)
