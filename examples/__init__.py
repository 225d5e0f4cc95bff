"""Applications built on Conveyor's public API, each a folder of its own."""
