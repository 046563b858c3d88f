"""Learner names: on the command line and in config files (keys), and as people write them (values)."""

from __future__ import annotations

ALGORITHMS = {
    "maml": "MAML",
    "fomaml": "FOMAML",
    "reptile": "Reptile",
    "foml": "FOML",
    "maml++": "MAML++",
    "imaml": "iMAML",
    "metasgd": "Meta-SGD",
    "anil": "ANIL",
    "boil": "BOIL",
    "protomaml": "ProtoMAML",
    "metacurvature": "Meta-Curvature",
    "cavia": "CAVIA",
}
