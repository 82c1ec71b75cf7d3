from supervisor.fixtures import make_bench, no_rest  # noqa: F401
