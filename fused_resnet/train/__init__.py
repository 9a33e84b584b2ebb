"""Training on one device, or one a process: recipes, mixed precision, checkpoints that resume exactly, metrics and curves."""

from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .config import CHANGEABLE, OPTIMIZERS, PRECISIONS, SCHEDULES, SettingError, TrainConfig
from .curves import draw_curves
from .evaluation import Scores, evaluate
from .folder import BEST, CHECKPOINT, CURVES, METRICS, SUMMARY, FolderError, epochs, resumable, run
from .precision import AUTOCAST, autocast
from .processes import launched, processes
from .recipe import RecipeError, load_recipe, recipes
from .stop import Stopped, stoppable
from .summary import summarised, summary_text
from .trainer import Trainer, TrainingDiverged

__all__ = [
    "AUTOCAST",
    "BEST",
    "CHANGEABLE",
    "CHECKPOINT",
    "CURVES",
    "METRICS",
    "OPTIMIZERS",
    "PRECISIONS",
    "SCHEDULES",
    "SUMMARY",
    "CheckpointError",
    "FolderError",
    "RecipeError",
    "Scores",
    "SettingError",
    "Stopped",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "autocast",
    "draw_curves",
    "epochs",
    "evaluate",
    "launched",
    "load_checkpoint",
    "load_recipe",
    "processes",
    "recipes",
    "resumable",
    "run",
    "save_checkpoint",
    "stoppable",
    "summarised",
    "summary_text",
]
