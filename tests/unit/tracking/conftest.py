import pytest


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "runs" / "one"
    path.mkdir(parents=True)
    return path
