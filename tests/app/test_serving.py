"""How the page is served, and what the command line refuses."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

from typer.testing import CliRunner

from magnet_fast.app.serving import OwnOnly
from magnet_fast.cli import app


def test_a_browser_is_told_to_fetch_nothing_from_elsewhere() -> None:
    sent: list[dict] = []

    async def inner(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(OwnOnly(inner)({"type": "http"}, None, send))
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"] == b"text/html" and sent[1]["body"] == b"page"
    policy = headers[b"content-security-policy"]
    assert policy.startswith(b"default-src 'self';") and b"http" not in policy and b"*" not in policy


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
