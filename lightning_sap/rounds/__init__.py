"""When a network is pruned, and what came of it; without a trainer."""
