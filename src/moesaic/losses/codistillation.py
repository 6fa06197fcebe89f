"""Codistillation: cross-entropy to the label and divergence from a teacher, mixed per token.

Per token, with p and q the teacher's and the student's softmax(logits / temperature):

    loss = (1 - a) * cross_entropy(student, label) + a * temperature^2 * D(p || q)

The teacher is a constant, and so is a. At temperature 1 and with forward KL this is the cross-entropy to the mixed
target (1 - a) one_hot(label) + a p, up to a constant (Hinton et al. 2015, arXiv 1503.02531).
"""

import dataclasses
import math
import numbers
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import InputError
from moesaic.layers.checks import has_values, require_floating, require_ids, require_tensor
from moesaic.layers.routing import at_least_fp32
from moesaic.losses.cross_entropy import (
    IGNORE_INDEX,
    ChunkedHead,
    needs_logits,
    require_counts,
    require_head,
    require_labels,
    rows_per_chunk,
    tokens_to_divide_by,
)
from moesaic.losses.divergences import DIVERGENCES, WITH_COEFFICIENT
from moesaic.losses.kept_gradients import (
    Wanted,
    first_derivative,
    keep_gradients,
    one_after_the_other,
    scaled_gradients,
    wanted_gradients,
)
from moesaic.losses.soft_weight import Gate, TokenStatistics
from moesaic.losses.targets import DenseTargets, HeadTargets, SampledTargets, Targets, TopKTargets

__all__ = ["CodistillationOutput", "codistillation_loss", "linear_codistillation_loss"]


class CodistillationOutput(NamedTuple):
    """Scalars, all sums over valid tokens divided by the same `num_valid`; without a graph but for `loss`."""

    loss: Tensor
    hard: Tensor
    """The student's cross-entropy."""
    soft: Tensor
    """temperature^2 * D(p || q). Of sampled targets an unbiased estimate, not always >= 0; at a temperature other than
    1, where their entropy is not stored, it is larger by temperature^2 times that entropy (same gradient)."""
    teacher_loss: Tensor
    """The teacher's cross-entropy; with a graph if `train_teacher`."""
    soft_weight: Tensor
    """Mean of a."""
    agreement: Tensor
    """Share of tokens whose most likely next token is the same for both. Of sampled targets the teacher's is the one
    drawn with the largest summed weight, so that few samples blur it downwards."""


def codistillation_loss(
    student_logits: Tensor,
    labels: Tensor,
    targets: Targets,
    *,
    soft_weight: float | Tensor,
    divergence: str = "forward_kl",
    coefficient: float = 0.5,
    temperature: float = 1.0,
    gate: Gate | None = None,
    ignore_index: int = IGNORE_INDEX,
    num_valid: Tensor | int | None = None,
) -> CodistillationOutput:
    """The loss of logits that exist.

    Args:
        student_logits: (N, V); log-softmax in fp32 (fp64 for fp64).
        labels: (N,) int64.
        targets: what the teacher says about these tokens, over the same vocabulary. No gradient reaches it.
            Top-k and sampled targets allow forward_kl only: no other divergence is linear in p. The mass of a teacher
            outside its top k is one bucket, compared with the student's mass there.
        soft_weight: in [0, 1]; it must come from earlier steps, not from this batch.
        divergence: a name in `DIVERGENCES`.
        coefficient: of jsd and the skew divergences, between 0 and 1.
        temperature: of the soft term, the hard one is always at 1; top-k and sampled targets must have been made at it.
        gate: factors in [0, 1] on soft_weight from each token's own statistics (`SoftWeight.gate`).
        ignore_index: labels that do not count.
        num_valid: tokens to divide by; None counts the valid labels. With those of the global batch, the outputs
            of micro-batches and ranks add up to that of the whole.

    Returns:
        Scalars, fp32 (fp64 for fp64 logits); 0 with zero gradients if every label is ignored.

    Raises:
        InputError: a setting out of range, another vocabulary, or sparse targets that cannot serve this loss.
        TypeError: what is given is no tensor of the right dtype.
        ValueError: another shape, or on a CPU a label or a token of the targets outside the vocabulary.
    """
    owner = "codistillation_loss"
    terms = _Terms(soft_weight, divergence, coefficient, temperature, gate)
    require_floating(owner, student_logits=student_logits)
    require_tensor(owner, "student_logits", student_logits, (None, None))
    _check_call(owner, labels, targets, student_logits.shape, ignore_index, num_valid, None)
    _check_targets(targets, student_logits.size(0), student_logits.size(1), terms)
    return _of_logits(student_logits, labels, targets, terms, ignore_index, num_valid)


