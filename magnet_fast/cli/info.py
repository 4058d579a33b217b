"""`magnet-fast info`."""

from __future__ import annotations

import typer

from magnet_fast.cli.errors import user_errors


@user_errors
def info() -> None:
    """Say what is installed, and which backends the operators can run on here."""
    import platform

    import torch

    import magnet_fast
    from magnet_fast import models, ops
    from magnet_fast.training.config import shipped_configs

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines = {
        "magnet_fast": magnet_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "GPUs": ", ".join(devices) or "none",
        "models": ", ".join(models.list_models()),
        "configurations": ", ".join(shipped_configs()),
    }
    for name, value in lines.items():
        typer.echo(f"{name:15} {value}")
    for operator in (
        "window_attention",
        "relative_attention",
        "cross_modal_attention",
        "deformable_attention",
        "fused_deformable_attention",
        "pixel_contrastive_loss",
    ):
        typer.echo(f"{operator}: {', '.join(ops.available_backends(operator))}")
