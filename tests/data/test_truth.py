"""Ground truth drawn at the model's square from scaled polygons, as ReLA's protocol has it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from magnet_fast.cli import app
from magnet_fast.data import ExpressionDataset, Refer, Tokenizer
from magnet_fast.data.segmentation import draw_segmentation
from magnet_fast.data.transforms.pictures import resize_nearest
from magnet_fast.evaluation.protocol import choose_truth
from magnet_fast.models.contract import InputSpec

from .layout import small_instances, small_ref, write_root

SLOPE = [[1.5, 2.0, 27.5, 3.0, 14.0, 18.5]]  # borders off the pixel grid


def opened(tmp_path: Path, segmentation: object, **options: object) -> ExpressionDataset:
    instances = small_instances()
    instances["annotations"][0]["segmentation"] = segmentation
    refs = [small_ref(1, [70, 71], 7, "both"), small_ref(2, [-1], 8, "nothing")]
    root = write_root(tmp_path, instances=instances, refs=refs, name="grefs(unc).json", dataset="grefcoco")
    return ExpressionDataset(Refer(root, "grefcoco"), "train", Tokenizer(), 16, **options)


@pytest.mark.parametrize("cache", [False, True])
def test_polygons_are_scaled_and_drawn(tmp_path: Path, cache: bool) -> None:
    drawn = opened(tmp_path / "a", SLOPE, truth="polygons", cache=cache, original=True)
    resized = opened(tmp_path / "b", SLOPE)
    scale = [16 / 30, 16 / 20] * 3
    both = [[value * factor for value, factor in zip(SLOPE[0], scale, strict=True)]]
    both += [[20 * 16 / 30, 8, 25 * 16 / 30, 8, 25 * 16 / 30, 12, 20 * 16 / 30, 12]]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(both, 16, 16)))
    for _ in range(2):  # the second time from the cache
        assert np.array_equal(drawn[0]["mask"].numpy(), expected)
        assert not drawn[1]["mask"].any()  # a sentence that names nothing
    assert not np.array_equal(resized[0]["mask"].numpy(), expected)
    assert np.array_equal(drawn[0]["original_mask"].numpy(), resized.original_mask(0))


def test_runs_are_resized(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), dtype=np.uint8, order="F")
    mask[3:9, 5:17] = 1
    packed = coco_mask.encode(mask)
    found = draw_segmentation({"size": [20, 30], "counts": packed["counts"].decode()}, 20, 30, (7, 9))
    assert np.array_equal(found, resize_nearest(mask, (7, 9)))


def test_bad_segmentations_are_refused_before_they_are_drawn(tmp_path: Path) -> None:
    broken = opened(tmp_path, [[0.0, 0.0, 1e12, 5.0, 4.0, 4.0]], truth="polygons")
    with pytest.raises(ValueError, match="annotation 70 cannot be decoded: polygon reaches"):
        broken[0]


def test_only_for_squashed_images_with_polygons(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="truth is 'drawn'; expected one of resized, polygons"):
        opened(tmp_path / "a", SLOPE, truth="drawn")
    reader = opened(tmp_path / "b", SLOPE).reader
    with pytest.raises(ValueError, match="which is for squashed images; the model's are fitted by 'letterbox'"):
        ExpressionDataset(reader, "train", Tokenizer(), InputSpec(size=16, fit="letterbox"), truth="polygons")

    class WithoutPolygons:
        source = tmp_path / "data.json"

    with pytest.raises(ValueError, match="data.json is of a format without them; expected 'resized'"):
        ExpressionDataset(WithoutPolygons(), "train", Tokenizer(), 16, truth="polygons")
    assert choose_truth(None, "gres", reader, "squash") == "polygons"
    assert choose_truth(None, "gres", WithoutPolygons(), "squash") == "resized"
    assert choose_truth(None, "gres", reader, "letterbox") == "resized"
    assert choose_truth(None, "family", reader, "squash") == "resized"
    assert choose_truth("polygons", "family", reader, "squash") == "polygons"


@pytest.mark.parametrize("given", [None, "resized"])
def test_the_protocol_chooses(tmp_path: Path, given: str | None) -> None:
    opened(tmp_path, SLOPE)
    command = f"evaluate --data {tmp_path} --dataset grefcoco --split train --task generalized --protocol gres"
    command += f" --image-size 32 --out {tmp_path}/scores.json" + (f" --truth {given}" if given else "")
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "scores.json").read_text())["truth"] == (given or "polygons")
    assert ("resized to it" if given else "drawn there from polygons") in " ".join(done.output.split())
