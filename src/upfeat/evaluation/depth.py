"""The depth probe: how well a linear map of upsampled features tells near from far.

Predictions are aligned to each test image's depth by scale and shift before they are scored: the
probe is trained up to both (see :func:`upfeat.evaluation.probe.fit_depth`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from upfeat.evaluation.cost import measure
from upfeat.evaluation.metrics import align_depth, depth_errors, depth_scores
from upfeat.evaluation.pictures import encode_values
from upfeat.evaluation.prepared import Prepared, guidance_of
from upfeat.evaluation.probe import Head, Pixels, fit_depth, head_map
from upfeat.evaluation.probing import Probing
from upfeat.evaluation.provenance import digest
from upfeat.evaluation.results import Row
from upfeat.upsamplers import Upsampler


class Depth(Probing):
    """One dataset's depth probes and scores, for any number of upsamplers."""

    def usable(self, target: Tensor) -> Tensor:
        """See :meth:`Probing.usable`."""
        return torch.isfinite(target)

    def fit_head(self, pixels: Pixels, generator: torch.Generator) -> Head:
        """See :meth:`Probing.fit_head`."""
        return fit_depth(pixels, generator)

    def rows(self, label: str, upsampler: Upsampler) -> list[Row]:
        """See :meth:`Task.rows`; fits its probes first."""
        protocols = [name for name in self.config.protocols if name != "probabilities"]
        heads = self.heads(label, upsampler, protocols)
        sums = {name: torch.zeros(self.config.seeds, 4, dtype=torch.float64) for name in heads}
        pictures: dict[str, dict[str, str]] = {name: {} for name in heads}
        chosen = set(self.config.choose_pictures(len(self.test)))
        stacked = Head.cat([head for group in heads.values() for head in group])
        for index, sample in enumerate(self.test):
            self.on_step(f"{label}: test", index, len(self.test))
            maps, depth = self._predict(upsampler, sample, stacked).cpu(), sample.label.cpu()
            for name, group in zip(heads, maps.split(self.config.seeds), strict=True):
                aligned = [align_depth(predicted, depth) for predicted in group]
                sums[name] += torch.stack([depth_errors(each, depth) for each in aligned])
                if index in chosen:
                    bounds = depth_range(depth)
                    pictures[name][sample.name] = encode_values(aligned[0], *bounds)
        self.on_step(f"{label}: test", len(self.test), len(self.test))
        cost, drift = measure(upsampler, self.test, self.backbone)
        rows = []
        for name in heads:
            each = [depth_scores(seed) for seed in sums[name]]
            scores = {key: [found[key] for found in each] for key in each[0]} | {"drift": [drift]}
            rows.append(Row(label, name, digest(upsampler), scores, {}, cost, pictures[name]))
        return rows

    @torch.no_grad()
    def _predict(self, upsampler: Upsampler, sample: Prepared, head: Head) -> Tensor:
        """(K, H, W), one map per output of the head."""
        features = sample.features[None]
        guidance = guidance_of(sample.image, self.backbone, upsampler)
        grid = (features.shape[2], features.shape[3])
        kernels = upsampler.prepare(guidance, grid, sample.size, features)
        return head_map(upsampler, kernels, features, head)[0]


def depth_range(depth: Tensor) -> tuple[float, float]:
    """Nearest and farthest known depth of a map."""
    low, high = depth[torch.isfinite(depth)].aminmax()
    return float(low), float(high)
