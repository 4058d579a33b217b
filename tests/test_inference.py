"""The segmenter: kinds of images, checkpoints, vocabularies, what it refuses."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from typer.testing import CliRunner

from magnet_fast import Segmenter, checkpoints, models
from magnet_fast.cli import app
from magnet_fast.data import Tokenizer, prepare_image
from magnet_fast.ops import _packed
from magnet_fast.training.checkpoint import save_checkpoint

SIZE = 48


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    # A threshold that random masks pass here and there.
    network = models.create("magnet_tiny", input={"size": SIZE, "max_tokens": 16, "threshold": 0.3}).eval()
    with torch.no_grad():
        network.head.mask_decoder.class_head.bias.copy_(torch.tensor([-9.0, 9.0]))
    return network


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    return {"tokenizer_vocab": Tokenizer().digest()}


@pytest.fixture(scope="module")
def checkpoint(model, metadata, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    models.save(model, path, metadata)
    return path


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (37, 61, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_mask_and_probability_at_the_images_own_size(checkpoint, model, picture) -> None:
    segmenter = Segmenter.from_checkpoint(checkpoint)
    found = segmenter(picture, "the red circle")
    assert found.mask.shape == found.probability.shape == (37, 61)
    assert (found.mask.dtype, found.probability.dtype) == (np.bool_, np.float32)
    assert np.array_equal(found.mask, found.probability > 0.3)
    assert found.mask.any() and not found.mask.all()
    ids, words = Tokenizer(max_tokens=16)(["the red circle"])
    expected = model.predict(prepare_image(picture, SIZE)[None], ids, words, size=(37, 61))[0]
    assert np.allclose(found.probability, expected.numpy(), atol=1e-5)
    assert found.presence > 0.99


def test_a_model_that_cannot_say_whether_anything_is_named(picture) -> None:
    segmenter = Segmenter(models.create("lavt_tiny", input={"size": SIZE}), Tokenizer())
    assert segmenter(picture, "circle").presence is None


def test_a_model_that_says_nothing_is_named(metadata, picture, tmp_path) -> None:
    """Its mask is empty, unless it is to be kept; the command line says so with its probability."""
    torch.manual_seed(0)
    model = models.create("refsegformer_tiny", input={"size": SIZE, "max_tokens": 16}).eval()
    with torch.no_grad():
        model.head.classify.bias.copy_(torch.tensor([-5.0, 5.0]))
        model.presence.classify.bias.fill_(-4.0)
    path = tmp_path / "absent.safetensors"
    models.save(model, path, metadata)
    denied = Segmenter.from_checkpoint(path)(picture, "the red circle")
    kept = Segmenter.from_checkpoint(path, keep_masks=True)(picture, "the red circle")
    assert denied.present is kept.present is False and denied.presence == pytest.approx(kept.presence)
    assert not denied.mask.any() and kept.mask.all()
    picture.save(tmp_path / "p.png")
    command = [
        "segment",
        str(tmp_path / "p.png"),
        "the red circle",
        "--checkpoint",
        str(path),
        "--out",
        str(tmp_path / "m.png"),
    ]
    said = CliRunner().invoke(app, command).output
    assert f"nothing of that kind is in the picture ({1 - denied.presence:.2f})" in said
    CliRunner().invoke(app, [*command, "--keep-mask"])
    assert np.asarray(Image.open(tmp_path / "m.png")).all()
    with torch.no_grad():
        model.presence.classify.bias.fill_(4.0)
    models.save(model, path, metadata)
    found = Segmenter.from_checkpoint(path)(picture, "the red circle")
    assert found.present is True and found.mask.all()


@pytest.mark.parametrize("fit", ["letterbox", "longest"])
def test_other_fits_come_back_to_the_images_own_size(fit: str, picture) -> None:
    model = models.create("lavt_tiny", input={"size": SIZE, "fit": fit}).eval()
    segmenter = Segmenter(model, Tokenizer(), fast=False)
    found = segmenter(picture, "circle").probability
    assert found.shape == (37, 61)
    canvas = model.predict(segmenter.fit.image(picture)[None], *Tokenizer()(["circle"]))
    assert np.allclose(found, segmenter.fit.back(canvas, (37, 61))[0].numpy(), atol=1e-6)


def test_the_same_image_in_every_form(checkpoint, picture, tmp_path) -> None:
    segmenter = Segmenter.from_checkpoint(checkpoint)
    path = tmp_path / "picture.png"
    picture.save(path)
    expected = segmenter(picture, "circle").probability
    for form in (path, str(path), np.asarray(picture)):
        assert np.array_equal(segmenter(form, "circle").probability, expected)


def test_models_are_accelerated_and_packed_unless_declined(checkpoint, picture) -> None:
    packed = Segmenter.from_checkpoint(checkpoint)
    accelerated = Segmenter.from_checkpoint(checkpoint, pack=False)
    plain = Segmenter.from_checkpoint(checkpoint, fast=False)

    def linears(segmenter: Segmenter) -> list[nn.Linear]:
        return [module for module in segmenter.model.modules() if isinstance(module, nn.Linear)]

    assert all(_packed.keeps(layer.weight) for layer in linears(packed))
    assert not any(_packed.keeps(layer.weight) for layer in (*linears(accelerated), *linears(plain)))
    assert {type(module).__module__ for module in accelerated.model.modules()} & {"magnet_fast.fast"}
    assert not {type(module).__module__ for module in plain.model.modules()} & {"magnet_fast.fast"}
    for image in (picture, picture.rotate(90)):  # the copies are made with the first
        expected = plain(image, "circle").probability
        for segmenter in (packed, accelerated):
            assert np.allclose(segmenter(image, "circle").probability, expected, atol=1e-5)


def test_several_expressions_for_one_image(checkpoint, picture) -> None:
    segmenter = Segmenter.from_checkpoint(checkpoint)
    expressions = [f"the {colour} circle" for colour in ("red", "blue", "green")] * 6  # more than one batch
    found = segmenter(picture, expressions)
    assert len(found) == 18
    for index in (0, 1, 17):
        single = segmenter(picture, expressions[index])
        assert np.allclose(found[index].probability, single.probability, atol=1e-5)
    assert segmenter(picture, []) == []


@pytest.mark.parametrize("name", ["cris_tiny", "risam_tiny"])
def test_sentences_about_one_image_share_what_is_seen_of_it(name: str, picture) -> None:
    """As long as image and weights stay, and nobody looks on; the answers are those of a call of its own."""
    torch.manual_seed(0)
    model = models.create(name, input={"size": SIZE, "max_tokens": 16}).eval()
    tokenizer = Tokenizer(max_tokens=16)
    sentences = [f"the {colour} circle" for colour in ("red", "blue", "green")]
    segmenter = Segmenter(model, tokenizer, pack=True, keep_masks=True)
    careful = Segmenter(model, tokenizer, fast=False, keep_masks=True)

    def probabilities(asked: Segmenter, image: Image.Image = picture) -> np.ndarray:
        return np.stack([found.probability for found in asked(image, sentences)])

    with torch.no_grad():
        pixels = segmenter.fit.image(np.asarray(picture))[None]
        found = [model(pixels, models.Text(*tokenizer([sentence]))) for sentence in sentences]
        expected = [segmenter.fit.probability(one._replace(presence=None), (37, 61)) for one in found]
    assert np.allclose(probabilities(segmenter), torch.cat(expected).numpy(), atol=1e-5)
    assert expected[0].std() > 1e-3
    first = segmenter._last
    assert np.allclose(segmenter(picture, sentences[1]).probability, probabilities(segmenter)[1], atol=1e-5)
    assert segmenter._last is first

    other = ImageOps.mirror(picture)
    before = probabilities(segmenter, other)
    assert segmenter._last is not first
    with torch.no_grad():
        next(model.image_encoder.parameters()).mul_(1.5)
    changed = probabilities(segmenter, other)
    assert not np.allclose(changed, before, atol=1e-5)
    assert np.allclose(changed, probabilities(careful, other), atol=1e-5) and careful._last is None

    called = []
    layer = next(module for module in model.image_encoder.modules() if isinstance(module, nn.Conv2d))
    counted = layer.register_forward_hook(lambda module, args, out: called.append(len(out)))
    assert np.allclose(probabilities(segmenter, other), changed, atol=1e-5)
    assert called == [3]  # a hook sees the batch
    counted.remove()


def test_models_whose_words_enter_the_image_encoder_look_with_words(picture) -> None:
    model = models.create("lavt_tiny", input={"size": SIZE})
    segmenter = Segmenter(model, Tokenizer(), pack=True)
    segmenter(picture, "circle")
    assert segmenter._last is None
    with pytest.raises(TypeError, match="seen: words enter this model's image encoder, by a PWAMFusion"):
        model.look(torch.zeros(1, 3, SIZE, SIZE))


def test_a_checkpoint_with_averaged_weights_segments_with_those(checkpoint, model, metadata, picture, tmp_path) -> None:
    state = {
        "model_config": model.config.model_dump(mode="json"),
        "model": {name: torch.zeros_like(value) for name, value in model.state_dict().items()},
        "ema": {"weights": {f"model.{name}": value for name, value in model.state_dict().items()}, "updates": 3},
        "metadata": metadata,
    }
    save_checkpoint(state, tmp_path / "checkpoint.safetensors")
    expected = Segmenter.from_checkpoint(checkpoint)(picture, "circle").probability
    found = Segmenter.from_checkpoint(tmp_path / "checkpoint.safetensors")(picture, "circle").probability
    assert np.array_equal(found, expected)


def test_a_training_checkpoint_segments_too(checkpoint, model, metadata, picture, tmp_path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    state = {"model_config": model.config.model_dump(mode="json"), "model": model.state_dict(), "metadata": metadata}
    save_checkpoint(state, path)
    expected = Segmenter.from_checkpoint(checkpoint)(picture, "circle").probability
    assert np.array_equal(Segmenter.from_checkpoint(path)(picture, "circle").probability, expected)


def test_image_size_and_long_sentences(checkpoint, picture) -> None:
    segmenter = Segmenter.from_checkpoint(checkpoint, image_size=32)
    assert segmenter.spec.size == segmenter.model.spec.size == 32
    long = " ".join(["the red circle left of the blue box"] * 25)  # 200 words: cut to the model's length
    assert len(long.split()) == 200
    found = segmenter(picture, long)
    start = " ".join(long.split()[:15])  # [CLS] and 15 words are what the model reads
    assert np.allclose(found.probability, segmenter(picture, start).probability, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("none.png", FileNotFoundError, "none.png"),
        ("empty.png", ValueError, r"empty\.png.*0 bytes"),
        ("text.png", ValueError, r"text\.png"),
        (np.zeros((4, 4, 3), dtype=np.float32), ValueError, "float32"),
        (np.zeros((4, 4, 4), dtype=np.uint8), ValueError, r"\(4, 4, 4\)"),
        (b"bytes", TypeError, "bytes"),
    ],
)
def test_bad_images(checkpoint, tmp_path, image, error, message: str) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    if isinstance(image, str):
        image = tmp_path / image
    with pytest.raises(error, match=message):
        Segmenter.from_checkpoint(checkpoint)(image, "circle")


@pytest.mark.parametrize(
    ("expression", "error"), [("", ValueError), ("  ", ValueError), (7, TypeError), (["a", None], TypeError)]
)
def test_bad_expressions(checkpoint, picture, expression, error) -> None:
    with pytest.raises(error, match="(?i)expression"):
        Segmenter.from_checkpoint(checkpoint)(picture, expression)


@pytest.mark.parametrize("tag", [3, 5, 6, 8])
def test_a_phones_picture_is_turned_upright(checkpoint, picture, tag: int, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    picture.save(tmp_path / "photo.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "photo.png"))
    segmenter = Segmenter.from_checkpoint(checkpoint)
    expected = segmenter(np.asarray(upright), "circle")
    for image in (tmp_path / "photo.png", Image.open(tmp_path / "photo.png"), upright):
        found = segmenter(image, "circle")
        assert found.mask.shape == (upright.height, upright.width)
        assert np.array_equal(found.probability, expected.probability)
    stored = Segmenter.from_checkpoint(checkpoint, stored_pixels=True)
    found = stored(tmp_path / "photo.png", "circle").probability
    assert np.array_equal(found, segmenter(picture, "circle").probability)
    assert not np.array_equal(found, expected.probability)


def test_transparent_parts_lie_on_white_unless_pixels_are_taken_as_stored(checkpoint, picture) -> None:
    half = picture.copy()
    half.putalpha(Image.new("L", half.size, 0))
    segmenter = Segmenter.from_checkpoint(checkpoint)
    white = segmenter(Image.new("RGB", half.size, "white"), "circle").probability
    with pytest.warns(UserWarning, match="laid on white"):
        assert np.array_equal(segmenter(half, "circle").probability, white)
    segmenter.stored_pixels = True
    with pytest.warns(UserWarning, match="the colours stored under them are read"):
        found = segmenter(half, "circle").probability
    assert np.array_equal(found, segmenter(picture, "circle").probability)


def test_a_result_says_what_was_read(checkpoint, picture) -> None:
    segmenter = Segmenter.from_checkpoint(checkpoint)
    with pytest.warns(UserWarning, match="the vocabulary lacks all its words: '東京'; said once"):
        whole, foreign = segmenter(picture, ["the red circle", "東京"])
    assert whole.reading.complete and foreign.reading.unknown == ("東京",) and foreign.reading.none_known
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not segmenter(picture, "東京").reading.complete
    mask, probability, presence = foreign  # three, as ever
    assert mask is foreign.mask and probability is foreign.probability and presence == foreign.presence
    copy = pickle.loads(pickle.dumps(foreign))
    assert copy.reading == foreign.reading and np.array_equal(copy.mask, mask)
    with pytest.raises(ValueError, match="expression 1 leaves no word to read"):
        segmenter(picture, ["red", "\u200b"])


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_nan_is_refused_with_its_sentence_and_layer(picture, dtype: str | None, compile: bool, monkeypatch) -> None:
    """In one sentence of three: where a word's vector overflows."""
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: None)
    model = models.create("magnet_tiny", input={"size": SIZE, "max_tokens": 16})
    segmenter = Segmenter(model, Tokenizer(max_tokens=16), dtype=dtype, compile=compile)
    expressions = ["the red circle", "the star", "the moon"]
    star = segmenter.tokenizer.vocabulary["star"]

    def overflow(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == star)[..., None], torch.inf)

    embeddings = next(name for name, part in model.named_modules() if isinstance(part, nn.Embedding))
    model.get_submodule(embeddings).register_forward_hook(overflow)
    assert len(segmenter(picture, expressions[::2])) == 2
    with pytest.raises(ValueError, match="NaN in that of expression 'the star': the first layer") as found:
        segmenter(picture, expressions)
    assert f"not finite is {embeddings} (Embedding); its weights are finite" in str(found.value)


