"""Time whole training steps of a ResNet, ours against PyTorch's eager mode and torch.compile, and write bench/results JSON.

Every implementation starts from the same state; before timing, its gradient is compared with float32 eager's: it may be at most
twice as far away as that of eager in the same precision and layout.
"""

import sys

import torch

from fused_resnet import models
from fused_resnet.bench import program
from fused_resnet.bench.machine import Ceilings, measure_ceilings
from fused_resnet.bench.schema import Row
from fused_resnet.bench.steps import IMPLEMENTATIONS, Batches, TrainingStep, distance
from fused_resnet.bench.timing import Times, attempt, measure
from fused_resnet.roofline import DEPTHS, DESIGNS, floor_seconds, resnet, total_flops, training_step

#: What rounding alone may cost where eager has little error: one ReLU that it turns moves a gradient by some 1e-3.
LEAST_BOUND = 5e-3
#: Batch and image size on a CPU: with fewer values a channel, batch norm blows up any rounding, and a comparison says nothing.
SMALL = (8, 64)


class Contest:
    """The implementations of one model's step: built, checked, timed."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device, args):
        self.model, self.dtype, self.device, self.args = model, dtype, device, args
        self.batches = Batches(args.batch, args.size, 1000, device)
        truth = TrainingStep(model, "eager", torch.float32, self.batches)
        self.state = {name: value.cpu() for name, value in truth.module.state_dict().items()}
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self.truth = truth.gradients()
        del truth
        baseline = TrainingStep(model, "eager_nhwc", dtype, self.batches, self.state)
        self.bound = 2 * distance(baseline.gradients(), self.truth) + LEAST_BOUND
        if self.bound == float("inf"):
            raise RuntimeError(f"{model}: the gradient of eager in {dtype} is not finite, so that nothing can be compared with it")

    def build(self, impl: str) -> tuple[TrainingStep | None, dict]:
        """(the step, or None where it fails; what its row says of it)."""
        built, facts = [], {}
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)

        def build():
            step = TrainingStep(self.model, impl, self.dtype, self.batches, self.state)
            gradients = step.gradients()
            error = distance(gradients, self.truth)
            del gradients
            if error < float("inf"):
                facts["max_rel_error"] = error
            if error > self.bound:
                facts["status"] = f"wrong: the gradient is {error:.1e} from float32's; {self.bound:.1e} is allowed"
                return
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
            step()
            if on_gpu:
                facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device) - before
            built.append(step)

        if status := attempt(build):
            facts["status"] = status
        return (built[0] if built else None), facts

    def rows(self, ceilings: Ceilings) -> list[Row]:
        """A row for each implementation."""
        steps, facts = {}, {}
        for impl in self.args.impl:
            print(f"{self.model} {impl}", file=sys.stderr, flush=True)
            step, facts[impl] = self.build(impl)
            if step is not None:
                steps[impl] = step
        times = measure(steps, self.device, self.args.repeats, flush=False, limit_s=self.args.limit)
        return [self.row(impl, times.get(impl), facts[impl], ceilings) for impl in self.args.impl]

    def row(self, impl: str, outcome: Times | str | None, facts: dict, ceilings: Ceilings) -> Row:
        """The floor is that of everything fused, the same for all peers."""
        size, batch = self.args.size, self.args.batch
        if isinstance(outcome, Times):
            facts |= vars(outcome) | {"images_per_s": batch / (outcome.median_ms * 1e-3)}
            if self.model in DEPTHS:
                kernels = training_step(resnet(self.model, batch, size), DESIGNS["+fold"], self.dtype.itemsize)
                floor_ms = 1e3 * floor_seconds(kernels, ceilings.flops_per_s, ceilings.bytes_per_s)
                facts["tflops"] = total_flops(kernels) / (outcome.median_ms * 1e-3) / 1e12
                facts["roofline_fraction"] = floor_ms / outcome.median_ms
        elif outcome is not None:
            facts["status"] = outcome
        return Row("train", self.model, impl, str(self.dtype).removeprefix("torch."), batch, [3, size, size], **facts)


def main(arguments: list[str] | None = None) -> int:
    """The program; gives its exit status."""
    parser = program.arguments(
        "Time whole training steps, with the optimizer.", "python bench/train.py --model resnet50 --batch 128",
        tuple(IMPLEMENTATIONS), "bf16",
    )  # fmt: skip
    program.add_timing(parser)
    parser.add_argument("--model", nargs="+", choices=models.list_models(), default=["resnet18", "resnet50"], metavar="NAME")
    args = parser.parse_args(arguments)
    device, dtype = program.settle(args, tuple(IMPLEMENTATIONS), SMALL), program.DTYPES[args.dtype]
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # for all peers: the framework's convolutions are chosen by measuring
    torch.manual_seed(0)
    ceilings = measure_ceilings(device, dtype, args.repeats)
    rows = []
    for model in args.model:
        rows += Contest(model, dtype, device, args).rows(ceilings)
    return program.report(rows, device, args.commit, args.out)


if __name__ == "__main__":
    sys.exit(main())
