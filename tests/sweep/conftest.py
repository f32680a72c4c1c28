from tests.training.conftest import folder  # noqa: F401  a folder with a finished extract run
