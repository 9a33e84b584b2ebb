"""`python -m fused_resnet`: the same as the command `fused-resnet`."""

import sys

from .cli import main

sys.exit(main())
