"""Datasets: read, checked before a run, and one that is drawn."""
