"""An online shop's order flow with a live page: the first thing to run (see README.md)."""
