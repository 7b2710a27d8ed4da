"""Images as self-contained PNG data URIs; they are stored at their own size and scaled up by the browser."""

from __future__ import annotations

import base64
import io

import torch

INSTALL = "the report draws with matplotlib, which is not installed: pip install 'ferrovae[plot]'"


def png(pixels: torch.Tensor) -> str:
    """Pixels [H, W, 3] in [0, 1] as a data URI."""
    try:
        from matplotlib.image import imsave
    except ImportError:
        raise RuntimeError(INSTALL) from None
    buffer = io.BytesIO()
    imsave(buffer, pixels.clamp(0, 1).mul(255).round().to(torch.uint8).contiguous().numpy(), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def rgb(images: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] as [N, H, W, 3]: grey repeated, the first three channels of more."""
    if images.shape[1] < 3:
        images = images[:, :1].expand(-1, 3, -1, -1)
    return images[:, :3].movedim(1, -1)


def grid(images: torch.Tensor, columns: int, gap: int = 1) -> torch.Tensor:
    """Images [N, C, H, W] in [0, 1] as one picture [H', W', 3], row by row, on white."""
    tiles = rgb(images)
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    canvas = torch.ones(rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    for position, tile in enumerate(tiles):
        top, left = position // columns * (height + gap), position % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return canvas


def code_map(codes: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Code grids [N, h, w] as colours [N, 3, h, w]: one hue a code, neighbours in the codebook far apart."""
    hue = (codes.double() * 0.618033988749895) % 1.0
    value = 0.55 + 0.4 * ((codes.double() / max(num_codes, 1) * 7) % 1.0)
    channels = [((hue * 6 + shift) % 6 - 3).abs().sub(1).clamp(0, 1) for shift in (0, 4, 2)]
    return torch.stack([(0.15 + 0.85 * channel) * value for channel in channels], dim=1).float()
