"""Event-driven workers that lose nothing and repeat nothing."""
