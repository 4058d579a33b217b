"""How the page is served, and what the command line refuses."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gradio
import httpx
import pytest
from typer.testing import CliRunner

from magnet_fast.app.page import build, said_on_the_page
from magnet_fast.app.serving import OwnOnly, serve
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


def test_a_message_is_text_and_stays() -> None:
    """Gradio shows a message as HTML, and a picture's name or a sentence may be markup."""

    def refuse(name: str) -> None:
        raise ValueError(f"image {name} is empty")

    with pytest.raises(gradio.Error) as said:
        said_on_the_page(refuse)("<img onerror=1>.png")
    assert said.value.message == "image &lt;img onerror=1&gt;.png is empty" and said.value.duration is None


class Idle:
    """Models that are never asked."""

    names = ("idle",)

    def __call__(self, name: str, device: str) -> SimpleNamespace:
        return SimpleNamespace(spec=SimpleNamespace(threshold=0.5))


def test_one_forward_pass_at_a_time(tmp_path) -> None:
    """What calls a model waits in one line; moving the threshold does not wait for it."""
    page = build(Idle(), ["cpu"], "cpu", tmp_path)
    lines = {
        event.fn.__name__: (event.concurrency_id, event.concurrency_limit) for event in page.fns.values() if event.fn
    }
    assert lines["segment"] == lines["choose"] == ("model", 1)
    assert lines["show"][0] != "model"


def test_a_port_that_is_taken(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # is put back
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1, port {port}: nothing can be served there"):
            serve(Idle(), ["cpu"], "cpu", host="127.0.0.1", port=port, share=False, ready=pytest.fail)


def test_what_is_uploaded_is_bounded(tmp_path, monkeypatch) -> None:
    given: dict = {}
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")

    def launch(page: gradio.Blocks, **named: object) -> None:
        given.update(named)
        raise KeyboardInterrupt

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    with pytest.raises(KeyboardInterrupt):
        serve(Idle(), ["cpu"], "cpu", host="127.0.0.1", port=None, share=False, ready=pytest.fail)
    assert given["max_file_size"] == "200mb" and given["state_session_capacity"] == 32


@pytest.fixture
def tunnel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., str]], None]:
    """Puts a function in place of Gradio's tunnel to its servers."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # is put back
    return lambda stand_in: monkeypatch.setattr("gradio.networking.setup_tunnel", stand_in)


def test_no_public_address_is_said_and_nothing_is_served(tunnel) -> None:
    ports = []

    def no_network(*_: object, local_port: int, **__: object) -> str:
        ports.append(local_port)
        raise httpx.ConnectError("Name or service not known")

    tunnel(no_network)
    with pytest.raises(OSError, match="--share: Gradio's servers gave no public address; leave it out, or look at the"):
        serve(Idle(), ["cpu"], "cpu", host="127.0.0.1", port=None, share=True, ready=pytest.fail)
    with socket.socket() as again:
        assert again.connect_ex(("127.0.0.1", ports[0])) != 0


def test_the_public_address_is_told(tunnel) -> None:
    class Told(Exception):
        pass

    def ready(address: str) -> None:
        raise Told(address)

    tunnel(lambda *_, **__: "http://0a1b.gradio.live")
    with pytest.raises(Told, match="https://0a1b.gradio.live"):
        serve(Idle(), ["cpu"], "cpu", host="127.0.0.1", port=None, share=True, ready=ready)


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["app", *map(str, arguments)])
    assert result.exit_code == 2 and result.output.startswith("error: "), (result.output, result.exception)
    return result.output


def test_refused_before_anything_is_served(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("magnet_fast.app.serving.serve", lambda *_, **__: 1 / 0)
    (tmp_path / "page.pth").write_text("<!doctype html>")
    assert "none.pth' does not exist" in refused("--checkpoint", tmp_path / "none.pth")
    assert "is a web page" in refused("--checkpoint", tmp_path / "page.pth")
    assert "device: expected 'auto'" in refused("--device", "abacus")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert refused() == "error: gradio: the package is not installed: pip install 'magnet_fast[app]'\n"
