"""WILL IT FIT: arithmetic only. What every phase of a clip needs, what a machine has, and which choice to take.

Lives here: budget (bytes and seconds of every phase), machine, planner, reasons, tiers, calibration.
Never here: torch, devices, files of weights, measurements in progress.
Who may knock: gpu, jobs, runtime, studio, cli.
"""
