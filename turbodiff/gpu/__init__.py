"""WHO HAS THE MEMORY: what NVML says about the cards and about the processes on them.

Contents: the NVML sampler (its own process, a deadline on every sample), the machine as a whole, the holders.
Never here: torch, a CUDA context, decisions, signals to other people's processes.
Used by: jobs, supervisor, diagnostics, runtime, studio, cli.
"""
