"""WHAT IS SAID ABOUT RUNS: logs, run log, support bundle, doctor, background tasks. Never imports torch."""
