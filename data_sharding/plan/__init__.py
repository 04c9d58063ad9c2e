"""Which images each step trains on, and how they are divided among ranks and packs: integer arithmetic only."""
