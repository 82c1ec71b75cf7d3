"""PROCESSES: worker slots, attempts, watchdog, recovery, leftover workers, restart, the page. Never imports torch."""
