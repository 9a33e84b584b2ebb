"""What a ResNet's training step, or its inference, must cost: FLOPs and bytes of each kernel, in several designs, and the floor.

The rules of counting. A kernel moves every tensor that it touches once; nothing stays in a cache from one kernel to the next;
the halo of a 3x3 window is free. A kernel takes max(FLOPs / rate, bytes / bandwidth), and a step the sum over its kernels: its
floor. Partial sums, split-K workspaces, finalising launches, and the casts of weights are not counted.

`fused-resnet roofline` prints it. Plain Python, no GPU.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .policy import pays_to_apply_norm
from .problem import ConvProblem, Kernel, NormProblem

MASTER_BYTES = 4  # parameters, their gradients and their momentum are float32


@dataclass(frozen=True)
class Layer:
    """A convolution by its name in torchvision's state_dict."""

    name: str
    conv: ConvProblem


@dataclass(frozen=True)
class Block:
    """A residual block: the convolutions of its branch, in order, and that of its shortcut where it has one."""

    branch: tuple[Layer, ...]
    projection: Layer | None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All convolutions."""
        return self.branch + ((self.projection,) if self.projection else ())


@dataclass(frozen=True)
class Network:
    """A ResNet for one batch size and image size. `pool` is the output of the max pool."""

    stem: Layer
    pool: NormProblem
    blocks: tuple[Block, ...]
    features: int
    classes: int

    @property
    def batch(self) -> int:
        """Images in a batch."""
        return self.pool.n

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All convolutions, the stem's first."""
        return (self.stem, *(layer for block in self.blocks for layer in block.layers))

    @property
    def parameters(self) -> int:
        """Trained numbers: weights, gammas and betas, the classifier with its bias."""
        return sum(layer.conv.weight_elements + 2 * layer.conv.k for layer in self.layers) + (self.features + 1) * self.classes

    @property
    def forward_flops(self) -> int:
        """FLOPs of the convolutions and of the classifier, forward, whole batch."""
        return sum(layer.conv.flops for layer in self.layers) + 2 * self.batch * self.features * self.classes


#: Blocks in each of the four stages, and whether they are bottlenecks. He et al. 2015, table 1.
DEPTHS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


def resnet(name: str, batch: int, size: int = 224, classes: int = 1000, stride_first: bool = False) -> Network:
    """The network `name`, a key of `DEPTHS`, for `batch` images of `size` x `size`.

    torchvision strides in a bottleneck's 3x3 convolution; with `stride_first` it is the first 1x1, as in the paper. Raises
    ValueError for an unknown name.
    """
    if name not in DEPTHS:
        raise ValueError(f"name: unknown network {name!r}; expected one of {', '.join(DEPTHS)}")
    depths, bottleneck = DEPTHS[name]
    stem = Layer("conv1", ConvProblem(batch, 3, size, size, 64, 7, 7, (2, 2), (3, 3)))
    h, c = (stem.conv.p - 1) // 2 + 1, 64
    pool, blocks = NormProblem(batch, c, h, h), []
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for i in range(depth):
            stride = 2 if stage and not i else 1
            if bottleneck:
                strides = (stride, 1, 1) if stride_first else (1, stride, 1)
                shapes = [(width, 1, strides[0]), (width, 3, strides[1]), (4 * width, 1, strides[2])]
            else:
                shapes = [(width, 3, stride), (width, 3, 1)]
            block = _block(f"layer{stage + 1}.{i}", batch, c, h, shapes, stride)
            h, c = block.branch[-1].conv.p, block.branch[-1].conv.k
            blocks.append(block)
    return Network(stem, pool, tuple(blocks), c, classes)


