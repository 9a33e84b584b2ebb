"""Convolutions as Triton kernels or cuDNN's graphs: norm and ReLU before, statistics behind, and backward likewise.

`FusedConvolutions` puts the kernels together. A subclass chooses for each piece of work which kernel runs, and with which tiles. What it
does not choose runs as in `Reference`: by the framework's convolution, and by the passes of the class that it is mixed into.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import cudnn
from ..cudnn.work import as_cudnn_reads
from ..policy import pays_to_apply_norm
from ..problem import ConvProblem
from ..reference import Reference, allow_tf32, convolution_backward
from ..tuning import CUDNN, Choice, Task
from ..values import Conv, ConvGeometry, ConvOutput, Norm, Pending, Source, problem_of


def is_projection(problem: ConvProblem) -> bool:
    """Whether its input's gradient is one of every stride-th pixel, in both directions."""
    return problem.reads_pixels and len(set(problem.stride)) == 1


class FusedConvolutions(Reference, ABC):
    """Mixed into a class that has the passes."""

    def __init__(self) -> None:
        self._chosen: dict[tuple, Choice | None] = {}

    def why_not(self, device, dtype):
        reason = super().why_not(device, dtype)
        if reason is None:  # what kernels read beside tensors is made now, and not by the first of them
            from ..kernels.fprop import one

            one(device)
        return reason

    @abstractmethod
    def choose(self, task: Task, device: torch.device) -> Choice | None:
        """The kernel that does `task`; None where the framework's convolution and the passes do it. Asked once for each task."""

    @property
    def fuses(self) -> bool:
        """Whether a kernel has done any of the work so far."""
        return any(choice is not None for choice in self._chosen.values())

    def forget(self) -> None:
        """Ask again for every task, since what is known has changed."""
        self._chosen.clear()

    def _choose(
        self, kind: str, x: Tensor, weight: Tensor, geometry: ConvGeometry, source: str, dact: bool = False, *compact: int
    ) -> Choice | None:
        stride, padding, dilation, groups = geometry
        if groups > 1:
            return None
        key = kind, x.shape, weight.shape, *stride, *padding, *dilation, x.dtype, source, dact, *compact, x.device
        if key not in self._chosen:
            task = Task(kind, problem_of(x, weight, geometry), str(x.dtype).removeprefix("torch."), source, dact, *compact)
            self._chosen[key] = self.choose(task, x.device)
        return self._chosen[key]

    # ---- forward: each as in `Reference`, where the docstrings are ---------------------------------------------------

    def _prologue(self, source: Source, convs: Sequence[Conv]) -> Choice | None:
        """The choice for the first convolution where its prologue makes the activation; None where a pass does."""
        first = convs[0]
        if source.residual is not None and not problem_of(source.x, first.weight, first.geometry).pointwise:
            return None  # overlapping windows would make the activation, and write it, again and again
        return self._choose("fprop", source.x, first.weight, first.geometry, source.kind())

    def as_read(self, source: Source, convs: Sequence[Conv | ConvOutput], kept: bool) -> Source:
        """As in `Reference`. cuDNN's prologue rounds scale and bias.

        The same rounding is then that of every kernel of the node, of whichever backend, forward and backward, so that all see one
        mask: a product of two rounded numbers is exact in float32. What a pass writes is of unrounded ones.
        """
        if kept or not source.pending or self._choose("fprop", source.x, convs[0].weight, convs[0].geometry, "norm") != CUDNN:
            return source
        return as_cudnn_reads(source)

    def keeps_act(self, source, convs):
        return self._prologue(source, convs) is None

    def convolve(self, source, convs, write_act):
        source = self.as_read(source, convs, kept=write_act or source.residual is not None)
        act, mask, pendings = source.x, None, []
        if source.pending:
            configuration = self._first(source, convs, write_act)
            if configuration is not None:
                pending, act, mask = self._fprop(source, convs[0], configuration, write_act)
                pendings.append(pending)
            else:
                act, mask = self.norm_add_act(source, relu=True, save_mask=source.residual is not None)
        for conv in convs[len(pendings) :]:
            configuration = self._choose("fprop", act, conv.weight, conv.geometry, "act")
            if configuration is None:
                pendings.append(self._convolution(act, conv))
            else:
                pendings.append(self._fprop(Source(act), conv, configuration, False)[0])
        return pendings, act, mask

    def _first(self, source: Source, convs: Sequence[Conv], write_act: bool) -> Choice | None:
        """As `_prologue`, where the activation may have to be written: by a 1x1 convolution alone, and not by cuDNN."""
        if write_act and not problem_of(source.x, convs[0].weight, convs[0].geometry).pointwise:
            return None
        configuration = self._prologue(source, convs)
        return None if write_act and configuration == CUDNN else configuration

    def convolution_again(self, source: Source, conv: Conv, written: bool) -> Callable[[Source], Tensor]:
        configuration = self._first(source, [conv], written) if source.pending else None
        if configuration is None:  # a pass wrote the activation, if it was not there
            configuration = self._choose("fprop", source.x, conv.weight, conv.geometry, "act")

        def again(read: Source) -> Tensor:
            if configuration is None:
                return self.conv2d(read.x, conv.weight, conv.geometry)
            if configuration == CUDNN:
                return cudnn.fprop(read, conv.weight, conv.geometry)[0]
            from ..kernels.fprop import fprop

            return fprop(read, conv.weight, conv.geometry, False, False, configuration, allow_tf32(), statistics=False)[0]

        return again

    def _fprop(self, source: Source, conv: Conv, configuration: Choice, write_act: bool) -> tuple[Pending, Tensor | None, Tensor | None]:
        norm, save_mask = conv.norm, source.residual is not None
        if configuration == CUDNN:
            y, *sums = cudnn.fprop(source, conv.weight, conv.geometry)
            return Pending(y, *self._moments_of_sums(y, *sums, norm)), None, None
        from ..kernels.fprop import fprop

        y, act, mask, moments = fprop(source, conv.weight, conv.geometry, write_act, save_mask, configuration, allow_tf32())
        return self.with_norm(y, norm, moments), act, mask

    def _moments_of_sums(self, y: Tensor, total: Tensor, squares: Tensor, norm: Norm) -> tuple[Tensor, ...]:
        """(mean, invstd, var, scale, bias) of y, of which Σ y and Σ y² are known."""
        if not norm.training:
            return self.running_stats(norm, y.dtype)
        from ..kernels.square_sums import moments_of_sums

        return moments_of_sums(y, total, squares, norm.gamma, norm.beta, norm.eps)

    def conv_affine_act(self, x, weight, geometry, scale, bias, residual, relu):
        choice, act = self._inference_choice(x, weight, geometry), None
        if choice == CUDNN and relu:  # its graph has one
            act = cudnn.conv_affine_act(x, weight, geometry, scale, bias, residual)
        elif choice is not None and choice != CUDNN:
            from ..kernels.fprop import fprop_affine_act

            act = fprop_affine_act(x, weight, geometry, scale, bias, residual, relu, configuration=choice, allow_tf32=allow_tf32())
        return super().conv_affine_act(x, weight, geometry, scale, bias, residual, relu) if act is None else act

    def _inference_choice(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Choice | None:
        """What does the same convolution in training, of an activation that exists: a tuner has timed it with statistics behind it.

        Where that beats the framework's convolution and a pass that reads y, this beats one and a pass that writes it, too.
        """
        return self._choose("fprop", x, weight, geometry, "act")

    # ---- backward ----------------------------------------------------------------------------------------------------

    def convolve_backward(self, source, act, mask, outputs, dact, need_dx):
        source = self.as_read(source, outputs, kept=act is not None)
        used = [output for output in outputs if output.dz is not None]
        gradients, dys = (None,) * 4, [None] * len(used)
        if need_dx:
            gradients, dys = self._input_gradients(source, mask, used, dact)
        made, dws = {id(output): dy for output, dy in zip(used, dys, strict=True)}, []
        for output in outputs:
            wanted = output.dz is not None and output.need_dw
            dws.append(self._weight_gradient(source, act, made[id(output)], output) if wanted else None)
        return gradients, dws

    def _input_gradients(
        self, source: Source, mask: Tensor | None, outputs: list[ConvOutput], dact: Tensor | None
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        """((dx, s1, s2, residual_s2), [dy of each output, None where it was not made on the way])."""
        if not outputs:
            return self._source_gradients(source, mask, [dact]), []
        main, *others = outputs
        # A projection's gradient stays on its own grid: between its pixels there are zeros, which nobody needs to write or read.
        beside = problem_of(source.x, others[0].weight, others[0].geometry) if others else None
        stride = beside.stride[0] if beside and is_projection(beside) else 0
        adds = dact is not None or bool(others and not stride)
        projection = (stride, others[0].weight.shape[0]) if stride else ()
        configuration = self._choose("dgrad", source.x, main.weight, main.geometry, source.kind(mask), adds, *projection)
        if configuration == CUDNN:
            stride = 0  # it adds whole tensors
        if configuration is None:
            dys = [self._dy(output) for output in outputs]
            dxs = [convolution_backward(source.x, dy, output, True, False)[0] for dy, output in zip(dys, outputs, strict=True)]
            return self._source_gradients(source, mask, [*dxs, dact]), dys
        compact, dys = None, []
        for other in others:
            if stride:
                compact, dy = self._projection_gradient(source.x, other)
            else:
                dy = self._dy(other)
                dx = convolution_backward(source.x, dy, other, True, False)[0]
                dact = dx if dact is None else dact + dx
            dys.append(dy)
        if configuration == CUDNN:
            dy = self._dy(main)
            return cudnn.dgrad(source, mask, dy, main.weight, main.geometry, dact), [dy, *dys]
        from ..kernels.dgrad import dgrad

        # Overlapping windows would apply the norm's backward to a pixel again and again, and wgrad wants dy written anyway.
        in_prologue = pays_to_apply_norm(problem_of(source.x, main.weight, main.geometry))
        dy = None if in_prologue else self._dy(main)
        *gradients, written = dgrad(
            main if in_prologue else main._replace(dz=dy), source, mask, dact, compact, stride,
            apply_norm=in_prologue, write_dy=in_prologue and main.need_dw, configuration=configuration, allow_tf32=allow_tf32(),
        )  # fmt: skip
        return tuple(gradients), [written if in_prologue else dy, *dys]

    def _projection_gradient(self, x: Tensor, output: ConvOutput) -> tuple[Tensor, Tensor]:
        """(the gradient of a projection's input at the pixels of x that it reads, [N, C, P, Q]; dy)."""
        stride = output.geometry.stride[0]
        read = x[:, :, ::stride, ::stride]  # for its shape: nothing is read
        plain = output._replace(geometry=ConvGeometry([1, 1], [0, 0], [1, 1], 1))
        configuration = self._choose("dgrad", read, plain.weight, plain.geometry, "act")  # never cuDNN: nothing is fused to it
        if configuration is None:
            dy = self._dy(output)
            return convolution_backward(read, dy, plain, True, False)[0], dy
        from ..kernels.dgrad import dgrad

        in_prologue = pays_to_apply_norm(problem_of(read, plain.weight, plain.geometry))
        dy = None if in_prologue else self._dy(output)
        gradient, *_, written = dgrad(
            plain if in_prologue else plain._replace(dz=dy), Source(read), None, None, None, 0,
            apply_norm=in_prologue, write_dy=in_prologue and output.need_dw, configuration=configuration, allow_tf32=allow_tf32(),
        )  # fmt: skip
        return gradient, written if in_prologue else dy

    def _weight_gradient(self, source: Source, act: Tensor | None, dy: Tensor | None, output: ConvOutput) -> Tensor:
        """dw, of an activation that exists or is made again."""
        dy = self._dy(output) if dy is None else dy
        configuration = self._choose("wgrad", source.x, output.weight, output.geometry, "norm" if act is None else "act")
        if configuration == CUDNN and self._choose("fprop", source.x, output.weight, output.geometry, "norm") == CUDNN:
            return cudnn.wgrad(source, dy, output.weight, output.geometry)
        if configuration in (None, CUDNN):  # cuDNN would round coefficients that this node's forward did not
            if act is None:
                act, _ = self.norm_add_act(source, relu=True, save_mask=False)
            return convolution_backward(act, dy, output, False, True)[1]
        from ..kernels.wgrad import wgrad

        read = source if act is None else Source(act)
        return wgrad(read, dy, output.weight, output.geometry, configuration, allow_tf32())