def test_missing_and_foreign_checkpoints(tmp_path, model) -> None:
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        Segmenter.from_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="garbage.safetensors"):
        Segmenter.from_checkpoint(tmp_path / "garbage.safetensors")
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="garbage.pth"):
        Segmenter.from_checkpoint(tmp_path / "garbage.pth")
    torch.save({"model": {"encoder.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError):
        Segmenter.from_checkpoint(tmp_path / "other.pth")
    models.save(model, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="metadata lack tokenizer_vocab"):
        Segmenter.from_checkpoint(tmp_path / "bare.safetensors")


def test_wrong_vocabulary(checkpoint, tmp_path) -> None:
    other = tmp_path / "vocab.txt"
    other.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle"]))
    with pytest.raises(ValueError, match=r"trained with another vocabulary than .*vocab\.txt \(7 entries\)"):
        Segmenter.from_checkpoint(checkpoint, tokenizer=other)
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        Segmenter.from_checkpoint(checkpoint, tokenizer=tmp_path / "missing.txt")
    # The vocabulary counts, not the file's place or form.
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(Tokenizer().source).read_bytes())
    segmenter = Segmenter.from_checkpoint(checkpoint, tokenizer=copy)
    assert segmenter.tokenizer.max_tokens == 16
    as_json = tmp_path / "tokenizer.json"
    Tokenizer()._tokenizer.save(str(as_json))
    assert Tokenizer(as_json).digest() == Tokenizer().digest()


def test_released_checkpoints_need_berts_vocabulary(checkpoint, tmp_path) -> None:
    released = checkpoints.Checkpoint(checkpoints.load(checkpoint).model, "released.pth", None, {})
    with pytest.raises(ValueError, match="released.pth was trained with a vocabulary of 1280 entries"):
        released.tokenizer()
    small = tmp_path / "vocab.txt"
    small.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red"]))
    with pytest.raises(ValueError, match="has 5 entries, but the model of released.pth knows 1280"):
        released.tokenizer(small)
    full = tmp_path / "full.txt"
    full.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(1276))]))
    assert released.tokenizer(full).vocab_size == 1280


