"""CARDS OF OTHER MACHINES, OVER RAY: the driver process, what runs on a node, and the supervisor's side of both.

Only bridge.py imports Ray, in a process of its own. Never imports torch.
"""
