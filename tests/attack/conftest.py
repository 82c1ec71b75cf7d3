from supervisor.fixtures import no_rest  # noqa: F401

from tests.attack.other_users import ordinary_user  # noqa: F401
