"""The experiments of He et al. 2015 that made residual networks matter, run anew: `fused-resnet experiment`.

`degradation` trains plain and residual networks by a `plan`, looks into them by a `probe`, and goes on where it was; `findings` says
what the figures show. `vanishing` measures gradients of untrained networks by depth. `reports` writes pages of both.
"""
