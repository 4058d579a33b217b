"""Items of ExpressionDataset, its control and its errors."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from magnet_fast.data import ExpressionDataset, Refer, Tokenizer, prepare_image, prepare_mask

from .layout import small_ref, small_refs, write_root


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
def root(tmp_path):
    return write_root(tmp_path / "root")


def items_equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first
    )


def test_items_of_mode_sentences(root, tokenizer):
    refer = Refer(root)
    dataset = ExpressionDataset(refer, "train", tokenizer, 16)
    assert [dataset.record(i)["expression"] for i in range(len(dataset))] == ["Left man", "man on left", "woman"]
    item = dataset[1]
    assert torch.equal(item["image"], prepare_image(refer.image_path(7), 16))
    assert torch.equal(item["mask"], prepare_mask(refer.mask(refer.refs("train")[0]), 16))
    assert item["mask"].dtype == torch.uint8 and item["mask"].any()
    ids, attention = tokenizer("man on left")
    assert torch.equal(item["input_ids"], ids[0]) and torch.equal(item["attention_mask"], attention[0])
    assert item["index"] == 1 and dataset[-2]["index"] == 1
    assert dataset.record(1) == {
        "ref_id": 1,
        "sent_id": 11,
        "image_id": 7,
        "expression": "man on left",
        "kind": None,
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
            assert torch.equal(dataset[index]["input_ids"], expected[0])


def test_cache_changes_nothing(easy_root, tokenizer):
    plain = ExpressionDataset(Refer(easy_root), "val", tokenizer, 48)
    cached = ExpressionDataset(Refer(easy_root), "val", tokenizer, 48, cache=True)
    for _ in range(2):
        for index in range(len(plain)):
            item = cached[index]
            assert items_equal(plain[index], item)
            item["image"].zero_()  # a user's change must not reach the cache
            item["mask"].fill_(7)


def test_cached_items_outlive_their_files(root, tokenizer):
    dataset = ExpressionDataset(Refer(root), "train", tokenizer, 16, cache=True)
    before = [dataset[i] for i in range(3)]
    (root / "images/mscoco/images/train2014/a.jpg").unlink()
    assert all(items_equal(dataset[i], before[i]) for i in range(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(easy_root, tokenizer, workers):
    dataset = ExpressionDataset(Refer(easy_root), "val", tokenizer, 32)
    batches = list(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=dataset.collate))
    assert batches[0]["image"].shape == (4, 3, 32, 32) and batches[0]["mask"].shape == (4, 32, 32)
    assert batches[0]["input_ids"].shape == batches[0]["attention_mask"].shape == (4, 20)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(len(dataset)))


@pytest.mark.parametrize("mode", ["sentences", "refs"])
def test_shuffled_expressions_leave_their_image(hard_root, tokenizer, mode):
    dataset = ExpressionDataset(Refer(hard_root), "train", tokenizer, 32, mode=mode)
    image_of = {}
    for ref in dataset.refer.refs("train"):
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
    assert dataset[0]["input_ids"].shape == (20,) and dataset[0]["attention_mask"].all()
    assert len(dataset.record(0)["expression"].split()) == 200


@pytest.mark.parametrize("text", ["", "  \t"])
def test_empty_sentence_names_ref_and_sentence(tmp_path, tokenizer, text):
    refs = small_refs()
    refs[0]["sentences"][1]["raw"] = text
    refer = Refer(write_root(tmp_path / "root", refs=refs))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: ref_id 1, sent_id 11: the sentence is empty"):
        ExpressionDataset(refer, "train", tokenizer, 16)
    ExpressionDataset(refer, "val", tokenizer, 16)  # the other split is sound


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
    for size in (0, 16.0, True):
        with pytest.raises(ValueError, match="image_size is"):
            ExpressionDataset(refer, "train", tokenizer, size)
