"""Measurements: both sides of each ratio in one run, alternating, medians; nothing here is asserted by a test."""
