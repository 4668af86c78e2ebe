"""Rewards: functions given by import path, run so that one that fails costs one sample, not the run."""
