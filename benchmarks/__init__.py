"""How fast Conveyor is on this machine, with the bare libraries and the peers beside it in the same run."""
