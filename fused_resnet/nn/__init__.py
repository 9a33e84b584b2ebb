"""Modules: residual blocks whose activations stay pending, and what they are made of."""

from .activation import Activation
from .block import Block
from .chain import Stage
from .network import ResidualNetwork
from .preact import PreActivation

__all__ = ["Activation", "Block", "PreActivation", "ResidualNetwork", "Stage"]
