"""Named users of the API from the shell."""


def test_a_user_is_added_with_a_token_shown_once_listed_without_it_and_removed(turbodiff):
    code, said = turbodiff("users", "add", "anna", "--share", "2", "--webhook", "http://127.0.0.1:8080/told")
    token = said.out.strip()
    assert code == 0 and token.startswith("anna.") and token not in said.err
    code, said = turbodiff("users", "list")
    assert code == 0 and token not in said.out and "/told" not in said.out
    assert ["anna", "2", "100", "127.0.0.1"] in [line.split()[:4] for line in said.out.splitlines()]
    assert turbodiff("users", "remove", "anna")[0] == 0
    assert "anna" not in turbodiff("users", "list")[1].out


def test_a_name_that_is_taken_or_none_and_a_user_who_is_not_there_are_one_clear_error(turbodiff):
    assert turbodiff("users", "add", "anna")[0] == 0
    for args in (("add", "anna"), ("add", "No Name"), ("add", "ben", "--share", "0"), ("remove", "chen")):
        code, said = turbodiff("users", *args)
        assert code == 2 and "error: " in said.err and "Traceback" not in said.err, (args, said.err)
