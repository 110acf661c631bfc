"""Accuracy through the served endpoint, its statistics, and the report."""
