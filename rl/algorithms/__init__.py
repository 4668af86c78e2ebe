"""Advantages and losses: pure tensor functions on packed tokens."""
