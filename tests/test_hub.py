"""Models as folders and on the hub, against a stand-in of its HTTP interface: there and back, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from magnet_fast import Segmenter, checkpoints, models
from magnet_fast.app.segmenters import Segmenters
from magnet_fast.cli import app
from magnet_fast.data import Tokenizer
from magnet_fast.data.tokenizers import PretrainedTokenizer
from magnet_fast.models import hub as models_hub
from magnet_fast.models.files import safetensors_metadata
from magnet_fast.models.lavt import LAVT
from tests.hub_server import TOKEN, Hub, Repository, serving

NAME = "someone/shapes"
FILES = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
SCORES = {
    "checkpoint": "/home/someone/runs/b/best.safetensors",
    "data": "/home/someone/data",
    "dataset": "refcoco",
    "split_by": "unc",
    "split": "testA",
    "task": "single",
    "sentences": 120,
    "oIoU": 71.256,
    "N-acc": float("nan"),
    "by_kind": {},
}
IMAGE = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.create("lavt_tiny", input={"size": 32, "max_tokens": 12, "threshold": 0.4}).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "shapes"
    model.save_pretrained(folder, tokenizer=Tokenizer(), metadata={"step": "7"})
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """An empty hub, an empty cache, and a token that may write."""
    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        template = f"{served.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


def stored(hub: Hub, folder: Path, name: str = NAME) -> str:
    """A folder's files as a repository; the commit."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return hub.repositories.setdefault(name, Repository()).commit(files)


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- a folder ----


