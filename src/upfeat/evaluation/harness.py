"""Scoring of a list of upsamplers on a folder of data: the table of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from upfeat.backbones import Backbone, load_backbone
from upfeat.bounds import path_of
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.data.folders import Dataset, Problem, check_not_empty
from upfeat.evaluation.data.prepared import OnStep, PreparedSet, prepare
from upfeat.evaluation.differences import find_differences
from upfeat.evaluation.named import Named, load_methods
from upfeat.evaluation.passes import EARLY
from upfeat.evaluation.report.pictures import encode_photo
from upfeat.evaluation.results import Results, RowStore
from upfeat.evaluation.task import Task
from upfeat.guided import early_by_default
from upfeat.loading import default_upsampler
from upfeat.machine import find_device
from upfeat.provenance import digest, identify_backbone, versions
from upfeat.upsamplers import create_upsampler

BASELINES = (
    "nearest",
    "bilinear",
    "bicubic",
    "joint_bilateral",
    "jbu_stack",
    "neighbourhood",
)
"""Upsamplers in every default comparison, to which the backbone's default upsampler is added."""


def score(
    task: type[Task],
    folder: str | Path,
    out: str | Path,
    *,
    upsamplers: Named | Sequence[Named] | None,
    backbone: str | Backbone | None,
    config: EvalConfig | None,
    layout: str,
    device: str | torch.device,
    on_step: OnStep | None,
) -> Results:
    """Score upsamplers as :func:`upfeat.evaluation.evaluate` does, but without writing its files.

    The arguments are those of that function; ``out/cache`` is written.
    """
    config = config or EvalConfig()
    network = _load_backbone(task, backbone, find_device(device))
    if config.size < network.stride:
        raise ValueError(
            f"size={config.size} must be at least the stride of {network.name} ({network.stride})"
        )
    out = path_of("out", out)
    cache = out / "cache"
    if upsamplers is None:
        named = default_upsampler(network)
        upsampler = create_upsampler(named, network.embed_dim, backbone=network.name)
        best = upsampler.name
        if not upsampler.wants_hidden and early_by_default(network):
            best += EARLY
        upsamplers = tuple(dict.fromkeys((*BASELINES, best)))
    methods = load_methods(upsamplers, network, cache)
    dataset = _read_dataset(task, path_of("folder", folder), layout, config)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror})") from None
    parts = _prepare_splits(dataset, Path(folder), network, config, cache, on_step)
    evaluation = task(parts, dataset, network, config, on_step)
    results = Results(
        task.name(),
        {
            "name": dataset.name,
            "layout": layout,
            "classes": dataset.classes,
            **_facts(parts),
            **dataset.facts,
        },
        {"name": network.name, "weights": digest(network), "stride": network.stride},
        config.to_json(),
        rows=[],
        problems=[],
        versions={**versions(__name__, task.__module__), "device": str(network.mean.device)},
    )
    recipe = {"task": results.task, "data": results.data, "backbone": identify_backbone(network)}
    settings = {"config": results.settings, "versions": results.versions}
    store = RowStore(cache, {**recipe, **settings})
    for label, method in methods.items():
        rows = store.load(label, method.identity)
        if rows is None:
            rows = evaluation.rows(label, method)
            store.save(label, method.identity, rows)
        results.rows += rows
    if not results.rows:
        raise ValueError(
            f"protocols={config.protocols} suit none of the upsamplers {', '.join(methods)}; give "
            f"others of {', '.join(task.protocols)}"
        )
    better = {name: task.scores[name].higher_is_better for name in task.compared}
    found = find_differences(results.rows, task.scores_of, better) if better else []
    results.differences = [one.to_json() for one in found]
    results.problems = dataset.problems + evaluation.problems
    results.examples = _examples(evaluation)
    return results


def _facts(parts: dict[str, PreparedSet]) -> dict[str, dict[str, str | int]]:
    return {name: {"images": len(part), "digest": part.digest} for name, part in parts.items()}


def _examples(task: Task) -> dict[str, dict[str, str]]:
    """Return the pictures that all rows share, image and target, by sample name."""
    examples = {}
    if task.pictures is None:
        return examples
    for index in task.choose_pictures():
        sample = task.test[index]
        example = {"image": f"data:image/jpeg;base64,{encode_photo(sample.image)}"}
        target = task.draw_target(sample)
        if target is not None:
            example["target"] = target
        examples[sample.name] = example
    return examples


def _read_dataset(task: type[Task], folder: Path, layout: str, config: EvalConfig) -> Dataset:
    dataset = task.read(folder, layout, config)
    task.limit(dataset, config)
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
        found = [sample for sample in samples if sample.name in usable]
        broken = dict.fromkeys(sample.unit for sample in samples if sample.name not in usable)
        groups = {sample.group for sample in samples}
        reason = "is left out, because one of its frames cannot be used"
        dataset.problems += [Problem(unit, reason) for unit in broken if unit in groups]
        places = [at for at, sample in enumerate(found) if sample.unit not in broken]
        setattr(dataset, name, [found[at] for at in places])
        prepared[name] = part.subset(places)
    check_not_empty(dataset, folder)
    if "train" in prepared:
        dataset.problems += _shared(prepared["train"], prepared["test"])
    return prepared


def _shared(train: PreparedSet, test: PreparedSet) -> list[Problem]:
    """List the test images that are in train, too: files are named by their content."""
    known = dict(zip(train.files, train.names, strict=True))
    reason = "is in the training split, too ({}), so its score is not that of an unseen image"
    return [
        Problem(name, reason.format(known[path]))
        for name, path in zip(test.names, test.files, strict=True)
        if path in known
    ]


def _load_backbone(
    task: type[Task], backbone: str | Backbone | None, device: torch.device
) -> Backbone:
    network = task.adapt(load_backbone(backbone or task.default_backbone))
    return network.eval().requires_grad_(False).to(device)
