"""Is what a run wrote what it did? From the files alone: the whole run, or its evaluations only."""
