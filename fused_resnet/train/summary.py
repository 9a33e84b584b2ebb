"""What a run came to: accuracy, speed, time to an accuracy, memory."""

import statistics
from itertools import accumulate
from typing import Any


def best_epoch(history: list[dict[str, Any]]) -> int:
    """The number of the epoch of the highest accuracy, the first of several; 1 is the first."""
    return max(history, key=lambda record: (record["eval_accuracy"], -record["epoch"]))["epoch"]


def summarised(history: list[dict[str, Any]], target: float | None = None) -> dict[str, Any]:
    """A summary of the records of `metrics.jsonl`, at least one: what `summary.json` holds.

    Times are seconds of training and evaluation since the start, without loading the data set, building the network, or checkpoints between
    epochs. `target_seconds` and `target_epoch` are None where no epoch reached the accuracy `target`, 0 to 1.
    """
    seconds = list(accumulate(record["train_seconds"] + record["eval_seconds"] for record in history))
    last, best = history[-1], history[best_epoch(history) - 1]
    reached = next((record["epoch"] for record in history if target is not None and record["eval_accuracy"] >= target), None)
    # The first epoch includes warming up.
    speeds = [record["images_per_second"] for record in history[1:] or history]
    return {
        "epochs": last["epoch"], "accuracy": last["eval_accuracy"], "top5_accuracy": last["eval_top5_accuracy"],
        "best_accuracy": best["eval_accuracy"], "best_top5_accuracy": best["eval_top5_accuracy"], "best_epoch": best["epoch"],
        "seconds_to_best": seconds[best["epoch"] - 1], "seconds": seconds[-1], "target_accuracy": target, "target_epoch": reached,
        "target_seconds": None if reached is None else seconds[reached - 1], "images_per_second": statistics.median(speeds),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in history),
    }  # fmt: skip


def summary_text(summary: dict[str, Any], device: str) -> str:
    """A summary for people, in lines of at most 80 columns."""
    lines = [
        f"accuracy   {100 * summary['accuracy']:.2f}% after epoch {summary['epochs']}, top-5 {100 * summary['top5_accuracy']:.2f}%",
        f"best       {100 * summary['best_accuracy']:.2f}% after epoch {summary['best_epoch']}, {_time(summary['seconds_to_best'])}",
    ]
    if (target := summary["target_accuracy"]) is not None:
        reached = summary["target_epoch"]
        told = "not reached" if reached is None else f"after epoch {reached}, {_time(summary['target_seconds'])}"
        lines.append(f"target     {100 * target:.2f}% {told}")
    lines += [
        f"speed      {summary['images_per_second']:,.0f} images/s, the median epoch's",
        f"time       {_time(summary['seconds'])} of training and evaluation",
        f"memory     {summary['peak_memory_bytes'] / 1e9:.2f} GB at most, {'of tensors' if device == 'cuda' else 'of the process'}",
    ]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
