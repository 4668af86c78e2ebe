"""Prompts: where they come from, in what order they are taken, and supervised pairs for a warm-up."""
