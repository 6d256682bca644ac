"""Algorithms by name. Each turns experience into credit and outputs into losses; adding one is a file and a line here."""

from app.algorithms.ppo import Ppo

ALGORITHMS = {"ppo": Ppo}