def _of_logits(
    student_logits: Tensor,
    labels: Tensor,
    targets: Targets,
    terms: "_Terms",
    ignore_index: int,
    num_valid: Tensor | int | None,
) -> CodistillationOutput:
    if isinstance(targets, HeadTargets):
        targets = DenseTargets(targets.hidden.detach() @ targets.weight.detach().T)
    logits = at_least_fp32(student_logits)
    valid = labels != ignore_index
    parts = terms(logits, labels.masked_fill(~valid, 0)[:, None], valid, targets)
    return CodistillationOutput(*(part.sum() / tokens_to_divide_by(num_valid, valid) for part in parts))


def linear_codistillation_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: Targets,
    *,
    soft_weight: float | Tensor,
    divergence: str = "forward_kl",
    coefficient: float = 0.5,
    temperature: float = 1.0,
    gate: Gate | None = None,
    ignore_index: int = IGNORE_INDEX,
    num_valid: Tensor | int | None = None,
    chunk_tokens: int | None = None,
    train_teacher: bool = False,
) -> CodistillationOutput:
    """`codistillation_loss(hidden @ weight.T, ...)` chunk by chunk, for `HeadTargets` the teacher's logits too.

    Gradients are made in the forward pass, as in `linear_cross_entropy`: logits of at most chunk_tokens tokens exist
    at a time, of student and teacher. Under autocast the matmuls run in the autocast dtype and the rest in fp32. A
    compiler, an export and forward-mode derivatives get the loss of all (N, V) logits at once instead.

    Args:
        hidden: (N, D).
        weight: (V, D), the head.
        chunk_tokens: rows per chunk; None takes as many as `linear_cross_entropy`.
        train_teacher: give `teacher_loss` a graph to the hidden states and the head of `HeadTargets`, from the logits
            that are there already. Loss and gradients are bit-equal to `linear_cross_entropy` of the teacher (given the
            same num_valid), so it learns as if alone; the student's loss still does not reach it.

    The other arguments, the result and errors are those of `codistillation_loss`.
    """
    owner = "linear_codistillation_loss"
    terms = _Terms(soft_weight, divergence, coefficient, temperature, gate)
    require_head(owner, hidden, weight)
    shape = torch.Size((hidden.size(0), weight.size(0)))
    _check_call(owner, labels, targets, shape, ignore_index, num_valid, chunk_tokens)
    _check_targets(targets, hidden.size(0), weight.size(0), terms)
    if train_teacher and not isinstance(targets, HeadTargets):
        raise InputError(f"train_teacher=True: found {type(targets).__name__}; must be HeadTargets")
    if needs_logits():
        logits = F.linear(hidden, weight.to(hidden.dtype))
        output = _of_logits(logits, labels, targets, terms, ignore_index, num_valid)
        if train_teacher and isinstance(targets, HeadTargets):
            teacher_logits = at_least_fp32(F.linear(targets.hidden, targets.weight.to(targets.hidden.dtype)))
            nats = F.cross_entropy(teacher_logits, labels, ignore_index=ignore_index, reduction="sum")
            output = output._replace(teacher_loss=nats / tokens_to_divide_by(num_valid, labels != ignore_index))
        return output
    if chunk_tokens is None:
        chunk_tokens = rows_per_chunk(weight.size(0))
    # the teacher's tensors are inputs of the graph only where it trains
    teacher = (targets.hidden, targets.weight) if train_teacher and isinstance(targets, HeadTargets) else (None, None)
    call = _Call(
        labels, targets, terms, ignore_index, num_valid, chunk_tokens, wanted_gradients(hidden, weight, *teacher)
    )
    outputs = _LinearCodistillation.apply(hidden, weight, *teacher, call)
    loss, teacher_loss, hard, soft, weight_mean, agreement = outputs[:6]
    return CodistillationOutput(loss, hard, soft, teacher_loss, weight_mean, agreement)


