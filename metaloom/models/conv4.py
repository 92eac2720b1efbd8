"""The small convolutional network of the few-shot literature.

Shape letters: N examples, D width, C classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from metaloom.models.bottleneck import StochasticBottleneck


class Conv4(nn.Module):
    """Blocks of 3x3 convolution with stride 2, batch norm and ReLU, then a linear head.

    The Omniglot network of Finn et al. 2017, section 5.2 (strided convolutions in place of
    pooling), here with the mean over positions before the head. Batch norm always uses the
    statistics of the examples at hand, as MAML does: predictions are transductive. With layer norm
    a prediction depends on its own image alone.

    Args:
        num_classes: C.
        width: channels of each block.
        num_blocks: each halves the image, rounding up (28 -> 14 -> 7 -> 4 -> 2).
        norm: `batch`; `layer`, over the channels and positions of one image; or `none`.
        num_channels: of the images, which may have any size.
        num_rehearsal_classes: those of a second head, `rehearsal`; None for none.
        bottleneck: width of a stochastic layer before the head; None for none.

    Attributes:
        heads: the module that gives each output, by the output's name.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        width: int,
        num_blocks: int,
        norm: str,
        num_channels: int = 1,
        num_rehearsal_classes: int | None = None,
        bottleneck: int | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(num_channels if index == 0 else width, width, norm=norm) for index in range(num_blocks)
        )
        self.bottleneck = None if bottleneck is None else StochasticBottleneck(width, bottleneck)
        self.head = nn.Linear(bottleneck or width, num_classes)
        self.heads = {"tasks": "head"}
        if num_rehearsal_classes is not None:
            self.rehearsal_head = nn.Linear(bottleneck or width, num_rehearsal_classes)
            self.heads["rehearsal"] = "rehearsal_head"

    def forward(self, images: Tensor, head: str = "tasks") -> Tensor:
        """Logits `[N, C]` of images `[N, channels, height, width]`.

        Args:
            head: `tasks` or `rehearsal`.
        """
        features = self.entering(images)
        for block in self.blocks:
            features = block(features)
        pooled = self.leaving(features)
        if self.bottleneck is not None:
            pooled = self.bottleneck(pooled)
        logits: Tensor = self.get_submodule(self.heads[head])(pooled)
        return logits

    def entering(self, images: Tensor) -> Tensor:
        """What the first block is given."""
        return images

    def leaving(self, features: Tensor) -> Tensor:
        """What comes behind the last block, `[N, D]`: the mean over positions."""
        return features.mean(dim=(2, 3))


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, *, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=norm == "none")
        self.norm = norm_layer(norm, out_channels)
        self.width = out_channels

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(features)))


def norm_layer(norm: str, num_channels: int) -> nn.Module:
    """The normalisation of a convolution's channels: `batch`, by the statistics of the examples at hand;
    `layer`, by those of one example (Ba et al. 2016, "Layer Normalization"), with weights by channel; or
    `none`."""
    match norm:
        case "batch":
            return nn.BatchNorm2d(num_channels, track_running_stats=False)
        case "layer":
            return nn.GroupNorm(1, num_channels)
    return nn.Identity()
