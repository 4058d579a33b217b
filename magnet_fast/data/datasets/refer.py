"""Reader of REFER's layout: RefCLEF, RefCOCO, RefCOCO+, G-Ref, gRefCOCO, R-RefCOCO, embedded scenes and own data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from magnet_fast.data.datasets.base import (
    HOW_TO_NAME,
    PUT_THERE,
    BaseReader,
    Folders,
    RecordError,
    choose_folders,
    read_json,
    uncollected,
)
from magnet_fast.data.datasets.instances import Instances, Picture
from magnet_fast.data.datasets.reader import Ref, Sentence
from magnet_fast.data.safe_pickle import load_plain_pickle
from magnet_fast.data.scenes.word_kinds import WORD_KINDS, are_scenes
from magnet_fast.data.segmentation import decode_segmentation, draw_segmentation
from magnet_fast.data.values import key_names, require, require_id, shown, whole

IMAGE_FOLDERS = (
    "images/mscoco/images/train2014",  # LAVT's
    "images/mscoco/train2014",  # RefSegformer's
    "images/train2014",
    "images/saiapr_tc-12",  # RefCLEF's, in REFER's layout
)
"""Where the field keeps images, below the root. `images` itself and the folders in it follow."""

SPLITS = ("train", "val", "test", "testA", "testB", "testC")
"""The field's splits in their customary order; data may name others."""

_DEEPEST = 3  # levels of folders below `images` that are looked into

NO_TARGET = -1  # gRefCOCO's ann_id of a ref without target


