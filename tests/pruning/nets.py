"""Small networks, one for each way in which channels can depend on one another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Chain(nn.Module):
    """Convolutions with and without normalization, flattened to several inputs per channel, two linears."""

    def __init__(self, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.act = nn.PReLU(2 * width)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc1 = nn.Linear(8 * width, hidden)
        self.fc2 = nn.Linear(hidden, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.bn1(self.conv1(images)))
        features = self.pool(self.act(self.conv2(features)))
        return self.fc2(torch.relu(self.fc1(torch.flatten(features, 1))))


class Residual(nn.Module):
    """A stem and a block around it: the stream's channels live in both."""

    def __init__(self, width: int = 8, inner: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        stream = torch.relu(self.bn(self.stem(images)))
        inner = torch.relu(self.bn1(self.conv1(stream)))
        stream = torch.relu(stream + self.bn2(self.conv2(inner)))
        return self.fc(stream.mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side, then one beside their sum with a wider one."""

    def __init__(self, left: int = 8, right: int = 16) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, left, 3, padding=1)
        self.right = nn.Conv2d(3, right, 1)
        self.whole = nn.Conv2d(3, left + right, 1)
        self.bn = nn.BatchNorm2d(left + right)
        self.head = nn.Conv2d(left + right, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([self.left(images), self.right(images)], 1)
        features = torch.relu(self.bn(both + self.whole(images)))
        return self.fc(torch.relu(self.head(features)).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual with squeeze and excitation, as in MobileNetV3."""

    def __init__(self, width: int = 8, inner: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.expand = nn.Conv2d(width, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.squeeze = nn.Conv2d(inner, 16, 1)
        self.excite = nn.Conv2d(16, inner, 1)
        self.project = nn.Conv2d(inner, width, 1)
        self.fc = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem(images)
        inner = functional.hardswish(self.bn1(self.expand(stream)))
        inner = functional.hardswish(self.bn2(self.depthwise(inner)))
        gate = functional.hardsigmoid(self.excite(torch.relu(self.squeeze(inner.mean((2, 3), keepdim=True)))))
        stream = stream + self.project(inner * gate)
        return self.fc(stream.mean((2, 3)))


class Grouped(nn.Module):
    """A convolution in 4 groups between two full ones, as in ResNeXt, and a transposed one in 2 groups."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.conv3 = nn.Conv2d(width, 16, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2, groups=2)
        self.last = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.grouped(torch.relu(self.conv1(images))))
        features = torch.relu(self.up(torch.relu(self.conv3(features))))
        return self.fc(torch.relu(self.last(features)).mean((2, 3)))


class Shuffle(nn.Module):
    """A channel shuffle: the halves of the stream are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.inner1 = nn.Conv2d(8, 16, 1)
        self.inner2 = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        left, right = self.stem(images).chunk(2, dim=1)
        right = self.inner2(torch.relu(self.inner1(right)))
        batch, channels, height, width = left.shape
        both = torch.cat([left, right], 1).view(batch, 2, channels, height, width)
        shuffled = both.transpose(1, 2).reshape(batch, 2 * channels, height, width)
        return self.fc(shuffled.mean((2, 3)))


class Awkward(nn.Module):
    """What cannot be pruned safely, one after the other, with one layer among them that can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.conv2 = nn.Conv2d(16, 24, 1)
        self.scale = nn.Parameter(torch.rand(24, 1, 1))
        self.conv3 = nn.Conv2d(24, 16, 1)
        self.shared = nn.Conv2d(16, 16, 1)
        self.free = nn.Conv2d(16, 32, 1)
        self.conv4 = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.conv1(images)))
        features = self.conv3(torch.relu(self.scale * self.conv2(features)))
        features = self.shared(torch.relu(self.shared(features)))
        features = self.conv4(torch.relu(self.free(features)))
        # The softmax mixes channels, which no rule foresees: only a trial tells.
        return self.fc(torch.softmax(features, dim=1).mean((2, 3)))


class Split(nn.Module):
    """Channels that are parted: halved for a gate, cut at fixed places, or gated by one channel for all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.width = 32  # nothing reads it
        self.stem = nn.Conv2d(3, 16, 1)
        self.both = nn.Conv2d(16, 32, 3, padding=1)
        self.mask = nn.Conv2d(16, 1, 1)
        self.last = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        stream = torch.relu(self.stem(images))
        if self.how == "broadcast":
            gated = stream * torch.sigmoid(self.mask(stream))
        else:
            both = self.both(stream)
            left, right = both.chunk(2, 1) if self.how == "chunk" else torch.split(both, [16, 16], 1)
            gated = left * torch.sigmoid(right)
        return self.fc(torch.relu(self.last(gated)).mean((2, 3)))


class Chunks(nn.Module):
    """Channels in parts that the code counts, one of them computed further and all joined again, as in YOLO's C2f."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.stem = nn.Conv2d(3, width, 1)
        self.inner = nn.Conv2d(width // parts, 8, 3, padding=1)
        self.last = nn.Conv2d(width + 8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        parts = torch.relu(self.stem(images)).chunk(self.parts, 1)
        both = torch.cat([*parts, torch.relu(self.inner(parts[-1]))], 1)
        return self.fc(torch.relu(self.last(both)).mean((2, 3)))


class Halves(nn.Module):
    """Halves by slices, of which neither graph nor autograd says that they must be equal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.last = nn.Conv2d(width // 2, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem(images)
        half = stream.shape[1] // 2
        return self.fc(torch.relu(self.last(stream[:, :half] * torch.sigmoid(stream[:, half:]))).mean((2, 3)))


class TwoSplits(nn.Module):
    """Two splits in one module: of one total but other sizes, or of equal sizes by other attributes."""

    def __init__(self, first: list[int], second: list[int]) -> None:
        super().__init__()
        self.a_sizes, self.b_sizes = first, second
        self.kernel = 8  # as wide as a part, but nothing that a split reads
        self.one = nn.Conv2d(3, sum(first), 1)
        self.two = nn.Conv2d(3, sum(second), 1)
        self.read0, self.read1, self.read2, self.read3 = (nn.Conv2d(size, 4, 1) for size in (*first, *second))
        self.fc = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        parts = [
            *torch.relu(self.one(images)).split(self.a_sizes, 1),
            *torch.relu(self.two(images)).split(self.b_sizes, 1),
        ]
        reads = (self.read0, self.read1, self.read2, self.read3)
        found = [torch.relu(read(part)) for read, part in zip(reads, parts, strict=True)]
        return self.fc(torch.stack(found).sum(0).mean((2, 3)))


class Parts(nn.Module):
    """Parts of sizes that an attribute names, as in MixNet; two of them are joined again beside what others become."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (6, 10, 8)
        self.stem = nn.Conv2d(3, 24, 1)
        self.first = nn.Conv2d(6, 8, 1)
        self.second = nn.Conv2d(10, 8, 3, padding=1)
        self.last = nn.Conv2d(30, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        first, second, third = torch.split(torch.relu(self.stem(images)), self.sizes, dim=1)
        both = torch.cat([self.second(second), third, self.first(first), first], 1)
        return self.fc(torch.relu(self.last(torch.relu(both))).mean((2, 3)))


class Rows(nn.Module):
    """Splits rows by an attribute: no channels depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [6, 10]
        self.stem = nn.Conv2d(3, 16, 1)
        self.last = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        above, below = torch.relu(self.stem(images)).split(self.sizes, dim=2)
        both = torch.cat([torch.cat([torch.empty(0), below]), above], dim=2)
        return self.fc(torch.relu(self.last(both)).mean((2, 3)))


class Hierarchy(nn.Module):
    """Parts of one size, each added to what became of the one before it, as in Res2Net."""

    def __init__(self, *, total: bool = False) -> None:
        super().__init__()
        self.kernel = 8  # the same number, but not the one that the split reads
        self.size = 24 if total else 8
        self.total = total
        self.stem = nn.Conv2d(3, 24, 1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(24, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        parts = torch.relu(self.stem(images)).split(self.size // 3 if self.total else self.size, 1)
        made = [self.convs[0](parts[0])]
        made.append(self.convs[1](torch.relu(made[0] + parts[1])))
        return self.fc(torch.relu(self.last(torch.cat([*made, parts[2]], 1))).mean((2, 3)))


class Auxiliary(nn.Module):
    """A second head that runs in training mode only, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 1)
        self.conv2 = nn.Conv2d(16, 16, 1)
        self.heads = nn.ModuleDict({"main": nn.Linear(16, 5), "aux": nn.Linear(16, 5)})
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        early = torch.relu(self.conv1(images))
        late = torch.relu(self.conv2(early))
        logits = self.heads["main"](self.dropout(late.mean((2, 3))))
        return (logits, self.heads["aux"](early.mean((2, 3)))) if self.training else logits


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in evaluation mode with random weights and statistics, so that every channel matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5, generator=generator)
                layer.running_mean.normal_(0.0, 0.3, generator=generator)
                layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def images(side: int = 8, seed: int = 0, count: int = 2) -> Tensor:
    return torch.randn((count, 3, side, side), generator=torch.Generator().manual_seed(seed))
