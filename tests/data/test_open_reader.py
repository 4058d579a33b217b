"""The registry of formats: told from the files, or named."""

from __future__ import annotations

import pytest

from magnet_fast.data.datasets import FORMATS, open_reader

from . import layout, test_complex_queries, test_phrasecut, test_regions

WRITERS = {
    "refer": (layout.write_root, "refcoco"),
    "phrasecut": (
        lambda root: test_phrasecut.write(root, test_phrasecut.small_tasks()),
        "VGPhraseCut_v0",
    ),
    "complex_queries": (test_complex_queries.write, "ris_cq"),
    "regions": (test_regions.write, "talk2car"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_tells_the_format(tmp_path, name):
    assert set(WRITERS) == set(FORMATS)
    write, dataset = WRITERS[name]
    write(tmp_path)
    for reader in (open_reader(tmp_path, dataset), open_reader(str(tmp_path), dataset, format=name)):
        ref = reader.refs(reader.splits[0])[0]
        mask = reader.mask(ref)
        assert mask.shape == reader.image_size(ref.image_id) and mask.any()
        assert reader.image_path(ref.image_id).is_file()
    assert [other for other, one in FORMATS.items() if one.told(tmp_path / dataset)] == [name]


def test_split_by_reaches_refers_layout(tmp_path):
    layout.write_root(tmp_path, name="refs(umd).p", dataset="refcocog")
    assert open_reader(tmp_path, "refcocog", "umd").splits == ("train", "val")
    with pytest.raises(FileNotFoundError, match=r"refs\(unc\)\.p"):
        open_reader(tmp_path, "refcocog")


@pytest.mark.parametrize("name", ["phrasecut", "complex_queries", "regions"])
def test_images_reach_the_reader(tmp_path, name):
    write, dataset = WRITERS[name]
    write(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_reader(tmp_path / "data", dataset, images=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="data/elsewhere"):  # below the root, wherever one stands
        open_reader(tmp_path / "data", dataset, images="elsewhere")


def test_unknown_formats(tmp_path):
    with pytest.raises(FileNotFoundError, match="refcoco does not exist; expected the folder of a data set"):
        open_reader(tmp_path, "refcoco")
    (tmp_path / "refcoco").mkdir()
    with pytest.raises(ValueError, match=r"cannot be told; it has none of: instances.json and refs.* \(regions\)"):
        open_reader(tmp_path, "refcoco")
    with pytest.raises(ValueError, match="format is 'coco'; expected one of refer, phrasecut, complex"):
        open_reader(tmp_path, "refcoco", format="coco")
    with pytest.raises(FileNotFoundError, match="image_data_split.json"):
        open_reader(tmp_path, "refcoco", format="phrasecut")


def test_a_root_without_the_data_set_says_what_there_is(tmp_path):
    make = r"; `data import` makes one of your own pictures, `data scenes` one of drawn scenes$"
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"refcoco does not exist; expected the folder of a data set{make}"):
            open_reader(root, "refcoco")
    root = layout.write_root(tmp_path / "data", dataset="own")
    with pytest.raises(FileNotFoundError, match=r"data holds own: name one by --dataset \(in training: --set data"):
        open_reader(root, "refcoco")
    with pytest.raises(FileNotFoundError, match=rf"own is one itself: give {root} as the data, and name own by"):
        open_reader(root / "own", "refcoco")
    (root / "refcoco").mkdir()
    with pytest.raises(ValueError, match="cannot be told; .*data holds own: name one by"):
        open_reader(root, "refcoco")
    for number in range(6):
        (root / f"set{number}").mkdir()
        (root / f"set{number}" / "instances.json").write_text("{}")
    with pytest.raises(ValueError, match="data holds own, set0, set1, set2, set3 and more: name"):
        open_reader(root, "refcoco")
