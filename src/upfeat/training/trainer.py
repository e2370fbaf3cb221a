"""Training step, and the state that carries over to the next step."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from upfeat.backbones import Backbone
from upfeat.machine import exact_dtype
from upfeat.normalization import IMAGENET, Normalization
from upfeat.optimisers import NAdam
from upfeat.randomness import derive, global_stream, stream
from upfeat.registry import unknown_name
from upfeat.tensor_checks import check_values
from upfeat.training.checkpoint import check_weights
from upfeat.training.config import TrainConfig
from upfeat.training.objective import Objective, ViewBatch, make_batch, measure_unit
from upfeat.training.processes import Processes
from upfeat.training.recipes import recipe_for
from upfeat.training.validation import normalised
from upfeat.upsamplers import Upsampler, create_upsampler
from upfeat.upsamplers.base import UPSAMPLERS

_LEAST_STD = 0.05
"""Smallest ``std`` of a normalisation in which upsamplers are trained."""


class Trainer:
    """Upsampler, downsamplers, uncertainties and optimiser of a training, with its progress.

    Attributes:
        upsampler: upsampler that is trained.
        objectives: an objective for each backbone; all share the upsampler.
        step: number of steps done.
        best: step, scores and weights of the best validation; empty before the first validation.
        stale: number of validations since the best.
    """

    def __init__(
        self, backbones: Sequence[Backbone], config: TrainConfig, processes: Processes
    ) -> None:
        """Create the upsampler and the objectives, with initial weights drawn from the seed.

        Args:
            backbones: frozen backbones, in eval mode, on the processes' device.
            config: settings of the run.
            processes: processes that divide each step among them.

        Raises:
            FileNotFoundError: the upsampler is a path that does not exist.
            ValueError: the upsampler does not suit these backbones, images are smaller than two
                cells of a backbone, or the batch cannot be divided evenly.
        """
        self.backbones, self.config, self.processes = list(backbones), config, processes
        self.shares = _shares(config, processes)
        _check_size(config, self.backbones)
        self.upsampler = new_upsampler(config, self.backbones)
        self.recipe = recipe_for(self.upsampler, config)
        self.recipe.start()
        _freeze(self.upsampler, config.frozen)
        self.objectives = nn.ModuleList(
            Objective(
                self.upsampler,
                backbone.embed_dim,
                backbone.stride,
                config,
                unit=measure_unit(backbone, config.size),
                generator=stream(config.seed, "initial objective", index),
            )
            for index, backbone in enumerate(self.backbones)
        ).to(processes.device)
        self.objectives.train()
        self.parameters = [one for one in self.objectives.parameters() if one.requires_grad]
        self.optimizer = NAdam(self.parameters, lr=config.learning_rate)
        self.step = 0
        self.best: dict[str, Any] = {}
        self.stale = 0

    def cautions(self) -> list[str]:
        """Return warnings about allowed settings that are seldom intended, a line each."""
        return self.recipe.cautions()

    @property
    def finished(self) -> bool:
        """Return whether all steps are done, or ``patience`` validations brought no improvement."""
        patience = self.config.patience
        return self.step >= self.config.steps or (patience is not None and self.stale >= patience)

    def objective(self, index: int) -> Objective:
        """Return the objective of a backbone."""
        return cast(Objective, self.objectives[index])

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        if self.config.schedule == "constant":
            return self.config.learning_rate
        share = self.step / self.config.steps
        return self.config.learning_rate * (1 + math.cos(math.pi * share)) / 2

    def train_step(
        self, parts: Sequence[Tensor], names: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        """Run one step.

        Args:
            parts: this process's images, (part, 3, S, S) uint8, one entry for each accumulated
                part.
            names: names of the images in ``parts``, for error messages.

        Returns:
            The loss and its terms, means over all processes.

        Raises:
            ValueError: features, loss or gradients contain NaN or infinity. Weights are unchanged.
        """
        index = self.draw_backbone()
        self.optimizer.zero_grad(set_to_none=True)
        faults: list[str] = []
        totals: dict[str, Tensor] = {}
        for part, (images, own_names) in enumerate(zip(parts, names, strict=True)):
            try:
                terms = self._backward(index, part, images, own_names)
            except _NotFinite as fault:
                faults.append(str(fault))
                continue
            for name, value in terms.items():
                share = value.detach().to(exact_dtype(value.device)) / len(parts)
                totals[name] = totals[name] + share if name in totals else share
        self._stop_if(faults)
        self.processes.average_gradients(self.parameters)
        losses = self.processes.mean(torch.stack(list(totals.values())))
        unit = self.objective(index).unit
        self._update([name for own_names in names for name in own_names], unit)
        target = self.objective(index).detail_target
        if target is not None:
            target.absorb(self.processes.mean)
        self.step += 1
        return dict(zip(totals, losses.tolist(), strict=True))

    def draw_backbone(self) -> int:
        """Draw the index of the next step's backbone."""
        draw = stream(self.config.seed, "backbone", self.step)
        return int(torch.randint(len(self.backbones), (), generator=draw))

    def _backward(
        self, index: int, part: int, images: Tensor, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Add the gradient of one part; return the part's losses."""
        backbone, config, device = self.backbones[index], self.config, self.processes.device
        # Random draws depend on the number of the part among the parts of all processes.
        place = config.seed, self.step, part * self.processes.count + self.processes.rank
        batch = self._look(backbone, normalised(images, backbone), place)
        finite = torch.isfinite(batch.features).flatten(1).all(1)
        finite &= torch.isfinite(batch.targets).transpose(0, 1).flatten(1).all(1)
        if not bool(finite.all()):
            bad = [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]
            raise _NotFinite(f"features of {backbone.name}", bad)
        with global_stream(device, "dropout", *place):
            terms = self.objective(index)(batch, stream("loss", *place))
        if not bool(torch.isfinite(terms["loss"])):
            raise _NotFinite("loss", names)
        (terms["loss"] / config.accumulate).backward()
        return terms

    def _look(self, backbone: Backbone, images: Tensor, place: tuple[int, ...]) -> ViewBatch:
        """Run the backbone on the images and their views, in the configured precision."""
        device = self.processes.device
        half = self.config.precision == "bf16" or (
            self.config.precision == "auto" and device.type == "cuda"
        )
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            draws = stream("views", *place)
            batch = make_batch(backbone, images, self.config, draws, upsampler=self.upsampler)
        enlarged = None if batch.enlarged is None else batch.enlarged.float()
        return batch._replace(
            features=batch.features.float(), targets=batch.targets.float(), enlarged=enlarged
        )

    def _stop_if(self, faults: list[str]) -> None:
        """Raise the same ValueError in all processes if one of them has faults."""
        count = torch.tensor([float(len(faults))], device=self.processes.device)
        if float(self.processes.mean(count)) == 0:
            return
        found = [fault for own in self.processes.gather(faults) for fault in own]
        raise ValueError(f"step {self.step + 1}: {'; '.join(dict.fromkeys(found))}")

    def _update(self, names: Sequence[str], unit: float) -> None:
        # Constants are in the unit of the features; NAdam changes them in the objective's unit.
        constants = [one for one in self.upsampler.constants if one.grad is not None]
        for one in constants:
            assert one.grad is not None
            one.grad.mul_(unit)
        gradients = [one.grad for one in self.parameters if one.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(norm)):
            self._stop_if([str(_NotFinite("gradient", names))])
        if self.step < self.config.clip_steps:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.no_grad():
            for one in constants:
                one.div_(unit)
            self.optimizer.step()
            for one in constants:
                one.mul_(unit)

    def judge(self, scores: dict[str, float]) -> bool:
        """Record a validation; return whether it is the best so far."""
        if self.best and scores["error"] >= self.best["scores"]["error"]:
            self.stale += 1
            return False
        weights = copy.deepcopy(self.upsampler.state_dict())
        self.best = {"step": self.step, "scores": scores, "weights": weights}
        self.stale = 0
        return True

    def finish(self) -> None:
        """Load the weights of the best validation, if any, and apply the recipe's last changes."""
        if self.best:
            self.upsampler.load_state_dict(self.best["weights"])
        self.recipe.finish()

    def state(self) -> dict[str, Any]:
        """Return everything on which further steps depend, except configuration and data.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        for name, weight in self.objectives.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"step {self.step}: {name} holds NaN or infinity")
        return {
            "step": self.step,
            "objectives": self.objectives.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "stale": self.stale,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that a state read from a file is one that :meth:`load_state` can restore.

        Raises:
            ValueError: weights or moments are missing, unknown, of another shape, or beyond sense.
        """
        check_weights("objectives", state["objectives"], self.objectives.state_dict())
        own = {name: one for name, one in state["objectives"].items() if ".upsampler." in name}
        check_values("objectives", own, magnitudes=self.upsampler.magnitudes)
        if state["best"]:
            check_weights("best", state["best"].get("weights"), self.upsampler.state_dict())
            check_values("best", state["best"]["weights"], magnitudes=self.upsampler.magnitudes)
            if not isinstance(state["best"].get("scores"), dict):
                raise ValueError("best lacks scores")
        groups, moments = (state["optimizer"].get(name) for name in ("param_groups", "state"))
        if not isinstance(groups, list) or not isinstance(moments, dict):
            raise ValueError("optimizer lacks param_groups or state")
        own = self.optimizer.state_dict()["param_groups"]
        if [one["params"] for one in groups] != [one["params"] for one in own]:
            raise ValueError("optimizer is of other weights")
        for index, weight in enumerate(self.parameters):
            for name, value in moments.get(index, {}).items():
                if isinstance(value, Tensor) and value.shape not in ((), weight.shape):
                    raise ValueError(f"optimizer.{index}.{name} is {tuple(value.shape)}")

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state that :meth:`state` returned."""
        self.objectives.load_state_dict(state["objectives"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.stale = state["step"], state["best"], state["stale"]


class _NotFinite(Exception):
    """NaN or infinity in a quantity, with the names of the photographs that caused it."""

    def __init__(self, what: str, names: Sequence[str]) -> None:
        super().__init__(f"NaN or infinity in the {what}, from {', '.join(names)}")


def new_upsampler(config: TrainConfig, backbones: Sequence[Backbone]) -> Upsampler:
    """Create the upsampler to train, with initial weights drawn from the seed, or saved ones.

    An upsampler with an option ``embed_dim`` gets the channels of a single backbone; for several
    backbones the option is left at its default, which suits any number of channels.

    Raises:
        FileNotFoundError: the upsampler is a path that does not exist.
        ValueError: there is no such upsampler, its options or channels do not fit, or views do not
            train it.
    """
    cls = UPSAMPLERS.get(config.upsampler)
    saved = _saved(config) if cls is None else None
    if getattr(cls or saved, "wants_hidden", False):
        raise ValueError(
            f"upsampler={config.upsampler!r} is not taught by views but by "
            "benchmarks/learn_early.py; train detail or neighbourhood"
        )
    if cls is None:
        assert saved is not None
        upsampler = saved
    else:
        upsampler = _initial(cls, dict(config.upsampler_options), config.seed, backbones)
    expected = getattr(upsampler, "embed_dim", None)
    for backbone in backbones:
        if expected not in (None, backbone.embed_dim):
            raise ValueError(
                f"upsampler expects {expected} channels but {backbone.name} has "
                f"{backbone.embed_dim}; train one with embed_dim=None"
            )
    if upsampler.normalization is None:
        upsampler.mean, upsampler.std = _common_normalization(backbones)
    return upsampler


def _common_normalization(backbones: Sequence[Backbone]) -> Normalization:
    """Return the normalisation of the backbones if all have the same one, else ImageNet's.

    ImageNet's is also returned for a very small ``std``, such as that of a backbone for images in
    [0, 255]: normalised colours would be far from order 1, for which initial weights are meant.
    """
    first, *rest = {backbone.normalization for backbone in backbones}
    return IMAGENET if rest or min(first.std) < _LEAST_STD else first


def _saved(config: TrainConfig) -> Upsampler:
    """Load weights to start from: shipped ones by their full name, a folder, or a checkpoint."""
    upsampler = create_upsampler(config.upsampler)
    if config.upsampler_options:
        raise ValueError(
            f"upsampler_options={dict(config.upsampler_options)} are for the name of a class; "
            f"{config.upsampler} is saved weights"
        )
    upsampler.trained_for = None
    if upsampler.origin is not None:
        upsampler.origin = f"trained from {upsampler.origin.removeprefix('trained from ')}"
    return upsampler


def _initial(
    cls: type[Upsampler], options: dict[str, Any], seed: int, backbones: Sequence[Backbone]
) -> Upsampler:
    accepted = list(inspect.signature(cls).parameters)
    for option in options:
        if option not in accepted:
            raise ValueError(f"upsampler_options: {unknown_name('option', option, accepted)}")
    if "embed_dim" in accepted and len(backbones) == 1:
        options = {"embed_dim": backbones[0].embed_dim, **options}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "initial upsampler"))
        return cls(**options)


def _check_size(config: TrainConfig, backbones: Sequence[Backbone]) -> None:
    """Refuse images of a single cell: their features have no variance to scale errors by."""
    for backbone in backbones:
        if config.size < 2 * backbone.stride:
            raise ValueError(
                f"size={config.size} is less than two cells of {backbone.name} (stride "
                f"{backbone.stride}); give at least {2 * backbone.stride}"
            )


def _freeze(upsampler: Upsampler, parts: Sequence[str]) -> None:
    """Freeze the named parts of the upsampler, and train all others."""
    names = [name for name, _ in upsampler.named_parameters()]
    for part in parts:
        if not any(name == part or name.startswith(f"{part}.") for name in names):
            known = sorted({name.partition(".")[0] for name in names})
            raise ValueError(f"frozen: {unknown_name('part', part, known)}")
    for name, parameter in upsampler.named_parameters():
        frozen = any(name == part or name.startswith(f"{part}.") for part in parts)
        parameter.requires_grad_(not frozen)


def _shares(config: TrainConfig, processes: Processes) -> list[slice]:
    """Return the slices of a step's batch that are this process's parts, in order."""
    parts = config.accumulate * processes.count
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} cannot be divided evenly over {processes.count} "
            f"processes × accumulate={config.accumulate}; give a multiple of {parts}"
        )
    size = config.batch_size // parts
    numbers = range(processes.rank, parts, processes.count)
    return [slice(number * size, (number + 1) * size) for number in numbers]
