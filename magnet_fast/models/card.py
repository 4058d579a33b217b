"""The README.md of a published model: what it is, how it is used, what it scores."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from magnet_fast.models.config import ROLES, ModelConfig

if TYPE_CHECKING:
    from magnet_fast.models.base import ReferringModel

_CONDITIONS = ("split_by", "task", "protocol", "resolution", "expressions")
_ASK = """\
mask, probability, presence = segmenter("picture.jpg", "the red circle on the left")
```

```sh
magnet-fast segment picture.jpg "the red circle on the left" --checkpoint hub:{name}
```"""
_ASK_WITH_CONTEXT = """\
prepared = segmenter.prepare("picture.jpg", context={{…}})  # tensors: {needs}
mask, probability, presence = segmenter(prepared, "the red circle on the left")
```"""
_USE = """\
```python
from magnet_fast import Segmenter

segmenter = Segmenter.from_pretrained("{name}")
{ask}

No remote code: in this repository are settings (`config.json`), tensors (`model.safetensors`){tokenizer} and this page.
Nothing in it is executed or unpickled; the code is the package's own."""


def model_card(
    model: ReferringModel,
    name: str,
    *,
    tokenizer: bool,
    scores: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
) -> str:
    """The text of a model's README.md, with the header that the hub reads.

    Args:
        name: of the repository.
        tokenizer: whether a tokenizer.json is beside it.
        scores: as `magnet-fast evaluate --out` writes them, one for each data set and split. Paths in them stay out.
        license: as the hub names it ("apache-2.0").

    Raises:
        ValueError: scores without a data set, a split or a number.
    """
    from huggingface_hub import ModelCardData

    config, size = model.config, sum(parameter.numel() for parameter in model.parameters())
    header = ModelCardData(
        library_name="magnet_fast",
        pipeline_tag="image-segmentation",
        license=license,
        tags=["referring-image-segmentation", config.architecture],
    )
    parts = [
        (role, part.kind, ", ".join(_settings(part.model_dump(exclude={"kind"}))))
        for role in ROLES
        if (part := getattr(config, role)) is not None
    ]
    own = config.model_dump(include=type(config).model_fields.keys() - ModelConfig.model_fields.keys())
    if own:
        parts.append(("model", config.architecture, ", ".join(_settings(own))))
    ask = (_ASK_WITH_CONTEXT if model.required else _ASK).format(name=name, needs=", ".join(model.required))
    spec = [(key, value) for key, value in model.spec._asdict().items()]
    text = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        "Referring image segmentation: a picture and a sentence in, the mask of what the sentence names out. "
        f"System `{config.architecture}`, {size / 1e6:.1f} million parameters.",
        _USE.format(name=name, ask=ask, tokenizer=", the vocabulary (`tokenizer.json`)" if tokenizer else ""),
        "## Parts",
        _table(("part", "kind", "settings"), parts),
        "## How pictures and sentences are prepared",
        _table(("", ""), spec),
        *(["## Scores", "Percent."] if scores else []),
        *(block for one in scores for block in _scores(one)),
        "## Licence",
        license or "Not stated.",
    ]
    body = "\n\n".join(text) + "\n"
    return f"{body}\n{_mark(body)}\n"


def is_untouched(text: str) -> bool:
    """Whether a README.md is as `model_card` wrote it, so that nobody's words are lost where it is written anew."""
    body, _, last = text.rstrip("\n").rpartition("\n\n")
    return last == _mark(f"{body}\n")


def _mark(body: str) -> str:
    digest = hashlib.sha256(body.encode()).hexdigest()[:16]
    return f"<!-- written by magnet_fast ({digest}); once edited, it is kept -->"


def _settings(settings: Mapping[str, Any]) -> Iterable[str]:
    """Those of a part that fit into a line."""
    return (f"{key} {value}" for key, value in settings.items() if not isinstance(value, dict))


def _scores(results: Mapping[str, Any]) -> tuple[str, str]:
    """A heading and a table of one row."""
    numbers = {name: value for name, value in results.items() if isinstance(value, float)}
    places = [results.get(key) for key in ("dataset", "split")]
    if not numbers or not all(isinstance(place, str) for place in places):
        raise ValueError("scores: expected what `magnet-fast evaluate --out` writes, with dataset, split and numbers")
    conditions = ", ".join(_cell(results[key]) for key in _CONDITIONS if isinstance(results.get(key), str))
    cells = ["–" if math.isnan(value) else f"{value:.2f}" for value in numbers.values()]
    heading = f"**{_cell(' '.join(places))}** ({conditions})" if conditions else f"**{_cell(' '.join(places))}**"
    return heading, _table(("sentences", *numbers), [(results.get("sentences", ""), *cells)])


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
