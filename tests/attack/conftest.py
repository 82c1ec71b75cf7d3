from supervisor.fixtures import no_rest  # noqa: F401
