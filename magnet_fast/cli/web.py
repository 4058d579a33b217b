"""`magnet-fast app`: the web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magnet_fast.cli.common import DeviceOption, TokenizerOption
from magnet_fast.cli.errors import user_errors


@user_errors
def web_page(
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint",
            help="Offered beside the shipped ones: a run's .safetensors, a released .pth, hub:owner/name; repeat it.",
        ),
    ] = None,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = "auto",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="The first free one from 7860 on if left out.", min=1, max=65535)
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="A public address through Gradio's servers.")] = False,
) -> None:
    """Open a web page: a picture and sentences in, masks out. Needs the extra `app`."""
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise ValueError("gradio: the package is not installed: pip install 'magnet_fast[app]'")

    import torch

    from magnet_fast.app.segmenters import Segmenters
    from magnet_fast.app.serving import serve
    from magnet_fast.training.distributed import pick_device

    chosen = str(pick_device(device))
    segmenters = Segmenters(checkpoint or (), tokenizer)
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    serve(
        segmenters,
        devices,
        chosen,
        host=host,
        port=port,
        share=share,
        ready=lambda address: typer.echo(f"{address} (Ctrl+C ends it)"),
    )
