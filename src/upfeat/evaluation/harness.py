"""From a folder and a list of upsamplers to results on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from upfeat.backbones import Backbone, load_backbone
from upfeat.evaluation.cam import CAM_BACKBONE, ClassActivation, Penultimate
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.consistency import N_FIT_IMAGES, Consistency
from upfeat.evaluation.datasets import (
    Dataset,
    check_not_empty,
    read_photographs,
    subset,
)
from upfeat.evaluation.depth import Depth, depth_range
from upfeat.evaluation.pictures import encode_indices, encode_photo, encode_values
from upfeat.evaluation.prepared import OnStep, PreparedSet, prepare
from upfeat.evaluation.provenance import digest, identify_backbone, identify_upsampler
from upfeat.evaluation.readers import read_dataset
from upfeat.evaluation.report import write_report
from upfeat.evaluation.results import Results, Row, RowStore
from upfeat.evaluation.segmentation import Segmentation
from upfeat.evaluation.task import Task
from upfeat.implicit.upsampler import ImplicitUpsampler
from upfeat.upsamplers import Upsampler, create_upsampler

TASKS = ("seg", "depth", "cam", "consistency")

DEFAULT_BACKBONE = "efficientnet_lite0"

BASELINES = (
    "nearest",
    "bilinear",
    "bicubic",
    "joint_bilateral",
    "jbu_stack",
    "neighbourhood",
)
"""What every comparison holds; a backbone with a better default of its own gets that as well."""


def evaluate(
    task: str,
    folder: str | Path,
    out: str | Path,
    *,
    upsamplers: Sequence[str] | None = None,
    backbone: str | Backbone | None = None,
    config: EvalConfig | None = None,
    layout: str = "folder",
    device: str | torch.device = "cpu",
    on_step: OnStep | None = None,
) -> Results:
    """Compare upsamplers on a dataset; write ``results.json`` and ``report.html``.

    What is already in ``out`` from an interrupted run with the same data, weights and settings is
    used again.

    Args:
        task: one of :data:`TASKS`.
        folder: the data: photographs with labels (``seg``) or depth maps (``depth``), or
            photographs alone.
        out: folder for results, made if need be; ``out/cache`` holds prepared images and finished
            rows, and may be deleted afterwards.
        upsamplers: names, folders or checkpoints, as ``upfeat.load`` takes them; and "implicit",
            which fits every image. ``None`` for :data:`BASELINES` and the backbone's default.
        backbone: its features are upsampled; ``None`` for ``efficientnet_lite0``, and for ``cam``
            at the stride that its classifier reads.
        config: settings.
        layout: how the data lies on disk: ``folder``, ``coco_stuff``, ``ade20k``, ``cityscapes``,
            ``voc`` or ``nyuv2``.
        device: where backbone, upsamplers and probes run. Digits repeat on the CPU; elsewhere they
            may differ in the last places.
        on_step: is told of progress.

    Raises:
        FileNotFoundError: the data or an upsampler is not there.
        ValueError: nothing can be scored, an argument is wrong, or ``out`` cannot be written.
    """
    if task not in TASKS:
        raise ValueError(f'task="{task}" is unknown; known: {", ".join(TASKS)}')
    config = config or EvalConfig()
    network = _load_backbone(task, backbone, checked_device(device))
    out, cache = Path(out), Path(out) / "cache"
    if upsamplers is None:
        best = create_upsampler(None, network.embed_dim, backbone=network.name).name
        upsamplers = tuple(dict.fromkeys((*BASELINES, best)))
    models = _load_upsamplers(upsamplers, network, cache)
    dataset = _read_dataset(task, Path(folder), layout, config)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror})") from None
    parts = _prepare_splits(dataset, Path(folder), network, config, cache, on_step)
    evaluation = _task(task, parts, dataset, network, config, on_step)
    results = Results(
        task,
        {"name": dataset.name, "layout": layout, "classes": dataset.classes, **_facts(parts)},
        {"name": network.name, "weights": digest(network), "stride": network.stride},
        config.to_json(),
        rows=[],
        problems=[],
    )
    results.versions["device"] = str(network.mean.device)
    recipe = {"task": task, "data": results.data, "backbone": identify_backbone(network)}
    settings = {"config": results.settings, "versions": results.versions}
    store = RowStore(cache, {**recipe, **settings})
    for label, upsampler in models.items():
        results.rows += _stored(store, label, upsampler, evaluation.rows)
    results.problems = dataset.problems + evaluation.problems
    results.examples = _examples(task, parts["test"], config)
    results.write(out / "results.json")
    write_report(results, out / "report.html")
    return results


def checked_device(device: str | torch.device) -> torch.device:
    """Check that tensors can be put on a device.

    Raises:
        ValueError: they cannot.
    """
    try:
        found = torch.device(device)
        float(torch.zeros(1, device=found))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f'device="{device}" cannot be used: {reason}') from None
    return found


def _task(
    task: str,
    parts: dict[str, PreparedSet],
    dataset: Dataset,
    backbone: Backbone,
    config: EvalConfig,
    on_step: OnStep | None,
) -> Task:
    if task == "seg":
        return Segmentation(parts, dataset.classes, backbone, config, on_step)
    if task == "depth":
        return Depth(parts, backbone, config, on_step)
    if task == "consistency":
        return Consistency(parts, backbone, config, on_step)
    assert isinstance(backbone, Penultimate)
    return ClassActivation(parts, backbone, config, on_step)


def _stored(
    store: RowStore,
    label: str,
    upsampler: Upsampler,
    compute: Callable[[str, Upsampler], list[Row]],
) -> list[Row]:
    key = identify_upsampler(upsampler)
    rows = store.load(label, key)
    if rows is None:
        rows = compute(label, upsampler)
        store.save(label, key, rows)
    return rows


def _facts(parts: dict[str, PreparedSet]) -> dict[str, dict[str, str | int]]:
    return {name: {"images": len(part), "digest": part.digest} for name, part in parts.items()}


def _examples(task: str, test: PreparedSet, config: EvalConfig) -> dict[str, dict[str, str]]:
    """The pictures that every row shares: image and target."""
    examples = {}
    if task == "consistency":
        return examples
    for index in config.choose_pictures(len(test)):
        sample = test[index]
        example = {"image": f"data:image/jpeg;base64,{encode_photo(sample.image)}"}
        if task == "seg":
            example["target"] = encode_indices(sample.label)
        elif task == "depth":
            encoded = encode_values(sample.label, *depth_range(sample.label))
            example["target"] = f"data:image/png;base64,{encoded}"
        examples[sample.name] = example
    return examples


def _read_dataset(task: str, folder: Path, layout: str, config: EvalConfig) -> Dataset:
    if task == "seg" or task == "depth":
        dataset = read_dataset(folder, task, layout=layout, split_seed=config.split_seed)
    else:
        fits = task == "consistency"
        dataset = read_photographs(folder, split_seed=config.split_seed if fits else None)
    limit = config.max_train
    if task == "consistency":
        limit = min(limit or N_FIT_IMAGES, N_FIT_IMAGES)
    dataset.train = subset(dataset.train, limit, seed=config.split_seed)
    dataset.test = subset(dataset.test, config.max_test, seed=config.split_seed)
    return dataset


def _prepare_splits(
    dataset: Dataset,
    folder: Path,
    backbone: Backbone,
    config: EvalConfig,
    cache: Path,
    on_step: OnStep | None,
) -> dict[str, PreparedSet]:
    prepared = {}
    for name in dataset.splits:
        samples = getattr(dataset, name)
        label = f"features: {name}"
        part = prepare(dataset, samples, backbone, config.size, cache, label=label, on_step=on_step)
        usable = set(part.names)
        setattr(dataset, name, [sample for sample in samples if sample.name in usable])
        prepared[name] = part
    check_not_empty(dataset, folder)
    return prepared


def _load_backbone(task: str, backbone: str | Backbone | None, device: torch.device) -> Backbone:
    network = load_backbone(backbone or (CAM_BACKBONE if task == "cam" else DEFAULT_BACKBONE))
    if task == "cam":
        network = Penultimate(network)
    return network.eval().requires_grad_(False).to(device)


def _load_upsamplers(names: Sequence[str], backbone: Backbone, cache: Path) -> dict[str, Upsampler]:
    """Load upsamplers under distinct labels: the name, or the last part of a path."""
    if not names:
        raise ValueError("upsamplers is empty; name at least one")
    models: dict[str, Upsampler] = {}
    for name in dict.fromkeys(names):
        if name == ImplicitUpsampler.name:
            upsampler: Upsampler = ImplicitUpsampler(backbone, cache=cache)
        else:
            upsampler = create_upsampler(name, backbone.embed_dim, backbone=backbone.name)
        expected = getattr(upsampler, "embed_dim", None)
        if expected not in (None, backbone.embed_dim):
            raise ValueError(
                f"{name} expects {expected} channels but {backbone.name} has "
                f"{backbone.embed_dim}; use an upsampler made for it, or another backbone"
            )
        label, number = Path(name).name or name, 2
        while label in models:
            label = f"{Path(name).name}-{number}"
            number += 1
        models[label] = upsampler.eval().requires_grad_(False).to(backbone.mean.device)
    return models
