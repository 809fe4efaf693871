"""Fit a plan's layers in order, each on what the partly decoupled network gives it."""
