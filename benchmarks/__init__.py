"""How fast Conveyor is on this machine, with the bare library and a peer beside it in the same run."""
