"""For tests: run an application in memory (harness), and prove a broker (promises, saboteurs, model)."""

from conveyor.testing.clock import TurnableClock
from conveyor.testing.harness import Harness

__all__ = ["Harness", "TurnableClock"]
