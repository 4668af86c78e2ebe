"""Whether a run fits its GPUs, how long a step should take, and the smallest change that fits.

    from rl.planning.plan import make_plan

    plan = make_plan(load("recipes/x.yaml"))
    print(plan.render())
    plan.fits

``ultraep-rl plan`` prints it. Nothing here starts anything or needs a GPU; every function but the reading of files is
pure. Parameters and optimizer states are counted exactly; activations by what each module keeps for backward; times
from measured constants (``constants``), each beside its lower bound.
"""
