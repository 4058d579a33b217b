"""The page itself: what stands where, and what happens when something is pressed."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from magnet_fast.app.answer import MOST_SENTENCES, Answer, ask
from magnet_fast.app.examples import drawn_scenes
from magnet_fast.app.files import write_files
from magnet_fast.app.segmenters import Segmenters
from magnet_fast.app.showing import drawn, legend

_KEPT = 3600  # seconds: answers, for the threshold, and files
STYLE = """
.legend ol { list-style-position: inside; padding: 0; }
.legend .swatch { display: inline-block; width: 1em; height: 1em; margin-right: 0.5em; vertical-align: -0.1em; }
"""


def build(segmenters: Segmenters, devices: list[str], device: str, folder: Path) -> gr.Blocks:
    """The page.

    Args:
        segmenters: what it offers.
        devices: names of those that a model may run on.
        device: the one that is chosen at first.
        folder: where files to download are written: in Gradio's own, GRADIO_TEMP_DIR, it removes them after an hour.
    """

    @said_on_the_page
    def choose(model: str, device: str) -> dict[str, Any]:
        """Load a checkpoint; the threshold becomes its own."""
        return gr.update(value=segmenters(model, device).spec.threshold)

    @said_on_the_page
    def segment(picture: str | None, text: str, model: str, device: str) -> Answer:
        return ask(segmenters(model, device), model, picture, text)

    @said_on_the_page
    def show(answer: Answer | None, threshold: float) -> tuple:
        """An answer at a threshold; nothing of it is computed by the model."""
        if answer is None:
            return None, "", None
        masks = answer.masks(threshold)
        files = write_files(answer, masks, threshold, Path(tempfile.mkdtemp(dir=folder)))
        return drawn(answer, masks), legend(answer, masks, threshold), [str(file) for file in files]

    first = segmenters.names[0]
    # One forward pass at a time, whoever asks; loading counts as one.
    alone = {"concurrency_id": "model", "concurrency_limit": 1}
    with gr.Blocks(title="magnet_fast", analytics_enabled=False, delete_cache=(600, _KEPT)) as page:
        answer = gr.State(None, time_to_live=_KEPT)
        gr.Markdown("# magnet_fast\nA picture and sentences in, masks of what the sentences name out.")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard", "webcam"],
                    label="Picture",
                    elem_id="picture",
                )
                # Gradio's own opens the file, and says little of one that is no picture. (A subclass would have Gradio
                # write a stub of it beside this file.)
                picture.preprocess = lambda uploaded: uploaded and uploaded.path
                text = gr.Textbox(
                    label="Sentences, one a line",
                    info=f"What to look for: at most {MOST_SENTENCES}.",
                    lines=3,
                    elem_id="sentences",
                )
                button = gr.Button("Segment", variant="primary", elem_id="segment")
                with gr.Row():
                    model = gr.Dropdown(segmenters.names, value=first, label="Checkpoint", elem_id="checkpoint")
                    where = gr.Dropdown(devices, value=device, label="Device", elem_id="device")
            with gr.Column():
                overlay = gr.Image(
                    label="Masks", format="png", interactive=False, buttons=["fullscreen"], elem_id="overlay"
                )
                meaning = gr.HTML(elem_id="legend", elem_classes="legend")
                threshold = gr.Slider(
                    0,
                    1,
                    value=segmenters(first, device).spec.threshold,
                    step=0.01,
                    label="Threshold",
                    info="A pixel belongs to what is named where its probability is higher.",
                    elem_id="threshold",
                )
                files = gr.Files(label="Downloads: PNG, COCO's RLE, JSON", interactive=False, elem_id="files")
        gr.Examples(_scenes(folder), [picture, text], label="Drawn scenes", elem_id="scenes")
        asked = [picture, text, model, where]
        shown = [answer, threshold], [overlay, meaning, files]
        answered = gr.on([button.click, text.submit], segment, asked, answer, show_progress_on=overlay, **alone)
        answered.success(show, *shown, show_progress="hidden")
        threshold.change(show, *shown, show_progress="hidden", trigger_mode="always_last")
        gr.on([model.change, where.change], choose, [model, where], threshold, **alone)
    return page


def _scenes(folder: Path) -> list[list[str]]:
    """Drawn scenes as files, which lose nothing, and their sentences."""
    scenes = []
    for number, (picture, text) in enumerate(drawn_scenes(), 1):
        picture.save(folder / f"scene-{number}.png")
        scenes.append([str(folder / f"scene-{number}.png"), text])
    return scenes


def said_on_the_page(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a user can mend becomes a message that stays until it is closed; all else is an error of the program."""

    @wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error

    return wrapped
