"""Calibration inputs, and how pictures become network inputs."""
