"""Trace replay and its evidence."""
