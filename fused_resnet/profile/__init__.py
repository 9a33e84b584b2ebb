"""Profiling: one training step of any model, by layer, forward and backward, against the roofline.

`record` runs the step and takes its times, `analysis` makes a `Profile` of them, `report` and `picture` show it.
"""
