"""Items of ExpressionDataset, its control and its errors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from magnet_fast.data import ExpressionDataset, MixedDataset, Refer, Tokenizer, prepare_image, prepare_mask
from magnet_fast.data import cache as cache_module
from magnet_fast.data import dataset as dataset_module
from magnet_fast.data.cache import ArrayCache
from magnet_fast.data.dataset import require_context
from magnet_fast.data.transforms import open_fit
from magnet_fast.models.contract import InputSpec

from .layout import small_ref, small_refs, write_root


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
def root(tmp_path):
    return write_root(tmp_path / "root")


def same(first: Any, second: Any) -> bool:
    """Equal, tensors inside dicts and tuples included."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return all(map(same, first, second)) if isinstance(first, tuple) else first == second


def test_items_of_mode_sentences(root, tokenizer):
    refer = Refer(root)
    dataset = ExpressionDataset(refer, "train", tokenizer, 16)
    assert [dataset.record(i)["expression"] for i in range(len(dataset))] == ["Left man", "man on left", "woman"]
    item = dataset[1]
    assert torch.equal(item["image"], prepare_image(refer.image_path(7), 16))
    assert torch.equal(item["mask"], prepare_mask(refer.mask(refer.refs("train")[0]), 16))
    assert item["mask"].dtype == torch.uint8 and item["mask"].any()
    ids, read = tokenizer("man on left")
    assert torch.equal(item["text"].ids, ids[0]) and torch.equal(item["text"].mask, read[0])
    facts = {key: item[key] for key in ("exists", "ref", "image_id", "kind", "category", "size", "extra")}
    assert facts == {
        "exists": True, "ref": 1, "image_id": 7, "kind": None, "category": 1, "size": (20, 30), "extra": {},
    }  # fmt: skip
    assert "original_mask" not in item and dataset.context == ()
    assert item["index"] == 1 and dataset[-2]["index"] == 1
    assert dataset.record(1) == {
        "ref_id": 1,
        "sent_id": 11,
        "image_id": 7,
        "expression": "man on left",
        "kind": None,
        "exists": True,
        "image_path": root / "images/mscoco/images/train2014/a.jpg",
        "height": 20,
        "width": 30,
    }
    assert np.array_equal(dataset.original_mask(2), refer.mask(refer.refs("train")[1]))
    assert dataset.load_image(0).size == (30, 20) and dataset.load_image(0).mode == "RGB"
    for index in (3, -4):
        with pytest.raises(IndexError, match="the split 'train' has 3 items"):
            dataset[index]


def test_mode_refs_draws_sentences_by_seed_and_epoch(hard_root, tokenizer):
    refer = Refer(hard_root)
    dataset = ExpressionDataset(refer, "train", tokenizer, 32, mode="refs", seed=5)
    assert len(dataset) == len(refer.refs("train"))

    def epoch(dataset, number):
        dataset.set_epoch(number)
        return [dataset.record(i)["sent_id"] for i in range(len(dataset))]

    first, second = epoch(dataset, 0), epoch(dataset, 1)
    assert first != second and epoch(dataset, 0) == first
    assert epoch(ExpressionDataset(refer, "train", tokenizer, 32, mode="refs", seed=5), 1) == second
    assert epoch(ExpressionDataset(refer, "train", tokenizer, 32, mode="refs", seed=6), 0) != first
    for ref, sent_id in zip(refer.refs("train"), second, strict=True):
        assert sent_id in [sentence.sent_id for sentence in ref.sentences]


def test_item_uses_the_sentence_that_record_names(hard_root, tokenizer):
    dataset = ExpressionDataset(Refer(hard_root), "val", tokenizer, 32, mode="refs", seed=1)
    dataset.set_epoch(3)
    for shuffled in (False, True):
        if shuffled:
            dataset.shuffle_expressions(0)
        for index in range(len(dataset)):
            expected, _ = tokenizer(dataset.record(index)["expression"])
            assert torch.equal(dataset[index]["text"].ids, expected[0])


