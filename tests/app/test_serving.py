"""How the page is served: nothing of it from elsewhere, and what the command line refuses."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

from typer.testing import CliRunner

from magnet_fast.app.serving import Offline
from magnet_fast.cli import app

PAGE = b"""<html><head><link rel="preconnect" href="https://fonts.example" />
<link rel="stylesheet" href="./own.css"><script src="https://cdn.example/a.js" async
></script><script src="./own.js"></script></head><body>\xc3\xa9</body></html>"""


def served(content_type: bytes, *parts: bytes) -> tuple[dict[bytes, bytes], bytes]:
    """Headers and body of an answer that comes in parts, behind `Offline`."""
    sent: list[dict] = []

    async def inner(scope, receive, send) -> None:
        length = str(sum(map(len, parts))).encode()
        headers = [(b"content-type", content_type), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, part in enumerate(parts, 1):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(Offline(inner)({"type": "http"}, None, send))
    return dict(sent[0]["headers"]), b"".join(message["body"] for message in sent[1:])


def test_a_page_names_no_other_server() -> None:
    headers, body = served(b"text/html; charset=utf-8", PAGE[:90], PAGE[90:])
    assert b"https://" not in body and b"./own.css" in body and b"./own.js" in body and b"\xc3\xa9</body>" in body
    assert int(headers[b"content-length"]) == len(body)
    assert b"default-src 'self'" in headers[b"content-security-policy"]


def test_other_answers_pass_as_they_are() -> None:
    headers, body = served(b"text/event-stream", b'{"a": "<script src="https://x"></script>"}', b"2")
    assert body == b'{"a": "<script src="https://x"></script>"}2' and int(headers[b"content-length"]) == len(body)


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["app", *map(str, arguments)])
    assert result.exit_code == 2 and result.output.startswith("error: "), (result.output, result.exception)
    return result.output


def test_refused_before_anything_is_served(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("magnet_fast.app.serving.serve", lambda *_, **__: 1 / 0)
    (tmp_path / "page.pth").write_text("<!doctype html>")
    assert "none.pth does not exist" in refused("--checkpoint", tmp_path / "none.pth")
    assert "is a web page" in refused("--checkpoint", tmp_path / "page.pth")
    assert "device: expected 'auto'" in refused("--device", "abacus")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert refused() == "error: gradio: the package is not installed: pip install 'magnet_fast[app]'\n"
