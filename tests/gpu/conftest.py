"""Tests of the kernels on a GPU, by `make gpu-check`; elsewhere none of them is collected."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
