"""Without a GPU the kernels run in Triton's interpreter, which has to be asked for before they are imported, and in one thread.

On a machine with other work, threads that wait for each other take many times as long.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
