"""Runs a network by ONNX Runtime, a peer in inference. Imports ONNX Runtime only when asked."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn


class OnnxRuntime:
    """A network in evaluation mode, exported for images of one shape, with as many threads as PyTorch has."""

    def __init__(self, module: nn.Module, images: Tensor, dtype: torch.dtype):
        """Raises RuntimeError where the packages are not installed, and for anything but float32 on a CPU."""
        if images.device.type != "cpu" or dtype != torch.float32:
            raise RuntimeError(f"ONNX Runtime is run in float32 on a CPU, not in {dtype} on {images.device.type!r}")
        try:
            import onnxruntime
            import onnxscript  # noqa: F401  (PyTorch exports by it)
        except ImportError as error:
            raise RuntimeError(f"{error.name} is not installed") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            with torch.no_grad():
                torch.onnx.export(module, (images,), path, dynamo=True, verbose=False)
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.name = self.session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor | list[Tensor]:
        """What the network returns: a tensor, or a list of them."""
        results = [torch.from_numpy(array) for array in self.session.run(None, {self.name: images.numpy()})]
        return results[0] if len(results) == 1 else results
