"""WILL IT FIT: arithmetic only. What every phase of a clip needs, what a machine has, and which choice to take.

Contents: phase costs, weight sizes, roofline, hardware, candidates, offload search, planner, explain, calibration,
tiers, torch's traps. Never here: torch, devices, files of weights, measurements in progress.
Used by: gpu, models, weights, jobs, runtime, studio, cli.
"""
