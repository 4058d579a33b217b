"""The data of a run: one training set, of one or several data sets, and one for validation."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from magnet_fast.data import ExpressionDataset, MixedDataset
from magnet_fast.data.datasets import open_reader
from magnet_fast.data.phrases import PhraseDataset
from magnet_fast.data.retrieval import RetrievalDataset
from magnet_fast.evaluation.protocol import choose_truth
from magnet_fast.models.contract import InputSpec
from magnet_fast.training.config import TrainConfig


def open_readers(config: TrainConfig) -> list[Any]:
    """The configuration's data set, then those of `data.also`, with the splits that the run needs.

    Raises:
        ValueError: no folder is given, or a split that is needed is not there.
    """
    data = config.data
    if data.root is None:
        raise ValueError("data.root: no data folder given (--data ROOT, or data.root in the configuration)")
    names = [(data.dataset, data.split_by), *(tuple(name.split("/")) for name in data.also)]
    readers = [
        open_reader(data.root, dataset, split_by, images=data.images or None, format=data.format)
        for dataset, split_by in names
    ]
    check_split(readers[0], data.root, "train_split", data.train_split)
    if config.validate_every != "never":
        check_split(readers[0], data.root, "val_split", data.val_split)
    return readers


def check_split(reader: Any, root: str, key: str, split: str) -> None:
    """ValueError where the data have no such split; `key` is that of the configuration."""
    if split not in reader.splits:
        raise ValueError(f"data.{key}: {root} has no split {split!r}; it has {', '.join(reader.splits)}")


def build_datasets(
    config: TrainConfig, readers: list[Any], tokenizer: Any, spec: InputSpec, needs: Collection[str] = ()
) -> tuple[ExpressionDataset | MixedDataset | PhraseDataset, ExpressionDataset | None]:
    """The training split and, unless validation is off, the validation split.

    With `data.also` images that any of the sets holds outside its training split are trained on in none: the sets
    share COCO's images, and what one trains on may be what another is tested on.

    Args:
        needs: tensors of the context that the model needs.
    """
    data = config.data
    held_out = {
        ref.image_id
        for reader in (readers if data.also else [])
        for split in reader.splits
        if split != data.train_split
        for ref in reader.refs(split)
    }
    truth = chosen_truth(config, readers[0], spec)
    dataset_of = dataset_kind(config)
    training_set: Any
    if data.phrases is not None:
        training_set = PhraseDataset(
            readers[0],
            data.train_split,
            tokenizer,
            spec,
            seed=config.seed,
            cache=data.cache,
            **data.phrases.model_dump(),
        )
    else:
        parts = [
            dataset_of(
                reader,
                data.train_split,
                tokenizer,
                spec,
                mode=data.mode,
                seed=config.seed,
                cache=data.cache,
                cache_shared=data.workers > 0,
                without_images=held_out,
                truth=truth,
                needs=needs,
            )
            for reader in readers
        ]
        training_set = MixedDataset(parts) if data.also else parts[0]
    if config.validate_every == "never":
        return training_set, None
    original = config.resolution == "original"
    return training_set, dataset_of(
        readers[0],
        data.val_split,
        tokenizer,
        spec,
        cache=data.cache,
        cache_shared=data.workers > 0,
        original=original,
        truth=truth,
        needs=needs,
    )


def dataset_kind(config: TrainConfig) -> Callable[..., ExpressionDataset]:
    """What makes a run's data sets of readers and splits: with the pictures of `data.references`, where there are."""
    references = config.data.references
    return ExpressionDataset if references is None else partial(RetrievalDataset, references=references)


def chosen_truth(config: TrainConfig, reader: Any, spec: InputSpec) -> str:
    """`truth` of the run's data sets, for training and for validation alike."""
    return choose_truth(config.data.truth, config.protocol, reader, spec.fit)
