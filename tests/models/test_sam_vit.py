"""SAM's image encoder against transformers' own, its weights in every layout, and fine-tuning beside them."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SamModel

from magnet_fast import models
from magnet_fast.models.config import part_kinds
from magnet_fast.models.encoders.sam_vit import SamVit
from magnet_fast.models.encoders.sam_weights import read_sam
from magnet_fast.models.tuning import LowRank, merge
from tests.models.cases import batch, open_gates
from tests.models.sam import IMAGE, SIDE, WIDTH, own_names, their_sam


def encoder(**changes: object) -> SamVit:
    torch.manual_seed(1)
    models.list_models()  # registers the parts
    return part_kinds("image")["sam_vit"](**{**IMAGE, **changes}).build().eval()


def maps(ours: SamVit, image: Tensor) -> list[Tensor]:
    stream, found = ours.start(image), []
    for i in range(len(ours.channels)):
        found.append(ours.stage(i, stream))
        stream = ours.descend(i, found[-1])
    return found


@torch.no_grad()
def their_maps(sam: SamModel, image: Tensor) -> list[Tensor]:
    """After layers 1, 2 and 3, of SAM's own layers on a patch map of any size."""
    vision, found = sam.vision_encoder, []
    x = vision.patch_embed.projection(image).permute(0, 2, 3, 1)
    table = vision.pos_embed.permute(0, 3, 1, 2)
    if x.shape[1:3] != table.shape[2:]:
        table = F.interpolate(table, size=x.shape[1:3], mode="bicubic", align_corners=False)
    x = x + table.permute(0, 2, 3, 1)
    for layer in vision.layers:
        x = layer(x)
        found.append(x)
    return found[1:]


@pytest.fixture(scope="module")
def sam() -> SamModel:
    return their_sam()