@pytest.mark.parametrize("shared", [True, False])
def test_cache_changes_nothing(easy_root, tokenizer, shared):
    plain = ExpressionDataset(Refer(easy_root), "val", tokenizer, 48)
    cached = ExpressionDataset(Refer(easy_root), "val", tokenizer, 48, cache=True, cache_shared=shared)
    for _ in range(2):
        for index in range(len(plain)):
            item = cached[index]
            assert same(plain[index], item)
            item["image"].zero_()  # a user's change must not reach the cache
            item["mask"].fill_(7)


def test_cached_items_outlive_their_files(root, tokenizer):
    dataset = ExpressionDataset(Refer(root), "train", tokenizer, 16, cache=True)
    before = [dataset[i] for i in range(3)]
    (root / "images/mscoco/images/train2014/a.jpg").unlink()
    assert all(same(dataset[i], before[i]) for i in range(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(easy_root, tokenizer, workers):
    dataset = ExpressionDataset(Refer(easy_root), "val", tokenizer, 32)
    batches = list(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=dataset.collate))
    assert batches[0]["image"].shape == (4, 3, 32, 32) and batches[0]["mask"].shape == (4, 32, 32)
    assert batches[0]["text"].ids.shape == batches[0]["text"].mask.shape == (4, 20)
    assert len(batches[0]["size"]) == 4 and batches[0]["exists"].all() and batches[0]["ref"].dtype == torch.int64
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(len(dataset)))


@pytest.mark.parametrize("mode", ["sentences", "refs"])
def test_shuffled_expressions_leave_their_image(hard_root, tokenizer, mode):
    dataset = ExpressionDataset(Refer(hard_root), "train", tokenizer, 32, mode=mode)
    image_of = {}
    for ref in dataset.reader.refs("train"):
        image_of |= {sentence.sent_id: ref.image_id for sentence in ref.sentences}
    before = [dataset.record(i) for i in range(len(dataset))]
    masks = [dataset.original_mask(i) for i in range(5)]
    dataset.shuffle_expressions(0)
    after = [dataset.record(i) for i in range(len(dataset))]
    assert all(record["image_id"] != image_of[record["sent_id"]] for record in after)
    assert Counter(r["sent_id"] for r in after) == Counter(r["sent_id"] for r in before)  # a permutation
    assert [r["ref_id"] for r in after] == [r["ref_id"] for r in before]
    assert all(np.array_equal(dataset.original_mask(i), masks[i]) for i in range(5))
    dataset.shuffle_expressions(1)
    assert [dataset.record(i)["sent_id"] for i in range(len(dataset))] != [r["sent_id"] for r in after]
    dataset.shuffle_expressions(0)
    assert [dataset.record(i) for i in range(len(dataset))] == after


def test_shuffling_needs_a_second_image(root, tokenizer):
    dataset = ExpressionDataset(Refer(root), "train", tokenizer, 16)
    with pytest.raises(ValueError, match="one image has 3 of the 3 sentences"):
        dataset.shuffle_expressions(0)


def test_sentence_of_200_words_is_cut(tmp_path, tokenizer):
    refs = [small_ref(1, 70, 7, " ".join(["left"] * 200))]
    dataset = ExpressionDataset(Refer(write_root(tmp_path / "root", refs=refs)), "train", tokenizer, 16)
    assert dataset[0]["text"].ids.shape == (20,) and dataset[0]["text"].mask.all()
    assert len(dataset.record(0)["expression"].split()) == 200


@pytest.mark.parametrize("text", ["", "  \t"])
def test_a_sentence_without_words_is_left_out(tmp_path, tokenizer, text):
    refs = small_refs()
    refs[0]["sentences"][1] |= {"raw": text, "sent": text}
    with pytest.warns(UserWarning, match=r"left out 1 record: a sentence without words .*ref_id 1, sent_id 11"):
        refer = Refer(write_root(tmp_path / "root", refs=refs))
    assert len(ExpressionDataset(refer, "train", tokenizer, 16)) == 2


