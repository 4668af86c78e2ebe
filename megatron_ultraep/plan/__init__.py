"""Pure functions: loads in, plan out. numpy and ``layout.py`` only; integers only; the same bits on every rank."""
