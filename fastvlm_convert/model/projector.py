"""The projector (LLaVA-1.5, arXiv:2310.03744): image features into the decoder's embedding space."""

from torch import Tensor, nn
from torch.nn import functional


class Projector(nn.Module):
    """Two linear layers around a GELU; [B, N, features] -> [B, N, hidden]."""

    def __init__(self, features: int, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, width)
        self.fc2 = nn.Linear(width, hidden)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(features)))