class Refer(BaseReader):
    """A data set in REFER's layout, checked as it is opened.

    Reads `<root>/<dataset>/instances.json` and `refs(<split_by>).p` (or `.json`; gRefCOCO: `grefs(<split_by>)`),
    pickles only as far as they hold plain data. An image file is looked at only when it is used.

    gRefCOCO: `ann_id` may be a list, whose masks are merged; [-1] is no target, and its sentences do not exist.
    Annotations with `iscrowd` are left out, as in the released reader; a ref with nothing else is left out with them
    [our choice]. R-RefCOCO: a sentence's `exist` (bool or 0/1, absent = true) says whether it names anything.

    Left out and counted: refs without sentences, sentences without words, annotations without a polygon and refs of
    nothing else, and what stands twice, word for word. Sentences may be plain text, and need no `sent_id`.

    Args:
        root: folder of data sets and images.
        dataset: the data set's folder below.
        split_by: whose splits, as in the name of the refs file.
        images: folder or folders of images, absolute or below the root; default what instances.json notes (imported
            data), else the field's (`IMAGE_FOLDERS`), the folders in `images` that hold files, and `images` itself.

    Attributes:
        source: the refs file.
        categories: id -> name.

    Raises:
        FileNotFoundError: absent files and folders.
        ValueError: broken files. BrokenRecordsError, a ValueError, after everything is read: values of another form,
            refs that name an absent image or annotation or one of another image, ids that stand twice; named are file
            and record.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        dataset: str = "refcoco",
        split_by: str = "unc",
        *,
        images: Folders | None = None,
    ) -> None:
        self.root, self.dataset, self.split_by = Path(root), dataset, split_by
        folder = self.root / dataset
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist; expected a folder with instances.json and refs")
        super().__init__(folder, SPLITS)
        self.instances_path = folder / "instances.json"
        self._image_folders: list[Path] = []
        self._images: dict[int, Picture] = {}
        self.categories: dict[int, str] = {}
        self._parts: dict[int, list[list | dict]] = {}  # of each annotation that a ref names
        self._numbered = 0
        with uncollected():
            self._read(folder, images)
        self._close()

    @property
    def word_kinds(self) -> Mapping[str, str]:
        """Kind of each word that says something, for embedded scenes, whose words are known; else empty."""
        return WORD_KINDS if are_scenes(self.root) else {}

    def image_size(self, image_id: int) -> tuple[int, int]:
        """Height and width that instances.json gives, in pixels."""
        picture = self._image(image_id)
        return picture.height, picture.width

    def image_path(self, image_id: int) -> Path:
        """The image's file. Raises FileNotFoundError if no image folder holds it."""
        name = self._image(image_id).file_name
        for folder in self._image_folders:
            if os.path.isfile(folder / name):  # a name may be longer than a system's, which a Path is an error for
                return folder / name
        looked = " nor ".join(str(folder) for folder in self._image_folders)
        raise FileNotFoundError(
            f"image {name} (image_id {image_id}) of {self.instances_path} is not in {looked}{PUT_THERE}"
        )

    def mask(self, ref: Ref, sentence: Sentence | None = None) -> np.ndarray:
        """Ground truth uint8 (H, W) of 0 and 1: the union of the ref's annotations.

        Empty for a ref without target, and for a sentence that does not exist.
        """
        return self._union(ref, sentence, self.image_size(ref.image_id), decode_segmentation)

    def mask_at(self, ref: Ref, sentence: Sentence | None, size: tuple[int, int]) -> np.ndarray:
        """Ground truth uint8 (h, w) drawn at another size than the image's, from polygons scaled to it: ReLA's way.

        A few pixels at borders differ from those of `mask`, resized.
        """
        return self._union(ref, sentence, size, partial(draw_segmentation, size=size))

    def _union(
        self, ref: Ref, sentence: Sentence | None, size: tuple[int, int], decode: Callable[..., np.ndarray]
    ) -> np.ndarray:
        mask = np.zeros(size, dtype=np.uint8)
        if sentence is not None and not sentence.exists:
            return mask
        for ann_id in ref.ann_ids:
            try:
                mask |= decode(self._parts[ann_id], *self.image_size(ref.image_id))
            except ValueError as error:
                raise ValueError(f"{self.instances_path}: annotation {ann_id} cannot be decoded: {error}") from error
        return mask

    def _image(self, image_id: int) -> Picture:
        if image_id not in self._images:
            raise ValueError(f"image_id is {image_id!r}; {self.instances_path} does not hold it")
        return self._images[image_id]

    def _read(self, folder: Path, images: Folders | None) -> None:
        instances, records = None, []
        with self._file():
            instances = Instances(self.instances_path, self.skipped, self.doubtful)
        with self._file():
            noted = instances.image_root if instances is not None else None
            self._image_folders = _image_folders(self.root, noted if images is None else images)
        with self._file():
            self.source = _find_refs(folder, self.split_by)
            records = _read_refs(self.source)
        if instances is None:
            return
        self._images, self.categories = instances.images, instances.categories
        self._without_crowds = self.source.name.startswith("grefs")
        first: dict[int, Any] = {}
        for position, record in enumerate(records):
            with self._record():
                where, ref_id = self._require_form(position, record)
                if ref_id in first:
                    if record != first[ref_id]:
                        raise RecordError("id that stands twice", f"{where} stands more than once, with other contents")
                    self.skipped.add("the same record once more", where)
                    continue
                first[ref_id] = record
                ref = self._parse(ref_id, record, where, instances)
                if ref is not None:
                    self._keep(ref)
        instances.close()

    def _require_form(self, position: int, record: Any) -> tuple[str, int]:
        """What messages call a record, and its ref_id."""
        name = self.source.name
        if not isinstance(record, dict):
            raise ValueError(f"{name}: record {position} is {shown(record)}; expected a dict")
        where = f"{name}: ref_id {shown(record['ref_id']) if 'ref_id' in record else f'(record {position})'}"
        missing = [key for key in ("ref_id", "ann_id", "image_id", "split", "sentences") if key not in record]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}; it has {key_names(record)}")
        return where, require_id(record["ref_id"], "ref_id", where)

    def _parse(self, ref_id: int, record: dict[str, Any], where: str, instances: Instances) -> Ref | None:
        """A ref; None for one that is left out."""
        image_id = require_id(record["image_id"], "image_id", where)
        require(record, {"split": str}, where)
        if not record["split"].isprintable():
            raise ValueError(f"{where} has split {shown(record['split'])}; expected text without control characters")
        instances.require_image(image_id, where)
        named = [require_id(one, "ann_id", where) for one in _as_tuple(record["ann_id"])]
        targets = [one for one in named if one != NO_TARGET]
        if not named or len(targets) not in (0, len(named)):
            raise ValueError(f"{where} has ann_id {named}; expected annotations, or [-1] alone for no target")
        kept = self._targets(targets, image_id, where, instances)
        sentences = self._sentences(record["sentences"], where, bool(targets))
        if not sentences:
            self.skipped.add("no sentences", where)
        if not sentences or (targets and not kept):
            return None
        return Ref(
            ref_id=ref_id,
            ann_ids=kept,
            image_id=image_id,
            category_id=_category(record.get("category_id"), where),
            split=record["split"],
            sentences=sentences,
        )

    def _targets(self, ann_ids: list[int], image_id: int, where: str, instances: Instances) -> tuple[int, ...]:
        """Those of a ref's annotations that are used; what is left out is counted."""
        kept, crowds = [], 0
        for ann_id in ann_ids:
            annotation = instances.require_annotation(ann_id, image_id, where)
            crowd = self._without_crowds and instances.is_crowd(ann_id, annotation)
            crowds += crowd
            if crowd:
                continue
            if ann_id not in self._parts:
                self._parts[ann_id] = instances.parts(ann_id, annotation)
            if self._parts[ann_id]:
                kept.append(ann_id)
            else:
                self.doubtful.add(
                    "no polygon and no RLE, left out", f"{self.instances_path.name}: annotation {ann_id} ({where})"
                )
        if crowds and crowds == len(ann_ids):
            self.skipped.add("its annotations are all crowds", where)
        return tuple(kept)

    def _sentences(self, records: Any, where: str, named: bool) -> tuple[Sentence, ...]:
        """A ref's sentences, those without words left out; `named` says whether the ref has a target."""
        if records is not None and not isinstance(records, (list, tuple)):
            raise ValueError(f"{where} has sentences {shown(records)}; expected a list")
        sentences = []
        for record in records or ():
            if isinstance(record, str):
                record = {"raw": record}
            if not isinstance(record, dict) or not ("raw" in record or "sent" in record):
                raise ValueError(f"{where}: sentence {shown(record)} lacks raw")
            sent_id = whole(record.get("sent_id"))
            if sent_id is None:
                sent_id, self._numbered = self._numbered, self._numbered + 1
            sentence = _parse_sentence(record, sent_id, where, named)
            if sentence is None:
                self.skipped.add("a sentence without words", f"{where}, sent_id {sent_id}")
            else:
                sentences.append(sentence)
        return tuple(sentences)


