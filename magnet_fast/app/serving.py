"""Serving the page: to this machine alone unless asked, telling nobody, and fetching nothing from elsewhere."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from magnet_fast.app.segmenters import Segmenters

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MOST_WAITING = 32  # requests; who comes later is told that the page is busy
_LARGEST = "200mb"  # file to upload
_MOST_VISITORS = 32  # whose answers are kept for the threshold
_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:"
)


def serve(
    segmenters: Segmenters,
    devices: list[str],
    device: str,
    *,
    host: str,
    port: int | None,
    share: bool,
    ready: Callable[[str], None],
) -> None:
    """Serve the page until it is interrupted or terminated. What was uploaded and made is then removed.

    Args:
        segmenters, devices, device: as for `page.build`.
        host: address to listen at.
        port: None takes the first free one from 7860 on.
        share: have Gradio open a public address that leads here.
        ready: called with the page's address as soon as it answers.

    Raises:
        OSError: the port is taken, the address is not this machine's, or there is no public one to be had.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="magnet_fast-") as folder:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = folder
        import gradio as gr  # after its settings
        from starlette.middleware import Middleware

        from magnet_fast.app.page import STYLE, build

        system = ["ui-sans-serif", "system-ui", "sans-serif"]
        page = build(segmenters, devices, device, Path(folder))
        page.queue(max_size=_MOST_WAITING)
        try:
            _, address, public = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                theme=gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"]),
                css=STYLE,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=_LARGEST,
                state_session_capacity=_MOST_VISITORS,
                app_kwargs={"middleware": [Middleware(OwnOnly)]},
            )
        except OSError as error:
            where = f"{host}, port {port or '7860-7959'}"
            raise OSError(f"{where}: nothing can be served there; give another --host or --port") from error
        if share and not public:
            page.close(verbose=False)
            raise OSError("--share: Gradio's servers gave no public address; leave it out, or look at the network")
        ready(public or address)
        page.block_thread()


class OwnOnly:
    """ASGI middleware: forbids a browser to fetch anything for the page from another server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY)]
            await send(message)

        await self.app(scope, receive, answer)
