"""Tests mirror the packages. A package itself, so that a rank process can import a test module by its name."""
