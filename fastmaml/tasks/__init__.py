"""Task sources: `Sinusoid`, `Glyphs`, `Omniglot`. Each has `.sample(tasks) -> TaskBatch`."""

from .glyphs import Glyphs
from .omniglot import Omniglot
from .sinusoid import Sinusoid
from .task_batch import TaskBatch

__all__ = ["Glyphs", "Omniglot", "Sinusoid", "TaskBatch"]
