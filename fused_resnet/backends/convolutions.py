"""The convolutions as Triton kernels: norm, ReLU and residual in the prologue, statistics in the epilogue, and backward likewise.

`FusedConvolutions` puts the kernels together; which of them runs, with which tiles, a subclass chooses for each piece of work.
What it does not choose runs as in `Reference`: the framework's convolution and the passes of the class that it is mixed into.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import ConvProblem
from ..reference import Conv, ConvGeometry, ConvOutput, Pending, Reference, Source, convolution_backward
from ..tuning import Configuration, Task
from ..tuning.heuristic_dgrad import pays_to_apply_norm


def allow_tf32() -> bool:
    """Whether products of float32 may be cut to TF32, as the framework's convolutions would."""
    # Not `cudnn.allow_tf32`, which raises an error where somebody has set this.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def is_pointwise(weight: Tensor, geometry: ConvGeometry, strided: bool = False) -> bool:
    """Whether each pixel of the output reads one of the input: 1x1, without padding, and with stride 1 unless `strided`."""
    return weight.shape[2:] == (1, 1) and not any(geometry.padding) and (strided or max(geometry.stride) == 1)


def is_projection(output: ConvOutput) -> bool:
    """Whether its input's gradient is one of every stride-th pixel, in both directions."""
    return is_pointwise(output.weight, output.geometry, strided=True) and len(set(output.geometry.stride)) == 1