def _block(name: str, batch: int, c: int, h: int, shapes: list[tuple[int, int, int]], stride: int) -> Block:
    """A block on [batch, c, h, h]. shapes: (output channels, window, stride) of each convolution of its branch."""
    branch, k, extent = [], c, h
    for i, (width, window, step) in enumerate(shapes, 1):
        conv = ConvProblem(batch, k, extent, extent, width, window, window, (step, step), (window // 2,) * 2)
        branch.append(Layer(f"{name}.conv{i}", conv))
        k, extent = conv.k, conv.p
    projection = None
    if stride > 1 or k != c:
        projection = Layer(f"{name}.downsample.0", ConvProblem(batch, c, h, h, k, 1, 1, (stride, stride)))
    return Block(tuple(branch), projection)


# How a norm's backward sums, the stem's pool and the tail's pool may be done.
APART = "apart"  # kernels of their own; what can be recomputed from d and the raw output is not written
PASS = "pass"  # one pass of their own, which writes dz, since the gradient convention hands it over
FUSED = "fused"  # in a convolution's epilogue; for the pools in one pass, with nothing written that can be recomputed
POINTWISE = "pointwise"  # in the prologue of a 1x1 convolution, which writes it for other readers; a pass before any other


@dataclass(frozen=True)
class Design:
    """What is fused with what. The default is `onepass`: one pass for statistics, one to apply; one to reduce, one to apply."""

    separate: bool = False  #: statistics, normalisation, ReLU and addition each a kernel, both ways: PyTorch's eager mode
    statistics: bool = False  #: statistics in fprop's epilogue
    prologue: bool = False  #: inner norms and ReLUs in the prologue of fprop and wgrad; inner activations are never written
    reduce: str = APART  #: gradient addition, ReLU mask and the sums s1, s2; `FUSED` is in dgrad's epilogue
    apply: str = APART  #: batch norm's backward; `FUSED` is in the prologues of dgrad and wgrad
    stem: str = APART  #: norm, ReLU and max pool
    tail: str = APART  #: last norm, residual, ReLU and average pool
    boundary: str = APART  #: a block's last norm, residual and ReLU; `FUSED` is in the prologue of the next block's first convolution
    recompute: bool = False  #: inner outputs of a branch, and activations between, are made again in backward instead of kept


_STATS = {"statistics": True}
_PRO = _STATS | {"prologue": True}
_RED = _PRO | {"reduce": FUSED}
_APP = _RED | {"apply": FUSED}
_STEM = _APP | {"stem": FUSED}
_TAIL = _STEM | {"tail": FUSED}

#: The rows of the table, from PyTorch's eager mode to everything fused. `passes` and `triton` are this package's backends of these names,
#: without and with `fused_resnet.recompute`.
DESIGNS = {
    "eager": Design(separate=True),
    "passes": Design(reduce=PASS, stem=PASS, tail=PASS),
    "onepass": Design(),
    "+stats": Design(**_STATS),
    "+pro": Design(**_PRO),
    "+red": Design(**_RED),
    "+app": Design(**_APP),
    "+stemf": Design(**_STEM),
    "+tail": Design(**_TAIL),
    "+fold": Design(**_TAIL, boundary=FUSED),
    "triton": Design(**_RED, apply=POINTWISE, stem=PASS, tail=PASS, boundary=POINTWISE),
}
DESIGNS |= {f"{name}, recompute": replace(DESIGNS[name], recompute=True) for name in ("passes", "triton")}


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the tensors of a layer, with activations and weights of `itemsize` bytes."""

    itemsize: int

    def x(self, layer: Layer) -> int:
        return layer.conv.input_bytes(self.itemsize)

    def touched(self, layer: Layer) -> int:
        return layer.conv.touched_input_bytes(self.itemsize)

    def y(self, layer: Layer) -> int:
        return layer.conv.output_bytes(self.itemsize)

    def w(self, layer: Layer) -> int:
        return layer.conv.weight_bytes(self.itemsize)

    def mask(self, layer: Layer) -> int:
        return layer.conv.output_norm.mask_bytes

    def pool(self, network: Network) -> int:
        return network.pool.tensor_bytes(self.itemsize)

    def fprop(self, layer: Layer) -> Kernel:
        """Reads what the windows cover, writes y."""
        return Kernel(layer.name, "fprop", layer.conv.flops, self.touched(layer) + self.w(layer) + self.y(layer))

    def dgrad(self, layer: Layer, source: int, epilogue: int) -> Kernel:
        """`source`: bytes of dy, or of what it is made from; `epilogue`: bytes of dx, and of what the epilogue reads."""
        return Kernel(layer.name, "dgrad", layer.conv.flops, source + self.w(layer) + epilogue)

    def wgrad(self, layer: Layer, source: int) -> Kernel:
        """The gradient of a weight is written in float32."""
        return Kernel(layer.name, "wgrad", layer.conv.flops, source + self.touched(layer) + layer.conv.weight_bytes(MASTER_BYTES))


def training_step(network: Network, design: Design, itemsize: int = 2) -> list[Kernel]:
    """The kernels of a training step: forward, backward, SGD with momentum. `itemsize`: bytes of an activation's element."""
    kernels = _separate_step if design.separate else _fused_step
    return [*kernels(network, design, _Sizes(itemsize)), *_head_and_optimizer(network, itemsize)]


def _head_and_optimizer(network: Network, itemsize: int) -> Iterator[Kernel]:
    for work, bytes_per_weight in (("fprop", itemsize), ("dgrad", itemsize), ("wgrad", MASTER_BYTES)):
        yield _classifier(network, itemsize, work, bytes_per_weight)
    yield optimizer_step(network.parameters, itemsize)


def _classifier(network: Network, itemsize: int, work: str = "fprop", bytes_per_weight: int | None = None) -> Kernel:
    weight = network.features * network.classes
    vectors = network.batch * (network.features + network.classes) * itemsize
    return Kernel("fc", work, 2 * network.batch * weight, weight * (bytes_per_weight or itemsize) + vectors)


def optimizer_step(parameters: int, itemsize: int) -> Kernel:
    """SGD with momentum: weight and momentum are read and written, the gradient is read; a narrower copy of the weight is written."""
    copy = itemsize if itemsize < MASTER_BYTES else 0
    return Kernel("optimizer", "sgd", 0, parameters * (5 * MASTER_BYTES + copy))


def _separate_step(network: Network, _: Design, sizes: _Sizes) -> Iterator[Kernel]:
    """PyTorch's eager mode."""
    stem, last, pool = network.stem, network.blocks[-1].branch[-1], sizes.pool(network)
    pool_with_index = pool + network.pool.tensor_bytes(8)  # int64

    def norm(layer: Layer, relu: bool) -> Iterator[Kernel]:
        yield Kernel(layer.name, "statistics", 0, sizes.y(layer))
        yield Kernel(layer.name, "apply", 0, 2 * sizes.y(layer))
        if relu:
            yield Kernel(layer.name, "relu", 0, 2 * sizes.y(layer))

    def norm_backward(layer: Layer) -> Iterator[Kernel]:
        yield Kernel(layer.name, "backward reduce", 0, 2 * sizes.y(layer))
        yield Kernel(layer.name, "backward apply", 0, 3 * sizes.y(layer))

    def conv_backward(layer: Layer) -> Iterator[Kernel]:
        yield sizes.dgrad(layer, sizes.y(layer), sizes.x(layer))
        yield sizes.wgrad(layer, sizes.y(layer))

    yield sizes.fprop(stem)
    yield from norm(stem, relu=True)
    yield Kernel("maxpool", "forward", 0, sizes.y(stem) + pool_with_index)
    for block in network.blocks:
        for layer in block.layers:
            yield sizes.fprop(layer)
            yield from norm(layer, relu=layer in block.branch[:-1])
        yield Kernel(block.branch[-1].name, "add", 0, 3 * sizes.y(block.branch[-1]))
        yield Kernel(block.branch[-1].name, "relu", 0, 2 * sizes.y(block.branch[-1]))
    yield Kernel("avgpool", "forward", 0, sizes.y(last))
    yield Kernel("avgpool", "backward", 0, sizes.y(last))
    for block in reversed(network.blocks):
        for layer in reversed(block.branch):
            yield Kernel(layer.name, "relu backward", 0, 3 * sizes.y(layer))
            yield from norm_backward(layer)
            yield from conv_backward(layer)
        if block.projection:
            yield from norm_backward(block.projection)
            yield from conv_backward(block.projection)
        yield Kernel(block.branch[0].name, "gradient add", 0, 3 * sizes.x(block.branch[0]))
    yield Kernel("maxpool", "backward", 0, pool_with_index + sizes.y(stem))
    yield Kernel(stem.name, "relu backward", 0, 3 * sizes.y(stem))
    yield from norm_backward(stem)
    yield sizes.wgrad(stem, sizes.y(stem))


def _fused_step(network: Network, design: Design, sizes: _Sizes) -> Iterator[Kernel]:
    """All other designs."""
    yield from _stem_forward(network, design, sizes)
    for i in range(len(network.blocks)):
        yield from _block_forward(network, i, design, sizes)
    for i in reversed(range(len(network.blocks))):
        yield from _block_backward(network, i, design, sizes)
    yield from _stem_backward(network, design, sizes)


def _stem_forward(network: Network, design: Design, sizes: _Sizes) -> Iterator[Kernel]:
    stem, pool, index = network.stem, sizes.pool(network), network.pool.elements  # a byte holds a tap's number
    yield sizes.fprop(stem)
    if not design.statistics:
        yield Kernel(stem.name, "statistics", 0, sizes.y(stem))
    if design.stem == APART:
        yield Kernel(stem.name, "apply", 0, 2 * sizes.y(stem))
        yield Kernel("maxpool", "forward", 0, sizes.y(stem) + pool + index)
    else:
        yield Kernel("maxpool", "forward", 0, sizes.y(stem) + pool + (index if design.stem == PASS else 0))


def _stem_backward(network: Network, design: Design, sizes: _Sizes) -> Iterator[Kernel]:
    stem, pool, index = network.stem, sizes.pool(network), network.pool.elements
    y = sizes.y(stem)
    if design.stem == FUSED:
        # Two gradients reach the pool, the branch's and the shortcut's, unless dgrad's epilogue has added them.
        gradients = pool if design.reduce == FUSED else 2 * pool
        yield Kernel(stem.name, "backward reduce", 0, gradients + y)
        yield sizes.wgrad(stem, gradients + y)
        return
    if design.stem == PASS:
        if design.reduce != FUSED or not network.blocks[0].projection:  # autograd adds what no operator does
            yield Kernel("maxpool", "gradient add", 0, 3 * pool)
        yield Kernel(stem.name, "backward reduce", 0, pool + index + 2 * y)
    else:
        gradients = pool if design.reduce == FUSED else 2 * pool
        yield Kernel("maxpool", "backward", 0, gradients + index + y)
        yield Kernel(stem.name, "backward reduce", 0, 2 * y)
    yield Kernel(stem.name, "backward apply", 0, 3 * y)
    yield sizes.wgrad(stem, y)


def _folds(block: Block, design: Design) -> bool:
    """Whether a block's first convolution makes the activation before it."""
    return design.boundary == FUSED or (design.boundary == POINTWISE and block.branch[0].conv.pointwise)


def _block_forward(network: Network, i: int, design: Design, sizes: _Sizes) -> Iterator[Kernel]:
    block, is_last = network.blocks[i], i == len(network.blocks) - 1
    first, last = block.branch[0], block.branch[-1]
    for layer in block.layers:
        kernel = sizes.fprop(layer)
        if layer is first and i > 0 and _folds(block, design):
            # Reads the branch's output and the residual, writes the activation and its mask.
            before = network.blocks[i - 1].branch[-1]
            moved = 3 * sizes.x(first) + sizes.mask(before) + sizes.w(first) + sizes.y(first)
            kernel = Kernel(first.name, "fprop", kernel.flops, moved)
        yield kernel
        if not design.statistics:
            yield Kernel(layer.name, "statistics", 0, sizes.y(layer))
        if not design.prologue and layer in block.branch[:-1]:
            yield Kernel(layer.name, "apply", 0, 2 * sizes.y(layer))
    if is_last and design.tail != APART:
        yield Kernel(last.name, "apply and pool", 0, 2 * sizes.y(last) + sizes.mask(last))
        return
    if is_last or not _folds(network.blocks[i + 1], design):
        yield Kernel(last.name, "apply", 0, 3 * sizes.y(last) + sizes.mask(last))
    if is_last:
        yield Kernel("avgpool", "forward", 0, sizes.y(last))


def _block_backward(network: Network, i: int, design: Design, sizes: _Sizes) -> Iterator[Kernel]:
    block, is_last = network.blocks[i], i == len(network.blocks) - 1
    last, projection = block.branch[-1], block.projection
    y, mask = sizes.y(last), sizes.mask(last)
    projected = sizes.y(projection) if projection else 0

    if design.recompute:
        yield from _inner_again(block, design, sizes)
    # dz of the block's last norm, which is the residual's gradient too. Behind a fused tail, one value a channel and the mask.
    dz = mask if is_last and design.tail == FUSED else y
    if is_last:
        written = 0 if design.tail == FUSED else y
        yield Kernel(last.name, "backward reduce", 0, y + mask + projected + written)
    elif design.reduce != FUSED:
        yield Kernel(last.name, "backward reduce", 0, 2 * y + mask + y + projected + y)
    if design.apply == APART:
        yield Kernel(last.name, "backward apply", 0, dz + 2 * y + 2 * projected)

    for inner, layer in reversed(list(zip(block.branch, block.branch[1:], strict=False))):
        raw_input = sizes.x(layer) if design.reduce == FUSED else 0  # for the mask, and for s2
        yield from _conv_backward(layer, dz if layer is last else sizes.y(layer), sizes.x(layer) + raw_input, design, sizes)
        if design.reduce != FUSED:
            yield Kernel(inner.name, "backward reduce", 0, (3 if design.reduce == PASS else 2) * sizes.y(inner))
        if design.apply == APART:
            yield Kernel(inner.name, "backward apply", 0, 3 * sizes.y(inner))

    shortcut = dz
    if projection:
        # Compact: of a strided 1x1, only what its windows cover, where the epilogue of the first dgrad picks it up.
        shortcut = sizes.touched(projection) if design.reduce == FUSED else sizes.x(projection)
        yield from _conv_backward(projection, dz, shortcut, design, sizes)
    first = block.branch[0]
    epilogue = sizes.x(first)
    if design.reduce == FUSED:
        epilogue += shortcut
        if i > 0:  # mask and raw output of the block before, and its projection's
            before = network.blocks[i - 1]
            raw = sizes.x(first) * (2 if before.projection else 1)
            epilogue += sizes.mask(before.branch[-1]) + raw
    yield from _conv_backward(first, sizes.y(first), epilogue, design, sizes)


def _inner_again(block: Block, design: Design, sizes: _Sizes) -> Iterator[Kernel]:
    """What makes the inner outputs of a branch again, from the block's input on. Statistics are known."""
    for layer in block.branch[:-1]:
        yield replace(sizes.fprop(layer), work="fprop again")
        if not design.prologue:
            yield Kernel(layer.name, "apply again", 0, 2 * sizes.y(layer))


def _conv_backward(layer: Layer, dz: int, epilogue: int, design: Design, sizes: _Sizes) -> Iterator[Kernel]:
    y = sizes.y(layer)
    for_dgrad = for_wgrad = dz + y if design.apply == FUSED else y  # dz and y, or the dy that was made of them
    if design.apply == POINTWISE:
        # A projection's gradient is made on its own grid.
        grid = replace(layer.conv, h=layer.conv.p, w=layer.conv.q, stride=(1, 1)) if layer.conv.r * layer.conv.s == 1 else layer.conv
        if pays_to_apply_norm(grid):
            for_dgrad = dz + 2 * y
        else:
            yield Kernel(layer.name, "backward apply", 0, dz + 2 * y)
    yield sizes.dgrad(layer, for_dgrad, epilogue)
    yield sizes.wgrad(layer, for_wgrad)


#: Ways to run a network in evaluation mode: norm, ReLU and addition each a kernel; norms folded away, but a bias, which PyTorch adds behind
#: cuDNN's convolution in a kernel of its own; bias, residual and ReLU as one pass; all of it in the convolution's epilogue.
INFERENCE = ("eager", "folded", "passes", "epilogue")


def inference_step(network: Network, design: str, itemsize: int = 2) -> list[Kernel]:
    """The kernels of a forward in evaluation mode, by one of `INFERENCE`. `itemsize`: bytes of an activation's element."""
    return list(_inference(network, design, _Sizes(itemsize)))


def _inference(network: Network, design: str, sizes: _Sizes) -> Iterator[Kernel]:
    def layer_kernels(layer: Layer, residual: bool, relu: bool) -> Iterator[Kernel]:
        y, fprop = sizes.y(layer), sizes.fprop(layer)
        if design == "epilogue":
            yield replace(fprop, bytes=fprop.bytes + y * residual)
            return
        yield fprop
        if design == "passes":
            yield Kernel(layer.name, "apply", 0, (2 + residual) * y)
            return
        yield Kernel(layer.name, "apply" if design == "eager" else "bias", 0, 2 * y)
        if residual:
            yield Kernel(layer.name, "add", 0, 3 * y)
        if relu:
            yield Kernel(layer.name, "relu", 0, 2 * y)

    yield from layer_kernels(network.stem, False, True)
    yield Kernel("maxpool", "forward", 0, sizes.y(network.stem) + sizes.pool(network) + network.pool.tensor_bytes(8))  # and an int64 index
    for block in network.blocks:
        for layer in block.layers:
            yield from layer_kernels(layer, layer is block.branch[-1], layer is not block.projection)
    yield Kernel("avgpool", "forward", 0, sizes.y(network.blocks[-1].branch[-1]))
    yield _classifier(network, sizes.itemsize)


def saved_layers(network: Network, design: Design, itemsize: int = 2) -> dict[str, int]:
    """Bytes of activations that are kept from forward to backward, whole batch, by the layer that makes them.

    Of the stem also the images; of a block's last layer the block's output and its mask. Per-channel vectors are not counted.
    """
    sizes = _Sizes(itemsize)
    saved = {layer.name: sizes.y(layer) for layer in network.layers}
    saved[network.stem.name] += sizes.x(network.stem)
    saved["maxpool"] = sizes.pool(network)
    if design.separate:
        saved[network.stem.name] += sizes.y(network.stem)
        saved["maxpool"] += network.pool.tensor_bytes(8)
    elif design.stem != FUSED:
        saved["maxpool"] += network.pool.elements
    for block in network.blocks:
        *inner, last = block.branch
        for layer in inner:
            if design.recompute:
                saved[layer.name] = 0
            elif not design.prologue:
                saved[layer.name] += sizes.y(layer)
        if design.separate or block is not network.blocks[-1]:  # the last one's is pooled in the pass that makes it
            saved[last.name] += sizes.y(last)
        if not design.separate:
            saved[last.name] += sizes.mask(last)
    return saved


def saved_bytes(network: Network, design: Design, itemsize: int = 2) -> int:
    """Bytes of activations that are kept from forward to backward, whole batch."""
    return sum(saved_layers(network, design, itemsize).values())


def total_bytes(kernels: Iterable[Kernel]) -> int:
    """What all kernels move."""
    return sum(kernel.bytes for kernel in kernels)


def total_flops(kernels: Iterable[Kernel]) -> int:
    """What all kernels compute."""
    return sum(kernel.flops for kernel in kernels)


def floor_seconds(kernels: Iterable[Kernel], flops_per_s: float, bytes_per_s: float) -> float:
    """The time that no implementation of these kernels can beat on a device with those rates."""
    return sum(kernel.seconds(flops_per_s, bytes_per_s) for kernel in kernels)
