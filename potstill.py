"""The command line of Potstill."""
