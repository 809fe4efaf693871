"""Deciding what to do to each layer: candidates, what they cost, what they lose, and the choice."""
