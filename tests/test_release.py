"""A version is released once, with a changelog, and never downwards."""

from datetime import date

import pytest

import release
from capo_rl import __version__

DAY = date(2027, 1, 31)


@pytest.mark.parametrize(
    ("version", "message"),
    [("0.2", "give three numbers"), ("v0.2.0", "give three numbers"), ("0.9.9", "is below 0.10.0")],
)
def test_a_version_that_is_none_or_below_the_present_one(version, message):
    with pytest.raises(release.ReleaseError, match=message):
        release.with_version('__version__ = "0.10.0"\n', version)


@pytest.mark.parametrize(
    ("changelog", "message"),
    [
        ("# Changelog\n\n## 0.2.0, 2026-12-01\n\n- A line.\n", "'## 0.2.0, 2026-12-01' on top"),
        ("# Changelog\n\n## 0.1.0, unreleased\n\n- A line.\n", "'## 0.1.0, unreleased' on top"),
        ("# Changelog\n", "'no heading' on top"),
        ("# Changelog\n\n## 0.2.0, unreleased\n\n## 0.1.0, 2026-12-01\n\n- A line.\n", "says nothing of 0.2.0"),
    ],
)
def test_a_changelog_that_does_not_speak_of_the_version(changelog, message):
    with pytest.raises(release.ReleaseError, match=message):
        release.with_date(changelog, "0.2.0", DAY)


def test_the_present_version_stands_in_one_place_and_could_be_released():
    source = (release.ROOT / release.VERSION_FILE).read_text(encoding="utf-8")
    assert release.with_version(source, __version__) == source
    assert "__version__" not in (release.ROOT / "pyproject.toml").read_text(encoding="utf-8").replace(
        'attr = "capo_rl.__version__"', ""
    )
    assert '__version__ = "99.0.0"' in release.with_version(source, "99.0.0")
