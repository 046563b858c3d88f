"""The Engine checks inputs, chooses a backend and shapes results. `compiled` and `autodiff` compute. Knows no learner."""

from fastmaml.engine.engine import Engine as Engine
