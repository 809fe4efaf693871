"""Fit a plan's layers in order, each on its inputs in the network as decoupled so far."""
