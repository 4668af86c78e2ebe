"""Kernels in CUDA C++: planning, rerouting, and what ranks exchange over NVLink.

The sources in ``csrc`` also compile for a CPU, where tests run them: see ``csrc/team.h``.
"""