def _read_refs(path: Path) -> list[Any]:
    content = load_plain_pickle(path) if path.suffix == ".p" else read_json(path, unique=True)
    if isinstance(content, dict) and isinstance(content.get("refs"), (list, tuple)):
        content = content["refs"]
    if not isinstance(content, (list, tuple)) or not content:
        raise ValueError(f"{path}: holds {shown(content)}; expected a list of refs, not empty")
    return list(content)


def _find_refs(folder: Path, split_by: str) -> Path:
    names = [f"{stem}({split_by}){suffix}" for stem in ("refs", "grefs") for suffix in (".p", ".json")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}")


def _image_folders(root: Path, images: Folders | None) -> list[Path]:
    """Those given, else those of the field that exist, `images` and the folders in it."""
    if images is not None:
        return choose_folders(root, images, ())
    found = [root / name for name in IMAGE_FOLDERS if (root / name).is_dir()]
    levels = 1 if found else _DEEPEST  # a look into deeper ones costs time where folders are large
    own = _with_files(root / "images", levels) if (root / "images").is_dir() else []
    found += [folder for folder in own if folder not in found]
    if not found:
        looked = " nor ".join(str(root / name) for name in (*IMAGE_FOLDERS, "images"))
        raise FileNotFoundError(f"no image folder: neither {looked} exists and holds files; name it {HOW_TO_NAME}")
    if (root / "images").is_dir() and root / "images" not in found:
        found.append(root / "images")  # for names with folders in them
    return found


def _with_files(folder: Path, levels: int) -> list[Path]:
    """A folder and those in it, down to so many levels, that hold files."""
    inner, has_files = [], False
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _is_folder(entry):
                has_files = True
                if not levels:
                    break
            elif levels:
                inner.append(Path(entry.path))
    return [folder] * has_files + [found for one in sorted(inner) for found in _with_files(one, levels - 1)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _category(value: Any, where: str) -> int | None:
    """One category; None where there is none, and where a ref's targets are of several."""
    if value is None:
        return None
    different = {require_id(one, "category_id", where) for one in _as_tuple(value) if one is not None} - {NO_TARGET}
    return different.pop() if len(different) == 1 else None


def _parse_sentence(record: dict[str, Any], sent_id: int, where: str, named: bool) -> Sentence | None:
    """A sentence; None for one without words."""
    where = f"{where}: sent_id {sent_id}"
    exist = record.get("exist", True)
    if exist not in (True, False):  # 1 and 0, too
        raise ValueError(f"{where} has exist {shown(exist)}; expected true or false")
    raw, sent = (record[key] if record.get(key) is not None else "" for key in ("raw", "sent"))
    for key, text in (("raw", raw), ("sent", sent)):
        if not isinstance(text, str):
            raise ValueError(f"{where} has {key} {shown(text)}; expected text")
    if not raw.strip() and not sent.strip():
        return None
    raw = raw if raw.strip() else sent
    sent = sent if sent.strip() else raw
    tokens = record.get("tokens")
    return Sentence(
        sent_id=sent_id,
        raw=raw,
        sent=sent,
        tokens=tuple(tokens) if isinstance(tokens, (list, tuple)) else tuple(sent.split()),
        kind=record["kind"] if isinstance(record.get("kind"), str) else None,
        exists=named and bool(exist),
    )