def test_taps_are_transformers(sam: SamModel) -> None:
    image = torch.randn(2, 3, SIDE, SIDE)
    ours = encoder()
    ours.load_sam(sam.state_dict(), "SAM")
    with torch.no_grad():
        found, expected = maps(ours, image), sam.vision_encoder(image, output_hidden_states=True).hidden_states
    assert len(found) == 3
    for one, other in zip(found, expected[-3:], strict=True):
        assert one.shape == (2, SIDE // 16, SIDE // 16, WIDTH)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kept", "size"), [(SIDE, (160, 160)), (SIDE, (64, 112)), (160, (160, 160))], ids=str)
def test_other_sizes_resize_the_tables(sam: SamModel, kept: int, size: tuple[int, int]) -> None:
    """As SAM's own attention does with its tables; loaded for 160 × 160 and run so, nothing is left to resize."""
    ours = encoder(image_size=kept)
    ours.load_sam(sam.state_dict(), "SAM")
    assert ours.layers[1].attention.rel_height.shape[0] == 2 * (kept // 16) - 1
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        for one, other in zip(maps(ours, image), their_maps(sam, image), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_images_are_padded_to_whole_patches() -> None:
    ours, image = encoder(), torch.randn(1, 3, 50, 33)
    with torch.no_grad():
        for one, other in zip(maps(ours, image), maps(ours, F.pad(image, (0, 15, 0, 14))), strict=True):
            assert one.shape == (1, 4, 3, WIDTH) and torch.equal(one, other)


@pytest.mark.parametrize("form", ["folder", "file", "own code"])
def test_layouts_of_weights(sam: SamModel, form: str, tmp_path: Path) -> None:
    if form == "folder":
        sam.save_pretrained(tmp_path)
        source = tmp_path
    else:
        state = {k: v for k, v in sam.state_dict().items() if "prompt_encoder.shared_embedding" not in k}
        source = tmp_path / "sam.pth"
        torch.save(own_names(state) if form == "own code" else state, source)
    ours = encoder(tuning="lora")
    ours.load_pretrained(str(source))
    theirs = sam.state_dict()
    for name, other in {
        "patch_embed.weight": "patch_embed.projection.weight", "positions": "pos_embed",
        "layers.2.attention.qkv.bias": "layers.2.attn.qkv.bias", "layers.3.mlp.fc2.weight": "layers.3.mlp.lin2.weight",
        "layers.0.norm2.weight": "layers.0.layer_norm2.weight", "layers.1.attention.rel_width":
        "layers.1.attn.rel_pos_w", "layers.0.attention.proj.weight": "layers.0.attn.proj.weight",
    }.items():  # fmt: skip
        assert torch.equal(ours.state_dict()[name], theirs[f"vision_encoder.{other}"]), name
    found = read_sam(str(source))
    assert found.keys() >= {k for k in theirs if "prompt_encoder.shared_embedding" not in k}
    assert all(torch.equal(found[k], theirs[k]) for k in theirs if k in found)


def test_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ours = encoder()
    with pytest.raises(ValueError, match="no published SAM has embed_dim 48: name weights with pretrained="):
        ours.load_pretrained(None)
    with pytest.raises(ValueError, match="image weights 'nobody/sam' could not be loaded.*neither network nor cache"):
        ours.load_pretrained("nobody/sam")
    with pytest.raises(ValueError, match="the folder holds no model.safetensors"):
        ours.load_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="no such file"):
        ours.load_pretrained(str(tmp_path / "sam.pth"))
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="hold no image encoder of SAM's"):
        ours.load_pretrained(str(tmp_path / "other.safetensors"))
    save_file(their_sam().vision_encoder.state_dict(prefix="vision_encoder."), tmp_path / "vision.safetensors")
    with pytest.raises(ValueError, match="does not fit SamVit"):
        encoder(embed_dim=96).load_pretrained(str(tmp_path / "vision.safetensors"))
    ours.load_pretrained(str(tmp_path / "vision.safetensors"))  # transformers' SamVisionModel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide embed_dim=48"),
        ({"taps": (1, 2)}, r"taps=\(1, 2\); expected layers in order, each once, the last one 3"),
        ({"taps": (2, 1, 3)}, "expected layers in order"),
        ({"global_layers": (1, 4)}, r"global_layers=\(1, 4\); expected layers from 0 to 3"),
        ({"image_size": 100}, "multiple of 16"),
    ],
)
def test_sizes_that_do_not_go_together(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(**changes)


@pytest.mark.parametrize("tuning", ["lora", "adapter", "frozen", "full"])
def test_tuning_at_the_start(sam: SamModel, tuning: str) -> None:
    """What is trained, and that it starts as SAM exactly."""
    ours, plain, image = encoder(tuning=tuning), encoder(tuning="full"), torch.randn(1, 3, SIDE, SIDE)
    for each in (ours, plain):
        each.load_sam(sam.state_dict(), "SAM")
    with torch.no_grad():
        for one, other in zip(maps(ours, image), maps(plain, image), strict=True):
            assert torch.equal(one, other)
    trained = {name: p.numel() for name, p in ours.named_parameters() if p.requires_grad}
    counts = {
        "lora": len(ours.layers) * 2 * (8 * WIDTH * 2),
        "adapter": len(ours.layers) * (2 * 64 * WIDTH + 64 + WIDTH),
        "frozen": 0,
        "full": sum(p.numel() for p in plain.parameters()),
    }
    assert sum(trained.values()) == counts[tuning]
    if tuning in ("lora", "adapter"):
        assert all(tuning in name for name in trained)
        open_gates(ours)
        sum(x.square().sum() for x in maps(ours, image)).backward()
        assert all(p.grad.abs().sum() > 0 for p in ours.parameters() if p.requires_grad)
        assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


def test_lora_is_its_formula_and_peft() -> None:
    """peft has one A for the whole projection: ours are two blocks of it, of twice the rank."""
    torch.manual_seed(0)
    width, rank, alpha = 12, 4, 6.0
    qkv, ours, x = nn.Linear(width, 3 * width), LowRank(width, rank, alpha), torch.randn(2, 5, width)
    for up in (ours.query_up, ours.value_up):
        nn.init.normal_(up.weight)
    holder = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)})
    holder.load_state_dict({"qkv.weight": qkv.weight, "qkv.bias": qkv.bias})
    config = LoraConfig(r=2 * rank, lora_alpha=2 * alpha, target_modules=["qkv"])
    theirs = inject_adapter_in_model(config, holder)["qkv"]
    theirs.lora_A["default"].weight.data = torch.cat([ours.query_down.weight, ours.value_down.weight])
    up = torch.zeros(3 * width, 2 * rank)
    up[:width, :rank], up[2 * width :, rank:] = ours.query_up.weight.data, ours.value_up.weight.data
    theirs.lora_B["default"].weight.data = up
    found = ours(x, qkv(x))
    torch.testing.assert_close(found, theirs(x))
    change = alpha / rank * torch.cat(
        [ours.query_up.weight @ ours.query_down.weight, torch.zeros(width, width),
         ours.value_up.weight @ ours.value_down.weight]
    )  # fmt: skip
    torch.testing.assert_close(found, F.linear(x, qkv.weight + change, qkv.bias))
    ours.fold(qkv)
    torch.testing.assert_close(qkv(x), found)


def test_merged_equals_unmerged(tmp_path: Path) -> None:
    """Also after saving and loading; and what has no LoRA is refused."""
    model = models.create("lavt_tiny", image=IMAGE).eval()
    open_gates(model)
    image, text = batch((SIDE, SIDE))
    with torch.no_grad():
        before = model(image, text).mask
        assert merge(model) is model and model.config.image.tuning == "frozen"
        assert not any("lora" in name for name in model.state_dict())
        torch.testing.assert_close(model(image, text).mask, before, rtol=1e-4, atol=1e-4)
        models.save(model, tmp_path / "merged.safetensors")
        again = models.load(tmp_path / "merged.safetensors")
        assert torch.equal(again(image, text).mask, model(image, text).mask)
    with pytest.raises(ValueError, match="image encoder has tuning 'frozen'; expected 'lora'"):
        merge(model)
    with pytest.raises(ValueError, match="tuning None; expected 'lora'"):
        merge(models.create("lavt_tiny"))
