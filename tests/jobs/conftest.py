from supervisor.fixtures import bench, make_bench, no_rest, store  # noqa: F401