def test_a_folder_gives_the_same_model_and_segmenter(model, saved) -> None:
    assert {path.name for path in saved.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    for again in (models.from_pretrained(saved), LAVT.from_pretrained(str(saved)), checkpoints.load(saved).model):
        assert same(again, model) and again.spec == model.spec and not again.training
    expected = Segmenter(model, Tokenizer(max_tokens=12), fast=False)(IMAGE, "the red circle")
    for segmenter in (Segmenter.from_pretrained(saved, fast=False), Segmenter.from_checkpoint(saved, fast=False)):
        assert np.array_equal(segmenter(IMAGE, "the red circle").probability, expected.probability)
    assert checkpoints.load(saved).metadata["step"] == "7"
    assert same(models.load(saved / "model.safetensors"), model)  # the file alone is a model, too


def test_another_class_of_model_is_refused(saved) -> None:
    from magnet_fast.models.cris import CRIS

    with pytest.raises(ValueError, match="source: expected a CRIS, got .*, a LAVT"):
        CRIS.from_pretrained(saved)


def test_the_tokenizer_comes_along(model, folder, tmp_path) -> None:
    """One that does not ship: its digest is that of the checkpoint, and the file beside is taken."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(10))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    own = Tokenizer(tmp_path / "vocab.txt")
    model.save_pretrained(folder, tokenizer=own)
    loaded = checkpoints.load(folder)
    found = loaded.tokenizer()
    assert found.vocabulary == own.vocabulary and found.digest() == own.digest() == loaded.vocabulary
    assert found.readings(["w3 of W4"]) == Tokenizer(tmp_path / "vocab.txt", max_tokens=12).readings(["w3 of W4"])
    (folder / "tokenizer.json").write_text(Tokenizer().to_json())
    with pytest.raises(ValueError, match="was trained with another vocabulary"):
        checkpoints.load(folder).tokenizer()


def test_the_card_says_what_it_is(model, tmp_path) -> None:
    model.save_pretrained(tmp_path, tokenizer=Tokenizer(), scores=[SCORES], license="apache-2.0")
    text = (tmp_path / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "magnet_fast",
        "license": "apache-2.0",
        "pipeline_tag": "image-segmentation",
        "tags": ["referring-image-segmentation", "lavt"],
    }
    assert "| image | swin | embed_dim 16" in body and "| threshold | 0.4 |" in body and "No remote code" in body
    assert "**refcoco testA** (unc, single)" in body and "| 120 | 71.26 | – |" in body
    assert "/home/someone" not in text and 'Segmenter.from_pretrained("OWNER/NAME")' in body


def test_a_card_is_written_anew_until_somebody_edits_it(model, folder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(folder, license="mit")
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    (folder / "README.md").write_text(card.replace("Referring", "My referring"))
    with pytest.warns(UserWarning, match=r"has an edited README\.md, which is kept"):
        model.save_pretrained(folder)
    assert "My referring" in (folder / "README.md").read_text()


def test_a_former_tokenizer_is_not_taken(model, folder) -> None:
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="its metadata lack tokenizer_vocab"):
        checkpoints.load(folder).tokenizer()


def test_wrong_scores_leave_nothing(model, tmp_path) -> None:
    with pytest.raises(ValueError, match="scores: expected what"):
        model.save_pretrained(tmp_path / "new", scores=[{"oIoU": 3.0}])
    assert not (tmp_path / "new").exists()


# ---- the hub ----


def test_there_and_back(hub, model, monkeypatch) -> None:
    address = model.push_to_hub(NAME, tokenizer=Tokenizer(), license="mit")
    assert address == f"{hub.address}/{NAME}/commit/{hub.repositories[NAME].main}"
    assert hub.files(NAME).keys() == FILES | {".gitattributes"}
    assert len(hub.objects) == 1 and len(hub.repositories[NAME].commits) == 2  # weights by LFS; all in one commit
    assert f'Segmenter.from_pretrained("{NAME}")' in hub.files(NAME)["README.md"].decode()
    assert not hub.repositories[NAME].private
    hub.asked.clear()
    assert same(models.from_pretrained(NAME), model)
    downloads = [one for one in hub.asked if one.startswith("GET")]
    assert [one.rpartition("/")[2] for one in downloads] == ["config.json", "tokenizer.json", "model.safetensors"]
    # Then without network, by either switch, through every way in.
    hub.asked.clear()
    assert same(models.from_pretrained(NAME, local_files_only=True), model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = Segmenter.from_pretrained(NAME)(IMAGE, "the red circle")
    assert found.mask.shape == (40, 56)
    assert Segmenters([f"hub:{NAME}"]).names[0] == f"hub:{NAME}"
    assert same(checkpoints.load(f"hub:{NAME}").model, model) and hub.asked == []


def test_revisions(hub, model, saved) -> None:
    first = stored(hub, saved)
    other = models.create("lavt_tiny").eval()
    other.push_to_hub(NAME)
    assert same(models.from_pretrained(NAME), other)
    assert same(models.from_pretrained(NAME, revision=first), model)
    assert same(checkpoints.load(f"hub:{NAME}@{first}").model, model)
    with pytest.raises(ValueError, match=f"repository '{NAME}' has no revision 'v9'"):
        models.from_pretrained(NAME, revision="v9")
    with pytest.raises(ValueError, match="revision: expected None with a folder"):
        models.from_pretrained(saved, revision="v9")


def test_all_files_are_of_one_commit(hub, model, saved, monkeypatch) -> None:
    """Another model is pushed between config.json and the weights."""
    stored(hub, saved)
    download = models_hub._download

    def with_a_push_between(repository: str, name: str, **where: Any) -> Path:
        path = download(repository, name, **where)
        if name == "config.json":
            hub.repositories[NAME].commit({"model.safetensors": b"other"})
        return path

    monkeypatch.setattr(models_hub, "_download", with_a_push_between)
    assert same(models.from_pretrained(NAME), model)


def test_private_repositories(hub, model, saved, monkeypatch) -> None:
    model.push_to_hub(NAME, private=True)
    assert hub.repositories[NAME].private and same(models.from_pretrained(NAME), model)
    stored(hub, saved, "someone/public")
    before = hub.repositories["someone/public"].main
    with pytest.raises(ValueError, match="private: 'someone/public' is public already; nothing was written"):
        model.push_to_hub("someone/public", private=True)
    assert hub.repositories["someone/public"].main == before
    monkeypatch.delenv("HF_TOKEN")
    stored(hub, saved, "someone/hidden")
    hub.repositories["someone/hidden"].private = True
    with pytest.raises(ValueError, match="'someone/hidden' is not on the hub, or private"):
        models.from_pretrained("someone/hidden", token=False)
    assert same(models.from_pretrained("someone/hidden", token=TOKEN), model)
    with pytest.raises(ValueError, match=f"'{NAME}2' cannot be written on the hub: .*401.*hf auth login") as refused:
        model.push_to_hub(f"{NAME}2", token="hf_other")
    assert "hf_other" not in str(refused.value)


def test_a_card_on_the_hub_is_kept_once_edited(hub, model, saved) -> None:
    stored(hub, saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.push_to_hub(NAME, license="mit")
    assert b"license: mit" in hub.files(NAME)["README.md"]
    hub.repositories[NAME].commit({"README.md": b"mine"})
    with pytest.warns(UserWarning, match=r"has an edited README\.md, which is kept"):
        model.push_to_hub(NAME)
    assert hub.files(NAME)["README.md"] == b"mine"


def test_by_the_command_line(hub, model, tmp_path) -> None:
    """A run of mostly frozen weights is pushed whole, and pictures are segmented by it without its base."""
    base, run = tmp_path / "bert.safetensors", tmp_path / "last.safetensors"
    save_file(model.text_encoder.bert.state_dict(), base)
    trained = models.create("lavt_tiny", pretrained={"image": False, "text": str(base)})
    trained.text_encoder.bert.requires_grad_(False)
    models.save(trained, run, {"tokenizer_vocab": Tokenizer().digest()}, whole=False)
    assert "bases" in safetensors_metadata(run)
    (tmp_path / "metrics.json").write_text(json.dumps(SCORES))
    result = CliRunner().invoke(app, ["push", str(run), NAME, "--private", "--scores", str(tmp_path / "metrics.json")])
    assert result.exit_code == 0 and f"/{NAME}/commit/" in result.output, result.output
    assert b"71.26" in hub.files(NAME)["README.md"] and hub.repositories[NAME].private
    base.unlink()
    assert same(models.from_pretrained(NAME), trained)
    out = tmp_path / "mask.png"
    result = CliRunner().invoke(
        app, ["segment", "docs/example.jpg", "the ring", "--checkpoint", f"hub:{NAME}", "--out", str(out)]
    )
    assert result.exit_code == 0 and out.exists(), result.output
    result = CliRunner().invoke(app, ["push", str(run), "someone/again"])
    assert result.exit_code == 2 and "magnet-fast merge" in result.output  # its base is gone
    assert "someone/again" not in hub.repositories


# ---- what is refused ----


@pytest.mark.parametrize(
    "name", ["shapes", "a/b/c", "../shapes", "a/..", "a/b--c", "/etc/passwd", "a/b.git", "https://x.y/a/b", "a/b c", ""]
)
def test_names_are_refused_before_anything_is_asked(hub, model, name) -> None:
    for use in (models.from_pretrained, model.push_to_hub, lambda name: checkpoints.load(f"hub:{name}")):
        with pytest.raises(ValueError, match="repository: expected a folder that exists, or owner/name"):
            use(name) if name else use("a/")
    result = CliRunner().invoke(app, ["push", "none.safetensors", name or "a/"])
    assert result.exit_code == 2 and "repository: expected" in result.output
    assert hub.asked == []


def test_what_is_not_there(hub, saved, monkeypatch, tmp_path) -> None:
    with pytest.raises(ValueError, match="'someone/none' is not on the hub, or private"):
        models.from_pretrained("someone/none")
    stored(hub, saved)
    hub.repositories[NAME].commit({"config.json": b""})
    with pytest.raises(ValueError, match=r"has no config\.json: no model that save_pretrained wrote"):
        models.from_pretrained(NAME)
    stored(hub, saved)
    hub.repositories[NAME].commit({"model.safetensors": b"", "pytorch_model.bin": pickle.dumps(print)})
    with pytest.raises(ValueError, match=r"has no model\.safetensors at .*Pickles \(pytorch_model\.bin\) are not read"):
        models.from_pretrained(NAME)
    assert not any("pytorch_model.bin" in one for one in hub.asked)
    with pytest.raises(ValueError, match=r"the cache has no config.json, and the hub is not reached: local_files_only"):
        models.from_pretrained("someone/new", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"the cache has no config.json, and the hub is not reached: .*HF_HUB_OFFLINE"):
        models.from_pretrained("someone/new")
    with pytest.raises(ValueError, match=r"has no config\.json: it is no folder that save_pretrained wrote"):
        models.from_pretrained(tmp_path)


def test_no_network(hub, model, saved, monkeypatch) -> None:
    stored(hub, saved)
    assert same(models.from_pretrained(NAME), model)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's, between tries
    assert same(models.from_pretrained(NAME), model)  # of the cache
    with pytest.raises(ValueError, match=r"the cache has no config.json, and the hub is not reached: .*refused"):
        models.from_pretrained("someone/new")
    with pytest.raises(ValueError, match="cannot be written on the hub: .*refused"):
        model.push_to_hub("someone/new")


def test_where_nobody_answers_nothing_is_tried_again(hub, model, saved, monkeypatch) -> None:
    stored(hub, saved)
    assert same(models.from_pretrained(NAME), model)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for read in (models.from_pretrained, lambda name: checkpoints.load(f"hub:{name}"), Segmenter.from_pretrained):
        with pytest.raises(ValueError, match=r"has no config.json, and the hub is not reached: .*; load it once with"):
            read("someone/new")
    with pytest.raises(ValueError, match=r"has no config.json at revision 'v1', and the hub is not reached: "):
        models.from_pretrained(NAME, revision="v1")
    assert waits == []


@pytest.mark.parametrize("raised", [TimeoutError("slow"), RuntimeError("odd")])
def test_a_first_answer_that_is_slow_or_odd_is_left_to_the_client(hub, model, saved, monkeypatch, raised) -> None:
    stored(hub, saved)

    def first(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", first)
    assert same(models.from_pretrained(NAME), model)


@pytest.mark.parametrize(("name", "hint"), [("owner/name", True), ("owner/name.pth", False), ("a/b/c", False)])
def test_a_repository_without_hub_before_it(tmp_path, monkeypatch, name: str, hint: bool) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist") as found:
        checkpoints.load(name)
    assert (f"a repository on the hub is named 'hub:{name}'" in str(found.value)) is hint
    (tmp_path / "owner").mkdir()
    with pytest.raises(FileNotFoundError) as found:
        checkpoints.load(name)
    assert "hub" not in str(found.value)


SPOILED = {
    "unknown version": (lambda f: changed(f / "config.json", format="magnet_fast.pretrained/9"), "later version wrote"),
    "another library": (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "is of another library"),
    "no version": (lambda f: changed(f / "config.json", format=["magnet_fast"]), "is of another library"),
    "no model": (lambda f: changed(f / "config.json", model=3), "is none of this package"),
    "an unknown system": (lambda f: changed(f / "config.json", model={"architecture": ["x"]}), "none of this package"),
    "config.json too large": (lambda f: (f / "config.json").write_text(" " * (1 << 20) + "{}"), "more than 1048576"),
    "config.json nested": (lambda f: (f / "config.json").write_text("[" * 300_000), r"is no JSON \(maximum rec"),
    "config.json a list": (lambda f: (f / "config.json").write_text("[1]"), "holds a list, expected a dictionary"),
    "config.json a page": (lambda f: (f / "config.json").write_text("<!DOCTYPE html>"), "is a web page"),
    "a pickle": (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"a": print})), r"a pickle\?"),
    "weights cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "damaged or cut short",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_folders_are_refused(folder, name) -> None:
    spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        models.from_pretrained(folder)


def rewritten(folder: Path, change: dict[str, torch.Tensor] | None = None, **metadata: str) -> None:
    """The weights with other tensors or metadata."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **(change or {})}, path, {**safetensors_metadata(path), **metadata})


def test_weights_of_another_shape_or_model_are_refused(hub, folder) -> None:
    name = "text_encoder.bert.embeddings.word_embeddings.weight"
    rewritten(folder, {name: torch.zeros(3, 3)})
    stored(hub, folder)
    with pytest.raises(ValueError, match=rf"of another shape \({name}: \(3, 3\), expected"):
        models.from_pretrained(NAME)
    models.create("lavt_tiny").save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / "config.json", folder)
    with pytest.raises(ValueError, match=r"config\.json and model\.safetensors describe different models"):
        models.from_pretrained(folder)


