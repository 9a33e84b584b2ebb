"""cuDNN's runtime-fused graphs, through `nvidia-cudnn-frontend` (pip install 'fused_resnet[cudnn]'). See docs/backends.md.

- `library`: whether the package and the library are there, and a handle for each thread and device
- `graphs`: what there is a graph for, and one builder for each
- `plans`: plans are built once, kept in the process and in the user's cache; refusals are remembered with their reasons
- `work`: what a convolution's task asks of a graph, and how it is called
- `probe`: which graphs cuDNN accepts here, and whether they are right
"""

from .library import why_not
from .work import conv_affine_act, dgrad, fprop, wgrad, why_not_task

__all__ = ["conv_affine_act", "dgrad", "fprop", "wgrad", "why_not", "why_not_task"]