def problem_of(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> ConvProblem:
    """The convolution in numbers."""
    (n, c, h, w), (k, _, r, s) = x.shape, weight.shape
    stride, padding, dilation, groups = geometry
    return ConvProblem(n, c, h, w, k, r, s, tuple(stride), tuple(padding), tuple(dilation), groups)


class FusedConvolutions(Reference, ABC):
    """Mixed into a class that has the passes."""

    def __init__(self) -> None:
        self._chosen: dict[tuple, Configuration | None] = {}

    @abstractmethod
    def choose(self, task: Task, device: torch.device) -> Configuration | None:
        """How the kernel for `task` is tiled; None where the framework and the passes do the work. Asked once for each task."""

    def forget(self) -> None:
        """Ask again for every task, since what is known has changed."""
        self._chosen.clear()

    def _choose(
        self, kind: str, x: Tensor, weight: Tensor, geometry: ConvGeometry, source: str, dact: bool = False, compact: int = 0
    ) -> Configuration | None:
        stride, padding, dilation, groups = geometry
        if groups > 1:
            return None
        key = kind, x.shape, weight.shape, *stride, *padding, *dilation, x.dtype, source, dact, compact, x.device
        if key not in self._chosen:
            task = Task(kind, problem_of(x, weight, geometry), str(x.dtype).removeprefix("torch."), source, dact, compact)
            self._chosen[key] = self.choose(task, x.device)
        return self._chosen[key]

    # ---- forward: each as in `Reference`, where the docstrings are ---------------------------------------------------

    def _prologue(self, source: Source, convs: Sequence[Conv]) -> Configuration | None:
        """The choice for the first convolution where its prologue makes the activation; None where a pass does."""
        first = convs[0]
        if source.residual is None:
            kind = "norm"
        elif is_pointwise(first.weight, first.geometry):
            kind = "norm_add" if source.residual_scale is None else "norm_add_raw"
        else:  # overlapping windows would make the activation, and write it, again and again
            return None
        return self._choose("fprop", source.x, first.weight, first.geometry, kind)

    def keeps_act(self, source, convs):
        return self._prologue(source, convs) is None

    def convolve(self, source, convs, write_act):
        act, mask, pendings = source.x, None, []
        if source.pending:
            pointwise = is_pointwise(convs[0].weight, convs[0].geometry)
            configuration = self._prologue(source, convs) if pointwise or not write_act else None
            if configuration is not None:
                pending, act, mask = self._fprop(source, convs[0], configuration, write_act)
                pendings.append(pending)
            else:
                act, mask = self.norm_add_act(
                    source.x, source.scale, source.bias, source.residual, source.residual_scale, source.residual_bias,
                    relu=True, save_mask=source.residual is not None,
                )  # fmt: skip
        for conv in convs[len(pendings) :]:
            configuration = self._choose("fprop", act, conv.weight, conv.geometry, "act")
            if configuration is None:
                pendings.append(self._convolution(act, conv))
            else:
                pendings.append(self._fprop(Source(act), conv, configuration, False)[0])
        return pendings, act, mask

    def _fprop(
        self, source: Source, conv: Conv, configuration: Configuration, write_act: bool
    ) -> tuple[Pending, Tensor | None, Tensor | None]:
        from ..kernels.fprop import fprop

        norm, save_mask = conv.norm, source.residual is not None
        y, act, mask, moments = fprop(
            source, conv.weight, conv.geometry, write_act, save_mask, configuration, allow_tf32()
        )
        return self.with_norm(y, norm, moments), act, mask

    # ---- backward ----------------------------------------------------------------------------------------------------

    def convolve_backward(self, source, act, mask, outputs, dact, need_dx):
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
        stride = others[0].geometry.stride[0] if others and is_projection(others[0]) else 0
        adds = dact is not None or bool(others and not stride)
        kind = "act"
        if source.pending:
            kind = "norm_add_raw" if source.residual_mean is not None else "norm" if mask is None else "norm_add"
        configuration = self._choose("dgrad", source.x, main.weight, main.geometry, kind, adds, stride)
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
        from ..kernels.dgrad import dgrad

        # Overlapping windows would apply the norm's backward to a pixel again and again, and wgrad wants dy written anyway.
        in_prologue = pays_to_apply_norm(problem_of(source.x, main.weight, main.geometry))
        dy = None if in_prologue else self._dy(main)
        *gradients, written = dgrad(
            main if in_prologue else main._replace(dz=dy), source, mask, dact, compact, stride, in_prologue,
            in_prologue and main.need_dw, configuration, allow_tf32(),
        )  # fmt: skip
        return tuple(gradients), [written if in_prologue else dy, *dys]

    def _projection_gradient(self, x: Tensor, output: ConvOutput) -> tuple[Tensor, Tensor]:
        """(the gradient of a projection's input at the pixels of x that it reads, [N, C, P, Q]; dy)."""
        stride = output.geometry.stride[0]
        read = x[:, :, ::stride, ::stride]  # for its shape: nothing is read
        plain = output._replace(geometry=ConvGeometry([1, 1], [0, 0], [1, 1], 1))
        configuration = self._choose("dgrad", read, plain.weight, plain.geometry, "act")
        if configuration is None:
            dy = self._dy(output)
            return convolution_backward(read, dy, plain, True, False)[0], dy
        from ..kernels.dgrad import dgrad

        in_prologue = pays_to_apply_norm(problem_of(read, plain.weight, plain.geometry))
        dy = None if in_prologue else self._dy(output)
        gradient, *_, written = dgrad(
            plain if in_prologue else plain._replace(dz=dy), Source(read), None, None, None, 0, in_prologue,
            in_prologue and output.need_dw, configuration, allow_tf32(),
        )  # fmt: skip
        return gradient, written if in_prologue else dy

    def _weight_gradient(self, source: Source, act: Tensor | None, dy: Tensor | None, output: ConvOutput) -> Tensor:
        """dw, of an activation that exists or is made again."""
        dy = self._dy(output) if dy is None else dy
        configuration = self._choose(
            "wgrad", source.x, output.weight, output.geometry, "norm" if act is None else "act"
        )
        if configuration is None:
            if act is None:
                act, _ = self.norm_add_act(source.x, source.scale, source.bias, None, None, None, relu=True, save_mask=False)
            return convolution_backward(act, dy, output, False, True)[1]
        from ..kernels.wgrad import wgrad

        read = source if act is None else Source(act)
        return wgrad(read, dy, output.weight, output.geometry, configuration, allow_tf32())
