"""Training on one device, or one a process: SGD, mixed precision, checkpoints that resume exactly, metrics and curves."""

from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .config import CHANGEABLE, PRECISIONS, SettingError, TrainConfig
from .curves import draw_curves
from .processes import launched, processes
from .trainer import (
    AUTOCAST,
    CHECKPOINT,
    CURVES,
    METRICS,
    FolderError,
    Trainer,
    TrainingDiverged,
    autocast,
    epochs,
    resumable,
    run,
)

__all__ = [
    "AUTOCAST",
    "CHANGEABLE",
    "CHECKPOINT",
    "CURVES",
    "METRICS",
    "PRECISIONS",
    "CheckpointError",
    "FolderError",
    "SettingError",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "autocast",
    "draw_curves",
    "epochs",
    "launched",
    "load_checkpoint",
    "processes",
    "resumable",
    "run",
    "save_checkpoint",
]