_TokenTargets = DenseTargets | TopKTargets | SampledTargets


@dataclasses.dataclass(frozen=True)
class _Terms:
    """The settings of the loss; called, its terms for given logits."""

    soft_weight: float | Tensor
    divergence: str
    coefficient: float
    temperature: float
    gate: Gate | None

    def __post_init__(self) -> None:
        if not isinstance(self.divergence, str) or self.divergence not in DIVERGENCES:
            raise InputError(f"divergence={self.divergence!r}: must be one of {', '.join(DIVERGENCES)}")
        if self.divergence in WITH_COEFFICIENT and not (_is_number(self.coefficient) and 0 < self.coefficient < 1):
            raise InputError(f"coefficient={self.coefficient!r}: {self.divergence} allows 0 < coefficient < 1")
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise InputError(f"temperature={self.temperature!r}: must be a number > 0")
        if self.gate is not None and not callable(self.gate):
            raise InputError(f"gate={self.gate!r}: must be a function of TokenStatistics, or None")
        weight = self.soft_weight
        if isinstance(weight, Tensor):
            if weight.numel() != 1:
                raise InputError(f"soft_weight: found shape {tuple(weight.shape)}; must be a scalar")
            if not has_values(weight):
                return
            weight = weight.item()
        if not (_is_number(weight) and 0 <= weight <= 1):
            raise InputError(f"soft_weight={weight!r}: must be 0 <= soft_weight <= 1")

    def __call__(self, z: Tensor, target: Tensor, valid: Tensor, targets: _TokenTargets) -> list[Tensor]:
        """The terms (C,) in the order of `CodistillationOutput`, 0 where not valid; a graph from the first to z.

        Args:
            z: (C, V) logits of the student, fp32 or fp64.
            target: (C, 1), the label or 0.
            valid: (C,).
            targets: of these C tokens.
        """
        tau = self.temperature
        if isinstance(targets, DenseTargets):
            log_q, log_p = z.log_softmax(dim=1), targets.logits.detach().to(z.dtype).log_softmax(dim=1)
            hard, teacher_loss = (-x.gather(1, target).squeeze(1) for x in (log_q, log_p))
            tempered_q, tempered_p = (x if tau == 1 else (x / tau).log_softmax(dim=1) for x in (log_q, log_p))
            soft = DIVERGENCES[self.divergence](tempered_q, tempered_p, self.coefficient)
            top = log_p.argmax(dim=1)
        else:
            log_total = z.logsumexp(dim=1, keepdim=True)
            hard = (log_total - z.gather(1, target)).squeeze(1)
            teacher_loss = -targets.label_log_prob.detach().to(z.dtype)
            soft = _sparse_kl(z, log_total, targets)
            top = _most_likely(targets)
        soft = tau**2 * soft
        with torch.no_grad():
            a = self.weights(hard)
            if self.gate is not None:
                entropy = _entropy(log_p) if isinstance(targets, DenseTargets) else targets.entropy.to(z.dtype)
                statistics = TokenStatistics(
                    _entropy(z.log_softmax(dim=1)), entropy, -hard.detach(), -teacher_loss, z.size(1)
                )
                a = a * self.gate(statistics)
            agreement = (z.argmax(dim=1) == top).to(z.dtype)
        loss = (1 - a) * hard + a * soft
        terms = [loss, *(x.detach() for x in (hard, soft, teacher_loss, a, agreement))]
        return [term.masked_fill(~valid, 0) for term in terms]

    def weights(self, like: Tensor) -> Tensor:
        """soft_weight for every token; before the gate."""
        return torch.as_tensor(self.soft_weight, dtype=like.dtype, device=like.device).detach().expand_as(like)

    def in_place(
        self, z: Tensor, t: Tensor, work: Tensor, target: Tensor, valid: Tensor, scale: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The terms for forward KL at temperature 1 without autograd, in three buffers (C, V).

        Args:
            z: the student's logits; destroyed.
            t: the teacher's logits; afterwards exp(t - max).
            work: anything; destroyed.
            scale: (C, 1), factor on the gradient of each token.

        Returns:
            the terms as `__call__` gives them, and the gradient of the scaled losses with respect to z, in z or work.
        """
        z_label, t_label = z.gather(1, target), t.gather(1, target)
        (z_max, z_top), (t_max, t_top) = z.max(dim=1, keepdim=True), t.max(dim=1, keepdim=True)
        z.sub_(z_max)
        t.sub_(t_max).clamp_(min=-1000)  # whose exp is 0 as well, but 0 * (-1000) is not NaN as 0 * (-inf) is
        torch.sub(t, z, out=work)
        t.exp_()
        t_total = t.sum(dim=1, keepdim=True)
        difference = work.mul_(t).sum(dim=1, keepdim=True) / t_total
        teacher_loss = t_total.log() + t_max - t_label
        if self.gate is None:
            q = z.exp_()
        else:
            teacher_entropy = t_total.log() - difference - torch.linalg.vecdot(t, z)[:, None] / t_total
            q = torch.exp(z, out=work)
        q_total = q.sum(dim=1, keepdim=True)
        hard = q_total.log() + z_max - z_label
        soft = difference - t_total.log() + q_total.log()
        a = self.weights(hard)
        if self.gate is not None:
            entropy = q_total.log() - torch.linalg.vecdot(q, z)[:, None] / q_total
            e, t_e, log_q, log_p = (x.squeeze(1) for x in (entropy, teacher_entropy, -hard, -teacher_loss))
            a = a * self.gate(TokenStatistics(e, t_e, log_q, log_p, z.size(1)))[:, None]
        loss = (1 - a) * hard + a * soft
        terms = (loss, hard, soft, teacher_loss, a, (z_top == t_top).to(z.dtype))
        q.mul_(scale / q_total).addcmul_(t, a * scale / t_total, value=-1).scatter_add_(1, target, (a - 1) * scale)
        return [term.squeeze(1).masked_fill(~valid, 0) for term in terms], q


def _sparse_kl(z: Tensor, log_total: Tensor, targets: TopKTargets | SampledTargets) -> Tensor:
    """Forward KL (C,) at the temperature of the targets; log_total is logsumexp(z) (C, 1)."""
    if targets.temperature != 1:
        z = z / targets.temperature
        log_total = z.logsumexp(dim=1, keepdim=True)
    log_q = z.gather(1, targets.ids) - log_total
    if isinstance(targets, SampledTargets):
        cross_entropy = -(targets.weights.detach().to(z.dtype) * log_q).sum(dim=1)
        return cross_entropy - targets.entropy.detach().to(z.dtype) if targets.temperature == 1 else cross_entropy
    # over the k tokens and one bucket for all others: a lower bound of the whole that grows with k
    log_p = targets.log_probs.detach().to(z.dtype)
    kl = DIVERGENCES["forward_kl"](log_q, log_p, 0)
    if log_p.size(1) == z.size(1):
        return kl
    tail = (1 - log_p.exp().sum(dim=1)).clamp(min=0)
    # not log1p(-sum of the k), which is NaN or -inf where they hold all mass
    log_tail = z.scatter(1, targets.ids, -math.inf).logsumexp(dim=1) - log_total.squeeze(1)
    return kl + torch.xlogy(tail, tail) - tail * log_tail


def _most_likely(targets: TopKTargets | SampledTargets) -> Tensor:
    """(C,) ids."""
    if isinstance(targets, TopKTargets):
        mass = targets.log_probs
    else:
        equal = targets.ids[:, :, None] == targets.ids[:, None, :]
        mass = (targets.weights[:, None, :] * equal).sum(dim=2)
    return targets.ids.gather(1, mass.argmax(dim=1, keepdim=True)).squeeze(1)


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0)).sum(dim=1)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_call(
    owner: str, labels: Any, targets: Any, shape: torch.Size, ignore_index: Any, num_valid: Any, chunk_tokens: Any
) -> None:
    """Raise TypeError or ValueError for tensors that do not belong to logits of this shape (N, V)."""
    tokens, vocab_size = shape
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index={ignore_index!r}: must be an integer")
    require_labels(owner, labels, tokens, vocab_size, ignore_index)
    require_counts(owner, num_valid, chunk_tokens)
    if isinstance(targets, DenseTargets):
        require_floating(owner, **{"targets.logits": targets.logits})
        require_tensor(owner, "targets.logits", targets.logits, (None, None))
    elif isinstance(targets, HeadTargets):
        require_head(owner, targets.hidden, targets.weight, "targets.hidden", "targets.weight")
    elif isinstance(targets, (TopKTargets, SampledTargets)):
        require_tensor(owner, "targets.ids", targets.ids, (None, None), torch.int64)
        rows, width = targets.ids.shape
        for name, size in ((targets._fields[1], (rows, width)), ("entropy", (rows,)), ("label_log_prob", (rows,))):
            require_floating(owner, **{f"targets.{name}": getattr(targets, name)})
            require_tensor(owner, f"targets.{name}", getattr(targets, name), size)
    else:
        raise TypeError(
            f"{owner}: targets of type {type(targets).__name__}; must be DenseTargets, HeadTargets, TopKTargets or "
            "SampledTargets"
        )


def _check_targets(targets: Targets, tokens: int, vocab: int, terms: _Terms) -> None:
    name = type(targets).__name__
    if isinstance(targets, (DenseTargets, HeadTargets)):
        rows = targets[0].size(0)
        width = targets.logits.size(1) if isinstance(targets, DenseTargets) else targets.weight.size(0)
        if width != vocab:
            raise InputError(f"{name}: a vocabulary of {width}; the student's is {vocab}, and they must be the same")
    else:
        rows, width = targets.ids.shape
        if terms.divergence != "forward_kl":
            raise InputError(
                f"divergence={terms.divergence!r}: {name} allow forward_kl only, the one that is linear in the "
                "teacher's probabilities"
            )
        if targets.temperature != terms.temperature:
            raise InputError(
                f"temperature={terms.temperature}: {name} were made at temperature {targets.temperature}; "
                "the two must be equal"
            )
        if isinstance(targets, TopKTargets) and width > vocab:
            raise InputError(f"{name}: {width} tokens; must be at most {vocab}, the vocabulary")
    if rows != tokens:
        raise InputError(f"{name}: {rows} rows for {tokens} tokens; must be one row per token")
    if isinstance(targets, (TopKTargets, SampledTargets)):
        require_ids(name, "ids", targets.ids, vocab)


class _Call(NamedTuple):
    labels: Tensor
    targets: Targets
    terms: _Terms
    ignore_index: int
    num_valid: Tensor | int | None
    chunk_tokens: int
    wanted: Wanted


class _LinearCodistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor | None, ...]:
        labels, targets, terms, ignore_index, num_valid, chunk_tokens, wanted = call
        chunk = max(1, min(chunk_tokens, hidden.size(0)))
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        student = ChunkedHead(hidden, weight, wanted.of[:2], dtype, chunk)
        teacher = None
        if isinstance(targets, HeadTargets):
            teacher = ChunkedHead(targets.hidden, targets.weight, wanted.of[2:], dtype, chunk)
        dense = isinstance(targets, (DenseTargets, HeadTargets))
        fast = dense and terms.divergence == "forward_kl" and terms.temperature == 1
        work = torch.empty_like(student.buffer) if fast else None
        all_valid = labels != ignore_index
        denominator = tokens_to_divide_by(num_valid, all_valid)
        per_token = 1 / denominator.to(dtype)
        sums = torch.zeros(6, dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.size(0), chunk):
                rows = slice(start, start + chunk)
                valid = all_valid[rows]
                target = labels[rows].masked_fill(~valid, 0)[:, None]
                scale = valid[:, None].to(dtype) * per_token
                z = student.logits(rows)
                part = _rows(targets, rows, dtype) if teacher is None else DenseTargets(teacher.logits(rows))
                if work is not None and isinstance(part, DenseTargets):
                    parts, grad = terms.in_place(z, part.logits, work[: z.size(0)], target, valid, scale)
                else:
                    parts, grad = _by_autograd(terms, z, target, valid, part, per_token, student.needs_grad)
                if student.needs_grad:
                    student.add_gradients(rows, grad)
                if teacher_hidden is not None and teacher is not None and isinstance(part, DenseTargets):
                    t = part.logits
                    if work is None:  # else it is exp(t - max) already
                        t_label, t_max = t.gather(1, target), t.amax(dim=1, keepdim=True)
                        t_total = t.sub_(t_max).exp_().sum(dim=1, keepdim=True)
                        parts[3] = (t_total.log() + t_max - t_label).squeeze(1).masked_fill(~valid, 0)
                    if teacher.needs_grad:
                        t.mul_(scale / t.sum(dim=1, keepdim=True)).scatter_add_(1, target, -scale)
                        teacher.add_gradients(rows, t)
                sums += torch.stack([part.sum() for part in parts])
        loss, hard, soft, teacher_loss, soft_weight, agreement = (mean.clone() for mean in sums / denominator)
        gradients = (*student.gradients(), *(teacher.gradients() if teacher is not None else (None, None)))
        return loss, teacher_loss, hard, soft, soft_weight, agreement, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        trains_teacher = inputs[2] is not None
        keep_gradients(ctx, inputs[-1].wanted, inputs[:4], output[6:], *output[2 if trains_teacher else 1 : 6])

    @staticmethod
    @first_derivative
    def backward(
        ctx: Any, loss_grad: Tensor | None, teacher_grad: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        further, name = others[4:], "linear_codistillation_loss"
        student = scaled_gradients(ctx, slice(0, 2), loss_grad, further, name)
        return *student, *scaled_gradients(ctx, slice(2, 4), teacher_grad, further, name), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return one_after_the_other(_LinearCodistillation, info.batch_size, in_dims, arguments)


def _by_autograd(
    terms: _Terms, z: Tensor, target: Tensor, valid: Tensor, targets: _TokenTargets, factor: Tensor, needs_grad: bool
) -> tuple[list[Tensor], Tensor]:
    """The terms of a chunk, detached, and the gradient of its summed losses times `factor` (z itself if not needed)."""
    with torch.set_grad_enabled(needs_grad):
        z = z.detach().requires_grad_(needs_grad)
        parts = terms(z, target, valid, targets)
        grad = torch.autograd.grad(parts[0].sum(), z)[0].mul_(factor) if needs_grad else z
    return [part.detach() for part in parts], grad


def _rows(targets: Targets, rows: slice, dtype: torch.dtype) -> _TokenTargets:
    """Targets of some tokens; logits as a copy, to work in."""
    if isinstance(targets, TopKTargets):
        ids, log_probs, temperature, entropy, label = targets
        return TopKTargets(ids[rows], log_probs[rows], temperature, entropy[rows], label[rows])
    if isinstance(targets, SampledTargets):
        ids, weights, temperature, entropy, label = targets
        return SampledTargets(ids[rows], weights[rows], temperature, entropy[rows], label[rows])
    return DenseTargets(targets[0][rows].to(dtype, copy=True))