def test_unusable_images_name_file_and_ref(root, tokenizer):
    dataset = ExpressionDataset(Refer(root), "train", tokenizer, 16)
    path = root / "images/mscoco/images/train2014/a.jpg"
    whole = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"ref_id 1 .*a\.jpg is empty \(0 bytes\)"):
        dataset[0]
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"ref_id 2 .*a\.jpg cannot be read"):
        dataset[2]
    Image.new("RGB", (20, 30)).save(path)
    with pytest.raises(ValueError, match=r"ref_id 1: image .*a\.jpg is 20 x 30; .*instances\.json says 30 x 20"):
        dataset[0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"ref_id 1 .*image a\.jpg \(image_id 7\)"):
        dataset[0]


def test_arguments_are_checked(root, tokenizer):
    refer = Refer(root)
    with pytest.raises(ValueError, match="mode is 'words'; expected one of sentences, refs"):
        ExpressionDataset(refer, "train", tokenizer, 16, mode="words")
    with pytest.raises(ValueError, match="split is 'testB'"):
        ExpressionDataset(refer, "testB", tokenizer, 16)
    for size in (0, 16.0, True, InputSpec(size=-1)):
        with pytest.raises((TypeError, ValueError), match="size is"):
            ExpressionDataset(refer, "train", tokenizer, size)
    with pytest.raises(ValueError, match="fit is 'crop'"):
        ExpressionDataset(refer, "train", tokenizer, InputSpec(fit="crop"))


@pytest.mark.parametrize("fit", ["squash", "letterbox", "longest"])
@pytest.mark.parametrize("cache", [False, True])
def test_images_and_masks_are_fitted_as_the_specification_says(root, tokenizer, fit, cache):
    spec = InputSpec(size=18, fit=fit, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    refer = Refer(root)
    dataset = ExpressionDataset(refer, "train", tokenizer, spec, cache=cache, original=True)
    for _ in range(2):
        for index, ref in enumerate([refer.refs("train")[0], *refer.refs("train")]):
            item = dataset[index]
            assert torch.equal(item["image"], open_fit(spec).image(refer.image_path(7)))
            assert torch.equal(item["mask"], open_fit(spec).mask(refer.mask(ref)))
            assert torch.equal(item["original_mask"], torch.from_numpy(refer.mask(ref)))


def negatives(root: Path) -> Path:
    """R-RefCOCO's way: a ref's second sentence names nothing."""
    refs = small_refs()
    refs[0]["sentences"][1]["exist"] = 0
    return write_root(root, refs=refs)


def test_a_sentence_that_names_nothing_has_an_empty_mask(tmp_path, tokenizer):
    refer = Refer(negatives(tmp_path / "root"))
    for cache in (False, True):
        dataset = ExpressionDataset(refer, "train", tokenizer, 16, cache=cache, original=True)
        for _ in range(2):
            items = [dataset[index] for index in range(3)]
            assert [item["exists"] for item in items] == [True, False, True]
            assert [bool(item["mask"].any()) for item in items] == [True, False, True]
            assert [bool(item["original_mask"].any()) for item in items] == [True, False, True]
            assert items[0]["ref"] == items[1]["ref"] == 1
    assert refer.mask(refer.refs("train")[0]).any()  # the ref's own target is kept
    assert not dataset.record(1)["exists"] and not dataset.original_mask(1).any()


def test_mode_refs_draws_from_all_sentences_and_its_mask_follows(tmp_path, tokenizer):
    dataset = ExpressionDataset(Refer(negatives(tmp_path / "root")), "train", tokenizer, 16, mode="refs", cache=True)
    seen = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        item, record = dataset[0], dataset.record(0)
        assert item["exists"] == bool(item["mask"].any()) == (record["sent_id"] == 10)
        seen.add(item["exists"])
    assert seen == {True, False}


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_serves_all_workers_and_epochs(easy_root, tokenizer, tmp_path, monkeypatch, workers):
    """Each image is decoded in one epoch; two workers that want the same one at the same time may both do it."""
    seen = tmp_path / "decoded"
    seen.touch()
    plain = dataset_module.open_image

    def counted(path: Path) -> Image.Image:
        with seen.open("a") as file:  # workers are processes
            file.write(f"{path}\n")
        return plain(path)

    monkeypatch.setattr(dataset_module, "open_image", counted)
    dataset = ExpressionDataset(Refer(easy_root), "val", tokenizer, 48, cache=True)
    images = {ref.image_id for ref in dataset.reader.refs("val")}
    decoded, epochs = [], []
    for _ in range(3):
        loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=dataset.collate)
        epochs.append(torch.cat([batch["image"] for batch in loader]))
        decoded.append(len(seen.read_text().splitlines()))
    assert len(images) <= decoded[0] <= 2 * len(images) and decoded[1] == decoded[2] == decoded[0]
    assert workers or decoded[0] == len(images)
    uncached = ExpressionDataset(Refer(easy_root), "val", tokenizer, 48)
    expected = torch.stack([uncached[index]["image"] for index in range(len(uncached))])
    assert all(torch.equal(epoch, expected) for epoch in epochs)


