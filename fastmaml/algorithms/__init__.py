"""The learners: each is an nn.Module that takes a TaskBatch and returns a loss with an exact meta-gradient."""

from fastmaml.algorithms.fomaml import FOMAML
from fastmaml.algorithms.learner import Adapted, Learner, LearnerOutput
from fastmaml.algorithms.maml import MAML

__all__ = ["FOMAML", "MAML", "Adapted", "Learner", "LearnerOutput"]
