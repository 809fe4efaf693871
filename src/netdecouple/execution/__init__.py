"""How a run is executed: workers, memory, work folder. Nothing in this package knows networks."""
