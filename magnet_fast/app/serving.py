"""Serving the page: to this machine alone unless asked, telling nobody, and fetching nothing from elsewhere."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from magnet_fast.app.segmenters import Segmenters

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MOST_WAITING = 32  # requests; who comes later is told that the page is busy
_MOST_VISITORS = 32  # whose answers are kept for the threshold
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:"
)
_ELSEWHERE = re.compile(rb'<link[^>]*href="https?://[^>]*>|<script[^>]*src="https?://[^>]*>\s*</script>')


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
        OSError: the port is taken, or the address is not this machine's.
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
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"]),
            css=STYLE,
            footer_links=[],
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            state_session_capacity=_MOST_VISITORS,
            app_kwargs={"middleware": [Middleware(Offline)]},
        )
        ready(public or address)
        page.block_thread()


class Offline:
    """Answers without what a browser would fetch from elsewhere, which it is also told not to.

    Gradio's page names a script and fonts of other servers, for uses that this page has not: to stand in another
    page's frame, and themes with web fonts.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import MutableHeaders

        page: Message | None = None
        content = b""

        async def answer(message: Message) -> None:
            nonlocal page, content
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                if headers.get("content-type", "").startswith("text/html"):
                    page = message  # its length is not yet known
                    return
            elif page is not None:
                content += message.get("body", b"")
                if message.get("more_body"):
                    return
                content = _ELSEWHERE.sub(b"", content)
                MutableHeaders(scope=page)["content-length"] = str(len(content))
                await send(page)
                message = {"type": "http.response.body", "body": content}
            await send(message)

        await self.app(scope, receive, answer if scope["type"] == "http" else send)
