"""Fixtures that tests anywhere may ask for by name, and a folder for the tokens they make, instead of the user's."""

import pytest

from tests.browser import browser as browser


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHTUNE_AGENT_CACHE", str(folder))
        yield folder
