"""Losses between hidden states: a target of the student beside linked targets of the teacher, seen by hooks.

What a method of this kind adds is how two tensors are compared; here is where they come from, how their shapes are
brought together, and what happens to them when the student shrinks.

Channels are dim 1 of images [n, C, H, W] and the last dim of anything else. Images of two sizes meet at the smaller one
(average pooling). Of text, [n, tokens, C], only tokens that count are compared (distillation/tokens.py). Everything but
`rebase` is local, the same on every rank.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from dist_compress.distillation.losses import Divergence, divergence
from dist_compress.distillation.targets import AUTO, Setting
from dist_compress.distillation.teacher import OnlineTeacher, Teacher
from dist_compress.distillation.term import Moment, Term
from dist_compress.distillation.tokens import Tokens, tokens_of
from dist_compress.distillation.translators import Translators
from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.recompute import recomputing
from dist_compress.sites import Site, Sites, see

log = logging.getLogger(__name__)
LOST = torch.tensor([-1])  # for `kept`: a shrink changed the target beyond recognition
Compare = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # student, teacher, temperature -> [n]


class Tap:
    """Keeps the last tensor that it was shown. A copy of the model that is compressed gets an empty one."""

    def __init__(self, training: bool) -> None:
        """`training`: only what has a gradient to send counts, not evaluations in between."""
        self.training = training
        self.tensor: torch.Tensor | None = None

    def __call__(self, tensor: torch.Tensor) -> None:
        if not recomputing() and (not self.training or torch.is_grad_enabled()):
            self.tensor = tensor.clone()  # what follows may work in place

    def __deepcopy__(self, memo: Any) -> Tap:
        return Tap(self.training)

    def take(self, where: str) -> torch.Tensor:
        tensor, self.tensor = self.tensor, None
        if tensor is None:
            raise UserError(f"distillation: {where} did not run in this forward pass. Leave the target out.")
        return tensor.float()


@dataclass
class Linked:
    """A target of the teacher."""

    name: str
    site: Site
    tap: Tap
    translator: int | None = None


class LayerTerm(Term):
    """The base of the methods on hidden states. `setting` says which."""

    most_links = 1
    translates = False  # whether widths that differ are joined by a trained linear map
    needs_channels = True  # False: tensors of different widths are compared as they are

    def __init__(self, setting: Setting, options: Any) -> None:
        assert setting.method is not None
        super().__init__(f"{setting.method.rpartition('.')[2]}/{setting.name}", options)
        self.setting, self.said_lost = setting, False
        self.kept: torch.Tensor | None = None  # int64, the channels that a shrink left; None: all

    def compare(self, student: torch.Tensor, teacher: torch.Tensor, moment: Moment) -> torch.Tensor:
        """[n], of each sample (of text: of each token that counts, [n, C]), from hidden states of one width and
        size."""
        return self.compared_by(student, teacher, moment.temperature)

    def compare_tokens(
        self, student: torch.Tensor, teacher: torch.Tensor, moment: Moment, tokens: Tokens
    ) -> torch.Tensor:
        """A scalar, from hidden states [n, tokens, C] of text."""
        if not bool(tokens.valid.any()):
            return 0.0 * student.sum()
        return (self.compare(student[tokens.valid], teacher[tokens.valid], moment) * tokens.each()).sum()

    def join(self, context: Context, teacher: Teacher, sites: Sites, translators: Translators) -> None:
        """Find both sides and put the hooks there. Raises UserError naming the place in the config."""
        setting = self.setting
        where = setting.sources.get("link", setting.sources[""])
        if not isinstance(teacher, OnlineTeacher) or teacher.model is None:
            raise UserError(f"{where}: a stored teacher has no hidden states. Set distillation.teacher.mode=online.")
        assert context.example is not None
        self.compared_by = _compare_by(setting)
        self.model, self.site = context.model, sites.site(setting.module, setting.target)
        self.tap = Tap(training=True)
        self.handle = see(context.model.get_submodule(setting.module), setting.target, self.tap, setting.path)
        self._refuse_maps_of_tokens(context.example[1], where)
        args, kwargs = tree_map(teacher.cast, context.example)
        theirs = Sites(teacher.model, args, kwargs)
        if len(setting.links) > self.most_links:
            raise UserError(f"{where}.link={setting.link!r}: {setting.method} takes {self.most_links}.")
        self.linked = [self._link(name, teacher.model, theirs, where) for name in setting.links]
        for linked in self.linked:
            self._fit(linked, translators, where)
        self.translators = translators

    def _refuse_maps_of_tokens(self, inputs: dict[str, Any], where: str) -> None:
        ids, shape = inputs.get("input_ids"), self.site.shape
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and len(shape) == 4 and ids.shape[1] in shape[1:3]:
            raise UserError(
                f"{where}: {self.setting.path} is {list(shape)}: padding tokens would count in it. Compare what is "
                "[samples, tokens, channels], such as the output of a layer."
            )

    def _link(self, name: str, model: nn.Module, sites: Sites, where: str) -> Linked:
        modules = dict(model.named_modules())
        wanted, target = (self.setting.module, self.setting.target) if name == AUTO else (name, self.setting.target)
        if wanted not in modules and "._" in wanted:
            wanted, _, own = wanted.rpartition("._")
            target = f"_{own}"
        if wanted not in modules:
            close = difflib.get_close_matches(wanted, modules, n=3)
            hint = f"{'Close' if close else 'Some of its modules'}: {', '.join(close or list(modules)[1:9])}."
            raise UserError(f"{where}.link={name!r}: the teacher has no module {wanted!r}. {hint}")
        found = sites.meant(wanted, target)
        if len(found) != 1:
            raise UserError(f"{where}.link={name!r}: {wanted} has no one {target}; {sites.inventory([wanted])}")
        tap = Tap(training=False)
        see(modules[wanted], found[0].name, tap, f"the teacher's {wanted}")
        return Linked(f"{wanted}.{found[0].name}", found[0], tap)

    def _fit(self, linked: Linked, translators: Translators, where: str) -> None:
        own, theirs = self.site.shape, linked.site.shape
        middle = slice(2, None) if len(own) == 4 else slice(1, -1)  # all but samples and channels
        if len(own) != len(theirs) or len(own) != 4 and own[middle] != theirs[middle]:
            raise UserError(
                f"{where}: {self.setting.path} is {list(own)} and the teacher's {linked.name} is {list(theirs)}: no "
                "translation joins them. Link tensors with the same dims."
            )
        mine, other = own[channel_dim(own)], theirs[channel_dim(theirs)]
        if mine != other and self.translates:
            linked.translator = translators.add(other, mine)
        elif mine != other:
            self.check_widths(mine, other, linked.name, where)

    def check_widths(self, own: int, theirs: int, linked: str, where: str) -> None:
        """Raise UserError unless the method can compare `own` channels with `theirs`."""
        if self.needs_channels:
            raise UserError(
                f"{where}: {self.setting.path} has {own} channels and the teacher's {linked} {theirs}: "
                f"{self.setting.method} compares equal widths. Use fitnets or dynamic_layerwise, which translate."
            )

    def loss(self, moment: Moment, batch: dict[str, Any], output: Any, answer: Any) -> torch.Tensor:
        own, tokens = self.tap.take(self.setting.path), tokens_of(batch)
        if self.kept is LOST and self.needs_channels:
            self._say_lost()
            return 0.0 * own.sum()
        sums = []
        for linked in self.linked:
            student, teacher = smaller(own, linked.tap.take(linked.name))
            if linked.translator is not None:
                weight = self.translators.weight(linked.translator)
                student = translated(student, weight if self.kept is None else weight[:, self.kept])
            elif self.kept is not None and self.needs_channels:
                teacher = teacher.index_select(channel_dim(teacher.shape), self.kept)
            if tokens is not None and tokens.of(student) and tokens.of(teacher):
                sums.append(self.compare_tokens(student, teacher, moment, tokens))
            else:
                sums.append(self.compare(student, teacher, moment).sum())
        return self.setting.lambda_ * self.chosen(torch.stack(sums))

    def _say_lost(self) -> None:
        if not self.said_lost:
            log.warning("distillation: the shrink left no trace of %s; its loss is 0 from here on", self.setting.path)
        self.said_lost = True

    def chosen(self, losses: torch.Tensor) -> torch.Tensor:
        """One loss of those of the links, [links]."""
        return losses.sum()

    def watch(self) -> tuple[Tap, RemovableHandle]:
        """A tap on the target that also hears evaluations."""
        tap = Tap(training=False)
        return tap, see(self.model.get_submodule(self.setting.module), self.setting.target, tap, self.setting.path)

    def rehook(self) -> None:
        """The student was shrunk in place: its modules may be others."""
        self.handle.remove()
        module = self.model.get_submodule(self.setting.module)
        self.handle = see(module, self.setting.target, self.tap, self.setting.path)


def smaller(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, C, H, W] at the smaller of both sizes; anything else as it is."""
    if a.dim() != 4:
        return a, b
    size = [min(p, q) for p, q in zip(a.shape[2:], b.shape[2:], strict=True)]
    return tuple(x if list(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))  # type: ignore


