"""Training: configurations, the trainer, distribution, checkpoints."""

from magnet_fast.training.config import TrainConfig, load_config
from magnet_fast.training.failure import TrainingError
from magnet_fast.training.run import train
from magnet_fast.training.stopping import TrainingStopped
from magnet_fast.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer", "TrainingError", "TrainingStopped", "load_config", "train"]
