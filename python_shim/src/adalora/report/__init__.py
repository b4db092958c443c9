"""What became of a model's ranks, as text, picture and page. `adalora.torch.RankReport` records it."""

from .page import page
from .picture import picture
from .summary import Summary
from .text import text

__all__ = ["Summary", "page", "picture", "text"]
