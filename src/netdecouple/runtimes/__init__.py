"""Opening, running and timing a network in the runtimes it will live in."""
