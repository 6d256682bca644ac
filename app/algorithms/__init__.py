"""Algorithms by name. Each turns experience into credit and outputs into losses; adding one is a file and a line here."""

from typing import Any

from app.algorithms.algorithm import Algorithm
from app.algorithms.grpo import Grpo
from app.algorithms.ppo import Ppo
from app.algorithms.reinforce_pp import ReinforcePp
from app.algorithms.rloo import Rloo

ALGORITHMS: dict[str, type[Algorithm[Any]]] = {"ppo": Ppo, "grpo": Grpo, "rloo": Rloo, "reinforce_pp": ReinforcePp}
