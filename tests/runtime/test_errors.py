import pytest

from trigflow.runtime.errors import MissingExtraError, UserError


def test_user_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="expected b"):
        raise UserError("a; expected b; do c")


def test_missing_extra_says_what_was_wrong_expected_and_to_do_in_one_line() -> None:
    message = str(MissingExtraError("the digits data set", "scikit-learn", "digits"))
    wrong, expected, do = message.split("; ")
    assert wrong == "the digits data set needs scikit-learn, which is not installed"
    assert "'digits'" in expected
    assert do == 'run: pip install "trigflow[digits]"'
    assert "\n" not in message


def test_missing_extra_is_caught_as_a_user_error() -> None:
    with pytest.raises(UserError):
        raise MissingExtraError("reports", "jinja2", "report")
