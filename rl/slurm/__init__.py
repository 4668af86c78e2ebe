"""What runs on the nodes of a Slurm job: a private Ray cluster, and the run on it; see ``scripts/slurm/launch.sh``."""
