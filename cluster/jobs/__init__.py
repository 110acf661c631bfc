"""Runs as jobs of a Ray cluster, sent and watched from another machine."""
