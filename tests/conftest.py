"""Tests keep their tokens in a folder of their own, not in the user's."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHTUNE_AGENT_CACHE", str(folder))
        yield folder
