"""Flower's quickstart on real digits."""
