"""Names and layouts of tensors: for each parameter of our decoder, the tensors of transformers that it is made of."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

__all__ = ["AS_OURS", "WHOLE", "Layout", "Piece", "PieceView", "WithVision", "experts_of"]

PieceView = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of theirs, as a part of one parameter of ours."""

    name: str
    view: PieceView
    """The part of our parameter, or of a tensor like it, in the order of their tensor; it shares memory with it."""
    shape: tuple[int, ...]
    """Theirs; the view has as many elements, perhaps with an axis split."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one architecture. Embedding, head, blocks and norms have the same names in all of them."""

    ffn: str
    """Name of the channel mixer in a block."""
    router: str = "gate"
    ffn_in_model: str | None = None
    """That name in a model in memory, where it is not the one in files."""
    halves: bool = True
    """Whether RoPE rotates the pair (j, j + H/2) of a head, where ours rotates (2j, 2j + 1)."""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further modules and tensors in a block by our name, where theirs is another."""
    alternating: bool = False
    """Whether columns of gate and up alternate in the stacked weights of experts, where ours have all of gate first."""
    experts: Mapping[str, tuple[str, ...]] | None = None
    """Our stacked weight -> names of one expert's matrices in files, in the order in which they stand side by side.

    In memory they are one tensor too, with rows and columns swapped. None: as ours, in files too.
    """

    def hf_name(self, name: str, *, in_model: bool = False) -> str:
        """transformers' name of one of our decoder's parameters, where it is one tensor there."""
        if name == "head.weight":
            return "lm_head.weight"
        if name == "embedding.weight":
            return "model.embed_tokens.weight"
        ffn = self.ffn_in_model if in_model and self.ffn_in_model else self.ffn
        for ours, theirs in (
            (".mixer_norm.", ".input_layernorm."),
            (".ffn_norm.", ".post_attention_layernorm."),
            (".mixer.", ".self_attn."),
            (".ffn.router.", f".ffn.{self.router}."),
            (".ffn.", f".{ffn}."),
        ):
            name = name.replace(ours, theirs)
        parts = [self.renamed.get(part, part) for part in name.split(".")]
        return ".".join(["model", *parts])

    def pieces(self, name: str, shape: tuple[int, ...], head_dim: int, *, in_model: bool) -> list[Piece]:
        """What our parameter `name` of this shape is made of.

        Args:
            in_model: as in a model in memory; False: as in published files.
        """
        theirs = self.hf_name(name, in_model=in_model)
        module, _, parameter = name.rpartition(".")
        if self.halves and module.endswith(ROTATED):
            return [Piece(theirs, partial(_by_halves, head_dim=head_dim), shape)]
        if self.alternating and module.endswith(".ffn.experts") and parameter.startswith("gate_up"):
            return [Piece(theirs, _alternating, shape)]
        if self.experts is None or not module.endswith(".ffn.experts"):
            return [Piece(theirs, _whole, shape)]
        num_experts, inputs, outputs = shape
        if in_model:
            return [Piece(theirs, _transposed, (num_experts, outputs, inputs))]
        base, parts = theirs.removesuffix(parameter), self.experts[parameter]
        return [
            Piece(
                f"{base}{e}.{part}.weight",
                partial(_of_expert, e=e, i=i, of=len(parts)),
                (outputs // len(parts), inputs),
            )
            for e in range(num_experts)
            for i, part in enumerate(parts)
        ]


ROTATED = (".mixer.q_proj", ".mixer.k_proj", ".mixer.q_norm", ".mixer.k_norm")
AS_OURS = Layout(ffn="feed_forward", router="router", halves=False)
"""Llama 4's: a tensor only changes its name."""


@dataclasses.dataclass(frozen=True)
class WithVision:
    """The names of Llama 4's whole model: its text model's with a prefix, those of the encoder and of the projector."""

    text: Layout = AS_OURS
    prefix: str = "language_model."
    experts: None = None
    """As in `Layout`."""

    def pieces(self, name: str, shape: tuple[int, ...], head_dim: int, *, in_model: bool) -> list[Piece]:
        """As `Layout.pieces`, for a parameter of a `MultimodalDecoder`."""
        part, _, rest = name.partition(".")
        if part == "decoder":
            found = self.text.pieces(rest, shape, head_dim, in_model=in_model)
            return [dataclasses.replace(piece, name=self.prefix + piece.name) for piece in found]
        for ours, theirs in VISION_NAMES.items():
            name = name.replace(ours, theirs)
        return [Piece(name, _whole, shape)]


VISION_NAMES = {
    "projector.": "multi_modal_projector.linear_1.",
    "vision.transformer.layers.": "vision_model.model.layers.",
    "vision.transformer.": "vision_model.",
    "vision.adapter.": "vision_model.vision_adapter.mlp.",
    ".patch_embedding.": ".patch_embedding.linear.",
    ".position_embedding": ".positional_embedding_vlm",
    ".norm_before.": ".layernorm_pre.",
    ".norm_after.": ".layernorm_post.",
    ".mixer_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".mixer.": ".self_attn.",
    ".ffn.": ".mlp.",
    ".up_proj.": ".fc1.",
    ".down_proj.": ".fc2.",
}
"""Our names in encoder and projector -> transformers'."""

WHOLE = WithVision()


def experts_of(gate: str, up: str, down: str) -> dict[str, tuple[str, ...]]:
    return {"gate_up_proj": (gate, up), "down_proj": (down,)}


def _whole(x: Tensor) -> Tensor:
    return x


def _by_halves(x: Tensor, head_dim: int) -> Tensor:
    """(N * H, ...) in pairs -> (N, 2, H / 2, ...)."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2)


def _alternating(x: Tensor) -> Tensor:
    """(..., 2F), gate first -> (..., F, 2)."""
    return x.unflatten(-1, (2, -1)).transpose(-2, -1)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _of_expert(x: Tensor, e: int, i: int, of: int) -> Tensor:
    """(E, D, of * F) -> (F, D) of one matrix of one expert."""
    return x[e].chunk(of, dim=-1)[i].T
