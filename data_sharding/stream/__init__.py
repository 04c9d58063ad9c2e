"""Reading datasets: frames, caches, substitutes of unreadable frames, and the loader of packed batches."""
