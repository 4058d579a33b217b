"""Nodes of a scene and their relations, as DuMoGa chooses among: segments, features of boxes, edges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from magnet_fast.data.datasets.base import each_record, find_file, read_json
from magnet_fast.data.datasets.panoptic import read_segments, require_segment
from magnet_fast.data.values import require, require_inside, shown

PREDICTED = ("for_pan_seg.json", "for_pan_seg_val.json")  # segments that a scene graph model found
TRUE = "psg.json"  # OpenPSG's scene graphs
NODE_FILES = (*PREDICTED, TRUE)
PLACES = ("panseg", "panseg_val")  # folders of predicted PNGs, beside COCO's
FEATURES = "imgSG"  # folder of <image>.json, maybe in folders within
NODES = 10  # that are kept of an image, the first ones
GRID = 120  # cells a side of a proposal


class _Scene(NamedTuple):
    panoptic: str
    segments: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]


class SceneNodes:
    """Nodes of every image, checked as they are opened; their pictures and features are read when they are asked for.

    `for_pan_seg.json` and `for_pan_seg_val.json` are lists of {file_name, pan_seg_file_name, segments_info: [{id}]}
    with the segments that a model found, and `imgSG/<split>/<image>.jpg.json` holds {roifeatures: a list of numbers for
    each} in the same order. Where they are absent, `psg.json` gives OpenPSG's {data: [the same, with relations:
    [[subject, object, predicate]] by place in segments_info]}: true segments, so that the choice alone is learned and
    scored. Images without features, where there are any, have no nodes.
    """

    @classmethod
    def find(
        cls,
        folder: Path,
        panoptic_folders: Sequence[Path],
        one_record: Callable[[], AbstractContextManager] = nullcontext,
    ) -> SceneNodes | None:
        """The nodes that a data set's folder holds; None without any of `NODE_FILES`.

        Each record is read within a context `one_record`, which may keep its ValueError from stopping the rest.
        """
        predicted = [folder / name for name in PREDICTED if (folder / name).is_file()]
        if predicted:
            return cls(folder, predicted, panoptic_folders, one_record)
        return cls(folder, [folder / TRUE], panoptic_folders, one_record) if (folder / TRUE).is_file() else None

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        panoptic_folders: Sequence[Path],
        one_record: Callable[[], AbstractContextManager],
    ) -> None:
        self._panoptic_folders = [*(folder / place for place in PLACES), *panoptic_folders]
        self._scenes: dict[str, _Scene] = {}
        with_edges: set[bool] = set()
        for path in files:
            for number, record in enumerate(_records(path)):
                with one_record():
                    where = f"{path}: record {number}"
                    require(record, {"file_name": str, "pan_seg_file_name": str, "segments_info": list}, where)
                    scene = _parse(record, where)
                    if self._scenes.setdefault(record["file_name"], scene) != scene:
                        raise ValueError(f"{where} is a second scene of {shown(record['file_name'])}, another one")
                    with_edges.add("relations" in record)
        self._with_edges = with_edges == {True}  # a batch needs them of every sample
        self._features: dict[str, Path] = {}
        if files[0].name != TRUE:  # features belong to predicted boxes
            self._features = {path.name.removesuffix(".json"): path for path in folder.glob(f"{FEATURES}/**/*.json")}
        self._width: int | None = None
        if self._features:
            self._scenes = {name: one for name, one in self._scenes.items() if Path(name).name in self._features}
            self._width = next((len(rows[0]) for rows in map(_read_features, self._features.values()) if rows), None)

    def __contains__(self, image: str) -> bool:
        """Whether an image, by the name that records give it, has nodes."""
        return image in self._scenes

    def tensors(self, image: str) -> dict[str, Tensor]:
        """What is known of an image's first `NODES` nodes; missing ones are zeros.

        proposals: float32 (NODES, GRID, GRID), the share of each cell of the squashed image that a node covers.
        edges: bool (NODES, NODES), whether two nodes are related in either direction; where every scene has relations.
        node_features: float32 (NODES, F), where the folder holds them.

        Raises FileNotFoundError for an absent PNG, ValueError for a broken file.
        """
        scene = self._scenes[image]
        segments = read_segments(find_file(scene.panoptic, self._panoptic_folders, "panoptic PNG"))
        proposals = np.zeros((NODES, GRID, GRID), dtype=np.float32)
        for place, segment in enumerate(scene.segments[:NODES]):
            covered = Image.fromarray((segments == segment).astype(np.float32))
            proposals[place] = np.asarray(covered.resize((GRID, GRID), Image.Resampling.BOX))
        found = {"proposals": torch.from_numpy(proposals)}
        if self._with_edges:
            edges = torch.zeros(NODES, NODES, dtype=torch.bool, device="cpu")
            for one, other in scene.edges:
                if one != other and max(one, other) < NODES:
                    edges[one, other] = edges[other, one] = True
            found["edges"] = edges
        if self._width is not None:
            found["node_features"] = self._node_features(self._features[Path(image).name])
        return found

    def _node_features(self, path: Path) -> Tensor:
        features = torch.zeros(NODES, self._width, device="cpu")
        rows = _read_features(path)[:NODES]
        if rows:
            if len(rows[0]) != self._width:
                raise ValueError(
                    f"{path}: roifeatures have {len(rows[0])} numbers; those of other images {self._width}"
                )
            features[: len(rows)] = torch.tensor(rows, dtype=torch.float32, device="cpu")
        return features


def _records(path: Path) -> Iterable[dict[str, Any]]:
    if path.name != TRUE:
        return each_record(path)
    content = read_json(path)
    records = content.get("data") if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected OpenPSG's dict, whose 'data' is a list of scenes")
    return records


def _parse(record: dict[str, Any], where: str) -> _Scene:
    segments = []
    for segment in record["segments_info"]:
        if not isinstance(segment, dict):
            raise ValueError(f"{where}: segments_info holds {shown(segment)}; expected dicts with an id")
        segments.append(require_segment(segment.get("id"), f"{where}: segments_info"))
    relations = record.get("relations", [])
    edges = []
    for relation in relations if isinstance(relations, list) else [relations]:
        ends = relation[:2] if isinstance(relation, list) else ()
        if len(ends) != 2 or not all(type(end) is int and 0 <= end < len(segments) for end in ends):
            raise ValueError(
                f"{where} has relation {shown(relation)}; expected [subject, object, predicate], "
                f"places of its {len(segments)} segments"
            )
        edges.append((ends[0], ends[1]))
    return _Scene(require_inside(record["pan_seg_file_name"], where), tuple(segments), tuple(edges))


def _read_features(path: Path) -> list[list[float]]:
    content = read_json(path)
    rows = content.get("roifeatures") if isinstance(content, dict) else None
    try:
        table = np.asarray(rows if rows else np.zeros((0, 0)), dtype=np.float64)
    except (TypeError, ValueError):
        table = np.zeros(0)
    if not isinstance(rows, list) or table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError(f"{path}: expected a dict whose roifeatures are a list of equally many finite numbers a node")
    return table.tolist()
