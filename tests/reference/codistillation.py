"""The codistillation loss, one token and one vocabulary entry at a time; it shares no code with moesaic."""

import math

import torch
from torch import Tensor


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    e = torch.exp((logits - logits.detach().max()) / temperature)
    return e / e.sum()


def kl(a: Tensor, b: Tensor) -> Tensor:
    return sum((a[v] * (a[v].log() - b[v].log()) for v in range(len(a)) if a[v] > 0), torch.zeros((), dtype=a.dtype))


def divergence(name: str, p: Tensor, q: Tensor, c: float) -> Tensor:
    """D(p || q), p the teacher's distribution (V,), q the student's."""
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jeffreys":
        return kl(p, q) + kl(q, p)
    if name == "jsd":
        m = c * p + (1 - c) * q
        return c * kl(p, m) + (1 - c) * kl(q, m)
    if name == "skew_forward_kl":
        return kl(p, c * p + (1 - c) * q)
    if name == "skew_reverse_kl":
        return kl(q, c * q + (1 - c) * p)
    assert name == "total_variation"
    return sum((p[v] - q[v]).abs() for v in range(len(p))) / 2


def entropy(p: Tensor) -> Tensor:
    return -sum(x * x.log() for x in p if x > 0)


def top_k_divergence(p: Tensor, q: Tensor, k: int) -> Tensor:
    """KL between (k most probable tokens, all others together) of p and of q."""
    ids = p.topk(k).indices.tolist()
    others = [v for v in range(len(p)) if v not in ids]
    if not others:
        return kl(p, q)
    return kl(
        torch.cat([p[ids], p[others].sum()[None]]),
        torch.cat([q[ids], q[others].sum()[None]]),
    )


def gate(name: str, p: Tensor, q: Tensor, y: int, parameter: tuple[float, ...]) -> Tensor:
    """p and q at temperature 1."""
    if name == "entropy":
        return torch.ones_like(p[0]) if entropy(p) >= parameter[0] else torch.zeros_like(p[0])
    if name == "confidence":
        return p[y] ** parameter[0]
    if name == "agreement":
        return 1 / (1 + torch.exp(-(parameter[0] * (p[y] / q[y]).log() + parameter[1])))
    if name == "student_uncertainty":
        return entropy(q) / math.log(len(q))
    assert name == "none"
    return torch.ones_like(p[0])


def codistillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    soft_weight: float,
    name: str = "forward_kl",
    coefficient: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    gate_name: str = "none",
    gate_parameter: tuple[float, ...] = (),
) -> dict[str, Tensor]:
    """Means over the tokens whose label is not -100; `student` and `teacher` are logits (N, V)."""
    rows = []
    for z, t, label in zip(student, teacher.detach(), labels.tolist(), strict=True):
        if label == -100:
            continue
        p, q = softmax(t, temperature), softmax(z, temperature)
        d = divergence(name, p, q, coefficient) if top_k is None else top_k_divergence(p, q, top_k)
        hard, soft = -softmax(z)[label].log(), temperature**2 * d
        a = soft_weight * gate(gate_name, softmax(t), softmax(z).detach(), label, gate_parameter)
        rows.append(
            {
                "loss": (1 - a) * hard + a * soft,
                "hard": hard,
                "soft": soft,
                "teacher_loss": -softmax(t)[label].log(),
                "soft_weight": a,
                "agreement": torch.tensor(float(z.argmax() == t.argmax()), dtype=z.dtype),
            }
        )
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
