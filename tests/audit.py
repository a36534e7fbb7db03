"""`python tests/audit.py`: what is installed fits together, and has no vulnerability that pip-audit's service knows of.

Exit status 1 where either does not hold; where the service cannot be reached, that part is skipped and said so.
"""

import json
import subprocess
import sys


def audited(text: str) -> tuple[int, list[str]]:
    """How many packages pip-audit has looked up, and a line for each vulnerability."""
    packages = json.loads(text)["dependencies"]
    known = [p for p in packages if "vulns" in p]
    found = [(p["name"], p["version"], v["id"], v["fix_versions"]) for p in known for v in p["vulns"]]
    return len(known), [
        f"{name} {version}: {name_of}, fixed in {', '.join(fixed_in) or 'no version'}" for name, version, name_of, fixed_in in found
    ]


def main() -> int:
    """The command line."""
    if subprocess.run([sys.executable, "-m", "pip", "check"], check=False).returncode:
        return 1
    line = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=180, check=False)
        count, found = audited(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        count, found = 0, []
    if not count:
        print("pip-audit: skipped, its service cannot be reached from here")
    for vulnerability in found:
        print(f"pip-audit: {vulnerability}")
    if count and not found:
        print(f"pip-audit: {count} packages, no vulnerability is known")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
