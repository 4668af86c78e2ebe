"""Discrete-event simulation of generation and training; free of Ray and vLLM, and fast enough for hundreds of engines."""
