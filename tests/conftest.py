"""Fixtures that tests anywhere may ask for by name."""

from tests.browser import browser as browser