def test_cache_without_memory_is_refused_before_anything_starts(root, tokenizer, monkeypatch):
    monkeypatch.setattr(cache_module, "_free_shared_memory", lambda: 2.0**20)
    with pytest.raises(ValueError, match=r"cache: 1 images need \d+ MiB of shared memory, \d+ MiB .* switch the cache"):
        ExpressionDataset(Refer(root), "train", tokenizer, 4096, cache=True)


def test_shared_cache_keeps_arrays_apart():
    cache = ArrayCache(["a", "b", "a"], 6, "things")
    made = []

    def make(value: int, shape: tuple[int, ...]) -> np.ndarray:
        made.append(value)
        return np.full(shape, value, dtype=np.uint8)

    for _ in range(2):
        first = cache.get("a", (2, 3), lambda: make(1, (2, 3)))
        second = cache.get("b", (4,), lambda: make(2, (4,)))
        assert first.tolist() == [[1] * 3] * 2 and second.tolist() == [2] * 4
        first[:] = second[:] = 9
    assert made == [1, 2]


class WithContext(Refer):
    def extra(self, ref: Any, sentence: Any) -> dict[str, torch.Tensor]:
        return {"reference_image": torch.full((3, 4, 4), float(ref.ref_id))}


def test_context_is_collated_and_asked_for_by_name(root, tokenizer):
    dataset = ExpressionDataset(WithContext(root), "train", tokenizer, 16)
    plain = ExpressionDataset(Refer(root), "train", tokenizer, 16)
    batch = dataset.collate([dataset[0], dataset[2]])
    assert batch["extra"]["reference_image"][:, 0, 0, 0].tolist() == [1.0, 2.0]
    require_context(dataset, ("reference_image",))
    require_context(plain, ())
    with pytest.raises(ValueError, match=r"needs superpixels beside .*refs\(unc\)\.p \(train\) carry reference_image"):
        require_context(dataset, ("reference_image", "superpixels"))
    with pytest.raises(ValueError, match=r"needs reference_image .* carry nothing of the kind"):
        require_context(MixedDataset([dataset, plain]), ("reference_image",))


def test_mixed_counts_through(root, tokenizer):
    first = ExpressionDataset(Refer(root), "train", tokenizer, InputSpec(size=16))
    second = ExpressionDataset(Refer(root), "val", tokenizer, InputSpec(size=16))
    mixed = MixedDataset([first, second])
    assert len(mixed) == 5 and mixed.spec == first.spec
    assert [mixed[index]["index"] for index in range(5)] == list(range(5)) and mixed[-1]["index"] == 4
    assert mixed[4]["ref"] == 3 and mixed.record(3) == second.record(0)
    batch = mixed.collate([mixed[index] for index in range(5)])
    assert batch["image"].shape == (5, 3, 16, 16) and batch["ref"].tolist() == [1, 1, 2, 3, 3]


def test_images_left_out(root, tokenizer):
    assert len(ExpressionDataset(Refer(root), "train", tokenizer, 16, without_images={8})) == 3
    assert len(ExpressionDataset(Refer(root), "train", tokenizer, 16, without_images={7})) == 0
