#!/usr/bin/env bash
# Runs the findings that are named, or all, and prints a table. Exits with 1 where the behaviour of one has changed.
set -euo pipefail
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- *.sh
logs=$(mktemp -d)
changed=0
printf '%-40s %-8s %s\n' finding result log
for script in "$@"; do
    log="$logs/${script%.sh}.log"
    result=holds
    bash "$script" >"$log" 2>&1 || { result=changed; changed=1; }
    printf '%-40s %-8s %s\n' "${script%.sh}" "$result" "$log"
done
exit "$changed"