def channel_dim(shape: Any) -> int:
    return 1 if len(shape) == 4 else len(shape) - 1


def translated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The channels of `x` through weight [to, from]."""
    return F.conv2d(x, weight[:, :, None, None]) if x.dim() == 4 else F.linear(x, weight)


def matching(dense: torch.Tensor, small: torch.Tensor) -> torch.Tensor | None:
    """int64: which channels of `dense` those of `small` are, a subsequence of equal ones; None if they are none."""
    dim = channel_dim(dense.shape)
    wide, narrow = (x.movedim(dim, 0).flatten(1).double() for x in (dense, small))
    if len(wide) == len(narrow):
        return torch.arange(len(wide))
    if wide.shape[1] != narrow.shape[1]:
        return None
    bound = 1e-4 * float(wide.abs().max())
    found: list[int] = []
    for row in narrow:
        start = found[-1] + 1 if found else 0
        equal = ((wide[start:] - row).abs().amax(1) <= bound).nonzero()
        if not len(equal):
            return None
        found.append(start + int(equal[0]))
    return torch.tensor(found)


def _compare_by(setting: Setting) -> Compare:
    """The function of `apply_method`. Raises UserError."""
    name = setting.apply_method
    if name in _COMPARE:
        return _COMPARE[name]
    module, _, function = name.rpartition(".")
    said = f"{setting.said_by('apply_method')}"
    try:
        found = getattr(importlib.import_module(module), function) if module else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"{said}: {error}. Allowed: {', '.join(_COMPARE)}, or pkg.module.function.") from None
    if found is None or not callable(found):
        raise UserError(f"{said}: no such comparison. Allowed: {', '.join(_COMPARE)}, or pkg.module.function.")
    return found  # type: ignore[return-value]


def _mse(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    return (student - teacher).square().flatten(1).mean(1)


def _kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of the distributions over channels that the states stand for, the mean over positions."""
    dim = channel_dim(student.shape)
    own, theirs = (x.movedim(dim, -1).flatten(0, -2) for x in (student, teacher))
    return divergence(own, theirs, Divergence("forward", temperature)).view(len(student), -1).mean(1)


_COMPARE: dict[str, Compare] = {"mse": _mse, "kl": _kl}