def test_a_stranger_names_no_base_and_no_file(folder, monkeypatch) -> None:
    """What a repository says is not loaded from elsewhere, nor run."""
    monkeypatch.setattr(models.base.ReferringModel, "load_pretrained", lambda *_: pytest.fail("a base was loaded"))
    bases = {"text": {"source": "/etc/passwd", "tensors": 1, "sha256": "0"}}
    rewritten(folder, bases=json.dumps(bases), format="magnet_fast.model/3")
    with pytest.raises(ValueError, match="holds only what was trained; expected all weights"):
        models.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())["model"]
    config["image"] = {"kind": "timm", "name": "resnet18", "arguments": {"checkpoint_path": "/tmp/x.pth"}}
    changed(folder / "config.json", model=config)
    with pytest.raises(ValueError, match="arguments: expected what describes the network, got 'checkpoint_path'"):
        models.from_pretrained(folder)


def test_no_code_of_a_stranger_runs(model, tmp_path, monkeypatch) -> None:
    """Nor is anybody asked whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked to run code"))
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Strange: pass\n")
    classes = {"AutoConfig": "strange.Strange", "AutoTokenizer": ["strange.Strange", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": classes}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes}))
    with pytest.raises(ValueError, match="transformers finds no text encoder"):
        models.create("lavt_tiny", text={"kind": "transformers", "name": str(tmp_path)})
    with pytest.raises(ValueError, match="transformers finds no tokenizer"):
        PretrainedTokenizer(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    settings = {"model_type": "bert", "vocab_size": 50, **sizes, "attn_implementation": "kernels-community/flash-attn"}
    config = models.preset_config("lavt_tiny", text={"kind": "transformers", "name": "x", "settings": settings})
    assert models.from_config(config).text_encoder.encoder.config._attn_implementation == "sdpa"
    assert not (tmp_path / "ran").exists()
