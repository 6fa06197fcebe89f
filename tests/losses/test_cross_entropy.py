import pytest
import torch
import torch.nn.functional as F
from reference.comparing import OutputSizes, assert_close
from torch import Tensor

from moesaic.losses import likeliest_tokens, linear_cross_entropy, token_cross_entropy

TOKENS, DIM, VOCAB = 23, 6, 11

LABELS = {
    "all valid": torch.arange(TOKENS) % VOCAB,
    "some ignored": (torch.arange(TOKENS) % VOCAB).masked_fill(torch.arange(TOKENS) % 3 == 0, -100),
    "first chunk ignored": (torch.arange(TOKENS) % VOCAB).masked_fill(torch.arange(TOKENS) < 14, -100),
    "one valid": torch.full((TOKENS,), -100).index_fill(0, torch.tensor([5]), 3),
}


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden, weight = torch.randn(TOKENS, DIM, dtype=dtype), torch.randn(VOCAB, DIM, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


def both(hidden: Tensor, weight: Tensor, loss: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, upstream))
    return loss.detach(), grads[0], grads[1]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, TOKENS + 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_torch(dtype: torch.dtype, tolerance: float, chunk_tokens: int, labels: str) -> None:
    hidden, weight = inputs(dtype)
    target = LABELS[labels]
    found = both(hidden, weight, linear_cross_entropy(hidden, weight, target, chunk_tokens=chunk_tokens), 3.0)
    expected = both(hidden, weight, F.cross_entropy(hidden @ weight.T, target), 3.0)
    for name, f, e in zip(("loss", "gradient of hidden", "gradient of weight"), found, expected, strict=True):
        assert f.dtype == dtype
        assert_close(f, e, tolerance, name)


def test_every_label_ignored() -> None:
    hidden, weight = inputs(torch.float32)
    loss, hidden_grad, weight_grad = both(
        hidden, weight, linear_cross_entropy(hidden, weight, torch.full((TOKENS,), -100), chunk_tokens=7)
    )
    assert loss.item() == 0
    assert not hidden_grad.any() and not weight_grad.any()


def test_large_logits_stay_finite() -> None:
    hidden, weight = inputs(torch.float32)
    target = LABELS["all valid"]
    found = both(hidden, weight, linear_cross_entropy(hidden * 1e4, weight, target))
    expected = both(hidden, weight, F.cross_entropy(hidden * 1e4 @ weight.T, target))
    for name, f, e in zip(("loss", "gradient of hidden", "gradient of weight"), found, expected, strict=True):
        assert f.isfinite().all()
        assert_close(f, e, 1e-5, name)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_frozen(frozen: str) -> None:
    hidden, weight = inputs(torch.float64)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    trained = weight if frozen == "hidden" else hidden
    target = LABELS["some ignored"]
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, chunk_tokens=7), trained)[0]
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, target), trained)[0]
    assert_close(found, expected, 1e-12, "gradient")


def test_bfloat16_autocast() -> None:
    """bf16 matmuls, fp32 softmax and loss, gradients in the dtype of what they belong to."""
    hidden, weight = inputs(torch.float32)
    target = LABELS["some ignored"]
    expected = both(hidden, weight, F.cross_entropy(hidden @ weight.T, target))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target, chunk_tokens=7)
        plain = F.cross_entropy((hidden @ weight.T).float(), target)
    assert loss.dtype == torch.float32
    assert_close(loss, plain, 1e-6, "loss against the same bf16 logits")
    found = both(hidden, weight, loss)
    for name, f, e in zip(("loss", "gradient of hidden", "gradient of weight"), found, expected, strict=True):
        assert f.dtype == torch.float32
        assert_close(f, e, 0.02, name)


def test_bfloat16_model() -> None:
    hidden, weight = inputs(torch.bfloat16)
    target = LABELS["all valid"]
    found = both(hidden, weight, linear_cross_entropy(hidden, weight, target))
    expected = both(hidden, weight, F.cross_entropy((hidden @ weight.T).float(), target))
    assert [f.dtype for f in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for name, f, e in zip(("loss", "gradient of hidden", "gradient of weight"), found, expected, strict=True):
        assert_close(f, e, 0.02, name)


def test_no_logits_of_all_tokens_exist() -> None:
    tokens, vocab, chunk = 128, 64, 8
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    with OutputSizes() as sizes:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).backward()
    assert sizes.largest <= chunk * vocab
    with OutputSizes() as sizes:  # the recorder would see them
        F.cross_entropy(hidden @ weight.T, labels).backward()
    assert sizes.largest == tokens * vocab


def test_no_gradient_work_without_gradients() -> None:
    """Evaluation runs one matmul per chunk, not three."""
    hidden, weight = inputs(torch.float32)
    with torch.no_grad(), OutputSizes() as sizes:
        loss = linear_cross_entropy(hidden, weight, LABELS["all valid"], chunk_tokens=TOKENS)
    assert not loss.requires_grad
    assert sizes.calls["aten::mm"] == 1


def test_a_second_backward_is_refused() -> None:
    """The gradients are scaled in place when they are handed out; handing them out again would scale them twice."""
    hidden, weight, labels = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4), torch.randint(7, (5,))
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        loss.backward()


@pytest.mark.slow_but_for("dtype0")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_larger_than_a_chunk_or_the_head_is_made(dtype: torch.dtype) -> None:
    tokens, dim, vocabulary = 2048, 8, 5000
    hidden = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, dim, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    with OutputSizes() as sizes:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=64).backward()
    assert sizes.largest == 64 * vocabulary


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
def test_the_losses_of_single_tokens(chunk_tokens: int | None, labels: str) -> None:
    hidden, weight = inputs(torch.float32)
    found = token_cross_entropy(hidden, weight, LABELS[labels], chunk_tokens=chunk_tokens)
    expected = F.cross_entropy(hidden @ weight.T, LABELS[labels], reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not found.requires_grad


@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
def test_the_likeliest_tokens_are_those_of_all_logits(chunk_tokens: int | None) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 8), torch.randn(30, 8)
    found = likeliest_tokens(hidden, weight, chunk_tokens=chunk_tokens)
    assert torch.equal(found, (hidden @ weight.T).argmax(dim=1))
    assert torch.equal(likeliest_tokens(hidden[:0], weight), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="likeliest_tokens: weight of shape"):
        likeliest_tokens(hidden, weight[:, 1:])
