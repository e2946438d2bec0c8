import subprocess
import sys

import pytest

import hermes


def test_every_public_name_is_there():
    for name in hermes.__all__:
        assert getattr(hermes, name) is not None
    assert set(hermes.__all__) <= set(dir(hermes))


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'lord'"):
        _ = hermes.lord


@pytest.mark.parametrize("first", ["import hermes", "import hermes.plan, hermes.profile", "from hermes import api"])
def test_plan_and_profile_are_functions_whatever_was_imported_first(first):
    code = (
        f"{first}; import hermes; from hermes.plan import Plan; print(callable(hermes.plan), callable(hermes.profile))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "True True\n"


def test_importing_imports_no_torch():
    code = "import sys, hermes; hermes.HermesError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
