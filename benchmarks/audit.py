"""Look the installed packages up in the advisory database (pip-audit); says so where it cannot.

Exit code 0: nothing is known against them. 1: something is; it is listed. 3: nobody could be asked.
"""

from __future__ import annotations

import json
import subprocess
import sys

UNREACHABLE = 3


def main() -> int:
    """Run pip-audit on this interpreter's packages and put its answer into words."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"not audited: the advisory service cannot be asked ({last:.200})", file=sys.stderr)
        return UNREACHABLE
    skipped = [p for p in packages if "skip_reason" in p]
    if len(skipped) == len(packages):
        why = skipped[0]["skip_reason"] if skipped else "no packages"
        print(f"not audited: no package could be looked up ({why:.200})", file=sys.stderr)
        return UNREACHABLE
    found = [(p, v) for p in packages for v in p.get("vulns", [])]
    for package, known in found:
        fixed = ", ".join(known["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {known['id']}; mended in {fixed}")
    print(f"{len(packages) - len(skipped)} packages looked up, {len(found)} advisories")
    for package in skipped:
        print(f"not looked up: {package['name']} ({package['skip_reason']})")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
