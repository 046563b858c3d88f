"""The learners. Each is an nn.Module that takes a TaskBatch and returns a loss with an exact meta-gradient."""

from fastmaml.algorithms.anil import ANIL
from fastmaml.algorithms.boil import BOIL
from fastmaml.algorithms.cavia import CAVIA
from fastmaml.algorithms.fomaml import FOMAML, FOML
from fastmaml.algorithms.imaml import IMAML
from fastmaml.algorithms.learner import Adapted, Learner, LearnerOutput
from fastmaml.algorithms.maml import MAML
from fastmaml.algorithms.mamlpp import MAMLPlusPlus
from fastmaml.algorithms.meta_curvature import MetaCurvature
from fastmaml.algorithms.meta_sgd import MetaSGD
from fastmaml.algorithms.proto_maml import ProtoMAML
from fastmaml.algorithms.reptile import Reptile

__all__ = [
    "ANIL",
    "BOIL",
    "CAVIA",
    "FOMAML",
    "FOML",
    "IMAML",
    "MAML",
    "Adapted",
    "Learner",
    "LearnerOutput",
    "MAMLPlusPlus",
    "MetaCurvature",
    "MetaSGD",
    "ProtoMAML",
    "Reptile",
]
