"""Small networks of other people's kinds, as their authors would write them."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class ResNetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.skip = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.relu(y + self.skip(x))
        return F.log_softmax(self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)), -1)


class MobileNetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16), nn.Hardswish())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 5, 2, 2, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.se1, self.se2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4))

    def forward(self, x):
        y = self.depth(self.expand(x))
        gate = F.hardsigmoid(self.se2(F.relu(self.se1(y.mean((2, 3), keepdim=True)))))
        return self.project(y * gate) + F.avg_pool2d(x, 2)


class ViTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 17, 16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class GPTBlock(nn.Module):
    """One new token; keys and values of earlier ones are in buffers that become states."""

    def __init__(self, context: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 16))
        self.head = nn.Linear(16, 11, bias=False)
        self.register_buffer("keys", torch.zeros(1, 4, context, 4))
        self.register_buffer("values", torch.zeros(1, 4, context, 4))

    def forward(self, token, mask):
        end = mask.shape[-1]
        x = self.embed(token)
        q, k, v = (t.view(1, 1, 4, 4).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        self.keys[:, :, end - 1 : end] = k
        self.values[:, :, end - 1 : end] = v
        y = F.scaled_dot_product_attention(q, self.keys[:, :, :end], self.values[:, :, :end], mask)
        x = x + self.out(y.transpose(1, 2).reshape(1, 1, 16))
        return self.head(x + self.mlp(self.norm2(x)))


class UNetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.mid = nn.Sequential(
            nn.Conv2d(8, 16, 3, 2, 1), nn.InstanceNorm2d(16, affine=True), nn.LeakyReLU(0.1)
        )
        self.up = nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.fuse = nn.Conv2d(24, 4, 3, padding=1, padding_mode="reflect")
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        a = self.down(x)
        b = self.mid(a)
        wide = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)[:, ::2]
        near = F.interpolate(b[:, :8], scale_factor=2, mode="nearest")
        y = self.fuse(torch.cat([self.up(b), wide, near], 1))
        return self.shuffle(torch.tanh(y))


class DetectionHead(nn.Module):
    """Decodes boxes on a grid and keeps the best."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, 2, 1)
        self.boxes, self.classes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)
        y, x = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
        self.register_buffer("centers", torch.stack([x, y], -1).view(1, 36, 2) + 0.5)

    def forward(self, image):
        f = F.silu(self.features(image))
        raw = self.boxes(f).permute(0, 2, 3, 1).reshape(1, 36, 4)
        xy = (raw[..., :2].sigmoid() * 2 - 0.5 + self.centers) * 2
        wh = raw[..., 2:].exp().clamp(max=20)
        boxes = torch.cat([xy - wh / 2, xy + wh / 2], -1)
        scores, kinds = self.classes(f).permute(0, 2, 3, 1).reshape(1, 36, 3).sigmoid().max(-1)
        best, order = scores.topk(5, 1)
        picked = torch.gather(boxes, 1, order.unsqueeze(-1).expand(-1, -1, 4))
        return picked, best, torch.gather(kinds, 1, order).float(), (scores > 0.5).float().sum(1)


class Recurrent(nn.Module):
    """A sequence model of the older kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(10, 4, batch_first=True)
        self.table = nn.Embedding(9, 6)

    def forward(self, tokens):
        y, _ = self.lstm(self.table(tokens))
        y, last = self.gru(y)
        return y, last, torch.cumsum(y, 1), torch.einsum("bti,bsi->bts", y, y)


class Arithmetic(nn.Module):
    """Operations that networks use in passing."""

    def forward(self, x, y):
        p = x.abs() + 0.5
        mask = x > y
        return (
            torch.where(mask, x, y), torch.pow(p, 1.5), torch.sqrt(p), torch.log(p), torch.exp2(x),
            torch.erf(x), torch.rsqrt(p), torch.maximum(x, y), torch.minimum(x, y), torch.floor(x),
            torch.ceil(x), torch.round(x), torch.sign(x), torch.remainder(x, 0.7), x // 0.7, torch.sin(x),
            torch.cos(x), torch.atan(x), torch.logsumexp(x, 1), x.std(1), x.norm(dim=1), x.amax(1), x.amin(1),
            x.argmax(1).float(), torch.flip(x, [1]), torch.roll(x, 1, 1), torch.tril(x[0]), torch.triu(x[0]),
            x.repeat(1, 2, 1), torch.stack([x, y], 1), torch.split(x, 2, 2)[1], x[:, 1:, ::2],
            torch.sort(x, 1)[0], x.clamp(-1, 1), F.pad(x, (1, 2), value=1.0), F.normalize(x, dim=1),
            F.softplus(x), F.elu(x), F.mish(x), F.glu(x, 1),
            torch.baddbmm(x @ y.transpose(1, 2), x, y.transpose(1, 2)),
            F.pixel_unshuffle(x.view(1, 2, 4, 6), 2), F.one_hot(x.argmax(1), 4).float(),
            torch.logical_and(mask, x > 0).float(), torch.zeros_like(x) + torch.arange(6.0),
            torch.scatter(x, 1, x.argsort(1), y),
        )  # fmt: skip