def test_without_a_compiler_the_segmenter_says_so_and_runs(picture, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: pytest.fail("compiled"))
    torch.manual_seed(0)
    model = models.create("magnet_tiny", input={"size": SIZE, "max_tokens": 16}).eval()
    expected = Segmenter(model, Tokenizer(max_tokens=16))(picture, "red circle")
    with pytest.warns(
        UserWarning, match="compile: no C\\+\\+ compiler 'no-such-compiler' here; the model runs uncompiled"
    ):
        segmenter = Segmenter(model, Tokenizer(max_tokens=16), compile=True)
    assert np.array_equal(segmenter(picture, "red circle").probability, expected.probability)


def test_compiled_segmenter_fills_up_the_expressions(metadata, picture, monkeypatch) -> None:
    """Three expressions run the graph of four, and what a row gives does not depend on what fills it up."""
    torch.compiler.reset()
    sizes = []

    def compile_eagerly(module: nn.Module, **options) -> None:
        assert options["fullgraph"] and options["dynamic"] is False
        module._compiled_call_impl = module._call_impl
        module.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[1].ids)))

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    torch.manual_seed(0)
    plain = models.create("magnet_tiny", input={"size": SIZE, "max_tokens": 16}).eval()
    with torch.no_grad():
        plain.head.mask_decoder.class_head.bias.copy_(torch.tensor([-9.0, 9.0]))
    expressions = ["red circle", "blue box", "star left", "moon"]
    expected = Segmenter(plain, Tokenizer(max_tokens=16))(picture, expressions)
    found = Segmenter(plain, Tokenizer(max_tokens=16), compile=True)
    for count in (1, 2, 3, 4):
        for ours, theirs in zip(found(picture, expressions[:count]), expected, strict=False):
            assert np.allclose(ours.probability, theirs.probability, atol=1e-6)
    assert sizes == [1, 2, 4, 4]
