"""A tiny model that sees the pictures of `small_pictures`, untrained."""

import torch
from reference.comparing import redraw
from small_pictures import Numbers
from torch import Tensor

from moesaic.data import PictureData
from moesaic.data.images import ImageText, Layout, pixel_values
from moesaic.data.tokenizers import ByteTokenizer
from moesaic.models import MultimodalConfig, MultimodalDecoder, VisionConfig, build_multimodal, llama4_toy

VISION = VisionConfig(
    image_size=8, patch_size=2, dim=8, num_layers=1, num_heads=2, hidden_dim=12, output_dim=6, num_channels=1
)
LAYOUT = Layout(ByteTokenizer(), VISION.num_tokens())


def seeing() -> MultimodalDecoder:
    """It draws its weights from torch's generator."""
    toy = llama4_toy(vocab_size=LAYOUT.vocab_size, num_layers=2, dim=16, hidden_dim=24)
    model = build_multimodal(MultimodalConfig(toy, VISION, LAYOUT.image))
    redraw(model)
    return model.eval()


def pictures_of(samples: Numbers) -> PictureData:
    return PictureData(samples, LAYOUT)


def pixels(sample: ImageText) -> Tensor:
    return torch.cat([pixel_values(each.tiles(None)) for each in sample.pictures])


def log_probabilities(model: MultimodalDecoder, sample: ImageText, seen: ImageText) -> tuple[Tensor, Tensor]:
    """Nats (n,) of each id of a sample by all before it, with the pictures of `seen`; and which are asked for."""
    [encoded] = LAYOUT.encode([sample])
    tokens = torch.from_numpy(encoded.tokens)
    with torch.no_grad():
        logits = model(tokens[None], images=pixels(seen)).logits[0].double().log_softmax(dim=-1)
    nats = [0.0] + [float(logits[i - 1, tokens[i]]) for i in range(1, len(tokens))]
    return torch.tensor(nats, dtype=torch.float64), torch.from_numpy(encoded.asked)
