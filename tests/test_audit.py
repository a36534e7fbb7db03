import json

from tests.audit import audited


def test_what_the_service_says_is_counted_and_named() -> None:
    packages = [
        {"name": "a", "version": "1", "vulns": []},
        {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}, {"id": "CVE-2", "fix_versions": []}]},
        {"name": "c", "skip_reason": "not found"},
    ]
    found = ["b 2: CVE-1, fixed in 3", "b 2: CVE-2, fixed in no version"]
    assert audited(json.dumps({"dependencies": packages})) == (2, found)
    assert audited(json.dumps({"dependencies": packages[2:]})) == (0, [])
