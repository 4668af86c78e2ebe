"""Discrete-event simulation of generation and training: without Ray and vLLM, fast for hundreds of engines."""
