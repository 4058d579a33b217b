"""Training: configurations, the trainer, distribution, checkpoints."""

from magnet_fast.training.config import TrainConfig, load_config
from magnet_fast.training.run import train
from magnet_fast.training.trainer import Trainer, TrainingError

__all__ = ["TrainConfig", "Trainer", "TrainingError", "load_config", "train"]
