"""What runs: asyncio, processes, databases."""
